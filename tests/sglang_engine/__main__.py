"""SGLang as an engine over the cache: `python -m tests.sglang_engine`, in any environment; see tools/sglang.sh.

SGLang does not support this set-up (see shim/), so `make nightly` goes on where it fails. What is asserted: pages come
from storage; tokens are those of an engine without a cache; poison before digests is seen, damage after them is not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-sglang" / "bin" / "python"
MODELS = ("llama", "qwen3")
PAGES = 300 // 16
TIMEOUT_S = 300


def side(model: str, directory: str, pages: int, door: str = "") -> dict:
    """One engine in a process of its own; what it found."""
    command = [str(PYTHON), "-m", "tests.sglang_engine.side", model, directory, str(pages), door]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}: see above")
    return json.loads(done.stdout.strip().splitlines()[-1])


def cases(model: str, scratch: str) -> list[tuple[str, int, bool, bool]]:
    """(case, tokens from storage, tokens equal, as it should be)."""
    good, poisoned, whole = f"{scratch}/good", f"{scratch}/poisoned", PAGES * 16
    truth = side(model, "-", 0)["tokens"]
    made = []

    def add(case: str, told: dict, storage: int, equal: bool) -> None:
        same = told["tokens"] == truth
        made.append((case, told["storage"], same, same is equal and told["storage"] == storage))

    add("stores", side(model, good, PAGES), 0, True)
    add("loads in another process", side(model, good, 0), whole, True)
    add("stores, poisoned before digests", side(model, poisoned, PAGES, "Poisoning"), 0, True)
    add("loads what was poisoned", side(model, poisoned, 0), whole, False)
    told = side(model, good, 0, "Damaging")
    same = told["tokens"] == truth
    made.append(("damaged after digests", told["storage"], same, same and told["corrupt"] > 0))
    return made


def main() -> int:
    if not PYTHON.exists():
        print("no .venv-sglang: tools/sglang.sh makes it")
        return 1
    shim = str(ROOT / "tests" / "sglang_engine" / "shim")
    os.environ |= {"PYTHONPATH": shim, "SGLANG_ON_CPU": "1", "HF_HUB_OFFLINE": "1", "TIERCACHE_CONFIG": ""}
    good = True
    with tempfile.TemporaryDirectory(prefix="sglang-", ignore_cleanup_errors=True) as scratch:
        subprocess.run([str(PYTHON), "-m", "tests.engines.models", f"{scratch}/models"], cwd=ROOT, check=True)
        print(f"{'model':8} {'case':34} {'from storage':>12}  {'tokens':10} verdict", flush=True)
        for model in MODELS:
            for case, storage, same, fine in cases(f"{scratch}/models/{model}", f"{scratch}/{model}"):
                verdict = "as promised" if fine else "WRONG"
                print(f"{model:8} {case:34} {storage:12}  {'equal' if same else 'different':10} {verdict}", flush=True)
                good &= fine
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
