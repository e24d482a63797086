"""The command line: what it prints, what it answers, and its one-line errors."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path

import fsspec
import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from tiercache.cli import app, contents, doctor, files, output, warm
from tiercache.cli.app import run
from tiercache.errors import ConfigError, OriginError, UnavailableError
from tiercache.remote.fsspec_origin import LocalOrigin
from tiercache.settings import load
from tiercache.ssd.tier import SsdTier
from tiercache.testing.s3server import S3Server

MIB = 1 << 20


class Command:
    """Runs `tiercache WORDS` in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._patch, self._capsys = monkeypatch, capsys

    def __call__(self, *words: object) -> tuple[int, str, str]:
        self._patch.setattr(sys, "argv", ["tiercache", *map(str, words)])
        code = run()
        out, err = self._capsys.readouterr()
        return code, out, err

    def json(self, *words: object) -> dict:
        code, out, err = self(*words, "--json")
        assert code == 0, err
        return json.loads(out)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "CONFIG": "",
        "DIRECTORY": tmp_path / "cache",
        "MEMORY_BYTES": "32MiB",
        "SSD_BYTES": "64MiB",
    }.items():
        monkeypatch.setenv(f"TIERCACHE_{name}", str(value))
    monkeypatch.setenv("TIERCACHE_DISK_FREE_FLOOR_BYTES", "0")
    monkeypatch.setenv("TIERCACHE_MTIME_SETTLE_S", "0")
    return Command(monkeypatch, capsys)


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    folder = tmp_path / "tables"
    (folder / "more").mkdir(parents=True)
    for name, size in {"a.bin": 3 * MIB + 5, "more/b.bin": 100_000, "more/empty.bin": 0}.items():
        (folder / name).write_bytes(bytes(i * 7 % 251 for i in range(size % 1000)) + bytes(size - size % 1000))
    return folder


def test_without_a_command_it_explains_itself(command: Command) -> None:
    code, out, _ = command()
    assert code == 0
    for name in ("demo", "stat", "ls", "warm", "evict", "fsck", "config", "doctor"):
        assert f"  {name} " in out
    assert command("--version")[1].strip() == __import__("tiercache").__version__


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["config", "--directory", ""], "directory from argument must be a path"),
        (["evict"], "say what: URLs, --down-to SIZE, or --all"),
        (["evict", "--all", "--down-to", "1MB"], "say what"),
        (["evict", "--down-to", "lots"], "--down-to lots: give a size"),
        (["warm", "s3://"], "s3://: give PROTOCOL://PATH"),
        (["warm", "x", "-o", "endpoint"], "-o endpoint: give NAME=VALUE"),
        (["demo", "--scale", "x"], "'--scale'"),
        (["demo", "--s3", "minio"], "--s3 minio: there are own, ceph, moto"),
        (["demo", "--url", "bucket"], "--url bucket: give a folder as PROTOCOL://PATH"),
    ],
)
def test_wrong_words_are_one_line_and_exit_2(command: Command, words: list[str], says: str) -> None:
    if words[0] == "demo":
        pytest.importorskip("duckdb")
        words = [*words, "--directory", "work"] if "--scale" in words or "--url" in words else words
    if "--s3" in words:
        words = [*words, "--scale", "0.001", "--directory", "work"]
        (Path("work/tpch-sf0.001")).mkdir(parents=True)  # stands for tables that were made before
    code, out, err = command(*words)
    assert (code, out) == (2, "")
    assert err.startswith("tiercache: ") and says in err and err.count("\n") == 1


