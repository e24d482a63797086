"""Roles, web identities and single sign-on: keys that change by the hour, readers that do not."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import pytest

from tiercache.errors import TierCacheError
from tiercache.remote import rights
from tiercache.remote.opening import open_origin
from tiercache.remote.options import s3_options
from tiercache.remote.retry import Patience
from tiercache.testing.s3server import S3Server

ROLE = "arn:aws:iam::123456789012:role/readers"
KEYS = "aws_access_key_id=K\naws_secret_access_key=S\n"
CONFIGS = {
    "role": f"[profile w]\nrole_arn={ROLE}\nsource_profile=s\n[profile s]\n{KEYS}",
    "environment": f"[profile w]\nrole_arn={ROLE}\ncredential_source=Environment\n",
    "web": f"[profile w]\nrole_arn={ROLE}\nweb_identity_token_file=TOKEN\n",
    "single sign-on": "[profile w]\nsso_session=x\nsso_account_id=1\nsso_role_name=r\n"
    "[sso-session x]\nsso_start_url=https://x/start\nsso_region=eu-west-1\n",
    "chain": f"[profile w]\nrole_arn={ROLE}\nsource_profile=s\n[profile s]\nrole_arn={ROLE}2\nsource_profile=t\n"
    f"[profile t]\n{KEYS}",
}
CHANGES = {
    "role": [("readers", "others"), ("source_profile", "external_id=e\nsource_profile"), ("=K", "=L"), ("=S", "=T")],
    "environment": [("readers", "others")],
    "web": [("readers", "others"), ("TOKEN", "OTHER")],
    "single sign-on": [("sso_account_id=1", "sso_account_id=2"), ("name=r", "name=q"), ("//x/", "//y/")],
    "chain": [("readers2", "others"), ("=K", "=L")],
}


@pytest.fixture(autouse=True)
def configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing but what a test writes."""
    for name in [*rights.RIGHTS, "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ENVIRON")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SECRET-ENVIRON")
    for name in ("TOKEN", "OTHER"):
        (tmp_path / name).write_text("by the hour")


def reader(folder: Path, text: str) -> str:
    """Who reads with a configuration, as another process has it."""
    for name in ("TOKEN", "OTHER"):
        text = text.replace(f"={name}\n", f"={folder / name}\n")
    (folder / "config").write_text(text)
    program = "from tiercache.remote.options import s3_options; print(s3_options({'profile': 'w'}).reader)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    here = s3_options({"profile": "w"})
    assert done.stdout.strip() == here.reader  # although nobody has been asked for keys yet
    assert here.credentials is not None
    assert "access_key_id" not in here.config
    return here.reader


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_processes_of_one_configuration_are_one_reader_and_others_are_others(name: str, tmp_path: Path) -> None:
    text = CONFIGS[name]
    readers = [reader(tmp_path, text), *(reader(tmp_path, text.replace(*change, 1)) for change in CHANGES[name])]
    assert len(set(readers)) == len(readers)
    (tmp_path / "TOKEN").write_text("the next hour")
    assert reader(tmp_path, text) == readers[0]


def test_two_callers_of_one_role_are_two_readers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config").write_text(CONFIGS["environment"])
    one = s3_options({"profile": "w"}).reader
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "SOMEBODY")
    assert s3_options({"profile": "w"}).reader != one


def test_a_web_identity_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in Kubernetes: no files of configuration, and a token that somebody else renews."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ROLE_ARN", ROLE)
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "TOKEN"))
    one = s3_options({}).reader
    (tmp_path / "TOKEN").write_text("the next hour")
    assert s3_options({}).reader == one
    monkeypatch.setenv("AWS_ROLE_ARN", ROLE + "2")
    assert s3_options({}).reader != one
    monkeypatch.setenv("AWS_ROLE_ARN", ROLE)
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "OTHER"))
    assert s3_options({}).reader != one


