"""A training job of the stand-in: what SageMaker's machine does, on this one, with the real `train`.

Sources: "How Amazon SageMaker runs your training image", "Managed spot training" and "Use checkpoints" in the
SageMaker developer guide. What is not written there is marked here as an assumption.
"""

import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any

import boto3
import psutil

GROUP = "/aws/sagemaker/TrainingJobs"
REGION = "us-east-1"
ACCOUNT = "123456789012"  # moto's
KEYS = {"AWS_ACCESS_KEY_ID": "demo", "AWS_SECRET_ACCESS_KEY": "demo-secret"}
COMMAND = [sys.executable, "-m", "entrypoint", "train"]  # `train`, as the image has it
_NOTICE = 120.0  # seconds between SIGTERM and SIGKILL
_TICK = 0.25  # seconds between two looks at the process and its folders
_SPOT = 0.3  # of the time is billed: an assumption, for the discount changes by the hour
_CHECKOUT = Path(__file__).parents[1]

_SAID = {  # assumption: the words, as the console shows them
    "Starting": "Preparing the instances for training",
    "Downloading": "Downloading input data",
    "Training": "Training image download completed. Training in progress.",
    "Interrupted": "Training job was interrupted: the spot instance was taken back",
    "Uploading": "Uploading generated training model",
    "Stopping": "Stopping the training job",
    "Completed": "Training job completed",
    "Failed": "Training job failed",
    "Stopped": "Training job stopped",
    "MaxRuntimeExceeded": "Training job runtime exceeded MaxRuntimeInSeconds",
    "MaxWaitTimeExceeded": "Training job waited longer than MaxWaitTimeInSeconds",
}


def client(service: str, address: str) -> Any:
    """A boto3 client of the stand-in itself, whatever this process' environment says."""
    session = boto3.session.Session(
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        region_name=REGION,
    )
    return session.client(service, endpoint_url=address)  # type: ignore[call-overload]


