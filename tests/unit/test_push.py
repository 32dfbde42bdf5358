"""docker/push, with stand-ins for docker and aws."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from entrypoint import __version__
from tests.unit.programs import ROOT, Programs

IMAGE = "sagemaker-kohya:0.1.0-cuda13"
URI = "123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn/sagemaker-kohya"
REGISTRY = URI.partition("/")[0]
PASSWORD = "a-password-of-ECR"
CONFIG, LAYER, DIGEST = (f"sha256:{letter * 64}" for letter in "abc")
MANIFEST = f'{{\n "config": {{"digest": "{CONFIG}"}},\n "layers": [{{"digest": "{LAYER}"}}]\n}}'
INDEX = '{"Descriptor": {"mediaType": "application/vnd.oci.image.index.v1+json"}}'

# What they know: engine, image (as inspect shows it), credentials, region, repository, tagged (its digest and
# manifest).
DOCKER = """
case "$1 $2" in
  version*) [ -e engine ] || { echo "Cannot connect to the Docker daemon" >&2; exit 1; } ;;
  "image inspect") [ -e image ] || { echo "No such image" >&2; exit 1; }; cat image ;;
  "context inspect") echo remote ;;
  login*)
    cat >password
    ls "$DOCKER_CONFIG" >linked; cp "$DOCKER_CONFIG/config.json" before; echo "$DOCKER_CONTEXT" >context
    [ ! -e locked ] || { echo "denied: no entry" >&2; exit 1; }
    echo "WARNING! Your credentials are stored unencrypted" >&2
    cat password >"$DOCKER_CONFIG/config.json" ;;
  push*)
    echo "$DOCKER_CONFIG" >config; echo "12 of 34 MB"
    if [ -e slow ]; then echo >begun; sleep 30; fi
    [ ! -e cut ] || exit 1
    cat pushed >tagged ;;
esac
"""
AWS = """
echo "$AWS_REGION $AWS_DEFAULT_REGION" >asked
case "$1 $2" in
  "configure get") cat region 2>/dev/null || exit 1 ;;
  "sts get-caller-identity")
    [ -e credentials ] || { echo >&2; echo "Unable to locate credentials" >&2; exit 253; }; cat credentials ;;
  "ecr describe-repositories")
    [ ! -e forbidden ] || { echo "AccessDeniedException: ecr:DescribeRepositories" >&2; exit 254; }
    [ -e repository ] || { echo >&2; echo "An error occurred (RepositoryNotFoundException)" >&2; exit 254; }
    cat repository ;;
  "ecr create-repository") cp made repository; cat made ;;
  "ecr batch-get-image") cat tagged 2>/dev/null || printf 'ImageNotFound\\tNone\\tNone\\n' ;;
  "ecr get-login-password") cat secret ;;
