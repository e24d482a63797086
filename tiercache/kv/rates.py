"""Rates: how fast each tier has been of late, how much is queued on it, and how far that may be wrong.

A transfer of b bytes is taken to last `latency + (queued + b) / bandwidth`. Both are fitted by least squares of
relative errors to the last transfers, newer ones weighing more. What is stated beside the fit is its error: an envelope
over how wrong the last predictions were, which jumps up at once, comes down slowly, and widens while there is no
transfer. One outside of the stated error drops all that was known before: fast to distrust, slow to trust again.

Clocks are passed in. Thread-safe. Nothing here does I/O.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

MEMORY, SSD, REMOTE = 1, 2, 3
"""Tiers as `Core.probe_chain` and `KvStore.match` name them."""

SAMPLES = 16
FADE = 0.8
"""Weight of a sample beside the one after it."""
DOUBT_LEAST = math.log(1.15)
DOUBT_FIRST = math.log(3)
DOUBT_MOST = math.log(1024)
DOUBT_FADE = 0.8
WIDER = 1.25
"""An error as large as this times the largest of late is still within the stated one."""
STALE_S = 600.0
"""After so long without a transfer the stated error has grown by a factor of e."""
SECONDS_MIN = 1e-7


class Doubt:
    """How far predictions may be off, as a factor: a decaying envelope over the errors of the last ones."""

    __slots__ = ("_most",)

    def __init__(self) -> None:
        self._most = DOUBT_FIRST - DOUBT_LEAST

    def hear(self, low: float, high: float, found: float) -> bool:
        """Takes what came of a prediction between `low` and `high` (all seconds); whether it was outside of what had
        been stated."""
        miss = max(0.0, math.log(found / max(high, SECONDS_MIN)), math.log(max(low, SECONDS_MIN) / found))
        surprise = miss > self._most + DOUBT_LEAST
        self._most = max(DOUBT_FADE * self._most, WIDER * miss if surprise else miss)
        return surprise

    def spread(self, age_s: float = 0.0) -> float:
        """The stated relative error: what is found lies between prediction / (1 + spread) and * (1 + spread)."""
        return math.exp(min(self._most + DOUBT_LEAST + max(0.0, age_s) / STALE_S, DOUBT_MOST)) - 1


@dataclass(frozen=True, slots=True)
class Rate:
    """One reading of a tier."""

    bytes_per_s: float
    latency_s: float
    queued_bytes: int = 0
    """Asked for by this process and not there yet."""
    spread: float = 2.0
    """Stated relative error of what lies between `bounds`."""
    seen_bytes: tuple[float, float] = (0.0, math.inf)
    """The smallest and the largest transfer that this was learnt from."""

    def seconds(self, count_bytes: float) -> float:
        """Expected time until so many bytes more have come."""
        return self.latency_s + (self.queued_bytes + count_bytes) / self.bytes_per_s

    def seconds_max(self, count_bytes: float) -> float:
        """The longest that `seconds` may turn out to be within the stated error."""
        return self.bounds(count_bytes)[1] * (1 + self.spread)

    def bounds(self, count_bytes: float) -> tuple[float, float]:
        """`seconds` between two limits: the same for sizes such as were seen. Beyond them nobody knows what is latency
        and what is bandwidth: larger transfers may last in proportion, and smaller ones as long as those seen."""
        count = self.queued_bytes + count_bytes
        known = min(max(count, self.seen_bytes[0]), self.seen_bytes[1])
        seconds = self.latency_s + known / self.bytes_per_s
        scaled = seconds * count / known if known else seconds
        return min(seconds, scaled), max(seconds, scaled)


PRIORS: Mapping[int, Rate] = {
    MEMORY: Rate(4e9, 50e-6),
    SSD: Rate(500e6, 1e-3),
    REMOTE: Rate(50e6, 50e-3),
}
"""What is believed before the first transfer: a slow machine, an old SSD, an object store across a network."""


@dataclass(slots=True)
class Transfer:
    """One transfer under way; see Rates.begin."""

    tier: int
    count_bytes: int
    ahead_bytes: int
    began_s: float
    ended: bool = False


@dataclass(slots=True)
class _Tier:
    prior: Rate
    line: Rate
    doubt: Doubt = field(default_factory=Doubt)
    samples: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    queued_bytes: int = 0
    heard_s: float | None = None

    def hear(self, count_bytes: float, seconds: float, now_s: float) -> None:
        seconds = max(seconds, SECONDS_MIN)
        if self.doubt.hear(*self.line.bounds(count_bytes), seconds):
            self.samples.clear()
        self.samples.append((count_bytes, seconds))
        self.line = _fit(self.samples, self.prior)
        self.heard_s = now_s


class Rates:
    """Rates of all tiers. A tier without a prior is unknown until its first transfer."""

    def __init__(self, priors: Mapping[int, Rate] = PRIORS) -> None:
        self._lock = threading.Lock()
        self._tiers = {tier: _Tier(prior, replace(prior, queued_bytes=0)) for tier, prior in priors.items()}

    def begin(self, tier: int, count_bytes: int, now_s: float) -> Transfer:
        """A transfer was asked for: its bytes are queued until `end`, which must be called."""
        with self._lock:
            entry = self._entry(tier)
            transfer = Transfer(tier, count_bytes, entry.queued_bytes, now_s)
            entry.queued_bytes += count_bytes
        return transfer

    def end(self, transfer: Transfer, now_s: float, moved_bytes: int | None = None) -> None:
        """A transfer is over. `moved_bytes` is less than was asked for where it was given up: that it took so long is
        then what is known of it; of nothing moved, that all of it takes no less. Idempotent."""
        moved = moved_bytes or transfer.count_bytes
        with self._lock:
            if transfer.ended:
                return
            transfer.ended = True
            entry = self._entry(transfer.tier)
            entry.queued_bytes -= transfer.count_bytes
            # What was queued before it came first: its time is that of both.
            entry.hear(transfer.ahead_bytes + moved, now_s - transfer.began_s, now_s)

    def drop(self, transfer: Transfer) -> None:
        """A transfer is over, and nothing is to be learnt of it. Idempotent."""
        with self._lock:
            if not transfer.ended:
                transfer.ended = True
                self._entry(transfer.tier).queued_bytes -= transfer.count_bytes

    def observe(self, tier: int, count_bytes: int, seconds: float, now_s: float) -> None:
        """Takes a transfer that is over and was never queued."""
        with self._lock:
            self._entry(tier).hear(count_bytes, seconds, now_s)

    def look(self, now_s: float) -> dict[int, Rate]:
        """All tiers as they are now."""
        with self._lock:
            return {
                tier: replace(
                    entry.line,
                    queued_bytes=entry.queued_bytes,
                    spread=entry.doubt.spread(0.0 if entry.heard_s is None else now_s - entry.heard_s),
                )
                for tier, entry in self._tiers.items()
                if entry.samples or entry.prior is not _UNKNOWN
            }

    def _entry(self, tier: int) -> _Tier:
        if tier not in self._tiers:
            self._tiers[tier] = _Tier(_UNKNOWN, _UNKNOWN)
        return self._tiers[tier]


_UNKNOWN = Rate(1e8, 1e-2)
_ANCHORS_BYTES = (64 << 10, 64 << 20)
_ANCHOR_WEIGHT = 0.002


def _fit(samples: deque[tuple[float, float]], prior: Rate) -> Rate:
    """Latency and bandwidth, both positive, that fit samples of (bytes, seconds) best, newest last.

    Transfers of one size cannot tell the two apart, so two faint anchors hold on to the prior's proportion of them.
    """
    weights = [FADE ** (len(samples) - 1 - i) for i in range(len(samples))]
    ratios = [seconds / prior.seconds(count) for count, seconds in samples]
    scale = math.exp(sum(w * math.log(r) for w, r in zip(weights, ratios)) / sum(weights))
    points = [(w, count, seconds) for w, (count, seconds) in zip(weights, samples)]
    points += [(_ANCHOR_WEIGHT, at, scale * prior.seconds(at)) for at in _ANCHORS_BYTES]
    least_s = min(seconds for _, seconds in samples)
    one = x = xx = y = xy = 0.0
    for weight, count, seconds in points:
        # Relative errors: a millisecond of latency must not drown in the noise of a transfer of a second.
        w = weight / max(seconds, least_s) ** 2
        one, x, xx = one + w, x + w * count, xx + w * count * count
        y, xy = y + w * seconds, xy + w * count * seconds
    det = one * xx - x * x
    latency, slope = (y * xx - x * xy) / det, (one * xy - x * y) / det
    if latency < 0:
        latency, slope = 0.0, xy / xx
    elif slope <= 0:
        latency, slope = y / one, 0.0
    sizes = [count for count, _ in samples]
    return Rate(1 / max(slope, 1e-13), latency, seen_bytes=(min(sizes), max(sizes)))