class Tokens:
    """A service that gives out keys: ASIA1, ASIA2, ... each good for a minute; or refuses."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.refuses = False
        tokens = self

        class Answers(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = parse_qs(self.rfile.read(int(self.headers["content-length"])).decode())
                tokens.asked.append(asked["RoleArn"][0])
                body = tokens.answer(asked["Action"][0])
                self.send_response(403 if tokens.refuses else 200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                """Says nothing."""

        self.server = HTTPServer(("127.0.0.1", 0), Answers)

    def answer(self, action: str) -> bytes:
        until = (datetime.now(UTC) + timedelta(minutes=1)).isoformat()
        keys = f"<AccessKeyId>ASIA{len(self.asked)}</AccessKeyId><SecretAccessKey>s</SecretAccessKey>"
        keys += f"<SessionToken>t</SessionToken><Expiration>{until}</Expiration>"
        if self.refuses:
            return b"<ErrorResponse><Error><Code>AccessDenied</Code><Message>no</Message></Error></ErrorResponse>"
        result = f"<{action}Result><Credentials>{keys}</Credentials></{action}Result>"
        return f"<{action}Response>{result}</{action}Response>".encode()


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tokens]:
    service = Tokens()
    thread = threading.Thread(target=service.server.serve_forever)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://127.0.0.1:{service.server.server_port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield service
    service.server.shutdown()
    thread.join()
    service.server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["role", "web"])
def test_keys_of_roles_are_renewed(name: str, tokens: Tokens, tmp_path: Path) -> None:
    (tmp_path / "config").write_text(CONFIGS[name].replace("=TOKEN", f"={tmp_path / 'TOKEN'}"))
    for number in range(1, 5):  # of each bucket's own, for obstore keeps what it was given a tenth of a second
        (tmp_path / "root" / f"lake{number}").mkdir(parents=True)
        (tmp_path / "root" / f"lake{number}" / "x").write_bytes(b"0123456789")
    with S3Server(tmp_path / "root") as server:

        async def read() -> None:
            options = {"profile": "w", "endpoint_url": server.url}
            origin = open_origin("s3", options, patience=Patience(attempts=2, deadline_s=10))
            assert not tokens.asked
            for number in range(1, 4):
                assert (await origin.read_tail(f"lake{number}/x", 3))[1] == b"789"  # type: ignore[index]
                assert len(tokens.asked) == number
                # The store takes the keys of up to now no more, as when their hour is over.
                server.refused = {f"ASIA{each + 1}" for each in range(len(tokens.asked))}
            assert set(tokens.asked) == {ROLE}
            tokens.refuses = True
            with pytest.raises(TierCacheError):
                await origin.read_tail("lake4/x", 3)
            await origin.close()

        asyncio.run(read())


def test_keys_of_the_environment_that_expire_are_their_own_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_CREDENTIAL_EXPIRATION", (datetime.now(UTC) + timedelta(hours=2)).isoformat())
    one = s3_options({})
    assert one.credentials is not None and one.credentials()["access_key_id"] == "ENVIRON"
    assert one.credentials()["expires_at"] > datetime.now(UTC)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    assert s3_options({}).reader != one.reader


def test_a_program_that_gives_keys_is_known_by_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"Version": 1, "AccessKeyId": "K", "SecretAccessKey": "s", "SessionToken": "t"}
    keys["Expiration"] = (datetime.now(UTC) + timedelta(hours=2)).isoformat()
    readers = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "keys.json").write_text(json.dumps(keys | {"AccessKeyId": folder}))
        (tmp_path / "config").write_text("[profile w]\ncredential_process=cat keys.json\n")
        monkeypatch.chdir(tmp_path / folder)
        readers.append(s3_options({"profile": "w"}).reader)
        assert s3_options({"profile": "w"}).reader == readers[-1]
    assert len(set(readers)) == 2
    assert os.getcwd() == str(tmp_path / "two")
