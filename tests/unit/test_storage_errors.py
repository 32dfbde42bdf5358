"""What boto3 raises, and the sentence and way out that become of it: one row for each row of the tables.

tests/unit/test_storage.py has the same over HTTP, for those that a server must send to be told.
"""

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore import exceptions as raised

from entrypoint.failures import Outage, Problem, StorageError
from entrypoint.storage.errors import disk, problem
from entrypoint.storage.objects import S3Uri, safe_relative

URI = S3Uri("bucket", "models/base.safetensors")


class Client:
    """What is asked of boto3's client: where it is, and a listing."""

    meta = SimpleNamespace(partition="aws", endpoint_url="https://s3", region_name="us-east-1")

    def __init__(self, *keys: str, folders: tuple[str, ...] = ()) -> None:
        self.keys, self.folders = keys, folders

    def list_objects_v2(self, **asked: str) -> dict[str, Any]:
        if not self.keys and not self.folders:
            raise answered("AccessDenied")
        keys = [{"Key": key} for key in self.keys if key != "nothing"]
        return {"Contents": keys, "CommonPrefixes": [{"Prefix": folder} for folder in self.folders]}


def answered(code: str, message: str = "", **headers: str) -> raised.ClientError:
    error: Any = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPHeaders": headers}}
    return raised.ClientError(error, "GetObject")


def told(error: Exception, action: str = "s3:GetObject", client: Any = None) -> Problem:
    return problem(error, action, URI, client or Client())


EXPIRED = "the credentials have expired", "Get new ones (aws sso login, or new temporary keys) and try again"
REJECTED = "S3 does not accept the credentials", "AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
SKEWED = "this machine's clock is wrong, so S3 refuses its signatures", "chronyc makestep"
BUSY = "S3 is busy or failing, and stays so", "Start the job again in a few minutes"
REGION = "the bucket is not in us-east-1", "set AWS_REGION to it"
DENIED = (
    "access denied",
    "Allow s3:GetObject on arn:aws:s3:::bucket/models/base.safetensors to the job's role",
)
MISSING = "there is no such object", "Correct the key"


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        ("ExpiredToken ExpiredTokenException TokenRefreshRequired", EXPIRED),
        ("RequestExpired RequestTimeTooSkewed", SKEWED),
        ("InvalidAccessKeyId InvalidToken SignatureDoesNotMatch", REJECTED),
        ("InvalidBucketName", ("this is no name of a bucket", "Correct the URI: s3://bucket/key")),
        ("NoSuchBucket", ("there is no such bucket", "Correct the bucket's name")),
        (
            "InvalidObjectState",
            ("the object is archived", "--bucket bucket --key 'models/base.safetensors' --restore-request"),
        ),
        ("InternalError ServiceUnavailable SlowDown 500 503", BUSY),
        (
            "301 AuthorizationHeaderMalformed IllegalLocationConstraintException PermanentRedirect "
            "TemporaryRedirect",
            REGION,
        ),
        ("403 AccessDenied AllAccessDisabled UnauthorizedAccess", DENIED),
        ("404 NoSuchKey", MISSING),
        ("KMS.DisabledException", ("its KMS key may not be used", "Allow kms:Decrypt on that key")),
        ("Teapot", ("S3 refuses: Teapot", "Look Teapot up among S3's error responses")),
    ],
)
def test_every_answer_of_s3(codes: str, said: tuple[str, str]) -> None:
    for code in codes.split():
        found = told(answered(code))
        assert (found.where, found.wrong.startswith(said[0])) == (str(URI), True), code
        assert said[1] in found.fix, code
        assert isinstance(found, Outage) == (said == BUSY), code


def test_s3s_own_words_follow() -> None:
    assert told(answered("ExpiredToken", "Gone.")).wrong == f"{EXPIRED[0]}. S3 says: Gone"
    assert told(answered("AccessDenied", "for kms:Decrypt")).wrong.startswith("its KMS key may not be used")
    fix = told(answered("KMS.X"), "s3:PutObject").fix
    assert fix.startswith("Allow kms:GenerateDataKey and kms:Decrypt on that key")
    assert "Allow s3:ListBucket on arn:aws:s3:::bucket to" in told(answered("403"), "s3:ListBucket").fix
    fix = "without s3:ListBucket on arn:aws:s3:::bucket a missing object looks the same"
    assert fix in told(answered("403")).fix
    assert fix not in told(answered("403"), "s3:PutObject").fix
    found = told(answered("301", **{"x-amz-bucket-region": "eu-west-1"}))
    assert str(found) == (
        f"{URI}: the bucket is in eu-west-1, and this job asks in us-east-1. "
        "Run the job in eu-west-1, or set AWS_REGION=eu-west-1."
    )


