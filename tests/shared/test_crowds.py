"""A thousand clients of one owner: all are served, and when they are gone nothing of them is left."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.shared.conftest import PATIENCE_S, Shared, eventually

pytestmark = [pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only"), pytest.mark.slow]
MIB = 1 << 20
PROCESSES, SESSIONS = 20, 50
DESCRIPTORS_EACH = 3
"""Of a client, in the owner: its process, its line, a channel."""
BYTES_EACH = 128 << 10

CROWD = """
import json, sys
from tests.shared.test_crowds import crowd
crowd(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]))
"""


def crowd(directory: str, first: int, settings: dict[str, Any]) -> None:
    """One process that is fifty clients: each with a session, connections and a view of the memory of its own."""
    import asyncio

    import tiercache
    from tiercache import assemble
    from tiercache.buffers import Buffer
    from tiercache.keys import object_key
    from tiercache.model import Name, Outcome
    from tiercache.settings import load
    from tiercache.sync import io_loop, wait

    def name(number: int) -> Name:
        return Name(object_key("crowd", str(number)))

    loop = io_loop()
    facts = load(directory=directory, **settings)
    clients: dict[int, tiercache.core.Core] = {}

    async def serve(number: int) -> None:
        """Puts its own value, gets the one of the client before, and keeps a lease on that."""
        core = clients[number]
        await core.start()
        value = bytes([number % 251]) * 20_000
        assert await core.put([name(number)], [Buffer.of(value)]) == [Outcome.HIT]
        lease = await core.lease([name(max(first, number - 1))])
        if lease.outcomes[0] is Outcome.HIT:  # else that client is not so far yet
            assert bytes(lease.view(0)) == bytes([max(first, number - 1) % 251]) * 20_000
        leases.append(lease)

    async def look(number: int) -> None:
        target = bytearray(20_000)
        assert await clients[number].get_into([name(number ^ 1)], [Buffer.of(target)]) == [Outcome.HIT]
        assert target == bytes([(number ^ 1) % 251]) * 20_000

    leases: list[Any] = []

    async def all_of(work: Any) -> None:
        await asyncio.gather(*[work(number) for number in clients])

    numbers = range(first, first + SESSIONS)
    for number in numbers:
        clients[number] = assemble._shared_cache(facts, start=True)
    wait(all_of(serve), loop)
    print("served", flush=True)
    sys.stdin.readline()
    wait(all_of(look), loop)
    print("looked", flush=True)
    sys.stdin.readline()
    if first % 100:  # half of the processes go without a word
        os._exit(0)
    for lease in leases:
        lease.release()

    async def leave(number: int) -> None:
        await clients[number].close()

    wait(all_of(leave), loop)


def test_a_thousand_clients(shared: Shared, worker: Any) -> None:
    count = PROCESSES * SESSIONS
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count * (DESCRIPTORS_EACH + 1):
        pytest.skip(f"the owner may have {hard} open files only")
    shared.settings |= {"ssd_bytes": 0, "owner_deadline_s": 60.0, "slots_max": 1 << 14}
    one = worker()
    assert one.put("a", "x", MIB) == "HIT"
    owner, base, base_bytes = shared.owner, shared.descriptors(), own_bytes(shared.owner)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CROWD, shared.directory, str(SESSIONS * i), json.dumps(shared.settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=shared.environment, text=True,
        )
        for i in range(PROCESSES)
    ]  # fmt: skip
    try:
        hear(processes, "served")
        rows = one.clients()["clients"]
        assert len(rows) == count + 1 and shared.owner == owner
        assert sum(row["leases"] for row in rows) > count // 2
        full, full_bytes = shared.descriptors(), own_bytes(owner)
        print({"descriptors": (base, full), "own_bytes": (base_bytes, full_bytes)})
        assert full - base <= count * DESCRIPTORS_EACH + 8
        assert full_bytes - base_bytes <= count * BYTES_EACH
        hear(processes, "looked", go_on=True)
        assert one.get("a") == ["x", MIB, True] and one.put("b", "y", MIB) == "HIT"
        assert one.validate()["broken"] == ""
        for process in processes:
            process.communicate("\n", timeout=PATIENCE_S * 4)
            assert process.returncode == 0
        eventually(lambda: len(one.clients()["clients"]) == 1)
        assert shared.descriptors() <= base + 2 and one.validate()["pins"] == 0
        left = own_bytes(owner)
        print({"left_descriptors": shared.descriptors(), "left_bytes": left})
        assert left - base_bytes <= count * BYTES_EACH // 2
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def hear(processes: list[subprocess.Popen[str]], word: str, *, go_on: bool = False) -> None:
    """All of them say so, after a line from here for whoever waits."""
    for process in processes:
        if go_on:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == f"{word}\n"


def own_bytes(pid: int) -> int:
    """Memory of a process' own, without what it has mapped of files."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024
