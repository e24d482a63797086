"""What the demo found: passes beside each other, results compared row by row, one table and one last line."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.table import Table

DIRECT = "direct"
"""The pass that all others are compared with, in results and in time."""


@dataclass(slots=True)
class Pass:
    """One run through all queries. `tiers` holds page hits of each tier, empty where there is no cache; `cpu_s` is
    processor time of the reading process, which a busy machine changes less than it changes seconds."""

    name: str
    title: str
    seconds: dict[str, float] = field(default_factory=dict)
    requests: int = 0
    received_bytes: int = 0
    digests: dict[str, str] = field(default_factory=dict)
    tiers: dict[str, int] = field(default_factory=dict)
    cpu_s: float = 0.0

    def add(self, event: dict[str, Any]) -> None:
        """Takes one query's event from the worker."""
        self.seconds[event["query"]] = event["seconds"]
        self.digests[event["query"]] = event["digest"]
        self.cpu_s += event["cpu_s"]
        self.requests += event["requests"]
        self.received_bytes += event["bytes"]

    @property
    def total_s(self) -> float:
        """Seconds of all queries together."""
        return sum(self.seconds.values())


@dataclass(slots=True)
class Report:
    """All passes and where they were made; `results` is the folder that holds every result's rows."""

    origin: str
    data: str
    queries: list[str]
    results: Path
    passes: list[Pass] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def differences(self) -> list[str]:
        """One line for each result that differs from the direct one, or is missing."""
        direct = next((one for one in self.passes if one.name == DIRECT), None)
        if direct is None:
            return ["the direct pass did not run: there is nothing to compare with"]
        lines = []
        for one in self.passes:
            for at, query in enumerate(self.queries):
                if one is direct or one.digests.get(query) == direct.digests.get(query) is not None:
                    continue
                lines.append(f"{one.name} {query}: {self._first_difference(one.name, at)}")
        return lines

    def equal_count(self) -> int:
        """Results that were compared with the direct one and are equal to it."""
        return len(self.queries) * (len(self.passes) - 1) - len(self.differences())

    def verdict(self) -> str:
        """The last line."""
        wrong = self.differences()
        if wrong or len(self.passes) < 2:
            return f"{max(len(wrong), 1)} of {len(self.queries) * max(1, len(self.passes) - 1)} results differ"
        return f"all {self.equal_count()} results equal"

    @property
    def good(self) -> bool:
        """Whether every result of every pass is equal to the direct one."""
        return len(self.passes) > 1 and not self.differences()

    def facts(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "origin": self.origin,
            "data": self.data,
            "queries": self.queries,
            "passes": [{**asdict(one), "total_s": one.total_s} for one in self.passes],
            "differences": self.differences(),
            "equal": self.equal_count(),
            "notes": self.notes,
            "verdict": self.verdict(),
        }

    def table(self) -> Table:
        """The one table, for a terminal."""
        from rich.table import Table

        table = Table(title=f"{self.data}: {len(self.queries)} queries in DuckDB\norigin: {self.origin}")
        table.add_column("pass")
        for title in ("seconds", "speed-up", "requests", "origin MB", "memory hits", "SSD hits", "misses"):
            table.add_column(title, justify="right")
        base = self.passes[0].total_s if self.passes else 0.0
        for one in self.passes:
            speed = f"{base / one.total_s:.1f}x" if one.total_s else "-"
            tiers = [f"{one.tiers[name]:,}" if one.tiers else "-" for name in ("memory", "ssd", "misses")]
            table.add_row(
                one.title,
                f"{one.total_s:.2f}",
                speed,
                f"{one.requests:,}",
                f"{one.received_bytes / 1e6:,.1f}",
                *tiers,
            )
        return table

    def _first_difference(self, name: str, at: int) -> str:
        ours, theirs = (_lines(self.results / folder / f"{at}.txt") for folder in (name, DIRECT))
        if ours is None or theirs is None:
            return "no result"
        for line, want in zip(ours, theirs):
            if line != want:
                return f"row {line} instead of {want}"
        return f"{len(ours)} rows instead of {len(theirs)}"


def _lines(path: Path) -> Sequence[str] | None:
    return path.read_text(encoding="utf-8").split("\n") if path.exists() else None