@pytest.mark.parametrize(
    ("client", "fix"),
    [
        (Client(), "Correct the key"),
        (Client("nothing"), "Correct the key: there is nothing below s3://bucket/models/"),
        (
            Client(folders=("models/base.safetensors/",)),
            "It is a folder: name an object in it",
        ),
        (
            Client("models/base2.safetensors", "models/x"),
            "Correct the key; near it: s3://bucket/models/base2.safetensors",
        ),
        (Client("models/x", "models/y"), "in that folder: s3://bucket/models/x, s3://bucket/models/y"),
    ],
)
def test_what_may_have_been_meant(client: Client, fix: str) -> None:
    assert told(answered("404"), client=client).fix.endswith(fix)


@pytest.mark.parametrize(
    ("error", "wrong", "fix"),
    [
        (raised.NoCredentialsError(), "there are no credentials for S3", "give it its inputs as channels"),
        (
            raised.PartialCredentialsError(provider="env", cred_var="aws_secret_access_key"),
            "there are no credentials for S3",
            "give the job an execution role",
        ),
        (
            raised.CredentialRetrievalError(provider="x", error_msg="late"),
            "the credentials for S3 could not be had: Error when retrieving credentials from x: late",
            "or AWS_PROFILE",
        ),
        (
            raised.TokenRetrievalError(provider="sso", error_msg="late"),
            "the credentials for S3 could not be had: ",
            "or AWS_PROFILE",
        ),
        (raised.SSOError(), "the credentials for S3 could not be had: ", "or AWS_PROFILE"),
        (raised.ParamValidationError(report="x"), "S3 has no such names: ", "Correct the URI"),
        (
            raised.IncompleteReadError(actual_bytes=1, expected_bytes=2),
            "the connection to https://s3 kept breaking off",
            "Start the job again",
        ),
        (
            raised.SSLError(endpoint_url="https://s3", error="self-signed"),
            "https://s3 is not to be trusted: ",
            "Set AWS_CA_BUNDLE to its certificates",
        ),
        (
            raised.EndpointConnectionError(endpoint_url="https://s3"),
            "S3 cannot be reached at https://s3: ",
            "the VPC's endpoint for S3. A job with network isolation reaches nothing",
        ),
        (raised.ReadTimeoutError(endpoint_url="https://s3"), "S3 at https://s3 kept fal", "check AWS_REGION"),
        (ConnectionResetError("reset"), "S3 cannot be reached at https://s3: reset", "Check AWS_REGION"),
        (raised.BotoCoreError(), "S3 could not be used: ", "Try again; if it stays, check the endpoint"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_everything_that_happens_before_an_answer(error: Exception, wrong: str, fix: str) -> None:
    found = told(error)
    assert found.wrong.startswith(wrong)
    assert fix in found.fix
    assert isinstance(found, Outage) != isinstance(error, raised.ParamValidationError)


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "Give the job a larger volume (VolumeSizeInGB), or free space on this disk"),
        (errno.EDQUOT, "Give the job a larger volume (VolumeSizeInGB), or free space on this disk"),
        (errno.EACCES, "Check that the file is there and that this user may use it"),
    ],
)
def test_what_the_disk_says(number: int, fix: str) -> None:
    with pytest.raises(StorageError) as caught, disk(Path("/there")):
        raise OSError(number, "so it is")
    assert str(caught.value) == f"/there: the disk says: so it is. {fix}."


@pytest.mark.parametrize("uri", [S3Uri("other", "data/a"), S3Uri("bucket", "database/a")])
def test_an_object_of_another_folder_is_a_mistake_of_ours(uri: S3Uri) -> None:
    with pytest.raises(ValueError, match=f"{uri} is not below s3://bucket/data"):
        safe_relative(uri, S3Uri("bucket", "data"))
