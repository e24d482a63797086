"""Usable-prefix hit ratios on real KV traces: `python -m bench.policy [--json] [--trace NAME] [--traces FOLDER]`.

A block of KV is of use only when every block before it is there too, so what counts of a request is the longest prefix
that is stored. Three caches of the same capacity, in blocks:

- `leaf_first`: ours. Requests go through the real Index and LRU policy as an engine's would: a request is one moment,
  its deepest block the oldest of it, and blocks leave from the end of their chains.
- `in_order`: the same LRU, blocks touched one by one in the order of the prompt, so that a prefix's head is older than
  its tail and leaves first; what is left behind it takes room and is of no use.
- `belady`: a bound. It knows the future, and keeps after each request those blocks whose next use comes first, of
  equals the ones nearer to the root. A block's parent is used whenever it is, so all that it keeps are whole prefixes.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from bench import data
from bench.common import Figure, Json, arguments, emit, report, say, versions
from bench.policy_sim import Trace, chain_lru, plain_lru

TRACES: dict[str, tuple[Callable[[], list[data.Request]], tuple[float, ...], int]] = {
    "mooncake_conversation": (data.mooncake_conversation, (0.5, 1, 2, 5, 10, 20, 30), 512),
    "agentic_coding_dev": (data.agentic_coding_dev, (0.25, 0.5, 1, 2, 5), 512),
    "miniswe": (data.miniswe, (2, 5, 10, 20, 40), 64),
}
"""Reader, sizes in percent of the unique blocks, and tokens of a block (miniswe: 256 bytes of text)."""
QUICK_REQUESTS = 1000
NEVER = 1 << 62


def belady(requests: Sequence[Sequence[int]], capacity: int) -> float:
    """Share of blocks that a cache of `capacity` blocks finds which knows all requests to come.

    Every use of a block that is used again is an interval until then; the block is found if it is kept for all of it.
    Keeping at most `capacity` intervals at each moment and dropping those that end last finds the most blocks (Belady,
    "A study of replacement algorithms for a virtual-storage computer", 1966; here a request is one moment, and what is
    never used again need not be kept at all).
    """
    upcoming: dict[int, int] = {}
    next_use = []
    for turn in range(len(requests) - 1, -1, -1):
        next_use.append([upcoming.get(block, NEVER) for block in requests[turn]])
        upcoming.update(dict.fromkeys(requests[turn], turn))
    next_use.reverse()
    kept: dict[int, int] = {}  # block: when it is used next
    latest: list[tuple[int, int, int]] = []  # (-next use, -depth, block); some are out of date
    found = total = 0
    for turn, blocks in enumerate(requests):
        total += len(blocks)
        for depth, (block, then) in enumerate(zip(blocks, next_use[turn], strict=True)):
            found += kept.pop(block, NEVER) == turn
            if then != NEVER:
                kept[block] = then
                heapq.heappush(latest, (-then, -depth, block))
        while len(kept) > capacity:
            then, _, block = heapq.heappop(latest)
            if kept.get(block) == -then:
                del kept[block]
    return found / total


def prefix_belady(requests: Sequence[Sequence[int]], capacity: int) -> float:
    """As `belady`, counting usable prefixes alone and checking that nothing else was kept: the slow form, for tests."""
    kept: set[int] = set()
    found = total = 0
    for turn, blocks in enumerate(requests):
        total += len(blocks)
        usable = next((i for i, block in enumerate(blocks) if block not in kept), len(blocks))
        found += usable
        later = requests[turn + 1 :]
        facts = dict.fromkeys(kept | set(blocks), (NEVER, 0))
        for when in range(len(later) - 1, -1, -1):
            facts.update((block, (when, depth)) for depth, block in enumerate(later[when]) if block in facts)
        wanted = sorted((fact, block) for block, fact in facts.items() if fact[0] != NEVER)
        kept = {block for _, block in wanted[:capacity]}
    return found / total


def measure(name: str, *, requests_max: int = 0) -> list[dict[str, Json]]:
    """One row a capacity of a trace; raises MissingData where it is not here."""
    read, percents, block_tokens = TRACES[name]
    requests = [request.blocks for request in read()][: requests_max or None]
    facts: dict[str, Json] = {"trace": name, "block_tokens": block_tokens}
    return [facts | row for row in compare([blocks for blocks in requests if blocks], percents)]


def compare(requests: Sequence[Sequence[int]], percents: Sequence[float]) -> list[dict[str, Json]]:
    """One row a capacity, in percent of the unique blocks: the three caches on the same requests."""
    blocks = np.concatenate([np.array(each, np.int64) for each in requests])
    trace = Trace(blocks, np.cumsum([len(each) for each in requests]), True)
    unique = len(np.unique(blocks))
    rows: list[dict[str, Json]] = []
    for percent in percents:
        capacity = max(1, int(unique * percent / 100))
        ours = chain_lru(trace, unique, capacity)
        _, usable = plain_lru(trace, unique, capacity)
        bound = belady(requests, capacity)
        row: dict[str, Json] = {
            "percent": percent, "capacity_blocks": capacity, "requests": len(requests), "blocks": len(blocks),
            "unique": unique, "infinite": 1 - unique / len(blocks),
            "leaf_first": ours, "in_order": usable, "belady": bound,
            "over_in_order": ours / usable if usable else None, "of_belady": ours / bound if bound else None,
        }  # fmt: skip
        say(" ".join(f"{k}={v:.4f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
        rows.append(row)
    return rows


def figures(rows: Sequence[dict[str, Json]]) -> list[Figure]:
    """What is reported: the least gain over in-order LRU, and a figure for each trace and capacity."""

    def number(row: dict[str, Json], key: str) -> float | None:
        value = row[key]
        return float(value) if isinstance(value, int | float) else None

    gains = [gain for row in rows if (gain := number(row, "over_in_order")) is not None]
    made = [
        Figure(
            "over_in_order_least",
            min(gains, default=None),
            0.995,
            at_most=False,
            raw={"rows": list(rows)},
            note="usable-prefix hit ratio of leaf-first LRU over in-order LRU, the worst of all traces and sizes",
        ),
        Figure("over_in_order_most", max(gains, default=None), at_most=False, note="the best of all traces and sizes"),
    ]
    for row in rows:
        note = f"in order {row['in_order']:.3f}, Belady {row['belady']:.3f}, {row['capacity_blocks']} blocks"
        made.append(Figure(f"{row['trace']}_{row['percent']}", number(row, "leaf_first"), at_most=False, note=note))
    return made


def main() -> None:
    """Prints the report."""
    parser = arguments("Usable-prefix hit ratios of leaf-first LRU, in-order LRU and Belady on real KV traces.")
    parser.add_argument("--trace", choices=sorted(TRACES), action="append", help="only this one; may be repeated")
    parser.add_argument("--traces", type=Path, help="folder that holds the traces; else as for `make data`")
    options = parser.parse_args()
    if options.traces:
        os.environ["TIERCACHE_DATA"] = str(options.traces)
    rows: list[dict[str, Json]] = []
    missing: list[str] = []
    for name in options.trace or TRACES:
        try:
            rows += measure(name, requests_max=QUICK_REQUESTS if options.quick else 0)
        except data.MissingData as error:
            missing.append(str(error))
            say(str(error))
    extra: dict[str, Json] = {"versions": versions("numpy"), "missing": missing}
    emit(report("policy", figures(rows), extra=extra), as_json=options.json)


if __name__ == "__main__":
    main()
