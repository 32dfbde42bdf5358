"""What is tried again, and for how long: the one place that decides it.

boto3's own retries are switched off. They end where an answer's body begins, know no deadline and no stop,
share one allowance between all threads, which an outage of seconds uses up (botocore/retries/quota.py), and
would multiply with ours.
"""

import random
import threading
import time
from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeVar

T = TypeVar("T", bound=Mapping[str, Any])

LASTS = 60.0  # seconds after its first failure, after which a request is not tried again
BRIEF = 3.0  # the same, where S3 was never reached at all, or has just been waited for in vain
CONNECT = 10.0  # seconds for a connection to come about
SILENCE = 30.0  # seconds without a byte, after which a try has failed; so two minutes of it end a request
EXPIRED_TRIES = 4  # with credentials that S3 calls expired: each with those that a new session finds
_FIRST, _CEILING = 0.25, 20.0  # seconds: bounds of the first pause, and of any


class GivenUp(Exception):
    """Nobody waits for this any more: another thread failed, the caller was stopped, or its time is up."""


class Patience:
    """How long one call of Storage's goes on: until `stop` is set."""

    def __init__(self) -> None:
        self.stop = threading.Event()

    def check(self) -> None:
        """Raise GivenUp where nothing new may be begun."""
        if self.stop.is_set():
            raise GivenUp

    def pause(self, tries: int, end: float) -> bool:
        """Wait before the next try, the longer the more there were; False where it would begin after `end`.

        A pause is drawn evenly from nothing to its bound, so that threads that failed together come back
        one by one: "full jitter", https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
        """
        seconds = random.uniform(0, min(_CEILING, _FIRST * 2 ** (tries - 1)))
        if time.monotonic() + seconds >= end:
            return False
        self.stop.wait(seconds)
        return True


class Fault(Enum):
    """What an error says of the next try."""

    LASTING = "it will fail as well"
    UNREACHED = "S3 may be reached by then"
    PASSING = "S3 may be well by then"
    EXPIRED = "other credentials may do"


# Besides every answer with one of these statuses: what S3 says of a request that did not arrive as it was
# sent, or that came at a bad time. https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
_STATUSES = (429, 500, 502, 503, 504)
_CODES = (
    "BadDigest",
    "IncompleteBody",
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
)
EXPIRED_CODES = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired")


def fault(error: Exception) -> Fault:
    """What an error of boto3's, or of a body that it reads, says of the next try."""
    from botocore import exceptions as raised  # noqa: PLC0415

    if isinstance(error, raised.ClientError):
        code = error.response["Error"].get("Code")
        if code in EXPIRED_CODES:
            return Fault.EXPIRED
        status = error.response["ResponseMetadata"].get("HTTPStatusCode")
        return Fault.PASSING if status in _STATUSES or code in _CODES else Fault.LASTING
    if isinstance(error, raised.CredentialRetrievalError | raised.MetadataRetrievalError):
        return Fault.EXPIRED
    if isinstance(error, raised.ConnectionError):
        return Fault.UNREACHED
    broken = (raised.HTTPClientError, raised.IncompleteReadError, ConnectionError)
    return Fault.PASSING if isinstance(error, broken) else Fault.LASTING


def uncut(answer: T, name: str) -> T:
    """`answer`, if it holds `name`, as it always does. Raises ConnectionError where it does not:
    boto3 takes a body that was cut off before its first byte for an answer that says nothing."""
    if name not in answer:
        raise ConnectionError("the answer was cut off")
    return answer
