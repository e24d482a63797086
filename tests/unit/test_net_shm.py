"""The shm transport: what its port leaves open, and what it does not believe."""

from __future__ import annotations

import array
import asyncio
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import pytest

from tiercache.errors import ConfigError, ProtocolError, UnavailableError
from tiercache.model import Outcome
from tiercache.net import open_transport, shm, usable
from tiercache.net.shm_link import Region, pack_region
from tiercache.net.shm_post import HELLO, Op, Post
from tiercache.testing.transports import Exposure, Guarded, Pair, pattern
from tiercache.transport import Memory, Move

HIT, MISS = Outcome.HIT, Outcome.MISS
DEADLINE_S = 20.0

pytestmark = pytest.mark.skipif(not usable("shm").usable, reason=usable("shm").why)


def transport(notified=lambda note: None) -> shm.ShmTransport:
    return open_transport("shm", "", notified)


def memory_file(size: int) -> int:
    """A memory file that is not sealed."""
    file = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(file, size)
    return file


def test_only_whole_sealed_memory_files_are_exposed() -> None:
    async def check() -> None:
        here = transport()
        good = Exposure(1, 8192)
        loose = memory_file(8192)
        with open(os.devnull, "rb") as other:
            for memory, file in (
                (good.buffer, -1), (good.buffer, loose), (good.buffer, other.fileno()),
                (good.buffer.slice(0, 4096), good.file), (good.buffer, 9999),
            ):  # fmt: skip
                with pytest.raises(ConfigError):
                    here.expose(memory, file=file)
        with pytest.raises(ConfigError):
            here.expose(good.buffer, file=good.file, kind=Memory.CUDA)
        here.withdraw(here.expose(good.buffer, file=good.file))
        os.close(loose)
        good.close()
        await here.close()

    asyncio.run(check())


def test_memory_for_reading_cannot_be_mapped_writable() -> None:
    async def check() -> None:
        async with Pair(transport) as pair:
            _, region, _ = pair.expose(8192, 1)
            await pair.link.read([Move(region, 0, Guarded([10]).pieces)], DEADLINE_S)
            (handed,) = [each.file for each in pair.there._regions.values()]
            with pytest.raises(PermissionError):
                mmap.mmap(handed, 8192)

    asyncio.run(check())


def test_what_was_withdrawn_is_let_go_by_who_mapped_it() -> None:
    """It becomes a miss as soon as that is heard."""

    async def check() -> None:
        async with Pair(transport) as pair:
            _, region, descriptor = pair.expose(8192, 1)
            move = Move(region, 0, Guarded([10]).pieces)
            assert await pair.link.read([move], DEADLINE_S) == [HIT]
            pair.there.withdraw(descriptor)
            async with asyncio.timeout(DEADLINE_S):
                while await pair.link.read([move], DEADLINE_S) == [HIT]:
                    await asyncio.sleep(0)
            assert [each for each in pair.link._mapped.values() if each is not None] == []
            _, region, descriptor = pair.expose(8192, 2)
            pair.there.withdraw(descriptor)
            assert await pair.link.read([Move(region, 0, Guarded([10]).pieces)], DEADLINE_S) == [MISS]

    asyncio.run(check())


def test_a_region_that_was_never_attached_is_withdrawn_quietly() -> None:
    async def check() -> None:
        async with Pair(transport) as pair:
            unknown = Exposure(1, 4096)
            pair.there.withdraw(pair.there.expose(unknown.buffer, file=unknown.file))
            unknown.close()
            region = pair.expose(8192, 1)[1]
            for _ in range(2):
                assert await pair.link.read([Move(region, 0, Guarded([10]).pieces)], DEADLINE_S) == [HIT]

    asyncio.run(check())


def test_other_machines_and_users_are_out_of_reach() -> None:
    async def check() -> None:
        here, there = transport(), transport()
        for at in (8, 24):  # the boot, the user
            body = bytearray(there.address[:-4])
            body[at] ^= 1
            with pytest.raises(UnavailableError, match="machine"):
                await here.connect(bytes(body) + zlib.crc32(body).to_bytes(4, "little"), DEADLINE_S)
        await asyncio.gather(here.close(), there.close())

    asyncio.run(check())