esac
"""

CHECKS = ["docker version", "docker image inspect", "aws sts get-caller-identity"]
PUSH = ["docker context inspect", "docker login", "docker tag", "docker push"]


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    """A machine that is ready, and an account without the repository."""
    made = Programs(tmp_path)
    made.add("docker", DOCKER)
    made.add("aws", AWS)
    made.know(
        engine="",
        image=f"{CONFIG} linux/amd64 {{}}\n",
        credentials="123456789012\n",
        region="cn-north-1\n",
        made=f"{URI}\n",
        secret=f"{PASSWORD}\n",
        pushed=f"None\t{DIGEST}\t{MANIFEST}\n",
    )
    return made


def push(programs: Programs, **environment: str) -> "subprocess.CompletedProcess[str]":
    """docker/push, with what must be true however it ends."""
    ended = programs.run("docker/push", **{"IMAGE": IMAGE, **environment})
    assert PASSWORD not in ended.stdout + ended.stderr + str(programs.calls())
    assert not list(programs.temporary.iterdir())
    return ended


def steps(programs: Programs) -> list[str]:
    """The calls, each by its first words, but the one for the password, which runs beside the login."""
    named = [
        call[: 3 if call[1] in {"image", "context", "ecr", "sts", "configure"} else 2]
        for call in programs.calls()
    ]
    return [" ".join(words) for words in named if words[-1] != "get-login-password"]


def call(programs: Programs, *words: str) -> list[str]:
    """The one call that begins with `words`."""
    (found,) = (call for call in programs.calls() if tuple(call[: len(words)]) == words)
    return found


def test_a_first_push(programs: Programs) -> None:
    ended = push(programs)
    assert ended.returncode == 0
    assert ended.stdout.splitlines()[:2] == [f"{URI}:0.1.0-cuda13", f"{URI}@{DIGEST}"]
    assert "TrainingImage for CreateTrainingJob" in ended.stdout.splitlines()[2]
    assert "12 of 34 MB" in ended.stderr
    assert steps(programs) == [
        *CHECKS[:2],
        "aws configure get",
        CHECKS[2],
        "aws ecr describe-repositories",
        "aws ecr create-repository",
        "aws ecr batch-get-image",
        *PUSH,
        "aws ecr batch-get-image",
    ]
    made = call(programs, "aws", "ecr", "create-repository")
    assert made[3:9] == [
        *("--repository-name", "sagemaker-kohya", "--image-tag-mutability", "IMMUTABLE"),
        *("--image-scanning-configuration", "scanOnPush=true"),
    ]
    assert call(programs, "docker", "tag")[2:] == [IMAGE, f"{URI}:0.1.0-cuda13"]
    assert call(programs, "docker", "push")[2:] == [f"{URI}:0.1.0-cuda13"]


def test_the_password_goes_through_a_pipe_into_a_configuration_that_does_not_stay(programs: Programs) -> None:
    theirs = programs.home / ".docker"
    (theirs / "contexts").mkdir(parents=True)
    (theirs / "config.json").write_text('{"currentContext": "remote"}')
    assert push(programs).returncode == 0
    assert call(programs, "docker", "login")[2:] == ["--username", "AWS", "--password-stdin", REGISTRY]
    assert (programs.state / "password").read_text() == f"{PASSWORD}\n"
    assert (programs.state / "config").read_text().startswith(str(programs.temporary))
    assert {path.name for path in theirs.iterdir()} == {"config.json", "contexts"}
    assert (theirs / "config.json").read_text() == '{"currentContext": "remote"}'
    # the user's contexts work in it, and docker is kept from the system's keychain
    assert (programs.state / "linked").read_text().split() == ["config.json", "contexts"]
    assert (programs.state / "context").read_text() == "remote\n"
    assert (programs.state / "before").read_text() == f'{{"auths": {{"{REGISTRY}": {{}}}}}}\n'


def test_a_configuration_elsewhere_is_left_alone_too(programs: Programs, tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "ca.pem").touch()
    assert push(programs, DOCKER_CONFIG=str(tmp_path / "conf")).returncode == 0
    assert [path.name for path in (tmp_path / "conf").iterdir()] == ["ca.pem"]
    assert (programs.state / "linked").read_text().split() == ["ca.pem", "config.json"]


def test_ctrl_c_leaves_no_password(programs: Programs) -> None:
    programs.know(slow="")
    command, environment = [str(ROOT / "docker" / "push")], {**programs.environment, "IMAGE": IMAGE}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    while not (programs.state / "begun").exists():
        assert process.poll() is None
        time.sleep(0.01)
    (kept,) = programs.temporary.iterdir()
    assert PASSWORD in (kept / "config" / "config.json").read_text()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) != 0
    assert not list(programs.temporary.iterdir())


def test_a_repository_that_is_there_is_used(programs: Programs) -> None:
    programs.know(repository=f"{URI}\n")
    assert push(programs).returncode == 0
    assert "aws ecr create-repository" not in steps(programs)


@pytest.mark.parametrize("name", [CONFIG, DIGEST], ids=["by its configuration", "by its manifest"])
def test_what_is_there_already_is_not_pushed(programs: Programs, name: str) -> None:
    there = f"None\t{DIGEST}\t{MANIFEST}\n"
    programs.know(repository=f"{URI}\n", tagged=there, image=f"{name} linux/amd64 {{}}\n")
    ended = push(programs)
    assert ended.returncode == 0
    assert ended.stdout.splitlines()[:2] == [f"{URI}:0.1.0-cuda13", f"{URI}@{DIGEST}"]
    assert "push: sagemaker-kohya:0.1.0-cuda13 is there already\n" in ended.stderr
    assert not set(PUSH) & set(steps(programs))


def test_a_tag_of_another_image_is_not_replaced(programs: Programs) -> None:
    programs.know(repository=f"{URI}\n", tagged=f"None\t{DIGEST}\t{MANIFEST.replace(CONFIG, LAYER)}\n")
    ended = push(programs)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.splitlines()[-1] == (
        f"ERROR: {URI}:0.1.0-cuda13: it is another image than {IMAGE} here, and a tag is never replaced."
        " Raise the version in entrypoint/__init__.py, or take another tag: make image push TAG=OTHER."
    )
    assert not set(PUSH) & set(steps(programs))


def test_tag_and_repository_can_be_named(programs: Programs) -> None:
    programs.know(made=f"{REGISTRY}/team/lora\n")
    ended = push(programs, IMAGE="lora:try", REPOSITORY="team/lora")
    assert ended.stdout.splitlines()[0] == f"{REGISTRY}/team/lora:try"
    assert call(programs, "docker", "tag")[2:] == ["lora:try", f"{REGISTRY}/team/lora:try"]
    assert call(programs, "aws", "ecr", "create-repository")[3:5] == ["--repository-name", "team/lora"]
    assert all("imageTag=try" in call for call in programs.calls() if "batch-get-image" in call)


def test_all_that_is_missing_is_told_at_once_and_nothing_is_done(programs: Programs) -> None:
    programs.forget("engine", "region", "credentials")
    ended = push(programs)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.splitlines() == [
        "ERROR: docker: no engine answers (Cannot connect to the Docker daemon)."
        " Install or start Docker, until docker version names a server.",
        "ERROR: region: none is set. Type export AWS_REGION=us-east-1, or the name of yours.",
        "ERROR: credentials: AWS accepts none (Unable to locate credentials)."
        " Type aws configure, or aws sso login.",
    ]
    assert steps(programs) == [CHECKS[0], "aws configure get", CHECKS[2]]


def test_without_image_and_aws_cli(programs: Programs) -> None:
    programs.forget("image")
    programs.remove("aws")
    assert push(programs).stderr.splitlines() == [
        f"ERROR: image {IMAGE}: it is not here. Type make image, make image CUDA=12 or make image-cpu.",
        "ERROR: aws: the AWS CLI is not here. Install it: https://aws.amazon.com/cli.",
    ]


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (
            f"{CONFIG} linux/arm64 {{}}",
            "SageMaker runs linux/amd64. Type make image",
        ),
        (
            f"{CONFIG} linux/amd64 {INDEX}",
            "SageMaker takes no index. Type make image",
        ),
    ],
    ids=["of another machine", "an index"],
)
def test_an_image_that_sagemaker_cannot_run(programs: Programs, image: str, told: str) -> None:
    programs.know(image=f"{image}\n")
    ended = push(programs)
    assert (ended.returncode, ended.stderr) == (1, f"ERROR: image {IMAGE}: {told}.\n")
    assert "aws ecr describe-repositories" not in steps(programs)


@pytest.mark.parametrize(
    ("environment", "used"),
    [
        ({"AWS_REGION": "eu-west-1", "AWS_DEFAULT_REGION": "eu-west-2"}, "eu-west-1"),
        ({"AWS_DEFAULT_REGION": "eu-west-2"}, "eu-west-2"),
        ({}, "cn-north-1"),
    ],
)
def test_where_the_region_comes_from(programs: Programs, environment: dict[str, str], used: str) -> None:
    assert f"of account 123456789012 in {used}\n" in push(programs, **environment).stderr
    assert (programs.state / "asked").read_text() == f"{used} {used}\n"


def test_ecr_says_no(programs: Programs) -> None:
    programs.know(forbidden="")
    ended = push(programs)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == (
        "ERROR: ECR: it says no (AccessDeniedException: ecr:DescribeRepositories)."
        " Have a missing permission granted, or name another repository: make push REPOSITORY=OTHER."
    )
    assert "aws ecr create-repository" not in steps(programs)


def test_a_login_that_is_refused(programs: Programs) -> None:
    programs.know(locked="")
    ended = push(programs)
    assert ended.returncode == 1
    assert f"ERROR: {REGISTRY}: docker cannot log in (denied: no entry). Have " in ended.stderr
    assert "docker push" not in steps(programs)


def test_a_push_that_breaks_off(programs: Programs) -> None:
    programs.know(cut="")
    ended = push(programs)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.splitlines()[-1] == (
        f"ERROR: {URI}:0.1.0-cuda13: the push broke off. ECR keeps what it has: type make push again."
    )


def test_make_push(programs: Programs) -> None:
    for words, image in (
        (
            ("CUDA=12", "REPOSITORY=lora"),
            f"sagemaker-kohya:{__version__}-cuda12 to lora:{__version__}-cuda12",
        ),
        (("VARIANT=cpu",), f"sagemaker-kohya:{__version__}-cpu to sagemaker-kohya:{__version__}-cpu"),
        (("TAG=try",), "sagemaker-kohya:try to sagemaker-kohya:try"),
    ):
        ended = programs.run("make", "push", *words)
        assert f"push: {image} of" in ended.stderr
