"""An AWS account in this process, moto's, with what a job needs: a bucket, a role, an image in ECR.

from tests.lora_jobs.account import account, job_file
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from botocore.client import BaseClient
from moto import mock_aws
from moto.backends import get_backend
from safetensors.numpy import save_file

from demo import base_model
from kohya.config import Kind

NUMBER, REGION = "123456789012", "us-east-1"
ROLE = f"arn:aws:iam::{NUMBER}:role/training"
REPOSITORY = f"{NUMBER}.dkr.ecr.{REGION}.amazonaws.com/sagemaker-kohya"
BUCKET = "loras-of-mine"


@dataclass
class Account:
    """The account, and every call that was made of it, as boto3 was asked: service, operation, arguments."""

    digest: str = ""
    calls: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)

    def client(self, service: str) -> Any:
        return boto3.client(service, region_name=REGION)

    @property
    def jobs(self) -> dict[str, Any]:
        """The training jobs that SageMaker has, by name."""
        found: dict[str, Any] = get_backend("sagemaker")[NUMBER][REGION].training_jobs
        return found

    def end(self, name: str, status: str) -> None:
        """Let a job be in this status."""
        self.jobs[name].training_job_status = status

    def keys(self, below: str = "") -> list[str]:
        """The keys in the bucket."""
        pages = self.client("s3").get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=below)
        return [item["Key"] for page in pages for item in page.get("Contents", ())]

    def made(self, operation: str) -> list[dict[str, Any]]:
        """The arguments of every call of an operation, in order."""
        return [arguments for _, name, arguments in self.calls if name == operation]


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Iterator[Account]:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    with mock_aws():
        made = Account()
        boto3.client("s3", region_name=REGION).create_bucket(Bucket=BUCKET)
        ecr = boto3.client("ecr", region_name=REGION)
        ecr.create_repository(repositoryName="sagemaker-kohya")
        media = "application/vnd.docker.distribution.manifest.v2+json"
        layer = {
            "mediaType": "application/vnd.docker.container.image.v1+json",
            "size": 1,
            "digest": "sha256:0",
        }
        manifest = {"schemaVersion": 2, "mediaType": media, "config": layer, "layers": []}
        put = ecr.put_image(
            repositoryName="sagemaker-kohya", imageManifest=json.dumps(manifest), imageTag="0.1.0"
        )
        made.digest = put["image"]["imageId"]["imageDigest"]
        ask: Callable[..., Any] = BaseClient._make_api_call  # type: ignore[attr-defined]

        def noted(client: Any, operation: str, arguments: dict[str, Any]) -> Any:
            made.calls.append((client.meta.service_model.service_name, operation, arguments))
            return ask(client, operation, arguments)

        monkeypatch.setattr(BaseClient, "_make_api_call", noted)
        yield made


def write_model(path: Path, kind: Kind = "sd15") -> Path:
    """A file with all names of a base model and hardly a number: enough to be told by."""
    shapes = json.loads((base_model.SHAPES / f"base_{kind}.json").read_text())
    telling = "input_blocks.0.0.weight"  # how many channels its latents have
    save_file(
        {
            key: np.zeros(shape if key.endswith(telling) else [1] * len(shape), np.float16)
            for key, shape in shapes.items()
        },
        path,
    )
    return path


@pytest.fixture
def job_file(tmp_path: Path, pictures: Path) -> Path:
    """A job file that is fit, with local inputs."""
    write_model(tmp_path / "model.safetensors")
    (tmp_path / "pictures").symlink_to(pictures)
    return write(tmp_path / "job.toml")


def write(path: Path, *, top: str = "", sagemaker: str = "", training: str = "", **values: str) -> Path:
    """A job file of a fit job, with more lines in its parts; `values` replace those at the top."""
    told = {
        "name": "cat",
        "base_model": "model.safetensors",
        "dataset": "pictures",
        "output": f"s3://{BUCKET}/of/mine",
        **values,
    }
    machine = {"image": f"{REPOSITORY}:0.1.0", "role": ROLE, "instance": "ml.g5.xlarge"}
    kept = {key: value for key, value in machine.items() if f"{key} =" not in sagemaker}
    lines = [*(f"{key} = {json.dumps(value)}" for key, value in told.items()), top]
    lines += ["[sagemaker]", *(f"{key} = {json.dumps(value)}" for key, value in kept.items()), sagemaker]
    trainer = [] if "trainer =" in training else ['trainer = "builtin"']
    lines += ["[training]", *trainer, 'resolution = "64,64"', "min_bucket_reso = 64", training]
    path.write_text("\n".join(lines))
    return path
