"""AWS's services, as boto3's own configuration finds them: profiles, variables, AWS_ENDPOINT_URL."""

import os
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kohya.problem import Problem
from lora_jobs.errors import NO_REGION, LoraError

if TYPE_CHECKING:
    from types_boto3_ecr import ECRClient
    from types_boto3_logs import CloudWatchLogsClient
    from types_boto3_s3 import S3Client
    from types_boto3_sagemaker import SageMakerClient


class Aws:
    """The clients, each made when it is first asked for. Raises LoraError where no region is said.

    `region`: None for that of the environment or of the profile.
    """

    def __init__(self, region: str | None = None) -> None:
        self._region = region

    @cached_property
    def region(self) -> str:
        told = self._region or os.environ.get("AWS_REGION") or self._session.region_name
        if not told:
            raise LoraError(Problem("region", "no region is said", NO_REGION))
        return str(told)

    @cached_property
    def s3(self) -> "S3Client":
        client: S3Client = self._client("s3")
        return client

    @cached_property
    def sagemaker(self) -> "SageMakerClient":
        client: SageMakerClient = self._client("sagemaker")
        return client

    @cached_property
    def logs(self) -> "CloudWatchLogsClient":
        client: CloudWatchLogsClient = self._client("logs")
        return client

    @cached_property
    def ecr(self) -> "ECRClient":
        client: ECRClient = self._client("ecr")
        return client

    @cached_property
    def _session(self) -> Any:
        import boto3  # noqa: PLC0415 (half a second)

        return boto3.session.Session()

    def _client(self, service: str) -> Any:
        from botocore.config import Config  # noqa: PLC0415

        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        config = Config(
            retries={"mode": "standard", "total_max_attempts": 6},  # throttling included
            max_pool_connections=32,
            # A bucket is rarely a host name below an endpoint of one's own.
            s3={"addressing_style": "path" if endpoint else "auto"},
        )
        return self._session.client(service, region_name=self.region, config=config)
