"""TierCacheEcConnector: encoder outputs of multimodal models, made once and used by every engine of a directory.

    --ec-transfer-config '{"ec_connector": "TierCacheEcConnector", "ec_role": "ec_both",
        "ec_connector_module_path": "tiercache_connectors.vllm_ec",
        "ec_connector_extra_config": {"directory": "/var/cache/tiercache"}}'

The scheduler's half says that an output is there only when it has taken it to memory, verified and leased it: vLLM
cannot encode again once it was told so. Checked against vLLM 0.32's base class and with real tensors; *not exercised*
inside an engine, for no small multimodal model runs on its CPU build.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase, ECConnectorMetadata

from tiercache.buffers import verify_parts
from tiercache.errors import ConfigError, TierCacheError
from tiercache.kv.tensors import Tensor, Tensors, tensor_key
from tiercache.model import Name, Outcome, all_parts, part_bytes_for
from tiercache_connectors.vllm_layout import weights_of
from tiercache_connectors.vllm_options import Options

if TYPE_CHECKING:
    from tiercache.lease import Lease
    from tiercache_connectors.weights import Weights

log = logging.getLogger("vllm.tiercache")

LEASES_MAX = 256
"""Outputs that are held in memory for requests under way; the oldest go first."""
GET_S = 10.0


@dataclass
class Wanted(ECConnectorMetadata):  # type: ignore[misc]
    """Hashes of inputs whose outputs the workers load in this step."""

    hashes: list[str] = field(default_factory=list)


class TierCacheEcConnector(ECConnectorBase):  # type: ignore[misc]
    """See the module."""

    def __init__(self, vllm_config: Any, role: Any) -> None:
        super().__init__(vllm_config, role)
        transfer, model = vllm_config.ec_transfer_config, vllm_config.model_config
        options = Options.of(transfer.ec_connector_extra_config or {})
        self._cache = options.open()
        self._tensors = Tensors(self._cache.core, self._cache.loop)
        self._dtype = str(model.dtype).removeprefix("torch.")
        self._weights: Weights | None = None
        try:
            self._weights = weights_of(vllm_config, options)
        except ConfigError as error:
            log.warning("tiercache: no encoder output is reused: %s", error)
        self._wanted: list[str] = []
        self._leases: OrderedDict[str, Lease] = OrderedDict()

    def _key(self, content_hash: str) -> bytes:
        assert self._weights is not None
        # vLLM's hash covers the input and how it was processed; a LoRA's name is part of the identifier.
        return tensor_key(content_hash, self._weights.model, self._weights.revision or "-", {"dtype": self._dtype})

    # -- scheduler

    def has_cache_item(self, identifier: str) -> bool:
        if self._weights is None or not self.is_consumer:
            return False
        if identifier in self._leases:
            return True
        try:
            lease = self._cache.lease([Name(self._key(identifier))])
        except TierCacheError:
            return False
        if lease.outcomes[0] is not Outcome.HIT or not self._is_whole(lease, identifier):
            lease.release()
            return False
        self._leases[identifier] = lease
        while len(self._leases) > LEASES_MAX:
            self._leases.popitem(last=False)[1].release()
        return True

    def _is_whole(self, lease: Lease, identifier: str) -> bool:
        buffer = lease.buffer(0)
        part_bytes = part_bytes_for(buffer.length)
        if verify_parts(buffer, part_bytes, all_parts(buffer.length, part_bytes), lease.digests(0)):
            return True
        self._cache.core.quarantine([Name(self._key(identifier))])
        return False

    def update_state_after_alloc(self, request: Any, index: int) -> None:
        identifier = request.mm_features[index].identifier
        if self.has_cache_item(identifier):
            self._wanted.append(identifier)

    def build_connector_meta(self, scheduler_output: Any) -> ECConnectorMetadata:
        wanted, self._wanted = self._wanted, []
        return Wanted(wanted)

    def request_finished(self, request: Any) -> tuple[bool, dict[str, Any] | None]:
        for feature in request.mm_features or ():
            lease = self._leases.pop(feature.identifier, None)
            if lease is not None:
                lease.release()
        return False, None

    # -- worker

    def start_load_caches(self, encoder_cache: dict[str, Any], **kwargs: Any) -> None:
        import torch

        wanted = self._get_connector_metadata()
        hashes = [each for each in getattr(wanted, "hashes", []) if each not in encoder_cache]
        if not hashes or self._weights is None:
            return
        found = self._tensors.get([self._key(each) for each in hashes], timeout_s=GET_S)
        for each, tensor in zip(hashes, found):
            if not isinstance(tensor, Tensor):
                log.error("the encoder output %s was promised and could not be loaded", each)
                continue
            loaded = torch.from_numpy(tensor.array).view(getattr(torch, tensor.dtype))
            encoder_cache[each] = loaded.to(kwargs.get("device", "cpu"))

    def save_caches(self, encoder_cache: dict[str, Any], mm_hash: str, **kwargs: Any) -> None:
        if self._weights is None or not self.is_producer:
            return
        import torch

        tensor = encoder_cache[mm_hash].detach().to("cpu").contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        raw = tensor.view(torch.uint16) if dtype == "bfloat16" else tensor
        raw = raw.view(torch.uint8) if dtype.startswith("float8") else raw
        try:
            self._tensors.put([self._key(mm_hash)], [np.ascontiguousarray(raw.numpy())], [dtype])
        except TierCacheError as error:
            log.warning("an encoder output was not stored: %s", error)

    def shutdown(self) -> None:
        while self._leases:
            self._leases.popitem()[1].release()
        self._cache.close()
