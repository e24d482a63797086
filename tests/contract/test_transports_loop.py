"""The transport of simulated networks keeps the contract of transports, too."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from tiercache.testing.peers import Network
from tiercache.testing.transports import TransportTests

if TYPE_CHECKING:
    from collections.abc import Callable

    from tiercache.transport import Transport


class TestLoop(TransportTests):
    name = "loop"

    @pytest.fixture(autouse=True)
    def _usable(self) -> None:
        self.network = Network(random.Random(1), 0.0)

    def open_one(self, notified: Callable[[bytes], None]) -> Transport:
        return self.network.open_transport("a host", notified)
