"""Contract suites for origins: what every origin owes its callers, as pytest classes to subclass.

```python
class TestMyOrigin(OriginTests):                 # or FaultyOriginTests, where a FaultProxy stands in between
    @contextmanager
    def arrange(self, home):
        yield Arrangement(open=..., put=..., remove=...)
```

Objects are put and removed behind the origin's back, and bytes are compared with what was put. `MemoryOrigin` is the
fake that keeps the same contract, for simulations and for tests of what stands on an origin.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from tiercache.testing.origins.memory import MemoryOrigin

if TYPE_CHECKING:
    from tiercache.testing.origins.faults import FaultyOriginTests
    from tiercache.testing.origins.plain import DATA, QUICK, Arrangement, OriginTests, read

_PLACES = {"FaultyOriginTests": "faults"} | dict.fromkeys(
    ("DATA", "QUICK", "Arrangement", "OriginTests", "read"), "plain"
)


def __getattr__(name: str) -> object:
    """The suites need pytest; the fake does not, so they load when they are asked for."""
    if name not in _PLACES:
        raise AttributeError(name)
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


__all__ = [
    "DATA",
    "QUICK",
    "Arrangement",
    "FaultyOriginTests",
    "MemoryOrigin",
    "OriginTests",
    "read",
]
