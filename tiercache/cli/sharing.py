"""The doctor on sharing: whether processes of this host can use one directory together, and who does now."""

from __future__ import annotations

import grp
import os
import pwd
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from tiercache import assemble
from tiercache.cli.files import finish
from tiercache.cli.finding import GOOD, LIMITED, MISSING, Finding
from tiercache.errors import TierCacheError
from tiercache.wire import sockets

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tiercache.settings import Settings


def examine(settings: Settings, root: Path) -> Iterator[Finding]:
    """What sharing needs, whether it is there, and the directory's owner where one lives."""
    if not settings.share:
        yield Finding(
            "sharing", LIMITED, "off (share): every process caches alone", "share = true shares the directory"
        )
        return
    lacking = list(_lacking(settings))
    if lacking:
        yield Finding("sharing", MISSING, f"{'; '.join(lacking)}: every process caches alone", "see the words before")
        return
    who = f"user {_user(os.geteuid())}"
    if settings.share_group:
        who += f" and of the group of {settings.directory}{_group(settings.directory)}"
    yield Finding("sharing", GOOD, f"memory files and Unix sockets work: processes of {who} share the directory")
    yield _deaths(root)
    yield from _owner(settings)


def _lacking(settings: Settings) -> Iterator[str]:
    """What is in the way, in words."""
    try:
        os.close(os.memfd_create("tiercache-probe", os.MFD_ALLOW_SEALING))
    except AttributeError:
        yield "this system has no memory files (memfd_create)"
    except OSError as error:
        yield f"no memory file can be made ({error.strerror}), by a sandbox perhaps"
    if not hasattr(socket, "AF_UNIX"):
        yield "this system has no Unix sockets"
        return
    if Path(settings.directory).is_dir():
        try:
            sockets.check_directory(settings.directory, group=settings.share_group)
        except TierCacheError as error:
            yield str(error)


def _deaths(root: Path) -> Finding:
    """How the owner learns that a process has died."""
    contained = any((root / name).exists() for name in (".dockerenv", "run/.containerenv"))
    pidfd = sockets.pidfd_of(os.getpid())
    if pidfd is None:
        fact = "no process descriptors (pidfd): a process's death is seen by the end of its connection"
        return Finding("deaths", LIMITED, fact, "Linux 5.3 and later have them; a sandbox may hide them")
    os.close(pidfd)
    if contained:
        fact = "in a container: a process of another one is seen to die by the end of its connection only"
        return Finding("deaths", LIMITED, fact, "share the PID namespace between containers that share a directory")
    return Finding("deaths", GOOD, "seen at once (pidfd), and by the end of the connection")


def _owner(settings: Settings) -> Iterator[Finding]:
    """The directory's owner, if it has one now; none is started."""
    try:
        core = assemble.visit(settings)
        if core is None:
            yield Finding("owner", GOOD, "none now: the first process that opens the directory starts it")
            return
        try:
            said = finish(core.call("owner", {}))
        finally:
            finish(core.close())
    except TierCacheError as error:
        hint = "this process would cache alone; see owner.log in the directory"
        yield Finding("owner", LIMITED, f"there is one that cannot be used: {error}", hint)
        return
    others = [one for one in said["clients"] if one["pid"] != os.getpid()]
    unseen = sum(1 for one in others if not one["pid"])
    fact = f"process {said['pid']}, used by {len(others)} other process(es)"
    if unseen:
        hint = "should the owner die, its memory is given up rather than taken over"
        yield Finding("owner", LIMITED, f"{fact}, {unseen} of them in other PID namespaces", hint)
        return
    if not Path(f"/proc/{said['pid']}").exists():
        hint = "start the first process of a directory where all others can be seen"
        yield Finding("owner", LIMITED, f"{fact}; it lives in another PID namespace than this process", hint)
        return
    yield Finding("owner", GOOD, fact)


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _group(directory: str) -> str:
    try:
        number = os.stat(directory).st_gid
    except OSError:
        return ""
    try:
        return f" ({grp.getgrgid(number).gr_name})"
    except KeyError:
        return f" ({number})"
