"""A stand-in for AWS on this machine: `make stand-in`. No account, no network, nothing to pay.

    python -m demo.stand_in [--port N] [--folder FOLDER]

SageMaker's requests are held against AWS's own description and answered here; a training job is the real
`python -m entrypoint train` in the tree that SageMaker would make. S3, CloudWatch Logs, ECR, IAM and STS are
moto's, in the same process. Prints the lines to type, and ends with all its jobs on Ctrl-C.
"""

import argparse
import json
import logging
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from botocore.exceptions import ClientError
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from demo.machine import ACCOUNT, GROUP, KEYS, REGION, Job, arn, client, keys
from demo.service_model import MODEL, problems

BUCKET = "demo"
REPOSITORY = "sagemaker-kohya"
IMAGE = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/{REPOSITORY}:0.1.0"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/{REPOSITORY}"
LORA = Path(sys.executable).with_name("lora")
_TARGET = "SageMaker."
_INTERRUPT = "/stand-in/interrupt"  # ours: ?job=NAME&notice=SECONDS takes a spot instance back
_TRUST = {
    "Version": "2012-10-17",
    "Statement": [
        {"Effect": "Allow", "Principal": {"Service": "sagemaker.amazonaws.com"}, "Action": "sts:AssumeRole"}
    ],
}
_OVER = ("Completed", "Failed", "Stopped")


