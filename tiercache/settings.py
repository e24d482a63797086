"""Settings: one frozen dataclass, filled from a TOML file, the environment and keyword arguments, in rising precedence.

The only module of the product that reads the environment, the cgroup and free disk space. Reading (`read_machine`) and
deciding (`resolve`) are apart, so that every decision can be tested with made-up readings.
"""

from __future__ import annotations

import difflib
import os
import re
import tempfile
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tiercache.errors import ConfigError
from tiercache.model import ALIGN_BYTES, PAGE_BYTES, PART_BYTES, PARTS_MAX
from tiercache.notation import GIB, KIB, MIB, Kind, format_size, parsed, parsed_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MEMORY_SHARE = 1 / 8
"""Default memory: this much of what the cgroup, or the machine, has left."""
MEMORY_BYTES_MAX = 8 * GIB
SSD_SHARE = 1 / 2
"""Default SSD: this much of what is free above the floor, counting what the cache itself already uses as free."""
SSD_BYTES_MAX = 64 * GIB
SSD_BYTES_MIN = 256 * MIB
"""Less than this is not worth a tier by default; asked for by name, it may be smaller."""
FLOOR_SHARE = 1 / 10
FLOOR_BYTES_MIN = GIB
FACTS_BYTES = 5 * MIB
"""Least room for the facts of an SSD tier beside its segments."""
META_FILES = 64
"""Files that the facts of an SSD tier may need beside its segments."""
SLOT_BYTES_MEAN = 128 * KIB
SLOTS_MIN, SLOTS_MAX = 1 << 16, 1 << 21

UNBOUNDED = float(1 << 62)
PREFIX = "TIERCACHE_"
NOT_SETTINGS = frozenset({"TIERCACHE_CONFIG", "TIERCACHE_DATA", "TIERCACHE_UCX_LIB"})
"""Environment names with our prefix that are no settings: where the file is, where benchmarks find traces, and which
libucp this process loads."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that can be set, checked as a whole: an instance that exists has no contradictions.

    Sizes are bytes, times seconds, marks shares of a capacity. `load` fills what nobody set with defaults that suit the
    machine; made directly, the first three have no default. RULES says what each one means.
    """

    directory: str
    memory_bytes: int
    ssd_bytes: int
    ssd_files_max: int = 4096
    disk_free_floor_bytes: int = FLOOR_BYTES_MIN
    page_bytes: int = PAGE_BYTES
    ssd_threads: int = 8
    ssd_deadline_s: float = 2.0
    queue_bytes: int = 64 * MIB
    high_mark: float = 0.95
    low_mark: float = 0.90
    verify_copies: bool = True
    origin_deadline_s: float = 60.0
    origin_attempts: int = 5
    origin_concurrency: int = 16
    request_bytes_max: int = 16 * MIB
    merge_gap_bytes: int = 256 * KIB
    readahead_bytes: int = 8 * MIB
    tail_bytes: int = 256 * KIB
    stat_ttl_s: float = 10.0
    negative_ttl_s: float = 2.0
    mtime_settle_s: float = 10.0
    slots_max: int = 1 << 18
    policy: str = "lru"
    segment_bytes: int = 64 * MIB
    share: bool = True
    share_group: bool = False
    client_share: float = 0.5
    linger_s: float = 10.0
    owner_deadline_s: float = 10.0
    remote_url: str = ""
    remote_options: str = ""
    remote_bytes: int = 64 * GIB
    remote_lifetime_s: float = 0.0
    remote_rate_bytes_s: int = 64 * MIB
    remote_deadline_s: float = 2.0
    peers: str = ""
    peer_listen: str = ""
    peer_token_file: str = ""
    peer_transport: str = "auto"
    peer_landing_bytes: int = 64 * MIB
    peer_rate_bytes_s: int = 0
    peer_deadline_s: float = 5.0
    peer_spill: bool = True
    sources: tuple[tuple[str, str], ...] = field(default=(), compare=False, repr=False)
    """Where each value came from, for `explain`; no setting itself."""

    def __post_init__(self) -> None:
        for name, rule in RULES.items():
            object.__setattr__(self, name, _checked(name, rule, getattr(self, name), self._source(name)))
        for complaint in _contradictions(self):
            raise ConfigError(complaint)

    def _source(self, name: str) -> str:
        return dict(self.sources).get(name, "argument")

    def explain(self) -> list[Row]:
        """One row for each setting, in order of declaration."""
        return [Row(name, getattr(self, name), self._source(name), rule.meaning) for name, rule in RULES.items()]


