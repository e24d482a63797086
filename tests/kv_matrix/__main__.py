"""python -m tests.kv_matrix: KV written at each parallelism and block size and read at each, for every attention.

Writes at each of TP {1, 2, 4, 8} x PP {1, 2} x engine block {16, 32, 128} and reads at each, 576 pairs a kind; ranks
are threads with memory of their own over one cache. `--shared` puts an owner process between them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from typing import TYPE_CHECKING

import tiercache
from tests.kv_matrix.engine import SHAPES
from tests.kv_matrix.matrix import Row, run, shapes

if TYPE_CHECKING:
    from collections.abc import Sequence


def _kinds(text: str) -> list[str]:
    found = text.split(",")
    if unknown := [kind for kind in found if kind not in SHAPES]:
        raise argparse.ArgumentTypeError(f"{', '.join(map(repr, unknown))}: there are {', '.join(SHAPES)}")
    return found


def _number(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def _numbers(text: str) -> list[int]:
    return [_number(one) for one in text.split(",")]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kv_matrix", description=__doc__)
    parser.add_argument("--kinds", type=_kinds, default=list(SHAPES), help=f"of attention: {','.join(SHAPES)}")
    parser.add_argument("--tp", type=_numbers, default=[1, 2, 4, 8], help="1,2,4,8")
    parser.add_argument("--pp", type=_numbers, default=[1, 2], help="1,2")
    parser.add_argument("--blocks", type=_numbers, default=[16, 32, 128], help="tokens of an engine's block: 16,32,128")
    parser.add_argument("--tokens", type=_number, default=160, help="of a sequence; a few more are never stored")
    parser.add_argument("--shared", action="store_true", help="by way of an owner process")
    parser.add_argument("--json", action="store_true", help="one line of JSON a kind")
    asked = parser.parse_args(words)
    wanted = shapes(asked.tp, asked.pp, asked.blocks)
    rows: list[Row] = []
    with (
        tempfile.TemporaryDirectory() as directory,
        tiercache.open(
            directory, memory_bytes="512MiB", ssd_bytes=0, share=asked.shared, disk_free_floor_bytes=0
        ) as cache,
    ):
        if not asked.json:
            print(f"{len(wanted)} shapes of engines write, each of them reads")
            print(f"{'kind':5} {'writes':>7} {'reads':>7} {'blocks':>8} {'mismatch':>9} {'stored':>8} {'moved':>8}")
        for kind in asked.kinds:
            row = run(cache, kind, asked.tokens, wanted)
            rows.append(row)
            if asked.json:
                print(json.dumps(asdict(row)), flush=True)
                continue
            stored, moved = (one / row.logical_bytes for one in (row.stored_bytes, row.moved_bytes))
            print(
                f"{kind:5} {row.writes:7} {row.reads:7} {row.blocks:8} {row.mismatch:9} {stored:7.2f}x {moved:7.2f}x",
                flush=True,
            )
            for fault in row.faults[:10]:
                print("     ", fault)
    wrong = sum(row.mismatch for row in rows)
    good = not any(row.faults or row.differs or row.stored_bytes != row.logical_bytes for row in rows)
    print(f"mismatch {wrong}")
    return 0 if good and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
