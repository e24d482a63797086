"""Identities: the same in every process that reads with the same credentials, another for every other reader."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from tiercache.remote import rights
from tiercache.remote.opening import open_origin
from tiercache.remote.options import UNDERSTOOD
from tiercache.remote.rights import digest, local_reader, told

s3, gs, az, http = (UNDERSTOOD[name] for name in ("s3", "gs", "az", "http"))

SECRETS = ["SECRET-ONE", "SECRET-TWO"]
READERS = {
    "s3 key": ["s3", {"key": "K", "secret": "SECRET-ONE"}],
    "s3 other secret": ["s3", {"key": "K", "secret": "SECRET-TWO"}],
    "s3 session": ["s3", {"key": "K", "secret": "SECRET-ONE", "token": "T"}],
    "s3 elsewhere": ["s3", {"key": "K", "secret": "SECRET-ONE", "endpoint_url": "http://h:1"}],
    "s3 over fsspec": ["s3", {"key": "K", "secret": "SECRET-ONE", "s3_additional_kwargs": {"b": 1, "a": {"c": 2}}}],
    "s3 anonymous": ["s3", {"anon": True}],
    "s3 of the environment": ["s3", {}],
    "http": ["https", {}],
    "http token": ["https", {"headers": {"Authorization": "Bearer SECRET-ONE", "X": "1"}}],
    "http other token": ["https", {"headers": {"Authorization": "Bearer SECRET-TWO", "X": "1"}}],
    "http login": ["https", {"client_kwargs": {"auth": ["user", "SECRET-ONE"]}}],
    "http other login": ["https", {"client_kwargs": {"auth": ["user", "SECRET-TWO"]}}],
    "gs anonymous": ["gs", {"token": "anon"}],
    "az key": ["az", {"account_name": "a", "account_key": "SECRET-ONE"}],
    "az other key": ["az", {"account_name": "a", "account_key": "SECRET-TWO"}],
    "az principal": ["az", {"account_name": "a", "client_id": "c", "tenant_id": "t", "client_secret": "SECRET-ONE"}],
    "az other principal": ["az", {"account_name": "a", "client_id": "c", "tenant_id": "t", "client_secret": "x"}],
    "file": ["file", {}],
    "ftp": ["ftp", {"host": "h", "username": "u", "password": "SECRET-ONE"}],
    "ftp other": ["ftp", {"host": "h", "username": "u", "password": "SECRET-TWO"}],
}
PROGRAM = """
import json, sys
from tiercache.remote.opening import _identity, open_origin
for name, (protocol, options) in json.load(sys.stdin).items():
    if protocol in ("az", "ftp", "gs"):  # whose filesystem need not be there, or would connect
        print(name, _identity(protocol, options), sep="\\t")
    else:
        print(name, open_origin(protocol, options).identity, sep="\\t")
"""


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch, tmp_path):
    """What the machine has of its own must not decide here."""
    for name in rights.RIGHTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ENVIRON")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SECRET-ENVIRON")


def spawned(**environ) -> dict[str, str]:
    """The identities as a fresh process has them."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(READERS),
        env=dict(os.environ) | environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return dict(line.split("\t") for line in done.stdout.splitlines())


@pytest.mark.slow
def test_two_processes_agree_on_who_reads_and_all_readers_differ():
    one, two = spawned(PYTHONHASHSEED="1"), spawned(PYTHONHASHSEED="2")
    assert one == two
    assert one.keys() == READERS.keys()
    assert len(set(one.values())) == len(READERS)
    assert not [secret for secret in [*SECRETS, "ENVIRON"] if secret in " ".join(one.values())]
    for name, value in {"AWS_ACCESS_KEY_ID": "OTHER", "AWS_SECRET_ACCESS_KEY": "other"}.items():
        other = spawned(**{name: value})
        assert other["s3 of the environment"] != one["s3 of the environment"]
        assert other["s3 key"] == one["s3 key"]


def test_local_files_are_those_of_a_user_with_these_groups_and_this_root(monkeypatch):
    here = open_origin("file").identity
    assert open_origin("file").identity == here
    for name, value in {"getuid": 4711, "geteuid": 4711, "getegid": 4711, "getgroups": [4711]}.items():
        with monkeypatch.context() as patch:
            patch.setattr(f"os.{name}", lambda value=value: value)
            assert local_reader() not in here
            assert open_origin("file").identity != here
    other = os.stat(Path(__file__))
    with monkeypatch.context() as patch:
        patch.setattr("os.stat", lambda path: other)
        assert local_reader() not in here


def test_filesystems_that_were_given_are_told_apart_by_all_that_they_were_made_of(tmp_path):
    def given(filesystem):
        return open_origin("dir", filesystem=filesystem).identity

    local = LocalFileSystem(skip_instance_cache=True)
    one = given(DirFileSystem(str(tmp_path / "a"), local, skip_instance_cache=True))
    assert given(DirFileSystem(str(tmp_path / "b"), local, skip_instance_cache=True)) != one
    again = DirFileSystem(str(tmp_path / "a"), LocalFileSystem(skip_instance_cache=True), skip_instance_cache=True)
    assert given(again) == one
    assert given(DirFileSystem(path=str(tmp_path / "a"), fs=local, skip_instance_cache=True)) != one
    import s3fs

    anonymous = s3fs.S3FileSystem(True, skip_instance_cache=True)
    assert open_origin("s3", filesystem=anonymous).identity != s3({}).reader


def test_what_lives_in_memory_is_of_one_process():
    def in_child(text):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.write(write, text().encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        os.close(write)
        with os.fdopen(read) as stream:
            return stream.read()

    session = object()
    for identity in (
        lambda: open_origin("memory").identity,
        lambda: open_origin("memory", filesystem=fsspec.filesystem("memory")).identity,
        lambda: open_origin("s3", filesystem=None, options={"key": "k", "secret": "s", "session": session}).identity,
        lambda: told(session),
    ):
        here, there = identity(), in_child(identity)
        assert identity() == here
        assert there
        assert there != here


class Login:
    """Credentials whose default text says where they lie."""


def test_objects_that_nobody_can_tell_are_themselves_alone():
    one, two = Login(), Login()
    assert told(one) == told(one) != told(two)
    before = {told(one), told(two)}
    del one, two
    seen = [told(Login()) for _ in range(100)]  # at the same place in memory, most of them
    assert len(set(seen)) == 100
    assert not before & set(seen)
    assert len(rights._own._met) <= 10


def test_options_are_told_by_what_they_say():
    assert told({"a": [1, 2], "b": {"x", "y"}}) == told({"b": {"y", "x"}, "a": (1, 2)})
    assert told({"a": "1"}) != told({"a": 1}) != told({"a": True})
    assert told(["ab", "c"]) != told(["a", "bc"])
    assert told(["a', 'b"]) != told(["a", "b"])
    assert told(b"a") != told("a") != told(Path("a"))
    assert digest("\udc80")


def test_google_credentials_are_told_by_the_file(tmp_path, monkeypatch):
    key = tmp_path / "key.json"
    key.write_text("one")
    first = gs({"token": str(key)}).reader
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(key))
    default = gs({}).reader
    key.write_text("two")
    assert gs({"token": str(key)}).reader != first
    assert gs({}).reader != default
    (tmp_path / ".config" / "gcloud").mkdir(parents=True)
    default = gs({}).reader
    (tmp_path / ".config" / "gcloud" / "application_default_credentials.json").write_text("somebody")
    assert gs({}).reader != default
