"""Whole jobs in the image: each way to ask, each kind, each trainer that the image has."""

import re
from pathlib import Path

import pytest

from entrypoint.storage import S3Uri
from kohya.config import KINDS, Kind
from tests.contract.test_job import ESD_TOML, assert_completed, keys, put
from tests.harness import TINY, Result, esd_parameters
from tests.image.container import ContainerJob
from tests.s3 import S3Server

# Lines that look like a warning and are none.
EXPECTED = (
    # bitsandbytes on a CPU, which has slower code for it; on a GPU it does not ask.
    r"Failed to load CPU gemm_4bit_forward from kernels-community: .*",
    # sd-scripts asks git which commit it is; it writes "(unknown)" into the LoRA's metadata.
    r"Could not determine git commit: .*'git'",
)
WARNING = re.compile(r"(?i)warn|deprecat|error|traceback|fail|could not|can't|cannot|unable|denied")


def assert_quiet(result: Result) -> None:
    """The log has nothing in it that a reader would have to look after."""
    lines = [*result.lines, *result.err.splitlines()]
    said = [line for line in lines if WARNING.search(line)]
    assert [line for line in said if not any(re.fullmatch(known, line) for known in EXPECTED)] == []


@pytest.mark.parametrize("kind", KINDS)
def test_channels_without_a_network(
    kind: Kind, trainer: str, job: ContainerJob, base_models: dict[Kind, Path], pictures: Path
) -> None:
    """As SageMaker isolates a job: neither S3 nor a model hub can be reached."""
    job.mount("model", base_models[kind])
    job.mount("dataset", pictures)
    job.configure("hyperparameters", {**TINY, "trainer": trainer})
    job.configure("inputdataconfig", {name: {"TrainingInputMode": "File"} for name in ("model", "dataset")})
    job.configure("resourceconfig", {"current_host": "algo-1", "hosts": ["algo-1"]})
    job.options["network_mode"] = "none"
    result = job.run()
    assert_completed(result, job, kind)
    assert_quiet(result)
    assert job.record["trainer"] == trainer


@pytest.mark.parametrize("kind", KINDS)
def test_uris(
    kind: Kind,
    trainer: str,
    s3_job: ContainerJob,
    s3: S3Server,
    bucket: S3Uri,
    base_models: dict[Kind, Path],
    pictures: Path,
) -> None:
    """From S3 to S3."""
    uris = {
        "model_uri": put(s3, bucket / "model.safetensors", base_models[kind]),
        "dataset_uri": put(s3, bucket / "cats", pictures),
        "output_uri": bucket / "out",
        "logs_uri": bucket / "logs",
    }
    asked = {**TINY, "trainer": trainer, **{name: str(uri) for name, uri in uris.items()}}
    s3_job.configure("hyperparameters", asked)
    result = s3_job.run()
    assert_completed(result, s3_job, kind)
    assert_quiet(result)
    loras = ["shape-000001.safetensors", "shape.safetensors"]
    assert keys(s3, bucket / "out") == ["job.json", "report.html", *loras, "shape.toml"]
    assert len(keys(s3, bucket / "logs")) == 1


def test_esd(
    s3_job: ContainerJob,
    s3: S3Server,
    bucket: S3Uri,
    variant: str,
    base_models: dict[Kind, Path],
    pictures: Path,
) -> None:
    """The single hyperparameter s3_location; LoRAs and nothing else come out."""
    folder = bucket / "Stable-diffusion/checkpoint/custom/1f"
    parameters = esd_parameters(
        folder,
        put(s3, bucket / "base.safetensors", base_models["sd15"]),
        put(s3, bucket / "dataset/shape", pictures),
        put(s3, bucket / "config.toml", ESD_TOML),
    )
    location = put(s3, bucket / "param.json", parameters)
    s3_job.configure("hyperparameters", {"s3_location": str(location)})
    # Its TOML has one option that builtin does not.
    flags = ("--trainer=builtin", "--save_last_n_epochs=") if variant == "cpu" else ()
    result = s3_job.run(*flags)
    assert_completed(result, s3_job, "sd15")
    assert keys(s3, folder) == ["shape-000001.safetensors", "shape.safetensors"]
