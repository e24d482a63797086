"""One engine prefills, another one on another host goes on: `python -m tests.pd_hosts`, in any environment; it looks
for that of the engines.

Hosts are network namespaces, engines are vLLM on the CPU, each with a cache of its own that is a peer of the other.
Engine A computes a prompt and one token. Engine B has never seen it: it pulls all whole blocks from A's host and goes
on with the same greedy tokens as engine C, which has no cache; also when A's host loses its network, or all its
programs, while B pulls. Ends with status 0 when every row is as it must be. Needs Linux and root.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.engines.engine import prompt
from tests.pd_hosts.rows import MIDDLE, Pulled, Row, all_came, gained, misled, peer_of, some_came, table, wrongs
from tests.pd_hosts.seats import PYTHON, ROOT, FailedError, Seat, received_bytes, set_apart, slow_down
from tiercache import net
from tiercache.net.ucx.finding import find
from tiercache.testing.netns import hosts, why_not

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tiercache.testing.netns import Host

MODELS = {"step3": "Step-3 (MFA)", "mla": "DeepSeek (MLA)", "llama": "Llama (GQA)"}
TRANSPORTS = ("tcp", "ucx", "auto")
NEW = 24
"""Tokens that B goes on with."""
PROMPT, LONG = 1000, 1900
FRESH = 200
"""So many seeds from this one on are of prompts that only B sees, each once."""
PROMPTS = {"pull": (PROMPT, 1), "plan": (PROMPT, 2), "cut": (LONG, 3), "kill": (LONG, 4), "back": (PROMPT, 5)}
START_S, ANSWER_S, FOUND_S = 240.0, 60.0, 20.0
SLOW_BYTES_S = 4e6
POLL_S = 0.002
OPTIONS = {"max_model_len": 2048}


class Show:
    """The hosts, and what sits on them."""

    def __init__(self, places: list[Host], models: Path, scratch: Path) -> None:
        self.one, self.two, self._three = places
        self._models, self._scratch = models, scratch
        self._port, self._count, self._seed = 7650, 0, FRESH
        self.seats: dict[str, Seat] = {}
        self._truth: dict[tuple[str, str], list[int]] = {}
        self._environment = {
            "PYTHONPATH": str(ROOT), "TIERCACHE_CONFIG": "", "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo",
            "OMP_WAIT_POLICY": "PASSIVE",
        }  # fmt: skip
        if taken := find().taken:  # that of this environment, for that of the engines may lack one
            self._environment["TIERCACHE_UCX_LIB"] = taken.path

    # -- engines -------------------------------------------------------------------------------------------------------

    def start(self, name: str) -> Seat:
        """A process for an engine, where there is none."""
        if name not in self.seats:
            self._count += 1
            host = {"A": self.one, "B": self.two, "C": self._three}[name]
            self.seats[name] = Seat(name, host, self._scratch / f"{name}{self._count}.log", self._environment)
        return self.seats[name]

    def kill(self, *names: str) -> None:
        """Ends processes, and what belongs to them."""
        for name in names:
            if name in self.seats:
                self.seats.pop(name).kill()

    def tell_open(self, name: str, model: str, transport: str, *, poison: bool = False, **extra: Any) -> Seat:
        """An engine begins to start, with an empty cache."""
        seat = self.start(name)
        self._count += 1
        cache = {
            "directory": str(self._scratch / f"cache{self._count}"), "share": True, "linger_s": 1.0, "ssd_bytes": 0,
            "peer_transport": transport, "peer_token_file": str(self._scratch / "token"), "peer_deadline_s": 3,
            "peer_spill": False,
        }  # fmt: skip
        place = f"{self.one.address}:{self._port}"
        joined = {"peer_listen": place} if name == "A" else {"peers": place}
        seat.tell("open", model=str(self._models / model), extra=cache | joined | extra, poison=poison, **OPTIONS)
        return seat

    def open(self, model: str, transport: str, *, poison: bool = False) -> None:
        """Engines A and B, whose caches are peers; A stores wrong values with `poison`."""
        self._port += 1
        both = self.tell_open("A", model, transport, poison=poison), self.tell_open("B", model, transport)
        for seat in both:
            seat.opened(START_S)

    def close(self) -> None:
        """Ends both engines; their processes stay for the next ones."""
        for name in ("A", "B"):
            if name in self.seats:
                self.seats[name].tell("close")
        for name in ("A", "B"):
            if name in self.seats:
                self.seats[name].answer(ANSWER_S)

    def learn(self, models: list[str]) -> None:
        """What an engine without a cache says to all prompts."""
        for model in models:
            seat = self.start("C")
            seat.ask("open", START_S, model=str(self._models / model), extra=None, **OPTIONS)
            for name in PROMPTS if model == "llama" else ("pull",):
                told = seat.ask("tokens", ANSWER_S, prompt=ids(name), count=NEW)
                self._truth[model, name] = told["tokens"]
            seat.ask("close", ANSWER_S)
        self.kill("C")

    # -- rows ----------------------------------------------------------------------------------------------------------

    def rows(self, model: str, transport: str) -> Iterator[Row]:
        """All cases of one model over one transport."""
        cases: list[tuple[str, Callable[[str, str], Row]]] = [("B goes on", self.pull)]
        if model == "llama" and transport != "auto":
            cases += [
                ("A's host off the network", self.cut), ("A killed", self.killed), ("A comes back", self.back),
                ("planner on", self.planned), ("A stores wrong values", self.poisoned),
            ]  # fmt: skip
        for title, case in cases:
            try:
                yield case(model, transport)
            except (FailedError, subprocess.SubprocessError, OSError) as fault:
                yield Row(MODELS[model], transport, title, wrong=[str(fault)])
                self.kill("A", "B")
                return
        try:
            self.close()
        except FailedError:
            self.kill("A", "B")

    def pull(self, model: str, transport: str) -> Row:
        """The show itself."""
        self.open(model, transport)
        return self._pull(model, transport, "pull", "B goes on")

    def back(self, model: str, transport: str) -> Row:
        """Another A at the place of the killed one: B finds it."""
        self.tell_open("A", model, transport).opened(START_S)
        return self._pull(model, transport, "back", "A comes back")

    def planned(self, model: str, transport: str) -> Row:
        """B may compute what is not worth loading. All that must hold is that nobody can tell by the tokens."""
        title, seat = "planner on", self.seats["B"]
        seat.ask("close", ANSWER_S)
        self.tell_open("B", model, transport, plan=True).opened(START_S)
        without_s = [self._fresh(seat, PROMPT) for _ in range(4)][-1]
        where = self._prefilled("plan")
        pulled, words, wrong = self._go_on("plan", self._truth[model, "plan"], transport)
        if not where:
            wrong.append("B knew of no blocks")
        return Row(MODELS[model], words, title, pulled, without_s, wrong + wrongs(pulled))

    def poisoned(self, model: str, transport: str) -> Row:
        """A stores wrong values with right digests, and B goes on wrongly: what it pulls is what it computes with."""
        self.close()
        self.open(model, transport, poison=True)
        where = self._prefilled("pull")
        pulled, words, wrong = self._go_on("pull", self._truth[model, "pull"], transport)
        wrong += misled(pulled, where)
        return Row(MODELS[model], words, "A stores wrong values", pulled, 0.0, wrong, "ok: B cannot know")

    def cut(self, model: str, transport: str) -> Row:
        """A's host loses its network while B pulls: nobody is told, B computes what did not come."""
        try:
            return self._interrupted(model, transport, "cut", "A's host off the network", self.one.cut)
        finally:
            self.one.restore()

    def killed(self, model: str, transport: str) -> Row:
        """A's programs are killed while B pulls."""
        row = self._interrupted(model, transport, "kill", "A killed", lambda: self.kill("A"))
        self.start("A")
        return row

    def _pull(self, model: str, transport: str, name: str, title: str) -> Row:
        length, _ = PROMPTS[name]
        without_s = [self._fresh(self.seats["B"], length) for _ in range(3)][-1]
        where = self._prefilled(name)
        pulled, words, wrong = self._go_on(name, self._truth[model, name], transport)
        alone = self.seats["A"].ask("tokens", ANSWER_S, prompt=ids(name), count=NEW)["tokens"]
        return Row(MODELS[model], words, title, pulled, without_s, wrong + all_came(pulled, where, alone))

    def _interrupted(self, model: str, transport: str, name: str, title: str, strike: Callable[[], None]) -> Row:
        where = self._prefilled(name)
        sent = [0]

        def in_the_middle(need: int) -> None:
            first = received_bytes(self.two)
            until_s = time.monotonic() + ANSWER_S
            while self.seats["B"].idle and sent[0] < need * MIDDLE and time.monotonic() < until_s:
                time.sleep(POLL_S)
                sent[0] = received_bytes(self.two) - first
            strike()

        slow_down(self.one, SLOW_BYTES_S)
        try:
            pulled, words, wrong = self._go_on(name, self._truth[model, name], transport, in_the_middle)
        finally:
            slow_down(self.one, 0)
        if not where:
            wrong.append("B knew of no blocks")
        note = f"{sent[0] / 1e6:.1f} MB were there; {pulled.gain.get('failed_blocks', 0):.0f} blocks failed"
        return Row(MODELS[model], words, title, pulled, 0.0, wrong + some_came(pulled, sent[0]), note)

    def _prefilled(self, name: str) -> list[int]:
        """A computes a prompt and one token; where B then knows the blocks to be."""
        seat = self.seats["A"]
        seat.ask("tokens", ANSWER_S, prompt=ids(name), count=1)
        seat.ask("stored", ANSWER_S, prompt=ids(name))
        found: list[int] = self.seats["B"].ask("found", ANSWER_S, prompt=ids(name), patience_s=FOUND_S)
        return found

    def _go_on(
        self, name: str, right: list[int], transport: str, meanwhile: Callable[[int], None] | None = None
    ) -> tuple[Pulled, str, list[str]]:
        """B goes on with a prompt; `meanwhile` is told how many bytes that takes."""
        seat = self.seats["B"]
        words, wrong = peer_of(seat.ask("peers", ANSWER_S), transport)
        layout = seat.ask("layout", ANSWER_S)
        blocks = len(ids(name)) // layout["block_tokens"]
        before = seat.ask("counts", ANSWER_S)
        seat.tell("tokens", prompt=ids(name), count=NEW)
        if meanwhile is not None:
            meanwhile(blocks * layout["block_bytes"])
        told = seat.answer(ANSWER_S)
        gain = gained(before, seat.ask("counts", ANSWER_S))
        if (owner := seat.ask("owner", ANSWER_S)) != seat.owner:
            wrong.append(f"the owner of B's cache, {seat.owner}, is {owner} now")
        size = layout["block_bytes"], layout["block_tokens"]
        return Pulled(blocks, *size, right, told["tokens"], told["first_s"], gain), words, wrong

    def _fresh(self, seat: Seat, length: int) -> float:
        """Seconds to the first token of a prompt that nobody has seen."""
        self._seed = FRESH + (self._seed + 1) % FRESH
        told = seat.ask("tokens", ANSWER_S, prompt=prompt(length, self._seed), count=NEW)
        return float(told["first_s"])