def test_the_directory_goes_with_the_transport() -> None:
    """Also that of one that was killed, when the next transport is made."""

    async def check() -> None:
        here = transport()
        place = Path(shm.parse_address(here.address).path).parent
        assert place.stat().st_mode & 0o777 == 0o700
        await here.close()
        assert not place.exists()
        program = (
            "import asyncio, os, signal; from tiercache.net import shm\n"
            "async def main():\n"
            "    made = shm.open_transport('', print); print(shm.parse_address(made.address).path, flush=True)\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
            "asyncio.run(main())"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        assert done.returncode == -signal.SIGKILL
        left = Path(done.stdout.strip()).parent
        assert left.exists()
        await transport().close()
        assert not left.exists()

    asyncio.run(check())


def test_directories_of_other_machines_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may share the place for temporary files; from here nobody answers in them."""

    def abandoned() -> Path:
        directory, listener, _ = shm._listen()
        listener.close()
        return Path(directory)

    async def check() -> None:
        await transport().close()

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ours = abandoned()
    with monkeypatch.context() as patch:
        patch.setattr(shm, "_boot", lambda: b"another machine!")
        theirs = abandoned()
    asyncio.run(check())
    assert theirs.is_dir()
    assert not ours.exists()


async def frame_of(sock: socket.socket) -> bytes:
    return await asyncio.get_running_loop().sock_recv(sock, 1 << 17)


class Liar:
    """A peer that was dialled, and answers what a test wants."""

    def __init__(self, folder: Path) -> None:
        self.ticket = os.urandom(16)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(folder / "liar"))
        self.listener.listen(5)
        self.listener.setblocking(False)
        body = shm._ADDRESS.pack(b"tcSH", 1, shm._boot(), os.geteuid(), self.ticket) + str(folder / "liar").encode()
        self.address = body + zlib.crc32(body).to_bytes(4, "little")


LIES = {
    "not sealed": (Op.HERE, 8192, False, b""),
    "another size": (Op.HERE, 4096, True, b""),
    "no file": (Op.HERE, 0, True, b""),
    "a file with a miss": (Op.GONE, 8192, True, b""),
    "an unknown answer": (7, 0, True, b""),
    "something more": (Op.HERE, 8192, True, b"more"),
}


@pytest.mark.parametrize("what", LIES)
def test_a_lying_peer_is_cut_off(what: str, tmp_path: Path) -> None:
    async def check() -> None:
        op, size, sealed, rest = LIES[what]
        liar, here = Liar(tmp_path), transport()
        link = await here.connect(liar.address, DEADLINE_S)
        sock, _ = await asyncio.get_running_loop().sock_accept(liar.listener)
        assert HELLO.unpack(await frame_of(sock))[2] == liar.ticket
        region = link.attach(pack_region(liar.ticket, Region(5, 8192, True)))
        target = Guarded([100])
        reading = asyncio.ensure_future(link.read([Move(region, 0, target.pieces)], DEADLINE_S))
        assert Post.parse(await frame_of(sock))[:2] == (Op.WANT, 5)
        exposure = Exposure(1, size) if size and sealed else None
        file = exposure.file if exposure else memory_file(size) if size else -1
        head = bytes([op, 0, 0, 0, 0, 0, 0, 0]) + (5).to_bytes(8, "little") + rest
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file]))] if size else []
        sock.sendmsg([head], rights)
        with pytest.raises(UnavailableError):
            await reading
        assert target.untouched()
        if size:
            os.close(file)
        sock.close()
        liar.listener.close()
        await here.close()

    asyncio.run(check())


def test_nonsense_at_the_door_ends_its_connection_only() -> None:
    async def check() -> None:
        async with Pair(transport) as pair:
            there = shm.parse_address(pair.there.address)
            for wrong in (b"x", bytes(200), HELLO.pack(b"tcSH", 1, bytes(16), bytes(16)), bytes(65_000)):
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                sock.connect(there.path)
                sock.setblocking(False)
                sock.send(wrong)
                async with asyncio.timeout(DEADLINE_S):
                    assert await frame_of(sock) == b""
                sock.close()
            _, region, _ = pair.expose(8192, 1)
            target = Guarded([8192])
            assert await pair.link.read([Move(region, 0, target.pieces)], DEADLINE_S) == [HIT]
            assert (target.content() == pattern(1, 0, 8192)).all()
            with pytest.raises(ProtocolError):
                pair.link.attach(pack_region(bytes(16), Region(1, 8192, True)))

    asyncio.run(check())
