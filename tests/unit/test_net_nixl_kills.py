"""A child process reads, writes and notes over NIXL while its peer is killed or stopped, at many moments: it ends
normally, each call in an answer or UnavailableError. What NIXL does to a process, it does to the child. And a process
that is asked outlives whoever asked it, also when it stood still meanwhile."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys

import pytest

from tiercache.buffers import Buffer
from tiercache.errors import UnavailableError
from tiercache.net import nixl
from tiercache.testing.transports import PeerProcess
from tiercache.testing.transports.deaths import meet
from tiercache.transport import Move, Transport

SHORT_S = 0.5
MIB = 1 << 20


@pytest.mark.slow
@pytest.mark.parametrize(("sign", "seeds"), [(signal.SIGKILL, 10), (signal.SIGSTOP, 3)])
def test_a_child_outlives_its_peers(sign: signal.Signals, seeds: int) -> None:
    if not nixl.usable().usable:
        pytest.skip(nixl.usable().why)
    words = [sys.executable, __file__, str(sign.value), str(seeds)]
    child = subprocess.run(words, timeout=100, capture_output=True, text=True, check=False)
    assert (child.returncode, child.stderr) == (0, "")
    said = child.stdout.split()
    assert len(said) == seeds
    assert sign != signal.SIGKILL or set(said) == {"raised"}


async def outlive(here: Transport, sign: int, seed: int) -> str:
    """What became of the calls while the other end was hit at a moment that the seed chooses."""
    rng = random.Random(seed)
    peer = await PeerProcess.start("nixl", "127.0.0.1")
    descriptor = here.expose(Buffer.of(bytearray(16 * MIB), writable=True), writable=True)
    try:
        link = await meet(here, peer)
        theirs = await peer.call("expose", size_bytes=16 * MIB, seed=seed, writable=True)
        region = link.attach(bytes.fromhex(theirs))
        target = Buffer.of(bytearray(16 * MIB), writable=True)
        pieces = [target.slice(i << 16, 1 << 16) for i in range(64)]

        async def repeat(call: object, *arguments: object) -> None:
            for _ in range(10_000 if sign == signal.SIGKILL else 5):
                await call(*arguments, SHORT_S)  # type: ignore[operator]

        async def strike() -> None:
            await asyncio.sleep(rng.uniform(0, 0.05))  # the moment that is tested
            os.kill(peer.process.pid, sign)

        ask = {"descriptor": descriptor.hex(), "offset": 0, "length": MIB}
        ask["times"] = 100_000 if sign == signal.SIGKILL else 300
        told = [asyncio.ensure_future(peer.call(what, **ask)) for what in ("read", "write")]
        calls = [
            repeat(link.read, [Move(region, 0, pieces)]),
            repeat(link.write, [Move(region, MIB, [target.slice(0, 15 * MIB)])]),
            repeat(link.notify, b"n" * rng.choice((1, 60_000))),
        ]
        ends = await asyncio.gather(*calls, strike(), return_exceptions=True)
        wrong = [end for end in ends if end is not None and not isinstance(end, UnavailableError)]
        assert not wrong, wrong
        await link.close()
        raised = sum(end is not None for end in ends)
        if sign == signal.SIGSTOP:  # it is awake again, and its peer has gone from it
            peer.resume()
            await asyncio.wait(told, timeout=20)
            assert await peer.call("expose", size_bytes=1, seed=1)
    finally:
        if sign == signal.SIGKILL:
            await peer.process.wait()
        await peer.kill()
    await asyncio.gather(*told, return_exceptions=True)
    here.withdraw(descriptor)
    return "raised" if raised == 3 else "answered"


async def main(sign: int, seeds: int) -> None:
    """The child."""
    here = nixl.open_transport("127.0.0.1", lambda _: None)
    for seed in range(seeds):
        print(await outlive(here, sign, seed), flush=True)
    await here.close()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
