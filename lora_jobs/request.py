"""What SageMaker is asked for: one CreateTrainingJob, made of a job file and nothing else.

Source: CreateTrainingJob in SageMaker's API reference, and botocore's service description of it.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrypoint.check import OUTPUT_BYTES, Plan, processes, to_fetch
from entrypoint.console import SECRET_OPTIONS
from entrypoint.failures import Unfit
from entrypoint.files import size
from entrypoint.inputs import PLACED
from entrypoint.storage import RemoteObject, S3Uri
from kohya import config
from kohya.problem import Problem
from kohya.states import NOT_LEARNED
from lora_jobs.aws import Aws
from lora_jobs.job_file import CHANNELS, JobFile, where
from lora_jobs.jobs import PRICE

if TYPE_CHECKING:
    from types_boto3_ecr.type_defs import ImageIdentifierTypeDef

TAG = "sagemaker-kohya"  # on every job of this client; its value is the job file's name
_NOT_ITS_NAME = NOT_LEARNED | config.OWNED | PLACED | SECRET_OPTIONS  # as of a state: entrypoint/states.py
_LEAST_VOLUME_GB = 30  # what the SageMaker SDK asks for
_ROOM_GB = 20  # for states, latents that are kept, and what SageMaker keeps there itself
_ECR = re.compile(
    r"(?P<registry>\d{12})\.dkr\.ecr(?:-fips)?\.(?P<region>[a-z0-9-]+)\.amazonaws\.com(?:\.cn)?"
    r"/(?P<repository>[a-z0-9._/-]+?)(?::(?P<tag>[\w.-]+))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)


def training_job(
    job: JobFile, *, name: str, base: str, image: str, channels: Mapping[str, str], volume_gb: int
) -> dict[str, Any]:
    """The arguments of CreateTrainingJob.

    `name`: of this job; `base`: what all attempts at it share, and with it the states. `image`: by digest.
    `channels`: their S3 URIs.
    """
    machine, output = job.sagemaker, job.output
    hyperparameters = job.hyperparameters
    if _publishes(job):
        hyperparameters["output_uri"] = loras(job, name)
    stopping = {"MaxRuntimeInSeconds": round(machine.max_runtime_hours * 3600)}
    if machine.spot:
        stopping["MaxWaitTimeInSeconds"] = round(machine.wait_hours * 3600)
    resources: dict[str, Any] = {
        "InstanceType": machine.instance,
        "InstanceCount": 1,
        "VolumeSizeInGB": machine.volume_gb or volume_gb,
    }
    if machine.volume_kms_key:
        resources["VolumeKmsKeyId"] = machine.volume_kms_key
    if machine.keep_alive_minutes:
        resources["KeepAlivePeriodInSeconds"] = machine.keep_alive_minutes * 60
    request: dict[str, Any] = {
        "TrainingJobName": name,
        "RoleArn": machine.role,
        "AlgorithmSpecification": {
            "TrainingImage": image,
            "TrainingInputMode": "File",
            "MetricDefinitions": [dict(one) for one in _metrics()],
        },
        "HyperParameters": hyperparameters,
        "InputDataConfig": [_channel(channel, uri) for channel, uri in channels.items()],
        "OutputDataConfig": {"S3OutputPath": output, "CompressionType": "NONE"},
        "ResourceConfig": resources,
        "StoppingCondition": stopping,
        "CheckpointConfig": {"S3Uri": checkpoints_uri(job, base)},
        "TensorBoardOutputConfig": {"S3OutputPath": f"{output}/tensorboard"},
        "EnableManagedSpotTraining": machine.spot,
        "EnableNetworkIsolation": machine.network_isolation,
        "Tags": [{"Key": key, "Value": value} for key, value in {TAG: job.name, **machine.tags}.items()],
    }
    if machine.output_kms_key:
        request["OutputDataConfig"]["KmsKeyId"] = machine.output_kms_key
    if machine.subnets:
        request["VpcConfig"] = {
            "Subnets": list(machine.subnets),
            "SecurityGroupIds": list(machine.security_groups),
        }
    if machine.price_per_hour:
        request["Environment"] = {PRICE: f"{machine.price_per_hour:g}"}
    return request


def loras(job: JobFile, name: str) -> str:
    """Where a job's LoRAs are found: where it sends each as it is finished, or where SageMaker puts all."""
    return f"{job.output}/{name}/{'lora' if _publishes(job) else 'output/model'}"


def _publishes(job: JobFile) -> bool:
    """Whether the job sends its LoRAs to S3 itself: it reaches S3, and no key is asked for that it lacks."""
    return not job.sagemaker.network_isolation and not job.sagemaker.output_kms_key


def checkpoints_uri(job: JobFile, base: str) -> str:
    """Where the states of all attempts at a job are kept."""
    return f"{job.output}/checkpoints/{base}"