class Refused(Exception):
    """AWS's answer to a request that it does not grant: the error's code and its words."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class SageMaker:
    """The calls of SageMaker that a client of training jobs makes. Safe to share between threads."""

    def __init__(self, address: str) -> None:
        self.jobs: dict[str, Job] = {}
        self.quotas: dict[str, int] = {}  # by instance type; others have no limit
        self._address = address
        self._s3, self._ecr, self._iam = (client(name, address) for name in ("s3", "ecr", "iam"))
        self._lock = threading.Lock()

    def answer(self, operation: str, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a call. Raises Refused."""
        handlers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "CreateTrainingJob": self._create,
            "DescribeTrainingJob": lambda asked: dict(self._job(asked).description),
            "ListTrainingJobs": self._list,
            "StopTrainingJob": self._stop,
            "ListTags": self._tags,
        }
        if operation not in handlers:
            raise Refused("UnknownOperationException", f"the stand-in does not have {operation}")
        model = MODEL.operation_model(operation)
        if model.input_shape is not None and (wrong := problems(model.input_shape, request)):
            count = f"{len(wrong)} validation error{'s' * (len(wrong) > 1)} detected"
            raise Refused("ValidationException", f"{count}: {'; '.join(wrong)}")
        answer = handlers[operation](request)
        if model.output_shape is not None and (wrong := problems(model.output_shape, answer)):
            raise AssertionError(f"the stand-in's answer to {operation} is not AWS's: {wrong}")
        return answer

    def end(self) -> None:
        """End every job, at once."""
        for job in self.jobs.values():
            job.vanish()

    def _create(self, request: dict[str, Any]) -> dict[str, Any]:
        name = request["TrainingJobName"]
        self._check(request)
        with self._lock:
            if name in self.jobs:
                raise Refused(
                    "ResourceInUse",
                    "Training job names must be unique within an AWS account and region, and a training job "
                    f"with this name already exists ({arn(name)})",
                )
            job = self.jobs[name] = Job(request, self._address)
        job.start()
        return {"TrainingJobArn": arn(name)}

    def _check(self, request: dict[str, Any]) -> None:
        """What the service refuses at once. Its own words, where they are known from its users' reports."""
        role, spot = request["RoleArn"], request.get("EnableManagedSpotTraining", False)
        stopping, resources = request["StoppingCondition"], request["ResourceConfig"]
        try:
            known = self._iam.get_role(RoleName=role.rpartition("/")[2])["Role"]["Arn"]
        except ClientError:
            known = ""
        if known != role:
            raise Refused(
                "ValidationException",
                f"Could not assume role {role}. Please ensure that the role exists and allows principal "
                "'sagemaker.amazonaws.com' to assume the role.",
            )
        self._check_image(request["AlgorithmSpecification"]["TrainingImage"])
        longest, wait = stopping.get("MaxRuntimeInSeconds", 86400), stopping.get("MaxWaitTimeInSeconds")
        if spot and (wait is None or wait < longest):
            raise Refused(
                "ValidationException",
                "Invalid MaxWaitTimeInSeconds. It must be present and be greater than or equal to "
                "MaxRuntimeInSeconds",
            )
        if not spot and wait is not None:
            raise Refused("ValidationException", "MaxWaitTimeInSeconds needs EnableManagedSpotTraining")
        if spot and resources.get("KeepAlivePeriodInSeconds"):
            raise Refused("ValidationException", "KeepAlivePeriodInSeconds cannot be set for spot training")
        kind = resources["InstanceType"]
        if self.quotas.get(kind, 1) < 1:
            raise Refused(
                "ResourceLimitExceeded",
                f"The account-level service limit '{kind} for {'spot ' * spot}training job usage' is 0 "
                "Instances, with current utilization of 0 Instances and a request delta of 1 Instances. "
                "Please use AWS Service Quotas to request an increase for this quota.",
            )
        places = [
            channel["DataSource"]["S3DataSource"]["S3Uri"] for channel in request.get("InputDataConfig", ())
        ]
        for place in places:
            self._check_channel(place)
        for place in (*places, request["OutputDataConfig"]["S3OutputPath"]):
            self._check_bucket(place.removeprefix("s3://").partition("/")[0])

    def _check_bucket(self, bucket: str) -> None:
        try:
            region = self._s3.head_bucket(Bucket=bucket).get("BucketRegion", REGION)
        except ClientError:
            raise Refused("ValidationException", f"The bucket {bucket} does not exist") from None
        if region != REGION:  # assumption: the words
            raise Refused("ValidationException", f"The bucket {bucket} is in {region}, not in {REGION}")

    def _check_image(self, image: str) -> None:
        registry, _, rest = image.partition("/")
        repository, _, digest = rest.partition("@")
        repository, _, tag = repository.partition(":")
        known = {"imageDigest": digest} if digest else {"imageTag": tag or "latest"}
        try:
            if registry == IMAGE.partition("/")[0]:
                self._ecr.describe_images(repositoryName=repository, imageIds=[known])
                return
        except ClientError:
            pass
        raise Refused("ValidationException", f"Cannot find Requested image: {image}.")

    def _check_channel(self, uri: str) -> None:
        try:
            found = keys(self._s3, uri)
        except ClientError:
            found = []
        if not found:
            raise Refused(
                "ValidationException", f'No S3 objects found under S3 URL "{uri}" given in input data source.'
            )

    def _job(self, request: dict[str, Any]) -> Job:
        job = self.jobs.get(request["TrainingJobName"])
        if job is None:
            raise Refused("ValidationException", "Requested resource not found.")
        return job

    def _stop(self, request: dict[str, Any]) -> dict[str, Any]:
        job = self._job(request)
        status = job.description["TrainingJobStatus"]
        if status in _OVER:
            raise Refused(
                "ValidationException",
                f"The request was rejected because the training job is in status {status}.",
            )
        if status != "Stopping":
            job.stop()
        return {}

    def _tags(self, request: dict[str, Any]) -> dict[str, Any]:
        name = request["ResourceArn"].rpartition("/")[2]
        return {"Tags": self._job({"TrainingJobName": name}).request.get("Tags", [])}

    def _list(self, request: dict[str, Any]) -> dict[str, Any]:
        field = {"Name": "TrainingJobName", "Status": "TrainingJobStatus"}.get(
            request.get("SortBy", ""), "CreationTime"
        )
        found = [
            job.description
            for job in list(self.jobs.values())
            if request.get("NameContains", "") in job.name
            and request.get("StatusEquals") in (None, job.description["TrainingJobStatus"])
        ]
        found.sort(key=lambda one: one[field], reverse=request.get("SortOrder", "Descending") == "Descending")
        start, most = int(request.get("NextToken", "0")), request.get("MaxResults", 10)
        told = MODEL.shape_for("TrainingJobSummary").members  # type: ignore[attr-defined]
        summaries = [{name: one[name] for name in told if name in one} for one in found[start : start + most]]
        more = {"NextToken": str(start + most)} if len(found) > start + most else {}
        return {"TrainingJobSummaries": summaries, **more}


