"""Real engines over the cache: `make test-engines`, or `python -m tests.engines [--only TEXT] [--models DIRECTORY]`.

Ends with a table of models, doors and cases, and status 0 when every case is as it must be. Cases run in processes of
their own, several engines in each; see scenarios.py. Needs the environment that `make test-engines` makes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.engines import models

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 420.0
NOISE = ("Loading safetensors", "WARNING", "it/s]", "warnings.warn", "UserWarning", "Triton")


@dataclass(frozen=True)
class Run:
    """One process: a scenario over a model."""

    scenario: str
    model: str
    told: dict[str, Any] = field(default_factory=dict)
    several: bool = False
    """Engine and worker in processes of their own."""
    old: bool = False
    """With vLLM 0.28."""

    @property
    def title(self) -> str:
        door = "vllm_offload" if self.scenario == "offload" else "vllm_v1"
        return f"{self.model} | {door}{' 0.28' if self.old else ''}"


RUNS = [
    *(
        run
        for model in ("llama", "qwen3", "step3", "mla")
        for run in (Run("write", model, {"killed": True}), Run("read", model))
    ),
    Run("sizes", "llama"),
    Run("faults", "llama"),
    Run("pressure", "llama"),
    Run("groups", "gemma3"),
    Run("tenants", "llama"),
    Run("told_to_others", "llama"),
    Run("plans", "llama"),
    Run("offload", "llama"),
    Run("refused", "llama"),
    Run("shared", "llama", {"killed": True}, several=True),
    Run("shared", "llama", {"again": True}, several=True),
    Run("owner_dies", "llama", several=True),
    Run("ranks", "llama", several=True),
    Run("ranks", "step3", several=True),
    Run("ranks", "mla", several=True),
]
OLD = [
    Run("write", "llama", {"killed": True}, old=True),
    Run("read", "llama", {"modes": ["sync", "async"]}, old=True),
]


def execute(run: Run, root: Path, scratch: Path) -> list[dict[str, Any]]:
    """Cases of one run; a process that did not end as it should is one more, that failed."""
    directory = scratch / ("old" if run.old else "new") / run.model
    directory.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if run.several else "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([str(old_vllm())] if run.old else [])])
    environment.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    command = [sys.executable, "-m", "tests.engines.scenarios", run.scenario, str(root / run.model), str(directory)]
    began = time.monotonic()
    log = scratch / "log"
    with log.open("w") as told:
        # Files and a session of its own: a killed engine leaves processes behind that would hold a pipe open.
        process = subprocess.Popen(
            [*command, json.dumps(run.told)], env=environment, cwd=scratch, stdout=told, stderr=told, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            print(f"{run.title}: {run.scenario} did not end within {PATIENCE_S:.0f} s", file=sys.stderr)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    output = log.read_text(errors="replace")
    lines = [line.removeprefix("CASE ") for line in output.splitlines() if line.startswith("CASE ")]
    cases = [json.loads(line) for line in lines if line != "end"]
    if "end" not in lines:
        tail = [line for line in output.splitlines() if not any(word in line for word in NOISE)][-40:]
        print("\n".join(tail), file=sys.stderr)
        cases.append({"name": f"{run.scenario} ended early", "ok": False, "hits": 0, "equal": None, "note": ""})
    seconds = time.monotonic() - began
    for each in cases:
        verdict = {True: "equal", False: "differ", None: ""}[each["equal"]]
        good = "ok" if each["ok"] else "WRONG"
        print(
            f"{run.title:24} | {each['name']:40} | {each['hits']:5} | {verdict:6} | {good:5} | {each['note']}",
            flush=True,
        )
    print(f"{'':24} | {run.scenario}: {seconds:.0f} s", file=sys.stderr, flush=True)
    return cases


def old_vllm() -> Path:
    """Where `make nightly` has put vLLM 0.28."""
    return Path(sys.prefix) / "vllm028"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="runs whose scenario or model contains this")
    parser.add_argument("--models", type=Path, default=ROOT / "build" / "engines" / "models")
    parser.add_argument("--old", action="store_true", help="vLLM 0.28 as well")
    chosen = parser.parse_args()
    chosen.models.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "tests.engines.models", str(chosen.models)], cwd=ROOT, check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    assert all((chosen.models / name / "config.json").exists() for name in models.NAMES)
    wanted = [run for run in [*RUNS, *(OLD if chosen.old else [])] if chosen.only in f"{run.scenario} {run.model}"]
    if chosen.only and not any(run.scenario == "write" for run in wanted):
        wanted = [Run("write", name) for name in sorted({run.model for run in wanted} - {"gemma3"})] + wanted
    print(f"{'model | door':24} | {'case':40} |  hits | tokens |       | note")
    scratch = Path(tempfile.mkdtemp(prefix="tiercache-engines-"))
    try:
        cases = [each for run in wanted for each in execute(run, chosen.models, scratch)]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    wrong = sum(not each["ok"] for each in cases)
    print(f"{len(cases)} cases, wrong {wrong}")
    return 1 if wrong or not cases else 0


if __name__ == "__main__":
    sys.exit(main())
