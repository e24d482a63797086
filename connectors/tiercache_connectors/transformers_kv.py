"""TransformersKV: `generate` of a transformers model with the KV of prefixes that somebody has computed before.

    cache = tiercache.open(directory)
    reuse = TransformersKV(cache, model)
    output = reuse.generate(input_ids, max_new_tokens=100)

Works for every attention kind that keeps its KV in layers of a DynamicCache: full or sliding; grouped, shared or latent
heads. What it cannot reuse (batches, images, states of linear attention, ...) runs as it would without it, and one line
of log says why. A prefix is reused by whole blocks of tokens, and at least one token is left to compute.

A model computes some prefixes faster than they are loaded. What loads and prefills take is learnt from those that
`generate` makes, and only what is worth it is loaded (`plan`), for models with one group of full attention.
"""

from __future__ import annotations

import atexit
import logging
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tiercache.errors import ConfigError, TierCacheError
from tiercache.kv.groups import Model
from tiercache.kv.layout import Attention, Layout
from tiercache.kv.planes import Plane, Planes, paged
from tiercache.kv.runs import Table
from tiercache.kv.shard import Shard
from tiercache.model import Outcome
from tiercache_connectors.transformers_advice import Advice
from tiercache_connectors.transformers_model import Fingerprint, Identity, layouts, needs, plain, randomness, shapes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from tiercache.kv.saving import Saving
    from tiercache.kv.store import KvStore
    from tiercache.sync import BlockingCache

logger = logging.getLogger(__name__)

WAIT_S = 60.0
"""Longest wait for a load or for earlier saves; after that the prefix is computed."""
ATTEMPTS = 3
"""A load of which a block failed is tried again without it, so often."""

_PLAIN_OPTIONS = {
    "attention_mask",
    "do_sample",
    "eos_token_id",
    "generation_config",
    "logits_processor",
    "max_length",
    "max_new_tokens",
    "max_time",
    "min_length",
    "min_new_tokens",
    "min_p",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "repetition_penalty",
    "return_dict_in_generate",
    "stop_strings",
    "stopping_criteria",
    "streamer",
    "synced_gpus",
    "temperature",
    "tokenizer",
    "top_k",
    "top_p",
    "typical_p",
    "use_cache",
}
"""Arguments of `generate` beside which the KV of a token depends on the tokens up to it alone."""


@dataclass(frozen=True, slots=True)
class Reused:
    """What a restore brought: tokens, bytes, and how many blocks (of all groups) came from which tier."""

    tokens: int = 0
    nbytes: int = 0
    memory: int = 0
    ssd: int = 0
    remote: int = 0


class Stored:
    """Blocks of one sequence on their way into the cache."""

    def __init__(self, savings: list[Saving]) -> None:
        self._savings = savings

    @property
    def moved_bytes(self) -> int:
        """Bytes copied out of the model's cache so far."""
        return sum(saving.moved_bytes for saving in self._savings)

    @property
    def done(self) -> bool:
        """Whether all is decided; never waits."""
        return all(saving.done for saving in self._savings)

    def wait(self, timeout_s: float = WAIT_S) -> bool:
        """Whether all blocks of all groups are stored, waiting at most `timeout_s` for each group."""
        outcomes = [saving.wait(timeout_s) for saving in self._savings]
        return all(each is Outcome.HIT for group in outcomes for each in group)

    def cancel(self) -> None:
        """Gives up what is not stored."""
        for saving in self._savings:
            saving.cancel()


@dataclass(frozen=True, slots=True)
class _Loaded:
    """Some blocks of one group: tensors [layer][K, V], the blocks that did not come, and the bytes that did."""

    tensors: list[list[Any]]
    failed: list[int]
    nbytes: int


_unsaved: dict[int, Stored] = {}
"""What `generate` has left to the background: a program that ends without `close` waits for that."""


def _finish() -> None:
    for stored in list(_unsaved.values()):
        try:
            stored.wait()
        except TierCacheError:  # its cache was closed before
            pass


# Callbacks of `atexit` come when no thread may be given work any more; those of `threading` come before that.
getattr(threading, "_register_atexit", atexit.register)(_finish)


