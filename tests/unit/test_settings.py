"""Settings: every decision tested with made-up readings, and the readers with made-up file systems."""

from __future__ import annotations

import pickle
from dataclasses import fields, replace
from pathlib import Path

import pytest

from tiercache.errors import ConfigError
from tiercache.settings import (
    GIB,
    MIB,
    RULES,
    Disk,
    Kind,
    Machine,
    Settings,
    format_size,
    load,
    read_disk,
    read_machine,
)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    home, cwd = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    cwd.mkdir()
    return Machine({}, 16 * GIB, 8 * GIB, lambda _: Disk(100 * GIB, 50 * GIB), home, cwd)


def with_environ(machine: Machine, **environ: str) -> Machine:
    return replace(machine, environ=environ)


def source_of(settings: Settings, name: str) -> str:
    return next(row.source for row in settings.explain() if row.name == name)


def test_every_setting_has_a_rule_and_there_are_44() -> None:
    names = [f.name for f in fields(Settings) if f.name != "sources"]
    assert names == list(RULES)
    assert len(names) <= 44
    assert all(rule.meaning.endswith(".") for rule in RULES.values())


def test_defaults_are_a_modest_share(machine: Machine) -> None:
    settings = load(machine)
    assert settings.memory_bytes == GIB  # an eighth of 8 GiB
    assert settings.disk_free_floor_bytes == 10 * GIB
    assert settings.ssd_bytes == 16 * GIB  # half of 40 GiB, rounded down
    assert settings.directory == str(machine.home / ".cache" / "tiercache")
    assert source_of(settings, "memory_bytes").startswith("default: 12.5% of 8.0 GiB")


def test_defaults_do_not_shrink_when_the_cache_has_filled_its_share(machine: Machine) -> None:
    first = load(machine)
    filled = Disk(100 * GIB, 50 * GIB - first.ssd_bytes, first.ssd_bytes)
    assert load(replace(machine, disk=lambda _: filled)).ssd_bytes == first.ssd_bytes


@pytest.mark.parametrize("free", [0, GIB, 10 * GIB + 100 * MIB])
def test_a_full_disk_turns_the_ssd_tier_off(machine: Machine, free: int) -> None:
    settings = load(replace(machine, disk=lambda _: Disk(100 * GIB, free)))
    assert settings.ssd_bytes == 0
    assert "off" in source_of(settings, "ssd_bytes")


@pytest.mark.parametrize(
    ("memory_free", "total", "free"),
    [(0, 0, 0), (1, 1, 1), (300 * MIB, 20 * GIB, 3 * GIB), (1 << 45, 1 << 50, 1 << 49), (64 * GIB, 2 * GIB, GIB)],
)
def test_defaults_never_contradict_each_other(machine: Machine, memory_free: int, total: int, free: int) -> None:
    settings = load(
        replace(machine, memory_total=memory_free, memory_free=memory_free, disk=lambda _: Disk(total, free))
    )
    assert settings.ssd_bytes <= max(0, free - settings.disk_free_floor_bytes)


def test_precedence_file_then_environment_then_arguments(machine: Machine) -> None:
    (machine.cwd / "tiercache.toml").write_text('memory_bytes = "1GiB"\npage_bytes = 131072\nssd_threads = 2\n')
    settings = load(
        with_environ(machine, TIERCACHE_SSD_THREADS="3", TIERCACHE_MEMORY_BYTES="2GiB"),
        memory_bytes="3GiB",
        policy=None,
    )
    assert (settings.page_bytes, settings.ssd_threads, settings.memory_bytes) == (131072, 3, 3 * GIB)
    assert source_of(settings, "page_bytes") == str(machine.cwd / "tiercache.toml")
    assert source_of(settings, "ssd_threads") == "environment TIERCACHE_SSD_THREADS"
    assert source_of(settings, "memory_bytes") == "argument"
    assert source_of(settings, "policy") == "default"


def test_which_file_counts(machine: Machine) -> None:
    user = machine.home / ".config" / "tiercache" / "config.toml"
    user.parent.mkdir(parents=True)
    user.write_text("ssd_threads = 5\n")
    assert load(machine).ssd_threads == 5
    (machine.cwd / "tiercache.toml").write_text("ssd_threads = 6\n")
    assert load(machine).ssd_threads == 6
    named = machine.cwd / "named.toml"
    named.write_text("ssd_threads = 7\n")
    assert load(with_environ(machine, TIERCACHE_CONFIG="named.toml")).ssd_threads == 7
    assert load(with_environ(machine, TIERCACHE_CONFIG="")).ssd_threads == 8


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4096000", 4096000), ("4GiB", 4 * GIB), ("512 MiB", 512 * MIB), ("1.5gib", GIB * 3 // 2), ("4GB", 4 * 10**9),
     ("25%", 4 * GIB), (1 << 30, GIB), (2e9, 2 * 10**9), ("1_073_741_824", GIB)],
)  # fmt: skip
def test_sizes(machine: Machine, text: object, expected: int) -> None:
    assert load(machine, memory_bytes=text, queue_bytes=MIB).memory_bytes == expected


