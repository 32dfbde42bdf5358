"""What AWS says, as sentences. The messages are AWS's own, shortened where they are long."""

import time

import pytest
from botocore import exceptions
from botocore.exceptions import BotoCoreError, ClientError

from lora_jobs.errors import is_missing, said

ROLE = "arn:aws:iam::123456789012:role/of.training"
ME = "arn:aws:iam::123456789012:user/me"
ANSWERS = {
    (
        "ResourceLimitExceeded",
        "The account-level service limit 'ml.g5.xlarge for spot training job usage' is 0 Instances, with"
        " current utilization of 0 Instances and a request delta of 1 Instances. Please use AWS Service"
        " Quotas to request an increase for this quota.",
    ): '[sagemaker] instance: the account\'s quota "ml.g5.xlarge for spot training job usage" is 0, and too'
    " small for this job. Ask for more in the console under Service Quotas, Amazon SageMaker,",
    ("ResourceLimitExceeded", "Too many jobs."): "[sagemaker] instance: a quota of the account is used up."
    " SageMaker says: Too many jobs.",
    (
        "AccessDeniedException",
        f"User: {ME} is not authorized to perform: iam:PassRole on resource: {ROLE} because no identity-based"
        " policy allows the iam:PassRole action",
    ): f"[sagemaker] role: you may not pass the role {ROLE} to SageMaker. Allow iam:PassRole",
    (
        "ValidationException",
        f"Could not assume role {ROLE}. Please ensure that the role exists and allows principal"
        " 'sagemaker.amazonaws.com' to assume the role.",
    ): f"[sagemaker] role: SageMaker cannot assume the role {ROLE}. Check that it exists,",
    (
        "ValidationException",
        "1 validation error detected: Value 'ml.g5.huge' at 'resourceConfig.instanceType' failed to satisfy"
        " constraint: Member must satisfy enum value set: [ml.p2.xlarge, ml.m5.large]",
    ): "[sagemaker] instance: SageMaker trains on no instance of the type ml.g5.huge. Correct it:",
    (
        "ValidationException",
        "1 validation error detected: Value at 'resourceConfig.instanceType' failed to satisfy constraint: ["
        + 200 * "ml.p2.xlarge, ",
    ): "[sagemaker] instance: SageMaker trains on no instance of the type that is named. Correct it:",
    (
        "ValidationException",
        "Instance type ml.p5.48xlarge is not supported in region eu-west-3. Try ml.g5.xlarge",
    ): "[sagemaker] instance: ml.p5.48xlarge cannot be had in this region. Take another instance type,",
    (
        "ImageNotFoundException",
        "The image with imageId {imageDigest:'null', imageTag:'0.1'} does not exist within the repository",
    ): "[sagemaker] image: it is not in ECR. AWS says: The image with imageId",
    (
        "RepositoryNotFoundException",
        "The repository with name 'kohya' does not exist in the registry with id '123456789012'",
    ): "[sagemaker] image: it is not in ECR. AWS says: The repository with name 'kohya' does not exist",
    (
        "ValidationException",
        "Cannot find image: 123456789012.dkr.ecr.us-east-1.amazonaws.com/a@sha256:0",
    ): "[sagemaker] image: it is not in ECR. AWS says: Cannot find image",
    ("ValidationException", "Requested resource not found."): "job: there is no such job in this region.",
    (
        "AccessDeniedException",
        f"User: {ME} is not authorized to perform: sagemaker:CreateTrainingJob on resource: arn:x because",
    ): "AWS: access denied: you may not do sagemaker:CreateTrainingJob on arn:x. Allow sagemaker:Create",
    ("AccessDenied", "Access Denied"): "AWS: access denied. AWS says: Access Denied. Ask who keeps",
    ("ExpiredTokenException", "The security token included in the request is expired"): "AWS: the credentials"
    " have expired. Type aws sso login,",
    ("UnrecognizedClientException", "The security token included is invalid."): "AWS: AWS does"
    " not accept the credentials. Check AWS_ACCESS_KEY_ID,",
    (
        "NoSuchBucket",
        "The specified bucket does not exist",
    ): "output: there is no such bucket. Correct its",
    ("ThrottlingException", "Rate exceeded"): "AWS: it answers that it is asked too often, and went on so.",
    ("InternalFailure", ""): "AWS: it fails, and went on failing. Type the same again",
    ("Odd", "It is odd."): "AWS: CreateTrainingJob was refused with Odd. AWS says: It is odd. Correct",
}


