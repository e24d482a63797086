"""Fetching and reading of traces, on made-up upstreams behind file:// URLs: no network, none of the real data."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
from dataclasses import replace
from pathlib import Path

import pytest

from bench import data

pa = pytest.importorskip("pyarrow")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("TIERCACHE_DATA", raising=False)
    monkeypatch.setattr(data, "FOLDER", tmp_path / "data")
    return tmp_path / "data"


def upstream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, files: list[bytes], ours: bytes
) -> data.Source:
    """Serves `files` as the upstream of the source `name`, whose digest becomes that of `ours`."""
    paths = tuple(f"in it/{i}.x" for i in range(len(files)))
    source = replace(data.BY_NAME[name], paths=paths, digest=hashlib.sha256(ours).hexdigest())
    for path, content in zip(paths, files):
        place = tmp_path / "tree" / source.repository / source.commit / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    monkeypatch.setitem(data.BY_NAME, name, source)
    return source


def base_url(tmp_path: Path) -> str:
    return (tmp_path / "tree").as_uri()


def test_fetch_joins_checks_and_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    source = upstream(tmp_path, monkeypatch, "lmcache_miniswe_text.jsonl", [b"a\n", b"b\n"], b"a\nb\n")
    assert data.fetch_all(folder, base_url(tmp_path), [source]) == []
    assert data.content(source.name) == b"a\nb\n"
    assert [path.name for path in folder.iterdir()] == [source.name]
    assert data.fetch_all(folder, "file:///nowhere", [source]) == []  # it is here: nothing is asked for


def test_another_digest_is_refused_and_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    source = upstream(tmp_path, monkeypatch, "azure_llm_code_2023.csv", [b"tampered"], b"real")
    (sentence,) = data.fetch_all(folder, base_url(tmp_path), [source])
    assert "azure_llm_code_2023.csv could not be had (SHA-256" in sentence
    assert "missing then: arrival times" in sentence
    assert not folder.exists()


def test_no_network_names_the_row(folder: Path) -> None:
    (sentence,) = data.fetch_all(folder, "file:///nowhere", [data.BY_NAME["swim_fb2010_input_paths.tsv"]])
    assert "missing then: hit ratios on Hadoop input paths" in sentence
    with pytest.raises(data.MissingData, match="run `make data`, or set TIERCACHE_DATA"):
        data.swim()
    assert len(data.missing()) == len(data.SOURCES)


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_a_folder_may_hold_packed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, pack) -> None:
    plain = b"job0\t1\t1\t5\t0\t9\tp1\t\t\njob1\t4\t1\t7\t0\t9\tp2\t\t\njob2\t9\t1\t5\t0\t9\tp1\t\t\n"
    source = upstream(tmp_path, monkeypatch, "swim_fb2010_input_paths.tsv", [], plain)
    (tmp_path / (source.name + suffix)).write_bytes(pack(plain))
    monkeypatch.setenv("TIERCACHE_DATA", str(tmp_path))
    assert data.swim() == [(1, 0, 5), (4, 1, 7), (9, 0, 5)]


def test_a_damaged_file_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "azure_llm_code_2023.csv").write_bytes(b"something else")
    monkeypatch.setenv("TIERCACHE_DATA", str(tmp_path))
    with pytest.raises(data.MissingData):
        data.azure_code()


def trace(name: str, requests: list[dict[str, object]]) -> bytes:
    return json.dumps({"id": name, "tool_tokens": 1, "system_tokens": 2, "requests": requests}).encode()


def request(t: float, ids: list[int], kind: str = "n") -> dict[str, object]:
    facts = {"model": "m", "in": 3, "out": 4, "api_time": 0.5, "think_time": 0.0}
    return {"t": t, "type": kind, "hash_ids": ids} | facts


def test_agentic_conversion_and_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    inner = {"t": 10.0, "type": "subagent", "agent_id": "a1", "tool_tokens": 5, "system_tokens": 6}
    files = [
        trace("t1", [request(0.0, [1, 2, 3, 9, 10]), inner | {"requests": [request(0.25, [7, 8])]}]),
        trace("t2", [request(1.0, [1, 2])]),
    ]
    ours = data._agentic(files)
    lines = [json.loads(line) for line in ours.splitlines()]
    assert lines[0]["runs"] == [[1, 3], [9, 2]]
    assert (lines[1]["stream"], lines[1]["t"], lines[1]["tool_tokens"]) == ("a1", 10.25, 5)
    source = upstream(tmp_path, monkeypatch, "agentic_coding_dev.jsonl", files, ours)
    data.fetch(source, folder, base_url(tmp_path))
    native = data.agentic_coding_dev(1, horizon_s=0)
    assert [(r.time_s, r.session) for r in native] == [(0.0, 0), (1.0, 1), (10.25, 0)]
    assert [r.blocks for r in native] == [[0, 1, 2, 3, 4], [5, 6], [7, 8]]
    assert [r.blocks for r in data.agentic_coding_dev(2, horizon_s=0)] == [[0, 1], [2], [3]]
    assert data.agentic_coding_dev(2) == data.agentic_coding_dev(2)


def test_readers_of_small_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERCACHE_DATA", str(tmp_path))
    texts = {
        "arc_OLTP.lis": b"5 1 0 0\n10 3 0 1\n5 2 0 2\n",
        "cloudphysics_w106.i32le": b"\x01\x00\x00\x00\x00\x01\x00\x00",
        "azure_llm_code_2023.csv": b"TIMESTAMP,C,G\n"
        b"2023-11-16 18:17:03.9799600,48,10\n2023-11-16 18:17:04.4799600,3,2\n",
        "mooncake_conversation.jsonl": b'{"timestamp": 1500, "hash_ids": [0, 1]}\n'
        b'{"timestamp": 2000, "hash_ids": [0, 2]}\n',
        "lmcache_miniswe_text.jsonl": b'{"timestamp": 2, "input": "aabbcd", "session_id": "x"}\n'
        b'{"timestamp": 1, "input": "aaccbb", "session_id": "y"}\n',
    }
    for name, text in texts.items():
        upstream(tmp_path, monkeypatch, name, [], text)
        (tmp_path / name).write_bytes(text)
    assert data.arc("OLTP").tolist() == [5, 10, 11, 12, 5, 6]
    assert data.cloudphysics().tolist() == [1, 256]
    assert data.azure_code() == [(0.0, 48, 10), (0.5, 3, 2)]
    assert data.mooncake_conversation() == [(1.5, 0, [0, 1]), (2.0, 1, [0, 2])]
    first, second = data.miniswe(block_bytes=2)
    assert (first.session, second.session) == (0, 1)
    assert first.blocks[0] == second.blocks[0]
    assert len({*first.blocks, *second.blocks}) == 5  # the same text after another beginning is another block


def test_tables_are_typed_as_listed() -> None:
    table = data.table_from_csv(b"\xef\xbb\xbfid, x ,y,y\n 07,1, 2.5,\n,,,z\n\n", "sids")
    assert table.column_names == ["id", "x", "y", "y.1"]
    assert table.to_pylist() == [
        {"id": "07", "x": 1, "y": 2.5, "y.1": None},
        {"id": None, "x": None, "y": None, "y.1": "z"},
    ]


def test_tables_are_fetched_and_checked(tmp_path: Path, folder: Path) -> None:
    content = b"a,b\n1,x\n"
    good = data.Table("t1", "o/r", "c", "d/x.csv", hashlib.sha256(content).hexdigest(), "PDDL-1.0", "is")
    place = tmp_path / "tree" / "o" / "r" / "c" / "d" / "x.csv"
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    failures = data.fetch_tables(folder, base_url(tmp_path), [good, good._replace(name="t2", digest="0" * 64)])
    assert failures == ["table t2 of o/r could not be had (another SHA-256 than expected)"]
    assert [path.name for path in (folder / "tables").iterdir()] == ["t1.parquet"]


def test_the_lists_are_whole() -> None:
    assert len(data.TABLES) == 243
    assert len(data.BY_NAME["agentic_coding_dev.jsonl"].paths) == 405
    assert len(data.BY_NAME["lmcache_miniswe_text.jsonl"].paths) == 20
    for each in (*data.SOURCES, *data.TABLES):
        assert len(each.commit) == 40
        assert len(each.digest) == 64
        assert each.licence
