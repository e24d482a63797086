"""The fault proxy: what it passes, what it breaks, how slow it is, and that signatures survive it."""

from __future__ import annotations

import http.client
import json
import random
import subprocess
import sys
import time
import urllib.request
from typing import TYPE_CHECKING

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from moto.server import ThreadedMotoServer

from tiercache.testing.faultproxy import FAULTS, FaultProxy, Faults, Pace
from tiercache.testing.s3server import S3Server

if TYPE_CHECKING:
    from collections.abc import Iterator

DATA = bytes(range(256)) * 4096


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[S3Server]:
    root = tmp_path_factory.mktemp("s3")
    (root / "lake").mkdir()
    (root / "lake" / "data").write_bytes(DATA)
    with S3Server(root) as server:
        yield server


@pytest.fixture(scope="module")
def running(server) -> Iterator[FaultProxy]:
    with FaultProxy(server.url, random=random.Random(1)) as proxy:
        yield proxy


@pytest.fixture
def proxy(running) -> FaultProxy:
    running.faults = Faults()
    running.on_request = running.on_body = None
    running.clear()
    return running


def get(proxy, *, span="bytes=100-1099", method="GET", path="/lake/data"):
    """(status, headers, body) or the name of what broke."""
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=5)
    try:
        connection.request(method, path, headers={"Range": span} if span else {})
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    except (http.client.HTTPException, OSError) as error:
        return type(error).__name__
    finally:
        connection.close()


def test_passes_everything(proxy, server):
    server.stats.clear()
    assert get(proxy, span="")[2] == DATA
    status, headers, body = get(proxy)
    assert (status, body) == (206, DATA[100:1100])
    assert headers["content-range"] == f"bytes 100-1099/{len(DATA)}"
    assert get(proxy, method="HEAD")[2] == b""
    assert get(proxy, path="/lake/none")[0] == 404
    assert (proxy.stats.requests, server.stats.requests) == (4, 4)
    assert proxy.stats.bytes_sent == server.stats.bytes_sent
    assert proxy.stats.by_method == {"GET": 3, "HEAD": 1}
    assert server.stats.log[0].headers["host"] == f"127.0.0.1:{proxy.port}"


def test_scheduled_faults(proxy):
    proxy.faults.stall_s = 0.01
    proxy.faults.retry_after_s = 7
    proxy.faults.schedule = dict(enumerate(FAULTS, 1))
    seen = {fault: get(proxy) for fault in FAULTS}
    assert seen["throttle"][0] == 503
    assert seen["throttle"][1]["retry-after"] == "7"
    assert b"<Code>SlowDown</Code>" in seen["throttle"][2]
    assert seen["error"][0] == 500
    assert seen["reset"] == seen["mute"] == "ConnectionResetError"
    assert seen["truncate"] == "IncompleteRead"
    assert seen["stall"] in ("IncompleteRead", "ConnectionResetError")
    assert seen["short_length"][0] == 206
    assert seen["short_length"][2] == DATA[100:600]
    assert seen["long_length"][2] == DATA[100:1100] + b"?" * 1000
    assert seen["wrong_range"][1]["content-range"] == f"bytes 101-1100/{len(DATA)}"
    assert seen["wrong_range"][2] == DATA[100:1100]
    assert seen["wrong_etag"][1]["etag"] == '"another"'
    assert seen["ignore_range"][0] == 200
    assert seen["ignore_range"][2] == DATA
    assert seen["corrupt"][2] != DATA[100:1100]
    assert seen["corrupt"][2][1:] == DATA[101:1100]
    assert get(proxy)[2] == DATA[100:1100]
    assert dict(proxy.stats.by_fault) == dict.fromkeys(FAULTS, 1)


def test_a_connection_lives_on_after_a_fault(proxy):
    proxy.faults.schedule = {1: "throttle", 2: "short_length", 3: "long_length", 4: "ignore_range"}
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=5)
    for _ in range(5):
        connection.request("GET", "/lake/data", headers={"Range": "bytes=0-9"})
        answer = connection.getresponse().read()
    assert answer == DATA[:10]
    assert proxy.stats.connections == 1
    connection.close()


