"""Rights: who reads, as a hash without secrets, the same in every process that reads with the same credentials.

What is cached of an origin, and what processes tell each other of it, belongs to those whose hash is the same. So it
takes in everything that proves who reads, the secret too: knowing the name of somebody's key is no right to what that
key opens. What cannot be told from outside (a session object, a filesystem that lives in memory) belongs to this
process alone.
"""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from collections.abc import Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from tiercache.clock import system_random
from tiercache.remote import places
from tiercache.settings import read_machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

RIGHTS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HOME",  # where files of credentials are looked for
    "AWS_PROFILE",
    "AWS_DEFAULT_PROFILE",
    "AWS_ROLE_ARN",
    "AWS_ROLE_SESSION_NAME",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "AWS_EC2_METADATA_SERVICE_ENDPOINT",
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "GCE_METADATA_HOST",
    "CLOUDSDK_CONFIG",
    "AZURE_CLIENT_ID",
    "AZURE_CLIENT_SECRET",
    "AZURE_CLIENT_CERTIFICATE_PATH",
    "AZURE_TENANT_ID",
    "AZURE_USERNAME",
    "AZURE_PASSWORD",
    "AZURE_FEDERATED_TOKEN_FILE",
    "AZURE_CONFIG_DIR",
    "AZURE_STORAGE_CLIENT_ID",
    "AZURE_STORAGE_CLIENT_SECRET",
    "AZURE_STORAGE_TENANT_ID",
    "AZURE_STORAGE_ACCOUNT_NAME",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_TOKEN",
    "AZURE_MSI_ENDPOINT",
    "IDENTITY_ENDPOINT",
    "MSI_ENDPOINT",
    "HADOOP_USER_NAME",
    "HADOOP_CONF_DIR",
    "KRB5CCNAME",
    "HF_TOKEN",
    "GITHUB_TOKEN",
    "NETRC",
)
"""Variables that decide as whom a process reads when its options do not."""
FILES = (
    "HOME",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
    "CLOUDSDK_CONFIG",
    "AZURE_CLIENT_CERTIFICATE_PATH",
    "AZURE_FEDERATED_TOKEN_FILE",
    "AZURE_CONFIG_DIR",
    "HADOOP_CONF_DIR",
    "KRB5CCNAME",
    "NETRC",
)
"""Those that name files: what a relative one means depends on the working directory."""
WITHOUT_CREDENTIALS = ("file", "local", "memory")
"""Filesystems that read as the user who runs them."""
ITS_OWN = frozenset(
    {
        "asynchronous",
        "loop",
        "batch_size",
        "use_listings_cache",
        "listings_expiry_time",
        "max_paths",
        "skip_instance_cache",
    }
)
"""Options of every filesystem that only say how it works."""


