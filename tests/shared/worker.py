"""A process that uses a shared directory, told what to do line by line; see conftest.Worker."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from typing import Any

MIB = 1 << 20
STARTED = time.perf_counter()


class Told:
    """What it may be told; every answer is JSON."""

    def __init__(self) -> None:
        self.cache: Any = None
        self.files: Any = None
        self.leases: list[Any] = []
        self.views: list[Any] = []
        self.heard: list[str] = []

    def imports(self) -> list[str]:
        """Imports what opening imports."""
        import asyncio.selector_events  # noqa: F401

        import fsspec.asyn
        import numpy  # noqa: F401

        import tiercache
        import tiercache.assemble
        import tiercache.cpu.view
        import tiercache.wire.client
        import tiercache.wire.starting

        fsspec.asyn.get_loop()
        assert tiercache.open
        return sorted(name for name in sys.modules if name.split(".")[0] in ("rocksdict", "obstore"))

    def open(self, directory: str, **settings: Any) -> float:
        """Milliseconds that it took."""
        import tiercache

        began = time.perf_counter()
        self.cache = tiercache.open(directory, **settings)
        return (time.perf_counter() - began) * 1000

    def kind(self) -> str:
        return type(self.cache.core).__name__

    def put(self, name: str, letter: str, size: int, durable: bool = False) -> str:
        return self.cache.put([name], [letter.encode() * size], durable=durable)[0].name

    def delete(self, name: str) -> str:
        return self.cache.delete([name])[0].name

    def put_chain(self, digests: list[str], size: int) -> list[str]:
        values = [bytes.fromhex(digest)[:1] * size for digest in digests]
        return [outcome.name for outcome in self.cache.put_chain([bytes.fromhex(each) for each in digests], values)]

    def join(self, label: str, count: int, claim: int) -> list[Any]:
        """Begins to fill blocks of tests.unit.test_cache_blocks, and writes all that it may; see BlockTicket."""
        from tests.unit import test_cache_blocks as blocks

        self.names = blocks.digests(count, label)
        self.ticket = blocks.join(self.cache, self.names, claim)
        claims = list(self.ticket.claims)
        self.rows = [blocks.write(self.ticket, i, name) for i, name in enumerate(self.names) if claims[i]]
        return [[one.name for one in self.ticket.outcomes], claims, self.ticket.present]

    def pieces(self, label: str, count: int, pieces: list[list[int]]) -> list[Any]:
        from tests.unit import test_cache_blocks as blocks

        some = [(start, stop) for start, stop in pieces]
        self.other = blocks.join(self.cache, blocks.digests(count, label), 0, some)
        return list(self.other.pieces)

    def land(self, count: int = -1, parts: int = -1) -> list[str]:
        """Commits the first of what was written."""
        rows = [(item, mine & parts, row) for item, mine, row in (self.rows if count < 0 else self.rows[:count])]
        return [one.name for one in self.ticket.commit(rows)]

    def land_fails(self) -> str:
        """How a commit of the rest fails."""
        from tiercache.errors import UnavailableError

        try:
            self.ticket.commit(self.rows[-1:])
        except UnavailableError:
            return "UnavailableError"
        return ""

    def end_join(self) -> None:
        self.ticket.end()

    def match(self, digests: list[str]) -> list[str]:
        with self.cache.match([bytes.fromhex(each) for each in digests]) as lease:
            return [bytes(lease.view(i)[:1]).hex() for i in range(len(lease))]

    def get(self, name: str) -> list[Any]:
        """[first letter, length, whether all are the same], or [outcome]."""
        value = self.cache.get([name])[0]
        return self._facts(value) if isinstance(value, bytes) else [value.name]

    def await_get(self, name: str, patience_s: float = 20.0) -> list[Any]:
        """What it gets as soon as that is no miss."""
        until, pause = time.monotonic() + patience_s, threading.Event()
        while (found := self.get(name)) == ["MISS"] and time.monotonic() < until:
            pause.wait(0.05)
        return found

    def get_into(self, name: str, size: int) -> list[Any]:
        """As `get`, copied into memory of this process: without asking the owner, where it knows the place."""
        target = bytearray(size)
        outcome = self.cache.get_into([name], [target])[0]
        return self._facts(bytes(target)) if outcome.name == "HIT" else [outcome.name]

    def get_many(self, names: list[str]) -> list[list[Any]]:
        return [self._facts(each) if isinstance(each, bytes) else [each.name] for each in self.cache.get(names)]

    @staticmethod
    def _facts(value: bytes) -> list[Any]:
        return [chr(value[0]), len(value), value == value[:1] * len(value)]

    def lease(self, name: str) -> str:
        lease = self.cache.lease([name])
        outcome = lease.outcomes[0].name
        if outcome == "HIT":
            self.leases.append(lease)
            self.views.append(lease.view(0))
        return outcome

    def look(self, at: int) -> list[Any]:
        return self._facts(bytes(self.views[at]))

    def let_go(self) -> None:
        self.views.clear()
        for lease in self.leases:
            lease.release()
        self.leases.clear()

    def flush(self) -> bool:
        return self.cache.flush()

    def clients(self) -> Any:
        from tiercache.sync import wait

        return wait(self.cache.core.call("owner", {}), self.cache.loop)

    def validate(self) -> Any:
        """What the owner says of its index."""
        from tiercache.sync import wait

        return wait(self.cache.core.call("validate", {}), self.cache.loop)

    def evict_all(self) -> int:
        """Empties the cache; bytes that went."""
        from tiercache.sync import wait

        return wait(self.cache.core.call("evict", {"down_to": 0}), self.cache.loop)["evicted_bytes"]

    def stats(self, *names: str) -> dict[str, float]:
        """Those of the owner's metrics that begin with these names."""
        found = self.cache.stats()
        return {name: value for name, value in found.items() if name.startswith(names)}

    def page(self, key: str, fills: bool = True) -> str:
        """Reads the one page of a file through the cache; the load writes half of it and then, unless it `fills`,
        waits for ever. Answers what came."""
        import asyncio

        from tiercache.lease import PageRun
        from tiercache.sync import wait

        size, name = 1 << 20, bytes.fromhex(key)
        run = PageRun(name, size, size, 64 << 10)

        async def load(gaps: Any, landed: Any) -> None:
            for gap in gaps:
                gap.target.view()[: size // 2] = name[:1] * (size // 2)
                if not fills:
                    print(json.dumps("filling"), flush=True)
                    await asyncio.get_running_loop().create_future()
                gap.target.view()[size // 2 :] = name[:1] * (size // 2)
            landed(range(len(gaps)))

        async def read() -> str:
            lease = await self.cache.core.read_pages(run, [0], [(1 << 16) - 1], load)
            try:
                outcome = lease.outcomes[0]
                assert outcome.name != "HIT" or bytes(lease.view(0)) == name[:1] * size, "wrong bytes"
                return outcome.name
            finally:
                lease.release()

        return wait(read(), self.cache.loop)

    def claim(self, label: str) -> str:
        """Claims a note and answers what came: the value, or "mine"."""
        from tiercache.sync import wait

        value = wait(self.cache.core.notes.claim(label.encode()), self.cache.loop)
        return "mine" if value is None else value.decode()

    def settle(self, label: str, value: str) -> None:
        async def told() -> None:
            self.cache.core.notes.settle(label.encode(), value.encode(), 60.0)

        from tiercache.sync import wait

        wait(told(), self.cache.loop)

    def churn(self, seed: int) -> None:
        """Puts, leases and gets as fast as it can until it is killed; says so once it has begun."""
        import random

        rng = random.Random(seed)
        for turn in range(1 << 40):
            name = f"{seed} {rng.randrange(20)}"
            value = bytes([65 + rng.randrange(26)]) * rng.choice([100, 70_000, MIB])
            self.cache.put([name], [value])
            with self.cache.lease([name, f"{1 - seed} {rng.randrange(20)}"]) as lease:
                self.views = [lease.view(i) for i, one in enumerate(lease.outcomes) if one.name == "HIT"]
            for each in self.cache.get([name]):
                assert not isinstance(each, bytes) or each == each[:1] * len(each), "wrong bytes"
            self.cache.delete([name])
            if turn == 2:
                print(json.dumps("churning"), flush=True)

    def exec_in_fork(self) -> list[str]:
        """What a program has open that a forked child executed."""
        return self._run_in_fork(False)

    def exec_in_fork_of_fork(self) -> list[str]:
        """As exec_in_fork, by a child of the child."""
        return self._run_in_fork(True)

    @staticmethod
    def _run_in_fork(twice: bool) -> list[str]:
        import os

        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            if twice and os.fork():
                os._exit(0)
            os.dup2(writer, 1)
            code = "import os, json; print(json.dumps([os.readlink(f'/proc/self/fd/{n}') for n in "
            code += "os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{n}') and int(n) > 2]))"
            os.execv(sys.executable, [sys.executable, "-S", "-E", "-c", code])
        os.close(writer)
        os.waitpid(pid, 0)
        with open(reader) as pipe:
            return json.loads(pipe.read())

    def fork(self, then: str, *arguments: Any) -> list[Any]:
        """A forked child does one thing and lives on; [its number, what came]."""
        import os

        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(0)
            os.dup2(writer, 1)
            try:
                answer = getattr(self, then)(*arguments)
            except BaseException as fault:
                answer = f"{type(fault).__name__}: {fault}"
            os.write(writer, json.dumps(answer).encode() + b"\n")
            os.close(writer)
            os.closerange(1, 3)
            threading.Event().wait()
        os.close(writer)
        with open(reader) as pipe:
            return [pid, json.loads(pipe.readline())]

    def open_and_get(self, directory: str, name: str, settings: dict[str, Any]) -> list[Any]:
        self.open(directory, **settings)
        return [self.kind(), *self.get(name)]

    def daemonise(self) -> int:
        """This process ends; a grandchild of it, in a session of its own, goes on with its pipes."""
        import os

        if os.fork():
            os._exit(0)
        os.setsid()
        if os.fork():
            os._exit(0)
        return os.getpid()

    def become(self, uid: int) -> int:
        """Another user, after everything that may be needed was imported (the interpreter may be root's alone)."""
        import difflib  # noqa: F401  # by settings
        import encodings.idna  # noqa: F401
        import os
        import tempfile

        import tiercache.cache
        import tiercache.cpu.tier
        import tiercache.cpu.view
        import tiercache.ssd.tier
        import tiercache.wire.client
        import tiercache.wire.starting  # noqa: F401

        self.open(tempfile.mkdtemp(), share=False, memory_bytes=64 * MIB, ssd_bytes=128 * MIB)
        self.cache.close()
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
        return os.getuid()

    def speak(self, version: int) -> None:
        """Another version of the protocol, as another release would."""
        from tiercache.wire import hello

        hello.VERSION = version

    def fds(self) -> list[str]:
        import os

        names = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
        return sorted(os.readlink(name) for name in names if os.path.lexists(name))

    def mount(self, protocol: str, options: dict[str, Any], **settings: Any) -> None:
        from tiercache_connectors.fsspec_fs import TierCacheFileSystem

        self.files = TierCacheFileSystem(target_protocol=protocol, target_options=options, **settings)

    def digest(self, path: str, start: int | None = None, end: int | None = None) -> str:
        import hashlib

        return hashlib.sha256(self.files.cat_file(path, start=start, end=end)).hexdigest()

    def ahead(self, path: str, size: int) -> list[Any]:
        """Whether a reader would say that all of a file is in memory, and how much is there when it has said so."""
        from tiercache.sync import wait

        mount = self.files.mount
        pin = wait(mount.reader.facts.stat([path]), mount.loop)[0]
        said = mount.reader.is_resident(pin, 0, size)
        return [said, wait(mount.cache.call("status", {}), mount.loop)["memory"]["used_bytes"]]

    def ls(self, path: str) -> list[str]:
        return sorted(self.files.ls(path, detail=False))

    def close(self) -> None:
        if self.files is not None:
            self.files.close()
        if self.cache is not None:
            self.cache.close()

    def warnings(self) -> list[str]:
        return self.heard


def main() -> None:
    told = Told()

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.heard.append(record.getMessage())

    logging.getLogger().addHandler(Ear(logging.WARNING))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        what, arguments, keywords = json.loads(line)
        try:
            answer = getattr(told, what)(*arguments, **keywords)
        except BaseException as fault:
            answer = {"fault": f"{type(fault).__name__}: {fault}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
