"""The scheduler's half of the vLLM connector: it asks the cache what is stored of a request, and keeps vllm_table.

Keys are our own chain over token ids, so that engines of any block size, parallelism and make find the same blocks.
What else decides a block's bytes is in the keys too: images by their hashes, adapters and salts by the namespace.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tiercache.clock import system_random
from tiercache.errors import ConfigError, TierCacheError
from tiercache.kv.chain import tokens_keys
from tiercache_connectors.vllm_advice import Advice
from tiercache_connectors.vllm_options import LoadMode
from tiercache_connectors.vllm_table import Requests, Scheduled
from tiercache_connectors.weights import identify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from tiercache.kv.groups import Usable
    from tiercache.kv.layout import Layout
    from tiercache.kv.recompute import Load, Plan
    from tiercache.kv.store import KvStore
    from tiercache_connectors.vllm_layout import Groups
    from tiercache_connectors.vllm_options import Options
    from tiercache_connectors.vllm_table import Request, Step

log = logging.getLogger(__name__)

ANNOUNCED_MAX = 1 << 18
"""Blocks that routers have been told of and may be told to forget; beyond that the oldest are left to them."""
NAMESPACES_MAX = 1024
MEMORY, SSD = 1, 2


@dataclass(slots=True)
class Event:
    """Blocks of the engine's own size that are stored now, or gone; see vllm_v1 for how routers hear of it."""

    stored: bool
    hashes: list[Any]
    parent: Any = None
    tokens: list[int] = field(default_factory=list)
    lora: str | None = None


@dataclass(slots=True)
class Known:
    """What the scheduler's half keeps of a request beside the table."""

    request: Any
    layouts: tuple[Layout, ...]
    present: tuple[bytes, ...] = ()
    """Where leading blocks are, by group, as KvStore.match has it."""
    usable: Usable | None = None
    """What a load may bring."""
    later: bool = False
    """Whether the engine was told that it need not wait for the load."""
    advice: Plan | None = None
    """How much of it is worth loading."""
    load: Load | None = None
    """The load under way, as the advisor has it."""
    stored: int = 0
    """Leading blocks that were told to routers."""
    ranks: dict[int, int] = field(default_factory=dict)


