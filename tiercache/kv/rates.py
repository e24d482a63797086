"""Rates: how fast each tier has been of late, how much is queued on it, and how far that may be wrong.

A transfer of b bytes is taken to last `latency + (queued + b) / bandwidth`. Both are fitted by least squares of
relative errors to the last transfers, newer ones weighing more, and then scaled so that half of them took longer.

Single transfers scatter widely on a busy machine, so what is stated beside the fit is the error of what is *expected*,
not the scatter: that of a median, which shrinks with the number of samples and has a limit. A transfer that is off by
more than a factor of CLIP counts as off by that much. Three slow ones in a row are a change: what was known before is
dropped. Of fast ones one does, for little is fast by accident; where it was one, three usual ones put that right.

Clocks are passed in. Thread-safe. Nothing here does I/O.
"""

from __future__ import annotations

import math
import statistics
import threading
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

MEMORY, SSD, REMOTE, PEER = 1, 2, 3, 4
"""Tiers as `Core.probe_chain` and `KvStore.match` name them."""

SAMPLES = 16
FADE = 0.8
"""Weight of a sample beside the one after it."""
CLIP = math.log(2.5)
"""What is off by more than this (in logarithms) is a surprise."""
SLOW_IN_A_ROW = 3
"""So many slow surprises one after another are a change, fewer are accidents."""
ERROR_LEAST = math.log(1.15)
SCATTER_FIRST = 0.5
"""Scatter (standard deviation of the logarithm) that is assumed before there are FEW samples to find it from."""
FEW = 4
LOAD_ERROR_MOST = 2.0
"""The largest stated error of a tier, as a factor."""
STALE_S = 600.0
"""After so long without a transfer the stated error has grown by a factor of e."""
SECONDS_MIN = 1e-7


class Doubt:
    """How far predictions may be off in expectation, as a factor, and which samples are accidents."""

    __slots__ = ("_fast_in_a_row", "_misses", "_most", "_row", "_slow")

    def __init__(self, most: float, fast_in_a_row: int = 1) -> None:
        """The stated error never exceeds a factor of `most`. So many fast surprises in a row are a change."""
        self._misses: deque[float] = deque(maxlen=SAMPLES)
        self._most = math.log(most)
        self._fast_in_a_row = fast_in_a_row
        self._row, self._slow = 0, False

    def hear(self, low: float, high: float, found: float) -> tuple[float, int]:
        """Takes what came of a prediction between `low` and `high` (all seconds). Returns what it counts for, no more
        than a factor off; and, where this was the last of several surprises that make a change, their number."""
        low, high = max(low, SECONDS_MIN), max(high, SECONDS_MIN)
        miss = math.log(found / min(max(found, low), high))
        if abs(miss) <= CLIP:
            self._row = 0
            self._misses.append(abs(miss))
            return found, 0
        self._row = self._row + 1 if self._slow == (miss > 0) else 1
        self._slow = miss > 0
        if self._row >= (SLOW_IN_A_ROW if self._slow else self._fast_in_a_row):
            row, self._row = self._row, 0
            self._misses.clear()
            return found, row
        self._misses.append(CLIP)  # an accident, so far
        return high * math.exp(CLIP) if self._slow else low / math.exp(CLIP), 0

    def spread(self, samples: int, age_s: float = 0.0) -> float:
        """The stated relative error of what is expected by a fit to so many samples: it lies between prediction /
        (1 + spread) and * (1 + spread)."""
        if not samples:
            return math.exp(self._most) - 1
        scatter = 1.5 * statistics.median(self._misses) if self._misses else 0.0  # of a normal distribution, by its MAD
        if len(self._misses) < FEW:
            scatter = max(scatter, SCATTER_FIRST)
        error = max(ERROR_LEAST, scatter / math.sqrt(min(samples, SAMPLES))) + max(0.0, age_s) / STALE_S
        return math.exp(min(error, self._most)) - 1


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
        """The most that may have to be expected within the stated error; single transfers scatter beyond it."""
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
    PEER: Rate(1e9, 2e-3),
}
"""What is believed before the first transfer: a slow machine, an old SSD, an object store, and a peer, across a
network."""


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
    doubt: Doubt = field(default_factory=lambda: Doubt(LOAD_ERROR_MOST))
    samples: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    heard: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=SLOW_IN_A_ROW))
    """The last ones as they were, accidents and all."""
    queued_bytes: int = 0
    heard_s: float | None = None

    def hear(self, count_bytes: float, seconds: float, now_s: float) -> None:
        seconds = max(seconds, SECONDS_MIN)
        self.heard.append((count_bytes, seconds))
        counts_for, row = seconds, 0
        if self.samples:  # else there is nothing but a prior to be surprised by
            counts_for, row = self.doubt.hear(*self.line.bounds(count_bytes), seconds)
        if row:
            self.samples.clear()
            self.samples.extend(list(self.heard)[-row:])
        else:
            self.samples.append((count_bytes, counts_for))
        self.line = _fit(self.samples, self.prior)
        self.heard_s = now_s

    def spread(self, now_s: float) -> float:
        age_s = 0.0 if self.heard_s is None else now_s - self.heard_s
        return self.doubt.spread(len(self.samples), age_s)


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
                tier: replace(entry.line, queued_bytes=entry.queued_bytes, spread=entry.spread(now_s))
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
    # The rare slow ones must not decide: half of the samples took longer than the line says, and half not.
    scale = statistics.median(seconds / (latency + slope * count) for count, seconds in samples)
    sizes = [count for count, _ in samples]
    return Rate(1 / max(scale * slope, 1e-13), scale * latency, seen_bytes=(min(sizes), max(sizes)))
