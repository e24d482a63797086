"""Host pools of SGLang as layouts and planes: what of a pool is stored, and where its pages lie.

Pools of plain keys and values, and of MLA's latent, are stored in the canonical form: any parallelism, page layout and
engine reads them. Of any other pool a page is stored as it is, for ranks of the very same set-up.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tiercache.errors import ConfigError
from tiercache.kv.layout import FULL, Attention, Layout
from tiercache.kv.planes import Plane, paged
from tiercache.kv.shard import Shard

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache_connectors.weights import Weights

MHA_AXES = {
    "layer_first": "klpthd",
    "page_first": "kptlhd",
    "page_first_direct": "kplthd",
    "page_head": "kphtld",
}
"""Axes of MHATokenToKVPoolHost.kv_buffer by layout, its tokens cut into pages and slots; see kv.planes.paged."""

MLA_AXES = {
    "layer_first": "lpthd",
    "page_first": "ptlhd",
    "page_first_direct": "plthd",
}
"""The same of MLATokenToKVPoolHost, whose K and V are one latent."""


@dataclass(frozen=True, slots=True)
class Canonical:
    """A pool whose pages are stored in the canonical form."""

    layout: Layout
    shard: Shard
    planes: Sequence[Plane]


def canonical(pool: Any, config: Any, weights: Weights, salt: str, home: str) -> Canonical | str:
    """How the pool is stored in the canonical form, or why it cannot be.

    `config` is SGLang's HiCacheStorageConfig, `home` the directory with the model's own (the former may name it as it
    is served). Nothing of the pool is assumed that it does not say itself.
    """
    mla = type(pool).__name__ == "MLATokenToKVPoolHost"
    axes = (MLA_AXES if mla else MHA_AXES).get(pool.layout)
    if reason := _odd(pool, config, mla):
        return reason
    if axes is None:
        return f"its page layout is {pool.layout}"
    said = _said(pool, config, weights, salt, home)
    if isinstance(said, str):
        return said
    first = pool.start_layer or 0
    if config.pp_size == 1:
        first = 0
    layers = range(first, first + pool.layer_num)
    # Only one of the ranks that hold an MLA latent is asked to write it: it shares with nobody.
    shard = Shard(layers, range(1)) if mla else Shard.of(said, config.tp_rank, config.tp_size, layers=layers)
    if layers.stop > said.layers or len(shard.heads) != (1 if mla else pool.head_num):
        return f"it holds layers {layers} and {pool.head_num} heads of {said.layers} and {said.heads}"
    tensor = _by_pages(pool, axes)
    planes = paged(tensor, axes, layers=layers, heads=shard.heads, kv=0 if mla else None)
    return Canonical(said, shard, planes)


def _odd(pool: Any, config: Any, mla: bool) -> str:
    """What makes a pool more than keys and values of each token; empty where nothing does."""
    if type(pool).__name__ not in ("MHATokenToKVPoolHost", "MLATokenToKVPoolHost"):
        return f"it is a {type(pool).__name__}"
    if getattr(pool, "target_layer_num", pool.layer_num) != pool.layer_num:
        return "it holds layers of a draft model too"
    if getattr(pool, "storage_format_tag", None) or getattr(pool, "dsa_kv_cache_store_fp8", False):
        return "its pages are packed"
    if config.attn_cp_size > 1 or config.dcp_size > 1:
        return "its tokens are split over ranks"
    if not mla and getattr(pool, "v_head_dim", pool.head_dim) != pool.head_dim:
        return "its keys and values differ in width"
    if mla and pool.kv_cache_dim != pool.kv_lora_rank + pool.qk_rope_head_dim:
        return "its latent is packed"
    if "float8" in str(pool.dtype) or "uint8" in str(pool.dtype):
        return "its elements are quantised by scales that the pool does not show"
    return ""


def _said(pool: Any, config: Any, weights: Weights, salt: str, home: str) -> Layout | str:
    """The layout of the whole model: from its configuration, else from the pool where that tells everything."""
    mla = type(pool).__name__ == "MLATokenToKVPoolHost"
    order = "interleaved" if mla else "neox"
    dtype = str(pool.dtype).removeprefix("torch.")
    dims = (pool.kv_cache_dim, 0) if mla else (pool.head_dim, pool.head_dim)
    try:
        from transformers import AutoConfig

        found = Layout.from_hf_config(
            AutoConfig.from_pretrained(home, local_files_only=True).get_text_config(decoder=True),
            dtype=dtype,
            model=weights.model,
            revision=weights.revision,
            block_tokens=pool.page_size,
            salt=salt,
            element_order=order,
        )
    except (ImportError, OSError, ValueError, ConfigError):
        found = []
    if len(found) == 1 and found[0].rule == FULL and (found[0].k_dim, found[0].v_dim) == dims:
        return found[0]
    if config.pp_size > 1:
        return "its model's configuration is not understood, and this rank holds some of the layers"
    return Layout(
        model=weights.model,
        revision=weights.revision,
        heads=1 if mla else pool.head_num * config.tp_size,
        layers=pool.layer_num,
        k_dim=dims[0],
        v_dim=dims[1],
        dtype=dtype,
        attention=Attention.MLA if mla else Attention.MHA,
        block_tokens=pool.page_size,
        rope=f"sglang:{config.model_name}",
        element_order=order,
        salt=salt,
    )


def _by_pages(pool: Any, axes: str) -> Any:
    """The pool's buffer with an axis of pages and one of slots, where it has one of tokens."""
    tensor = pool.kv_buffer
    at = axes.index("p")
    if tensor.ndim == len(axes):
        return tensor
    return tensor.unflatten(at, (pool.page_num, pool.page_size))


def opaque(pool_name: str, page_bytes: int, pool: Any, config: Any, weights: Weights, salt: str) -> Layout:
    """The layout of pages that are stored as they are: nobody but ranks of the same set-up finds them.

    `pool` is None for pages that come without one.
    """
    ranks = {
        "pp": [config.pp_rank, config.pp_size],
        "cp": [config.attn_cp_rank, config.attn_cp_size],
        "dcp": [config.dcp_rank, config.dcp_size],
        # Every rank holds the same latent; one of them writes it for all.
        "tp": [] if config.is_mla_model else [config.tp_rank, config.tp_size],
    }
    told = ("layout", "dtype", "page_size", "layer_num", "head_num", "head_dim", "storage_format_tag")
    shape = {name: str(getattr(pool, name, "")) for name in told}
    tag = {"sglang": pool_name, "pool": type(pool).__name__, "model": config.model_name, **ranks, **shape}
    return Layout(
        model=weights.model,
        revision=weights.revision,
        heads=1,
        layers=1,
        k_dim=page_bytes,
        v_dim=0,
        dtype="uint8",
        attention=Attention.MHA,
        block_tokens=getattr(pool, "page_size", 1) or 1,
        salt=salt,
        order="opaque",
        tag=json.dumps(tag, sort_keys=True),
    )
