"""Finding: which libucp is taken, of those that there are, and why not the others.

Each is tried in a process of its own: a library that is loaded once stays, with whatever it does.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from tiercache.net.ucx.binding import OLDEST, numbers

PROBE_S = 20.0
"""How long a library may take to load."""

_PROBE = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.ucp_get_version_string.restype = ctypes.c_char_p
print(library.ucp_get_version_string().decode())
print(next(line.split()[-1] for line in open("/proc/self/maps") if "/libucp" in line))
"""
SYSTEM, NIXL, WHEEL, NAMED = "the system", "the nixl wheel", "the libucx wheel", "TIERCACHE_UCX_LIB"


class Found(NamedTuple):
    """One libucp of this machine."""

    origin: str
    path: str
    version: tuple[int, int, int]
    rdma: bool
    """Whether it has verbs."""
    cuda: bool
    trouble: str = ""
    """Why it cannot be used."""

    def __str__(self) -> str:
        if self.trouble:
            return f"{self.origin}: {self.trouble}"
        kinds = ("RDMA" if self.rdma else "no RDMA") + (", CUDA" if self.cuda else "")
        return f"UCX {'.'.join(map(str, self.version))} of {self.origin} ({kinds})"


class Choice(NamedTuple):
    """What is taken, and what was left."""

    taken: Found | None
    others: tuple[tuple[Found, str], ...]
    """Each with the reason."""


def rdma_devices(root: Path = Path("/")) -> list[str]:
    """RDMA devices of this machine."""
    folder = root / "sys/class/infiniband"
    return sorted(one.name for one in folder.iterdir()) if folder.is_dir() else []


@cache
def find(named: str = "") -> Choice:
    """The libucp to take: the one that is named, else the newest of those that have RDMA where this machine has it."""
    places = [(NAMED, named)] if named else candidates()
    return choose([probe(origin, path) for origin, path in places], bool(rdma_devices()))


def candidates() -> list[tuple[str, str]]:
    """Where a libucp may be: whose it is, and its path."""
    found = [(SYSTEM, "libucp.so.0")]
    for package in ("nixl_cu13", "nixl_cu12"):
        found += [(NIXL, path) for path in _beside(package, f"{package}.libs", "libucp*.so*")]
    return found + [(WHEEL, path) for path in _inside("libucx", "lib/libucp.so.0")]


def _beside(package: str, folder: str, pattern: str) -> list[str]:
    return [str(path) for place in _places(package) for path in sorted((place.parent / folder).glob(pattern))][:1]


def _inside(package: str, name: str) -> list[str]:
    return [str(place / name) for place in _places(package) if (place / name).is_file()][:1]


def _places(package: str) -> list[Path]:
    spec = find_spec(package)
    return [Path(place) for place in spec.submodule_search_locations or ()] if spec else []


def probe(origin: str, path: str) -> Found:
    """Loads a libucp in a process of its own, and says what it is."""
    try:
        answer = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROBE, path],
            capture_output=True, text=True, timeout=PROBE_S, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (
        OSError,
        TypeError,
        subprocess.TimeoutExpired,
    ) as error:  # sys.executable may be None
        return Found(origin, path, (0, 0, 0), False, False, f"{path} could not be tried: {error}")
    lines = answer.stdout.splitlines()
    if answer.returncode or len(lines) != 2:
        last = (answer.stderr.strip().splitlines() or [f"status {answer.returncode}"])[-1]
        there = "not installed" if origin == SYSTEM and "cannot open shared object" in last else last
        return Found(origin, path, (0, 0, 0), False, False, there)
    try:
        version = numbers(lines[0])
    except ValueError:
        return Found(origin, path, (0, 0, 0), False, False, f"{lines[0]} is no version")
    place = Path(lines[1]).resolve().parent / "ucx"
    modules = [each.name for each in place.glob("libuct_*.so*")] if place.is_dir() else []
    trouble = "" if version[:2] >= OLDEST else f"UCX {lines[0]} is too old: {OLDEST[0]}.{OLDEST[1]} or later is needed"
    kinds = [any(name.startswith(f"libuct_{kind}") for name in modules) for kind in ("ib", "cuda")]
    return Found(origin, path, version, kinds[0], kinds[1], trouble)


def choose(found: list[Found], rdma: bool) -> Choice:
    """The newest that can be used; where there is RDMA, of those that have it."""
    usable = [each for each in found if not each.trouble]
    if not usable:
        return Choice(None, tuple((each, each.trouble) for each in found))
    taken = max(usable, key=lambda each: (rdma and each.rdma, each.version, each.rdma))
    others = []
    for each in found:
        if each is not taken:
            lacks = rdma and taken.rdma and not each.rdma
            others.append((each, each.trouble or ("it has no RDMA" if lacks else "not newer")))
    return Choice(taken, tuple(others))
