"""Two readers of one directory, of whom the origin refuses one: what the other cached is not for him."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

from tests.connectors.conftest import SMALL, Store, s3_options
from tiercache.errors import OriginError
from tiercache.testing.s3server import S3Server

DATA = bytes(range(256)) * 1000
PATH = "vault/deep/secret.bin"


@pytest.fixture
def vault(tmp_path):
    """A server of its own, that refuses the key "stranger" and unsigned requests."""
    folder = tmp_path / "root" / "vault" / "deep"
    folder.mkdir(parents=True)
    (folder / "secret.bin").write_bytes(DATA)
    (folder / "footer.parquet").write_bytes(DATA)
    with S3Server(tmp_path / "root") as server:
        server.refused = {"stranger", ""}
        yield Store("s3", s3_options(server.url), server)


def refused(vault, read):
    """Asserts that a read fails for lack of rights, and that it was the origin that said so."""
    before = vault.server.stats.by_status[403]
    with pytest.raises(OriginError) as caught:
        read()
    assert isinstance(caught.value, OSError)
    assert not isinstance(caught.value, FileNotFoundError)
    assert vault.server.stats.by_status[403] > before


LOOKS = {
    "info": lambda fs: fs.info(PATH),
    "info of a footed file": lambda fs: fs.info("vault/deep/footer.parquet"),
    "exists": lambda fs: fs.exists(PATH),
    "ls": lambda fs: fs.ls("vault/deep"),
    "cat": lambda fs: fs.cat_file(PATH),
    "part": lambda fs: fs.cat_file(PATH, 100, 200),
    "open": lambda fs: fs.open(PATH).read(),
    "glob": lambda fs: fs.glob("vault/deep/*"),
}


@pytest.mark.parametrize(
    "options", [{"key": "stranger"}, {"anon": True}, {"s3_additional_kwargs": {"RequestPayer": "x"}}]
)
def test_who_is_refused_gets_nothing_that_another_reader_of_the_process_cached(cached, vault, tmp_path, options):
    directory = str(tmp_path / "cache")
    owner = cached("s3", vault.options, directory=directory)
    if "anon" in options:
        others = {name: each for name, each in vault.options.items() if name not in ("key", "secret")} | options
    else:
        others = vault.options | {"key": "stranger"} | options  # with the right secret, even
    stranger = cached("s3", others, directory=directory)
    for look in LOOKS.values():
        look(owner)
    assert owner.mount.cache is stranger.mount.cache
    for look in LOOKS.values():
        refused(vault, lambda look=look: look(stranger))
    vault.server.stats.clear()
    assert owner.cat_file(PATH) == DATA
    assert vault.server.stats.requests == 0


def test_who_knows_a_keys_name_alone_does_not_share_what_it_opens(cached, vault, tmp_path):
    directory = str(tmp_path / "cache")
    owner = cached("s3", vault.options, directory=directory)
    assert owner.cat_file(PATH) == DATA
    guesser = cached("s3", vault.options | {"secret": "guessed"}, directory=directory)
    vault.server.refused.add(vault.options["key"])  # as one who checks signatures does with a wrong secret
    refused(vault, lambda: guesser.cat_file(PATH))
    assert owner.cat_file(PATH) == DATA


PROGRAM = """
    import json, sys
    from tiercache_connectors.fsspec_fs import TierCacheFileSystem

    arguments = json.loads(sys.argv[1])
    fs = TierCacheFileSystem(target_protocol="s3", **arguments)
    for path in sys.stdin:
        try:
            answer = fs.cat_file(path.strip())
            print("read", len(answer), flush=True)
        except OSError as error:
            print(type(error).__name__, 0, flush=True)
    fs.close()
"""


class Reader:
    """A process that reads what it is told to."""

    def __init__(self, directory, options):
        arguments = SMALL | {"directory": directory, "share": True, "linger_s": 0.5, "target_options": options}
        command = [sys.executable, "-c", textwrap.dedent(PROGRAM), json.dumps(arguments)]
        environ = {name: value for name, value in os.environ.items() if name != "TIERCACHE_SHARE"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ)

    def cat(self, path):
        self.process.stdin.write(path + "\n")
        self.process.stdin.flush()
        kind, size = self.process.stdout.readline().split()
        return kind, int(size)

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="processes share by memory files")
def test_who_is_refused_gets_nothing_that_another_process_cached(vault, tmp_path):
    directory = str(tmp_path / "cache")
    readers = [Reader(directory, vault.options)]
    try:
        owner = readers[0]
        assert owner.cat(PATH) == ("read", len(DATA))
        readers.append(Reader(directory, vault.options | {"key": "stranger"}))
        readers.append(Reader(directory, vault.options | {"secret": "guessed"}))
        readers.append(Reader(directory, vault.options))
        stranger, guesser, friend = readers[1:]
        asked = vault.server.stats.requests
        assert friend.cat(PATH) == ("read", len(DATA))
        assert vault.server.stats.requests == asked
        assert stranger.cat(PATH) == ("OriginError", 0)
        assert vault.server.stats.requests > asked
        vault.server.refused.add(vault.options["key"])
        assert guesser.cat(PATH) == ("OriginError", 0)
        assert [reader.cat(PATH) for reader in (owner, friend)] == [("read", len(DATA))] * 2
    finally:
        for reader in readers:
            reader.close()