def digest(*parts: object) -> str:
    """A short hash of what tells readers apart."""
    return hashlib.sha256(told(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def surroundings(names: Iterable[str] = RIGHTS) -> str:
    """A hash of what a process gets its rights from besides options: its user and these variables. Readers for whom it
    differs share nothing that is cached; one reader whose variables change begins anew."""
    environ = read_machine().environ
    given = [(name, environ[name]) for name in names if environ.get(name)]
    named = [value.removeprefix("FILE:") for name, value in given if name in FILES]  # as Kerberos has it
    return digest(os.getuid(), given, [os.path.realpath(path) for path in named if os.path.exists(path)])


def local_reader() -> str:
    """A hash of what decides which files a process may read, and which files its paths mean: user, groups, and the
    mounts and the root it sees, which differ between containers (whose images have different files of one size and one
    time). Where the system does not tell those, the process stands for itself alone."""
    users = os.getuid(), os.geteuid(), os.getegid(), sorted(os.getgroups())
    return digest(users, places.view() or _own.process())


def credential_files() -> list[str]:
    """Hashes of the files in which clients look for credentials and which roles to take, as far as they are there."""
    machine = read_machine()
    cloud = machine.environ.get("CLOUDSDK_CONFIG") or os.path.join(machine.home, ".config", "gcloud")
    usual = {
        "AWS_CONFIG_FILE": os.path.join(machine.home, ".aws", "config"),
        "AWS_SHARED_CREDENTIALS_FILE": os.path.join(machine.home, ".aws", "credentials"),
        "GOOGLE_APPLICATION_CREDENTIALS": os.path.join(cloud, "application_default_credentials.json"),
        "GOOGLE_SERVICE_ACCOUNT": "",
        "GOOGLE_SERVICE_ACCOUNT_PATH": "",
        "AZURE_CLIENT_CERTIFICATE_PATH": "",
        "NETRC": os.path.join(machine.home, ".netrc"),
    }
    paths = [os.path.expanduser(machine.environ.get(name) or place) for name, place in usual.items()]
    return [places.contents(path) if path and os.path.isfile(path) else "" for path in paths]


def reader(protocol: str, options: Mapping[str, Any], given: Any = None) -> str:
    """A hash of everything that may decide who reads through a filesystem, and what its paths mean: what it is made of
    (or `given`, one that was made already) and all of this process's surroundings. It asks nobody, and tells apart more
    readers than there are, where options say by themselves who reads."""
    made_of = filesystem(protocol, (), options) if given is None else told(given)
    # What options leave open is decided elsewhere. Tools may write these files by the hour: local ones do without.
    files = [] if protocol in WITHOUT_CREDENTIALS else credential_files()
    return digest(made_of, surroundings(), files, local_reader())


def told(value: object) -> str:
    """Any option as text that is the same in every process, whatever the order of sets and dictionaries."""
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, str):
        return str.__repr__(value)
    if isinstance(value, bytes | bytearray):
        return repr(bytes(value))
    if isinstance(value, PurePath):
        return f"path {str(value)!r}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{told(key)}: {told(each)}' for key, each in value.items()))}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(told, value))}]"
    if isinstance(value, set | frozenset):
        return f"<{', '.join(sorted(map(told, value)))}>"
    if hasattr(value, "storage_args") and hasattr(value, "storage_options"):  # a filesystem of fsspec's
        return _made(value)
    return _own.told(value)


def filesystem(protocol: str | Iterable[str], arguments: Iterable[Any], options: Mapping[str, Any]) -> str:
    """A filesystem of fsspec's that is to be made here and now, by what it is made of and what paths in that mean."""
    name, kept = _first(protocol), _kept(options)
    return f"{_parts(name, arguments, kept)} {told(places.meaning(name, arguments, kept))}"


def _made(given: Any) -> str:
    """A filesystem of fsspec's that was made at some time. Only those that wrap a directory of another one remember
    what a relative path meant then; elsewhere such a filesystem is itself alone."""
    name, arguments, kept = _first(given.protocol), given.storage_args, _kept(given.storage_options)
    parts = _parts(name, arguments, kept)
    path, inner = getattr(given, "path", None), getattr(given, "fs", None)
    if isinstance(path, str) and hasattr(inner, "storage_options"):
        return f"{parts} {told(path)} {told(inner)}"
    if places.starts_here(name, arguments, kept):
        return f"{parts} {_own.told(given)}"
    return f"{parts} {told(places.meaning(name, arguments, kept))}"


def _parts(name: str, arguments: Iterable[Any], options: Mapping[str, Any]) -> str:
    own = _own.process() if name == "memory" else ""
    return f"{name} {told(list(arguments))} {told(options)} {own}"


def _first(protocol: str | Iterable[str]) -> str:
    return protocol if isinstance(protocol, str) else next(iter(protocol))


def _kept(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in ITS_OWN}


class _Own:
    """What cannot be told in other processes: objects are told apart by when they were first met in this one."""

    def __init__(self) -> None:
        self.forked()
        self._count = 0
        self._met: list[tuple[Callable[[], object], int]] = []

    def forked(self) -> None:
        """In a child: from here on its objects go their own way."""
        self._lock = threading.Lock()
        self._token = ""

    def process(self) -> str:
        """A name of this process that no other has, a forked one neither."""
        with self._lock:
            if not self._token:
                self._token = f"{system_random().getrandbits(128):032x}"
            return self._token

    def told(self, value: object) -> str:
        """A name of this very object: no later one has it, wherever it lies."""
        token = self.process()
        with self._lock:
            self._met = [(get, number) for get, number in self._met if get() is not None]
            for get, number in self._met:
                if get() is value:
                    return f"{token} {number}"
            self._count += 1
            self._met.append((_remembering(value), self._count))
            return f"{token} {self._count}"


def _remembering(value: object) -> Callable[[], object]:
    """What answers an object as long as it is there; it stays where that cannot be known."""
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value


_own = _Own()
os.register_at_fork(after_in_child=_own.forked)
