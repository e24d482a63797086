"""A child process reads, writes and notes over UCX while its peer is killed or stopped, at many moments: it ends
normally, each call in an answer or UnavailableError. What UCX does to a process, it does to the child."""

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
from tiercache.net import ucx
from tiercache.net.ucx import finding, options
from tiercache.net.ucx.transport import UcxTransport
from tiercache.testing.transports import PeerProcess
from tiercache.testing.transports.deaths import meet
from tiercache.transport import Move

SEEDS = 10
SHORT_S = 0.5
MIB = 1 << 20


@pytest.mark.slow
@pytest.mark.parametrize("transports", ["", "tcp"])
@pytest.mark.parametrize(("sign", "seeds"), [(signal.SIGKILL, SEEDS), (signal.SIGSTOP, 2)])
def test_a_child_outlives_its_peers(transports: str, sign: signal.Signals, seeds: int) -> None:
    if not ucx.usable().usable:
        pytest.skip(ucx.usable().why)
    words = [sys.executable, __file__, transports, str(sign.value), str(seeds)]
    child = subprocess.run(words, timeout=100, capture_output=True, text=True, check=False)
    assert (child.returncode, child.stderr) == (0, "")
    said = child.stdout.split()
    assert len(said) == seeds
    assert sign != signal.SIGKILL or set(said) == {"raised"}


async def outlive(here: UcxTransport, sign: int, seed: int) -> str:
    """What became of the calls while the other end was hit at a moment that the seed chooses."""
    rng = random.Random(seed)
    peer = await PeerProcess.start("ucx", "127.0.0.1")
    mine = bytearray(16 * MIB)
    descriptor = here.expose(Buffer.of(mine, writable=True), writable=True)
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

        told = [
            asyncio.ensure_future(peer.call(what, descriptor=descriptor.hex(), offset=0, length=MIB, times=100_000))
            for what in ("read", "write")
        ]
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
    finally:
        if sign == signal.SIGKILL:
            await peer.process.wait()
        await peer.kill()
    await asyncio.gather(*told, return_exceptions=True)
    return "raised" if raised == 3 else "answered"


async def main(transports: str, sign: int, seeds: int) -> None:
    """The child."""
    taken = finding.find().taken
    assert taken is not None
    library = ucx.load(taken.path)
    chosen = options.options(library.version, "lo") | ({"TLS": transports} if transports else {})
    here = UcxTransport(library, chosen, lambda _: None)
    for seed in range(seeds):
        print(await outlive(here, sign, seed), flush=True)
    await here.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
