"""Why a command of `lora` ends badly, in sentences: what is wrong, where, what to do."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from entrypoint import console
from kohya.problem import Problem

if TYPE_CHECKING:
    from botocore.exceptions import BotoCoreError, ClientError


class LoraError(Exception):
    """Its text is what the person reads."""

    def __init__(self, problem: Problem | str) -> None:
        super().__init__(console.redact(str(problem)))


def to_person(text: str) -> str:
    """What is said to a job that may not do something, said to the one who types `lora`."""
    # Of a bucket's own key no policy of ours knows.
    text = text.replace("on that key to the job's role", "on that key to yourself")
    return text.replace("to the job's role", "to yourself (lora policy JOB.toml --person prints all)")


def said(error: "ClientError | BotoCoreError") -> LoraError:
    """What AWS, or the way to it, said: as a sentence that tells what to do."""
    from botocore.exceptions import ClientError  # noqa: PLC0415

    return LoraError(_answered(error) if isinstance(error, ClientError) else _unanswered(error))


def is_missing(error: "ClientError") -> bool:
    """Whether SageMaker says that there is no such job."""
    code, message = _told(error)
    return code.startswith("Validation") and bool(re.search(_NO_SUCH_JOB, message))


NO_REGION = "Write region under [sagemaker], type --region, or set AWS_REGION"
_LONGEST = 400  # characters of what AWS says
_NO_SUCH_JOB = r"(?i)requested resource not found|could not find training job"

# What SageMaker, ECR and STS answer: a code, what its message holds, and the sentence made of its groups.
# Codes: "CommonErrors" and CreateTrainingJob's "Errors" in SageMaker's API reference; the messages are AWS's
# own, and only their telling parts are looked for.
_Made = Callable[[re.Match[str]], Problem]
_ANSWERS: tuple[tuple[str, str, _Made], ...] = (
    (
        "ResourceLimitExceeded",
        r".*service limit '(?P<quota>[^']+)' is (?P<limit>\d+)|(?P<other>.*)",
        lambda m: Problem(
            "[sagemaker] instance",
            f'the account\'s quota "{m["quota"]}" is {m["limit"]}, and too small for this job'
            if m["quota"]
            else f"a quota of the account is used up. SageMaker says: {_short(m['other'])}",
            "Ask for more in the console under Service Quotas, Amazon SageMaker, wait until a job has ended,"
            " or take another instance; spot and on-demand have quotas of their own",
        ),
    ),
    (
        "AccessDenied.*",
        r"iam:PassRole on resource: (?P<role>\S+)",
        lambda m: Problem(
            "[sagemaker] role",
            f"you may not pass the role {m['role']} to SageMaker",
            "Allow iam:PassRole on it to yourself: lora policy JOB.toml --person prints the policy",
        ),
    ),
    (
        "ValidationException",
        r"(?i)could not assume role (?P<role>arn:\S+?)\.?(?:\s|$)",
        lambda m: Problem(
            "[sagemaker] role",
            f"SageMaker cannot assume the role {m['role']}",
            "Check that it exists, and that sagemaker.amazonaws.com may assume it:"
            " lora policy JOB.toml --trust prints its trust policy",
        ),
    ),
    (
        "ValidationException",
        r"(?i)value (?:'(?P<type>[^']*)' )?at '[^']*instanceType'",
        lambda m: Problem(
            "[sagemaker] instance",
            f"SageMaker trains on no instance of the type {m['type'] or 'that is named'}",
            "Correct it: https://aws.amazon.com/sagemaker/ai/pricing/ lists them",
        ),
    ),
    (
        "ValidationException",
        r"(?i)\A(?=.*\b(?:not|un)\s?(?:supported|available|offered))(?:.*?\b(?P<type>ml\.[\w-]+\.\w+))",
        lambda m: Problem(
            "[sagemaker] instance",
            f"{m['type']} cannot be had in this region",
            "Take another instance type, or another region by [sagemaker] region",
        ),
    ),
    (
        "(?:RepositoryNotFound|ImageNotFound)Exception|ValidationException",
        r"(?i)\b(?:image|repository)\b.*(?:not\s(?:exist|found)|cannot find|could not find)"
        r"|(?:cannot|could not) find (?:the )?(?:requested )?(?:image|repository|tag)\b"
        r"|access denied for repository",
        lambda m: Problem(
            "[sagemaker] image",
            f"it is not in ECR. AWS says: {_short(m.string)}",
            "Type make image push in a checkout, and write the URI that it prints",
        ),
    ),
    (
        "ValidationException",
        _NO_SUCH_JOB,
        lambda _: Problem("job", "there is no such job in this region", "lora list shows those that are"),
    ),
    (
        ".*",
        r"is not authorized to perform: (?P<action>[\w:]+)(?: on resource: (?P<what>\S+))?",
        lambda m: Problem(
            "AWS",
            f"access denied: you may not do {m['action']}" + (f" on {m['what']}" if m["what"] else ""),
            f"Allow {m['action']} to yourself: lora policy JOB.toml --person prints the policy",
        ),
    ),
    (
        "AccessDenied.*",
        r"(?P<said>.*)",
        lambda m: Problem(
            "AWS", f"access denied. AWS says: {_short(m['said'])}", "Ask who keeps the account's IAM"
        ),
    ),
    (
        "ExpiredToken.*|RequestExpired|ExpiredTokenException",
        "",
        lambda _: Problem(
            "AWS", "the credentials have expired", "Type aws sso login, or get new temporary keys"
        ),
    ),
    (
        "UnrecognizedClientException|InvalidClientTokenId|InvalidAccessKeyId|SignatureDoesNotMatch"
        "|InvalidSignatureException|IncompleteSignature|MissingAuthenticationToken.*",
        "",
        lambda _: Problem(
            "AWS",
            "AWS does not accept the credentials",
            "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or AWS_PROFILE",
        ),
    ),
    (
        "NoSuchBucket",
        "",
        lambda _: Problem("output", "there is no such bucket", "Correct its name, or make it: aws s3 mb"),
    ),
    (
        "Throttling.*|TooManyRequestsException|RequestLimitExceeded|SlowDown",
        "",
        lambda _: Problem("AWS", "it answers that it is asked too often, and went on so", "Wait a minute"),
    ),
    (
        "InternalFailure|InternalServerError|ServiceUnavailable.*|50[0-4]",
        "",
        lambda _: Problem("AWS", "it fails, and went on failing", "Type the same again in a few minutes"),
    ),
)


def _answered(error: "ClientError") -> Problem:
    code, message = _told(error)
    for codes, pattern, made in _ANSWERS:
        if re.fullmatch(codes, code) and (found := re.search(pattern, message, re.DOTALL)):
            return made(found)
    told = f"{error.operation_name} was refused with {code}. AWS says: {_short(message)}"
    return Problem("AWS", told, "Correct what it names")


def _told(error: "ClientError") -> tuple[str, str]:
    """The code and the message."""
    told = error.response.get("Error", {})
    return str(told.get("Code", "")), str(told.get("Message", "")).rstrip(". ")


def _short(message: str) -> str:
    """What AWS says, without the list of all that there is."""
    message = " ".join(console.redact(message).split())  # first: half of a secret is not known for one
    return message if len(message) <= _LONGEST else f"{message[:_LONGEST]}…"


def _unanswered(error: "BotoCoreError") -> Problem:
    """For what went wrong before AWS answered."""
    from botocore import exceptions as raised  # noqa: PLC0415

    credentials = "Type aws configure, or set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    told = str(error).replace("\n", " ").rstrip(".")
    kinds: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str, str], ...] = (
        (
            (raised.NoCredentialsError, raised.PartialCredentialsError),
            "there are no credentials",
            credentials,
        ),
        (
            (raised.UnauthorizedSSOTokenError, raised.SSOTokenLoadError, raised.TokenRetrievalError),
            "the sign-in has expired",
            "Type aws sso login",
        ),
        (raised.CredentialRetrievalError, f"the credentials could not be had: {told}", credentials),
        (raised.ProfileNotFound, told, "Correct AWS_PROFILE; aws configure list-profiles shows them"),
        (raised.NoRegionError, "no region is said", NO_REGION),
        (
            (raised.ConnectionError, raised.HTTPClientError),
            f"it cannot be reached: {told}",
            "Check the network, the region and AWS_ENDPOINT_URL",
        ),
    )
    for kind, wrong, fix in kinds:
        if isinstance(error, kind):
            return Problem("AWS", wrong, fix)
    return Problem("AWS", told, "Check the settings of boto3")