class Row(NamedTuple):
    """One line of `tiercache config`."""

    name: str
    value: str | int | float | bool
    source: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Rule:
    """What one setting may be: its kind, its limits (inclusive) and its meaning in a sentence."""

    kind: Kind
    meaning: str
    low: float = 0
    high: float = UNBOUNDED
    whole: str = ""
    """What a share is a share of."""

    def bounds(self) -> tuple[str, str]:
        """The limits in words: "at least 2.0 MiB", " and at most 4.0 GiB"."""
        sized = self.kind in (Kind.SIZE, Kind.SHARE_OR_SIZE)
        low, high = (format_size(edge) if sized else f"{edge:g}" for edge in (self.low, self.high))
        return f"at least {low}", f" and at most {high}" if self.high < UNBOUNDED else ""


RULES: dict[str, Rule] = {
    "directory": Rule(Kind.PATH, "Where the SSD tier keeps its files; one owner at a time, shared by all."),
    "memory_bytes": Rule(Kind.SHARE_OR_SIZE, "Cap of the memory tier.", low=2 * MIB, whole="memory"),
    "ssd_bytes": Rule(Kind.SHARE_OR_SIZE, "Cap of the SSD tier, its facts included; 0 is no SSD tier.", whole="disk"),
    "ssd_files_max": Rule(Kind.COUNT, "Cap on files of the SSD tier.", low=1),
    "disk_free_floor_bytes": Rule(Kind.SHARE_OR_SIZE, "Space that always stays free on the disk.", whole="disk"),
    "page_bytes": Rule(Kind.SIZE, "Size of a page of a file.", low=PART_BYTES, high=PART_BYTES * PARTS_MAX),
    "ssd_threads": Rule(Kind.COUNT, "Threads that do SSD reads and writes.", low=1, high=64),
    "ssd_deadline_s": Rule(Kind.TIME, "After this long an SSD read counts as a miss.", low=0.001, high=3600),
    "queue_bytes": Rule(Kind.SHARE_OR_SIZE, "Cap on bytes waiting to be written to SSD.", whole="memory_bytes"),
    "high_mark": Rule(Kind.FRACTION, "Background eviction starts when a tier is this full.", low=0.01, high=1),
    "low_mark": Rule(Kind.FRACTION, "Background eviction stops when a tier is this full.", low=0, high=1),
    "verify_copies": Rule(Kind.FLAG, "Whether bytes copied out of memory are checked against their digests."),
    "origin_deadline_s": Rule(Kind.TIME, "Silence that ends an origin call, retries included.", low=0.01, high=86400),
    "origin_attempts": Rule(Kind.COUNT, "Tries of one origin request within the deadline.", low=1, high=100),
    "origin_concurrency": Rule(Kind.COUNT, "Origin requests under way at once.", low=1, high=1024),
    "request_bytes_max": Rule(Kind.SIZE, "Longest span asked of an origin in one request.", low=PART_BYTES),
    "merge_gap_bytes": Rule(Kind.SIZE, "Gaps up to this are fetched too, to save a request."),
    "readahead_bytes": Rule(Kind.SIZE, "How far ahead of a sequential reader pages are fetched; 0 is never."),
    "tail_bytes": Rule(Kind.SIZE, "A first read asks for this much of the end; files up to it come whole."),
    "stat_ttl_s": Rule(Kind.TIME, "How long an origin's facts and listings are believed.", high=86400),
    "negative_ttl_s": Rule(Kind.TIME, "How long an origin's 'not there' is believed.", high=86400),
    "mtime_settle_s": Rule(Kind.TIME, "A modification time younger than this is no version.", high=86400),
    "slots_max": Rule(Kind.COUNT, "Cap on entries in the index.", low=1024, high=(1 << 31) - 1),
    "policy": Rule(Kind.TEXT, "Order of eviction, a name in tiercache.policy."),
    "segment_bytes": Rule(Kind.SIZE, "Size of one SSD data file.", low=MIB, high=4 * GIB),
    "share": Rule(Kind.FLAG, "Whether processes share the directory, or each cache is alone."),
    "share_group": Rule(Kind.FLAG, "Whether processes of the directory's group may share it, or of its user alone."),
    "client_share": Rule(Kind.FRACTION, "Share of memory that the leases of one process may hold.", low=0.01, high=1),
    "linger_s": Rule(Kind.TIME, "How long a shared directory's owner stays after its last client.", high=86400),
    "owner_deadline_s": Rule(Kind.TIME, "An owner that is silent for so long is gone around.", low=0.1, high=3600),
    "remote_url": Rule(Kind.OPTION, "Object storage for blocks: s3://, gs://, az:// or file://; empty: none."),
    "remote_options": Rule(Kind.OPTION, "JSON object with its options, as fsspec takes them; no credentials."),
    "remote_bytes": Rule(Kind.SIZE, "Cap of all that all caches have there; set the same for each.", low=4 * MIB),
    "remote_lifetime_s": Rule(Kind.TIME, "What is uploaded lives so long at most; 0: until it is evicted."),
    "remote_rate_bytes_s": Rule(Kind.SIZE, "Bytes a second that uploads take on average; 0 is no limit."),
    "remote_deadline_s": Rule(Kind.TIME, "After this long a read from there counts as a miss.", low=0.01, high=600),
    "peers": Rule(Kind.OPTION, "Caches of other machines, as host:port with commas between; empty: none."),
    "peer_listen": Rule(Kind.OPTION, "Where other machines' caches find this one, as host:port; empty: nowhere."),
    "peer_token_file": Rule(Kind.OPTION, "File with the secret that all peers share; needed beyond loopback."),
    "peer_transport": Rule(Kind.TEXT, "What bytes take between peers: auto, or shm, nixl, ucx or tcp alone."),
    "peer_landing_bytes": Rule(Kind.SHARE_OR_SIZE, "Bytes on their way from peers, at most.", MIB, whole="memory"),
    "peer_rate_bytes_s": Rule(Kind.SIZE, "Bytes a second taken from peers on average; 0 is no limit."),
    "peer_deadline_s": Rule(Kind.TIME, "A peer that is silent for so long is gone around.", low=0.1, high=600),
    "peer_spill": Rule(Kind.FLAG, "Whether peers are offered what no tier here has room for, and take such offers."),
}


