"""lora submit, in an account of moto's."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.client import BaseClient
from botocore.exceptions import ClientError

from entrypoint.failures import Unfit
from lora_jobs import JobFile, submit
from lora_jobs.__main__ import main
from lora_jobs.errors import LoraError
from tests.lora_jobs.account import BUCKET, REPOSITORY, Account, account, job_file, write

__all__ = ["account", "job_file"]

CHANGING = ("PutObject", "CopyObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload")


def test_a_job(account: Account, job_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", str(job_file)]) == 0
    (name,) = account.jobs
    (asked,) = account.made("CreateTrainingJob")
    assert asked["TrainingJobName"] == name
    assert asked["AlgorithmSpecification"]["TrainingImage"] == f"{REPOSITORY}@{account.digest}"
    channels = {
        one["ChannelName"]: one["DataSource"]["S3DataSource"]["S3Uri"] for one in asked["InputDataConfig"]
    }
    below = {channel: uri.removeprefix(f"s3://{BUCKET}/") for channel, uri in channels.items()}
    assert account.keys(below["model"]) == [below["model"] + "model.safetensors"]
    pictures = [f"2_shape/{number}.{ending}" for number in range(4) for ending in ("png", "txt")]
    assert account.keys(below["dataset"]) == [below["dataset"] + path for path in pictures]
    out, err = capsys.readouterr()
    assert out.splitlines()[-3:] == [
        f"{name}: started",
        f"LoRAs: s3://{BUCKET}/of/mine/{name}/lora",
        f"next: lora watch {job_file}, lora board {job_file}, lora fetch {job_file}",
    ]
    assert not err


def test_the_same_again_starts_nothing(
    account: Account, job_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = submit(job_file)
    account.end(first.name, "InProgress")
    capsys.readouterr()
    assert main(["submit", str(job_file)]) == 0
    assert capsys.readouterr().out.startswith(
        f"{first.name}: is going already (InProgress); nothing was started\n"
    )
    account.end(first.name, "Stopping")
    assert main(["submit", str(job_file)]) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith(f"{first.name}: is being stopped, and nothing was started;")
    assert told[-1] == f"next: lora watch {job_file}, then lora submit {job_file}"
    account.end(first.name, "Completed")
    assert main(["submit", str(job_file)]) == 0
    out = capsys.readouterr().out
    assert f"{first.name}: completed already; lora submit {job_file} --again starts another\n" in out
    assert f"LoRAs: {first.output}\n" in out
    assert list(account.jobs) == [first.name]
    assert main(["submit", str(job_file), "--again"]) == 0
    assert f"{first.name}-2: started\n" in capsys.readouterr().out  # from the beginning
    assert list(account.jobs) == [first.name, f"{first.name}-2"]


def test_where_the_loras_of_an_isolated_job_are(account: Account, job_file: Path) -> None:
    write(job_file, sagemaker="network_isolation = true")
    first = submit(job_file)
    assert first.output == f"s3://{BUCKET}/of/mine/{first.name}/output/model"
    account.end(first.name, "Completed")
    assert submit(job_file).output == first.output


def test_again_does_not_disturb_a_job_that_is_going(
    account: Account, job_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = submit(job_file).name
    account.end(name, "Stopping")
    assert main(["submit", str(job_file), "--again"]) == 1
    told = f"ERROR: {name}: it is still going (Stopping), and another would share its states."
    assert capsys.readouterr().err.startswith(told)
    assert list(account.jobs) == [name]


@pytest.mark.parametrize("status", ["Failed", "Stopped"])
def test_a_job_that_came_to_nothing_goes_on_from_its_states(
    account: Account, job_file: Path, status: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = submit(job_file)
    account.end(first.name, status)
    second = submit(write(job_file, sagemaker='instance = "ml.g5.2xlarge"'))  # on a larger machine
    assert (second.name, second.started) == (f"{first.name}-2", True)
    assert second.request["CheckpointConfig"] == first.request["CheckpointConfig"]
    assert second.request["HyperParameters"]["output_uri"].endswith(f"/{second.name}/lora")
    account.end(second.name, status)
    assert main(["submit", str(job_file)]) == 0
    told = f"{first.name}-3: started; it goes on from the newest state, if {second.name} has left one\n"
    assert told in capsys.readouterr().out
    account.end(f"{first.name}-3", status)
    for deleted in (first.name, second.name):  # as DeleteTrainingJob does
        del account.jobs[deleted]
    assert submit(job_file).name == f"{first.name}-4"


def test_what_is_listed_may_be_deleted_already(
    account: Account, job_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = submit(job_file)
    account.end(first.name, "Completed")
    second = submit(job_file, again=True)
    listed = [second.name, first.name]
    del account.jobs[second.name]
    monkeypatch.setattr(importlib.import_module("lora_jobs.submit"), "attempts", lambda *_: listed)
    found = submit(job_file)
    assert (found.name, found.started) == (first.name, False)
    assert submit(job_file, again=True).name == f"{first.name}-3"


@pytest.mark.parametrize(
    "changed", [{"training": "seed = 2"}, {"name": "dog"}, {"output": f"s3://{BUCKET}/else"}]
)
def test_another_job_has_another_name(account: Account, job_file: Path, changed: dict[str, Any]) -> None:
    first = submit(job_file, dry_run=True)
    second = submit(write(job_file, **changed), dry_run=True)
    assert first.name != second.name
    assert first.request["CheckpointConfig"] != second.request["CheckpointConfig"]


def test_another_picture_makes_another_job(account: Account, job_file: Path, pictures: Path) -> None:
    first = submit(job_file, dry_run=True).name
    (job_file.parent / "pictures").unlink()
    copy(pictures, job_file.parent / "pictures")
    assert submit(job_file, dry_run=True).name == first
    (job_file.parent / "pictures" / "2_shape" / "0.txt").write_text("another caption")
    assert submit(job_file, dry_run=True).name != first


def test_a_dry_run_changes_nothing(
    account: Account, job_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", str(job_file), "--dry-run"]) == 0
    asked = json.loads(capsys.readouterr().out)
    assert {name for _, name, _ in account.calls} <= {"DescribeImages", "HeadBucket", "ListTrainingJobs"}
    assert (account.keys(), account.jobs) == ([], {})
    assert submit(job_file).request == asked


def test_json_is_all_that_is_printed(
    account: Account, job_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", str(job_file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["started"] is True
    assert told["arn"].endswith(told["name"])
    assert told["request"] == account.made("CreateTrainingJob")[0]


def test_an_unfit_job_costs_nothing(
    account: Account, job_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(job_file, training="lerning_rate = 1\nmax_train_epochs = 0")
    assert main(["submit", str(job_file)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[2] for line in lines] == [
        "[training] lerning_rate",
        "[training] max_train_epochs",
    ]
    assert not account.calls


def test_a_bucket_elsewhere_is_told_before_anything_is_sent(
    account: Account, job_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = {"LocationConstraint": "eu-central-1"}
    account.client("s3").create_bucket(Bucket="in-frankfurt", CreateBucketConfiguration=where)
    write(job_file, output="s3://in-frankfurt/loras")
    assert main(["submit", str(job_file)]) == 2
    assert "job.toml: output: the bucket in-frankfurt is in eu-central-1, the job in us-east-1" in (
        capsys.readouterr().err
    )
    write(job_file, output="s3://nobodys-bucket/loras")
    assert main(["submit", str(job_file)]) == 2
    assert "job.toml: output: there is no bucket nobodys-bucket" in capsys.readouterr().err
    assert not account.made("PutObject")


def test_a_bucket_that_may_not_be_looked_at(
    account: Account, job_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 says where it is with its refusal."""
    ask = BaseClient._make_api_call  # type: ignore[attr-defined]

    def refuse(client: Any, operation: str, arguments: dict[str, Any]) -> Any:
        if operation != "HeadBucket":
            return ask(client, operation, arguments)
        told = {"HTTPStatusCode": 403, "HTTPHeaders": {"x-amz-bucket-region": region}}
        raise ClientError({"Error": {"Code": "403"}, "ResponseMetadata": told}, operation)  # type: ignore[typeddict-item]

    monkeypatch.setattr(BaseClient, "_make_api_call", refuse)
    region = "eu-central-1"
    with pytest.raises(Unfit, match="is in eu-central-1, the job in us-east-1"):
        submit(job_file)
    region = "us-east-1"
    assert submit(job_file).started


