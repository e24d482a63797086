"""Opening origins: options, identities, credentials, forked children, exits, and names that obstore cannot say."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from datetime import UTC, datetime, timedelta, timezone

import fsspec
import pytest

from tiercache.errors import ConfigError, OriginError
from tiercache.model import Outcome
from tiercache.origin import Stat
from tiercache.remote.fsspec_origin import FsspecOrigin, LocalOrigin, doubtful_absence, seconds
from tiercache.remote.objects import ObjectOrigin
from tiercache.remote.opening import open_origin
from tiercache.remote.options import UNDERSTOOD, Unsupported, bucket_region
from tiercache.remote.rights import digest
from tiercache.remote.split import SplitOrigin
from tiercache.testing.s3server import S3Server

KEYS = {"key": "AKIDEXAMPLE", "secret": "SECRETEXAMPLE"}
s3, gs, az, http = (UNDERSTOOD[name] for name in ("s3", "gs", "az", "http"))


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch, tmp_path):
    """What the machine has of its own must not decide here."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def test_s3_options_in_every_style():
    plain = s3(KEYS | {"endpoint_url": "http://h:1/", "client_kwargs": {"region_name": "eu-west-1"}})
    assert plain.config == {
        "endpoint": "http://h:1",
        "access_key_id": "AKIDEXAMPLE",
        "secret_access_key": "SECRETEXAMPLE",
        "region": "eu-west-1",
    }
    assert plain.client == {"allow_http": True}
    assert s3({"client_kwargs": {"endpoint_url": "http://h:1"}} | KEYS).reader == plain.reader
    other = {"username": KEYS["key"], "password": KEYS["secret"], "endpoint_url": "http://h:1"}
    assert s3(other).reader == plain.reader
    kwargs = {"aws_access_key_id": KEYS["key"], "aws_secret_access_key": KEYS["secret"], "endpoint_url": "http://h:1"}
    assert s3({"client_kwargs": kwargs}).reader == plain.reader
    assert s3(KEYS | {"token": "T"}).config["session_token"] == "T"
    assert s3(KEYS | {"requester_pays": True}).config["request_payer"] is True
    style = {"config_kwargs": {"s3": {"addressing_style": "virtual"}, "max_pool_connections": 5}}
    assert s3(KEYS | style).config["virtual_hosted_style_request"] is True
    assert s3(KEYS).needs_region
    assert not plain.needs_region


def test_identities_differ_by_reader_and_place_and_tell_no_secret():
    one = s3(KEYS)
    assert s3(KEYS | {"key": "OTHER"}).reader != one.reader
    assert s3(KEYS | {"endpoint_url": "http://h:1"}).reader != one.reader
    assert s3({"anon": True}).reader == "s3+amazonaws.com+anonymous"
    # Who knows the name of a key only may not read what it opens.
    assert s3(KEYS | {"secret": "GUESSED"}).reader != one.reader
    assert s3(KEYS | {"token": "SESSION"}).reader != one.reader
    for name in KEYS.values():
        assert name not in one.reader


def test_s3_credentials_from_environment_and_profile(monkeypatch, tmp_path):
    with pytest.raises(OriginError, match="no credentials"):
        s3({})
    (tmp_path / "credentials").write_text("[work]\naws_access_key_id=PROFILED\naws_secret_access_key=x\n")
    (tmp_path / "config").write_text("[profile work]\nregion=eu-north-1\nendpoint_url=http://profile:9\n")
    found = s3({"profile": "work"})
    assert found.config["access_key_id"] == "PROFILED"
    assert found.config["region"] == "eu-north-1"
    assert found.config["endpoint"] == "http://profile:9"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ENVIRON")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    assert s3({}).config["access_key_id"] == "ENVIRON"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://env:8")
    assert s3({}).config["endpoint"] == "http://env:8"


