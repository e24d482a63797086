"""The demo's second half: a prefix that one process computed, and was killed, is another's; `make demo` runs it.

    python -m tiercache_connectors.demo_kv

A transformers model of 125 million random weights is made on the spot. The first process computes a prefix, stores its
KV, and is killed with -9; so is the owner of its cache, and with it all that was in memory. The second asks something
else about the same prefix: without the cache, then with it. Greedy tokens have to be the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiercache
from tiercache.clock import SystemClock
from tiercache.errors import UnavailableError
from tiercache.owner import state
from tiercache.wire.sockets import readable

QUESTION_TOKENS = 40
NEW_TOKENS = 16
SEED = 20
SETTINGS: dict[str, Any] = {"memory_bytes": 512 << 20, "ssd_bytes": 1 << 30, "share": True}
END_S_MAX = 20.0
STEP_S_MAX = 600.0
"""No step takes this long, or the demo has failed."""

_clock = SystemClock()


@dataclass(frozen=True, slots=True)
class Size:
    """How large the demo is."""

    layers: int
    hidden: int
    vocabulary: int
    prefix_tokens: int
    timed: bool = True
    """Whether it is large enough for seconds to be saved."""


SIZES = {
    "full": Size(12, 768, 32000, 4096),
    "small": Size(2, 256, 512, 256, timed=False),
}


def make_model(size: Size) -> Any:
    """The same random weights in every process: Llama's shape with 4 KV heads; 125 million of them in full size."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 8 // 3,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2 * size.prefix_tokens,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.1,  # so that every token of the answer depends on the prefix
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def prompt(size: Size, question: int) -> Any:
    """Token ids, shape [1, tokens]: the prefix, which is always the same, and a question."""
    import torch

    said = torch.Generator().manual_seed(SEED)
    asked = torch.Generator().manual_seed(SEED + question)
    parts = [(size.prefix_tokens, said), (QUESTION_TOKENS, asked)]
    return torch.cat([torch.randint(3, size.vocabulary, (1, count), generator=each) for count, each in parts], dim=1)


def options(ids: Any) -> dict[str, Any]:
    """Greedy, and always so many tokens."""
    import torch

    return {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 2,
    }


def write(directory: str, size: Size) -> None:
    """The first process: computes the prefix and a question, and stores both until they survive its end."""
    from tiercache_connectors.transformers_kv import TransformersKV

    model, ids = make_model(size), prompt(size, 1)
    with tiercache.open(directory, **SETTINGS) as cache:
        reuse = TransformersKV(cache, model)
        began = _clock.monotonic()
        reuse.generate(ids, **options(ids))
        computed = _clock.monotonic() - began
        if not reuse.flush() or not cache.flush():
            raise UnavailableError("the KV could not be stored")
        stored = _clock.monotonic() - began - computed
        layout = reuse.layouts[0]
        blocks = (ids.shape[1] + NEW_TOKENS - 1) // layout.block_tokens
        told = {
            "parameters": sum(each.numel() for each in model.parameters()),
            "dtype": layout.dtype,
            "computed_s": computed,
            "stored_s": stored,
            "blocks": blocks,
            "bytes": blocks * layout.block_bytes,
        }
        print(json.dumps(told), flush=True)
        sys.stdin.read()  # and waits to be killed


def read(directory: str, size: Size) -> None:
    """The second process: the same prefix and another question, without the cache, from SSD, and from memory."""
    from tiercache_connectors.transformers_kv import TransformersKV

    model, ids = make_model(size), prompt(size, 2)
    short = ids[:, :64]
    model.generate(short, **options(short))  # whatever PyTorch sets up at its first use is nobody's gain
    began = _clock.monotonic()
    truth = model.generate(ids, **options(ids))
    told: dict[str, Any] = {"without_s": _clock.monotonic() - began, "passes": []}
    began = _clock.monotonic()
    with tiercache.open(directory, **SETTINGS) as cache, TransformersKV(cache, model) as reuse:
        block_bytes = reuse.layouts[0].block_bytes
        told["opened_s"] = _clock.monotonic() - began
        for _ in range(2):
            began = _clock.monotonic()
            output = reuse.generate(ids, **options(ids))
            took, got = _clock.monotonic() - began, reuse.reused
            told["passes"].append(
                {
                    "seconds": took,
                    "tokens": got.tokens,
                    "same": bool((output == truth).all()),
                    "ssd_bytes": got.ssd * block_bytes,
                    "memory_bytes": got.memory * block_bytes,
                }
            )
            reuse.flush()
    print(json.dumps(told), flush=True)