def test_what_check_notes_is_told(
    account: Account, job_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", str(write(job_file, sagemaker='instance = "ml.g5.xlrage"'))]) == 0
    assert "note: instance = ml.g5.xlrage is not among the types that boto3 knows" in capsys.readouterr().out


def test_a_job_file_made_in_python(account: Account, job_file: Path) -> None:
    job = JobFile.read(job_file)
    assert submit(job).name == submit(job_file).name
    with pytest.raises(Unfit, match="the job file: \\[training\\] lr"):
        submit(JobFile.model_validate({**job.model_dump(), "training": {"lr": 1}}))


@pytest.mark.parametrize("status", ["InProgress", "Failed"])
def test_somebody_else_was_faster(
    account: Account, job_file: Path, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    """Between the question and the start the same job is started elsewhere: SageMaker refuses its name."""
    ask = BaseClient._make_api_call  # type: ignore[attr-defined]

    def faster(client: Any, operation: str, arguments: dict[str, Any]) -> Any:
        if operation != "CreateTrainingJob":
            return ask(client, operation, arguments)
        ask(client, operation, arguments)
        account.end(arguments["TrainingJobName"], status)
        raise ClientError({"Error": {"Code": "ResourceInUse", "Message": "it exists"}}, operation)

    monkeypatch.setattr(BaseClient, "_make_api_call", faster)
    if status == "Failed":
        with pytest.raises(LoraError, match="started elsewhere meanwhile, and has ended: Failed"):
            submit(job_file)
    else:
        found = submit(job_file)
        assert (found.started, found.status) == (False, status)


def interrupting(account: Account, monkeypatch: pytest.MonkeyPatch, moment: int, *, after: bool) -> None:
    """Let Ctrl-C come before or after the call of this number that changes something, and no other."""
    ask = BaseClient._make_api_call  # type: ignore[attr-defined]
    left = iter(range(moment + 1))

    def asked(client: Any, operation: str, arguments: dict[str, Any]) -> Any:
        now = operation in (*CHANGING, "CreateTrainingJob") and next(left, None) == moment
        if now and not after:
            raise KeyboardInterrupt
        answer = ask(client, operation, arguments)
        if now:
            raise KeyboardInterrupt
        return answer

    monkeypatch.setattr(BaseClient, "_make_api_call", asked)


@pytest.fixture
def first_version(account: Account, job_file: Path, pictures: Path) -> Iterator[set[str]]:
    """What is in S3 of a former version of the data set."""
    (job_file.parent / "pictures").unlink()
    copy(pictures, job_file.parent / "pictures")
    account.end(submit(job_file).name, "Completed")
    (job_file.parent / "pictures" / "2_shape" / "0.txt").write_text("another caption")
    yield set(account.keys())


# 7 copies, 1 file, the manifest, the job
@pytest.mark.parametrize("moment", [0, 3, 7, 8, 9])
@pytest.mark.parametrize("after", [False, True])
def test_cut_off_and_typed_again(
    account: Account, job_file: Path, first_version: set[str], moment: int, after: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupting(account, patch, moment, after=after)
        assert main(["submit", str(job_file)]) == 130
    account.calls.clear()
    found = submit(job_file)
    assert len(account.jobs) == 2
    assert found.started == (not (after and moment == 9))
    new = set(account.keys()) - first_version
    assert len([key for key in new if "/dataset-" in key and not key.endswith(".json")]) == 8
    assert len([key for key in new if key.endswith(".json")]) == 1
    assert not account.client("s3").list_multipart_uploads(Bucket=BUCKET).get("Uploads")
    done = moment + after - 1 if moment < 7 else 7  # others were under way, and may have come through
    assert len([one for one in account.calls if one[1] in ("CopyObject", "PutObject")]) <= 9 - done


def copy(source: Path, target: Path) -> None:
    """Copy a folder's files, so that they may be changed."""
    for file in source.rglob("*.*"):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.read_bytes())