class Job:
    """One training job, from CreateTrainingJob to its end. `description`: what DescribeTrainingJob tells."""

    def __init__(self, request: Mapping[str, Any], address: str) -> None:
        self.name: str = request["TrainingJobName"]
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self.request = request
        now = time.time()
        told = {
            name: value for name, value in request.items() if name not in ("Tags", "SessionChainingConfig")
        }
        self.description: dict[str, Any] = {
            **told,
            "TrainingJobArn": arn(self.name),
            "ModelArtifacts": {"S3ModelArtifacts": f"{self._output}/output/model"},
            "TrainingJobStatus": "InProgress",
            "SecondaryStatus": "Starting",
            "CreationTime": now,
            "LastModifiedTime": now,
            "SecondaryStatusTransitions": [],
        }
        if not self._raw:
            self.description["ModelArtifacts"]["S3ModelArtifacts"] += ".tar.gz"
        self._address = address
        self._s3, self._logs = client("s3", address), client("logs", address)
        self._stop, self._interrupt, self._vanish = threading.Event(), threading.Event(), threading.Event()
        self._notice = _NOTICE
        self.lines: list[str] = []
        self._sent: dict[str, tuple[int, int]] = {}  # S3 URI → size and time of the file that is there
        self._become("Starting")

    # -- what may be asked of it ----------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """StopTrainingJob."""
        self._become("Stopping", "Stopping")
        self._stop.set()

    def interrupt(self, notice: float = _NOTICE) -> None:
        """Take the spot instance back: SIGTERM, SIGKILL after `notice` seconds, then a new machine."""
        self._notice = notice
        self._interrupt.set()

    def vanish(self) -> None:
        """End with everything that it started, at once: the stand-in ends."""
        self._vanish.set()
        if self._thread.is_alive():
            self._thread.join()

    # -- its life -------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._live()
        except Exception as error:  # also a defect of the stand-in must end the job for those who wait
            self._end("Failed", f"InternalServerError: {type(error).__name__}: {error}")

    def _live(self) -> None:
        while True:
            machine = Path(tempfile.mkdtemp(prefix="sm-"))  # short, for sockets lie below it
            try:
                how, code = self._attempt(machine)
                if how == "interrupted":
                    self._become("Interrupted")
                    self._become("Starting")
                    continue
                if how == "vanished":
                    return
                if how == "ran":
                    self._become("Uploading")
                self._upload(machine / "ml")
                self._finish(how, code, machine / "ml" / "output" / "failure")
                return
            finally:
                shutil.rmtree(machine, ignore_errors=True)

    def _attempt(self, machine: Path) -> tuple[str, int]:
        """One machine's work: how it ended, and its exit code.

        How: ran, stopped, interrupted, vanished, or the status of what it went beyond, as MaxRuntimeExceeded.
        """
        tree = machine / "ml"
        self._become("Downloading")
        self._configure(tree)
        for channel in self.request.get("InputDataConfig", ()):
            source = channel["DataSource"]["S3DataSource"]
            self._download(source["S3Uri"], tree / "input" / "data" / channel["ChannelName"])
        if checkpoints := self.request.get("CheckpointConfig"):
            self._download(checkpoints["S3Uri"], tree / "checkpoints")
        for folder in ("model", "output/data", "checkpoints"):
            (tree / folder).mkdir(parents=True, exist_ok=True)
        if self._stop.is_set():
            return "stopped", 0
        self._become("Training")
        self.description.setdefault("TrainingStartTime", time.time())
        return self._train(machine)

    def _train(self, machine: Path) -> tuple[str, int]:
        (machine / "tmp").mkdir()
        with subprocess.Popen(
            COMMAND,
            cwd=_CHECKOUT,
            env=self._environment(machine),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is the stand-in's alone
        ) as process:
            try:
                how = self._attend(process, machine / "ml")
            finally:
                _kill(process)
        self._sync(machine / "ml")
        return how, process.returncode

    def _attend(self, process: "subprocess.Popen[str]", tree: Path) -> str:
        """Carry its lines, checkpoints and event logs to AWS until it has ended; returns how that came."""
        assert process.stdout is not None
        said: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=_hear, args=(process.stdout, said), daemon=True).start()
        stream = f"{self.name}/algo-1-{time.time_ns() // 1_000_000}"
        self._logs.create_log_stream(logGroupName=GROUP, logStreamName=stream)
        limits = self.request["StoppingCondition"]
        overtime = time.time() + limits.get("MaxRuntimeInSeconds", 86400)
        overdue = self.description["CreationTime"] + limits.get("MaxWaitTimeInSeconds", float("inf"))
        how, killed = "ran", float("inf")
        while True:
            lines, ended = _waiting(said)
            self._tell(stream, lines)
            self._sync(tree)
            if ended:
                return how
            if how == "ran" and (asked := self._asked(overtime, overdue)):
                how, killed = asked, time.monotonic() + (self._notice if asked == "interrupted" else _NOTICE)
                process.send_signal(signal.SIGTERM)
            if self._vanish.is_set() or time.monotonic() > killed:
                _kill(process)
                how = "vanished" if self._vanish.is_set() else how
            time.sleep(_TICK)

    def _asked(self, overtime: float, overdue: float) -> str | None:
        if self._interrupt.is_set():
            self._interrupt.clear()
            return "interrupted"
        if self._stop.is_set():
            return "stopped"
        if time.time() > overdue:
            return "MaxWaitTimeExceeded"
        return "MaxRuntimeExceeded" if time.time() > overtime else None

    def _finish(self, how: str, code: int, failure: Path) -> None:
        """The job's last state. A job that was stopped is Stopped whatever its exit code."""
        if how == "stopped":
            self._end("Stopped")
        elif how in ("MaxRuntimeExceeded", "MaxWaitTimeExceeded"):
            self._end("Stopped", status=how)
        elif code == 0:
            self._end("Completed")
        else:
            cause = failure.read_text(errors="replace")[:980] if failure.exists() else ""
            self._end("Failed", f"AlgorithmError: {cause}, exit code: {code}")

    def _end(self, outcome: str, reason: str = "", *, status: str | None = None) -> None:
        now = time.time()
        self.description["TrainingEndTime"] = now
        if "TrainingStartTime" in self.description:
            seconds = now - self.description["TrainingStartTime"]
            paid = seconds * (_SPOT if self.request.get("EnableManagedSpotTraining") else 1)
            self.description["TrainingTimeInSeconds"] = max(1, round(seconds))
            self.description["BillableTimeInSeconds"] = max(1, round(paid))
            self.description["FinalMetricDataList"] = list(self._metrics(now))
        if reason:
            self.description["FailureReason"] = reason[:1024]
        self._become(status or outcome, outcome)

    def _become(self, secondary: str, status: str | None = None) -> None:
        """Take a new state. While a job is being stopped it stays Stopping to the end."""
        if self._stopping and status is None:
            return
        now = time.time()
        transitions = [dict(one) for one in self.description["SecondaryStatusTransitions"]]
        if transitions:
            transitions[-1]["EndTime"] = now
        transitions.append({"Status": secondary, "StartTime": now, "StatusMessage": _SAID[secondary]})
        changed = {"SecondaryStatusTransitions": transitions, "SecondaryStatus": secondary}
        if status:
            changed["TrainingJobStatus"] = status
        self.description.update(changed, LastModifiedTime=now)  # in one piece, for others read it meanwhile

    @property
    def _stopping(self) -> bool:
        return bool(self.description["TrainingJobStatus"] == "Stopping")

    def _metrics(self, now: float) -> Iterator[dict[str, Any]]:
        """The last value of each metric that the log holds."""
        for metric in self.request["AlgorithmSpecification"].get("MetricDefinitions", ()):
            found = [match[1] for line in self.lines if (match := re.search(metric["Regex"], line))]
            if found:
                yield {"MetricName": metric["Name"], "Value": float(found[-1]), "Timestamp": now}

    # -- the container --------------------------------------------------------------------------------

    def _configure(self, tree: Path) -> None:
        """What SageMaker writes into input/config."""
        folder = tree / "input" / "config"
        folder.mkdir(parents=True)
        instance = self.request["ResourceConfig"]["InstanceType"]
        channels = {
            channel["ChannelName"]: {
                "TrainingInputMode": channel.get("InputMode")
                or self.request["AlgorithmSpecification"]["TrainingInputMode"],
                "S3DistributionType": "FullyReplicated",
                "RecordWrapperType": "None",
            }
            for channel in self.request.get("InputDataConfig", ())
        }
        hosts = {
            "current_host": "algo-1",
            "hosts": ["algo-1"],
            "network_interface_name": "eth0",
            "current_instance_type": instance,
            "current_group_name": "homogeneousCluster",
            "instance_groups": [
                {"instance_group_name": "homogeneousCluster", "instance_type": instance, "hosts": ["algo-1"]}
            ],
        }
        for name, content in (
            ("hyperparameters", self.request.get("HyperParameters", {})),
            ("inputdataconfig", channels),
            ("resourceconfig", hosts),
        ):
            (folder / f"{name}.json").write_text(json.dumps(content))

    def _environment(self, machine: Path) -> dict[str, str]:
        """The container's. With network isolation it has neither credentials nor an endpoint."""
        ours = ("AWS_", "SM_", "SAGEMAKER_", "TRAINING_", "LORA_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        reached = (
            {} if self.request.get("EnableNetworkIsolation") else {**KEYS, "AWS_ENDPOINT_URL": self._address}
        )
        return {
            **kept,
            **self.request.get("Environment", {}),
            "TRAINING_JOB_NAME": self.name,
            "TRAINING_JOB_ARN": arn(self.name),
            "AWS_REGION": REGION,
            "SAGEMAKER_BASE_DIR": str(machine / "ml"),
            "TMPDIR": str(machine / "tmp"),
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            **reached,
        }

    # -- S3 and the log -------------------------------------------------------------------------------

    @property
    def _output(self) -> str:
        return f"{self.request['OutputDataConfig']['S3OutputPath'].rstrip('/')}/{self.name}"

    @property
    def _raw(self) -> bool:
        return bool(self.request["OutputDataConfig"].get("CompressionType") == "NONE")

    def _tell(self, stream: str, lines: list[str]) -> None:
        self.lines += lines
        if not lines:
            return
        now = time.time_ns() // 1_000_000
        events = [{"timestamp": now, "message": line} for line in lines]
        self._logs.put_log_events(logGroupName=GROUP, logStreamName=stream, logEvents=events)

    def _sync(self, tree: Path) -> None:
        """Copy what changed of the checkpoints and event logs. Nothing is deleted in S3 (an assumption)."""
        if checkpoints := self.request.get("CheckpointConfig"):
            self._send(tree / "checkpoints", checkpoints["S3Uri"])
        if board := self.request.get("TensorBoardOutputConfig"):
            where = f"{board['S3OutputPath'].rstrip('/')}/{self.name}/tensorboard-output"
            self._send(tree / "output" / "tensorboard", where)

    def _upload(self, tree: Path) -> None:
        """What is left at the end, also of a job that failed or was stopped.

        CompressionType is said to be of the model; that output/data is packed all the same is an assumption.
        """
        if self._raw:
            self._send(tree / "model", f"{self._output}/output/model")
        else:
            self._send_tar(tree / "model", f"{self._output}/output/model.tar.gz")
        self._send_tar(tree / "output" / "data", f"{self._output}/output/output.tar.gz")

    def _send_tar(self, folder: Path, uri: str) -> None:
        with tempfile.TemporaryFile() as packed:
            with tarfile.open(fileobj=packed, mode="w:gz") as tar:
                for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                    tar.add(path, path.name)
            packed.seek(0)
            bucket, key = _parts(uri)
            self._s3.put_object(Bucket=bucket, Key=key, Body=packed.read())

    def _send(self, folder: Path, uri: str) -> None:
        bucket, prefix = _parts(uri)
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            key = str(PurePosixPath(prefix) / path.relative_to(folder).as_posix())
            try:
                facts = path.stat()
                at = (facts.st_size, facts.st_mtime_ns)
                if not path.is_file() or self._sent.get(f"{bucket}/{key}") == at:
                    continue
                content = path.read_bytes()
            except FileNotFoundError:  # renamed meanwhile
                continue
            self._s3.put_object(Bucket=bucket, Key=key, Body=content)
            self._sent[f"{bucket}/{key}"] = at

    def _download(self, uri: str, folder: Path) -> None:
        """File mode: the objects whose keys begin with the URI's, below the last folder that it names."""
        bucket, prefix = _parts(uri)
        folder.mkdir(parents=True, exist_ok=True)
        for key in keys(self._s3, uri):
            below = key[len(prefix) :]
            relative = below.lstrip("/") if below.startswith("/") or prefix.endswith("/") or not prefix else (
                key[prefix.rfind("/") + 1 :]
            )  # fmt: skip
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            self._s3.download_file(bucket, key, str(target))


def arn(name: str) -> str:
    return f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:training-job/{name}"


def keys(s3: Any, uri: str) -> list[str]:
    """The keys that an S3Prefix stands for, folders' own left out."""
    bucket, prefix = _parts(uri)
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return [item["Key"] for page in pages for item in page.get("Contents", ()) if item["Key"][-1] != "/"]


def _parts(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def _hear(stream: IO[str], said: "queue.SimpleQueue[str | None]") -> None:
    for line in stream:
        said.put(line.rstrip("\n"))
    said.put(None)


def _waiting(said: "queue.SimpleQueue[str | None]") -> tuple[list[str], bool]:
    """The lines that are there now, and whether they were the last."""
    lines: list[str] = []
    while not said.empty():
        line = said.get()
        if line is None:
            return lines, True
        lines.append(line or " ")  # CloudWatch takes no empty event
    return lines, False


def _kill(process: "subprocess.Popen[str]") -> None:
    """A container dies with all that runs in it."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    process.kill()
    for one in family:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
