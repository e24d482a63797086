"""What is right of the show, and its table: pure parts of pd_hosts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PEER = 4
"""Where a peer has a block, as KvStore.match tells it."""
MIDDLE = 0.25
"""A peer that goes away in the middle has sent at least so much of what was wanted."""
READ = 'tiercache_read_bytes_total{tier="peer"}'
DAMAGED = 'tiercache_corruptions_total{tier="peer"}'
HEAD = ("model", "transport", "case", "tokens", "pulled", "of", "MB", "first", "without", "")


@dataclass(frozen=True)
class Pulled:
    """What host B's engine took from host A while it went on with one prompt."""

    blocks: int
    """Whole blocks of the prompt."""
    block_bytes: int
    block_tokens: int
    right: list[int]
    """Tokens of engine C, which has no cache."""
    got: list[int]
    first_s: float
    """Until B's first token."""
    gain: dict[str, float]
    """What B has counted meanwhile."""

    @property
    def tokens(self) -> int:
        """Tokens whose KV was loaded into the engine's memory."""
        return int(self.gain.get("loaded_blocks", 0)) * self.block_tokens

    @property
    def bytes(self) -> int:
        """What B's cache has read from its peer."""
        return int(self.gain.get(READ, 0))


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    model: str
    transport: str
    case: str
    pulled: Pulled | None = None
    without_s: float = 0.0
    """Seconds to B's first token of as long a prompt that nobody has seen."""
    wrong: list[str] = field(default_factory=list)
    note: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """As the table has it."""
        verdict = f"WRONG: {'; '.join(self.wrong)}" if self.wrong else self.note
        if (one := self.pulled) is None:
            return (self.model, self.transport, self.case, "", "", "", "", "", "", verdict)
        equal = "equal" if one.got == one.right else "differ"
        without = f"{self.without_s * 1e3:.0f} ms" if self.without_s else ""
        return (
            self.model, self.transport, self.case, equal, str(one.tokens), str(one.blocks * one.block_tokens),
            f"{one.bytes / 1e6:.1f}", f"{one.first_s * 1e3:.0f} ms", without, verdict or "ok",
        )  # fmt: skip


def gained(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """By how much counters have grown."""
    return {name: value - before.get(name, 0) for name, value in after.items()}


def wrongs(one: Pulled) -> list[str]:
    """What must hold whatever happens to the peer."""
    found = []
    if len(one.got) < len(one.right) or one.got != one.right:
        found.append(f"tokens {one.got} are not {one.right}")
    if damaged := one.gain.get(DAMAGED, 0):
        found.append(f"{damaged:.0f} blocks were damaged")
    return found


def all_came(one: Pulled, where: list[int], alone: list[int]) -> list[str]:
    """What is wrong where all whole blocks had to come from the peer. `where`: the places that B knew of; `alone`: how
    the engine that prefilled goes on itself."""
    found = wrongs(one)
    if alone != one.right:
        found.append(f"A alone goes on with {alone}")
    if where != [PEER] * one.blocks:
        found.append(f"B knew of blocks at {where}, which are not {one.blocks} at a peer")
    if one.tokens != one.blocks * one.block_tokens or one.tokens != one.gain.get("hits"):
        found.append(f"{one.tokens} tokens were loaded, and vLLM had expected {one.gain.get('hits', 0):.0f}")
    if one.bytes < one.blocks * one.block_bytes:
        found.append(f"{one.bytes} bytes came from the peer, which are not {one.blocks} * {one.block_bytes}")
    if failed := one.gain.get("failed_blocks", 0):
        found.append(f"{failed:.0f} blocks failed")
    return found


def misled(one: Pulled, where: list[int]) -> list[str]:
    """What is wrong where all that came had wrong values, and right digests."""
    found = all_came(one, where, one.right)
    if one.got == one.right:
        return [*found, "nothing that was pulled has been used"]
    return found[1:]  # the first one is that tokens differ


def some_came(one: Pulled, on_the_way: int) -> list[str]:
    """What is wrong where the peer went away in the middle. `on_the_way`: bytes that B's host had been sent by then."""
    found = wrongs(one)
    size = one.blocks * one.block_bytes
    if not MIDDLE * size <= on_the_way < size:
        found.append(f"{on_the_way} bytes had been sent when the peer went away: not in the middle of {size}")
    if one.tokens >= one.blocks * one.block_tokens:
        found.append("all blocks were loaded")
    return found


def peer_of(peers: list[dict[str, Any]], wanted: str) -> tuple[str, list[str]]:
    """How B's cache reaches its one peer, in words, and what is wrong about that."""
    if len(peers) != 1:
        return wanted, [f"{len(peers)} peers are connected"]
    name, negotiated = str(peers[0]["transport"]), str(peers[0]["negotiated"])
    words = name if negotiated in ("", name) else f"{name} ({negotiated})"
    wrong = [] if wanted in ("auto", name) else [f"the transport is {name}, not {wanted}"]
    return f"{wanted}: {words}" if wanted == "auto" else words, wrong


def table(rows: list[Row]) -> str:
    """All rows under one another."""
    lines = [HEAD, *(row.cells for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths)), line[-1]]).rstrip() for line in lines
    )
