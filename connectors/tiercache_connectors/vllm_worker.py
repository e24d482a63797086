"""The worker's half of the vLLM connector: it carries out the orders of vllm_table.Step on this rank's memory.

Everything that waits has a deadline; what goes wrong with a load is told to the engine as pages that it must compute.
Saves are copied by the store's threads while the engine goes on. A page that is still being read is never written: each
step names the pages that it may write, and `take` waits for their copies (or gives them up) before the step begins.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tiercache.errors import TierCacheError
from tiercache.kv.runs import Table
from tiercache.model import Outcome
from tiercache_connectors.vllm_layout import Group, Groups, Unusable, pages_as_planes, proven_planes, shard_of
from tiercache_connectors.vllm_options import LoadMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    from tiercache.kv.loading import Loading
    from tiercache.kv.planes import Planes
    from tiercache.kv.saving import Saving
    from tiercache.kv.store import KvStore
    from tiercache_connectors.vllm_options import Options
    from tiercache_connectors.vllm_table import Move, Order, Step

log = logging.getLogger(__name__)

NAP_S = 0.002
"""An engine that only waits for loads may go round its loop without a pause, and keeps the interpreter from the threads
that it waits for: it gives them this long a round. New requests wait no longer than that, either."""
EMPTY_PAGE = 0
"""vLLM's page for what a window has left behind: it holds nothing."""


