"""Load or recompute, for vLLM's scheduler: asks kv.recompute how much of a match is worth loading, and tells it how
long loads and prefills took. Loads run in the workers, which say how long they were about it; a prefill's time is that
of a step which did nothing else, while no load went on beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiercache.kv.recompute import Advisor

if TYPE_CHECKING:
    from tiercache.kv.recompute import Load, Plan
    from tiercache_connectors.vllm_layout import Groups
    from tiercache_connectors.vllm_options import Options
    from tiercache_connectors.vllm_table import Scheduled

PREFILL_TOKENS_MIN = 16
"""A step of fewer tokens tells nothing of what prefill costs."""
WARM_UP = 2
"""Prefills of an engine that are not counted: kernels are compiled, buffers are touched for the first time."""


class Advice:
    """For a model with one group of layers. Called by the scheduler's thread alone; times are the caller's clock."""

    def __init__(self, groups: Groups, options: Options) -> None:
        self._advisor = Advisor(groups.layouts[0].block_bytes, options.block_tokens)
        self._running: dict[int, tuple[Scheduled | None, float]] = {}
        self._prefills = 0
        self._loads: set[int] = set()

    def ask(self, tiers: bytes, tokens: int, computed: int, now_s: float) -> Plan:
        """How much of a stored prefix to load for a request of `tokens` tokens."""
        return self._advisor.advise(tiers, tokens, now_s, computed_tokens=computed)

    def begin(self, plan: Plan, tiers: bytes, now_s: float) -> Load:
        """A load of as much as was planned begins."""
        load = self._advisor.begin(plan, tiers, now_s)
        self._loads.add(id(load))
        for step, (_, began_s) in self._running.items():
            self._running[step] = (None, began_s)  # they share the machine from here on
        return load

    def deadline_s(self, plan: Plan) -> float:
        """When to give a load up, in seconds after it began; 0 while nobody knows what computing would take."""
        return plan.give_up_s if self._advisor.prefill.known else 0.0

    def loaded(self, load: Load, landed: int, seconds: float) -> None:
        """It is over, after so many seconds: the first `landed` blocks are there."""
        self._loads.discard(id(load))
        self._advisor.end(load, landed, load.began_s + seconds)

    def drop(self, load: Load) -> None:
        """It is over, and nobody knows how."""
        self._loads.discard(id(load))
        for each in load.transfers:
            self._advisor.rates.drop(each)

    def began(self, step: int, one: Scheduled | None, now_s: float) -> None:
        """A step begins. `one`: what it runs, where that is one request and no load."""
        alone = not self._running and not self._loads  # else it waits for the step before it, or shares the machine
        self._running[step] = (one if alone else None, now_s)

    def ended(self, step: int, now_s: float) -> None:
        """All steps up to this one are over."""
        for number in [each for each in self._running if each <= step]:
            one, began_s = self._running.pop(number)
            if number == step and one is not None and one.scheduled >= PREFILL_TOKENS_MIN:
                self._prefills += 1
                if self._prefills > WARM_UP:
                    self._advisor.prefill.learn(one.computed, one.scheduled, now_s - began_s)
