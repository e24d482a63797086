"""Hit ratios of our LRU beside libCacheSim's on real traces: `python -m bench.policy_sim [--json] [--trace NAME]`.

Parent rule off: every block is a request of its own, through the Policy port alone, in the order of the trace; the hit
ratio must equal libCacheSim's to four digits. Parent rule on (traces of chains): every request goes through the Index
as an engine's would; a hit is a block of the longest prefix that is there, blocks leave from the end of their chain,
and a request is one moment, its deepest block the oldest. Beside it the same measure, usable prefixes, rule off.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from bench import data
from bench.common import Figure, Json, arguments, emit, report, say, versions
from tiercache.index import Index
from tiercache.model import TierId
from tiercache.policy import POLICIES
from tiercache.testing.policies import PlainColumns

PART = 1 << 16
TOLERANCE = 0.00005
RECORD = np.dtype([("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])
"""libCacheSim's oracleGeneral format."""


@dataclass(frozen=True)
class Trace:
    """Block ids in order, and where requests end; `chains`: a block stands for all before it too."""

    blocks: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    chains: bool


def _requests(read: Callable[[], list[data.Request]]) -> Callable[[], Trace]:
    def load() -> Trace:
        lists = [request.blocks for request in read()]
        ends = np.cumsum([len(blocks) for blocks in lists])
        return Trace(np.concatenate([np.array(blocks, np.int64) for blocks in lists]), ends, True)

    return load


def _plain(read: Callable[[], npt.NDArray[np.int64]]) -> Callable[[], Trace]:
    def load() -> Trace:
        blocks = read()
        return Trace(blocks, np.arange(1, len(blocks) + 1), False)

    return load


TRACES: dict[str, tuple[Callable[[], Trace], tuple[float, ...]]] = {
    "mooncake_conversation": (_requests(data.mooncake_conversation), (1, 5, 10, 30)),
    "agentic_coding_dev": (_requests(data.agentic_coding_dev), (0.25, 0.5, 1, 5)),
    "miniswe": (_requests(data.miniswe), (5, 10)),
    "cloudphysics_w106": (_plain(data.cloudphysics), (1, 5, 10)),
    "arc_OLTP": (_plain(lambda: data.arc("OLTP")), (1, 10)),
    "arc_P3": (_plain(lambda: data.arc("P3")), (5, 10)),
    "swim": (_plain(lambda: np.array([job.path for job in data.swim()], np.int64)), (0.25,)),
}
"""Sizes in percent of the unique blocks."""


def plain_lru(trace: Trace, unique: int, capacity: int, policy_name: str = "lru") -> tuple[float, float]:
    """Hit ratio block by block through the Policy port, and the share of blocks in usable prefixes."""
    policy = POLICIES[policy_name]()
    policy.attach(PlainColumns(capacity))
    _, numbers = np.unique(trace.blocks, return_inverse=True)
    slot_of = [-1] * unique
    owner = [-1] * capacity
    touch, insert, remove, victims = policy.touch, policy.insert, policy.remove, policy.victims
    one = np.zeros(1, np.int64)
    used = hits = usable = start = 0
    for end in trace.ends.tolist():
        whole = True
        for block in numbers[start:end].tolist():
            slot = slot_of[block]
            if slot >= 0:
                hits += 1
                usable += whole
                touch(slot)
                continue
            whole = False
            if used < capacity:
                slot = used
                used += 1
            else:
                gone = victims(1)
                slot = int(gone[0])
                remove(gone, None)
                slot_of[owner[slot]] = -1
            slot_of[block], owner[slot] = slot, block
            one[0] = slot
            insert(one, None)
        start = end
    return hits / len(numbers), usable / len(numbers)