class StandIn:
    """The server on a thread of this process. A context manager: `with StandIn() as aws: aws.address`."""

    def __init__(self, port: int = 0) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # not a line for each request
        self._moto: Any = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", port, self._dispatch, threaded=True)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self.sagemaker = SageMaker(self.address)

    @property
    def environment(self) -> dict[str, str]:
        """What makes every AWS client talk to the stand-in."""
        region = {"AWS_REGION": REGION, "AWS_DEFAULT_REGION": REGION}
        return {"AWS_ENDPOINT_URL": self.address, **KEYS, **region, "NO_PROXY": "127.0.0.1"}

    def __enter__(self) -> "StandIn":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._prepare()
        return self

    def __exit__(self, *_: object) -> None:
        self.sagemaker.end()
        self._server.shutdown()
        self._server.server_close()

    def _prepare(self) -> None:
        """A bucket, a repository with an image, a role and the log group. moto's memory is the process'."""
        s3, ecr, iam, logs = (client(name, self.address) for name in ("s3", "ecr", "iam", "logs"))
        manifest = {"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json"}
        steps: tuple[Callable[[], Any], ...] = (
            lambda: s3.create_bucket(Bucket=BUCKET),
            lambda: ecr.create_repository(repositoryName=REPOSITORY),
            lambda: ecr.put_image(
                repositoryName=REPOSITORY,
                imageManifest=json.dumps(manifest),
                imageTag=IMAGE.rpartition(":")[2],
            ),
            lambda: iam.create_role(RoleName=REPOSITORY, AssumeRolePolicyDocument=json.dumps(_TRUST)),
            lambda: logs.create_log_group(logGroupName=GROUP),
        )
        for make in steps:
            try:
                make()
            except ClientError as error:
                if "Exists" not in error.response["Error"]["Code"]:
                    raise

    def _dispatch(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        target = environ.get("HTTP_X_AMZ_TARGET", "")
        if environ["PATH_INFO"] == _INTERRUPT:
            return self._interrupt(parse_qs(environ["QUERY_STRING"]), start)
        if not target.startswith(_TARGET):
            answer: Iterable[bytes] = self._moto(environ, start)
            return answer
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        try:
            told = self.sagemaker.answer(target.removeprefix(_TARGET), json.loads(body or b"{}"))
        except Refused as error:
            return _reply(start, "400 Bad Request", {"__type": error.code, "message": str(error)})
        return _reply(start, "200 OK", told)

    def _interrupt(self, asked: dict[str, list[str]], start: Callable[..., Any]) -> Iterable[bytes]:
        job = self.sagemaker.jobs.get(asked.get("job", [""])[0])
        if job is None:
            return _reply(start, "404 Not Found", {"message": "no such job"})
        job.interrupt(float(asked.get("notice", ["120"])[0]))
        return _reply(start, "200 OK", {})


def _reply(start: Callable[..., Any], status: str, content: dict[str, Any]) -> Iterable[bytes]:
    body = json.dumps(content).encode()
    headers = {"Content-Type": "application/x-amz-json-1.1", "Content-Length": str(len(body))}
    start(status, [*headers.items(), ("x-amzn-RequestId", str(uuid.uuid4()))])
    return [body]


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m demo.stand_in", description="A stand-in for AWS, on loopback."
    )
    parser.add_argument("--port", type=int, default=0, help="a free one unless set")
    parser.add_argument(
        "--folder", type=Path, default=Path("demo-out/aws"), help="for a base model and pictures"
    )
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with StandIn(asked.port) as aws:
            model, dataset = _inputs(asked.folder.absolute())
            print(_told(aws, model, dataset), flush=True)
            threading.Event().wait()
    except KeyboardInterrupt:
        print("\nThe stand-in has ended, and all its jobs with it.")
        return 130
    return 0


def _inputs(folder: Path) -> tuple[Path, Path]:
    """A small base model and a data set to try it with. What is there already stays."""
    from demo import base_model, pictures  # noqa: PLC0415 (only the command needs them)

    model, dataset = folder / "base.safetensors", folder / "pictures"
    if not model.exists():
        base_model.write(model, "sd15")
    if not dataset.exists():
        pictures.write(dataset)
    return model, dataset


def _told(aws: StandIn, model: Path, dataset: Path) -> str:
    exports = "\n".join(f"export {name}={value}" for name, value in aws.environment.items())
    return f"""AWS's stand-in answers on {aws.address}, until Ctrl-C. In another shell, type:

unset AWS_PROFILE
{exports}
export PATH={LORA.parent}:$PATH
lora init --trainer builtin --base-model {model} \\
  --dataset {dataset} --output s3://{BUCKET}/loras \\
  --role {ROLE} \\
  --image {IMAGE} \\
  --set resolution=128,128 --set max_train_epochs=2 photos.toml
lora submit photos.toml
lora watch photos.toml
lora fetch photos.toml

The base model is small and has random weights, and two epochs of small pictures take a CPU a minute.
Your own pictures: --dataset FOLDER. The LoRA and report.html come into a folder of the job's name.
"""


if __name__ == "__main__":
    sys.exit(main())
