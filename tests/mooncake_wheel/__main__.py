"""python -m tests.mooncake_wheel [FOLDER]: Mooncake's own wheel tests for the store API, run against our module.

Without FOLDER (or MOONCAKE_WHEEL_TESTS) they are fetched from GitHub at a pinned commit, into a folder that is removed
afterwards; nothing of theirs is kept here. Every file gets a process and a cache of its own, in memory alone, so that
what a test calls gone after the last client has closed is gone. Prints a line for each test: passed, failed, not
claimed, or not run because this environment lacks something, with the reason. Ends with 1 where a claimed one failed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from tests.mooncake_wheel.plan import COMMIT, FOLDER, NOT_CLAIMED, OTHER_FILES, RUN, TOGETHER
from tiercache_connectors.mooncake_store import SHIMS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FETCH_S_MAX, FILE_S_MAX = 60, 300
SOURCE = f"https://raw.githubusercontent.com/kvcache-ai/Mooncake/{COMMIT}/{FOLDER}"


@contextlib.contextmanager
def fetched(folder: str | None) -> Iterator[Path]:
    """Where the files lie; each is what was read when the plan was made."""
    with tempfile.TemporaryDirectory() as room:
        place = Path(folder or room)
        for name, digest in RUN.items():
            if not folder:
                try:
                    with urllib.request.urlopen(f"{SOURCE}/{name}", timeout=FETCH_S_MAX) as answer:
                        (place / name).write_bytes(answer.read())
                except OSError as fault:
                    raise SystemExit(f"{SOURCE}/{name}: {fault}; without GitHub pass a folder with {FOLDER}") from None
            if hashlib.sha256((place / name).read_bytes()).hexdigest() != digest:
                raise SystemExit(f"{place / name} is not the file of commit {COMMIT[:12]}")
        yield place


def results(path: Path) -> list[tuple[str, str, str]]:
    """(test, passed, failed or skipped, its words) of one file, run in processes of its own."""
    rows: list[tuple[str, str, str]] = []
    with tempfile.TemporaryDirectory() as directory:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("TIERCACHE_")}
        environ |= {
            "PYTHONPATH": os.pathsep.join([str(SHIMS), str(Path(__file__).parents[2])]),
            "TIERCACHE_CONFIG": "",
            "TIERCACHE_DIRECTORY": f"{directory}/cache",
            "TIERCACHE_SSD_BYTES": "0",
            "TIERCACHE_LINGER_S": "0",
            "DEFAULT_KV_LEASE_TTL": "0",  # they sleep for it before they remove; nothing here has such a lease
        }
        begun = []
        for at, words in enumerate(TOGETHER.get(path.name, ([],))):
            out, log = Path(directory, f"{at}.json"), Path(directory, f"{at}.log")
            command = [sys.executable, "-m", "tests.mooncake_wheel.child", str(path), str(out), *words]
            with log.open("wb") as said:
                child = subprocess.Popen(
                    command, env=environ, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
                )
            begun.append((child, out, log, " ".join(words)))
        for child, out, log, words in begun:
            rows += [(f"{test} {words}".rstrip(), *rest) for test, *rest in ended(child, out, log)]
    return rows


def ended(child: subprocess.Popen[bytes], out: Path, log: Path) -> list[list[str]]:
    """What a process wrote down; its last words as a failure where it did not come to that."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(FILE_S_MAX)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # with whatever it started and left
    child.wait()
    try:
        return json.loads(out.read_text())
    except (OSError, ValueError):
        return [["the whole file", "failed", log.read_text(errors="replace")[-2000:]]]


def judged(test: str, outcome: str, words: str) -> tuple[str, str]:
    """What the table says of a test."""
    reason = NOT_CLAIMED.get(test.split()[0].rsplit(".", 1)[-1])
    if reason is not None:
        return "not claimed", reason
    return ("not run" if outcome == "skipped" else outcome), words


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mooncake_wheel", description=__doc__)
    parser.add_argument("folder", nargs="?", default=os.environ.get("MOONCAKE_WHEEL_TESTS"), help="instead of GitHub")
    asked = parser.parse_args(words)
    counts = {"passed": 0, "failed": 0, "not claimed": 0, "not run": 0}
    faults = []
    print(f"kvcache-ai/Mooncake at {COMMIT[:12]}, {FOLDER}")
    with fetched(asked.folder) as place:
        for name in RUN:
            print(f"\n{name}")
            for test, outcome, said in results(place / name):
                verdict, reason = judged(test, outcome, said)
                counts[verdict] += 1
                if verdict == "failed":
                    faults.append(f"{test}: {reason}")
                print(f"  {verdict:<12} {test}{f'  ({reason})' if verdict.startswith('not') else ''}")
    print("\nfiles that are not run")
    for names, reason in OTHER_FILES.items():
        print(f"  {names}\n      {reason}")
    print("\n" + ", ".join(f"{count} {what}" for what, count in counts.items()))
    for fault in faults:
        print(f"\n{fault}")
    return 1 if faults or not counts["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