def base_name(job: JobFile, plan: Plan, *, image: str, channels: Mapping[str, str]) -> str:
    """The job's name: that of the job file, and 8 hex digits of what is learned from what, by which image.

    On which machine, for how long and at which price is no part of it: an attempt on another instance goes
    on from the states of the one that failed. What a state would be refused for is: what an option comes to
    (the GPU's precision among them), how many GPUs train, and what lies in S3 now. A local input's URI holds
    its digest.
    """
    values = {name: value for name, value in plan.merged.values.items() if name not in _NOT_ITS_NAME}
    remote = sorted(f"{one.uri} {one.etag}" for one in plan.inputs if isinstance(one, RemoteObject))
    asked: list[object] = [job.hyperparameters, dict(channels), image.rpartition("@")[2] or image, job.output]
    asked += [values, remote, processes(plan.request, plan.gpu)]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()
    return f"{job.name}-{digest[:8]}"


def volume_gb(plan: Plan) -> int:
    """The GB that a job needs of its volume: its inputs, what it makes of them, and what it leaves.

    An instance with a disk of its own takes that instead, whatever is asked for.
    """
    local = sum(size(file) for file in plan.inputs if isinstance(file, Path))  # the rest is in to_fetch
    return max(_LEAST_VOLUME_GB, math.ceil((local + to_fetch(plan) + OUTPUT_BYTES) / 1e9) + _ROOM_GB)


def image_by_digest(job: JobFile, aws: Aws) -> str:
    """The job file's image by its digest: a tag may lead elsewhere tomorrow.

    Raises Unfit for an image that is not in ECR, or not in the job's region; ClientError of ECR.
    """
    image, found = job.sagemaker.image, _in_ecr(job)
    if found["region"] != aws.region:
        wrong = f"the image is in {found['region']}, the job in {aws.region}, and SageMaker wants one region"
        fix = f'Write region = "{found["region"]}" under [sagemaker], or push the image to {aws.region}'
        raise Unfit([Problem(where(job.file, "sagemaker.image"), wrong, fix)])
    if found["digest"]:
        return image
    tagged: ImageIdentifierTypeDef = {"imageTag": found["tag"] or "latest"}
    told = aws.ecr.describe_images(
        registryId=found["registry"], repositoryName=found["repository"], imageIds=[tagged]
    )
    digest = told["imageDetails"][0]["imageDigest"]
    return f"{image.removesuffix(':' + (found['tag'] or ''))}@{digest}"


def check_buckets(job: JobFile, aws: Aws) -> None:
    """Raise Unfit for buckets that are not there, or not in the job's region, as S3DataSource in SageMaker's
    API reference wants them. A bucket that may not be looked at says its region all the same.
    """
    from botocore.exceptions import ClientError  # noqa: PLC0415 (lora --help needs none)

    @cache
    def asked(bucket: str) -> tuple[bool, str]:
        """Whether it is there, and its region."""
        try:
            told: Mapping[str, Any] = aws.s3.head_bucket(Bucket=bucket)["ResponseMetadata"]
        except ClientError as error:
            told = error.response["ResponseMetadata"]
        region = told.get("HTTPHeaders", {}).get("x-amz-bucket-region", aws.region)
        return told["HTTPStatusCode"] != 404, region

    given = {key: job.remote[channel] for key, channel in CHANNELS.items() if channel in job.remote}
    problems = []
    for key, uri in {**given, "output": job.output}.items():
        bucket = S3Uri.parse(uri).bucket
        is_there, region = asked(bucket)
        if not is_there:
            wrong, fix = (
                f"there is no bucket {bucket}",
                f"Correct its name, or make it: aws s3 mb s3://{bucket}",
            )
            problems.append(Problem(where(job.file, key), wrong, fix))
        elif region != aws.region:
            wrong = (
                f"the bucket {bucket} is in {region}, the job in {aws.region}, and SageMaker wants one region"
            )
            fix = f'Write region = "{region}" under [sagemaker], or take a bucket in {aws.region}'
            problems.append(Problem(where(job.file, key), wrong, fix))
    if problems:
        raise Unfit(problems)


def ecr_repository(job: JobFile) -> tuple[str, str, str]:
    """Region, account and name of the repository that the job file's image is in. Raises Unfit."""
    found = _in_ecr(job)
    return found["region"], found["registry"], found["repository"]


def _in_ecr(job: JobFile) -> re.Match[str]:
    image = job.sagemaker.image
    if found := _ECR.fullmatch(image):
        return found
    wrong = f"{image!r} is no image in ECR, and SageMaker trains with no other"
    fix = "Type make image push in a checkout, and write the URI that it prints"
    raise Unfit([Problem(where(job.file, "sagemaker.image"), wrong, fix)])


def _channel(name: str, uri: str) -> dict[str, Any]:
    source = {"S3DataType": "S3Prefix", "S3Uri": uri, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "InputMode": "File", "DataSource": {"S3DataSource": source}}


def _metrics() -> tuple[Mapping[str, str], ...]:
    from entrypoint import progress  # noqa: PLC0415 (draws bars)

    return progress.METRIC_DEFINITIONS
