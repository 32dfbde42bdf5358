"""The job in a container: the image's own command, in a SageMaker tree that a test has made."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from docker import DockerClient
from docker.models.containers import Container
from docker.models.images import Image
from requests.exceptions import ConnectionError

from tests.harness import NARROW, Job, Result

BASE = "/opt/ml"
PYTHON = "/opt/venv/bin/python"
HARDENED: Mapping[str, Mapping[str, Any]] = {
    "user": {"user": "1000:1000"},
    "read-only": {"read_only": True, "tmpfs": {"/tmp": ""}},
    "no-capabilities": {"cap_drop": ["ALL"], "security_opt": ["no-new-privileges"]},
}
ALL_HARDENED = {name: value for options in HARDENED.values() for name, value in options.items()}


@dataclass(frozen=True)
class Subject:
    """The image under test, and the engine that has it."""

    engine: DockerClient
    image: Image
    gpus: tuple[Any, ...] = ()  # device requests

    @property
    def config(self) -> dict[str, Any]:
        """What the image says about itself: Env, Entrypoint, Labels …"""
        found: dict[str, Any] = self.image.attrs["Config"]
        return found

    @property
    def history(self) -> str:
        """The commands that the image was built with."""
        return "\n".join(entry["CreatedBy"] for entry in self.image.history())

    def create(self, command: Sequence[str] | None = None, **options: Any) -> Container:
        """Make a container. Without `network_mode` it has no network at all."""
        options = {"network_mode": "none", "device_requests": list(self.gpus), **options}
        return self.engine.containers.create(self.image, command, **options)

    def run(self, command: Sequence[str] | None = None, *, timeout: float = 300, **options: Any) -> Result:
        """Run a container to its end."""
        container = self.create(command, **options)
        try:
            container.start()
            return ended(container, timeout)
        finally:
            container.remove(force=True)

    def shell(self, script: str, **options: Any) -> str:
        """What a shell script prints in a container; it must succeed."""
        return self._printed(self.run([script], entrypoint=["/bin/sh", "-euc"], **options))

    def python(self, script: str, *arguments: str, **options: Any) -> str:
        """What a Python script prints in a container; it must succeed."""
        return self._printed(self.run(["-c", dedent(script), *arguments], entrypoint=[PYTHON], **options))

    @staticmethod
    def _printed(result: Result) -> str:
        assert result.code == 0, result.out + result.err
        return result.out + result.err


class ContainerJob(Job):
    """A job whose tree is a container's /opt/ml, with channels that it cannot write to."""

    def __init__(self, folder: Path, subject: Subject) -> None:
        super().__init__(folder)
        self.subject = subject
        self.environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": "/narrow"}
        self.options: dict[str, Any] = {}
        self._volumes = {str(NARROW): {"bind": "/narrow", "mode": "ro"}}
        self._container: Container | None = None
        self.tree.mkdir()
        self.tree.chmod(0o777)  # for whatever user the container has
        self._volumes[str(self.tree)] = {"bind": BASE, "mode": "rw"}

    def mount(self, channel: str, content: Path) -> Path:
        """Make a channel of a file or folder; returns its folder in the container."""
        inside = Path(BASE, "input/data", channel)
        (self.tree / "input/data" / channel).mkdir(parents=True)  # else the engine makes it, as root
        target = inside if content.is_dir() else inside / content.name
        self._volumes[str(content)] = {"bind": str(target), "mode": "ro"}
        return inside

    def launch(self, *flags: str) -> Container:
        """Start the image's own command, or `train` with flags."""
        self._remove()
        command = ["train", *flags] if flags else None
        options = {**self.options, "environment": self.environment, "volumes": self._volumes}
        self._container = self.subject.create(command, **options)
        self._container.start()
        return self._container

    def run(self, *flags: str, timeout: float = 300) -> Result:
        return ended(self.launch(*flags), timeout)

    def run_until(
        self, text: str, number: int, *flags: str, timeout: float = 300, sent: list[float] | None = None
    ) -> Result:
        """As in a process; `sent` gets the time at which the signal was sent."""
        container = self.launch(*flags)
        seen = ""
        for piece in container.logs(stream=True, follow=True):
            seen += piece.decode(errors="replace")
            if text in seen:
                (sent if sent is not None else []).append(time.monotonic())
                container.kill(number)
                break
        return ended(container, timeout)

    def end(self) -> None:
        self._remove()
        super().end()

    def _remove(self) -> None:
        if self._container is not None:
            self._container.remove(force=True)
            self._container = None


def ended(container: Container, timeout: float) -> Result:
    """Wait for a container's end; how it ended."""
    try:
        code = container.wait(timeout=timeout)["StatusCode"]
    except ConnectionError:
        pytest.fail(f"still running after {timeout} s:\n{container.logs().decode()}")
    out, err = (container.logs(stdout=not errors, stderr=errors).decode() for errors in (False, True))
    return Result(code, out, err)
