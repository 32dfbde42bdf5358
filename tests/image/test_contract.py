"""What the image promises to whoever starts it, and what it keeps to itself."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

from entrypoint import __version__
from kohya import sd_scripts
from tests.image.container import PYTHON, Subject

DOCKERFILE = Path(__file__).parents[2] / "docker" / "Dockerfile"
SECRET = re.compile(r"(?i)index-url|token|passw(?:or)?d|secret|credential|access.?key|proxy")
ADDRESS = re.compile(r"\w+://[^\s\"']+")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"command": ["train"]},
        {"entrypoint": ["train"]},
        {"command": ["train", "--kind=sd3"]},
        {"entrypoint": ["train"], "command": ["--kind=sd3"]},
    ],
    ids=str,
)
def test_every_way_to_say_train(subject: Subject, options: dict[str, Any]) -> None:
    """SageMaker says `train`; with ContainerEntrypoint it says what it is told to, then the arguments."""
    result = subject.run(**options)
    assert result.code == 2, result.out + result.err
    assert "ERROR: model: there is neither a channel model nor a hyperparameter model_uri" in result.err
    assert ("sd3" in result.err) == ("--kind=sd3" in options.get("command", ()))


def test_the_entrypoint_is_no_shell(subject: Subject) -> None:
    """A shell would keep SIGTERM from the job."""
    assert subject.config["Entrypoint"] == [PYTHON, "-m", "entrypoint"]
    assert subject.config["Cmd"] == ["train"]


def test_it_runs_as_root_unless_told_otherwise(subject: Subject) -> None:
    """SageMaker's folders are root's, and it has no setting for a user."""
    assert subject.config.get("User", "") == ""


def test_there_is_nothing_under_opt_ml(subject: Subject) -> None:
    """SageMaker mounts over it."""
    assert subject.shell("[ ! -e /opt/ml ] || find /opt/ml") == ""


def test_gpus_are_asked_for(subject: Subject, variant: str) -> None:
    """By NVIDIA's container toolkit: SageMaker passes no --gpus. The CPU image is to see none."""
    gpus = "void" if variant == "cpu" else "all"
    told = set(subject.config["Env"])
    assert {f"NVIDIA_VISIBLE_DEVICES={gpus}", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"} <= told


def test_labels_say_what_it_was_made_of(subject: Subject, variant: str) -> None:
    labels = subject.config["Labels"]
    oci = {name: labels[f"org.opencontainers.image.{name}"] for name in ("version", "licenses", "base.name")}
    assert oci["version"] == __version__
    assert oci["licenses"] == "Apache-2.0"
    assert oci["base.name"]
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", labels["org.opencontainers.image.revision"])
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", labels["org.opencontainers.image.base.digest"])
    without = variant == "cpu" or os.environ.get("SD_SCRIPTS") == "none"
    assert labels["sd-scripts.revision"] == ("" if without else sd_scripts.COMMIT)


def test_no_job_can_gain_rights_or_change_the_image(subject: Subject) -> None:
    """Of ours nothing is setuid, nothing belongs to another user, and nothing can be written by one."""
    ours = "/opt /usr/local"
    assert subject.shell(f"find {ours} -perm /6000 ! -type d") == ""
    assert subject.shell(f"find {ours} ! -user root -o -perm /022 ! -type l") == ""


def test_history_and_settings_hold_no_secret(subject: Subject) -> None:
    """No index that packages came from, no credentials; addresses are those in the Dockerfile itself."""
    told = [subject.history, *subject.config["Env"], *map(str, subject.config["Labels"].items())]
    assert [line for line in told if SECRET.search(line)] == []
    public = set(ADDRESS.findall(DOCKERFILE.read_text()))
    assert set(ADDRESS.findall("\n".join(told))) <= public


def test_files_hold_no_secret(subject: Subject) -> None:
    """Nothing of pip's, no origin of a package, nobody's credentials, and no certificate but Debian's."""
    script = r"""
        ls -d /etc/pip* /etc/xdg/pip* /root/.[cp]* /root/.netrc /root/.aws /tmp/.[!.]* /tmp/* /run/secrets \
            /opt/venv/pip.conf /usr/local/share/ca-certificates/* 2>/dev/null | grep -v /root/.profile || true
        find / -xdev -name direct_url.json -o -xdev -name pip -path '*cache*'
        find /etc/ssl/private /etc/apt/auth.conf.d -type f 2>/dev/null || true
    """
    assert subject.shell(script) == ""
    certificates = """
        import pathlib, re
        def read(*files): return {block for file in files for block in re.findall(
            "-----BEGIN.*?-----END", file.read_text(), re.S)}
        bundle = read(pathlib.Path("/etc/ssl/certs/ca-certificates.crt"))
        print(len(bundle - read(*pathlib.Path("/usr/share/ca-certificates").rglob("*.crt"))), bool(bundle))
    """
    assert subject.python(certificates) == "0 True\n"