class TransformersKV:
    """See the module. One thread at a time, as the model."""

    def __init__(
        self,
        cache: BlockingCache,
        model: Any,
        *,
        name: str = "",
        revision: str = "",
        block_tokens: int = 16,
        salt: str = "",
        collision_resistant: bool = False,
        durable: bool = False,
        plan: bool = True,
    ) -> None:
        """`cache`: an open cache; it stays open. `model`: a causal model of transformers, with PEFT or without, in
        eval() mode: what dropout made random is not stored.

        Blocks of one model are never given to another: it goes by a digest of all its weights, which costs one reading
        of them. `name` and `revision` say instead what the weights are, so that other engines which say the same can
        share. `salt`: of a tenant that may not share. `collision_resistant`: tenants do not trust each other, keys are
        SHA-256. `durable`: saves count only once they survive power loss. `plan`: what the model computes sooner is not
        loaded. Raises ConfigError where PyTorch or transformers is not installed.
        """
        needs()
        self.model, self.reused = model, Reused()
        self._cache, self._durable = cache, durable
        self._fingerprint = Fingerprint(model, name, revision)
        self._shape: dict[str, Any] = {
            "block_tokens": block_tokens,
            "salt": salt,
            "collision_resistant": collision_resistant,
        }
        self._shapes = shapes(model)
        self._identity: Identity | None = None
        self._stores: list[KvStore] = []
        self._plan = plan
        self._advice: Advice | None = None
        self._pending: list[Stored] = []
        self._said: set[str] = set()
        if isinstance(self._shapes, str):
            self._say(self._shapes)

    # -- what users call -----------------------------------------------------------------------------------------------

    def generate(self, input_ids: Any, **options: Any) -> Any:
        """As `model.generate`, with the stored prefix of `input_ids` (shape [1, tokens]) and storing what is new, also
        what was generated. `reused` then says how much was not computed."""
        self.reused = Reused()
        reason = self._refusal(input_ids, options)
        if reason:
            self._say(reason)
            return self.model.generate(input_ids, **options)
        past, reused = self.restore(input_ids[0].tolist())
        # Sliding layers would forget what has left their window, and with it the blocks to be stored.
        past.activate_past_recording()
        with self._advice.watching(plain(self.model), past) if self._advice is not None else nullcontext():
            output = self.model.generate(input_ids, past_key_values=past, **options)
        sequence = getattr(output, "sequences", output)[0].tolist()
        try:
            stored = self.store(past, sequence[: past.get_seq_length()], start=reused.tokens)
            self._pending.append(stored)
            _unsaved[id(stored)] = stored
        except TierCacheError as fault:
            self._say(str(fault))
        return output

    def restore(self, tokens: Sequence[int], *, most: int | None = None) -> tuple[Any, Reused]:
        """A DynamicCache with the longest stored prefix of `tokens` (no more than `most`, one at least is left to
        compute, and with `plan` no more than is loaded sooner than computed), and what it holds. An empty one where
        nothing is stored, the cache cannot be asked, or the model is in train() mode."""
        from transformers import DynamicCache

        reused = Reused()
        past = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        limit = len(tokens) - 1 if most is None else min(most, len(tokens) - 1)
        try:
            if reason := randomness(self.model):
                self._say(reason)
            elif limit > 0 and self._ready():
                self._settle(WAIT_S if self._advice is None else self._advice.patience_s(len(tokens), WAIT_S))
                reused = self._fill(past, tokens[:limit], len(tokens))
        except TierCacheError as fault:
            self._say(str(fault))
            past = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        self.reused = reused
        return past, reused

    def store(self, past: Any, tokens: Sequence[int], *, start: int = 0) -> Stored:
        """Stores the whole blocks of `tokens` whose KV `past` holds (a DynamicCache with batch 1), but for those before
        token `start`, which are stored already. `past` may be used on: nothing writes to tensors that it has made.

        Sliding layers hold the last tokens alone, unless `past.activate_past_recording()` was called when it was new;
        what they have dropped is not stored. Raises ConfigError where `past` is of another shape than the model's, and
        for a model in train() mode.
        """
        if reason := randomness(self.model):
            raise ConfigError(reason)
        if not self._ready():
            return Stored([])
        if len(tokens) > past.get_seq_length():
            raise ConfigError(
                f"{len(tokens)} tokens, but the cache holds the KV of {past.get_seq_length()}: pass those"
            )
        savings = []
        for store in self._stores:
            layout = store.layout
            keys = store.keys(tokens)
            tensors, first = _held(past, layout)
            begin = max(start // layout.block_tokens, -(-first // layout.block_tokens))
            if begin < len(keys):
                planes, table = _planes(layout, tensors, first)
                savings.append(store.save(keys, planes, table, start=begin, durable=self._durable))
        return Stored(savings)

    def flush(self, timeout_s: float = WAIT_S) -> bool:
        """Whether everything that `generate` computed is stored, waiting at most `timeout_s`. What takes longer than
        that goes on."""
        return self._settle(timeout_s)

    def close(self) -> None:
        """Waits for saves (at most a minute) and ends; the cache stays open. Idempotent."""
        try:
            self.flush()
        finally:
            self._forget()
            for each in self._pending:
                _unsaved.pop(id(each), None)
            self._pending = []

    def __enter__(self) -> TransformersKV:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def layouts(self) -> list[Layout]:
        """What is stored of this model, as it is now; empty where nothing is."""
        return [store.layout for store in self._stores] if self._ready() else []

    # -- parts of it ---------------------------------------------------------------------------------------------------

    def _ready(self) -> bool:
        """Whether this model can be reused; its stores are then those of the weights and adapters that it has now."""
        if isinstance(self._shapes, str):
            return False
        identity = self._fingerprint.identity()
        if identity != self._identity:
            self.flush()
            self._forget()
            made = layouts(self.model, self._shapes, identity, **self._shape)
            self._stores = [self._cache.kv(layout) for layout in made]
            if self._plan and self._advice is None:  # other weights of a model take as long
                self._advice = Advice.of(made, self._cache.core.clock)
            self._identity = identity
        return True

    def _settle(self, timeout_s: float) -> bool:
        """Waits for saves, no longer than this for all of them; keeps those that are not over."""
        clock = self._cache.core.clock
        until = clock.monotonic() + timeout_s
        stored = [each.wait(max(0.0, until - clock.monotonic())) for each in self._pending]
        for each in [each for each in self._pending if each.done]:
            self._pending.remove(each)
            _unsaved.pop(id(each), None)
        return all(stored)

    def _forget(self) -> None:
        for store in self._stores:
            store.close()
        self._stores, self._identity = [], None

    def _refusal(self, input_ids: Any, options: dict[str, Any]) -> str:
        """Why this call is left to the model alone, or nothing."""
        if isinstance(self._shapes, str):
            return self._shapes
        if reason := randomness(self.model):
            return reason
        config = options.get("generation_config") or self.model.generation_config
        if getattr(input_ids, "ndim", 0) != 2 or input_ids.shape[0] != 1:
            return "only a batch of one sequence is reused"
        for option in ("num_beams", "num_return_sequences"):
            if (options.get(option) or getattr(config, option, None) or 1) != 1:
                return f"{option} is more than one"
        if options.get("use_cache", getattr(config, "use_cache", True)) is False:
            return "use_cache is off"
        if getattr(config, "cache_implementation", None) is not None:
            return f"the model asks for its own {config.cache_implementation} cache"
        mask = options.get("attention_mask")
        if mask is not None and not bool((mask == 1).all()):
            return "some tokens are masked"
        if other := sorted(set(options) - _PLAIN_OPTIONS):
            return f"generate was called with {', '.join(other)}"
        return ""

    def _say(self, reason: str) -> None:
        """One line a reason, ever."""
        if reason not in self._said:
            self._said.add(reason)
            logger.warning("tiercache does not reuse KV of %s: %s", type(self.model).__name__, reason)

    def _fill(self, past: Any, tokens: Sequence[int], total: int) -> Reused:
        """Loads the longest usable prefix of `tokens` into an empty cache, for a prompt of `total` tokens."""
        keys = [store.keys(tokens) for store in self._stores]
        if self._advice is not None:
            return self._fill_as_planned(past, keys[0], total, self._advice)
        groups = Model([store.layout for store in self._stores])
        present = [bytearray(store.match(each).tiers) for store, each in zip(self._stores, keys)]
        for _ in range(ATTEMPTS):
            usable = groups.usable([bytes(each) for each in present])
            if not usable.length:
                break
            loaded = [self._load(g, each, usable.ranges[g]) for g, each in enumerate(keys)]
            if not any(each.failed for each in loaded):
                count = usable.length * self._stores[0].layout.block_tokens
                for store, each in zip(self._stores, loaded):
                    self._give(past, store.layout, each.tensors, count)
                tiers = b"".join(usable.tiers)
                nbytes = sum(each.nbytes for each in loaded)
                return Reused(count, nbytes, tiers.count(1), tiers.count(2), tiers.count(3))
            for each, there in zip(loaded, present):
                for block in each.failed:
                    there[block] = 0
        return Reused()

    def _fill_as_planned(self, past: Any, keys: Sequence[bytes], total: int, advice: Advice) -> Reused:
        """As much of it as is worth loading, for one group of full attention. What has landed by the deadline is used,
        and what follows the first block that did not come is computed."""
        (store,) = self._stores
        tiers = store.match(keys).tiers
        plan = advice.ask(tiers, total)
        if not plan.probe_stop:
            return Reused()
        load = advice.begin(plan, tiers)
        try:
            loaded = self._load(0, keys, range(plan.probe_stop), advice.deadline_s(plan, WAIT_S))
            landed = min(loaded.failed, default=plan.probe_stop)
            count = landed * store.layout.block_tokens
            if landed:
                tensors = [[each[:, :, :count] for each in layer] for layer in loaded.tensors]
                self._give(past, store.layout, tensors, count)
        except BaseException:
            advice.drop(load)
            raise
        advice.end(load, landed)
        tiers = tiers[:landed]
        return Reused(count, loaded.nbytes, tiers.count(1), tiers.count(2), tiers.count(3))

    def _load(self, group: int, keys: Sequence[bytes], blocks: range, deadline_s: float = WAIT_S) -> _Loaded:
        """These blocks of one group, in tensors of their own."""
        import torch

        store = self._stores[group]
        layout = store.layout
        first, count = blocks.start * layout.block_tokens, len(blocks) * layout.block_tokens
        dtype = getattr(torch, layout.dtype)
        dims = self._dims(layout)
        tensors = [
            [torch.empty((1, layout.heads, count, dim), dtype=dtype) for dim in dims] for _ in range(layout.layers)
        ]
        if not blocks:
            return _Loaded(tensors, [], 0)
        planes, table = _planes(layout, tensors, first)
        loading = store.load(
            keys[: blocks.stop],
            planes,
            table,
            start=blocks.start,
            stop=blocks.stop,
            layerwise=False,
            deadline_s=deadline_s,
        )
        outcomes = loading.wait(deadline_s)
        failed = [block for block, outcome in zip(blocks, outcomes) if outcome is not Outcome.HIT]
        return _Loaded(tensors, failed, loading.moved_bytes)

    def _give(self, past: Any, layout: Layout, tensors: list[list[Any]], count: int) -> None:
        """Makes loaded tensors the first `count` tokens of the cache's layers."""
        assert not isinstance(self._shapes, str)
        for layer_id, (keys, values) in zip(layout.layer_ids or range(layout.layers), tensors):
            layer, device = past.layers[layer_id], self._shapes[layer_id].device
            keys, values = keys.to(device), values.to(device)
            layer.lazy_initialization(keys, values)
            # `update` would copy both once more.
            layer.keys, layer.values = keys, values
            if layer.is_sliding:
                layer.cumulative_length = count

    def _dims(self, layout: Layout) -> tuple[int, int]:
        """Last dims of the two tensors of a layer, as the model keeps them."""
        assert not isinstance(self._shapes, str)
        shape = self._shapes[(layout.layer_ids or (0,))[0]]
        return shape.k_dim, shape.v_dim


def _held(past: Any, layout: Layout) -> tuple[list[list[Any]], int]:
    """Tensors [layer][K, V] of a group on the CPU, and the token that their first row belongs to."""
    tensors, firsts = [], set()
    for layer_id in layout.layer_ids or range(layout.layers):
        layer = past.layers[layer_id]
        keys, values = layer.keys, layer.values
        if keys.shape[0] != 1 or str(keys.dtype) != f"torch.{layout.dtype}":
            raise ConfigError(
                f"a cache of batch {keys.shape[0]} and {keys.dtype} is not stored: 1 and {layout.dtype} is"
            )
        firsts.add(layer.get_seq_length() - keys.shape[2])
        tensors.append([keys.detach().cpu(), values.detach().cpu()])
    if len(firsts) != 1:
        raise ConfigError("layers of one group hold different tokens: they cannot be stored together")
    return tensors, firsts.pop()


def _planes(layout: Layout, tensors: list[list[Any]], first: int) -> tuple[Planes, Table]:
    """Where the elements of a group lie in the model's tensors: a sequence is one page."""
    planes: list[Plane] = []
    heads = range(layout.heads)
    for layer, (keys, values) in enumerate(tensors):
        layers = range(layer, layer + 1)
        if layout.attention is Attention.MLA:
            latent = keys.shape[3]
            planes += paged(keys, "phtd", layers=layers, heads=heads, kv=0, dims=range(latent))
            planes += paged(values, "phtd", layers=layers, heads=heads, kv=0, dims=range(latent, layout.k_dim))
        else:
            planes += paged(keys, "phtd", layers=layers, heads=heads, kv=0)
            if layout.v_dim:
                planes += paged(values, "phtd", layers=layers, heads=heads, kv=1)
    page_tokens = tensors[0][0].shape[2]
    table = Table(np.zeros(1, np.int64), page_tokens, first)
    return Planes(layout, Shard.whole(layout), planes), table
