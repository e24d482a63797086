"""What the connector tests share: origins of every kind, filled with the same objects, and filesystems over them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest

from tiercache.testing.s3server import S3Server
from tiercache_connectors.fsspec_fs import TierCacheFileSystem

MIB = 1 << 20
SMALL = {"memory_bytes": 64 * MIB, "ssd_bytes": 0}
"""Settings of a cache that a test throws away."""


@dataclass
class Store:
    """A running object store: how fsspec reaches it, and the counting server itself where it is ours."""

    protocol: str
    options: dict
    server: S3Server | None = None

    def direct(self):
        """The target itself, without any cache of its own."""
        return fsspec.filesystem(self.protocol, skip_instance_cache=True, use_listings_cache=False, **self.options)


def s3_options(url):
    return {
        "key": "reader",
        "secret": "of-tests",
        "endpoint_url": url,
        "client_kwargs": {"region_name": "us-east-1"},
    }


@pytest.fixture(scope="session", autouse=True)
def _no_proxies():
    """Loopback servers are asked directly, and no one asks for credentials elsewhere."""
    saved = dict(os.environ)
    for name in ("AWS_CA_BUNDLE", "AWS_PROFILE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        os.environ.pop(name, None)
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    yield
    os.environ.clear()
    os.environ.update(saved)


@pytest.fixture(scope="session")
def s3_root(tmp_path_factory):
    """The folder behind the counting S3 server; its subfolders are buckets."""
    root = tmp_path_factory.mktemp("s3")
    (root / "bucket").mkdir()
    return root


@pytest.fixture(scope="session")
def s3(s3_root):
    """Our counting S3 server with one bucket, `bucket`."""
    with S3Server(s3_root) as server:
        yield Store("s3", s3_options(server.url), server)


@pytest.fixture(scope="session")
def lake(s3, s3_root):
    """The bucket `lake` of our server: TPC-H at scale factor 0.02, a folder a table; answers the folder."""
    program = shutil.which("tpchgen-cli", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("tpchgen-cli is not installed")
    tables = ["--parts", "2", "--row-group-bytes", "512KB", "--tables", "lineitem,orders"]
    command = [program, "parquet", "-s", "0.02", *tables]
    subprocess.run([*command, "--output-dir", str(s3_root / "lake")], check=True, capture_output=True)
    return s3_root / "lake"


def _makes(folder):
    made = []

    def make(protocol=None, options=None, **arguments):
        settings = SMALL | {"directory": str(folder / f"cache{len(made)}")} | arguments
        target = {"target_protocol": protocol, "target_options": options}
        fs = TierCacheFileSystem(**{name: each for name, each in target.items() if each is not None}, **settings)
        made.append(fs)
        return fs

    yield make
    for fs in made:
        fs.close()


@pytest.fixture
def cached(tmp_path):
    """Makes filesystems over targets, each with a cache of its own, and closes them at the end."""
    yield from _makes(tmp_path)


@pytest.fixture(scope="module")
def cached_for_all(tmp_path_factory):
    """As `cached`, for filesystems that the tests of a module share."""
    yield from _makes(tmp_path_factory.mktemp("caches"))
