"""kohya's sd-scripts, unmodified and pinned: where it is, and the command that starts it.

    https://github.com/kohya-ss/sd-scripts, tag v0.10.1

The checkout is the one that SD_SCRIPTS_DIR names, else .sd-scripts/checkout beside this package, where
`make sd-scripts` puts it together with an environment of its own. SD_SCRIPTS_PYTHON names another Python.
"""

import hashlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the Python of sd-scripts reads this file too, and lacks what config needs
    from kohya.config import Kind


TAG = "v0.10.1"
COMMIT = "ae72efb92babe89ff8e70f057e42db68440e8d61"
SCRIPTS: "dict[Kind, str]" = {"sd15": "train_network.py", "sdxl": "sdxl_train_network.py"}

# git's names for the files that decide how a LoRA is trained, at COMMIT: a checkout without its history, as
# in an image, can be told all the same.
_BLOBS = {
    "train_network.py": "2f8797d25a38b09623ffd62505fdb0e803b9aa69",
    "sdxl_train_network.py": "5c5bcd63a371fa8bec758ab7360112549b0de6c4",
    "library/train_util.py": "d8577b9d7ff0787cf98225d8c6690aac098afd7f",
    "networks/lora.py": "1699a60ff0832e0718dfee7df975150107de63cc",
}
_HOME = Path(__file__).parent.parent / ".sd-scripts"


class MissingSdScripts(RuntimeError):
    """The pinned sd-scripts is not there, or is another version. One sentence."""


@dataclass(frozen=True)
class SdScripts:
    """A checkout of the pinned sd-scripts, and the Python that has its requirements."""

    folder: Path
    python: Path

    def command(self, kind: "Kind", config_file: Path, devices: int = 1) -> list[str]:
        """Start training in the launcher that reports steps and saves states; one process a device."""
        launcher = []
        if devices > 1:
            several = (
                f"--multi_gpu --num_machines=1 --num_processes={devices} --main_process_port={_free_port()}"
            )
            quiet = "--mixed_precision=no --dynamo_backend=no"  # the script has its own
            launcher = ["-m", "accelerate.commands.launch", *several.split(), *quiet.split()]
        script = self.folder / SCRIPTS[kind]
        module = ["-m", "kohya.launch", str(script), f"--config_file={config_file}"]
        return [str(self.python), *launcher, *module]

    def environment(self) -> dict[str, str]:
        """What its process needs: this package to import."""
        path = [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {"PYTHONPATH": os.pathsep.join(path)}

    def lacks(self, modules: Iterable[str]) -> list[str]:
        """Those of `modules` that its Python cannot find. Nothing is imported."""
        names = list(modules)
        code = (
            "import importlib.util, sys; print(*[m for m in sys.argv[1:] if not importlib.util.find_spec(m)])"
        )
        told = self._run(code, names)
        return names if told is None else told.split()

    def lacks_classes(self, paths: Mapping[str, str]) -> dict[str, str]:
        """Those of `paths`, package.Class by any name, that its Python cannot import. Takes seconds each."""
        code = (
            "import importlib, sys; module, _, name = sys.argv[1].rpartition('.'); "
            "getattr(importlib.import_module(module), name)"
        )
        return {name: path for name, path in paths.items() if self._run(code, [path]) is None}

    def versions(self, distributions: Iterable[str]) -> dict[str, str]:
        """Of sd-scripts itself, and of those of `distributions` that its Python has."""
        code = (
            "import sys, importlib.metadata as m; have = {d.name: d.version for d in m.distributions()}; "
            "print(*(f'{n}={have[n]}' for n in sys.argv[1:] if n in have))"
        )
        told = (self._run(code, list(distributions)) or "").split()
        return {"sd-scripts": f"{TAG} ({COMMIT[:8]})", **dict(pair.split("=", 1) for pair in told)}

    def _run(self, code: str, arguments: list[str]) -> str | None:
        told = subprocess.run(
            [self.python, "-c", code, *arguments], capture_output=True, text=True, check=False
        )
        return told.stdout if told.returncode == 0 else None


def find() -> SdScripts:
    """The pinned sd-scripts on this machine. Raises MissingSdScripts, saying what is there instead."""
    named = os.environ.get("SD_SCRIPTS_DIR")
    folder = Path(named) if named else _HOME / "checkout"
    for name, blob in _BLOBS.items():
        file = folder / name
        if not file.is_file():
            raise MissingSdScripts(f"sd-scripts is not in {folder}: there is no {name}")
        if _blob(file) != blob:
            raise MissingSdScripts(f"{file} is not the one of sd-scripts {TAG} (commit {COMMIT[:8]})")
    own = _HOME / "venv" / "bin" / "python"
    python = os.environ.get("SD_SCRIPTS_PYTHON") or (str(own) if own.exists() else sys.executable)
    return SdScripts(folder.resolve(), Path(python))


def _free_port() -> int:
    """A port of this machine for the processes to meet at: with 0 they would wait for each other for ever."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _blob(file: Path) -> str:
    """git's name for a file's content."""
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
