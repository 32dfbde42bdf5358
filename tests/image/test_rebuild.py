"""Two builds of one commit are the same image, file for file."""

import hashlib
import os
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from io import BufferedReader, RawIOBase
from pathlib import Path

import pytest

from tests.image.container import Subject

ROOT = Path(__file__).parents[2]
AGAIN = "sagemaker-kohya-built-again"
TOLD = 20  # paths that differ


def test_two_builds_of_one_commit_are_the_same(subject: Subject, variant: str) -> None:
    """The second one with nothing of the first. BUILD_FLAGS, WHEELS and the like are to be as they were."""
    if variant != "cpu":
        pytest.skip("only the CPU image is built twice, the others take too long")
    flags = f"{os.environ.get('BUILD_FLAGS', '')} --no-cache"
    build = ["make", "image-cpu", f"IMAGE={AGAIN}", "TAG=cpu", f"BUILD_FLAGS={flags}"]
    built = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    try:
        again = Subject(subject.engine, subject.engine.images.get(f"{AGAIN}:cpu"))
        revision = "org.opencontainers.image.revision"
        if again.config["Labels"][revision] != subject.config["Labels"][revision]:
            pytest.skip("the image was built from another commit than the one that is checked out here")
        assert again.config == subject.config
        one, two = tree(subject), tree(again)
    finally:
        subject.engine.images.remove(f"{AGAIN}:cpu")
    assert len(one) > 1000
    differ = [name for name in sorted({*one, *two}) if one.get(name) != two.get(name)]
    assert [(name, one.get(name), two.get(name)) for name in differ[:TOLD]] == []


def tree(image: Subject) -> dict[str, tuple[object, ...]]:
    """Of each path in an image: type, mode, owner, link's target, and the hash of what is in it."""
    container = image.create(device_requests=[])
    found = {}
    try:
        with tarfile.open(fileobj=BufferedReader(_Pieces(container.export())), mode="r|") as exported:
            for entry in exported:
                opened = exported.extractfile(entry) if entry.isreg() else None
                content = hashlib.file_digest(opened, "sha256").hexdigest() if opened else entry.linkname
                found[entry.name] = (entry.type, oct(entry.mode), entry.uid, entry.gid, content)
    finally:
        container.remove(force=True)
    return found


class _Pieces(RawIOBase):
    """A file of the pieces in which the engine sends."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces: Iterator[bytes] = iter(pieces)
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, target: "bytearray") -> int:  # type: ignore[override]
        self._left = self._left or next(self._pieces, b"")
        size = min(len(target), len(self._left))
        target[:size], self._left = self._left[:size], self._left[size:]
        return size
