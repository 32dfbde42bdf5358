"""What the job says: one plain line at a time, with every secret taken out.

CloudWatch keeps one event a line, so a line is never redrawn. Everything that leaves the process as
text (log, failure file, job.json, the merged configuration) goes through `redact`.
"""

import io
import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

SECRET_OPTIONS = frozenset({"huggingface_token", "wandb_api_key"})  # sd-scripts' options that hold a secret
_SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY")
_PRESIGNED = re.compile(
    r"(?i)([?&](?:X-Amz-(?:Signature|Credential|Security-Token)|Signature|AWSAccessKeyId)=)[^&\s\"']+"
)
_SHORTEST = 8  # characters: a shorter one would be found in words that are no secret
_secrets: set[str] = set()
_warned: dict[str, None] = {}


def hide(secrets: Iterable[str]) -> None:
    """Never print these values again, wherever they turn up."""
    _secrets.update(secret for secret in secrets if len(secret) >= _SHORTEST)


def hidden(option: str, value: Any) -> Any:
    """An option's value as it may be shown."""
    return "***" if option in SECRET_OPTIONS else value


def redact(text: str) -> str:
    """`text` with secrets, credentials and the signatures of presigned URLs replaced by ***."""
    known = _secrets | {os.environ.get(name, "") for name in _SECRET_VARIABLES}
    for secret in sorted((one for one in known if len(one) >= _SHORTEST), key=len, reverse=True):
        text = text.replace(secret, "***")
    return _PRESIGNED.sub(r"\1***", text)


def speak_any_language() -> None:
    """Print as escapes what the streams cannot encode: sd-scripts speaks Japanese, a name may be no text."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """One line to stdout, at once. Nobody listening is no reason to end."""
    with suppress(BrokenPipeError):
        print(redact(text) + "\n", end="", flush=True)  # in one piece: threads print too


def warn(text: str) -> None:
    """One line to stderr that a reader should act on."""
    _warned[redact(text)] = None
    print(redact(f"WARNING: {text}"), file=sys.stderr, flush=True)


def warned() -> list[str]:
    """Every warning until now, each once."""
    return [*_warned]


def fail(text: str) -> None:
    """One line to stderr: why the job ends badly."""
    print(redact(f"ERROR: {text}"), file=sys.stderr, flush=True)
