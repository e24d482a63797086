"""tiercache: one embeddable tiered cache for KV blocks of language models and pages of data-lake files.

`tiercache.open(directory)` gives a cache for threads; see README.md for the filesystem and the command line.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiercache.assemble import open_cache as open  # the public name; nothing here opens files
    from tiercache.cache import Cache
    from tiercache.lease import Lease
    from tiercache.model import Kind, Name, Outcome
    from tiercache.settings import Settings
    from tiercache.sync import BlockingCache

__version__ = "0.1.0"

_HOMES = {
    "open": ("tiercache.assemble", "open_cache"),
    "BlockingCache": ("tiercache.sync", "BlockingCache"),
    "Cache": ("tiercache.cache", "Cache"),
    "Lease": ("tiercache.lease", "Lease"),
    "Kind": ("tiercache.model", "Kind"),
    "Name": ("tiercache.model", "Name"),
    "Outcome": ("tiercache.model", "Outcome"),
    "Settings": ("tiercache.settings", "Settings"),
}

__all__ = ["BlockingCache", "Cache", "Kind", "Lease", "Name", "Outcome", "Settings", "open"]


def __getattr__(name: str) -> object:
    """Public names are imported at first use, so that `import tiercache` costs next to nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tiercache' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
