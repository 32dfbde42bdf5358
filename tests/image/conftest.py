"""The image that TEST_IMAGE names, on the engine that DOCKER_HOST names. `make test-image` runs these tests.

With GPU=1 every container gets all GPUs. SD_SCRIPTS=none: the image was built without sd-scripts.
"""

import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import docker
import pytest
from docker.errors import DockerException, ImageNotFound
from docker.types import DeviceRequest

from entrypoint.storage import S3Uri
from tests.image.container import ContainerJob, Subject
from tests.s3 import S3Server


@cache
def find() -> Subject | str:
    """The image under test, or why there is none."""
    name = os.environ.get("TEST_IMAGE")
    if not name:
        return "TEST_IMAGE names none. Type make image, then make test-image."
    try:
        engine = docker.from_env(timeout=600)
        engine.ping()
    except DockerException:
        return f"no container engine answers at DOCKER_HOST={os.environ.get('DOCKER_HOST', '')}"
    try:
        image = engine.images.get(name)
    except ImageNotFound:
        return f"the engine has no {name}. Type make image, then make test-image."
    gpus = [DeviceRequest(count=-1, capabilities=[["gpu"]])] if os.environ.get("GPU") == "1" else []
    return Subject(engine, image, tuple(gpus))


def pytest_runtest_setup() -> None:
    """Skip every test here for one and the same reason, which is then told in one line."""
    if isinstance(why := find(), str):
        pytest.skip(f"NOT RUN: the image: {why}")


@pytest.fixture(scope="session")
def subject() -> Subject:
    """The image under test."""
    found = find()
    assert isinstance(found, Subject)
    return found


@pytest.fixture(scope="session")
def variant(subject: Subject) -> str:
    """What the image was built as: cpu, cuda12 or cuda13."""
    found = re.search(r"\bVARIANT=(\w+)", subject.history)
    assert found is not None, subject.history
    return found[1]


@pytest.fixture(params=["builtin", "sd-scripts"])
def trainer(request: pytest.FixtureRequest, variant: str) -> str:
    """Each trainer that this image is to have."""
    if request.param == "sd-scripts" and (variant == "cpu" or os.environ.get("SD_SCRIPTS") == "none"):
        pytest.skip("the image was built without sd-scripts")
    return str(request.param)


@pytest.fixture
def job(tmp_path: Path, subject: Subject) -> Iterator[ContainerJob]:
    """A job in a container, with no input yet."""
    made = ContainerJob(tmp_path, subject)
    yield made
    made.end()


@pytest.fixture
def s3_job(job: ContainerJob, s3: S3Server, bucket: S3Uri) -> ContainerJob:
    """A job that reaches the S3 server on this machine's loopback."""
    job.environment |= s3.environment
    job.options["network_mode"] = "host"
    return job


@pytest.fixture(scope="session")
def pictures(pictures: Path) -> Path:
    """The data set, in a folder that every user can read, as a channel is."""
    pictures.chmod(0o755)
    return pictures
