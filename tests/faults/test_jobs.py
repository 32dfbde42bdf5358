"""Whole jobs on an S3 that fails now and then, or for good."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from entrypoint.storage import S3Uri
from kohya.config import Kind
from tests.contract.test_job import keys, put
from tests.faults.proxy import Asked, Drawn, Proxy, impatient, rates
from tests.harness import TINY, Job, Result
from tests.s3 import S3Server


def run(job: Job, s3: S3Server, proxy: Proxy, folder: S3Uri, prefix: tuple[str, ...]) -> Result:
    places = {"model_uri": "m.safetensors", "dataset_uri": "data", "output_uri": "out"}
    asked = {**TINY, **{name: str(folder / at) for name, at in places.items()}, "max_train_epochs": "1"}
    job.configure("hyperparameters", asked)
    job.environment |= {**s3.environment, "AWS_ENDPOINT_URL_S3": proxy.address}
    job.prefix = prefix
    return job.run()


@pytest.fixture
def folder(s3: S3Server, bucket: S3Uri, base_models: dict[Kind, Path], pictures: Path) -> S3Uri:
    """A folder in S3 with a base model and pictures in it."""
    put(s3, bucket / "m.safetensors", base_models["sd15"])
    put(s3, bucket / "data", pictures)
    return bucket


def test_a_faulty_s3_makes_the_same_lora_and_one_that_goes_away_loses_none(
    s3: S3Server, folder: S3Uri, tmp_path: Path, job: Job
) -> None:
    """In the second job S3 is well up to the first upload: its LoRA is the one made without faults."""
    ill = Job(tmp_path / "ill")
    try:
        with Proxy(s3.endpoint, Drawn(12, rates(0.3, s3))) as proxy:
            result = run(ill, s3, proxy, folder, impatient(silence=2))
        assert result.code == 0, result.out + result.err
        assert result.err == ""
        assert proxy.faults.total() >= 5
        made_here = {path.name for path in ill.model.iterdir()}
        assert {*made_here, "report.html"} == set(keys(s3, folder / "out"))
        sent = s3.client().get_object(Bucket=folder.bucket, Key="out/shape.safetensors")["Body"].read()
        assert sent == (ill.model / "shape.safetensors").read_bytes()
        made = load_file(ill.model / "shape.safetensors")
    finally:
        ill.end()
    s3.client().delete_object(Bucket=folder.bucket, Key="out/shape.safetensors")
    gone: list[Asked] = []

    def schedule(asked: Asked, before: int) -> str | None:
        if asked.method == "PUT":
            gone.append(asked)
        return "reset" if gone else None

    with Proxy(s3.endpoint, schedule) as proxy:
        result = run(job, s3, proxy, folder, impatient(silence=2, lasts=1))
    assert result.code == 1
    kept = load_file(job.model / "shape.safetensors")
    assert kept.keys() == made.keys()
    assert all(torch.equal(kept[name], made[name]) for name in made)
    assert job.failure is not None
    told = (result.out + result.err).splitlines()[-1]
    assert told == f"ERROR: {job.failure.strip()}"
    for part in ("kept breaking off", str(folder / "out"), f"shape.safetensors lies in {job.model}"):
        assert part in job.failure
    assert "shape.safetensors" not in keys(s3, folder / "out")
