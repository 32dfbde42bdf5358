"""boto3's errors and the disk's as sentences, each with the way out."""

import difflib
import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrypoint import console
from entrypoint.failures import Outage, Problem, StorageError
from entrypoint.storage.objects import S3Uri
from entrypoint.storage.retries import EXPIRED_CODES, SILENCE

if TYPE_CHECKING:
    from botocore.exceptions import ClientError
    from types_boto3_s3 import S3Client


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turn an error of the disk into a sentence."""
    try:
        yield
    except OSError as error:
        name = error.filename or path
        fix = "Check that the file is there and that this user may use it"
        if error.errno in _FULL:
            fix = "Give the job a larger volume (VolumeSizeInGB), or free space on this disk"
        raise StorageError(Problem(str(name), f"the disk says: {error.strerror or error}", fix)) from error


_FULL = (errno.ENOSPC, errno.EDQUOT)
_CHANNELS = "A job with network isolation reaches nothing: give it its inputs as channels instead"
_CREDENTIALS = (
    "On SageMaker give the job an execution role; elsewhere set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
    "or AWS_PROFILE"
)

# Error code, of S3 or of the HTTP status where S3 sends none: what is wrong, and the way out. Source:
# https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html. S3's own words follow the first.
_EXPIRED = (
    "the credentials have expired",
    "Get new ones (aws sso login, or new temporary keys) and try again",
)
_REJECTED = (
    "S3 does not accept the credentials",
    "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN",
)
_SKEWED = (
    "this machine's clock is wrong, so S3 refuses its signatures",
    "Set the clock, for example with chronyc makestep",
)
_BUSY = (
    "S3 is busy or failing, and stays so",
    "Start the job again in a few minutes; if it stays, check that AWS_ENDPOINT_URL_S3 is S3",
)
_DAMAGED = (
    "what was sent did not reach S3 as it was sent, time and again",
    "Look for what lies between this machine and S3: a proxy, or AWS_ENDPOINT_URL_S3",
)
_NO_BUCKET_NAME = ("this is no name of a bucket", "Correct the URI: s3://bucket/key")
_SENTENCES: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(EXPIRED_CODES, _EXPIRED),
    "RequestExpired": _SKEWED,
    "RequestTimeTooSkewed": _SKEWED,
    "InvalidAccessKeyId": _REJECTED,
    "InvalidToken": _REJECTED,
    "SignatureDoesNotMatch": _REJECTED,
    "InvalidBucketName": _NO_BUCKET_NAME,
    "NoSuchBucket": ("there is no such bucket", "Correct the bucket's name"),
    "InvalidObjectState": (
        "the object is archived (Glacier or Deep Archive) and cannot be read",
        "Restore it first: aws s3api restore-object --bucket {bucket} --key '{key}' --restore-request Days=7",
    ),
    "BadDigest": _DAMAGED,
    "IncompleteBody": _DAMAGED,
    "InternalError": _BUSY,
    "ServiceUnavailable": _BUSY,
    "SlowDown": _BUSY,
    **dict.fromkeys(("429", "500", "502", "503", "504"), _BUSY),
}
_WRONG_REGION = (
    "301",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "PermanentRedirect",
    "TemporaryRedirect",
)
_DENIED = ("403", "AccessDenied", "AllAccessDisabled", "UnauthorizedAccess")
_MISSING = ("404", "NoSuchKey")


def problem(error: Exception, action: str, uri: S3Uri, client: "S3Client") -> Problem:
    """A sentence and a way out for what boto3 raised; an Outage where S3 did not say what is wrong.

    `action`: the IAM permission that was needed.
    """
    from botocore.exceptions import ClientError, ParamValidationError  # noqa: PLC0415

    kind = Problem if isinstance(error, ParamValidationError) else Outage
    if isinstance(error, ClientError):
        kind = Outage if _SENTENCES.get(error_code(error)) is _BUSY else Problem
        wrong, fix = _told_by_s3(error, action, uri, client)
    else:
        wrong, fix = _never_answered(error, client)
    return kind(console.redact(str(uri)), console.redact(wrong).rstrip("."), console.redact(fix))


def _told_by_s3(error: "ClientError", action: str, uri: S3Uri, client: "S3Client") -> tuple[str, str]:
    """For an answer of S3's that is an error."""
    code = error_code(error)
    message = (error.response["Error"].get("Message") or "").rstrip(". ")
    said = f". S3 says: {message}" if message and message != "None" else ""
    if code in _SENTENCES:
        wrong, fix = _SENTENCES[code]
        return wrong + said, fix.format(bucket=uri.bucket, key=uri.key)
    if code in _MISSING:
        return "there is no such object", _nearest(uri, client)
    if code in _WRONG_REGION:
        return _other_region(error, client)
    if code.startswith("KMS.") or "kms:" in message:
        needed = "kms:GenerateDataKey and kms:Decrypt" if action == "s3:PutObject" else "kms:Decrypt"
        return f"its KMS key may not be used{said}", f"Allow {needed} on that key to the job's role"
    if code in _DENIED:
        bucket = f"arn:{client.meta.partition}:s3:::{uri.bucket}"
        what = bucket if action == "s3:ListBucket" else f"{bucket}/{uri.key}"
        fix = f"Allow {action} on {what} to the job's role"
        if action == "s3:GetObject":
            fix += f", and check the key: without s3:ListBucket on {bucket} a missing object looks the same"
        return f"access denied{said}", fix
    return f"S3 refuses: {code}{said}", f"Look {code} up among S3's error responses"


