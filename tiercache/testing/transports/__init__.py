"""Contract suite for transports: what every transport owes its callers, as a pytest class to subclass; another process
to talk to, and memory that both know.

```python
class TestMyTransport(TransportTests):            # and TransportProcessTests, which kills other processes
    name = "mine"                                 # as in tiercache.net.TRANSPORTS
    cannot = {"bounds": "why nobody can check them"}
```
"""

from __future__ import annotations

from tiercache.testing.transports.deaths import TransportProcessTests, meet
from tiercache.testing.transports.pair import GUARD, Ear, Guarded, Pair
from tiercache.testing.transports.pattern import MIB, Exposure, pattern
from tiercache.testing.transports.plain import TransportTests
from tiercache.testing.transports.process import PeerProcess

__all__ = [
    "GUARD",
    "MIB",
    "Ear",
    "Exposure",
    "Guarded",
    "Pair",
    "PeerProcess",
    "TransportProcessTests",
    "TransportTests",
    "meet",
    "pattern",
]