def test_probabilities_and_filters(proxy):
    proxy.faults.probability = {"throttle": 0.3, "error": 0.3}
    statuses = [get(proxy)[0] for _ in range(100)]
    assert 10 < statuses.count(503) < 50
    assert 5 < statuses.count(500) < 45
    proxy.faults = Faults(only="GET", only_path="/lake/", schedule={1: "error"}, delay_s=9)
    assert get(proxy, method="HEAD")[0] == 206
    proxy.faults.delay_s = 0
    proxy.clear()
    assert get(proxy, path="/other")[0] == 404
    assert get(proxy)[0] == 500


@pytest.mark.slow
def test_delay_and_bandwidth_of_each_connection(proxy):
    proxy.faults = Faults(delay_s=0.1, connection_bytes_s=len(DATA) / 0.2)
    start = time.perf_counter()
    assert get(proxy, span="")[2] == DATA
    assert 0.29 < time.perf_counter() - start < 2


def test_pace_is_exact_and_saves_nothing_up():
    pace = Pace()
    assert pace.owe(100, 0, 5.0) == 0
    assert pace.owe(100, 1000, 5.0) == pytest.approx(0.1, abs=0.0051)
    assert pace.owe(100, 1000, 5.0) == pytest.approx(0.2, abs=0.0051)
    assert pace.owe(100, 1000, 9.0) == pytest.approx(0.1, abs=0.0051)


def test_hooks(proxy):
    seen = []
    proxy.on_request = lambda number, target: seen.append(("request", number, target))
    proxy.on_body = lambda number, target: seen.append(("body", number, target))
    assert get(proxy)[2] == DATA[100:1100]
    assert seen == [("request", 1, "/lake/data"), ("body", 1, "/lake/data")]


def test_control(proxy):
    def ask(query):
        with urllib.request.urlopen(f"{proxy.url}/__fp?{query}", timeout=5) as answer:
            return json.load(answer)

    ask("delay_s=0.001&p_error=0.5&schedule=1:reset,2:stall&only=GET")
    assert proxy.faults.delay_s == 0.001
    assert proxy.faults.probability == {"error": 0.5}
    assert proxy.faults.schedule == {1: "reset", 2: "stall"}
    assert get(proxy) == "ConnectionResetError"
    facts = ask("log=0")
    assert [(row["number"], row["fault"], row["range"]) for row in facts] == [(1, "reset", "bytes=100-1099")]
    assert ask("")["stats"]["by_fault"] == {"reset": 1}
    assert ask("clear=1")["stats"]["requests"] == 0
    with pytest.raises(urllib.error.HTTPError, match="400"):
        ask("p_nonsense=1")


@pytest.mark.slow
def test_chunked_answers_and_uploads_pass(proxy):
    """moto answers lists in chunks; boto3 uploads with Expect: 100-continue and checks what it signed."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    with FaultProxy(f"http://{host}:{port}") as proxy:
        config = Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"})
        keys = {"aws_access_key_id": "k", "aws_secret_access_key": "s", "region_name": "us-east-1"}
        client = boto3.client("s3", endpoint_url=proxy.url, config=config, **keys)
        client.create_bucket(Bucket="lake")
        client.put_object(Bucket="lake", Key="x", Body=DATA)
        assert client.get_object(Bucket="lake", Key="x")["Body"].read() == DATA
        assert [row["Key"] for row in client.list_objects_v2(Bucket="lake")["Contents"]] == ["x"]
        proxy.faults.probability = {"throttle": 1.0}
        with pytest.raises(ClientError, match="SlowDown"):
            client.list_objects_v2(Bucket="lake")
    moto.stop()


def test_runs_as_a_program(server):
    command = [sys.executable, "-m", "tiercache.testing.faultproxy", server.url, "--set", "schedule=1:error"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().strip()
            with pytest.raises(urllib.error.HTTPError, match="500"):
                urllib.request.urlopen(f"{url}/lake/data", timeout=5)
            with urllib.request.urlopen(f"{url}/lake/data", timeout=5) as answer:
                assert answer.read() == DATA
        finally:
            process.terminate()