@dataclass(frozen=True, slots=True)
class Lane:
    """A group as this worker moves it."""

    group: Group
    store: KvStore
    planes: Planes
    expanded: Callable[[Sequence[int]], npt.NDArray[np.int64]]
    layers: Mapping[str, int]
    """Index in the layout of each layer by the engine's name."""

    def table(self, move: Move) -> Table:
        """Where the move's rows lie."""
        first = move.first_page * self.group.page_tokens
        return Table(self.expanded(move.pages), self.planes.page_tokens, first)

    def pages_of(self, move: Move, blocks: Iterable[int]) -> set[int]:
        """The engine's pages that hold some blocks of a move."""
        tokens, size = self.group.layout.block_tokens, self.group.page_tokens
        spans = (range(b * tokens // size, -(-(b + 1) * tokens // size)) for b in blocks)
        return {move.pages[page - move.first_page] for span in spans for page in span}


@dataclass(slots=True)
class Loaded:
    """Loads of one request under way, by move."""

    order: Order
    parts: list[tuple[Lane, Move, Loading | None]]
    began_s: float
    ends_s: float
    """What has not landed by then is computed."""
    landed_s: float = 0.0
    """When the last of it was seen to be there; 0: not yet."""

    @property
    def done(self) -> bool:
        """Whether all of it is decided."""
        return all(loading is None or loading.done for _, _, loading in self.parts)


@dataclass(slots=True)
class Saved:
    """One save under way."""

    request: str
    move: Move
    pages: set[int]
    saving: Saving
    began_s: float


@dataclass(slots=True)
class Report:
    """What the scheduler hears of a step; see vllm_v1.Told."""

    proven: int = 0
    """Loads of steps up to this one are over."""
    stored: dict[str, int] = field(default_factory=dict)
    """Leading blocks of requests that are stored now, as far as this rank knows."""
    loads: dict[str, float] = field(default_factory=dict)
    """Seconds that loads of requests took, as far as they are over."""


class Worker:
    """See the module. Called by the engine's worker thread alone."""

    def __init__(self, groups: Groups, stores: Sequence[KvStore], lanes: Sequence[Lane], options: Options) -> None:
        """`lanes`: those groups of which this worker holds any layer, `stores` all that must be closed."""
        self._groups, self._stores, self._options = groups, list(stores), options
        self._lanes = {groups.groups.index(lane.group): lane for lane in lanes}
        self._clock = stores[0].core.clock
        self._keys: dict[tuple[str, int], list[bytes]] = {}
        self._step: Step | None = None
        self._idle = False  # vLLM calls us in the same way whether a step computes or not
        self._taken = 0
        self._now: list[Loaded] = []
        self._later: dict[str, Loaded] = {}
        self._saves: list[Saved] = []
        self._held: set[str] = set()
        self._bad: set[int] = set()
        self._failed: set[str] = set()
        self._stored: dict[str, int] = {}
        self._loads_s: dict[str, float] = {}
        self.counts: dict[str, float] = {}

    # -- a step, in the order of calls

    def take(self, step: Step) -> None:
        """Orders of a step that is about to begin: keys are remembered, pages that it writes are freed of copies."""
        if step.number == self._taken:
            return
        self._taken, self._step, self._idle = step.number, step, step.idle
        for name, group, first, keys in step.keys:
            known = self._keys.setdefault((name, group), [])
            known[first:] = keys
        self._held.update(step.held)
        self._fence(set(step.written))
        for name in step.dropped:
            self._forget(name)

    def load(self) -> None:
        """Begins the step's loads; waits for those that must have landed before the forward pass."""
        for order in self._step.loads if self._step is not None else ():
            loaded = self._begin(order)
            if order.later:
                self._later[order.request] = loaded
            elif self._options.load is LoadMode.SYNC:
                self._end(loaded)
            else:
                self._now.append(loaded)

    def wait_layer(self, name: str) -> None:
        """Waits until a layer of the step's loads has landed. Failures are told at the end of the step."""
        for loaded in self._now:
            left_s = max(0.0, loaded.ends_s - self._clock.monotonic())
            for lane, _, loading in loaded.parts:
                layer = lane.layers.get(name)
                if layer is not None and loading is not None and not loading.wait_layer(layer, left_s):
                    # Others of the batch may share blocks that have not failed, and nobody will have those computed
                    # again: what is a hit in the end must lie there before it is looked at.
                    loading.wait(max(0.0, loaded.ends_s - self._clock.monotonic()))
            if not loaded.landed_s and loaded.done:
                loaded.landed_s = self._clock.monotonic()

    def save(self) -> None:
        """The forward pass is over: loads of the step end here, and saves begin."""
        for loaded in self._now:
            self._end(loaded)
        self._now.clear()
        for order in self._step.saves if self._step is not None else ():
            for move in order.moves:
                self._begin_save(order.request, move)
        self._step = None

    def finished(self) -> tuple[set[str], set[str], set[str]]:
        """Requests whose pages may be freed, whose load is over, and of those the ones whose load failed."""
        if self._later and self._idle:
            self._nap()
        received = {name for name, loaded in self._later.items() if self._is_over(loaded)}
        for name in received:
            self._end(self._later.pop(name))
        self._reap()
        sent = self._held - {each.request for each in self._saves if not self._is_free(each)}
        self._held -= sent
        for name in sent:
            self._forget(name)
        failed, self._failed = self._failed & received, self._failed - received
        return sent, received, failed

    def _nap(self) -> None:
        """Lets loads go on, until one of them is over or for a moment."""
        if any(self._is_over(each) for each in self._later.values()):
            return
        for lane, _, loading in next(iter(self._later.values())).parts:
            if loading is not None and not loading.done:
                loading.wait_layer(lane.planes.shard.layers[-1], NAP_S)
                return

    def bad_pages(self) -> set[int]:
        """Pages that loads should have filled and have not."""
        bad, self._bad = self._bad, set()
        return bad

    def report(self) -> Report:
        """What the scheduler must hear."""
        report = Report(self._taken, self._stored, self._loads_s)
        self._stored, self._loads_s = {}, {}
        return report

    def close(self) -> None:
        """Nothing touches the engine's memory any more when this returns."""
        for loaded in [*self._now, *self._later.values()]:
            for _, _, loading in loaded.parts:
                if loading is not None:
                    loading.cancel()
        ends_s = self._clock.monotonic() + self._options.fence_s
        for each in self._saves:  # what was computed is worth keeping, as far as there is time for it
            each.saving.wait(max(0.0, ends_s - self._clock.monotonic()))
        self._now, self._later, self._saves = [], {}, []
        for store in self._stores:
            store.close()

    # -- loads

    def _begin(self, order: Order) -> Loaded:
        parts: list[tuple[Lane, Move, Loading | None]] = []
        now, patience_s = self._clock.monotonic(), self._options.load_deadline_s
        if order.deadline_s:
            patience_s = min(order.deadline_s, patience_s)
        for move in order.moves:
            lane = self._lanes.get(move.group)
            if lane is None:
                continue
            loading = None
            keys = self._keys.get((order.request, move.group), [])
            if len(keys) >= move.stop and EMPTY_PAGE not in move.pages:
                loading = self._start_load(lane, keys, move, patience_s)
            parts.append((lane, move, loading))
        return Loaded(order, parts, now, now + patience_s)

    def _start_load(self, lane: Lane, keys: list[bytes], move: Move, patience_s: float) -> Loading | None:
        try:
            return lane.store.load(
                keys,
                lane.planes,
                lane.table(move),
                start=move.start,
                stop=move.stop,
                layerwise=self._options.load is not LoadMode.SYNC,
                deadline_s=patience_s,
            )
        except TierCacheError as error:
            log.warning("a load failed, and is computed instead: %s", error)
            return None

    def _is_over(self, loaded: Loaded) -> bool:
        return loaded.done or self._clock.monotonic() > loaded.ends_s

    def _end(self, loaded: Loaded) -> None:
        """Waits for a load as long as it may take; what has not landed then is computed."""
        left_s = loaded.ends_s - self._clock.monotonic()
        for lane, move, loading in loaded.parts:
            blocks = range(move.start, move.stop)
            outcomes = [Outcome.MISS] * len(blocks) if loading is None else loading.wait(max(0.0, left_s))
            bad = [block for block, outcome in zip(blocks, outcomes) if outcome is not Outcome.HIT]
            if bad:
                self._bad |= lane.pages_of(move, bad)
                self._failed.add(loaded.order.request)
            self._count("loaded_blocks", len(blocks) - len(bad))
            self._count("failed_blocks", len(bad))
            self._count("loaded_bytes", 0 if loading is None else loading.moved_bytes)
        seconds = (loaded.landed_s or self._clock.monotonic()) - loaded.began_s
        self._loads_s[loaded.order.request] = seconds
        self._count("load_seconds", seconds)
        if self._groups.engine_groups > 1:
            self._bad.clear()  # pages of several groups have no common numbers: vLLM wants the request's name
        elif not loaded.order.later:
            self._failed.discard(loaded.order.request)

    # -- saves

    def _begin_save(self, name: str, move: Move) -> None:
        lane, keys = self._lanes.get(move.group), self._keys.get((name, move.group), [])
        if lane is None or len(keys) < move.stop:
            return
        start = self._kept_from(lane, move)
        if start >= move.stop:
            return
        try:
            saving = lane.store.save(
                keys,
                lane.planes,
                lane.table(move),
                start=start,
                stop=move.stop,
                durable=self._options.durable,
            )
        except TierCacheError as error:
            log.warning("a save failed: %s", error)
            return
        pages = lane.pages_of(move, range(start, move.stop))
        self._saves.append(Saved(name, move, pages, saving, self._clock.monotonic()))

    @staticmethod
    def _kept_from(lane: Lane, move: Move) -> int:
        """The first block of a move behind the last empty page."""
        for index in range(len(move.pages) - 1, -1, -1):
            if move.pages[index] == EMPTY_PAGE:
                tokens = (move.first_page + index + 1) * lane.group.page_tokens
                return max(move.start, -(-tokens // lane.group.layout.block_tokens))
        return move.start

    def _fence(self, written: set[int]) -> None:
        """No copy reads these pages when this returns."""
        if not self._saves or not written:
            return
        for each in self._saves:
            if not each.pages.isdisjoint(written) and not each.saving.pages_free(self._options.fence_s):
                self._count("abandoned_saves", 1)
                each.saving.cancel()
        self._reap()

    def _is_free(self, each: Saved) -> bool:
        """Whether a save has left its pages; one that takes too long is given up."""
        if each.saving.pages_free(0):
            return True
        if self._clock.monotonic() > each.began_s + self._options.fence_s:
            self._count("abandoned_saves", 1)
            each.saving.cancel()
            return True
        return False

    def _reap(self) -> None:
        """Takes note of the saves that are over."""
        left = []
        for each in self._saves:
            if not each.saving.done:
                left.append(each)
                continue
            outcomes = each.saving.outcomes
            hits = next((i for i, one in enumerate(outcomes) if one is not Outcome.HIT), len(outcomes))
            self._count("saved_blocks", sum(one is Outcome.HIT for one in outcomes))
            self._count("saved_bytes", each.saving.moved_bytes)
            self._count("refused_blocks", sum(one is not Outcome.HIT for one in outcomes))
            self._count("divergent_parts", sum(bits.bit_count() for bits in each.saving.differs.values()))
            if hits and each.move.group == 0:
                stop = each.move.stop - len(outcomes) + hits
                self._stored[each.request] = max(stop, self._stored.get(each.request, 0))
        self._saves = left

    def _forget(self, name: str) -> None:
        for group in range(len(self._groups.groups)):
            self._keys.pop((name, group), None)

    def _count(self, name: str, amount: float) -> None:
        if amount:
            self.counts[name] = self.counts.get(name, 0) + amount


def open_worker(groups: Groups, options: Options, vllm_config: Any, tensors: Mapping[str, Any], cache: Any) -> Worker:
    """The worker's half over its registered tensors, proven. Raises Unusable."""
    from vllm.distributed import get_tensor_model_parallel_rank

    rank = get_tensor_model_parallel_rank()
    modules = vllm_config.compilation_config.static_forward_context
    left, lanes, stores = dict(tensors), [], []
    try:
        for group in groups.groups:
            mine = {name: left.pop(name) for name in group.names if name in left}
            if not mine:
                continue
            shard = shard_of(group, vllm_config, rank, list(mine))
            planes = proven_planes(group, shard, mine, modules)
            store = cache.kv(group.layout, shard, threads=options.threads, verify=options.verify)
            stores.append(store)
            layers = dict(zip(mine, shard.layers))
            lanes.append(Lane(group, store, planes, pages_as_planes(planes, group), layers))
        if left:
            raise Unusable(f"layer {min(left)} is not among the engine's KV cache groups")
        if not lanes:
            raise Unusable("this worker has no layers with KV")
    except (Unusable, TierCacheError) as error:
        for store in stores:
            store.close()
        raise Unusable(str(error)) from error
    return Worker(groups, stores, lanes, options)
