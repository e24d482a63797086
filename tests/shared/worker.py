"""A process that uses a shared directory, told what to do line by line; see conftest.Worker."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from typing import Any

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

    def put_chain(self, digests: list[str], size: int) -> list[str]:
        values = [bytes.fromhex(digest)[:1] * size for digest in digests]
        return [outcome.name for outcome in self.cache.put_chain([bytes.fromhex(each) for each in digests], values)]

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

    def mount(self, protocol: str, options: dict[str, Any], **settings: Any) -> None:
        from tiercache_connectors.fsspec_fs import TierCacheFileSystem

        self.files = TierCacheFileSystem(target_protocol=protocol, target_options=options, **settings)

    def digest(self, path: str, start: int | None = None, end: int | None = None) -> str:
        import hashlib

        return hashlib.sha256(self.files.cat_file(path, start=start, end=end)).hexdigest()

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
