import subprocess
import sys

import pytest

from entrypoint import console


def test_secrets_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    console.hide(["hf_abcdefgh"])
    assert console.redact("token hf_abcdefgh, key wJalrXUtnFEMI") == "token ***, key ***"


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY"])
def test_variables_that_hold_a_secret(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "not-to-be-told")
    assert console.redact("it is not-to-be-told") == "it is ***"


def test_presigned_urls_lose_their_signature() -> None:
    url = "https://b.s3.amazonaws.com/k?X-Amz-Credential=AKIA%2F1&X-Amz-Date=2026&X-Amz-Signature=beef"
    assert console.redact(url) == (
        "https://b.s3.amazonaws.com/k?X-Amz-Credential=***&X-Amz-Date=2026&X-Amz-Signature=***"
    )


def test_empty_and_tiny_values_are_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    console.hide(["", "a", "shape"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "result")
    assert console.redact("a result of shape") == "a result of shape"


def test_everything_that_is_said_is_redacted(capsys: pytest.CaptureFixture[str]) -> None:
    console.hide(["s3cret-value"])
    console.say("x s3cret-value")
    console.warn("y s3cret-value")
    console.fail("z s3cret-value")
    out, err = capsys.readouterr()
    assert (out, err) == ("x ***\n", "WARNING: y ***\nERROR: z ***\n")


def test_lines_of_several_threads_stay_apart() -> None:
    code = """
import sys
sys.setswitchinterval(1e-6)
from threading import Thread
from entrypoint.console import say
threads = [Thread(target=lambda: [say("x" * 20) for _ in range(2000)]) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert set(told.splitlines()) == {"x" * 20}