class Scheduler:
    """See the module. Called by the engine's scheduler thread alone."""

    def __init__(self, groups: Groups, stores: Sequence[KvStore], options: Options, hash_tokens: int) -> None:
        """`hash_tokens`: tokens of a block that the engine itself hashes."""
        self.groups, self.options = groups, options
        self._stores = list(stores)
        self._hash_tokens = hash_tokens
        self._tokens = options.block_tokens
        self._table = Requests(self._tokens, [each.page_tokens for each in groups.groups])
        self._known: dict[str, Known] = {}
        self._namespaces: OrderedDict[tuple[str, str], tuple[Layout, ...]] = OrderedDict()
        self._adapters: dict[tuple[int, str, str], str | None] = {}
        self._epoch = ""
        self._announced: OrderedDict[bytes, Any] = OrderedDict()
        self._events: list[Event] = []
        self._evict: Callable[[set[int]], object] | None = None
        self._clock = stores[0].core.clock
        self._advice = Advice(groups, options) if len(groups.groups) == 1 and options.plan else None
        self.counts: dict[str, float] = {}

    def bind(self, block_pool: Any) -> None:
        """The engine's pool of pages."""
        if len(self.groups.groups) == 1:
            self._evict = getattr(block_pool, "evict_blocks", None)

    # -- requests

    def begin(self, request: Any) -> None:
        """A request has come. Some cannot be reused: what they are computed from has no ids, or changes."""
        if getattr(request, "prompt_embeds", None) is not None or getattr(request, "resumable", False):
            return
        layouts = self._layouts_of(request)
        if layouts is not None:
            self._table.add(request.request_id)
            self._known[request.request_id] = Known(request, layouts)

    def _layouts_of(self, request: Any) -> tuple[Layout, ...] | None:
        """The groups' layouts in the namespace of the request's adapter and salt."""
        adapter, salt = getattr(request, "lora_request", None), getattr(request, "cache_salt", None) or ""
        lora = self._adapter(adapter) if adapter is not None else ""
        if lora is None:
            return None
        if (lora, salt) not in self._namespaces:
            marked = f"{salt}|{self._epoch}" if self._epoch else salt
            layouts = tuple(replace(each, lora=lora, salt=marked) for each in self.groups.layouts)
            self._namespaces[lora, salt] = layouts
            if len(self._namespaces) > NAMESPACES_MAX:
                self._namespaces.popitem(last=False)
        return self._namespaces[lora, salt]

    def _adapter(self, adapter: Any) -> str | None:
        """What an adapter's weights are, found out when the engine first hears of it, for then it reads them; None
        where that cannot be found out."""
        known = (adapter.lora_int_id, adapter.lora_name, adapter.lora_path)
        if known not in self._adapters or getattr(adapter, "load_inplace", False):
            try:
                self._adapters[known] = ":".join(identify(adapter.lora_path))
            except (ConfigError, OSError) as error:
                self._adapters[known] = None
                log.warning("KV of the adapter %s is not reused: %s", adapter.lora_name, error)
        return self._adapters[known]

    def reset(self) -> None:
        """The engine's weights may be others from now on: nothing that was stored before is found by this engine, and
        nothing that it stores is found by others."""
        self._epoch = system_random().randbytes(16).hex()
        self._namespaces.clear()
        for known in self._known.values():
            if self._advice is not None and known.load is not None:
                self._advice.drop(known.load)
        self._known.clear()
        self._table.forget()

    def _extend(self, row: Request, known: Known, blocks: int) -> None:
        """Makes sure of the keys of the request's first blocks."""
        have = len(row.keys[0])
        if blocks <= have:
            return
        tokens = known.request.all_token_ids[have * self._tokens : blocks * self._tokens]
        extra = self._extra(known.request, have, blocks)
        for keys, layout in zip(row.keys, known.layouts):
            keys.extend(tokens_keys(layout, tokens, parent=keys[-1] if keys else b"", extra=extra))

    def _extra(self, request: Any, start: int, stop: int) -> list[bytes] | None:
        """What else decides the bytes of blocks [start, stop): images and the like that lie in them, and where."""
        features = getattr(request, "mm_features", None)
        if not features:
            return None
        extra = [b""] * (stop - start)
        for each in features:
            at, length = each.mm_position.offset, each.mm_position.length
            for block in range(max(start, at // self._tokens), min(stop, -(-(at + length) // self._tokens))):
                extra[block - start] += f"{each.identifier}@{at - block * self._tokens};".encode()
        return extra

    def match(self, request: Any, computed: int) -> tuple[int, bool]:
        """Tokens that can be loaded beyond the engine's own `computed` ones, and whether the engine should go on
        meanwhile."""
        row, known = self._table.get(request.request_id), self._known.get(request.request_id)
        if row is None or known is None:
            return 0, False
        wanted = self._table.wanted(row, request.num_tokens)
        self._extend(row, known, wanted)
        self._count("queried_tokens", wanted * self._tokens - computed)
        known.present = self._present(row, wanted)
        stored = min((len(each) for each in known.present), default=0)
        self._retract(row, stored, wanted)
        reads = stored and not getattr(request, "skip_reading_prefix_cache", False)
        most = wanted
        if reads and self._advice is not None:
            known.advice = self._advice.ask(known.present[0], request.num_tokens, computed, self._clock.monotonic())
            most = min(wanted, known.advice.probe_stop)
        known.usable = self.groups.model.usable(known.present, most) if reads else None
        length = known.usable.length if known.usable is not None else 0
        tokens = self._table.matched(row, computed, length, stored)
        if known.usable is None or tokens < max(1, self.options.min_tokens):
            return 0, False
        known.later = self._is_later(known.usable, computed // self._tokens)
        return tokens, known.later

    def _present(self, row: Request, wanted: int) -> tuple[bytes, ...]:
        """Where the first `wanted` blocks are, by group; nothing where the cache cannot be asked."""
        if not wanted:
            return ()
        try:
            return tuple(store.match(keys[:wanted]).tiers for store, keys in zip(self._stores, row.keys))
        except TierCacheError as error:
            log.debug("the cache was not asked: %s", error)
            self._count("unanswered_queries", 1)
            return ()

    def _is_later(self, usable: Usable, first: int) -> bool:
        """Whether the load goes on beside other requests rather than inside the next step."""
        if self.groups.engine_groups > 1 or self.options.load is LoadMode.ASYNC:
            return True
        if self.options.load is not LoadMode.AUTO:
            return False
        return any(
            set(tiers[max(0, first - span.start) :]) - {MEMORY} for span, tiers in zip(usable.ranges, usable.tiers)
        )

    def allocated(self, request: Any, pages: Sequence[Sequence[int]], tokens: int) -> None:
        """The engine has pages for the request and loads `tokens` tokens."""
        row, known = self._table.get(request.request_id), self._known.get(request.request_id)
        if row is None or known is None:
            return
        blocks = -(-(row.asked + tokens) // self._tokens)
        if known.usable is not None and 0 < tokens and blocks < known.usable.length:
            known.usable = self.groups.model.usable(known.present, blocks)  # the engine takes less than it could
        usable = known.usable
        ranges = usable.ranges if usable is not None else ()
        deadline_s = 0.0
        if tokens > 0 and self._advice is not None and known.advice is not None:
            if known.load is not None:  # before a preemption
                self._advice.drop(known.load)
            known.load = self._advice.begin(known.advice, known.present[0], self._clock.monotonic())
            deadline_s = self._advice.deadline_s(known.advice)
        self._table.allocated(row, self._by_group(pages), tokens, ranges, later=known.later, deadline_s=deadline_s)
        self._count("matched_tokens", tokens)

    def sources(self, request: Any, tokens: int) -> tuple[int, int]:
        """How many of `tokens` tokens that are loaded for a request come from memory, and from the SSD."""
        row, known = self._table.get(request.request_id), self._known.get(request.request_id)
        if row is None or known is None or known.usable is None or not tokens:
            return 0, 0
        first = row.asked // self._tokens - known.usable.ranges[0].start
        tiers = known.usable.tiers[0][max(0, first) :][: tokens // self._tokens]
        return tiers.count(MEMORY) * self._tokens, tiers.count(SSD) * self._tokens

    def _by_group(self, pages: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        return [pages[each.pages_of] for each in self.groups.groups]

    # -- steps

    def step(self, output: Any) -> Step:
        """Orders for workers of the step that vLLM has planned (its SchedulerOutput)."""
        scheduled = [
            self._scheduled(output, new.req_id, new.num_computed_tokens, new.block_ids, True)
            for new in output.scheduled_new_reqs
        ]
        cached = output.scheduled_cached_reqs
        for i, name in enumerate(cached.req_ids):
            fresh = name in cached.resumed_req_ids
            scheduled.append(
                self._scheduled(output, name, cached.num_computed_tokens[i], cached.new_block_ids[i], fresh)
            )
        step = self._table.step([each for each in scheduled if each is not None])
        step.idle = not output.num_scheduled_tokens
        if self._advice is not None:
            one = scheduled[0] if len(output.num_scheduled_tokens) == len(scheduled) == 1 else None
            self._advice.began(step.number, None if step.loads else one, self._clock.monotonic())
        return step

    def _scheduled(
        self, output: Any, name: str, computed: int, pages: Sequence[Sequence[int]] | None, fresh: bool
    ) -> Scheduled | None:
        row, known = self._table.get(name), self._known.get(name)
        if row is None or known is None:
            return None
        count, ids = output.num_scheduled_tokens[name], known.request.num_tokens
        self._extend(row, known, min(computed + count, ids) // self._tokens)
        mine = None if pages is None else tuple(list(each) for each in self._by_group(pages))
        return Scheduled(name, computed, count, ids, mine, fresh)

    def heard(
        self,
        bad_pages: set[int],
        failed: Iterable[str],
        received: Iterable[str],
        proven: int,
        loads: Mapping[str, float],
    ) -> None:
        """What the workers have said of a step. `loads`: seconds that loads took which are over."""
        now = self._clock.monotonic()
        if self._advice is not None:
            self._advice.ended(proven, now)
        if bad_pages:
            self._count("failed_requests", self._table.failed(bad_pages))
            if self._evict is not None:
                # vLLM offers what was computed on a failed load to other requests until it has computed it again.
                self._evict(set(self._table.suspect))
        for name in failed:
            self._table.failed_request(name)
            self._count("failed_requests", 1)
        for name in received:
            self._table.received(name)
        self._table.proven(proven)
        for name, seconds in loads.items():
            row, known = self._table.get(name), self._known.get(name)
            if known is None or known.load is None or self._advice is None:
                continue
            landed = known.load.plan.probe_stop if row is None else min(row.most, known.load.plan.probe_stop)
            self._advice.loaded(known.load, landed, seconds)
            known.load = None

    def finished(self, request: Any, pages: Sequence[Sequence[int]]) -> bool:
        """A request is over. True: its pages must wait for the workers' word."""
        name = request.request_id
        row, known = self._table.get(name), self._known.get(name)
        if row is None or known is None:
            return False
        self._extend(row, known, max(0, request.num_tokens - 1) // self._tokens)
        held = self._table.finished(name, request.num_tokens, request.num_computed_tokens, self._by_group(pages))
        if self._advice is not None and known.load is not None:
            self._advice.drop(known.load)
            known.load = None
        if not held:
            self._known.pop(name, None)
        return held

    def sent(self, name: str) -> None:
        """The workers have said that a finished request's pages are free."""
        self._known.pop(name, None)

    # -- what routers hear

    def stored(self, name: str, rank: int, ranks: int, blocks: int) -> None:
        """A rank has stored the request's first blocks. Routers hear of what every rank has."""
        known = self._known.get(name)
        if known is None:
            return
        known.ranks[rank] = max(blocks, known.ranks.get(rank, 0))
        if len(known.ranks) < ranks:
            return
        size, request = self._hash_tokens, known.request
        first, stop = (count * self._tokens // size for count in (known.stored, min(known.ranks.values())))
        hashes = list(request.block_hashes[first:stop])
        if not hashes:
            return
        known.stored = min(known.ranks.values())
        adapter = getattr(request, "lora_request", None)
        tokens = list(request.all_token_ids[first * size : (first + len(hashes)) * size])
        parent = request.block_hashes[first - 1] if first else None
        self._events.append(Event(True, hashes, parent, tokens, adapter.lora_name if adapter else None))
        for each in hashes:
            self._announced[bytes(each)] = each
        while len(self._announced) > ANNOUNCED_MAX:
            self._announced.popitem(last=False)

    def _retract(self, row: Request, stored: int, wanted: int) -> None:
        """Routers were told of blocks that turn out to be gone."""
        known = self._known[row.name]
        if not self._announced:
            return
        size = self._hash_tokens
        first, stop = -(-stored * self._tokens // size), wanted * self._tokens // size
        gone = [each for each in known.request.block_hashes[first:stop] if bytes(each) in self._announced]
        if gone:
            self._events.append(Event(False, gone))
            for each in gone:
                del self._announced[bytes(each)]

    def events(self) -> list[Event]:
        """What routers must hear, once."""
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Ends this half's part in the cache."""
        for store in self._stores:
            store.close()

    def _count(self, name: str, amount: float) -> None:
        if amount:
            self.counts[name] = self.counts.get(name, 0) + amount
