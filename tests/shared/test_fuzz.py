"""More than 100,000 messages, right, wrong and hurt, on the socket of a real owner, beside a client that goes on."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from typing import Any

import pytest

from tests.shared.conftest import Shared, eventually
from tests.unit.test_wire_sessions import RUN, nonsense
from tiercache.keys import object_key
from tiercache.model import Name
from tiercache.wire import sockets
from tiercache.wire.frames import HEADER, Op, pack
from tiercache.wire.hello import Hello, pack_hello

pytestmark = [pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only"), pytest.mark.slow]
MESSAGES = 110_000
PROCESSES = 2

CODE = """
import sys
from tests.shared.test_fuzz import Stranger
Stranger(sys.argv[1], int(sys.argv[2])).live(int(sys.argv[3]))
"""


class Stranger:
    """Connects again and again and says anything; counts the messages that an owner has dealt with."""

    def __init__(self, directory: str, seed: int) -> None:
        self.directory, self.rng = directory, random.Random(seed)
        self.names = [Name(object_key("test", f"theirs {i}")) for i in range(5)] + [Name(RUN.key, 1)]
        self.said = self.connections = 0

    def live(self, messages: int) -> None:
        while self.said < messages:
            self.connections += 1
            with sockets.connect(self.directory) as sock:
                self.said += self.talk(sock)
        print(json.dumps([self.said, self.connections]))

    def talk(self, sock: socket.socket) -> int:
        """Messages that were sent before the owner cut the connection."""
        rng = self.rng
        role = rng.choice(["line", "channel"])
        first = pack(Op.HELLO, 1, pack_hello(Hello(rng.randbytes(16).hex(), role, 0, rng.random() < 0.1)))
        said = 0
        messages = [first] + [self.message() for _ in range(rng.randrange(1, 300))]
        sock.setblocking(True)
        sockets.set_timeout(sock, socket.SO_SNDTIMEO, 20.0)
        sockets.set_timeout(sock, socket.SO_RCVTIMEO, 20.0)
        try:
            for message in messages:
                if rng.random() < 0.1 and len(message) > 1:
                    cut = rng.randrange(1, len(message))
                    sock.sendall(message[:cut])
                    message = message[cut:]
                files = [0] * rng.randrange(1, 4) if rng.random() < 0.01 else []
                at = sockets.send_fds(sock, message, files)
                sock.sendall(message[at:])
                said += 1
                self.take(sock)
            if rng.random() < 0.5:  # else it goes in the middle of its own questions
                sock.sendall(pack(Op.QUARANTINE, 9, b""))
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1 << 16):
                    pass
        except OSError:
            pass  # it was cut off
        return said

    @staticmethod
    def take(sock: socket.socket) -> None:
        """Takes what has been answered so far."""
        try:
            while sock.recv(1 << 16, socket.MSG_DONTWAIT):
                pass
        except BlockingIOError:
            return

    def message(self) -> bytes:
        """One, seldom so wrong that the connection ends with it."""
        rng = self.rng
        message = bytearray(nonsense(rng, self.names))
        if rng.random() < 0.01:
            message[rng.randrange(len(message))] ^= 1 << rng.randrange(8)
        elif rng.random() < 0.002:
            return HEADER.pack(rng.randrange(1 << 32), rng.randrange(1 << 16), 0, 5) + rng.randbytes(50)
        return bytes(message)


def test_a_hundred_thousand_messages_harm_nobody(shared: Shared, worker: Any) -> None:
    shared.settings |= {"ssd_bytes": 0, "origin_deadline_s": 0.1}
    one = worker()
    assert one.put("mine", "x", 1 << 20) == "HIT" and one.lease("mine") == "HIT"
    owner, before = shared.owner, shared.descriptors()
    strangers = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, shared.directory, str(seed), str(MESSAGES // PROCESSES)],
            stdout=subprocess.PIPE,
        )
        for seed in range(PROCESSES)
    ]  # fmt: skip
    rounds = 0
    while any(each.poll() is None for each in strangers):
        one.delete("turn")
        assert one.put("turn", "abcdef"[rounds % 6], 100_000) in ("HIT", "BUSY", "FULL")
        assert one.get("turn")[0] in ("abcdef"[rounds % 6], "MISS")
        assert one.look(0) == ["x", 1 << 20, True]
        rounds += 1
        if rounds % 20 == 0:
            assert one.validate()["broken"] == ""
    counts = [json.loads(each.communicate()[0]) for each in strangers]
    print(counts, {"rounds": rounds})
    assert sum(said for said, _ in counts) >= MESSAGES
    eventually(lambda: one.validate()["pins"] == 1 and len(one.clients()["clients"]) == 1)
    assert shared.descriptors() <= before + 4
    assert shared.owner == owner and one.put("last", "y", 1000) == "HIT"
    assert one.validate()["broken"] == "" and one.warnings() == []
    assert sum(one.stats("tiercache_internal_errors").values()) == 0
