"""The stand-in says no where AWS does, in its words."""

import re
import socket
import subprocess
import sys
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

from demo.machine import Job, client
from demo.service_model import MODEL, problems
from demo.stand_in import BUCKET, IMAGE, ROLE, StandIn
from tests.lora_jobs.client import ROOT


@pytest.fixture
def request_(aws: StandIn) -> dict[str, Any]:
    """A request that is granted; its job is never started (`no_machines`)."""
    client("s3", aws.address).put_object(Bucket=BUCKET, Key="small/model.safetensors", Body=b"x")
    source = {"S3DataType": "S3Prefix", "S3Uri": f"s3://{BUCKET}/small/"}
    return {
        "TrainingJobName": "cat-01234567",
        "RoleArn": ROLE,
        "AlgorithmSpecification": {"TrainingImage": IMAGE, "TrainingInputMode": "File"},
        "InputDataConfig": [{"ChannelName": "model", "DataSource": {"S3DataSource": source}}],
        "OutputDataConfig": {"S3OutputPath": f"s3://{BUCKET}/loras"},
        "ResourceConfig": {"InstanceType": "ml.g5.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 50},
        "StoppingCondition": {"MaxRuntimeInSeconds": 60},
    }


@pytest.fixture
def sagemaker(aws: StandIn, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(Job, "start", lambda _: None)
    monkeypatch.setattr(aws.sagemaker, "jobs", {})
    return client("sagemaker", aws.address)


def refused(sagemaker: Any, request: dict[str, Any]) -> tuple[str, str]:
    with pytest.raises(ClientError) as caught:
        sagemaker.create_training_job(**request)
    told = caught.value.response["Error"]
    return told["Code"], told["Message"]


def test_a_name_is_taken_once(sagemaker: Any, request_: dict[str, Any]) -> None:
    sagemaker.create_training_job(**request_)
    code, message = refused(sagemaker, request_)
    assert code == "ResourceInUse"
    assert "a training job with this name already exists" in message


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"RoleArn": f"{ROLE}-2"}, "Could not assume role"),
        ({"RoleArn": ROLE.replace("123456789012", "210987654321")}, "Could not assume role"),
        (
            {
                "AlgorithmSpecification": {
                    "TrainingImage": IMAGE.replace("us-east-1", "us-east-2"),
                    "TrainingInputMode": "File",
                }
            },
            "image",
        ),
        ({"AlgorithmSpecification": {"TrainingImage": f"{IMAGE}.9", "TrainingInputMode": "File"}}, "image"),
        ({"OutputDataConfig": {"S3OutputPath": "s3://nobodys/loras"}}, "bucket nobodys does not exist"),
        ({"EnableManagedSpotTraining": True}, "Invalid MaxWaitTimeInSeconds"),
        (
            {
                "EnableManagedSpotTraining": True,
                "StoppingCondition": {"MaxRuntimeInSeconds": 60, "MaxWaitTimeInSeconds": 59},
            },
            "Invalid MaxWaitTimeInSeconds",
        ),
        ({"StoppingCondition": {"MaxRuntimeInSeconds": 60, "MaxWaitTimeInSeconds": 60}}, "MaxWaitTime"),
        ({"TrainingJobName": "cat_1"}, "regular expression pattern"),
        ({"TrainingJobName": "c" * 64}, "length less than or equal to 63"),
        ({"HyperParameters": {"a": "x" * 2501}}, "length less than or equal to 2500"),
        ({"HyperParameters": {str(number): "1" for number in range(101)}}, "less than or equal to 100"),
        (
            {"ResourceConfig": {"InstanceType": "ml.g5.tiny", "InstanceCount": 1, "VolumeSizeInGB": 5}},
            "enum value set",
        ),
    ],
)
def test_what_is_unfit_is_refused(
    changed: dict[str, Any], said: str, sagemaker: Any, request_: dict[str, Any]
) -> None:
    code, message = refused(sagemaker, {**request_, **changed})
    assert code == "ValidationException"
    assert said in message


def test_a_channel_without_objects_is_refused(sagemaker: Any, request_: dict[str, Any]) -> None:
    request_["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"] = f"s3://{BUCKET}/nothing"
    assert "No S3 objects found" in refused(sagemaker, request_)[1]


def test_a_quota_is_told(aws: StandIn, sagemaker: Any, request_: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setitem(aws.sagemaker.quotas, "ml.g5.xlarge", 0)
    code, message = refused(sagemaker, request_)
    assert code == "ResourceLimitExceeded"
    assert "'ml.g5.xlarge for training job usage' is 0" in message


def test_every_answer_has_awss_shape(sagemaker: Any, request_: dict[str, Any], aws: StandIn) -> None:
    """Which the stand-in checks itself; so an answer that has another must be noticed."""
    sagemaker.create_training_job(**request_)
    told = sagemaker.describe_training_job(TrainingJobName="cat-01234567")
    assert told["SecondaryStatusTransitions"][0]["Status"] == "Starting"
    shape = MODEL.operation_model("DescribeTrainingJob").output_shape
    assert shape is not None
    answer = aws.sagemaker.answer("DescribeTrainingJob", {"TrainingJobName": "cat-01234567"})
    assert problems(shape, answer) == []
    assert problems(shape, {**answer, "TrainingJobStatus": "Done"})
    assert problems(shape, {name: value for name, value in answer.items() if name != "CreationTime"})


def test_jobs_are_listed_newest_first_a_page_at_a_time(sagemaker: Any, request_: dict[str, Any]) -> None:
    for name in ("cat-1", "dog-1", "cat-2", "cat-3"):
        sagemaker.create_training_job(**{**request_, "TrainingJobName": name})

    def names(**asked: Any) -> list[str]:
        pages = sagemaker.get_paginator("list_training_jobs").paginate(
            SortBy="CreationTime", SortOrder="Descending", PaginationConfig={"PageSize": 2}, **asked
        )
        return [one["TrainingJobName"] for page in pages for one in page["TrainingJobSummaries"]]

    assert names() == ["cat-3", "cat-2", "dog-1", "cat-1"]
    assert names(NameContains="cat") == ["cat-3", "cat-2", "cat-1"]
    sagemaker.stop_training_job(TrainingJobName="cat-1")
    assert names(StatusEquals="Stopping") == ["cat-1"]


def test_there_is_no_such_job(sagemaker: Any) -> None:
    for call in (sagemaker.describe_training_job, sagemaker.stop_training_job):
        with pytest.raises(ClientError, match=re.escape("ValidationException")) as caught:
            call(TrainingJobName="nothing")
        assert caught.value.response["Error"]["Message"] == "Requested resource not found."


def test_other_services_are_motos(aws: StandIn) -> None:
    keys = dict(aws.environment)
    session = boto3.session.Session(
        aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
        region_name=keys["AWS_REGION"],
    )
    sts = session.client("sts", endpoint_url=keys["AWS_ENDPOINT_URL"])
    assert sts.get_caller_identity()["Account"] == "123456789012"
    ecr = session.client("ecr", endpoint_url=keys["AWS_ENDPOINT_URL"])
    (image,) = ecr.describe_images(repositoryName="sagemaker-kohya")["imageDetails"]
    assert image["imageDigest"].startswith("sha256:")


def test_a_port_that_is_taken_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = subprocess.run(
            [sys.executable, "-m", "demo.stand_in", "--port", str(port)],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert result.returncode == 1
    assert f"Port {port} is in use" in result.stderr
    assert "Traceback" not in result.stderr
