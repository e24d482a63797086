"""State: what an owner writes down for whoever comes after it, and what can be told of other processes of this host.

The file is there while an owner lives, and after its death: one that ends cleanly takes it away. It names the memory
(arena id) and everybody who may hold a piece of it: each client, of which a process may have several, with its process
and the moment that was started, so that a number that was given to another process since is told apart.
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FORMAT = 2
FILE = "owner.state"
_ENDED = (b"Z", b"X")
"""States of what has ended: a zombie's memory and descriptors are gone."""
_MEMORY = re.compile(r"/memfd:tiercache-([0-9a-f]{32})-(\d{1,5})(?: \(deleted\))?")


class Process(NamedTuple):
    """One process of this host: its number, and when it was started (clock ticks since boot)."""

    pid: int
    started: int

    @property
    def alive(self) -> bool:
        """Whether it still runs. A zombie does not: its memory and its descriptors are gone."""
        return process(self.pid) == self


class Client(NamedTuple):
    """One who may hold a piece of the memory: a process that opened the directory twice is two of them."""

    process: Process
    token: str


@dataclass(frozen=True, slots=True)
class State:
    """See the module."""

    arena: bytes
    owner: Process
    clients: tuple[Client, ...] = ()
    strangers: int = 0
    """Clients that cannot be seen from the owner's PID namespace: nobody can tell when they have gone."""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def processes(self) -> set[Process]:
        """Those of the clients."""
        return {client.process for client in self.clients}

    def write(self, directory: str) -> None:
        """Puts the file in place of the one before. Where that fails the old one goes: one that names too few clients
        would have the next owner give away memory that somebody looks at. Raises OSError then."""
        path = os.path.join(directory, FILE)
        fresh = f"{path}.new"
        facts = asdict(self) | {"format": FORMAT, "arena": self.arena.hex()}
        try:
            if os.path.lexists(fresh):
                os.unlink(fresh)
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with open(fd, "w", encoding="utf-8") as file:
                json.dump(facts, file)
            os.rename(fresh, path)
        except OSError:
            remove(directory)
            raise


def read(directory: str) -> State | None:
    """What the last owner left; None where it left nothing, or nothing that can be understood or trusted: it says which
    memory is believed and which is given away, so it must be this user's or the directory's owner's."""
    try:
        facts = json.loads(_read_trusted(directory))
        if facts["format"] != FORMAT:
            return None
        clients = tuple(Client(_process(each), str(token)) for each, token in facts["clients"])
        arena = bytes.fromhex(facts["arena"])
        owner = _process(facts["owner"])
        return State(arena, owner, clients, int(facts["strangers"]), dict(facts["settings"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_trusted(directory: str) -> bytes:
    # Not blocking: somebody may have put a pipe there.
    fd = os.open(os.path.join(directory, FILE), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid not in (os.geteuid(), os.stat(directory).st_uid):
            raise PermissionError(f"{FILE} is somebody else's")
        return file.read()


def _process(said: Any) -> Process:
    pid, started = said
    return Process(int(pid), int(started))


def remove(directory: str) -> None:
    """Takes the file away, as far as there is one."""
    for name in (FILE, f"{FILE}.new"):
        try:
            os.unlink(os.path.join(directory, name))
        except OSError:
            continue


def process(pid: int) -> Process | None:
    """The process of this number, or None when there is none that runs, or none that can be seen from here."""
    fields = _facts(pid)
    return Process(pid, int(fields[19])) if fields and fields[0] not in _ENDED else None


def ended(pid: int) -> bool:
    """Whether a process that was there runs no more; of one that cannot be seen from here nobody knows."""
    if fields := _facts(pid):
        return fields[0] in _ENDED
    try:
        os.kill(pid, 0) if pid > 0 else None
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _facts(pid: int) -> list[bytes]:
    """What the kernel says of a process after its name; nothing of one that cannot be seen."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes() if pid > 0 else b""
    except OSError:
        text = b""
    return text[text.rindex(b")") + 2 :].split() if text else []  # the name before it may hold anything


def me() -> Process:
    """This process."""
    return process(os.getpid()) or Process(os.getpid(), 0)


def maps_memory(arena: bytes, each: Process) -> bool:
    """Whether a process has memory of an arena mapped. What may not be looked into is taken to have some."""
    try:
        text = Path(f"/proc/{each.pid}/maps").read_bytes()
    except PermissionError:
        return each.alive
    except OSError:
        return False
    return b"/memfd:tiercache-" + arena.hex().encode() in text and each.alive


def memory_files(arena: bytes, processes: Iterable[Process]) -> dict[int, int]:
    """Descriptors of the memory files of an arena that these processes hold open, by ordinal; the caller closes them.

    What may not be looked into (another user's process, another namespace) is left out.
    """
    found: dict[int, int] = {}
    for each in processes:
        folder = f"/proc/{each.pid}/fd"
        try:
            names = os.listdir(folder)
        except OSError:
            continue
        for name in names:
            try:
                match = _MEMORY.fullmatch(os.readlink(f"{folder}/{name}"))
                if match is None or match[1] != arena.hex() or int(match[2]) in found:
                    continue
                found[int(match[2])] = os.open(f"{folder}/{name}", os.O_RDWR | os.O_CLOEXEC)
            except OSError:
                continue  # closed meanwhile
    return found
