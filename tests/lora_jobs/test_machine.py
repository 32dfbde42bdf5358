"""What the stand-in does with a job, seen by a program that stands where `train` would."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import pytest

from demo import machine
from demo.machine import GROUP, Job, client
from demo.stand_in import BUCKET, IMAGE, ROLE, StandIn
from tests.lora_jobs.client import ROOT

_BEGINS = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
tree = Path(os.environ["SAGEMAKER_BASE_DIR"])
"""
# Told what it was given: its tree, and its environment.
LOOKS = """
def read(path): return json.loads((tree / "input/config" / path).read_text())
told = {
    "files": sorted(path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()),
    "hyperparameters": read("hyperparameters.json"),
    "channels": read("inputdataconfig.json"),
    "host": read("resourceconfig.json")["current_instance_type"],
    "environment": {k: v for k, v in os.environ.items() if k.startswith(("AWS_", "TR", "LORA_"))},
}
(tree / "model/told.json").write_text(json.dumps(told))
(tree / "output/data/notes.txt").write_text("noted")
(tree / "output/tensorboard").mkdir()
(tree / "output/tensorboard/events").write_text("log")
print("step=1 loss=0.5")
print("step=2 loss=0.25")
"""
FAILS = """
(tree / "output/failure").write_text("The disk is full.")
sys.exit(1)
"""
WAITS = """
def stopped(*_): print("asked to stop", flush=True); sys.exit(143)
signal.signal(signal.SIGTERM, stopped)
print("waiting", flush=True)
time.sleep(600)
"""
# Does not hear, and has a child. On its second machine it finds what it left, and is content.
DEAF = """
kept = sorted(path.name for path in (tree / "checkpoints").iterdir())
print("kept", kept, "and", sorted(path.name for path in (tree / "model").iterdir()), flush=True)
if kept: sys.exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(tree / "checkpoints/state").write_text("7")
(tree / "model/half.safetensors").write_text("half")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("child", child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def started(aws: StandIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Job]]:
    """Starts a job of such a program; it is ended with the test."""
    jobs = []

    def start(program: str, **changed: Any) -> Job:
        monkeypatch.setattr(machine, "COMMAND", [sys.executable, "-c", _BEGINS + program])
        client("s3", aws.address).put_object(Bucket=BUCKET, Key="in/sub/a.txt", Body=b"a")
        source = {"S3DataType": "S3Prefix", "S3Uri": f"s3://{BUCKET}/in"}
        job = Job(
            {
                "TrainingJobName": f"job-{time.time_ns()}",
                "RoleArn": ROLE,
                "AlgorithmSpecification": {
                    "TrainingImage": IMAGE,
                    "TrainingInputMode": "File",
                    "MetricDefinitions": [
                        {"Name": "loss", "Regex": r" loss=(\S+)"}, {"Name": "none", "Regex": "x=(.)"}
                    ],
                },
                "HyperParameters": {"output_name": "cat"},
                "InputDataConfig": [{"ChannelName": "dataset", "DataSource": {"S3DataSource": source}}],
                "OutputDataConfig": {"S3OutputPath": f"s3://{BUCKET}/out/", "CompressionType": "NONE"},
                "ResourceConfig": {"InstanceType": "ml.g5.xlarge", "InstanceCount": 1},
                "StoppingCondition": {"MaxRuntimeInSeconds": 600},
                **changed,
            },
            aws.address,
        )  # fmt: skip
        jobs.append(job)
        job.start()
        return job

    yield start
    for job in jobs:
        job.vanish()


def until(happened: Callable[[], object]) -> None:
    end = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def ended(job: Job) -> dict[str, Any]:
    until(lambda: job.description["TrainingJobStatus"] in ("Completed", "Failed", "Stopped"))
    return job.description


def read(aws: StandIn, key: str) -> bytes:
    content: bytes = client("s3", aws.address).get_object(Bucket=BUCKET, Key=key)["Body"].read()
    return content


def test_a_job_finds_sagemakers_tree_and_environment(aws: StandIn, started: Callable[..., Job]) -> None:
    board = {"S3OutputPath": f"s3://{BUCKET}/board"}
    job = started(LOOKS, TensorBoardOutputConfig=board, Environment={"LORA_PRICE_PER_HOUR": "1"})
    told = ended(job)
    assert told["TrainingJobStatus"] == "Completed", job.lines
    seen = json.loads(read(aws, f"out/{job.name}/output/model/told.json"))
    assert seen["files"] == [
        "input/config/hyperparameters.json", "input/config/inputdataconfig.json",
        "input/config/resourceconfig.json", "input/data/dataset/sub/a.txt",
    ]  # fmt: skip
    assert seen["hyperparameters"] == {"output_name": "cat"}
    assert seen["channels"]["dataset"]["TrainingInputMode"] == "File"
    assert seen["host"] == "ml.g5.xlarge"
    environment = seen["environment"]
    assert environment["TRAINING_JOB_NAME"] == job.name
    assert environment["LORA_PRICE_PER_HOUR"] == "1"
    assert environment["AWS_ENDPOINT_URL"] == aws.address
    assert environment["AWS_ACCESS_KEY_ID"]

    assert told["FinalMetricDataList"][0]["Value"] == 0.25
    assert len(told["FinalMetricDataList"]) == 1
    assert [one["Status"] for one in told["SecondaryStatusTransitions"]] == [
        "Starting", "Downloading", "Training", "Uploading", "Completed",
    ]  # fmt: skip
    assert read(aws, f"board/{job.name}/tensorboard-output/events") == b"log"
    with tarfile.open(fileobj=BytesIO(read(aws, f"out/{job.name}/output/output.tar.gz"))) as tar:
        assert tar.getnames() == ["notes.txt"]
    logs = client("logs", aws.address)
    streams = logs.describe_log_streams(logGroupName=GROUP, logStreamNamePrefix=f"{job.name}/algo-1-")
    (stream,) = streams["logStreams"]
    events = logs.get_log_events(logGroupName=GROUP, logStreamName=stream["logStreamName"])["events"]
    assert [event["message"] for event in events] == ["step=1 loss=0.5", "step=2 loss=0.25"]


def test_with_network_isolation_it_has_no_way_out(aws: StandIn, started: Callable[..., Job]) -> None:
    job = started(LOOKS, EnableNetworkIsolation=True)
    ended(job)
    seen = json.loads(read(aws, f"out/{job.name}/output/model/told.json"))["environment"]
    assert not {"AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} & seen.keys()
    assert seen["AWS_REGION"] == "us-east-1"


def test_a_failure_is_told_as_sagemaker_tells_it(aws: StandIn, started: Callable[..., Job]) -> None:
    output = {"S3OutputPath": f"s3://{BUCKET}/out"}
    job = started(FAILS, OutputDataConfig=output)
    told = ended(job)
    assert told["TrainingJobStatus"] == "Failed"
    assert told["FailureReason"] == "AlgorithmError: The disk is full., exit code: 1"
    assert told["ModelArtifacts"]["S3ModelArtifacts"] == f"s3://{BUCKET}/out/{job.name}/output/model.tar.gz"
    assert read(aws, f"out/{job.name}/output/model.tar.gz")[:2] == b"\x1f\x8b"


@pytest.mark.parametrize(("stopping", "secondary"), [(False, "MaxRuntimeExceeded"), (True, "Stopped")])
def test_it_is_asked_to_stop(stopping: bool, secondary: str, started: Callable[..., Job]) -> None:
    job = started(WAITS, StoppingCondition={"MaxRuntimeInSeconds": 600 if stopping else 2})
    if stopping:
        until(lambda: "waiting" in job.lines)
        job.stop()
    told = ended(job)
    assert (told["TrainingJobStatus"], told["SecondaryStatus"]) == ("Stopped", secondary)
    assert "FailureReason" not in told
    if stopping:
        assert "asked to stop" in job.lines


def test_a_spot_job_has_waited_too_long(started: Callable[..., Job]) -> None:
    limits = {"MaxRuntimeInSeconds": 600, "MaxWaitTimeInSeconds": 2}
    told = ended(started(WAITS, StoppingCondition=limits, EnableManagedSpotTraining=True))
    assert (told["TrainingJobStatus"], told["SecondaryStatus"]) == ("Stopped", "MaxWaitTimeExceeded")


def test_an_interrupted_machine_leaves_only_its_checkpoints(started: Callable[..., Job]) -> None:
    """With everything that ran on it."""
    checkpoints = {"S3Uri": f"s3://{BUCKET}/checkpoints/{time.time_ns()}"}
    waiting = {"MaxRuntimeInSeconds": 600, "MaxWaitTimeInSeconds": 600}
    job = started(
        DEAF, CheckpointConfig=checkpoints, StoppingCondition=waiting, EnableManagedSpotTraining=True
    )
    until(lambda: any(line.startswith("child ") for line in job.lines))
    child = psutil.Process(int(next(line for line in job.lines if line.startswith("child ")).split()[1]))
    job.interrupt(notice=0)
    told = ended(job)
    assert told["TrainingJobStatus"] == "Completed"
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert [line for line in job.lines if line.startswith("kept")] == [
        "kept [] and []",
        "kept ['state'] and []",
    ]
    assert told["BillableTimeInSeconds"] <= max(1, 0.5 * told["TrainingTimeInSeconds"])


def test_the_command_prints_what_to_type_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "demo.stand_in", "--folder", str(tmp_path)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    told = ""
    for line in process.stdout:
        told += line
        if line.startswith("The base model is small"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "all its jobs" in out
    assert "Traceback" not in err
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        assert re.search(rf"^export {name}=\S+$", told, re.MULTILINE)
    assert (tmp_path / "base.safetensors").is_file()
    assert len(list((tmp_path / "pictures" / "2_photo").glob("*.txt"))) >= 10
