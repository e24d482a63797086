"""Shm: the transport between processes of one user on one machine. Exposed memory files are mapped by the peers, which
then copy by themselves. A Unix socket in a private directory hands out the descriptors, carries notes, and tells when
a peer dies; what it mapped stays valid then.

A region for reading is handed out as a descriptor that cannot be mapped writable. That guards against mistakes: a
process of the same user that means harm can do as it likes with another one anyway.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import hmac
import logging
import os
import shutil
import socket
import stat
import struct
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tiercache.clock import system_random
from tiercache.errors import ConfigError, ProtocolError, UnavailableError
from tiercache.net import Usable
from tiercache.net.shm_link import Region, ShmLink, pack_region, parse_region
from tiercache.net.shm_post import HELLO, Op, Post, same_user
from tiercache.transport import ADDRESS_BYTES_MAX, LINKS_MAX, Memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from tiercache.buffers import Buffer

log = logging.getLogger(__name__)

VERSION = 1
STRANGERS_MAX = LINKS_MAX
"""Connections that are not a known peer's yet; another one takes the place of the oldest."""
COPIERS = 2
"""Threads that copy for all links of a transport: more than that do not make the memory quicker."""
STRANGER_S = 30.0
"""How long a dialler that this end has not connected to is waited for."""

_MAGIC = b"tcSH"
_ADDRESS = struct.Struct("<4sB3x16sI16s")
"""Magic, version, the machine's boot, the user, the ticket; then the path of the socket, then a check."""
_CHECK = struct.Struct("<I")
_PATH_BYTES_MAX = 107
_PREFIX = "tiercache-shm-{}-"
"""Of directories, with what tells this boot of this machine: machines may share the place for temporary files."""
_BOOT = "/proc/sys/kernel/random/boot_id"


def usable() -> Usable:
    """It works where the kernel has sealed memory files, and /proc shows which boot of which machine this is."""
    if not hasattr(os, "memfd_create") or not hasattr(socket, "SO_PEERCRED"):
        return Usable(False, "this system has no memory files that could be shared")
    try:
        _boot()
    except OSError as error:
        return Usable(False, f"what machine this is cannot be told: {error}")
    return Usable(True, "memory files shared between processes of one user on this machine")


def open_transport(host: str, notified: Callable[[bytes], None]) -> ShmTransport:
    """A transport on the running loop; peers come to it through a file, whatever `host` is. Raises ConfigError where
    there is no place for that."""
    return ShmTransport(notified)


class Address(NamedTuple):
    """Where a transport is found, and what whoever dials must know."""

    boot: bytes
    user: int
    ticket: bytes
    path: str


class Exposed(NamedTuple):
    """A region of ours: the descriptor that is handed out for it, which this owns."""

    file: int
    memory: Buffer