def identities(monkeypatch, variable):
    """Who reads, as options that leave it open tell, with two values of a variable."""
    found = []
    for value in ("one", "two"):
        monkeypatch.setenv(variable, value)
        plain = [s3({}).reader, gs({}).reader, az({"account_name": "a"}).reader]
        found.append([*plain, open_origin("memory", {"some": "option"}).identity])
        assert value not in " ".join(found[-1])
    monkeypatch.delenv(variable)
    return found


def test_identities_differ_by_what_the_environment_gives(monkeypatch):
    monkeypatch.setitem(sys.modules, "botocore.session", None)  # as where it is not installed
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ROLE_ARN", "GOOGLE_APPLICATION_CREDENTIALS"):
        one, two = identities(monkeypatch, variable)
        assert all(a != b for a, b in zip(one, two, strict=True)), variable
    here = s3({}).reader
    monkeypatch.setattr("os.getuid", lambda: 12345)
    assert s3({}).reader != here
    monkeypatch.setenv("AWS_ROLE_ARN", "x")
    assert s3(KEYS).reader == "s3+amazonaws.com+" + digest(
        KEYS["key"], KEYS["secret"], None
    )  # options that say who reads


def test_what_obstore_cannot_do_is_left_to_the_filesystem():
    for options in (
        KEYS | {"s3_additional_kwargs": {"SSECustomerKey": "x"}},
        KEYS | {"client_kwargs": {"something": 1}},
        KEYS | {"config_kwargs": {"proxies": {"http": "x"}}},
        KEYS | {"session": object()},
    ):
        with pytest.raises(Unsupported):
            s3(options)
    with pytest.raises(ConfigError, match="belong together"):
        s3({"key": "x"})
    origin = open_origin("s3", KEYS | {"s3_additional_kwargs": {"RequestPayer": "requester"}})
    assert isinstance(origin._origin, FsspecOrigin)


def test_gs_az_and_http_options(tmp_path):
    assert gs({"token": "anon"}).config == {"skip_signature": True}
    (tmp_path / "key.json").write_text("{}")
    assert gs({"token": str(tmp_path / "key.json")}).config == {"application_credentials": str(tmp_path / "key.json")}
    with pytest.raises(Unsupported):
        gs({"token": {"type": "service_account"}})
    assert az({"account_name": "a", "sas_token": "s"}).config == {"account_name": "a", "sas_key": "s"}
    with pytest.raises(Unsupported):
        az({"connection_string": "x"})
    assert http({"headers": {"Authorization": "Bearer t"}}).client["default_headers"] == {"Authorization": "Bearer t"}
    assert http({"headers": {"Authorization": "Bearer t"}}).reader != http({}).reader
    with pytest.raises(Unsupported):
        http({"client_kwargs": {"auth": object()}})


def test_which_origin_serves_what():
    def kind(*arguments, **more):
        origin = open_origin(*arguments, **more)._origin
        return type(origin._first if isinstance(origin, SplitOrigin) else origin)

    assert kind("s3", KEYS) is ObjectOrigin
    assert kind("https") is ObjectOrigin
    assert kind("s3", KEYS, through="fsspec") is FsspecOrigin
    assert kind("file") is LocalOrigin
    assert kind("memory") is FsspecOrigin
    assert kind("file", filesystem=fsspec.filesystem("file")) is FsspecOrigin
    with pytest.raises(ConfigError, match="nonsense"):
        open_origin("nonsense")
    same = open_origin("s3", KEYS), open_origin("s3", KEYS, through="fsspec")
    assert same[0].identity == same[1].identity


@pytest.fixture
def server(tmp_path):
    (tmp_path / "root" / "lake").mkdir(parents=True)
    (tmp_path / "root" / "lake" / "x").write_bytes(b"0123456789")
    with S3Server(tmp_path / "root") as server:
        yield server


def test_region_of_a_bucket(server):
    host = f"127.0.0.1:{server.port}"
    assert bucket_region("lake", host, secure=False) == "us-east-1"
    assert server.stats.log[-1].operation == "HeadBucket"
    assert bucket_region("lake", "127.0.0.1:1", secure=False) == "us-east-1"


