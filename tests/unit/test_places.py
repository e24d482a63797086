"""What the paths of a process mean: in its working directory, behind its mounts."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.zip import ZipFileSystem

from tiercache.remote import places
from tiercache.remote.opening import _identity, open_origin
from tiercache.remote.options import UNDERSTOOD
from tiercache.remote.rights import local_reader, surroundings, told


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two working directories in which the same relative paths mean different files."""
    made = [tmp_path / "a", tmp_path / "b"]
    for folder in made:
        (folder / "data").mkdir(parents=True)
        (folder / "key.json").write_text("one key")
        with zipfile.ZipFile(folder / "d.zip", "w") as archive:
            archive.writestr("x.csv", folder.name)
    return made


def in_each(folders: list[Path], monkeypatch: pytest.MonkeyPatch, identity: Callable[[], str]) -> set[str]:
    found = set()
    for folder in folders:
        monkeypatch.chdir(folder)
        found.add(identity())
    return found


RELATIVE = {
    "zip": ("zip", {"fo": "d.zip"}),
    "zip by address": ("zip", {"fo": "file://d.zip"}),
    "zip by chain": ("zip", {"fo": "simplecache::d.zip"}),
    "directory": ("dir", {"path": "data", "target_protocol": "file"}),
    "directory that is to come": ("dir", {"path": "later", "target_protocol": "file"}),
    "directory of this one": ("dir", {"path": "", "target_protocol": "file"}),
    "key file": ("sftp", {"host": "h", "key_filename": "key.json"}),
    "key among keys": ("sftp", {"host": "h", "keys": [{"any": Path("key.json")}]}),
    "token": ("gs", {"token": "key.json", "requester_pays": True}),
    "wrapped": ("simplecache", {"fs": "x", "target_options": {"fo": "d.zip"}, "target_protocol": "zip"}),
}
PLACELESS = {
    "directory elsewhere": ("dir", {"path": "bucket/data", "target_protocol": "s3", "target_options": {"key": "k"}}),
    "zip elsewhere": ("zip", {"fo": "s3://bucket/d.zip", "target_options": {"token": "a token"}}),
    "ftp": ("ftp", {"host": "h", "username": "u", "password": "p"}),
    "s3": ("s3", {"key": "k", "secret": "s", "token": "t", "s3_additional_kwargs": {"RequestPayer": "requester"}}),
    "token itself": ("github", {"org": "o", "repo": "r", "token": "ghp_x"}),
}


@pytest.mark.parametrize("name", RELATIVE)
def test_relative_paths_are_those_of_a_working_directory(
    name: str, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol, options = RELATIVE[name]
    assert len(in_each(folders, monkeypatch, lambda: _identity(protocol, options))) == 2
    assert len(in_each(folders[:1] * 2, monkeypatch, lambda: _identity(protocol, options))) == 1


@pytest.mark.parametrize("name", PLACELESS)
def test_what_is_no_path_is_the_same_everywhere(
    name: str, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol, options = PLACELESS[name]
    assert len(in_each(folders, monkeypatch, lambda: _identity(protocol, options))) == 1


def test_files_of_keys_are_told_by_what_is_in_them(folders: list[Path]) -> None:
    key = folders[0] / "key.json"
    options = {"host": "h", "key_filename": str(key)}
    one = _identity("sftp", options)
    assert _identity("sftp", options) == one
    key.write_text("another key")
    assert _identity("sftp", options) != one
    big = folders[0] / "big.zip"
    big.write_bytes(bytes(places.FILE_BYTES_MAX + 1))
    os.utime(big, (1, 1))
    one = _identity("zip", {"fo": str(big)})
    os.utime(big, (2, 2))
    assert _identity("zip", {"fo": str(big)}) != one


def test_a_filesystem_keeps_the_meaning_of_the_directory_it_was_made_in(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    local = LocalFileSystem(skip_instance_cache=True)
    made, archives = [], []
    for folder in folders:
        monkeypatch.chdir(folder)
        made.append(DirFileSystem("data", local, skip_instance_cache=True))
        archives.append(ZipFileSystem("d.zip", skip_instance_cache=True))
    told_here = [told(each) for each in made]
    assert told_here[0] != told_here[1]
    assert len({told(each) for each in archives}) == 2  # which do not say where they came from
    monkeypatch.chdir(folders[0])
    assert [told(each) for each in made] == told_here
    assert told(DirFileSystem("data", LocalFileSystem(), skip_instance_cache=True)) == told_here[0]
    outer = [told(DirFileSystem("data", DirFileSystem("sub", fs), skip_instance_cache=True)) for fs in made]
    assert outer[0] != outer[1]
    monkeypatch.chdir(folders[1])
    again = told(DirFileSystem("data", DirFileSystem("sub", made[0]), skip_instance_cache=True))
    assert again == outer[0]


def test_files_of_the_environment_may_be_relative(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_CONFIG_FILE", "key.json")
    assert len(in_each(folders, monkeypatch, surroundings)) == 2
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folders[0] / "key.json"))
    assert len(in_each(folders, monkeypatch, surroundings)) == 1
    one = _identity("ftp", {"host": "h"})
    (folders[0] / "key.json").write_text("edited in place")
    assert _identity("ftp", {"host": "h"}) != one


def test_keys_of_google_are_opened_where_they_were_told(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folders[0])
    found = UNDERSTOOD["gs"]({"token": "key.json"}).config["application_credentials"]
    assert found == str(folders[0] / "key.json")


def test_wrappers_of_what_has_no_coroutines_are_opened_without(folders: list[Path]) -> None:
    for path in ("data", "other"):
        origin = open_origin("dir", {"path": str(folders[0] / path), "target_protocol": "file"})
        assert not origin._origin._on_loop  # type: ignore[attr-defined]
        assert not origin._origin._fs.asynchronous  # type: ignore[attr-defined]


PROGRAM = "from tiercache.remote.rights import local_reader; print(local_reader())"


def reader_behind(*command: str) -> str | None:
    """The reader of local files in another process, or None where a user may not make such mounts."""
    done = subprocess.run([*command, sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    if done.returncode and "Traceback" in done.stderr:
        raise AssertionError(done.stderr)
    return done.stdout.strip() or None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/ns/mnt").exists(), reason="this system tells nothing about mounts")
def test_processes_with_mounts_of_their_own_read_other_files() -> None:
    here = local_reader()
    assert reader_behind() == here
    own = ["unshare", "--mount"] if not os.getuid() else ["unshare", "--map-current-user", "--mount"]
    try:
        others = [reader_behind(*own) for _ in range(2)]
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    if None in others:
        pytest.skip("this user may not make a mount namespace")
    assert here not in others
    assert others[0] != others[1]  # although the second has the number that the first one gave back


def test_where_mounts_cannot_be_told_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*arguments: object, **more: object) -> int:
        raise FileNotFoundError("/proc")

    here = local_reader()
    with monkeypatch.context() as patch:
        patch.setattr("os.open", absent)
        alone = local_reader()
        assert alone == local_reader() != here
    assert alone not in (reader_behind(), here)


def test_files_of_credentials_do_not_matter_to_local_files(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folders[0] / "key.json"))
    local = LocalFileSystem(skip_instance_cache=True)
    one = open_origin("file", filesystem=local).identity
    (folders[0] / "key.json").write_text("edited in place")
    assert open_origin("file", filesystem=local).identity == one
