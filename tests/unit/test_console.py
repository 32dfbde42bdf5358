import pytest

from entrypoint import console


def test_secrets_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    console.hide(["hf_abcdefgh"])
    assert console.redact("token hf_abcdefgh, key wJalrXUtnFEMI") == "token ***, key ***"


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
