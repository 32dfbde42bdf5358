"""An S3 server for tests: the one that TEST_S3_ENDPOINT names, with the keys that AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY hold, else moto's on a free loopback port.

    AWS_ACCESS_KEY_ID=… AWS_SECRET_ACCESS_KEY=… TEST_S3_ENDPOINT=http://127.0.0.1:9000 make test

tests/conftest.py makes the fixtures known: from tests.s3 import bucket, s3
"""

import os
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import boto3
import pytest
from botocore.config import Config

from demo.server import s3_server
from entrypoint.storage import S3Uri


@dataclass(frozen=True)
class S3Server:
    """A running S3 server, and the environment in which a program finds it."""

    endpoint: str
    stand_in: bool  # moto: not everything that S3 does
    environment: Mapping[str, str]

    def client(self) -> Any:
        """boto3, as a test needs it to look behind our code."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=self.environment["AWS_REGION"],
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            config=Config(s3={"addressing_style": "path"}),
        )


@contextmanager
def serving() -> Iterator[S3Server]:
    """The server, for as long as the block lasts."""
    given = os.environ.get("TEST_S3_ENDPOINT")
    if given:
        yield S3Server(given, stand_in=False, environment=_environment(given))
        return
    with s3_server() as endpoint:
        yield S3Server(endpoint, stand_in=True, environment=_environment(endpoint))


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """The S3 server that the whole test run uses."""
    with serving() as server:
        yield server


@pytest.fixture
def bucket(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Uri]:
    """A new, empty bucket, and the environment set so that this process finds it."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    uri = new_bucket(s3)
    yield uri
    remove_bucket(s3, uri)


def new_bucket(s3: S3Server) -> S3Uri:
    """Make a bucket with a name of its own."""
    uri = S3Uri(f"test-{uuid.uuid4().hex}")
    s3.client().create_bucket(Bucket=uri.bucket)
    return uri


def remove_bucket(s3: S3Server, uri: S3Uri) -> None:
    """Remove a test's bucket with everything in it."""
    client = s3.client()
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=uri.bucket):
        if keys := [{"Key": item["Key"]} for item in page.get("Contents", ())]:
            client.delete_objects(Bucket=uri.bucket, Delete={"Objects": keys})
    client.delete_bucket(Bucket=uri.bucket)


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _environment(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_ACCESS_KEY_ID": os.environ.get("AWS_ACCESS_KEY_ID", "testing"),
        "AWS_SECRET_ACCESS_KEY": os.environ.get("AWS_SECRET_ACCESS_KEY", "testing"),
        "AWS_REGION": os.environ.get("AWS_REGION", "us-east-1"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }
