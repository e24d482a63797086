"""What this machine gives the cache and what is missing, in plain words, each with what to do about it."""

from __future__ import annotations

import ctypes
import ctypes.util
import mmap
import os
import re
import resource
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from tiercache import native
from tiercache.cli import sharing
from tiercache.cli.finding import GOOD, LIMITED, MISSING, Finding
from tiercache.errors import TierCacheError
from tiercache.model import ALIGN_BYTES
from tiercache.net import usable
from tiercache.net.ucx import finding as ucx_finding
from tiercache.notation import format_size
from tiercache.settings import Settings, load, read_disk, read_machine, ucx_library

if TYPE_CHECKING:
    from collections.abc import Iterator

FILES_WANTED = 8192
"""Open files that a cache with full segments and many origin connections may want."""


def examine(directory: str | None = None, root: Path = Path("/")) -> list[Finding]:
    """All findings, most basic first. `root` stands before /proc and /sys (for tests)."""
    settings, trouble = None, []
    try:
        settings = load(directory=directory)
    except TierCacheError as error:
        trouble.append(Finding("settings", MISSING, str(error), "correct it; until then nothing opens"))
    found = [*trouble, _cpu(), _kernel(), *_memory(root, settings), *_limits(root), *_huge_pages(root)]
    if settings is not None:
        found += [*_disk(settings), *sharing.examine(settings, root)]
    return [*found, _gpu(root), _ucx(ucx_library(), root), _nixl(), _rdma(root), *_packages()]


def _cpu() -> Finding:
    return Finding("processors", GOOD, f"{len(os.sched_getaffinity(0))} usable by this process")


def _kernel() -> Finding:
    if native.KERNEL is not None:
        return Finding("copy kernel", GOOD, native.WHY)
    return Finding("copy kernel", LIMITED, native.WHY, "without it verified copies take twice as long")


def _memory(root: Path, settings: Settings | None) -> Iterator[Finding]:
    machine = read_machine(root)
    physical = _kib(root, "MemTotal")
    fact = f"{format_size(machine.memory_total)}, {format_size(machine.memory_free)} of it free"
    if machine.memory_total < physical:
        fact += f" (a cgroup limits this process; the machine has {format_size(physical)})"
    if settings is None:
        yield Finding("memory", GOOD, fact)
        return
    share = settings.memory_bytes / max(1, machine.memory_free)
    state = GOOD if share <= 0.5 else LIMITED
    hint = "" if state == GOOD else "memory_bytes is more than half of what is free: lower it, or give the process more"
    yield Finding("memory", state, f"{fact}; the cache will use up to {format_size(settings.memory_bytes)}", hint)


def _limits(root: Path) -> Iterator[Finding]:
    del root
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locked == resource.RLIM_INFINITY:
        yield Finding("locked memory", GOOD, "unlimited")
    else:
        hint = "caching and sharing need none; GPU and RDMA transfers will want more: `ulimit -l unlimited`, or "
        hint += "LimitMEMLOCK=infinity in systemd"
        yield Finding("locked memory", LIMITED, f"at most {format_size(locked)} (memlock)", hint)
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files >= FILES_WANTED or files == resource.RLIM_INFINITY:
        yield Finding("open files", GOOD, f"up to {files:,}")
    else:
        hint = f"`ulimit -n {min(hard, FILES_WANTED) if hard > 0 else FILES_WANTED}` when many files are open at once"
        yield Finding("open files", LIMITED, f"up to {files:,}", hint)


def _huge_pages(root: Path) -> Iterator[Finding]:
    mode = _chosen(_text(root / "sys/kernel/mm/transparent_hugepage/enabled"))
    shared = _chosen(_text(root / "sys/kernel/mm/transparent_hugepage/shmem_enabled"))
    reserved = _number(root, "HugePages_Total")
    fact = f"transparent: {mode or 'not in this kernel'}; in shared memory: {shared or 'not in this kernel'}"
    fact += f"; {reserved:,} reserved" if reserved else "; none reserved"
    usable = mode in ("always", "madvise") or reserved > 0
    hint = "" if usable else "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled (as root); without, all works"
    yield Finding("huge pages", GOOD if usable else LIMITED, fact, hint)


def _disk(settings: Settings) -> Iterator[Finding]:
    place = Path(settings.directory)
    disk = read_disk(place)
    kind = filesystem_of(place)
    fact = f"{settings.directory} on {kind}: {format_size(disk.free)} of {format_size(disk.total)} free"
    fact += f", the cache already holds {format_size(disk.ours)}" if disk.ours else ""
    if not settings.ssd_bytes:
        hint = "free space there, or name another place with --directory or TIERCACHE_DIRECTORY"
        yield Finding("disk", LIMITED, f"{fact}; too little for an SSD tier: the cache stays in memory", hint)
        return
    floor = format_size(settings.disk_free_floor_bytes)
    fact += f"; the cache will use up to {format_size(settings.ssd_bytes)} and leave {floor} free"
    hint = "this is memory, not a disk: nothing survives a restart of the machine" if kind in ("tmpfs", "ramfs") else ""
    yield Finding("disk", LIMITED if hint else GOOD, fact, hint)
    yield _direct(place, kind)


