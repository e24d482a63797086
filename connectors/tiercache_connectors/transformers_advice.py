"""Load or recompute, for transformers: asks kv.recompute how much of a match is worth loading, and tells it how long
loads took and the prefills of `generate`, which are measured by hooks around the model's own forward pass.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tiercache.kv.layout import Span
from tiercache.kv.recompute import Advisor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tiercache.clock import Clock
    from tiercache.kv.layout import Layout
    from tiercache.kv.recompute import Load, Plan

PREFILL_TOKENS_MIN = 16
"""A pass over fewer tokens tells nothing of what prefill costs."""
WARM_UP = 1
"""Prefills that are not counted: kernels are chosen, buffers are touched for the first time."""


class Advice:
    """For a model with one group of layers. Called by the model's thread alone."""

    def __init__(self, layout: Layout, clock: Clock) -> None:
        self._advisor = Advisor(layout.block_bytes, layout.block_tokens)
        self._clock, self._prefills = clock, 0

    @classmethod
    def of(cls, layouts: Sequence[Layout], clock: Clock) -> Advice | None:
        """None for models of which not all blocks of a prefix are loaded: a plan counts them."""
        return cls(layouts[0], clock) if len(layouts) == 1 and layouts[0].rule.span is Span.FULL else None

    def patience_s(self, tokens: int, most_s: float) -> float:
        """How long a prompt of so many tokens may wait for what would save computing it; `most_s` where nobody knows
        what computing takes."""
        prefill = self._advisor.prefill
        return min(most_s, prefill.seconds(0, max(1, tokens))) if prefill.known else most_s

    def ask(self, tiers: bytes, tokens: int) -> Plan:
        """How much of a stored prefix to load for a prompt of `tokens` tokens."""
        return self._advisor.advise(tiers, tokens, self._clock.monotonic())

    def begin(self, plan: Plan, tiers: bytes) -> Load:
        """A load of as much as was planned begins."""
        return self._advisor.begin(plan, tiers, self._clock.monotonic())

    def deadline_s(self, plan: Plan, most_s: float) -> float:
        """When to give a load up, in seconds after it began."""
        return min(most_s, plan.give_up_s) if self._advisor.prefill.known else most_s

    def end(self, load: Load, landed: int) -> None:
        """It is over: the first `landed` blocks are in the model's cache."""
        self._advisor.end(load, landed, self._clock.monotonic())

    def drop(self, load: Load) -> None:
        """It is over, and nobody knows how."""
        for each in load.transfers:
            self._advisor.rates.drop(each)

    @contextmanager
    def watching(self, model: Any, past: Any) -> Iterator[None]:
        """Learns how long the model takes for what it adds to the cache `past` meanwhile."""
        began: list[tuple[int, float]] = []

        def before(*_: Any) -> None:
            _wait_for(model.device)  # what was queued before is no part of the pass
            began[:] = [(past.get_seq_length(), self._clock.monotonic())]

        def after(*_: Any) -> None:
            start, began_s = began.pop()
            count = past.get_seq_length() - start
            if count < PREFILL_TOKENS_MIN:
                return
            _wait_for(model.device)
            self._prefills += 1
            if self._prefills > WARM_UP:
                self._advisor.prefill.learn(start, count, self._clock.monotonic() - began_s)

        hooks = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _wait_for(device: Any) -> None:
    """An accelerator computes on after its kernels were queued. `generate` waits for each of its passes anyway, to know
    whether it is through."""
    import torch

    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and accelerator.type == device.type:
        torch.accelerator.synchronize(device)
