"""Finding: one line of the doctor."""

from __future__ import annotations

from dataclasses import dataclass

GOOD, LIMITED, MISSING = "good", "limited", "missing"
"""Works as it is; works with a limit worth knowing; not there, and the cache goes on without it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What, how it is, the fact in plain words, and what would change it (or nothing)."""

    topic: str
    state: str
    fact: str
    hint: str = ""