def _contradictions(s: Settings) -> list[str]:
    """Sentences about settings that cannot hold together; empty when all is well."""
    need = -(-s.ssd_bytes // s.segment_bytes) + META_FILES
    cases = [
        (s.low_mark >= s.high_mark, f"low_mark ({s.low_mark}) must be under high_mark ({s.high_mark})"),
        (s.page_bytes % PART_BYTES != 0, f"page_bytes ({s.page_bytes}) must be a multiple of {PART_BYTES}"),
        (s.segment_bytes % ALIGN_BYTES != 0, f"segment_bytes ({s.segment_bytes}) must be a multiple of {ALIGN_BYTES}"),
        (
            s.memory_bytes < 2 * s.page_bytes,
            f"memory_bytes ({s.memory_bytes}) must hold two pages of page_bytes ({s.page_bytes})",
        ),
        (
            s.queue_bytes > s.memory_bytes,
            f"queue_bytes ({s.queue_bytes}) must not exceed memory_bytes ({s.memory_bytes})",
        ),
        (
            0 < s.ssd_bytes < 4 * s.segment_bytes + FACTS_BYTES,
            f"ssd_bytes ({s.ssd_bytes}) must be 0, or {4 * s.segment_bytes + FACTS_BYTES} or more: four segments of "
            f"segment_bytes ({s.segment_bytes}), and room for their facts",
        ),
        (
            bool(s.ssd_bytes) and s.segment_bytes < 2 * s.page_bytes,
            f"segment_bytes ({s.segment_bytes}) must hold a page of page_bytes ({s.page_bytes}) and its header",
        ),
        (
            bool(s.ssd_bytes) and s.ssd_files_max < need,
            f"ssd_files_max ({s.ssd_files_max}) must be {need} or more: ssd_bytes ({s.ssd_bytes}) in files of "
            f"segment_bytes ({s.segment_bytes}), and {META_FILES} for their facts",
        ),
        (
            s.merge_gap_bytes >= s.request_bytes_max,
            f"merge_gap_bytes ({s.merge_gap_bytes}) must be under request_bytes_max ({s.request_bytes_max})",
        ),
        (
            s.tail_bytes > s.request_bytes_max,
            f"tail_bytes ({s.tail_bytes}) must not exceed request_bytes_max ({s.request_bytes_max})",
        ),
    ]
    return [sentence for wrong, sentence in cases if wrong]


def _checked(name: str, rule: Rule, value: object, source: str) -> str | int | float | bool:
    """`value` as its rule has it, or ConfigError."""
    found = parsed(rule.kind, value)
    if found is None:
        raise ConfigError(f"{name} from {source} must be {rule.kind.value}, not {value!r}")
    if isinstance(found, str):
        return found
    if not rule.low <= found <= rule.high:
        low, high = rule.bounds()
        raise ConfigError(f"{name} from {source} must be {low}{high}, not {found!r}")
    return found


class Disk(NamedTuple):
    """Space of the file system that holds a directory, and what the cache already uses of it. Bytes."""

    total: int
    free: int
    ours: int = 0


@dataclass(frozen=True, slots=True)
class Machine:
    """Readings that defaults are made from."""

    environ: Mapping[str, str]
    memory_total: int
    """The cgroup's limit, or the machine's memory when that is less or there is no limit. Bytes."""
    memory_free: int
    """What this process could still use of it before something is killed. Bytes."""
    disk: Callable[[Path], Disk]
    home: Path
    cwd: Path


def ucx_library() -> str:
    """The libucp that was named explicitly (TIERCACHE_UCX_LIB), or nothing."""
    return os.environ.get("TIERCACHE_UCX_LIB", "")


def read_machine(root: Path = Path("/")) -> Machine:
    """Reads environment, cgroup (v2 and v1), memory and disks of this machine. Never fails: unknown is little."""
    total, free = _memory(root)
    try:
        home = Path.home()
    except RuntimeError:  # a user without a home directory, as in many containers
        home = Path(tempfile.gettempdir()) / f"tiercache-{os.getuid()}"
    return Machine(dict(os.environ), total, free, read_disk, home, Path.cwd())


def read_disk(directory: Path) -> Disk:
    """Space where `directory` is, or would be made. Blocks that sparse files do not have are not counted as ours."""
    ours = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                ours += os.lstat(os.path.join(parent, name)).st_blocks * 512
            except OSError:  # deleted meanwhile
                continue
    for place in (directory, *directory.parents):
        try:
            facts = os.statvfs(place)
        except OSError:
            continue
        return Disk(facts.f_blocks * facts.f_frsize, facts.f_bavail * facts.f_frsize, ours)
    return Disk(0, 0, ours)


def _memory(root: Path) -> tuple[int, int]:
    """Total and free memory: the least that /proc/meminfo and any cgroup above this process allow."""
    lines = _text(root / "proc/meminfo").splitlines()
    facts = {line.split(":")[0]: int(line.split()[1]) * KIB for line in lines if len(line.split()) > 1}
    total = facts.get("MemTotal", 0)
    free = facts.get("MemAvailable", facts.get("MemFree", 0))
    for folder, limit_name, usage_name in _cgroups(root):
        limit = _text(folder / limit_name).strip()
        if not limit.isdigit() or int(limit) >= total:  # "max", or v1's number for no limit
            continue
        usage = _text(folder / usage_name).strip()
        cached = re.search(r"^(?:total_)?inactive_file (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
        used = int(usage or 0) - (int(cached.group(1)) if cached else 0)  # the kernel gives cold page cache back
        total, free = int(limit), min(free, int(limit) - max(0, used))
    return total, max(0, free)


def _cgroups(root: Path) -> list[tuple[Path, str, str]]:
    """Folders of the cgroups of this process, innermost first, with the names of their limit and usage files."""
    found: list[tuple[Path, str, str]] = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        # Inside a container the path may name folders that only the host sees; the top one is then our own.
        found += [(top.joinpath(*parts[:depth]), *names) for depth in range(len(parts), -1, -1)]
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def load(machine: Machine | None = None, /, **arguments: object) -> Settings:
    """Settings of this machine: TOML file, then environment, then `arguments`; defaults for what nobody set.

    The file is the one that TIERCACHE_CONFIG names (an empty name is none), else ./tiercache.toml, else
    tiercache/config.toml in the user's configuration directory. An argument that is None counts as not given.
    ConfigError names the setting and its source.
    """
    machine = machine or read_machine()
    path = config_path(machine)
    given: dict[str, tuple[object, str]] = {}
    if path is not None:
        try:
            table = tomllib.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"settings file {path}: {error}") from error
        given |= {name: (value, str(path)) for name, value in table.items()}
    for name, value in machine.environ.items():
        if name.startswith(PREFIX) and name not in NOT_SETTINGS:
            given[name.removeprefix(PREFIX).lower()] = (value, f"environment {name}")
    given |= {name: (value, "argument") for name, value in arguments.items() if value is not None}
    return resolve(given, machine)


def config_path(machine: Machine) -> Path | None:
    """The settings file that counts, or None."""
    named = machine.environ.get("TIERCACHE_CONFIG")
    if named is not None:
        return machine.cwd / Path(named).expanduser() if named else None
    config = Path(machine.environ.get("XDG_CONFIG_HOME") or machine.home / ".config")
    places = (machine.cwd / "tiercache.toml", config / "tiercache" / "config.toml")
    return next((place for place in places if place.is_file()), None)


def resolve(given: Mapping[str, tuple[object, str]], machine: Machine) -> Settings:
    """Settings from (value, source) pairs and readings; reads nothing itself but `machine.disk`."""
    for name, (_, source) in given.items():
        if name not in RULES:
            close = difflib.get_close_matches(name, RULES, 1)
            hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(RULES)}"
            raise ConfigError(f"unknown setting {name} from {source}{hint}")
    chosen = dict(given)
    directory = _directory(chosen, machine)
    disk = machine.disk(directory)

    def settle(name: str, whole: int, default: int, why: str) -> int:
        value, source = chosen.get(name, (default, f"default: {why}"))
        size = _size(name, value, whole, source)
        chosen[name] = (size, source)
        return size

    floor = settle("disk_free_floor_bytes", disk.total, *_default_floor(disk))
    memory = settle("memory_bytes", machine.memory_total, *_default_memory(machine))
    settle("queue_bytes", memory, min(memory // 4, 256 * MIB), "a quarter of memory_bytes, at most 256 MiB")
    ssd = settle("ssd_bytes", disk.total, *_default_ssd(disk, floor))
    segment = max(2 * MIB, min(64 * MIB, _rounded_down(ssd // 16)))
    segment = settle("segment_bytes", 0, segment, "a sixteenth of ssd_bytes, from 2 to 64 MiB")
    files = 2 * -(-ssd // max(1, segment)) + 16 * META_FILES
    settle("ssd_files_max", 0, files, "twice what full segments need")
    slots = min(SLOTS_MAX, max(SLOTS_MIN, _rounded_down((memory + ssd) // SLOT_BYTES_MEAN)))
    settle("slots_max", 0, slots, f"one for each {format_size(SLOT_BYTES_MEAN)} of both caps")
    sources = tuple((name, chosen[name][1] if name in chosen else "default") for name in RULES)
    plain = {name: value for name, (value, _) in chosen.items()}
    return Settings(**plain, sources=sources)  # type: ignore[arg-type]  # __post_init__ checks every value by its rule


def _directory(chosen: dict[str, tuple[object, str]], machine: Machine) -> Path:
    """Settles the directory: absolute, ~ expanded."""
    cache = Path(machine.environ.get("XDG_CACHE_HOME") or machine.home / ".cache")
    value, source = chosen.get("directory", (cache / "tiercache", "default"))
    written = str(_checked("directory", RULES["directory"], value, source))
    if written == "~" or written.startswith("~/"):
        written = str(machine.home) + written[1:]
    place = machine.cwd / written
    chosen["directory"] = (str(place), source)
    return place


def _size(name: str, value: object, whole: int, source: str) -> int:
    """`value` as bytes (or a count); a share such as "10%" is taken of `whole`."""
    rule = RULES[name]
    text = value.strip() if isinstance(value, str) else ""
    if rule.whole and text.endswith("%"):
        share = parsed_text(Kind.FRACTION, text)
        if share is None or not 0 <= share <= 1:
            raise ConfigError(f"{name} from {source} must be from 0% to 100% of {rule.whole}, not {value!r}")
        value = int(whole * share)
    return int(_checked(name, rule, value, source))


def _default_floor(disk: Disk) -> tuple[int, str]:
    floor = max(FLOOR_BYTES_MIN, int(disk.total * FLOOR_SHARE))
    return floor, f"{FLOOR_SHARE:.0%} of the disk's {format_size(disk.total)}, at least {format_size(FLOOR_BYTES_MIN)}"


def _default_memory(machine: Machine) -> tuple[int, str]:
    share = _rounded_down(int(machine.memory_free * MEMORY_SHARE))
    size = min(MEMORY_BYTES_MAX, max(int(RULES["memory_bytes"].low), share))
    return size, f"{MEMORY_SHARE:.1%} of {format_size(machine.memory_free)} free memory, rounded down"


def _default_ssd(disk: Disk, floor: int) -> tuple[int, str]:
    room = disk.free + disk.ours - floor
    size = min(SSD_BYTES_MAX, _rounded_down(int(room * SSD_SHARE)))
    if size < SSD_BYTES_MIN:
        return 0, f"off: only {format_size(disk.free)} free on the disk, {format_size(floor)} of it stay free"
    return size, f"{SSD_SHARE:.0%} of {format_size(room)} free above disk_free_floor_bytes, rounded down"


def _rounded_down(size: int) -> int:
    """The largest 2 ** n or 3 * 2 ** n up to `size`, so that a default is the same at the next opening."""
    if size < 2:
        return max(0, size)
    power = 1 << (size.bit_length() - 1)
    return power + power // 2 if size >= power + power // 2 else power
