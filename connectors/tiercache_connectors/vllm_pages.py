"""Opaque pages: what vLLM's own offloading moves, stored as it is under keys of the engine's own.

For doors behind which vLLM keeps the books and bytes have no meaning for us. Nothing is permuted, so only an engine of
the same kind, version and shape finds them: all that is in the tag of the layout.

vLLM's offloading cannot be told that a load failed. So what is promised is leased first, and verified then: it cannot
vanish before the load, and a byte that changed after that look ends the load as a fault rather than as wrong KV.

Nor does vLLM tell these doors all that made a page: only an abstract of its configuration, without revision, overrides
or adapters. So `identify_engine` looks at the whole of it, and where it cannot, nothing is reused.
"""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from tiercache.buffers import verify_parts
from tiercache.errors import ConfigError, TierCacheError, UnavailableError
from tiercache.kv.layout import STATE, Layout
from tiercache.kv.shard import Shard
from tiercache.model import Name, Outcome
from tiercache_connectors.vllm_layout import Unusable, long_rope, weights_of
from tiercache_connectors.weights import Weights, identify

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from types import FrameType

    from tiercache.kv.loading import Prefetch
    from tiercache.kv.store import KvStore
    from tiercache.lease import Lease
    from tiercache.sync import BlockingCache
    from tiercache_connectors.vllm_options import Options

PREFETCH_S = 10.0
"""What an SSD has not brought by then is a miss."""


class Identity(NamedTuple):
    """What an engine's pages go by, beside their shape; and why none of them may be reused, or nothing."""

    weights: Weights
    facts: Mapping[str, str]
    reason: str = ""


def identify_engine(options: Options) -> Identity:
    """Who the engine is that is just making its connector. To be called while it does so, in each of its processes."""
    try:
        return _identity(_engine_config(), options)
    except (Unusable, ConfigError) as error:
        return Identity(Weights("nothing is reused"), {}, str(error))


def _engine_config() -> Any:
    """The whole configuration of vLLM, which has it at hand (no process of it keeps it where it could be asked for)
    while it makes a connector, and what belongs to it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("vllm_config")
        if hasattr(found, "model_config"):
            return found
        frame = frame.f_back
    raise Unusable("this vLLM does not show its configuration, which says what its pages hold: use vllm_v1")


def _identity(config: Any, options: Options) -> Identity:
    """Raises Unusable and ConfigError."""
    if getattr(config, "lora_config", None) is not None:
        # vLLM names pages by an adapter's name and path, where other weights may lie tomorrow.
        raise Unusable("pages of adapters go by their paths alone: use vllm_v1, which knows them by their weights")
    model, facts = config.model_config, config.model_config.hf_config.get_text_config()
    rope = [getattr(facts, name, None) for name in ("rope_parameters", "rope_scaling")]
    told = {"computed": str(model.dtype), "rope": long_rope(model, json.dumps(rope, default=str))}
    draft = getattr(getattr(config, "speculative_config", None), "draft_model_config", None)
    if draft is not None:  # its layers are in the same pages
        told["draft"] = ":".join(identify(draft.model, draft.revision or ""))
    return Identity(weights_of(config, options), told)


def engine_tag(shape: Mapping[str, object]) -> str:
    """What made a page and how, as text: an engine's build, its machine's kernels, and `shape`."""
    import torch
    import vllm

    capability = torch.backends.cpu.get_cpu_capability()
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    facts = {"vllm": vllm.__version__, "machine": platform.machine(), "kernels": f"{capability} {tiles}", **shape}
    return json.dumps(facts, sort_keys=True, default=str)


def page_layout(weights: Weights, page_bytes: int, tag: str, ranks: int = 1) -> Layout:
    """Layout of a page of `page_bytes` on each of `ranks` workers that hold different bytes."""
    return Layout(
        model=weights.model,
        revision=weights.revision,
        heads=ranks,
        layers=1,
        k_dim=page_bytes,
        v_dim=0,
        dtype="uint8",
        block_tokens=1,
        rule=STATE,
        order="opaque",
        tag=tag,
    )


def rank_shard(rank: int, ranks: int, *, replicated: bool) -> Shard:
    """What one worker holds of such a page: its own row, or the same as all others."""
    if replicated:
        return Shard(range(1), range(1), rank, ranks)
    return Shard(range(1), range(rank, rank + 1))


@dataclass(slots=True)
class _Promise:
    lease: Lease
    holders: set[str]
    loads: int = 0


class Promises:
    """Pages that vLLM has been promised: leased and verified until nobody may ask for them any more.

    For one thread: the scheduler's. Pages on the SSD come to memory in the background; until then the answer is None.
    """

    def __init__(self, cache: BlockingCache, store: KvStore) -> None:
        self._cache, self._store = cache, store
        self._held: dict[bytes, _Promise] = {}
        self._coming: dict[bytes, Prefetch] = {}
        self._missed: dict[str, set[bytes]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def ask(self, key: bytes, holder: str) -> bool | None:
        """Whether a page is there for `holder` to load. None: ask again later. Never waits."""
        promise = self._held.get(key)
        if promise is not None:
            promise.holders.add(holder)
            return True
        if key in self._missed.get(holder, ()):
            return False
        try:
            found = self._look(key)
        except TierCacheError:
            found = False
        if isinstance(found, bool | None):
            if found is False:
                self._missed.setdefault(holder, set()).add(key)
            return found
        self._held[key] = _Promise(found, {holder})
        return True

    def _look(self, key: bytes) -> Lease | bool | None:
        coming = self._coming.get(key)
        if coming is not None and not coming.done:
            return None
        parts = self._store.layout.all_parts
        lease = self._cache.core.lease_blocks_resident([key], parts)
        if lease is not None and lease.outcomes == [Outcome.HIT]:
            self._coming.pop(key, None)
            if verify_parts(lease.buffer(0), self._store.layout.part_bytes, parts, lease.digests(0)):
                return lease
            lease.release()
            self._cache.core.quarantine([Name(key)])
            return False
        if lease is not None:
            lease.release()
        if self._coming.pop(key, None) is not None or not self._store.match([key]).length:
            return False
        self._coming[key] = self._store.prefetch([key], PREFETCH_S)
        return None

    def begin(self, keys: Collection[bytes]) -> None:
        """Loads of these begin. Raises UnavailableError for what was not promised."""
        for key in keys:
            if key not in self._held:
                raise UnavailableError("a page is to be loaded that was not promised: ask for it first")
            self._held[key].loads += 1

    def end(self, keys: Collection[bytes]) -> None:
        """Loads of these are over."""
        for key in keys:
            if key in self._held:
                self._held[key].loads -= 1
                self._release(key)

    def forget(self, holder: str) -> None:
        """This holder will not ask again."""
        self._missed.pop(holder, None)
        for key in [key for key, promise in self._held.items() if holder in promise.holders]:
            self._held[key].holders.discard(holder)
            self._release(key)

    def _release(self, key: bytes) -> None:
        promise = self._held[key]
        if not promise.holders and promise.loads <= 0:
            promise.lease.release()
            del self._held[key]

    def close(self) -> None:
        """Gives everything back."""
        for promise in self._held.values():
            promise.lease.release()
        for coming in self._coming.values():
            coming.cancel()
        self._held, self._coming, self._missed = {}, {}, {}


def keys_of(store: KvStore, names: Sequence[Any]) -> list[bytes]:
    """Keys of pages by vLLM's own names of them (a block's hash and its group)."""
    return store.engine_keys([bytes(name) for name in names])
