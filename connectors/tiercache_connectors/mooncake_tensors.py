"""Tensors of PyTorch as values: a header with type and shape, then the bytes as they lie in memory."""

from __future__ import annotations

import ctypes
import json
import logging
import struct
from typing import TYPE_CHECKING, Any

from tiercache_connectors.mooncake_memory import BufferHandle

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tiercache_connectors.mooncake_config import ReplicateConfig
    from tiercache_connectors.mooncake_moves import Key

log = logging.getLogger(__name__)

MAGIC = b"tct1"
_START = struct.Struct("<4sI")
ALIGN_BYTES = 64
"""The header's length is a multiple of this, so that the tensor is as aligned as the value is."""


class Tensors:
    """Puts and gets of tensors, for MooncakeDistributedStore. A GPU's are copied to the host first; what is got lies on
    the host. Methods named batch_* answer a list."""

    _put_values: Callable[..., list[int]]
    _values: Callable[..., list[Any]]
    put_from: Callable[..., int]
    get_into: Callable[..., int]

    def put_tensor(self, key: Key, tensor: Any, config: ReplicateConfig | None = None) -> int:
        """Stores a tensor: 0, also where the key is there already, whose value stays."""
        return self._put_values([key], [_parts(tensor)], config)[0]

    def upsert_tensor(self, key: Key, tensor: Any, config: ReplicateConfig | None = None) -> int:
        """As `put_tensor`, but an old value is replaced."""
        return self._put_values([key], [_parts(tensor)], config, anew=True)[0]

    def batch_put_tensor(
        self, keys: Sequence[Key], tensors_list: Sequence[Any], config: ReplicateConfig | None = None
    ) -> list[int]:
        """As `put_tensor`, of several in one call."""
        return self._put_values(keys, [_parts(one) for one in tensors_list], config)

    def batch_upsert_tensor(
        self, keys: Sequence[Key], tensors_list: Sequence[Any], config: ReplicateConfig | None = None
    ) -> list[int]:
        """As `upsert_tensor`, of several in one call."""
        return self._put_values(keys, [_parts(one) for one in tensors_list], config, anew=True)

    def get_tensor(self, key: Key) -> Any:
        """A tensor, or None where there is none."""
        return self.batch_get_tensor([key])[0]

    def batch_get_tensor(self, keys: Sequence[Key]) -> list[Any]:
        """Tensors, None where there is none."""
        return [None if one is None else _tensor(one) for one in self._values(keys, BufferHandle.sized)]

    def get_tensor_into(self, key: Key, buffer_ptr: int, size: int) -> Any:
        """A tensor that lies at an address, header first; None where there is none, or no room for it."""
        length = self.get_into(key, buffer_ptr, size)
        return _tensor((ctypes.c_uint8 * length).from_address(buffer_ptr)) if length > 0 else None

    def put_tensor_from(self, key: Key, buffer_ptr: int, size: int, config: ReplicateConfig | None = None) -> int:
        """Stores what `get_tensor_into` has left at an address."""
        return self.put_from(key, buffer_ptr, size, config)


def _parts(tensor: Any) -> list[Any]:
    """Header and bytes of a tensor."""
    import torch  # whoever has a tensor has it

    facts = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
    words = json.dumps(facts).encode()
    words += b" " * (-(_START.size + len(words)) % ALIGN_BYTES)
    header = _START.pack(MAGIC, len(words)) + words
    if not tensor.numel():
        return [header]
    return [header, tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()]


def _tensor(memory: Any) -> Any:
    """The tensor in a value, over the value's own memory; None where the value is none."""
    import torch

    view = memoryview(memory).cast("B")
    try:
        magic, length = _START.unpack_from(view)
        facts = json.loads(bytes(view[_START.size : _START.size + length])) if magic == MAGIC else None
        if facts is None:
            return None
        dtype, shape = getattr(torch, facts["dtype"]), tuple(facts["shape"])
        if 0 in shape:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(memory, dtype=dtype, offset=_START.size + length).reshape(shape)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as fault:
        log.error("a value that is no tensor was read as one: %s", fault)
        return None