def _never_answered(error: Exception, client: "S3Client") -> tuple[str, str]:
    """For what went wrong before S3 answered, or while it did."""
    from botocore import exceptions as raised  # noqa: PLC0415

    endpoint = client.meta.endpoint_url
    cause: Mapping[str, Any] = getattr(error, "kwargs", {})
    told = str(cause.get("error") or error).replace("\n", " ").rpartition(">: ")[2]
    missing = (raised.NoCredentialsError, raised.PartialCredentialsError)
    unobtained = (raised.CredentialRetrievalError, raised.TokenRetrievalError, raised.SSOError)
    network = (raised.ConnectionError, raised.HTTPClientError, ConnectionError)
    route = "AWS_REGION, AWS_ENDPOINT_URL_S3 and the VPC's endpoint for S3"
    kinds: Sequence[tuple[type[Exception] | tuple[type[Exception], ...], str, str]] = (
        (missing, "there are no credentials for S3", f"{_CREDENTIALS}. {_CHANNELS}"),
        (unobtained, f"the credentials for S3 could not be had: {told}", _CREDENTIALS),
        (raised.ParamValidationError, f"S3 has no such names: {told}", "Correct the URI: s3://bucket/key"),
        (
            raised.ReadTimeoutError,
            f"S3 at {endpoint} kept falling silent, for {SILENCE:.0f} s each time",
            f"Start the job again; if it stays, check {route}",
        ),
        (
            (raised.ConnectionClosedError, raised.ResponseStreamingError, raised.IncompleteReadError),
            f"the connection to {endpoint} kept breaking off: {told}",
            f"Start the job again; if it stays, check {route}",
        ),
        (
            raised.SSLError,
            f"{endpoint} is not to be trusted: {told}",
            "Set AWS_CA_BUNDLE to its certificates",
        ),
        (network, f"S3 cannot be reached at {endpoint}: {told}", f"Check {route}. {_CHANNELS}"),
    )
    for kind, wrong, fix in kinds:
        if isinstance(error, kind):
            return wrong, fix
    return f"S3 could not be used: {told}", "Try again; if it stays, check the endpoint and boto3's settings"


def _other_region(error: "ClientError", client: "S3Client") -> tuple[str, str]:
    headers = error.response["ResponseMetadata"].get("HTTPHeaders", {})
    told: Mapping[str, Any] = error.response["Error"]
    region = headers.get("x-amz-bucket-region") or told.get("Region")
    here = client.meta.region_name
    if not region:
        return f"the bucket is not in {here}", "Run the job in the bucket's region, or set AWS_REGION to it"
    fix = f"Run the job in {region}, or set AWS_REGION={region}"
    return f"the bucket is in {region}, and this job asks in {here}", fix


def _nearest(uri: S3Uri, client: "S3Client") -> str:
    """What may have been meant instead of an object that is not there, if the folder may be listed."""
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415

    folder = S3Uri(uri.bucket, uri.key[: len(uri.key) - len(uri.name)])
    try:
        page = client.list_objects_v2(Bucket=uri.bucket, Prefix=folder.prefix, Delimiter="/")
    except (BotoCoreError, ClientError):
        return "Correct the key"
    folders = [item["Prefix"] for item in page.get("CommonPrefixes", ())]
    if uri.prefix in folders:
        return "It is a folder: name an object in it"
    found = [item["Key"] for item in page.get("Contents", ())] + folders
    keys = {key[len(folder.prefix) :]: key for key in found}
    if not keys:
        return f"Correct the key: there is nothing below {folder}"
    near = difflib.get_close_matches(uri.name, keys, n=3, cutoff=0.5)
    listed = ", ".join(str(S3Uri(uri.bucket, keys[name])) for name in near or sorted(keys)[:3])
    return f"Correct the key; {'near it' if near else 'in that folder'}: {listed}"


def error_code(error: "ClientError") -> str:
    return str(error.response["Error"].get("Code", ""))
