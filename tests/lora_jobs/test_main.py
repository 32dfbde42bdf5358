"""The command `lora` itself: what it lists, what it imports, how it ends."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
from botocore.exceptions import ClientError, NoCredentialsError

from entrypoint.failures import Problem, StorageError, Unfit
from lora_jobs import __main__ as command
from lora_jobs.errors import LoraError

ROOT = Path(__file__).parents[2]


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    """boto3 takes half a second, and pydantic a tenth."""
    heavy = ["boto3", "botocore", "pydantic", "rich", "torch", "numpy"]
    code = (
        "import sys; from lora_jobs.__main__ import main; code = main(['--help']);"
        f"print(sorted(set(sys.modules) & set({heavy})), code)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    *listed, last = ended.stdout.splitlines()
    assert last == "[] 0"
    for name in [
        "init",
        "check",
        "submit",
        "run",
        "policy",
        "list",
        "watch",
        "logs",
        "stop",
        "fetch",
        "board",
    ]:
        assert any(line.startswith(f"  {name} ") for line in listed), name
    assert max(map(len, listed)) <= 80


@pytest.mark.parametrize("name", ["init", "check", "submit", "run", "policy"])
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: lora {name}" in capsys.readouterr().out


def test_no_such_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["sumbit"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.splitlines()[0]) == ("", "ERROR: sumbit: there is no such command.")
    assert "  submit  " in err
    assert command.main([]) == 2


def refused(code: str) -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": ""}}, "CreateTrainingJob")


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (Unfit([Problem("a", "b", "c"), Problem("d", "e", "f")]), 2, ["a: b. c.", "d: e. f."]),
        (LoraError("it is so."), 1, ["it is so."]),
        (StorageError(Problem("a", "b", "c")), 1, ["a: b. c."]),
        (
            refused("NoSuchBucket"),
            1,
            ["output: there is no such bucket. Correct its name, or make it: aws s3 mb."],
        ),
        (PermissionError(13, "Permission denied", "job.toml"), 1, ["job.toml: Permission denied."]),
    ],
)
def test_errors_are_sentences(
    error: Exception,
    code: int,
    told: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ended_by(error, monkeypatch) == code
    out, err = capsys.readouterr()
    assert (out, err.splitlines()) == ("", [f"ERROR: {line}" for line in told])


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (BrokenPipeError(), 0)])
def test_quiet_ends(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended_by(error, monkeypatch) == code
    assert capsys.readouterr() == ("", "")


def test_what_boto3_says_is_a_sentence_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended_by(NoCredentialsError(), monkeypatch) == 1
    assert capsys.readouterr().err.startswith("ERROR: AWS: there are no credentials. Type aws configure")


def ended_by(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a command that raises this."""

    def run(_: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr("lora_jobs.init.run", run)
    return command.main(["init"])


def test_the_api_is_functions_whatever_was_imported_before() -> None:
    code = (
        "import importlib; module = importlib.import_module('lora_jobs.submit');"
        "from lora_jobs import JobFile, submit; assert submit is module.submit;"
        "assert JobFile.__name__ == 'JobFile'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_job_does_not_know_the_client() -> None:
    for file in [*ROOT.glob("entrypoint/**/*.py"), *ROOT.glob("kohya/**/*.py")]:
        assert "lora_jobs" not in file.read_text(), file
