"""Mounts of one process: what is one, what is two, and what a mount made in vain leaves behind."""

from __future__ import annotations

import asyncio
import os
import threading
import zipfile

import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from tests.connectors.conftest import SMALL, Store, s3_options
from tiercache.errors import ConfigError, OriginError
from tiercache.sync import io_loop
from tiercache.testing.s3server import S3Server
from tiercache_connectors.fsspec_fs import TierCacheFileSystem

PATIENCE_S = 60


@pytest.fixture
def folders(tmp_path):
    """Two working directories, with files of one name and one time."""
    made = [tmp_path / "a", tmp_path / "b"]
    for folder in made:
        (folder / "data").mkdir(parents=True)
        (folder / "data" / "x").write_text(folder.name * 1000)
        os.utime(folder / "data" / "x", (1e9, 1e9))
        with zipfile.ZipFile(folder / "d.zip", "w") as archive:
            archive.writestr(zipfile.ZipInfo("x"), folder.name * 1000)
    return made


TARGETS = {
    "zip": lambda: {"target_protocol": "zip", "target_options": {"fo": "d.zip"}},
    "directory": lambda: {"target_protocol": "dir", "target_options": {"path": "data", "target_protocol": "file"}},
    "given": lambda: {"fs": DirFileSystem("data", LocalFileSystem(), skip_instance_cache=True)},
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_relative_target_is_that_of_the_working_directory(name, folders, tmp_path, monkeypatch):
    settings = SMALL | {"directory": str(tmp_path / "cache"), "skip_instance_cache": True}
    made = []
    try:
        for folder in folders:
            monkeypatch.chdir(folder)
            made.append(TierCacheFileSystem(**TARGETS[name](), **settings))
            assert made[-1].cat_file("x") == folder.name.encode() * 1000
        assert [fs.cat_file("x")[:1] for fs in made] == [b"a", b"b"]
        assert made[0].mount.cache is made[1].mount.cache
    finally:
        for fs in made:
            fs.close()


def test_a_wrapper_by_name(cached, folders):
    fs = cached("dir", {"path": str(folders[0] / "data"), "target_protocol": "file"})
    assert fs.ls("", detail=False) == ["x"]
    assert fs.cat_file("x", 10, 20) == b"a" * 10
    with fs.open("x") as stream:
        assert stream.read() == b"a" * 1000
    fs.pipe_file("y", b"new")
    assert fs.cat_file("y") == b"new"
    with pytest.raises(ConfigError, match="options of zip"):
        assert not cached("zip", {"fo": str(folders[0] / "d.zip"), "mode": "q"}).mount


def test_who_comes_after_a_change_of_the_environment_reads_with_it(tmp_path, monkeypatch):
    (tmp_path / "root" / "vault").mkdir(parents=True)
    (tmp_path / "root" / "vault" / "x").write_bytes(b"secret")
    with S3Server(tmp_path / "root") as server:
        vault = Store("s3", s3_options(server.url), server)
        options = {name: each for name, each in vault.options.items() if name not in ("key", "secret")}
        settings = SMALL | {"directory": str(tmp_path / "cache"), "skip_instance_cache": True}
        settings |= {"target_protocol": "s3", "target_options": options}
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "friend")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
        friend, same = TierCacheFileSystem(**settings), TierCacheFileSystem(**settings)
        try:
            assert friend.cat_file("vault/x") == b"secret"
            assert same.mount is friend.mount
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", "stranger")
            server.refused = {"stranger"}
            stranger = TierCacheFileSystem(**settings)
            with pytest.raises(OriginError):
                stranger.cat_file("vault/x")
            assert friend.cat_file("vault/x") == b"secret"
            stranger.close()
        finally:
            friend.close()


class Slow(LocalFileSystem):
    """Local files; whoever opens them in the thread that was named waits there."""

    protocol = "slow"
    waits: threading.Thread | None = None
    came, go_on = threading.Event(), threading.Event()

    @property
    def async_impl(self):
        if threading.current_thread() is self.waits and threading.current_thread() is not threading.main_thread():
            self.came.set()
            self.go_on.wait(PATIENCE_S)
        return False


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="processes share by memory files")
def test_a_mount_made_in_vain_leaves_nothing(tmp_path):
    given = Slow(skip_instance_cache=True)
    settings = SMALL | {"directory": str(tmp_path / "cache"), "share": True, "linger_s": 0.1}
    settings |= {"skip_instance_cache": True}
    one, two = TierCacheFileSystem(fs=given, **settings), TierCacheFileSystem(fs=given, **settings)
    found = []
    thread = threading.Thread(target=lambda: found.append(one.mount))

    async def on_loop():
        return two.mount

    thread.start()
    try:
        Slow.waits = thread
        assert Slow.came.wait(PATIENCE_S)
        mount = asyncio.run_coroutine_threadsafe(on_loop(), io_loop()).result(PATIENCE_S)
        Slow.go_on.set()
        thread.join(PATIENCE_S)
        assert found == [mount]
        mount.wait(asyncio.sleep(0))  # what was told to the loop before has been done
        assert len(mount.cache.notes._watchers) == 1
    finally:
        Slow.go_on.set()
        two.close()
