"""Blocks of one engine in another: `python -m tests.kv_cross`, in any environment; it looks for that of the engines.

vLLM and transformers take turns over one cache directory, each in a process of its own. What vLLM stored feeds
transformers, and the other way round: same greedy tokens as without a cache. MLA is a miss by design: vLLM keeps the
rotated part of its latent in pairs, transformers takes the pairs apart, and the order is in the namespace.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-engines" / "bin" / "python"
MODELS = ("llama", "qwen3", "mla")
MEET = ("llama", "qwen3")
TIMEOUT_S = 600


def side(name: str, *words: str) -> dict:
    """Runs one side in a process of its own; what it found."""
    command = [str(PYTHON), "-m", f"tests.kv_cross.{name}", *words]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}: see above")
    return json.loads(done.stdout.strip().splitlines()[-1])


def rows(first: dict, then: dict, last: dict) -> list[tuple[str, str, int, bool, bool]]:
    """(model, direction, tokens reused, tokens equal, as it should be)."""
    made = []
    for model in MODELS:
        meets = model in MEET
        there, back = then[model], last[model]
        equal = there["got"] == there["truth"] == first[model]["stored"]
        reused = there["reused"]
        made.append((model, "vLLM -> transformers", reused, equal, equal and (reused > 0) is meets))
        equal = back["got"] == first[model]["truth"] == there["stored"]
        made.append((model, "transformers -> vLLM", back["hits"], equal, equal and (back["hits"] > 0) is meets))
        differs = back["poisoned"] != first[model]["poisoned"]
        good = differs is meets and (back["poisoned_hits"] > 0) is meets
        made.append((model, "poisoned before its digest", back["poisoned_hits"], not differs, good))
    return made


def namespaces(first: dict, then: dict) -> list[str]:
    """What is wrong with the layouts of the two engines: equal where they meet, else different in the order alone."""
    wrong = []
    for model in MODELS:
        ours, theirs = first[model]["layouts"], then[model]["layouts"]
        if model not in MEET:
            orders = [[each.pop("element_order") for each in layouts] for layouts in (ours, theirs)]
            if orders != [["interleaved"], ["neox"]]:
                wrong.append(f"{model}: element orders {orders}")
        if ours != theirs:
            wrong.append(f"{model}: vLLM has {ours}, transformers {theirs}")
    return wrong


def main() -> int:
    if not PYTHON.exists():
        print("no .venv-engines: make test-engines makes it")
        return 1
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TIERCACHE_CONFIG": ""}
    with tempfile.TemporaryDirectory(prefix="kv-cross-", ignore_cleanup_errors=True) as scratch:
        subprocess.run([str(PYTHON), "-m", "tests.engines.models", f"{scratch}/models"], cwd=ROOT, check=True)
        first = side("vllm_side", scratch, "first")
        then = side("transformers_side", scratch)
        last = side("vllm_side", scratch, "last")
    found, wrong = rows(first, then, last), namespaces(first, then)
    print(f"{'model':8} {'blocks':28} {'tokens reused':>13}  {'greedy tokens':14} verdict")
    for model, direction, reused, equal, good in found:
        verdict = ("as promised" if model in MEET else "a miss by design") if good else "WRONG"
        print(f"{model:8} {direction:28} {reused:13}  {'equal' if equal else 'different':14} {verdict}")
    for line in wrong:
        print(f"WRONG: {line}")
    return 0 if all(row[-1] for row in found) and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
