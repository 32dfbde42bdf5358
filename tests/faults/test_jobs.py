"""Whole jobs on an S3 that fails now and then, or for good."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from entrypoint.storage import S3Uri
from kohya.config import Kind
from tests.contract.test_job import keys, put
from tests.faults.proxy import KINDS, Asked, Drawn, Proxy
from tests.harness import TINY, Job, Result
from tests.s3 import S3Server

# The job with a client that waits for less long.
_IMPATIENT = """
import runpy, sys
from entrypoint.storage import retries
retries.SILENCE, retries.LASTS = float(sys.argv[1]), float(sys.argv[2])
sys.argv = sys.argv[5:]  # after: this, its two numbers, python, -m
runpy.run_module("entrypoint", run_name="__main__", alter_sys=True)
"""


def impatient(silence: float, lasts: float = 60.0) -> tuple[str, ...]:
    """The beginning of a job's command, which sets how many seconds S3 is waited for (retries.py)."""
    return (sys.executable, "-c", _IMPATIENT, str(silence), str(lasts))


def run(job: Job, proxy: Proxy, folder: S3Uri) -> Result:
    places = {
        name: str(folder / at) for name, at in (("model_uri", "m.safetensors"), ("dataset_uri", "data"))
    }
    job.configure("hyperparameters", {**TINY, **places, "output_uri": str(folder / "out")})
    job.environment |= {"AWS_ENDPOINT_URL_S3": proxy.address}
    return job.run()


def test_a_job_on_a_faulty_s3_makes_the_same_lora(
    s3: S3Server, bucket: S3Uri, tmp_path: Path, base_models: dict[Kind, Path], pictures: Path
) -> None:
    put(s3, bucket / "m.safetensors", base_models["sd15"])
    put(s3, bucket / "data", pictures)
    loras = []
    for name, rate in (("well", 0.0), ("ill", 0.3)):
        job = Job(tmp_path / name)
        job.environment |= s3.environment
        job.prefix = impatient(silence=2)
        try:
            with Proxy(s3.endpoint, Drawn(7, dict.fromkeys(KINDS, rate / len(KINDS)))) as proxy:
                result = run(job, proxy, bucket)
            assert result.code == 0, result.out + result.err
            assert result.err == ""
            loras.append(load_file(job.model / "shape.safetensors"))
            names = {path.name for path in job.model.iterdir()}
            assert names <= set(keys(s3, bucket / "out"))
            sent = s3.client().get_object(Bucket=bucket.bucket, Key="out/shape.safetensors")["Body"].read()
            assert sent == (job.model / "shape.safetensors").read_bytes()
            assert (proxy.faults.total() >= 5) == (rate > 0)
        finally:
            job.end()
    well, ill = loras
    assert well.keys() == ill.keys()
    assert all(torch.equal(well[name], ill[name]) for name in well)


def test_when_s3_is_gone_for_good_the_lora_is_in_the_model_folder(
    s3: S3Server, bucket: S3Uri, job: Job, base_models: dict[Kind, Path], pictures: Path
) -> None:
    put(s3, bucket / "m.safetensors", base_models["sd15"])
    put(s3, bucket / "data", pictures)
    gone: list[Asked] = []

    def schedule(asked: Asked, before: int) -> str | None:
        if asked.method == "PUT":
            gone.append(asked)
        return "reset" if gone else None

    job.environment |= s3.environment
    job.prefix = impatient(silence=2, lasts=1)
    with Proxy(s3.endpoint, schedule) as proxy:
        result = run(job, proxy, bucket)
    assert result.code == 1
    assert len(load_file(job.model / "shape.safetensors")) > 0
    told = (result.out + result.err).splitlines()[-1]
    assert job.failure is not None
    assert job.failure in told
    for part in ("kept breaking off", str(bucket / "out"), f"shape.safetensors lies in {job.model}"):
        assert part in job.failure, job.failure
    assert keys(s3, bucket / "out") == []
