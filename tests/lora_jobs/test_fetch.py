"""lora fetch, from a bucket that holds what a job has left."""

import importlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest

from entrypoint.failures import StorageError
from entrypoint.storage import S3Uri
from lora_jobs import Fetched, fetch
from lora_jobs.__main__ import main
from lora_jobs.errors import LoraError
from tests.lora_jobs.test_jobs import TOLD
from tests.unit.test_checkpoint import PLAIN, lora, saved

__all__ = ["lora"]

JOB = "cat-01234567"
RECORD = {
    "job.json": json.dumps({"kind": "sd15"}).encode(),
    "cat.toml": "\n".join(f"{name} = {json.dumps(value)}" for name, value in PLAIN.items()).encode(),
}


class Left:
    """A job in a bucket: what is put there, and `fetch` of it."""

    def __init__(self, bucket: S3Uri, folder: Path) -> None:
        self.bucket, self.folder = bucket, folder
        self.status, self.lora = "Completed", f"s3://{bucket.bucket}/loras/{JOB}/lora"
        self.reason = ""
        self.region = "us-east-1"
        self.sagemaker = self

    def describe_training_job(self, **_: str) -> dict[str, Any]:
        return {
            **TOLD,
            "TrainingJobStatus": self.status,
            "FailureReason": self.reason,
            "OutputDataConfig": {"S3OutputPath": f"s3://{self.bucket.bucket}/loras"},
            "HyperParameters": {"output_name": "cat", "output_uri": self.lora},
        }

    def put(self, below: str, files: Mapping[str, bytes]) -> None:
        for name, content in files.items():
            key = f"loras/{JOB}/{below}/{name}"
            boto3.client("s3").put_object(Bucket=self.bucket.bucket, Key=key, Body=content)

    def fetch(self) -> Fetched:
        aws: Any = self
        return fetch(JOB, self.folder, aws=aws)


@pytest.fixture
def left(bucket: S3Uri, tmp_path: Path) -> Left:
    return Left(bucket, tmp_path / "fetched")


@pytest.fixture
def good(lora: dict[str, np.ndarray], tmp_path: Path) -> bytes:
    return saved(lora, tmp_path / "good.safetensors").read_bytes()


