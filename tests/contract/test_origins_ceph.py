"""The S3 origin keeps its contract against a real Ceph gateway, through the fault proxy: signatures survive it."""

from __future__ import annotations

import itertools
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING

import boto3
import pytest
from botocore.config import Config

from tiercache.remote.opening import open_origin
from tiercache.testing.ceph import Ceph, missing
from tiercache.testing.faultproxy import FaultProxy
from tiercache.testing.origins import Arrangement, FaultyOriginTests

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.ceph,
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=f"Ceph is not installed: {missing()}"),
]
BUCKETS = itertools.count()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Ceph]:
    with Ceph() as ceph:
        yield ceph


class TestCeph(FaultyOriginTests):
    """Ceph RGW over obstore, a bucket a test."""

    signed = True

    @pytest.fixture(autouse=True)
    def server(self, cluster):
        self.cluster = cluster

    @contextmanager
    def arrange(self, home: Path) -> Iterator[Arrangement]:
        config = Config(s3={"addressing_style": "path"})
        keys = {"aws_access_key_id": self.cluster.access_key, "aws_secret_access_key": self.cluster.secret_key}
        client = boto3.client("s3", endpoint_url=self.cluster.url, region_name="us-east-1", config=config, **keys)
        bucket = f"lake-{next(BUCKETS)}"
        client.create_bucket(Bucket=bucket)

        def put(name: str, data: bytes) -> str:
            client.put_object(Bucket=bucket, Key=name, Body=data)
            return f"{bucket}/{name}"

        with FaultProxy(self.cluster.url, random=random.Random(1)) as proxy:
            options = self.cluster.options | {"endpoint_url": proxy.url}
            yield Arrangement(
                lambda patience: open_origin("s3", options, patience=patience),
                put,
                lambda name: client.delete_object(Bucket=bucket, Key=name),
                lambda name: f"{bucket}/{name}",
                proxy,
            )
        client.close()