class ShmTransport:
    """One process's end of all shm links: a socket in a directory of its own, and what it exposes."""

    name = "shm"

    def __init__(self, notified: Callable[[bytes], None]) -> None:
        """On the loop that it works for. Raises ConfigError where no socket can be made."""
        self._loop = asyncio.get_running_loop()
        self._notified = notified
        self._ticket = system_random().randbytes(16)
        _sweep()
        self._directory, self._listener, path = _listen()
        self._address = Address(_boot(), os.geteuid(), self._ticket, path)
        self._copiers = ThreadPoolExecutor(COPIERS, "tiercache-shm")
        self._regions: dict[int, Exposed] = {}
        self._last = 0
        self._links: dict[bytes, list[ShmLink]] = {}
        self._strangers: dict[Post, bytes] = {}
        """Connections, and the ticket that each said, once it has."""
        self._closed = False
        self._loop.add_reader(self._listener, self._accept)

    @property
    def address(self) -> bytes:
        boot, user, ticket, path = self._address
        body = _ADDRESS.pack(_MAGIC, VERSION, boot, user, ticket) + path.encode()
        return body + _CHECK.pack(zlib.crc32(body))

    def expose(self, memory: Buffer, *, writable: bool = False, kind: Memory = Memory.HOST, file: int = -1) -> bytes:
        if kind != Memory.HOST or file < 0:
            raise ConfigError("only host memory that is the mapping of a memory file can be shared")
        if self._closed:
            raise ConfigError("the transport is closed")
        if not memory.length or _size_of(file) != memory.length:
            raise ConfigError(f"{memory.length} bytes are not the whole mapping of that memory file")
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
        try:
            handed = os.open(f"/proc/self/fd/{file}", flags)
        except OSError as error:
            raise ConfigError(f"the memory file cannot be opened again: {error}") from error
        self._last += 1
        descriptor = pack_region(self._ticket, Region(self._last, memory.length, writable))
        self._regions[self._last] = Exposed(handed, memory)
        return descriptor

    def withdraw(self, descriptor: bytes) -> None:
        number = parse_region(self._ticket, descriptor).region
        region = self._regions.pop(number, None)
        if region is not None:
            os.close(region.file)
            for links in self._links.values():
                for link in links:
                    for post in link.served:
                        post.tell(Op.GONE, number)

    async def connect(self, address: bytes, deadline_s: float) -> ShmLink:
        there = parse_address(address)
        if there.boot != self._address.boot or there.user != self._address.user:
            raise UnavailableError("the peer is on another machine, or another user's: no memory is shared with it")
        if self._closed:
            raise UnavailableError("the transport is closed")
        if sum([len(links) for links in self._links.values()]) >= LINKS_MAX:
            raise UnavailableError(f"{LINKS_MAX} links are open, which is the most")
        link = ShmLink(there.ticket, self._drop, self._copiers)
        self._links.setdefault(there.ticket, []).append(link)
        for stranger, ticket in list(self._strangers.items()):
            if ticket == there.ticket:
                self._admit(stranger, ticket)
        try:
            async with asyncio.timeout(deadline_s):
                await link.dial(there.path, HELLO.pack(_MAGIC, VERSION, there.ticket, self._ticket))
        except BaseException as error:
            await link.close()
            if isinstance(error, TimeoutError):
                raise UnavailableError(f"no peer let us in within {deadline_s:g} s") from None
            if isinstance(error, OSError):
                raise UnavailableError(f"no peer can be reached at {there.path}: {error}") from error
            raise
        return link

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._listener)
            self._listener.close()
            shutil.rmtree(self._directory, ignore_errors=True)
        for post in list(self._strangers):
            post.close("the transport closes")
        for link in [link for links in self._links.values() for link in links]:
            await link.close()
        while self._regions:
            os.close(self._regions.popitem()[1].file)
        self._copiers.shutdown(wait=False)

    # -- the door ------------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if not isinstance(error, BlockingIOError):  # out of descriptors: the listener would be readable for ever
                self._loop.remove_reader(self._listener)
                self._loop.call_later(0.5, self._listen_again)
            return
        if not same_user(sock):
            log.debug("a process of another user dials a shm transport")
            sock.close()
            return
        if len(self._strangers) >= STRANGERS_MAX:
            next(iter(self._strangers)).close("too many connections that prove nothing")
        post = Post(sock, self._hear_stranger, self._gone)
        self._strangers[post] = b""
        self._loop.call_later(STRANGER_S, self._expire, post)

    def _listen_again(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._listener, self._accept)

    def _expire(self, post: Post) -> None:
        if post in self._strangers:
            post.close("nobody here connected to this peer")

    def _gone(self, post: Post) -> None:
        self._strangers.pop(post, None)
        for links in self._links.values():
            for link in links:
                link.served.discard(post)

    def _hear_stranger(self, post: Post, frame: bytes, files: list[int]) -> None:
        """The first frame of a connection: who dials."""
        if files or len(frame) != HELLO.size or self._strangers[post]:
            raise ProtocolError("a connection that does not begin as one of a shm transport does")
        magic, version, door, ticket = HELLO.unpack(frame)
        if magic != _MAGIC or version != VERSION or not hmac.compare_digest(door, self._ticket):
            raise ProtocolError("a dialler of another version, or one that does not know our ticket")
        self._strangers[post] = ticket
        if ticket in self._links:
            self._admit(post, ticket)
        else:
            post.pause()

    def _admit(self, post: Post, ticket: bytes) -> None:
        for link in reversed(self._links[ticket]):
            if link.fault is None and not link.served:
                del self._strangers[post]
                link.served.add(post)
                post.hear = self._hear
                post.resume()
                return
        post.pause()

    def _hear(self, post: Post, frame: bytes, files: list[int]) -> None:
        """What a peer that was let in says: it wants a region, or has a note."""
        op, number, rest = Post.parse(frame)
        if files:
            raise ProtocolError("a peer sent descriptors unasked")
        if op == Op.NOTE:
            self._notified(rest)
        elif op == Op.WANT and not rest:
            region = self._regions.get(number)
            if region is None:
                post.tell(Op.GONE, number)
            else:
                post.tell(Op.HERE, number, region.file)
        else:
            raise ProtocolError(f"a request {op:#x}")

    def _drop(self, link: ShmLink, ticket: bytes) -> None:
        """Forgets a link that closes, and ends the connection of its peer, which is the answer."""
        links = self._links.get(ticket, [])
        if link in links:
            links.remove(link)
        if not links:
            self._links.pop(ticket, None)
        for post in list(link.served):
            post.close("the link was closed")