def test_unknown_setting_in_the_environment(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERCACHE_MEMORY_BYTE", "4")
    code, _, err = command("config")
    assert code == 2
    assert "memory_byte" in err and "did you mean memory_bytes" in err
    code, out, _ = command("doctor")
    assert code == 1 and "memory_byte" in out


def test_config_says_where_values_come_from(command: Command) -> None:
    rows = {row["name"]: row for row in command.json("config")["settings"]}
    assert rows["memory_bytes"]["value"] == 32 * MIB
    assert rows["memory_bytes"]["source"] == "environment TIERCACHE_MEMORY_BYTES"
    assert "33,554,432 (32.0 MiB)" in command("config")[1]


def test_no_cache_there_is_exit_3(command: Command) -> None:
    for words in (["stat"], ["ls"], ["evict", "--all"], ["fsck"]):
        code, out, err = command(*words)
        assert (code, out) == (3, "")
        assert "no" in err and "cache in" in err and err.count("\n") == 1
    assert not Path("cache").exists()  # asking makes nothing


@pytest.mark.slow
def test_warm_stat_ls_evict_fsck(command: Command, tables: Path) -> None:
    done = command.json("warm", tables)
    assert done["files"] == 3 and done["skipped"] == 0
    assert done["fetched_bytes"] == done["size_bytes"] == 3 * MIB + 5 + 100_000
    again = command.json("warm", tables)
    assert again["size_bytes"] == done["size_bytes"] and again["fetched_bytes"] == 0

    facts = command.json("stat")
    assert facts["held_bytes"] == done["size_bytes"] and facts["health"] == "healthy"
    assert facts["used_bytes"] <= facts["capacity_bytes"] == 64 * MIB
    assert facts["forms"]["page"]["entries"] == facts["entries"] == 5
    assert "holds" in command("stat")[1]

    rows = {Path(row["file"]).name: row for row in command.json("ls", tables)["rows"]}
    assert {name: row["share"] for name, row in rows.items()} == {"a.bin": 1.0, "b.bin": 1.0, "empty.bin": 1.0}
    assert [row["entries"] for row in command.json("ls")["rows"]] == [4, 1]
    assert "a.bin" in command("ls", tables)[1]

    assert command.json("evict", tables / "more" / "b.bin")["evicted_bytes"] == 100_000
    assert command.json("stat")["held_bytes"] == 3 * MIB + 5
    left = command.json("evict", "--down-to", "2MiB")
    assert left["evicted_entries"] >= 1 and left["held_bytes"] <= 2 * MIB
    assert command.json("stat")["held_bytes"] == left["held_bytes"]
    assert command.json("fsck")["clean"]
    assert command.json("warm", tables)["fetched_bytes"] == done["size_bytes"] - left["held_bytes"]
    assert command.json("evict", "--all")["held_bytes"] == 0
    assert command("ls")[1] == ""


def test_a_directory_in_use_is_said_in_one_line(command: Command, tables: Path, tmp_path: Path) -> None:
    settings = load()
    owner = SsdTier(settings.directory, settings.ssd_bytes, segment_bytes=settings.segment_bytes)
    try:
        for words in (["stat"], ["ls"], ["evict", "--all"], ["fsck"], ["warm", tables]):
            code, out, err = command(*words)
            assert (code, out) == (3, ""), words
            assert "in use by another process" in err and err.count("\n") == 1
    finally:
        import asyncio

        asyncio.run(owner.close())


@pytest.mark.slow
def test_fsck_finds_damage(command: Command, tables: Path) -> None:
    command.json("warm", tables)
    segment = max(Path("cache").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    with segment.open("r+b") as file:
        file.seek(MIB)
        file.write(b"damage" * 100)
    code, out, _ = command("fsck")
    assert code == 1 and "damaged: see --repair" in out and "corrupt 1" in out
    assert command("fsck", "--repair")[0] == 0
    assert command("fsck")[0] == 0


def test_doctor_names_everything(command: Command) -> None:
    found = {one["topic"]: one for one in command.json("doctor")["findings"]}
    for topic in (
        "processors",
        "copy kernel",
        "memory",
        "locked memory",
        "open files",
        "huge pages",
        "disk",
        "GPU",
        "UCX",
        "RDMA",
    ):
        assert found[topic]["fact"], topic
        assert found[topic]["state"] in ("good", "limited", "missing")
        assert found[topic]["state"] != "missing" or found[topic]["hint"]
    text = command("doctor")[1]
    assert "O_DIRECT" in text and "the cache will use up to 32.0 MiB" in text
    assert not list(Path("cache").glob("*"))  # the probe leaves nothing


def test_doctor_reads_a_made_up_machine(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\nHugePages_Total: 0\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text(str(1 << 30))
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("0")
    (tmp_path / "sys/kernel/mm/transparent_hugepage").mkdir(parents=True)
    (tmp_path / "sys/kernel/mm/transparent_hugepage/enabled").write_text("always madvise [never]\n")
    (tmp_path / "sys/class/infiniband/mlx5_0").mkdir(parents=True)
    found = {one.topic: one for one in doctor.examine(str(tmp_path / "cache"), tmp_path)}
    assert "1.0 GiB" in found["memory"].fact and "a cgroup limits this process" in found["memory"].fact
    assert found["huge pages"].state == doctor.LIMITED and "transparent: never" in found["huge pages"].fact
    assert found["RDMA"].state == doctor.GOOD and "mlx5_0" in found["RDMA"].fact


def test_probe_of_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    assert doctor.probe_direct(tmp_path / "not" / "there") is None or isinstance(doctor.probe_direct(tmp_path), OSError)
    assert doctor.probe_direct(Path("/proc")) is not None
    assert not list(tmp_path.iterdir())


def test_urls_and_options() -> None:
    assert files.split_url("s3://bucket/tables/") == ("s3", "bucket/tables")
    assert files.split_url("/data/x") == ("file", "/data/x")
    assert files.parse_options(["endpoint_url=http://h:1/?a=b", "anon=true"]) == {
        "endpoint_url": "http://h:1/?a=b",
        "anon": True,
    }
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        files.parse_options(["=x"])


def test_rows_beside_files() -> None:
    held = [contents.Held(b"k" * 32, "page", "page", 2, 150)]
    rows = contents.beside(held, [("a", 200, b"k" * 32), ("b", 10, b"x" * 32), ("c", 5, None), ("d", 0, None)])
    assert [(row["held_bytes"], row["share"]) for row in rows] == [(150, 0.75), (0, 0.0), (0, 0.0), (0, 1.0)]


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("https://host/tables/a.bin", ("https", "https://host/tables/a.bin")),
        ("http://host/a%20b?c=d", ("http", "http://host/a%20b?c=d")),
        ("gs://bucket/tables/", ("gs", "bucket/tables")),
        ("file:///data/x/", ("file", "/data/x")),
        ("memory://a/b", ("memory", "/a/b")),
        ("abfs://box@account.dfs.core.windows.net/a/b", ("abfs", "box/a/b")),
        ("az://box/a", ("az", "box/a")),
    ],
)
def test_urls_are_paths_as_filesystems_have_them(url: str, found: tuple[str, str]) -> None:
    assert files.split_url(url) == found


def test_urls_of_http_and_memory(command: Command, tmp_path: Path) -> None:
    """Warmed, listed and evicted by the URL that a reader opens."""
    (tmp_path / "s3" / "bucket").mkdir(parents=True)
    (tmp_path / "s3" / "bucket" / "a.bin").write_bytes(b"x" * MIB)
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/tables-of-a-test/b.bin", b"y" * MIB)
    with S3Server(tmp_path / "s3") as server:
        for url in (f"{server.url}/bucket/a.bin", "memory://tables-of-a-test"):
            assert command.json("warm", url)["kept_bytes"] == MIB
            (row,) = command.json("ls", url)["rows"]
            assert row["held_bytes"] == MIB
            assert command.json("evict", url)["evicted_bytes"] == MIB
        code, _, says = command("warm", f"{server.url}/bucket/none")
        assert (code, says.count("\n")) == (3, 1)
        assert "HTTP has no folders" in says
    memory.rm("/tables-of-a-test", recursive=True)


def test_keys_are_cut_to_what_tells_them_apart(command: Command, tables: Path) -> None:
    assert output.shortened(["a" * 64, "a" * 13 + "b" * 51]) == ["a" * 14, "a" * 13 + "b"]
    assert output.shortened([]) == []
    command("warm", tables)
    whole = [row["key"] for row in command.json("ls")["rows"]]
    for words, shown in ((["ls"], output.shortened(whole)), (["ls", "--full"], whole)):
        _, out, _ = command(*words)
        assert set(shown) < set(out.split())
    assert len(output.shortened(whole)[0]) < 40


def test_missing_credentials_are_told_how(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in files.CREDENTIALS:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(OriginError, match="-o anon=true"), files.told_how("s3", {}):
        raise OriginError("refused")
    for options in ({"anon": True}, {"key": "k"}):
        with pytest.raises(OriginError) as caught, files.told_how("s3", options):
            raise OriginError("refused")
        assert str(caught.value) == "refused"


def test_an_interrupted_warm_says_how_to_go_on(command: Command, tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(warm, "warm", interrupted)
    assert command("warm", tables) == (130, "", "tiercache: stopped; run again to go on\n")
    monkeypatch.setattr(files, "named", interrupted)
    code, _, says = command("evict", tables)
    assert (code, says.strip().splitlines()[-1]) == (130, "tiercache: stopped")


def test_faults_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with output.one_line_errors() as codes:
        raise ExceptionGroup("many", [ExceptionGroup("more", [UnavailableError("gone\nfar")])])
    assert codes == [3]
    assert capsys.readouterr().err == "tiercache: gone far\n"
    try:
        raise OSError("no disk")
    except OSError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "it %s", ("failed",), sys.exc_info())
    assert output.OneLine().format(record) == "tiercache: it failed: no disk"


def test_an_owner_without_an_ssd_has_no_disk() -> None:
    facts = {"ssd": False, "used_bytes": 1, "capacity_bytes": 2, "used_files": 0, "capacity_files": 0}
    assert app.disk_line(facts).startswith("none")
    assert app.disk_line(facts | {"ssd": True}) == "1 B of 2 B in 0 of 0 files"


def test_a_name_with_a_nul_is_refused_clearly(tmp_path: Path) -> None:
    async def look() -> None:
        origin = LocalOrigin()
        try:
            await origin.stat(["a\0b"])
        finally:
            await origin.close()

    with pytest.raises(OriginError, match="NUL"):
        asyncio.run(look())