def chain_lru(trace: Trace, unique: int, capacity: int, policy_name: str = "lru") -> float:
    """Share of blocks found in usable prefixes, request by request through the Index, blocks kept leaf-last."""
    index = Index(capacity, [POLICIES[policy_name]()])
    _, numbers = np.unique(trace.blocks, return_inverse=True)
    digests = [xxhash.xxh3_128_digest(i.to_bytes(8, "little")) for i in range(unique)]
    hits = start = location = 0
    for end in trace.ends.tolist():
        chain = [digests[i] for i in numbers[start:end].tolist()]
        start = end
        match = index.match_chain(chain)
        found = len(match.slots)
        hits += found
        while (lacking := len(chain) - found - (capacity - index.used)) > 0:
            victims = index.victims(TierId.MEMORY, lacking)
            if not len(index.unplace(victims, TierId.MEMORY).slots):
                break
        rest = chain[found : found + capacity - index.used]
        if rest:
            made = index.reserve_chain(rest, 1 << 20, PART, parent=chain[found - 1] if found else None)
            fresh = made.slots[made.fresh]
            index.place(fresh, TierId.MEMORY, np.arange(location, location + len(fresh)), 1)
            location += len(fresh)
            index.release(made)
        index.release(match)
    return hits / len(numbers)


def libcachesim_lru(trace: Trace, capacities: Sequence[int]) -> list[float]:
    """Hit ratio of libCacheSim's LRU at each capacity."""
    import libcachesim

    records = np.zeros(len(trace.blocks), RECORD)
    records["id"] = trace.blocks - trace.blocks.min() + 1
    records["size"] = 1
    records["next"] = -1
    out = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.oracleGeneral"
        records.tofile(path)
        for capacity in capacities:
            reader = libcachesim.TraceReader(str(path), libcachesim.TraceType.ORACLE_GENERAL_TRACE)
            missed, _ = libcachesim.LRU(cache_size=capacity).process_trace(reader)
            out.append(1 - missed)
    return out


def compare(name: str, *, requests_max: int = 0) -> list[dict[str, Json]]:
    """One row a size: ours, libCacheSim's, and usable prefixes with the parent rule off and on."""
    load, percents = TRACES[name]
    trace = load()
    if requests_max and requests_max < len(trace.ends):
        ends = trace.ends[:requests_max]
        trace = Trace(trace.blocks[: ends[-1]], ends, trace.chains)
    unique = len(np.unique(trace.blocks))
    capacities = [max(1, int(unique * percent / 100)) for percent in percents]
    theirs = libcachesim_lru(trace, capacities)
    rows: list[dict[str, Json]] = []
    for percent, capacity, their in zip(percents, capacities, theirs, strict=True):
        ours, usable = plain_lru(trace, unique, capacity)
        row: dict[str, Json] = {
            "trace": name, "percent": percent, "capacity": capacity, "blocks": len(trace.blocks), "unique": unique,
            "lru": ours, "libcachesim_lru": their, "equal": abs(ours - their) < TOLERANCE,
        }  # fmt: skip
        if trace.chains:
            row["usable_parent_rule_off"] = usable
            row["usable_parent_rule_on"] = chain_lru(trace, unique, capacity)
        say(
            " ".join(
                f"{key}={value:.4f}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()
            )
        )
        rows.append(row)
    return rows


def main() -> None:
    """Prints the report."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--trace", choices=sorted(TRACES), action="append", help="only this one; may be repeated")
    options = parser.parse_args()
    rows: list[dict[str, Json]] = []
    for name in options.trace or TRACES:
        try:
            rows += compare(name, requests_max=2000 if options.quick else 0)
        except data.MissingData as missing:
            say(str(missing))
    apart = [abs(float(row["lru"]) - float(row["libcachesim_lru"])) for row in rows]
    figure = Figure(
        "lru_apart_max",
        max(apart, default=None),
        TOLERANCE,
        unit="hit ratio",
        raw={"rows": rows},
        note="largest difference from libCacheSim's LRU, parent rule off",
    )
    extra = {"versions": versions("libcachesim", "numpy")}
    emit(report("policy_sim", [figure], extra=extra), as_json=options.json)


if __name__ == "__main__":
    main()