def _direct(place: Path, kind: str) -> Finding:
    refusal = probe_direct(place)
    if refusal is None:
        return Finding("O_DIRECT", GOOD, f"works on {kind}: the SSD tier goes past the page cache")
    if isinstance(refusal, PermissionError):
        return Finding("O_DIRECT", MISSING, f"not tried: {refusal}", "choose a directory that this user may write to")
    hint = "ext4, xfs and btrfs give it; without, the page cache holds a second copy of what is read"
    return Finding("O_DIRECT", LIMITED, f"refused on {kind} ({refusal.strerror}): buffered I/O instead", hint)


def probe_direct(place: Path) -> OSError | None:
    """Writes and reads one aligned block with O_DIRECT where `place` is, or would be; None, or the refusal."""
    there = next(one for one in (place, *place.parents) if one.is_dir())
    try:
        fd, name = tempfile.mkstemp(dir=there, prefix=".tiercache-probe-")
    except OSError as error:
        return error
    os.close(fd)
    block = mmap.mmap(-1, ALIGN_BYTES)
    try:
        fd = os.open(name, os.O_RDWR | os.O_DIRECT)
        try:
            os.pwritev(fd, [block], 0)
            os.preadv(fd, [block], 0)
        finally:
            os.close(fd)
    except OSError as error:
        return error
    finally:
        block.close()
        os.unlink(name)
    return None


def filesystem_of(place: Path) -> str:
    """Type of the filesystem that holds a path that may not exist yet, as the kernel names it."""
    there = next(one for one in (place, *place.parents) if one.exists()).resolve()
    best, kind = "", "an unknown filesystem"
    for line in _text(Path("/proc/self/mounts")).splitlines():
        _, where, name, *_ = line.split()
        where = where.encode().decode("unicode_escape")
        if there.is_relative_to(where) and len(where) >= len(best):
            best, kind = where, name
    return kind


def _gpu(root: Path) -> Finding:
    version = _text(root / "proc/driver/nvidia/version")
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        if version:
            return Finding("GPU", LIMITED, "NVIDIA driver without libcuda.so.1", "install the driver's user libraries")
        return Finding("GPU", MISSING, "no NVIDIA driver: no GPU tier", "nothing to do where there is no GPU")
    count = ctypes.c_int(0)
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return Finding("GPU", LIMITED, "libcuda.so.1 finds no device", "in a container: start it with --gpus all")
    driver = re.search(r"Module\s+(?:for \S+\s+)?(\d[\d.]*)", version)
    return Finding("GPU", GOOD, f"{count.value} NVIDIA device(s), driver {driver.group(1) if driver else 'unknown'}")


def _ucx(named: str, root: Path = Path("/")) -> Finding:
    taken, others = ucx_finding.find(named)
    left = "; ".join(f"{found}: {why}" if not found.trouble else str(found) for found, why in others)
    if taken is None:
        return Finding("UCX", MISSING, f"none that can be used ({left}): TCP instead", "pip install tiercache[ucx]")
    fact = f"{taken} at {taken.path}" + (f"; not taken: {left}" if left else "")
    if ucx_finding.rdma_devices(root) and not taken.rdma:
        return Finding(
            "UCX", LIMITED, f"{fact}; it cannot use the RDMA devices", "pip install nixl, whose UCX has verbs"
        )
    return Finding("UCX", GOOD, fact)


def _nixl() -> Finding:
    able, why, _ = usable("nixl")
    return (
        Finding("NIXL", GOOD, why) if able else Finding("NIXL", MISSING, why, "nothing to do: UCX and TCP do without")
    )


def _rdma(root: Path) -> Finding:
    devices = ucx_finding.rdma_devices(root)
    if devices:
        fact = f"devices: {', '.join(devices)}; moves over RDMA, and of GPU memory, are not exercised by our tests"
        return Finding("RDMA", GOOD, fact)
    return Finding("RDMA", MISSING, "no device in /sys/class/infiniband", "nothing to do without such a network")


def _packages() -> Iterator[Finding]:
    """One finding an extra of the installed distribution: which of its packages are there, and which are not."""
    for extra, names in sorted(extras().items()):
        have = {name: _version(name) for name in names}
        missing = [name for name, version in have.items() if version is None]
        there = ", ".join(f"{name} {version}" for name, version in have.items() if version is not None)
        if missing:
            fact = f"missing {', '.join(missing)}" + (f"; there: {there}" if there else "")
            yield Finding(f"extra {extra}", MISSING, fact, f"pip install tiercache[{extra}]")
        else:
            yield Finding(f"extra {extra}", GOOD, there)


def extras() -> dict[str, list[str]]:
    """Packages of each extra as the installed metadata says it, without extras of extras; empty when not installed."""
    try:
        wanted = metadata.requires("tiercache") or []
    except metadata.PackageNotFoundError:
        return {}
    found: dict[str, list[str]] = {}
    for line in wanted:
        name = re.match(r"[A-Za-z0-9._-]+", line)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", line)
        if name and extra and name.group() != "tiercache" and extra.group(1) not in ("dev", "all"):
            found.setdefault(extra.group(1), []).append(name.group())
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _chosen(line: str) -> str:
    """The word in brackets of a kernel file such as "always [madvise] never"."""
    found = re.search(r"\[(\w+)\]", line)
    return found.group(1) if found else ""


def _number(root: Path, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+)", _text(root / "proc/meminfo"), re.MULTILINE)
    return int(found.group(1)) if found else 0


def _kib(root: Path, name: str) -> int:
    return _number(root, name) << 10