@pytest.mark.parametrize(("text", "expected"), [("500ms", 0.5), ("2min", 120.0), ("3", 3.0), (4, 4.0), ("1h", 3600.0)])
def test_times(machine: Machine, text: object, expected: float) -> None:
    assert load(machine, origin_deadline_s=text).origin_deadline_s == pytest.approx(expected)


@pytest.mark.parametrize(("text", "expected"), [("no", False), ("ON", True), (False, False), ("0", False)])
def test_flags(machine: Machine, text: object, expected: bool) -> None:
    assert load(machine, verify_copies=text).verify_copies is expected


def test_marks_as_percent(machine: Machine) -> None:
    settings = load(machine, high_mark="80%", low_mark=0.5)
    assert (settings.high_mark, settings.low_mark) == (0.8, 0.5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("memory_bytes", "4 gigs"), ("memory_bytes", "4G"), ("memory_bytes", -1), ("memory_bytes", "-1"),
     ("memory_bytes", 1),
     ("memory_bytes", "120%"), ("memory_bytes", True),
     ("memory_bytes", float("nan")), ("memory_bytes", 10.5),
     ("memory_bytes", [1]), ("page_bytes", "10%"), ("page_bytes", 100), ("page_bytes", 64 * MIB), ("ssd_threads", 0),
     ("ssd_threads", "2.5"), ("ssd_threads", "many"), ("ssd_deadline_s", "1 fortnight"), ("ssd_deadline_s", 0),
     ("ssd_deadline_s", float("inf")), ("verify_copies", "maybe"), ("high_mark", 1.5), ("high_mark", "1GiB"),
     ("policy", ""),
     ("directory", ""), ("directory", 7), ("slots_max", 10), ("memory_bytes", "9" * 40)],
)  # fmt: skip
def test_wrong_values_name_the_setting_and_its_source(machine: Machine, name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{name} from argument must be"):
        load(machine, **{name: value})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"low_mark": 0.96}, "low_mark .* under high_mark"),
     ({"queue_bytes": "2GiB", "memory_bytes": "1GiB"}, "queue_bytes .* memory_bytes"),
     ({"memory_bytes": "4MiB", "page_bytes": "4MiB"}, "memory_bytes .* page_bytes"),
     ({"page_bytes": 65537}, "page_bytes .* multiple"),
     ({"segment_bytes": "2MB"}, "segment_bytes .* multiple"),
     ({"ssd_bytes": "100MiB", "segment_bytes": "64MiB"}, "ssd_bytes .* segment_bytes"),
     ({"ssd_bytes": "1GiB", "ssd_files_max": 10}, "ssd_files_max .* ssd_bytes"),
     ({"merge_gap_bytes": "1GiB"}, "merge_gap_bytes .* request_bytes_max"),
     ({"tail_bytes": "1GiB"}, "tail_bytes .* request_bytes_max")],
)  # fmt: skip
def test_contradictions_name_both_settings(machine: Machine, arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(machine, **arguments)


def test_unknown_names_everywhere(machine: Machine) -> None:
    with pytest.raises(ConfigError, match="unknown setting memory_byte from argument; did you mean memory_bytes"):
        load(machine, memory_byte=1)
    with pytest.raises(ConfigError, match="unknown setting memory from environment TIERCACHE_MEMORY"):
        load(with_environ(machine, TIERCACHE_MEMORY="1GiB"))
    (machine.cwd / "tiercache.toml").write_text("[memory]\nbytes = 1\n")
    with pytest.raises(ConfigError, match=r"unknown setting memory from .*tiercache\.toml"):
        load(machine)


def test_a_broken_or_missing_file_is_named(machine: Machine) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        load(with_environ(machine, TIERCACHE_CONFIG="nowhere.toml"))
    (machine.cwd / "tiercache.toml").write_text("memory_bytes = = 1\n")
    with pytest.raises(ConfigError, match=r"tiercache\.toml"):
        load(machine)


def test_other_environment_names_are_left_alone(machine: Machine) -> None:
    load(with_environ(machine, TIERCACHE_DATA="/data", TIERCACHEX="1", PATH="/bin"))


@pytest.mark.parametrize(("written", "tail"), [("~/c", "home/c"), ("c", "work/c"), ("./c", "work/c")])
def test_directory_is_made_absolute(machine: Machine, written: str, tail: str) -> None:
    assert load(machine, directory=written).directory.endswith(tail)
    assert load(machine, directory=Path("/a/b")).directory == "/a/b"


def test_shares_are_of_the_right_whole(machine: Machine) -> None:
    settings = load(machine, memory_bytes="50%", ssd_bytes="20%", disk_free_floor_bytes="5%", queue_bytes="1%")
    assert settings.memory_bytes == 8 * GIB
    assert settings.ssd_bytes == 20 * GIB
    assert settings.disk_free_floor_bytes == 5 * GIB
    assert settings.queue_bytes == 8 * GIB // 100


def test_made_directly_frozen_and_picklable() -> None:
    settings = Settings("/tmp/c", 64 * MIB, 0, queue_bytes=MIB)
    assert pickle.loads(pickle.dumps(settings)) == settings
    with pytest.raises(ConfigError, match="high_mark"):
        replace(settings, high_mark=0.1)
    with pytest.raises(AttributeError):
        settings.policy = "x"  # type: ignore[misc]


def test_small_tiers_get_small_segments(machine: Machine) -> None:
    settings = load(machine, ssd_bytes="16MiB", memory_bytes="4MiB")
    assert settings.segment_bytes == 2 * MIB
    with pytest.raises(ConfigError, match="13631488 or more"):
        load(machine, ssd_bytes="8MiB", memory_bytes="4MiB")


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (GIB, "1.0 GiB"), (1 << 50, "1024.0 TiB")]
)
def test_format_size(size: int, text: str) -> None:
    assert format_size(size) == text


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {
    "proc/meminfo": "MemTotal:  16777216 kB\nMemFree:  1048576 kB\nMemAvailable:   8388608 kB\nHugePages_Total:   0\n"
}