@pytest.mark.slow
def test_names_that_obstore_cannot_say(server):
    async def check():
        origin = open_origin("s3", KEYS | {"endpoint_url": server.url})
        await origin.write("lake/a//b", b"odd")
        assert await origin.read_tail("lake/a//b", 10) == ((await origin.stat(["lake/a//b"]))[0], b"odd")
        await origin.write("lake//x", b"not x")
        assert (await origin.read_tail("lake//x", 10))[1] == b"not x"
        assert (await origin.read_tail("lake/x", 10))[1] == b"0123456789"
        assert [row.path for row in await origin.list("")] == ["lake"]
        assert await origin.delete(["lake/a//b", "lake/none"]) == [Outcome.HIT, Outcome.GONE]
        await origin.close()
        plain = open_origin("http")
        url = f"{server.url}/lake/x?token=1"
        (stat,) = await plain.stat([url])
        assert isinstance(stat, Stat)
        assert (await plain.read_tail(url, 3)) == (stat, b"789")
        assert await plain.stat([f"{server.url}/lake/x/", f"{server.url}/lake%2Fx%2F"]) == [Outcome.GONE] * 2
        await plain.close()

    asyncio.run(check())


SCRIPT = """
    import asyncio, os, sys
    from tiercache.buffers import Buffer
    from tiercache.origin import Span
    from tiercache.remote.opening import open_origin

    def opened():
        return open_origin("s3", {"key": "k", "secret": "s", "endpoint_url": sys.argv[1]})

    async def read(origin, count=1):
        (stat,) = await origin.stat(["lake/x"])
        targets = [bytearray(10) for _ in range(count)]
        spans = [origin.read(stat, Span(0, 10), [Buffer.of(target, writable=True)]) for target in targets]
        await asyncio.gather(*spans)
        assert all(target == b"0123456789" for target in targets)
"""


def run_script(server, text: str) -> subprocess.CompletedProcess[str]:
    script = textwrap.dedent(SCRIPT) + textwrap.dedent(text)
    return subprocess.run([sys.executable, "-c", script, server.url], capture_output=True, text=True, timeout=60)


@pytest.mark.slow
def test_a_process_ends_well_right_after_reading(server):
    """obstore's coroutines abort the interpreter at its end; our threads do not, closed or not."""
    for _ in range(4):
        done = run_script(server, "asyncio.run(read(opened(), 100))")
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_forked_child_opens_again(server):
    done = run_script(
        server,
        """
        from tiercache.errors import UnavailableError
        origin = opened()
        asyncio.run(read(origin, 20))
        child = os.fork()
        if not child:
            try:
                asyncio.run(origin.stat(["lake/x"]))
            except UnavailableError as error:
                assert "forked" in str(error), error
                async def again():
                    fresh = opened()
                    await read(fresh)
                    await fresh.close()
                asyncio.run(again())
                os._exit(7)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        sys.exit(os.waitstatus_to_exitcode(status))
        """,
    )
    assert done.returncode == 7, done.stderr


def test_times_of_every_filesystem():
    moment = datetime(2026, 11, 20, 13, 0, tzinfo=UTC)
    told = moment.timestamp()
    for value in (
        told,
        int(told),
        moment,
        moment.replace(tzinfo=None),
        moment.astimezone(timezone(timedelta(hours=3))),
        moment.isoformat(),
        "Fri, 20 Nov 2026 13:00:00 GMT",
    ):
        assert seconds(value) == told, value
    assert seconds(None) is seconds("yesterday") is None


def test_not_found_for_another_reason_is_not_absence():
    class Answer(Exception):
        status = 404

    def raised(cause):
        error = FileNotFoundError("x")
        error.__cause__ = cause
        return error

    assert not doubtful_absence(raised(None))
    assert not doubtful_absence(raised(KeyError("x")))
    assert not doubtful_absence(raised(Answer()))
    assert doubtful_absence(raised(ConnectionError("down")))
