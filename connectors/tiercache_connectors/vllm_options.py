"""What `kv_connector_extra_config` says to the doors of vLLM: a few options of their own, and settings of the cache.

    {"directory": "/var/cache/tiercache", "memory_bytes": "64 GiB", "load": "auto"}

Scheduler and workers are different processes as a rule; all of them open the same directory, which its owner shares.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING

from tiercache.errors import ConfigError
from tiercache.settings import RULES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from tiercache.sync import BlockingCache

log = logging.getLogger(__name__)

HOST_KEYS = frozenset({"spec_name", "spec_module_path", "module_path", "type", "kv_connector_module_path"})
"""What vLLM itself reads from the same table."""


class LoadMode(StrEnum):
    """When a step of the engine waits for what it loads."""

    AUTO = "auto"
    """Layer by layer where everything is in memory, between steps (async) where an SSD or a network is asked."""
    SYNC = "sync"
    """Before the step's forward pass."""
    LAYERWISE = "layerwise"
    """Inside the forward pass, each layer for its own."""
    ASYNC = "async"
    """Not at all: the request waits, others go on."""


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the connector, checked. Times are seconds."""

    model: str = ""
    """Name of the weights in keys; found out from the files where it is empty (see weights)."""
    revision: str = ""
    load: LoadMode = LoadMode.AUTO
    block_tokens: int = 16
    min_tokens: int = 0
    """Fewer tokens than this are computed rather than loaded."""
    load_deadline_s: float = 10.0
    """What has not been loaded by then is computed."""
    fence_s: float = 10.0
    """Saves that hold pages for longer than this are given up."""
    threads: int = 1
    """Threads that copy, in each worker."""
    durable: bool = False
    """Saves are not over before they would survive a power loss."""
    verify: bool = True
    plan: bool = True
    """Whether a load is cut where computing is faster, by what tiers and prefill have been measured to take."""
    collision_resistant: bool = False
    settings: tuple[tuple[str, object], ...] = ()
    """Settings of the cache."""

    @classmethod
    def of(cls, extra: Mapping[str, Any]) -> Options:
        """Checks the table. Raises ConfigError for what is neither an option nor a setting."""
        own = {each.name for each in fields(cls)} - {"settings"}
        unknown = sorted(extra.keys() - own - RULES.keys() - HOST_KEYS)
        if unknown:
            raise ConfigError(
                f"kv_connector_extra_config has {', '.join(unknown)}: options are {', '.join(sorted(own))}, and the "
                "settings that `tiercache config` lists"
            )
        values = {name: extra[name] for name in own & extra.keys()}
        try:
            values["load"] = LoadMode(values.get("load", "auto"))
        except ValueError:
            modes = ", ".join(LoadMode)
            raise ConfigError(f"load must be one of {modes}, not {values['load']!r}") from None
        for name, value in values.items():
            _check(name, value, getattr(cls(), name))
        return cls(**values, settings=tuple((name, extra[name]) for name in sorted(RULES.keys() & extra.keys())))

    def open(self) -> BlockingCache:
        """The cache of this process for the directory; close it."""
        import tiercache

        return tiercache.open(**dict(self.settings))  # type: ignore[arg-type]


def _check(name: str, value: object, default: object) -> None:
    """Raises ConfigError for a value of another kind than its default, or a negative one."""
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise ConfigError(f"{name} in kv_connector_extra_config must be like {default!r}, not {value!r}")
    if isinstance(value, int | float) and value < 0:
        raise ConfigError(f"{name} in kv_connector_extra_config must not be negative, but is {value!r}")
