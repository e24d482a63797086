"""fsspec's own abstract suite, over a local disk, memory, our counting S3 server and moto."""

from __future__ import annotations

import boto3
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.tests import abstract
from moto.server import ThreadedMotoServer

from tests.connectors.conftest import s3_options


class LocalFixtures(abstract.AbstractFixtures):
    @pytest.fixture
    def fs(self, cached):
        return cached("file", {"auto_mkdir": True})

    @pytest.fixture
    def fs_path(self, tmpdir):
        return str(tmpdir)


class MemoryFixtures(abstract.AbstractFixtures):
    @pytest.fixture
    def fs(self, cached):
        saved = dict(MemoryFileSystem.store), list(MemoryFileSystem.pseudo_dirs)
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]
        yield cached("memory")
        MemoryFileSystem.store.clear()
        MemoryFileSystem.store.update(saved[0])
        MemoryFileSystem.pseudo_dirs[:] = saved[1]

    @pytest.fixture
    def fs_join(self):
        return lambda *parts: "/".join(parts)

    @pytest.fixture
    def fs_path(self):
        return ""


@pytest.fixture(scope="module")
def over_s3(cached_for_all, s3):
    """One filesystem for all tests over our server."""
    return cached_for_all("s3", s3.options)


class S3Fixtures(abstract.AbstractFixtures):
    @pytest.fixture
    def fs(self, over_s3):
        return over_s3

    @pytest.fixture
    def fs_join(self):
        return lambda *parts: "/".join(parts)

    @pytest.fixture
    def fs_path(self, fs):
        yield "bucket/abstract"
        if fs.exists("bucket/abstract"):
            fs.rm("bucket/abstract", recursive=True)

    @pytest.fixture
    def supports_empty_directories(self):
        return False


@pytest.fixture(scope="session")
def moto():
    """Options for a moto server with one bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    options = s3_options("http://{}:{}".format(*server.get_host_and_port()))
    client = boto3.client(
        "s3",
        endpoint_url=options["endpoint_url"],
        aws_access_key_id=options["key"],
        aws_secret_access_key=options["secret"],
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="bucket")
    client.close()
    yield options
    server.stop()


@pytest.fixture(scope="module")
def over_moto(cached_for_all, moto):
    """One filesystem for all tests over moto."""
    return cached_for_all("s3", moto)


class MotoFixtures(S3Fixtures):
    @pytest.fixture
    def fs(self, over_moto):
        return over_moto


class TestLocalGet(abstract.AbstractGetTests, LocalFixtures):
    pass


class TestLocalPut(abstract.AbstractPutTests, LocalFixtures):
    pass


class TestLocalCopy(abstract.AbstractCopyTests, LocalFixtures):
    pass


class TestLocalOpen(abstract.AbstractOpenTests, LocalFixtures):
    pass


class TestLocalPipe(abstract.AbstractPipeTests, LocalFixtures):
    pass


class TestMemoryGet(abstract.AbstractGetTests, MemoryFixtures):
    pass


class TestMemoryPut(abstract.AbstractPutTests, MemoryFixtures):
    pass


class TestMemoryCopy(abstract.AbstractCopyTests, MemoryFixtures):
    pass


class TestMemoryOpen(abstract.AbstractOpenTests, MemoryFixtures):
    pass


class TestMemoryPipe(abstract.AbstractPipeTests, MemoryFixtures):
    pass


@pytest.mark.slow
class TestS3Get(abstract.AbstractGetTests, S3Fixtures):
    pass


@pytest.mark.slow
class TestS3Put(abstract.AbstractPutTests, S3Fixtures):
    pass


@pytest.mark.slow
class TestS3Copy(abstract.AbstractCopyTests, S3Fixtures):
    pass


@pytest.mark.slow
class TestS3Open(abstract.AbstractOpenTests, S3Fixtures):
    pass


@pytest.mark.slow
class TestS3Pipe(abstract.AbstractPipeTests, S3Fixtures):
    pass


@pytest.mark.nightly
class TestMotoGet(abstract.AbstractGetTests, MotoFixtures):
    pass


@pytest.mark.nightly
class TestMotoPut(abstract.AbstractPutTests, MotoFixtures):
    pass


@pytest.mark.nightly
class TestMotoCopy(abstract.AbstractCopyTests, MotoFixtures):
    pass


@pytest.mark.nightly
class TestMotoOpen(abstract.AbstractOpenTests, MotoFixtures):
    pass


@pytest.mark.nightly
class TestMotoPipe(abstract.AbstractPipeTests, MotoFixtures):
    pass