@pytest.mark.parametrize(("code", "message"), ANSWERS)
def test_an_answer(code: str, message: str) -> None:
    error = ClientError({"Error": {"Code": code, "Message": message}}, "CreateTrainingJob")
    assert str(said(error)).startswith(ANSWERS[code, message])


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (exceptions.NoCredentialsError(), "AWS: there are no credentials. Type aws configure,"),
        (
            exceptions.PartialCredentialsError(provider="env", cred_var="AWS_SECRET_ACCESS_KEY"),
            "AWS: there are no credentials. Type aws configure,",
        ),
        (exceptions.UnauthorizedSSOTokenError(), "AWS: the sign-in has expired. Type aws sso login."),
        (
            exceptions.ProfileNotFound(profile="mine"),
            "AWS: The config profile (mine) could not be found. Correct AWS_PROFILE;",
        ),
        (
            exceptions.NoRegionError(),
            "AWS: no region is said. Write region under [sagemaker], type --region, or set AWS_REGION.",
        ),
        (
            exceptions.EndpointConnectionError(endpoint_url="http://127.0.0.1:1"),
            'AWS: it cannot be reached: Could not connect to the endpoint URL: "http://127.0.0.1:1". Check',
        ),
        (
            exceptions.UnknownServiceError(service_name="x", known_service_names="y"),
            "AWS: Unknown service: 'x'",
        ),
    ],
)
def test_no_answer(error: BotoCoreError, told: str) -> None:
    assert str(said(error)).startswith(told)


def test_a_wall_of_text_is_cut() -> None:
    error = ClientError({"Error": {"Code": "Odd", "Message": "one of\n" + "many words " * 400}}, "Create")
    told = str(said(error))
    assert told.startswith("AWS: Create was refused with Odd. AWS says: one of many words many")
    assert told.endswith("…. Correct what it names.")
    assert len(told) < 500


def test_a_long_answer_is_understood_at_once() -> None:
    message = "Value '" + "an image of a cat, " * 500 + "' at 'hyperParameters' failed to satisfy constraint"
    error = ClientError({"Error": {"Code": "ValidationException", "Message": message}}, "CreateTrainingJob")
    begun = time.process_time()
    assert str(said(error)).startswith("AWS: CreateTrainingJob was refused with ValidationException.")
    assert time.process_time() - begun < 5


def test_what_comes_late_is_read_all_the_same() -> None:
    wall = f"2 validation errors detected: Value '{'x, ' * 300}' at 'hyperParameters' failed to satisfy; "
    message = f"{wall}Value 'ml.g5.huge' at 'resourceConfig.instanceType' failed to satisfy constraint"
    error = ClientError({"Error": {"Code": "ValidationException", "Message": message}}, "CreateTrainingJob")
    assert "no instance of the type ml.g5.huge" in str(said(error))


def test_a_secret_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-of-mine")
    error = ClientError({"Error": {"Code": "Odd", "Message": "key a-secret-of-mine"}}, "CreateTrainingJob")
    assert "key ***" in str(said(error))


def test_a_job_that_is_not_there_is_told_from_another_fault() -> None:
    def answered(code: str, message: str) -> ClientError:
        return ClientError({"Error": {"Code": code, "Message": message}}, "DescribeTrainingJob")

    assert is_missing(answered("ValidationException", "Requested resource not found."))
    assert not is_missing(answered("ValidationException", "1 validation error detected"))
    assert not is_missing(answered("AccessDeniedException", "Requested resource not found."))
