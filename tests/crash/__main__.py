"""kill -9 of a writing process, again and again: `python -m tests.crash --kills 1000 [--json]`.

Ends with `wrong 0 lost 0` and status 0 when no wrong byte was read, everything that was acknowledged as durable was
there, no cap was passed at any instant, and every reopening worked and took writes. Two kinds of run take turns: one
whose cap holds all that it writes, so that nothing may be lost, and one that evicts all the time, where only wrong
bytes and the caps count. Some kills come while the cache is still recovering from the one before.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # children are forked: no idle threads in the parent

from tests.crash import child
from tests.crash.ledger import Ledger, Tally

MIB = 1 << 20
PATIENCE_S = 30.0
CHILD_STOPS_S = 0.3
COMMON = {
    "page_bytes": child.PAGE_BYTES,
    "disk_free_floor_bytes": MIB,
    "memory_bytes": 16 * MIB,
    "queue_bytes": 8 * MIB,
    "slots_max": 1 << 14,
}
KEEPING = {**COMMON, "ssd_bytes": 512 * MIB, "segment_bytes": 8 * MIB, "keeps": True}
CHURNING = {**COMMON, "ssd_bytes": 48 * MIB, "segment_bytes": 2 * MIB, "keeps": False}


@dataclass
class Place:
    """One directory with what is known of it."""

    path: Path
    options: dict[str, object]
    ledger: Ledger = field(default_factory=Ledger)
    largest_bytes: int = 0
    over: int = 0

    def renew_if_full(self) -> None:
        """Starts over before what was written in all comes near the cap; or forgets what may long be evicted."""
        if not self.options["keeps"]:
            self.ledger.trim(300)
        elif self.ledger.written_bytes > self.options["ssd_bytes"] // 8:
            shutil.rmtree(self.path)
            self.ledger = Ledger(count=self.ledger.count)

    def measure(self) -> None:
        """Compares the real size of the directory with the cap. Two equal listings: files that came and went between
        are not added up."""
        first, second = sizes_under(self.path), sizes_under(self.path)
        total = sum(min(size, second.get(name, 0)) for name, size in first.items())
        self.largest_bytes = max(self.largest_bytes, total)
        if first.keys() == second.keys() and total > self.options["ssd_bytes"]:
            self.over += 1


def sizes_under(path: Path) -> dict[str, int]:
    """Allocated bytes of every file below `path`."""
    sizes: dict[str, int] = {}
    for parent, _, names in os.walk(path):
        for name in names:
            try:
                sizes[os.path.join(parent, name)] = os.lstat(os.path.join(parent, name)).st_blocks * 512
            except OSError:
                continue
    return sizes


@dataclass
class Life:
    """What the parent saw of one child."""

    opened: bool = False
    acknowledged: int = 0
    open_s: float = 0.0
    closed: bool = False


def one_life(
    place: Place, rng: random.Random, tally: Tally, *, kill_after_s: float, in_recovery: bool, ends: bool
) -> Life:
    """Starts a child, kills it so long after it began to open (in_recovery) or to write, and reads its report."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        child.run(str(place.path), place.ledger, str(rng.random()), writer, place.options, ends=ends)
    os.close(writer)
    os.set_blocking(reader, False)
    life, begun, kill_at, rest = Life(), time.monotonic(), float("inf"), b""
    killed = False
    while True:
        now = time.monotonic()
        if not killed and (now >= kill_at or now - begun > PATIENCE_S):
            if now - begun > PATIENCE_S:
                tally.faults.append(f"hung for {PATIENCE_S} s, opened: {life.opened}")
            os.kill(pid, signal.SIGKILL)
            killed = True
        select.select([reader], [], [], 0.002 if not killed else 1.0)
        try:
            data = os.read(reader, 1 << 16)
        except BlockingIOError:
            place.measure()
            continue
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            text = line.decode(errors="replace")
            place.ledger.read(text, tally)
            if text == "o" and in_recovery:
                kill_at = time.monotonic() + kill_after_s
            elif text.startswith("v"):
                life.opened, life.open_s = True, time.monotonic() - begun
                kill_at = time.monotonic() + (0.0 if in_recovery else kill_after_s) if not ends else float("inf")
            elif text.startswith(("a", "p")):
                life.acknowledged += 1
            elif text == "z":
                life.closed = True
        place.measure()
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    if not killed and (not ends or status != 0):
        tally.faults.append(f"the child ended by itself with status {status}")
    place.measure()
    return life


