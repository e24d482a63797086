"""The test S3 server against real clients, and against moto by one table of semantics (moto is never timed)."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import io
import json
import subprocess
import sys
import urllib.request
from typing import TYPE_CHECKING

import boto3
import fsspec
import obstore
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from moto.server import ThreadedMotoServer
from obstore.store import S3Store
from pyarrow import fs as pafs

from tiercache.testing.httpwire import aws_chunked
from tiercache.testing.s3server import S3Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.slow

DATA = bytes(range(256)) * 40
MD5 = hashlib.md5(DATA).hexdigest()
OTHER = '"00000000000000000000000000000000"'
ODD_KEY = "sp ace/ü+%&=#?.bin"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    # Its state belongs to the process: other tests may have left buckets.
    reset = urllib.request.Request(f"{url}/moto-api/reset", method="POST")
    urllib.request.urlopen(reset, timeout=10).close()
    yield url
    server.stop()


def client_of(url: str):
    config = Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"})
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=url, config=config, **keys)


@pytest.fixture(scope="module")
def ours(server):
    return filled(server.url)


@pytest.fixture(scope="module")
def theirs(moto):
    return filled(moto)


def filled(url: str):
    client = client_of(url)
    client.create_bucket(Bucket="mtx")
    client.put_object(Bucket="mtx", Key="d/a.bin", Body=DATA, Metadata={"k": "v"}, ContentType="text/x-test")
    client.put_object(Bucket="mtx", Key="empty", Body=b"")
    for i in range(25):
        client.put_object(Bucket="mtx", Key=f"l/{i % 5}/x{i:03d}", Body=b"x")
    return client


def get(**options) -> Callable:
    def call(client):
        answer = client.get_object(Bucket="mtx", **({"Key": "d/a.bin"} | options))
        status = answer["ResponseMetadata"]["HTTPStatusCode"]
        return status, answer.get("ContentRange"), hashlib.md5(answer["Body"].read()).hexdigest()

    return call


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def modified(client):
    return client.head_object(Bucket="mtx", Key="d/a.bin")["LastModified"]


def pages(client):
    keys, more, count = [], {}, 0
    while True:
        page = client.list_objects_v2(Bucket="mtx", Prefix="l/", MaxKeys=7, **more)
        keys += [row["Key"] for row in page["Contents"]]
        count += 1
        if not page["IsTruncated"]:
            return len(keys), count, keys == sorted(keys)
        more = {"ContinuationToken": page["NextContinuationToken"]}


def pages_v1(client):
    keys, more = [], {}
    while True:
        page = client.list_objects(Bucket="mtx", Prefix="l/", Delimiter="/", MaxKeys=2, **more)
        keys += [row["Prefix"] for row in page["CommonPrefixes"]]
        if not page["IsTruncated"]:
            return keys
        more = {"Marker": page["NextMarker"]}


def multipart(client):
    upload = client.create_multipart_upload(Bucket="mtx", Key="mp", ContentType="text/x-mp")["UploadId"]
    parts = []
    for number in (1, 2):
        call = {"Bucket": "mtx", "Key": "mp", "UploadId": upload, "PartNumber": number}
        etag = client.upload_part(Body=bytes([number]) * (5 << 20), **call)["ETag"]
        parts.append({"PartNumber": number, "ETag": etag})
    before = outcome(lambda c: c.head_object(Bucket="mtx", Key="mp"), client)
    client.complete_multipart_upload(Bucket="mtx", Key="mp", UploadId=upload, MultipartUpload={"Parts": parts})
    head = client.head_object(Bucket="mtx", Key="mp")
    client.delete_object(Bucket="mtx", Key="mp")
    return before, head["ContentLength"], head["ETag"], head["ContentType"]


def aborted(client):
    upload = client.create_multipart_upload(Bucket="mtx", Key="ab")["UploadId"]
    client.upload_part(Bucket="mtx", Key="ab", UploadId=upload, PartNumber=1, Body=b"x")
    client.abort_multipart_upload(Bucket="mtx", Key="ab", UploadId=upload)
    client.upload_part(Bucket="mtx", Key="ab", UploadId=upload, PartNumber=1, Body=b"x")


def copied(client):
    etag = client.copy_object(Bucket="mtx", Key="cp", CopySource="mtx/d/a.bin")["CopyObjectResult"]["ETag"]
    head = client.head_object(Bucket="mtx", Key="cp")
    client.delete_object(Bucket="mtx", Key="cp")
    return etag, head["Metadata"], head["ContentType"]


def deleted(client):
    for key in ("x/1", "x/2"):
        client.put_object(Bucket="mtx", Key=key, Body=b"x")
    wanted = [{"Key": key} for key in ("x/1", "x/2", "x/none")]
    gone = client.delete_objects(Bucket="mtx", Delete={"Objects": wanted})["Deleted"]
    return len(gone), client.list_objects_v2(Bucket="mtx", Prefix="x/")["KeyCount"]


def odd_keys(client):
    keys = [ODD_KEY, "q", "q/b", "dd/", "w//z", "e/./f"]
    for key in keys:
        client.put_object(Bucket="mtx", Key=key, Body=key.encode())
    back = [client.get_object(Bucket="mtx", Key=key)["Body"].read().decode() for key in keys]
    rows = client.list_objects_v2(Bucket="mtx")["Contents"]
    listed = sorted(row["Key"] for row in rows if row["Key"] in keys)
    client.delete_objects(Bucket="mtx", Delete={"Objects": [{"Key": key} for key in keys]})
    return back == keys, listed == sorted(keys)


def overwritten(client):
    first = client.put_object(Bucket="mtx", Key="ow", Body=b"1")["ETag"]
    client.put_object(Bucket="mtx", Key="ow", Body=b"22", IfMatch=first)
    again = outcome(lambda c: c.put_object(Bucket="mtx", Key="ow", Body=b"3", IfMatch=first), client)
    body = client.get_object(Bucket="mtx", Key="ow")["Body"].read()
    client.delete_object(Bucket="mtx", Key="ow")
    return again, body


def presigned(client):
    url = client.generate_presigned_url("get_object", Params={"Bucket": "mtx", "Key": "d/a.bin"})
    with urllib.request.urlopen(url, timeout=10) as answer:
        return md5(answer.read())


WHOLE = (200, None, MD5)
# What S3 answers: (what, call, expected value or "status/code").
TABLE = [
    ("etag", lambda c: c.head_object(Bucket="mtx", Key="d/a.bin")["ETag"], f'"{MD5}"'),
    ("metadata", lambda c: c.head_object(Bucket="mtx", Key="d/a.bin")["Metadata"], {"k": "v"}),
    ("type", lambda c: c.head_object(Bucket="mtx", Key="d/a.bin")["ContentType"], "text/x-test"),
    ("length", lambda c: c.head_object(Bucket="mtx", Key="d/a.bin")["ContentLength"], len(DATA)),
    ("whole", get(), WHOLE),
    ("range", get(Range="bytes=0-9"), (206, "bytes 0-9/10240", md5(DATA[:10]))),
    ("open range", get(Range="bytes=10230-"), (206, "bytes 10230-10239/10240", md5(DATA[-10:]))),
    ("suffix", get(Range="bytes=-8"), (206, "bytes 10232-10239/10240", md5(DATA[-8:]))),
    ("long suffix", get(Range="bytes=-99999"), (206, "bytes 0-10239/10240", MD5)),
    ("clipped", get(Range="bytes=10230-99999"), (206, "bytes 10230-10239/10240", md5(DATA[-10:]))),
    ("beyond", get(Range="bytes=20000-20010"), "416/InvalidRange"),
    ("at the end", get(Range="bytes=10240-"), "416/InvalidRange"),
    ("tail of an empty object", get(Key="empty", Range="bytes=-8"), "416/InvalidRange"),
    ("empty object", get(Key="empty"), (200, None, md5(b""))),
    ("if-match", get(IfMatch=f'"{MD5}"'), WHOLE),
    ("if-match other", get(IfMatch=OTHER), "412/PreconditionFailed"),
    ("if-match other, range", get(IfMatch=OTHER, Range="bytes=0-3"), "412/PreconditionFailed"),
    ("if-none-match", get(IfNoneMatch=f'"{MD5}"'), "304/304"),
    ("if-none-match other", get(IfNoneMatch=OTHER), WHOLE),
    ("if-modified-since", lambda c: get(IfModifiedSince=modified(c))(c), "304/304"),
    ("missing", get(Key="nope"), "404/NoSuchKey"),
    ("head missing", lambda c: c.head_object(Bucket="mtx", Key="nope"), "404/404"),
    ("missing below an object", get(Key="d/a.bin/x"), "404/NoSuchKey"),
    ("directory", get(Key="d"), "404/NoSuchKey"),
    ("missing bucket", lambda c: c.get_object(Bucket="none", Key="x"), "404/NoSuchBucket"),
    ("list of missing bucket", lambda c: c.list_objects_v2(Bucket="none"), "404/NoSuchBucket"),
    ("head bucket", lambda c: c.head_bucket(Bucket="mtx")["ResponseMetadata"]["HTTPStatusCode"], 200),
    ("head missing bucket", lambda c: c.head_bucket(Bucket="none"), "404/404"),
    ("location", lambda c: c.get_bucket_location(Bucket="mtx")["LocationConstraint"], None),
    ("buckets", lambda c: [b["Name"] for b in c.list_buckets()["Buckets"]], ["mtx"]),
    (
        "prefixes",
        lambda c: [p["Prefix"] for p in c.list_objects_v2(Bucket="mtx", Prefix="l/", Delimiter="/")["CommonPrefixes"]],
        [f"l/{i}/" for i in range(5)],
    ),
    (
        "other delimiter",
        lambda c: [p["Prefix"] for p in c.list_objects_v2(Bucket="mtx", Prefix="l/", Delimiter="x0")["CommonPrefixes"]],
        [f"l/{i}/x0" for i in range(5)],
    ),
    ("half a name", lambda c: c.list_objects_v2(Bucket="mtx", Prefix="l/0/x0")["KeyCount"], 5),
    ("pages", pages, (25, 4, True)),
    ("pages, first version", pages_v1, [f"l/{i}/" for i in range(5)]),
    ("start after", lambda c: c.list_objects_v2(Bucket="mtx", Prefix="l/4/", StartAfter="l/4/x014")["KeyCount"], 2),
    ("empty list", lambda c: c.list_objects_v2(Bucket="mtx", Prefix="none/")["KeyCount"], 0),
    (
        "exclusive creation",
        lambda c: c.put_object(Bucket="mtx", Key="d/a.bin", Body=b"x", IfNoneMatch="*"),
        "412/PreconditionFailed",
    ),
    ("overwrite of a version", overwritten, ("412/PreconditionFailed", b"22")),
    (
        "multipart",
        multipart,
        (
            "404/404",
            10 << 20,
            '"' + md5(b"".join(hashlib.md5(bytes([n]) * (5 << 20)).digest() for n in (1, 2))) + '-2"',
            "text/x-mp",
        ),
    ),
    ("aborted multipart", aborted, "404/NoSuchUpload"),
    ("copy", copied, (f'"{MD5}"', {"k": "v"}, "text/x-test")),
    ("copy of nothing", lambda c: c.copy_object(Bucket="mtx", Key="c", CopySource="mtx/nope"), "404/NoSuchKey"),
    ("delete missing", lambda c: c.delete_object(Bucket="mtx", Key="no")["ResponseMetadata"]["HTTPStatusCode"], 204),
    ("delete many", deleted, (3, 0)),
    ("delete a full bucket", lambda c: c.delete_bucket(Bucket="mtx"), "409/BucketNotEmpty"),
    ("presigned", presigned, MD5),
    ("odd keys", odd_keys, (True, True)),
]
# Rows where moto is known to differ from S3.
MOTO_DIFFERS: set[str] = {"tail of an empty object", "aborted multipart"}


def outcome(call: Callable, client) -> object:
    try:
        return call(client)
    except ClientError as error:
        return f"{error.response['ResponseMetadata']['HTTPStatusCode']}/{error.response['Error']['Code']}"


@pytest.mark.parametrize(("what", "call", "expected"), TABLE, ids=[row[0] for row in TABLE])
def test_semantics(ours, what, call, expected):
    assert outcome(call, ours) == expected


@pytest.mark.parametrize(("what", "call", "expected"), TABLE, ids=[row[0] for row in TABLE])
def test_moto_agrees(theirs, what, call, expected):
    if what in MOTO_DIFFERS:
        assert outcome(call, theirs) != expected
    else:
        assert outcome(call, theirs) == expected


def test_aws_chunked_bodies(server):
    """Both kinds of streaming body, in pieces that cut through their frames."""
    signed = b"5;chunk-signature=ab\r\nhello\r\n3;chunk-signature=cd\r\n\r\nx\r\n0;chunk-signature=ef\r\n\r\n"
    trailer = b"8\r\nhello\r\nx\r\n0\r\nx-amz-checksum-crc32:AAAAAA==\r\n\r\n"
    for body in (signed, trailer):
        for step in (1, 2, 3, 7, 100):

            async def run(body=body, step=step):
                async def pieces():
                    for start in range(0, len(body), step):
                        yield body[start : start + step]

                return b"".join([piece async for piece in aws_chunked(pieces())])

            assert asyncio.run(run()) == b"hello\r\nx"
    client = client_of(server.url)
    client.create_bucket(Bucket="chunky")
    data = bytes(range(256)) * 8000
    client.upload_fileobj(io.BytesIO(data), "chunky", "streamed")
    assert client.get_object(Bucket="chunky", Key="streamed")["Body"].read() == data


def test_a_broken_upload_leaves_nothing(server, ours):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.putrequest("PUT", "/mtx/half")
    connection.putheader("Content-Length", "100")
    connection.endheaders(b"only this")
    connection.close()
    assert outcome(get(Key="half"), ours) == "404/NoSuchKey"


def test_files_put_by_hand_are_objects(tmp_path):
    (tmp_path / "lake" / "t").mkdir(parents=True)
    (tmp_path / "lake" / "t" / "part-0").write_bytes(b"hand")
    with S3Server(tmp_path) as server:
        client = client_of(server.url)
        etag = client.head_object(Bucket="lake", Key="t/part-0")["ETag"]
        client.put_object(Bucket="lake", Key="t/part-1", Body=b"put")
    with S3Server(tmp_path) as server:
        client = client_of(server.url)
        assert client.head_object(Bucket="lake", Key="t/part-0")["ETag"] == etag
        assert client.head_object(Bucket="lake", Key="t/part-1")["ETag"] == f'"{md5(b"put")}"'
        (tmp_path / "lake" / "t" / "part-1").write_bytes(b"tup")
        assert client.head_object(Bucket="lake", Key="t/part-1")["ETag"] != f'"{md5(b"put")}"'


def test_counts_and_log(server, ours):
    server.stats.clear()
    ours.get_object(Bucket="mtx", Key="d/a.bin", Range="bytes=5-14", IfMatch=f'"{MD5}"')["Body"].read()
    ours.head_object(Bucket="mtx", Key="d/a.bin")
    with urllib.request.urlopen(f"{server.url}/__stats", timeout=10) as answer:
        facts = json.load(answer)
    assert facts["requests"] == server.stats.requests == 2
    assert facts["bytes_sent"] == 10
    assert facts["by_method"] == {"GET": 1, "HEAD": 1}
    assert facts["by_operation"] == {"GetObject": 1, "HeadObject": 1}
    with urllib.request.urlopen(f"{server.url}/__log?clear=1", timeout=10) as answer:
        rows = json.load(answer)
    assert [row["range"] for row in rows] == ["bytes=5-14", ""]
    assert rows[0]["headers"]["if-match"] == f'"{MD5}"'
    assert server.stats.requests == 0


def test_runs_as_a_program(tmp_path):
    command = [sys.executable, "-m", "tiercache.testing.s3server", str(tmp_path / "new")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().strip()
            client_of(url).create_bucket(Bucket="b")
            assert (tmp_path / "new" / "b").is_dir()
        finally:
            process.terminate()


@pytest.fixture
def s3(server):
    options = {"key": "k", "secret": "s", "client_kwargs": {"region_name": "us-east-1"}, "endpoint_url": server.url}
    return fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False, **options)


def test_s3fs(s3):
    s3.mkdir("fsbucket")
    s3.pipe_file("fsbucket/a/one", b"1" * 100)
    s3.pipe({"fsbucket/a/two": b"2", "fsbucket/ü +%.bin": b"3"})
    assert s3.ls("fsbucket") == ["fsbucket/a", "fsbucket/ü +%.bin"]
    assert s3.find("fsbucket") == ["fsbucket/a/one", "fsbucket/a/two", "fsbucket/ü +%.bin"]
    assert s3.cat_file("fsbucket/a/one", start=-10) == b"1" * 10
    s3.cp("fsbucket/a/one", "fsbucket/b")
    s3.mv("fsbucket/b", "fsbucket/c")
    assert not s3.exists("fsbucket/b")
    with pytest.raises(FileExistsError):
        s3.pipe_file("fsbucket/c", b"no", mode="create")
    with s3.open("fsbucket/big", "wb", block_size=5 << 20) as stream:
        stream.write(b"x" * (11 << 20))
    assert s3.info("fsbucket/big")["size"] == 11 << 20
    s3.rm("fsbucket/a", recursive=True)
    assert s3.find("fsbucket/a") == []
    s3.rm("fsbucket", recursive=True)
    assert not s3.exists("fsbucket")


def test_readers_of_parquet(server):
    table = pa.table({"a": list(range(10_000)), "b": [f"row {i}" for i in range(10_000)]})
    host = f"127.0.0.1:{server.port}"
    options = {"access_key": "k", "secret_key": "s", "region": "us-east-1", "scheme": "http"}
    arrow = pafs.S3FileSystem(endpoint_override=host, allow_bucket_creation=True, **options)
    arrow.create_dir("parquet")
    pq.write_table(table, "parquet/sub dir/t.parquet", filesystem=arrow)
    assert pq.read_table("parquet/sub dir/t.parquet", filesystem=arrow, columns=["a"]).num_rows == 10_000
    assert [i.path for i in arrow.get_file_info(pafs.FileSelector("parquet", recursive=True)) if i.is_file] == [
        "parquet/sub dir/t.parquet"
    ]
    options = {
        "aws_access_key_id": "k",
        "aws_secret_access_key": "s",
        "aws_region": "us-east-1",
        "aws_endpoint_url": server.url,
        "aws_allow_http": "true",
    }
    frame = polars.scan_parquet("s3://parquet/sub dir/*.parquet", storage_options=options)
    assert frame.select(polars.col("a").sum()).collect().item() == sum(range(10_000))


def test_obstore(server):
    keys = {"access_key_id": "k", "secret_access_key": "s", "region": "us-east-1"}
    client_of(server.url).create_bucket(Bucket="obs")
    store = S3Store("obs", endpoint=server.url, client_options={"allow_http": True}, **keys)
    obstore.put(store, "x/y", b"0123456789")
    assert bytes(obstore.get_range(store, "x/y", start=2, length=3)) == b"234"
    assert bytes(obstore.get(store, "x/y", options={"range": {"suffix": 2}}).bytes()) == b"89"
    with pytest.raises(obstore.exceptions.AlreadyExistsError):
        obstore.put(store, "x/y", b"no", mode="create")
    assert [meta["path"] for meta in obstore.list(store).collect()] == ["x/y"]
    obstore.rename(store, "x/y", "z")
    assert obstore.head(store, "z")["size"] == 10
    obstore.delete(store, ["z", "none"])
    assert obstore.list(store).collect() == []