def packed(files: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def names(fetched: Fetched) -> set[str]:
    return {path.relative_to(fetched.folder).as_posix() for path in (*fetched.loras, *fetched.files)}


@pytest.mark.parametrize("data", ["raw", "tar"])
@pytest.mark.parametrize("compressed", [False, True])
def test_everything_that_a_job_has_left(compressed: bool, data: str, left: Left, good: bytes) -> None:
    """SageMaker's folders as they are or as tars, and what the job has sent itself."""
    model, report = {**RECORD, "cat.safetensors": good}, {"report.html": b"<html>", "sample/1.png": b"png"}
    if compressed:
        left.put("output", {"model.tar.gz": packed(model)})
    else:
        left.put("output/model", model)
    if data == "raw":
        left.put("output/data", report)
    else:
        left.put("output", {"output.tar.gz": packed(report)})
    left.put("lora", {"cat-000001.safetensors": good})
    fetched = left.fetch()
    assert [path.name for path in fetched.loras] == ["cat-000001.safetensors", "cat.safetensors"]
    assert names(fetched) == {
        "cat.safetensors", "cat-000001.safetensors", "cat.toml", "job.json", "report.html", "sample/1.png",
    }  # fmt: skip
    assert (left.folder / "cat.safetensors").read_bytes() == good
    assert (left.folder / "report.html").read_bytes() == b"<html>"


def test_what_is_whole_is_not_fetched_again(left: Left, good: bytes, capsys: Any) -> None:
    left.put("output/model", {**RECORD, "cat.safetensors": good})
    left.fetch()
    left.put("lora", {"cat-000001.safetensors": good})
    before = {path: path.stat().st_ino for path in left.folder.glob("cat*")}
    capsys.readouterr()
    assert len(left.fetch().loras) == 2
    assert {path: path.stat().st_ino for path in before} == before
    assert "fetch: 1 file," in capsys.readouterr().out


def test_what_is_of_something_else_is_not_written_over(left: Left, good: bytes) -> None:
    left.put("output/model", {**RECORD, "cat.safetensors": good})
    left.folder.mkdir()
    (left.folder / "cat.toml").write_text("a job file")
    with pytest.raises(LoraError, match=r"cat\.toml: it is there already, and not from cat-01234567"):
        left.fetch()
    (left.folder / "cat.toml").unlink()
    left.fetch()
    other: Any = left
    with pytest.raises(LoraError, match="it holds what cat-01234567 has made"):
        fetch("cat-89abcdef", left.folder, aws=other)


def test_a_tars_file_that_the_job_has_sent_itself_stays(left: Left, good: bytes, capsys: Any) -> None:
    left.put("output", {"output.tar.gz": packed({"report.html": b"<html>"})})
    left.put("lora", {"cat.safetensors": good, "report.html": b"<html>"})
    left.fetch()
    capsys.readouterr()
    left.fetch()
    assert "fetch: 1 file" not in capsys.readouterr().out


def test_of_a_job_that_runs_there_is_what_it_has_sent(left: Left, good: bytes) -> None:
    left.status = "InProgress"
    with pytest.raises(LoraError, match=f"has made nothing to fetch yet; .* lora watch {JOB}"):
        left.fetch()
    assert not left.folder.exists()
    left.put("lora", {"cat-000001.safetensors": good})
    assert names(left.fetch()) == {"cat-000001.safetensors"}


def test_why_there_is_no_lora_is_told(left: Left, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    left.put("output/model", RECORD)
    monkeypatch.setattr(importlib.import_module("lora_jobs.fetch"), "find", lambda *_: (left, JOB))
    left.status, left.reason = "Failed", "AlgorithmError: The disk is full., exit code: 1"
    assert main(["fetch", JOB, "--out", str(left.folder)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "  no LoRA, for the job failed: The disk is full."
    left.status, left.reason = "InProgress", ""
    assert main(["fetch", JOB, "--out", str(left.folder)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "  no LoRA yet"


def test_a_lora_that_does_not_work_is_set_aside(left: Left, lora: dict[str, np.ndarray], good: bytes) -> None:
    broken = {name: tensor * np.float16(np.nan) for name, tensor in lora.items()}
    bad = saved(broken, left.folder.with_name("bad.safetensors")).read_bytes()
    left.put("output/model", {**RECORD, "cat.safetensors": bad, "cat-000001.safetensors": good})
    with pytest.raises(LoraError, match=r"cat.safetensors holds NaN or Inf .* Set aside as .bad"):
        left.fetch()
    assert {path.name for path in left.folder.glob("*.safetensors*")} == {
        "cat.safetensors.bad", "cat-000001.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize("content", [b"<html>no such LoRA</html>", b""])
def test_before_a_record_of_it_a_lora_must_open(left: Left, content: bytes) -> None:
    left.put("lora", {"cat.safetensors": content})
    if not content:
        left.put("lora", {"cat.safetensors": b"\0" * 8})
    with pytest.raises(LoraError, match=r"cat.safetensors: .* Set aside as .bad"):
        left.fetch()


@pytest.mark.parametrize("name", ["../outside", "/outside"])
def test_a_tar_leads_nowhere_else(name: str, left: Left) -> None:
    left.put("output", {"output.tar.gz": packed({name: b"x", "good": b"x"})})
    if name[0] == "/":  # the data filter makes it a name below
        assert names(left.fetch()) == {"outside", "good"}
    else:
        with pytest.raises(LoraError, match=r"output.tar.gz: it is not unpacked, for .*outside"):
            left.fetch()
    assert not left.folder.with_name("outside").exists()


def test_a_tar_that_is_damaged_is_told(left: Left) -> None:
    left.put("output", {"output.tar.gz": packed({"a": bytes(1000)})[:60]})
    with pytest.raises(LoraError, match=r"output\.tar\.gz: it is not unpacked"):
        left.fetch()


def test_a_key_that_leads_out_is_refused(left: Left) -> None:
    left.put("output/model", {"sub/..": b"x"})
    with pytest.raises(StorageError, match="leads out of its folder"):
        left.fetch()
