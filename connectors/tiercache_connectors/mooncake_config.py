"""What Mooncake's `setup` and `put` are told, read as tiercache needs it; and the values that it answers with."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from tiercache.errors import ConfigError
from tiercache.settings import RULES, load

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SCHEME = "tiercache://"
"""A `master_server_addr` that begins with this names caches of other machines, as host:port with commas between."""
PORT_FIRST, PORTS = 12300, 2000
"""A client whose host name has no port gets one of these for its name, as Mooncake's do; nothing listens there."""
SEGMENT_BYTES = 16 << 20
"""What Mooncake takes for sizes that a dictionary does not name."""
TTL_MS_MAX = (1 << 64) - 1
SSD = 2
"""As Core.probe_chain says tiers."""

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class ObjectDataType(IntEnum):
    """What an object is for; nothing here depends on it."""

    UNKNOWN = 0
    KVCACHE = 1
    TENSOR = 2
    WEIGHT = 3
    SAMPLE = 4
    ACTIVATION = 5
    GRADIENT = 6
    OPTIMIZER_STATE = 7
    METADATA = 8
    GENERAL = 9


class SoftPinAction(IntEnum):
    """What a put does to an object's soft pin; nothing is pinned here."""

    PRESERVE = 0
    ENABLE = 1
    DISABLE = 2


class ReplicaStatus(IntEnum):
    """Life of a replica; those that can be found are complete."""

    UNDEFINED = 0
    INITIALIZED = 1
    PROCESSING = 2
    COMPLETE = 3
    REMOVED = 4
    FAILED = 5


class ReplicateConfig:
    """How Mooncake would place an object: checked, but one copy is kept, where the policy of the cache says."""

    def __init__(self) -> None:
        self.replica_num = 1
        self.nof_replica_num = 0
        self.dfs_replica_num = 0
        self.soft_pin_action = SoftPinAction.PRESERVE
        self.with_hard_pin = False
        self.preferred_segments: list[str] = []
        self.preferred_nof_segments: list[str] = []
        self.preferred_segment = ""
        self.prefer_alloc_in_same_node = False
        self.data_type = ObjectDataType.UNKNOWN
        self.group_ids: list[str] | None = None
        self._soft_pin_ttl_ms: int | None = None

    @property
    def soft_pin_ttl_ms(self) -> int | None:
        """How long a soft pin would last; None: as long as the master says."""
        return self._soft_pin_ttl_ms

    @soft_pin_ttl_ms.setter
    def soft_pin_ttl_ms(self, value: object) -> None:
        """None, or a whole number; TypeError for anything else."""
        if value is not None and (not isinstance(value, int) or not 0 <= value <= TTL_MS_MAX):
            raise TypeError(f"soft_pin_ttl_ms is None or a whole number from 0 to {TTL_MS_MAX}, not {value!r}")
        self._soft_pin_ttl_ms = value

    @property
    def contradicts_itself(self) -> bool:
        """Whether Mooncake refuses it: only a soft pin that is being enabled has a lifetime."""
        return self._soft_pin_ttl_ms is not None and self.soft_pin_action is not SoftPinAction.ENABLE

    def __str__(self) -> str:
        facts = {name.removeprefix("_"): value for name, value in vars(self).items()}
        return f"ReplicateConfig: {{ {', '.join(f'{name}: {value}' for name, value in facts.items())} }}"


@dataclass(frozen=True, slots=True)
class ReplicaDescriptor:
    """Where a value is: in memory, or on an SSD alone."""

    tier: int
    status: ReplicaStatus = ReplicaStatus.COMPLETE

    def is_memory_replica(self) -> bool:
        """Whether it is in some machine's memory."""
        return self.tier != SSD

    def is_disk_replica(self) -> bool:
        """Whether it must be read from a disk that machines share; never."""
        return False

    def is_local_disk_replica(self) -> bool:
        """Whether it must be read from this machine's SSD."""
        return self.tier == SSD


@dataclass(frozen=True)
class Setup:
    """The arguments of `setup`, by Mooncake's names and in Mooncake's order."""

    local_hostname: str
    metadata_server: str
    global_segment_size: int
    local_buffer_size: int
    protocol: str
    rdma_devices: str
    master_server_addr: str
    engine: object = None
    enable_ssd_offload: bool = False
    ssd_offload_path: str = ""
    tenant_id: str = "default"
    enable_client_http_server: bool = False
    client_http_port: int = 9300

    @classmethod
    def of(cls, given: Sequence[object], named: Mapping[str, object]) -> Setup:
        """From the arguments of a call, long or a dictionary. Raises TypeError as a call does, ConfigError for sizes
        and names that Mooncake refuses."""
        if not given and set(named) == {"config"}:
            given, named = (named["config"],), {}
        if len(given) == 1 and isinstance(given[0], dict) and not named:
            return cls._of_config({str(name): str(value) for name, value in given[0].items()})
        return cls(*given, **named)  # type: ignore[arg-type]  # a wrong one is Mooncake's caller's, and said in setup

    @classmethod
    def _of_config(cls, config: Mapping[str, str]) -> Setup:
        for name in ("local_hostname", "metadata_server"):
            if not config.get(name):
                raise ConfigError(f"setup needs {name}")
        known: dict[str, Any] = {field.name: config[field.name] for field in fields(cls) if field.name in config}
        known |= {"protocol": known.get("protocol", "tcp"), "rdma_devices": known.get("rdma_devices", "")}
        known["master_server_addr"] = known.get("master_server_addr", "")
        for name in ("global_segment_size", "local_buffer_size"):
            known[name] = read_size(known.get(name, str(SEGMENT_BYTES)), name)
        return cls(**known)

    @property
    def hostname(self) -> str:
        """What this client is called, always with a port."""
        host = self.local_hostname
        return host if ":" in host else f"{host}:{PORT_FIRST + os.getpid() % PORTS}"

    def settings(self) -> dict[str, Any]:
        """Settings of the cache that these arguments stand for, where neither the file nor TIERCACHE_* says them."""
        said = {row.name for row in load().explain() if not row.source.startswith("default")}
        asked: dict[str, Any] = {}
        if self.global_segment_size:
            asked["memory_bytes"] = max(int(RULES["memory_bytes"].low), self.global_segment_size)
        if self.master_server_addr.startswith(SCHEME):
            asked["peers"] = self.master_server_addr.removeprefix(SCHEME)
            asked["peer_transport"] = "tcp" if self.protocol == "tcp" else "auto"
        return {name: value for name, value in asked.items() if name not in said}


def read_size(text: str, name: str) -> int:
    """Bytes, from a number with or without a unit ("16MB"). Raises ConfigError for anything else."""
    found = _SIZE.fullmatch(text)
    if found is None:
        raise ConfigError(f"{name} must be a size such as 16MB, not {text!r}")
    return int(float(found[1]) * _UNITS[found[2].upper()])
