"""A disk of a fixed size, made by any user where the kernel allows user namespaces."""

import functools
import subprocess
from pathlib import Path

import pytest


def on_small_disk(folder: Path, size: int) -> tuple[str, ...]:
    """The beginning of a command that sees an empty disk of `size` bytes at `folder`, and alone does.

    Skips the test where no such disk can be made. The disk is gone when the command has ended.
    """
    if refused := _refusal():
        pytest.skip(f"a small disk cannot be made here: {refused}")
    script = 'mount -t tmpfs -o "size=$1" tmpfs "$2" && shift 2 && exec "$@"'
    return ("unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(size), str(folder))


@functools.cache
def _refusal() -> str:
    try:
        command = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        tried = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return tried.stderr.strip() if tried.returncode else ""
