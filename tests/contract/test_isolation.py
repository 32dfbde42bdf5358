"""A job in a namespace that has no network, as under SageMaker's network isolation."""

import subprocess
import time
from pathlib import Path

import pytest

from kohya.config import Kind
from tests.harness import TINY, Job

ALONE = ("unshare", "--map-root-user", "--net")


@pytest.fixture
def alone(job: Job, base_models: dict[Kind, Path], pictures: Path) -> Job:
    if subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let its users make namespaces")
    job.prefix = ALONE
    job.mount("model", base_models["sd15"])
    job.configure("hyperparameters", {**TINY, "max_train_epochs": "1"})
    return job


def test_with_channels_it_is_a_normal_job(alone: Job, pictures: Path) -> None:
    alone.mount("dataset", pictures)
    result = alone.run()
    assert result.code == 0, result.out + result.err
    assert result.err == ""


@pytest.mark.parametrize("credentials", [False, True])
def test_asked_for_s3_it_says_so_at_once(credentials: bool, alone: Job) -> None:
    """In seconds: a minute is what a busy machine may need for them."""
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x" * 9} if credentials else {}
    alone.environment |= {"AWS_REGION": "us-east-1", **keys}
    begun = time.monotonic()
    result = alone.run("--dataset_uri=s3://bucket/cats", "--output_uri=s3://bucket/out")
    assert time.monotonic() - begun < 60
    assert result.code == 2
    said = "S3 cannot be reached at" if credentials else "there are no credentials for S3"
    assert f"s3://bucket/cats: {said}" in result.err
    assert (
        "A job with network isolation reaches nothing: give it its inputs as channels instead." in result.err
    )