def ids(name: str) -> list[int]:
    """Token ids of one of the prompts."""
    return prompt(*PROMPTS[name])


def lacking(transport: str) -> str:
    """Why a transport cannot be shown here; "" where it can."""
    if transport == "auto":
        return ""
    answer = net.usable(transport)
    return "" if answer.usable else answer.why


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=ROOT / "build" / "engines" / "models")
    parser.add_argument("--only", default="", help="cases whose model or transport contains this")
    chosen = parser.parse_args()
    if not PYTHON.exists():
        print("no .venv-engines: make test-engines makes it")
        return 1
    if reason := why_not(rate=True):
        print(f"not exercised: no hosts can be made here, {reason}")
        return 0
    wanted = [(m, t) for t in TRANSPORTS for m in MODELS if chosen.only in f"{m} {t}" and not lacking(t)]
    began_s = time.monotonic()
    chosen.models.mkdir(parents=True, exist_ok=True)
    subprocess.run([PYTHON, "-m", "tests.engines.models", chosen.models], cwd=ROOT, check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="pd-hosts-", ignore_cleanup_errors=True) as home, hosts(3) as places:
        scratch = Path(home)
        (scratch / "token").write_text(uuid.uuid4().hex)
        (scratch / "token").chmod(0o600)
        for host in places:
            identity = scratch / host.address
            identity.write_text(f"{uuid.uuid4()}\n")
            set_apart(host, identity)
        show = Show(places, chosen.models, scratch)
        try:
            show.start("A"), show.start("B")
            show.learn(sorted({model for model, _ in wanted}))
            for model, transport in wanted:
                for row in show.rows(model, transport):
                    rows.append(row)
                    seconds = f"{time.monotonic() - began_s:.0f} s"
                    print(seconds, *row.cells, sep=" | ", file=sys.stderr, flush=True)
        finally:
            show.kill(*list(show.seats))
    print(table(rows))
    for transport in TRANSPORTS:
        if reason := lacking(transport):
            print(f"{transport}: not exercised: {reason}")
    print(f"{len(rows)} rows, wrong {sum(bool(row.wrong) for row in rows)}, {time.monotonic() - began_s:.0f} s")
    return 1 if not rows or any(row.wrong for row in rows) else 0


if __name__ == "__main__":
    os.environ["TIERCACHE_CONFIG"] = ""
    sys.exit(main())
