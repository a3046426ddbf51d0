"""An S3 server for tests, and an empty bucket of it, as fixtures."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from medspark import object_store

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_CREDENTIALS = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "a-secret-of-tests"}


@contextmanager
def serving(**environment: str) -> Iterator[str]:
    """Start a server in a process of its own; yield its address. It ends with this process."""
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("moto_server.py")],
        env=os.environ | _CREDENTIALS | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdin
    assert server.stdout
    try:
        yield f"http://127.0.0.1:{int(server.stdout.readline())}"
    finally:
        server.stdin.close()
        server.wait(30)
        server.stdout.close()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a server."""
    with serving() as address:
        yield address


@pytest.fixture
def s3_environment(
    s3_server: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, str]]:
    """The environment in which the server is reached; the cache for copies is empty."""
    names = _CREDENTIALS | {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_REGION": "us-east-1",
        "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")),
    }
    for name in ("AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    object_store._bucket.cache_clear()
    yield names
    object_store._bucket.cache_clear()


@pytest.fixture
def bucket(s3_server: str, s3_environment: dict[str, str]) -> str:
    """The address of an empty bucket."""
    name = uuid.uuid4().hex
    urllib.request.urlopen(urllib.request.Request(f"{s3_server}/{name}", method="PUT")).close()
    return f"s3://{name}"


@pytest.fixture
def s3_spark(
    spark: SparkSession, s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> SparkSession:
    """The session, whose workers reach the server too. A job's workers inherit its environment."""
    environment = spark.sparkContext.environment
    monkeypatch.setattr(spark.sparkContext, "environment", environment | s3_environment)
    return spark