def parse_address(data: bytes) -> Address:
    """What these bytes say. Raises ProtocolError where they are no whole address of this version."""
    end = len(data) - _CHECK.size
    if not _ADDRESS.size < end <= min(ADDRESS_BYTES_MAX, _ADDRESS.size + _PATH_BYTES_MAX):
        raise ProtocolError(f"{len(data)} bytes are no address of a shm transport")
    magic, version, boot, user, ticket = _ADDRESS.unpack_from(data)
    if magic != _MAGIC or _CHECK.unpack_from(data, end)[0] != zlib.crc32(data[:end]):
        raise ProtocolError("no address of a shm transport, or a damaged one")
    if version != VERSION:
        raise ProtocolError(f"the peer's shm transport speaks version {version}, this one {VERSION}")
    path = os.fsdecode(data[_ADDRESS.size : end])
    if not path.startswith("/") or "\0" in path:
        raise ProtocolError(f"{path!r} is no place of a socket")
    return Address(boot, user, ticket, path)


def _boot() -> bytes:
    """What tells this boot of this machine from all others, in every namespace of it."""
    return hashlib.sha256(Path(_BOOT).read_bytes().strip()).digest()[:16]


def _size_of(file: int) -> int:
    """The size of a sealed memory file. Raises ConfigError for any other."""
    try:
        seals = fcntl.fcntl(file, fcntl.F_GET_SEALS)
        size = os.fstat(file).st_size
    except OSError as error:
        raise ConfigError(f"what is shared has to be a memory file: {error.strerror}") from error
    if not seals & fcntl.F_SEAL_SHRINK:
        raise ConfigError("the memory file has to be sealed against shrinking (F_SEAL_SHRINK)")
    return size


def _listen() -> tuple[str, socket.socket, str]:
    """A private directory, and a socket that listens in it."""
    directory = tempfile.mkdtemp(prefix=_PREFIX.format(_boot().hex()[:8]))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        path, early = os.path.join(directory, "s"), os.path.join(directory, "n")
        if len(os.fsencode(path)) > _PATH_BYTES_MAX:
            raise ConfigError(f"{directory} is too long a path for a socket: choose a shorter temporary directory")
        listener.bind(early)
        listener.listen(LINKS_MAX)
        listener.setblocking(False)
        os.rename(early, path)  # nobody ever meets one that does not listen yet
    except BaseException as error:
        listener.close()
        shutil.rmtree(directory, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, ConfigError):
            raise ConfigError(f"no socket can be made in {directory}: {error}") from error
        raise
    return directory, listener, path


def _sweep() -> None:
    """Removes the directories of processes of ours, of this boot of this machine, that were killed."""
    for directory in Path(tempfile.gettempdir()).glob(_PREFIX.format(_boot().hex()[:8]) + "*"):
        try:
            facts = directory.lstat()
            if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid():
                continue
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
                probe.setblocking(False)
                probe.connect(str(directory / "s"))
        except ConnectionRefusedError:
            shutil.rmtree(directory, ignore_errors=True)
        except OSError:
            continue  # it is being made, or its owner is busy