def _start(role: str, directory: str, size: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "tiercache_connectors.demo_kv", "--size", size, "--role", role]
    return subprocess.Popen(
        [*words, "--directory", directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _told(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    if not readable(process.stdout.fileno(), STEP_S_MAX):
        raise UnavailableError(f"a process of the demo said nothing for {STEP_S_MAX:g} s")
    line = process.stdout.readline()
    if not line:
        raise UnavailableError(f"a process of the demo ended with status {process.wait(STEP_S_MAX)}: see above")
    told: dict[str, Any] = json.loads(line)
    return told


def kill_owner(directory: str) -> bool:
    """Kills the owner of a directory with -9: what it had in memory is gone. Whether there was one."""
    left = state.read(directory)
    if left is None or not left.owner.alive:
        return False
    waiter = os.pidfd_open(left.owner.pid)
    try:
        os.kill(left.owner.pid, signal.SIGKILL)
        if not readable(waiter, END_S_MAX):
            raise UnavailableError(f"the owner of {directory} did not end within {END_S_MAX:g} s")
    finally:
        os.close(waiter)
    return True


def run(directory: str, size: str = "full") -> bool:
    """Both processes, one after the other, and what they found. Whether all went as it should."""
    with _start("write", directory, size) as writer:
        try:
            wrote = _told(writer)
        finally:
            writer.kill()  # SIGKILL: nothing of it is left but what its cache has on the SSD
    owner = kill_owner(directory)
    print(
        f"A model of {wrote['parameters'] / 1e6:.0f} million random weights, {wrote['dtype']}; a prefix of "
        f"{SIZES[size].prefix_tokens:,} tokens, a question of {QUESTION_TOKENS}, {NEW_TOKENS} greedy tokens"
    )
    print(
        f"first process: computed in {wrote['computed_s']:.2f} s, stored {wrote['blocks']} blocks "
        f"({wrote['bytes'] / 1e6:.1f} MB) in {wrote['stored_s']:.2f} s; killed with -9"
        + (", and the owner of its cache with it" if owner else "")
    )
    with _start("read", directory, size) as reader:
        try:
            found = _told(reader)
        finally:
            if reader.stdin is not None:
                reader.stdin.close()
    kill_owner(directory)
    return _report(found, SIZES[size])


def _report(found: dict[str, Any], size: Size) -> bool:
    without = found["without_s"]
    print(f"second process, another question: cache opened and weights digested in {found['opened_s']:.2f} s")
    print(f"  {'':24}{'seconds':>9}{'saved':>9}{'reused':>9}{'from SSD':>12}{'from memory':>13}  greedy tokens")
    print(f"  {'without the cache':24}{without:9.2f}{'':9}{'':9}{'':12}{'':13}")
    for title, each in zip(("prefix from SSD", "prefix from memory"), found["passes"]):
        moved = [f"{each[name] / 1e6:.1f} MB" for name in ("ssd_bytes", "memory_bytes")]
        same = "identical" if each["same"] else "DIFFERENT"
        saved = without - each["seconds"]
        print(f"  {title:24}{each['seconds']:9.2f}{saved:9.2f}{each['tokens']:9,}{moved[0]:>12}{moved[1]:>13}  {same}")
    first, second = found["passes"]
    good = (
        all(each["same"] and each["tokens"] >= size.prefix_tokens for each in found["passes"])
        and (not size.timed or max(first["seconds"], second["seconds"]) < without)
        and first["ssd_bytes"] > 0
        and first["memory_bytes"] == 0
        and second["ssd_bytes"] == 0
    )
    print("as it should be" if good else "NOT as it should be: tokens, tiers or seconds differ from what is promised")
    return good


def main() -> int:
    """0 where all went as it should."""
    parser = argparse.ArgumentParser(description="The demo's second half: KV from the SSD of a killed process.")
    parser.add_argument("--role", choices=("write", "read"), help="what the demo's own processes are told")
    parser.add_argument("--directory", help="where the cache goes; a folder of its own under .cache without it")
    parser.add_argument("--size", choices=SIZES, default="full", help="small: for tests, too quick to save seconds")
    told = parser.parse_args()
    if told.role:
        (write if told.role == "write" else read)(told.directory, SIZES[told.size])
        return 0
    work = Path(told.directory or ".cache")
    work.mkdir(parents=True, exist_ok=True)
    here = tempfile.mkdtemp(prefix="demo-kv-", dir=work)
    try:
        return 0 if run(here, told.size) else 1
    finally:
        shutil.rmtree(here, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