def crash(kills: int, seed: str, *, quiet: bool) -> dict[str, object]:
    """Kills `kills` children and answers the sums."""
    rng, tally, begun = random.Random(seed), Tally(), time.monotonic()
    top = Path(tempfile.mkdtemp(prefix="tiercache-crash-"))
    places = [Place(top / "keeping", dict(KEEPING)), Place(top / "churning", dict(CHURNING))]
    in_recovery = opened = silent = 0
    open_s: list[float] = []
    try:
        for number in range(kills):
            place = places[number % 3 == 2]
            place.renew_if_full()
            early = rng.random() < 0.3
            wait_s = rng.uniform(0, 1.2 * (open_s[-1] if open_s else 0.05)) if early else rng.uniform(0, CHILD_STOPS_S)
            life = one_life(place, rng, tally, kill_after_s=wait_s, in_recovery=early, ends=False)
            in_recovery += not life.opened
            opened += life.opened
            silent += life.opened and not early and wait_s > CHILD_STOPS_S / 2 and not life.acknowledged
            open_s += [life.open_s] if life.opened else []
            if not quiet and (number + 1) % 50 == 0:
                seconds = time.monotonic() - begun
                print(f"{number + 1} kills, {seconds:.0f} s, wrong {tally.wrong} lost {tally.lost}", flush=True)
        for place in places:
            place.renew_if_full()
            life = one_life(place, rng, tally, kill_after_s=0, in_recovery=False, ends=True)
            if not life.closed or not life.acknowledged:
                tally.faults.append(f"the last opening of {place.path.name} took no writes or did not close")
    finally:
        shutil.rmtree(top, ignore_errors=True)
    seconds = time.monotonic() - begun
    return {
        "kills": kills,
        "kills_in_recovery": in_recovery,
        "opened": opened,
        "opened_but_silent": silent,
        "checked": tally.checked,
        "present": tally.present,
        "values": sum(place.ledger.count for place in places),
        "over_cap": sum(place.over for place in places),
        "largest_bytes": [place.largest_bytes for place in places],
        "cap_bytes": [place.options["ssd_bytes"] for place in places],
        "open_median_s": round(sorted(open_s)[len(open_s) // 2], 4) if open_s else None,
        "seconds": round(seconds, 2),
        "seconds_a_kill": round(seconds / max(1, kills), 3),
        "seed": seed,
        "revived": tally.revived,
        "faults": tally.faults[:20],
        "fault_count": len(tally.faults),
        "wrong": tally.wrong,
        "lost": tally.lost,
    }


def main() -> int:
    """Parses arguments, runs, reports; 1 when anything was not as promised."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--owners", type=int, default=0, help="kill so many owners of a shared directory instead")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.owners:
        from tests.crash.owners import owners

        sums = owners(arguments.owners, arguments.seed, quiet=arguments.json)
        last = ("kills", "over_cap", "wrong", "lost", "stuck")
        bad = any(sums[name] for name in last[1:]) or sums["fault_count"] or sums["kills"] < sums["wanted"]
    else:
        sums = crash(arguments.kills, arguments.seed, quiet=arguments.json)
        last = ("kills", "over_cap", "wrong", "lost")
        bad = any(sums[name] for name in last[1:]) or sums["revived"] or sums["fault_count"]
    if arguments.json:
        print(json.dumps(sums))
    else:
        for name, value in sums.items():
            if name not in (*last[1:], "faults"):
                print(f"{name} {value}")
        for fault in sums["faults"]:
            print(f"fault: {fault}")
        print(" ".join(f"{name} {sums[name]}" for name in last))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
