"""Fixtures that more than one test file uses."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo import base_model
from kohya.config import KINDS, Kind
from tests.harness import TINY, Job, write_dataset
from tests.s3 import bucket, s3

__all__ = ["bucket", "s3"]


@pytest.fixture(scope="session")
def base_models(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    """A narrow base model of each kind."""
    folder = tmp_path_factory.mktemp("base")
    return {kind: base_model.write(folder / f"{kind}.safetensors", kind) for kind in KINDS}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of four pictures with captions, in the folder 2_shape."""
    return write_dataset(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """A SageMaker tree of its own, with no input yet."""
    made = Job(tmp_path)
    yield made
    made.end()


@pytest.fixture
def ready(job: Job, base_models: dict[Kind, Path], pictures: Path) -> Job:
    """A job by channels that would succeed."""
    job.mount("model", base_models["sd15"])
    job.mount("dataset", pictures)
    job.configure("hyperparameters", TINY)
    return job


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what this run could not cover."""
    ignored = {Path(folder).name for folder in config.getoption("ignore") or ()}
    if "sd_scripts" in ignored:
        terminalreporter.line("NOT RUN: sd-scripts. make test-sd-scripts runs these tests.")
    if "gpu" in ignored:
        terminalreporter.line("NOT RUN: GPU. make test-gpu runs these tests on a machine that has one.")
    if "image" in ignored:
        terminalreporter.line("NOT RUN: the image. make image builds it, and make test-image tests it.")
    if not os.environ.get("TEST_S3_ENDPOINT"):
        terminalreporter.line("NOT RUN: a real S3 server; moto's stood in. Set TEST_S3_ENDPOINT to use one.")
