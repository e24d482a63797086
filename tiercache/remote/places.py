"""Places: which files the paths of a process mean. Two processes may call different files by one path: in containers,
behind mounts of their own, in two working directories."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
from collections.abc import Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

FILE_BYTES_MAX = 1 << 20
"""Files of credentials are not longer."""

FIRST_NAMESPACES = (0xEFFFFFF8, 0xF0000000, 0xF0000001)
"""Inodes of the mount namespace a machine starts with: a fixed one since Linux 6.18, before that the first two."""
NS_GET_MNTNS_ID = 0x8008B705
"""Asks for the number of a mount namespace that no other one has before the next boot (Linux 6.10)."""

PLACELESS = frozenset(
    {
        *("host", "hostname", "endpoint", "endpoint_url", "location", "region", "region_name", "project", "org"),
        *("protocol", "target_protocol", "remote_protocol", "repo", "branch", "ref", "revision", "sha", "headers"),
        *("user", "username", "passwd", "password", "acct", "auth", "access", "key", "secret", "algorithm"),
        *("account_name", "account_key", "sas_token", "connection_string", "tenant_id", "client_id", "client_secret"),
        *("mode", "encoding", "compression", "consistency"),
    }
)
"""Options that are never paths of local files, in all filesystems; any other may be one."""
CERTIFICATES = frozenset({"verify", "client_cert", "proxy_ca_bundle", "ca_certs"})
FILES_OF = {"s3": CERTIFICATES, "s3a": CERTIFICATES, "http": CERTIFICATES, "https": CERTIFICATES}
"""Filesystems of which it is known which options are."""
INSIDE = ("path", "fo")
"""Options that lie in the filesystem that is wrapped, where one is."""
LOCAL = ("file", "local")


def view() -> str:
    """What tells apart processes that see different mounts or another root; empty where this system cannot tell."""
    if platform.system() == "Darwin":  # where all processes see the same mounts
        root = os.stat("/")
        return f"{root.st_dev} {root.st_ino}"
    try:
        namespace, root = _namespace(), os.stat("/")
        mounts = _mounts()
    except OSError:
        return ""
    lines = [fields for fields in mounts if fields[4] == "/"]
    if os.major(root.st_dev):
        device = str(root.st_dev)
    else:
        # Devices without a driver are counted up at every mount. The mount itself has a name: the layers of a
        # container, a subvolume. In a directory that became the root there is no such line.
        device = repr(_facts(lines[-1])) if lines else f"{root.st_dev} {_boot()}"
    return f"{namespace} {device} {root.st_ino}"


def _namespace() -> str:
    """Which mount namespace this is; inodes are given to later ones again, so they say little alone."""
    descriptor = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        inode = os.stat("/proc/self/ns/mnt").st_ino
        if inode in FIRST_NAMESPACES:
            return str(inode)
        number = bytearray(8)
        try:
            fcntl.ioctl(descriptor, NS_GET_MNTNS_ID, number)
        except OSError:
            return f"{_boot()} {inode} {[_facts(fields) for fields in _mounts()]}"
        return f"{_boot()} {inode} {number.hex()}"
    finally:
        os.close(descriptor)


def _mounts() -> list[list[str]]:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as stream:
        return [line.split(" ") for line in stream.read().splitlines()]


def _facts(fields: list[str]) -> list[str]:
    """What of a line of mountinfo (proc_pid_mountinfo(5)) stays the same at the next mount: not the numbers."""
    kind, source, options = fields[fields.index("-") + 1 :][:3]
    layers = [each for each in options.split(",") if "dir=" in each] if kind == "overlay" else []
    return [fields[3], fields[4], kind, source, *layers]


def _boot() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as stream:
        return stream.read().strip()


def contents(path: str) -> str:
    """A hash of a file of credentials, or of its name where this process cannot read it."""
    try:
        with open(path, "rb") as stream:
            return _hash(stream.read(FILE_BYTES_MAX))
    except OSError:
        return _hash(f"unreadable {os.path.realpath(path)}".encode("utf-8", "surrogateescape"))


def owned(path: str) -> list[str | int]:
    """A file whose contents change by the hour while its meaning stays: by place and owner."""
    try:
        return [os.path.realpath(path), os.stat(path).st_uid]
    except OSError:
        return [os.path.realpath(path), ""]


def meaning(protocol: str, arguments: Iterable[Any], options: Mapping[str, Any]) -> list[str]:
    """What the paths among a filesystem's options mean here and now: the working directory where one starts there, and
    the contents of files, which may be keys, or archives."""
    found = [os.getcwd()] if starts_here(protocol, arguments, options) else []
    return found + [_file(path) for path in _paths(protocol, arguments, options) if os.path.isfile(path)]


def starts_here(protocol: str, arguments: Iterable[Any], options: Mapping[str, Any]) -> bool:
    """Whether an option may be a path that starts at the working directory."""
    return any(not os.path.isabs(path) for path in _paths(protocol, arguments, options))


def _file(path: str) -> str:
    try:
        facts = os.stat(path)
    except OSError:  # deleted meanwhile
        return ""
    return contents(path) if facts.st_size <= FILE_BYTES_MAX else f"{facts.st_size} {facts.st_mtime_ns}"


def _paths(protocol: str, arguments: Iterable[Any], options: Mapping[str, Any]) -> Iterator[str]:
    """What may be paths of local files, in the same order for the same options."""
    yield from _strings(protocol, "", list(arguments), remote=False)
    yield from _strings(protocol, "", options, remote=False)


def _strings(protocol: str, name: str, value: Any, *, remote: bool) -> Iterator[str]:
    if isinstance(value, Mapping):
        wrapped = value.get("target_protocol") or getattr(value.get("fs"), "protocol", None) or LOCAL
        inside = wrapped if isinstance(wrapped, str) else wrapped[0]
        for each in sorted(value, key=str):
            owner = inside if each == "target_options" else protocol
            yield from _strings(owner, str(each), value[each], remote=each in INSIDE and inside not in LOCAL)
    elif isinstance(value, list | tuple | set | frozenset):
        for one in sorted(value, key=repr) if isinstance(value, set | frozenset) else value:
            yield from _strings(protocol, name, one, remote=remote)
    elif isinstance(value, str | PurePath) and not remote and _may_be_path(protocol, name, str(value)):
        yield _stripped(str(value))


def _may_be_path(protocol: str, name: str, text: str) -> bool:
    if name in PLACELESS or name not in FILES_OF.get(protocol, {name}):
        return False
    if name == "token" and not os.path.exists(text):  # the name of a file of credentials, or credentials
        return False
    scheme, separator, _ = text.rpartition("::")[2].partition("://")
    return not separator or scheme in LOCAL


def _stripped(text: str) -> str:
    """A path without the filesystems that are chained before it, and without file://."""
    path = text.rpartition("::")[2]
    for scheme in LOCAL:
        path = path.removeprefix(f"{scheme}://")
    return os.path.expanduser(path)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