@pytest.mark.parametrize(
    ("files", "total", "free"),
    [
        ({}, 16 * GIB, 8 * GIB),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max\n"}, 16 * GIB, 8 * GIB),
        (
            {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": f"{4 * GIB}\n",
             "sys/fs/cgroup/a/memory.current": f"{3 * GIB}\n",
             "sys/fs/cgroup/a/memory.stat": f"anon 5\ninactive_file {GIB}\n", "sys/fs/cgroup/a/b/memory.max": "max\n"},
            4 * GIB, 2 * GIB,
        ),
        (
            {"proc/self/cgroup": "0::/../../x\n", "sys/fs/cgroup/memory.max": f"{GIB}\n",
             "sys/fs/cgroup/memory.current": f"{2 * GIB}\n"},
            GIB, 0,
        ),
        (
            {"proc/self/cgroup": "5:cpu:/\n4:memory:/docker/1\n",
             "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
             "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n"},
            2 * GIB, GIB,
        ),
        (
            {"proc/self/cgroup": "4:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"},
            16 * GIB, 8 * GIB,
        ),
    ],
)  # fmt: skip
def test_memory_from_cgroups(tmp_path: Path, files: dict[str, str], total: int, free: int) -> None:
    machine = read_machine(write_tree(tmp_path, MEMINFO | files))
    assert (machine.memory_total, machine.memory_free) == (total, free)


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    machine = read_machine(tmp_path)
    assert (machine.memory_total, machine.memory_free) == (0, 0)


def test_disk_of_a_directory_that_is_not_there_yet(tmp_path: Path) -> None:
    disk = read_disk(tmp_path / "a" / "b")
    assert disk.total >= disk.free > 0
    assert disk.ours == 0
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "f").write_bytes(b"x" * 8192)
    with open(tmp_path / "a" / "sparse", "wb") as file:
        file.truncate(1 << 30)
    assert read_disk(tmp_path / "a").ours < 1 << 20


def test_this_machine_gives_settings(tmp_path: Path) -> None:
    machine = replace(read_machine(), environ={}, home=tmp_path, cwd=tmp_path)
    settings = load(machine)
    assert settings.memory_bytes <= machine.memory_total or settings.memory_bytes == 2 * MIB
    assert {row.name for row in settings.explain()} == set(RULES)
    assert all(isinstance(rule.kind, Kind) for rule in RULES.values())
