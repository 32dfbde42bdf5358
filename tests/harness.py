"""The job as a process, in a SageMaker tree made by a test."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from entrypoint.failures import Stopped
from kohya.config import Kind

METRIC = re.compile(
    r"step=(\d+)/(\d+) epoch=\d+/\d+ loss=\d+\.\d{4} avg_loss=\d+\.\d{4} lr=\d\.\de[+-]\d\d"
    r"( images_per_s=\d+\.\d\d eta_s=\d+)?"
)

NARROW = Path(__file__).parents[1] / "demo" / "narrow"  # on PYTHONPATH: sd-scripts loads narrow models

# What makes a job on a narrow model take seconds. All values are strings, as SageMaker sends them.
TINY: Mapping[str, str] = {
    "trainer": "builtin",
    "resolution": "64,64",
    "enable_bucket": "false",
    "train_batch_size": "2",
    "network_dim": "4",
    "network_alpha": "4",
    "max_train_epochs": "2",
    "save_every_n_epochs": "1",
    "unet_lr": "1e-3",
    "output_name": "shape",
    "gradient_checkpointing": "false",
}


# torch/__init__.py of a torch that is none: who imports it is given the real one, and told what it will find.
_HANDED_OVER = """
import importlib, os, sys
from pathlib import Path
print("torch finds libraries in", os.environ.get("LD_LIBRARY_PATH"), file=sys.stderr)
sys.path.remove(str(Path(__file__).parents[1]))
del sys.modules["torch"]
importlib.import_module("torch").__spec__.origin = __file__
"""


@dataclass(frozen=True)
class Result:
    """How a job ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


@contextmanager
def stopped_when(happened: Callable[[], object]) -> Iterator[None]:
    """Raise Stopped in the main thread as soon as this has happened."""

    def stop(*_: object) -> None:
        raise Stopped("SIGTERM")

    def watch() -> None:
        while not over.wait(0.01):
            if happened():
                signal.pthread_kill(main, signal.SIGALRM)
                return

    main, over = threading.main_thread().ident or 0, threading.Event()
    watcher = threading.Thread(target=watch)
    before = signal.signal(signal.SIGALRM, stop)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        signal.signal(signal.SIGALRM, before)


class Job:
    """A job in a folder of its own: its tree, and the process that runs in it."""

    def __init__(self, folder: Path) -> None:
        self.tree = folder / "ml"
        self.scratch = Path(tempfile.mkdtemp(prefix="job-"))  # short, for sockets lie below it
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "SM_"))},
            "SAGEMAKER_BASE_DIR": str(self.tree),
            "TMPDIR": str(self.scratch),
            "OMP_NUM_THREADS": "1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self.prefix: tuple[str, ...] = ()  # a command that starts the job's
        self._process: subprocess.Popen[str] | None = None

    @property
    def model(self) -> Path:
        return self.tree / "model"

    @property
    def failure(self) -> str | None:
        """What SageMaker would show as FailureReason; None without a failure file."""
        file = self.tree / "output" / "failure"
        return file.read_text() if file.exists() else None

    @property
    def record(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.model / "job.json").read_text())
        return content

    @property
    def events(self) -> list[Path]:
        return sorted((self.tree / "output" / "tensorboard").rglob("events.out.tfevents.*"))

    @property
    def logged(self) -> list[tuple[int, float]]:
        """The steps in its one event log, and when each was logged, in seconds of the epoch."""
        (log,) = self.events
        scalars = EventAccumulator(str(log)).Reload().Scalars("loss/current")
        return [(event.step, event.wall_time) for event in scalars]

    @property
    def steps(self) -> list[int]:
        """The steps in its one event log."""
        return [step for step, _ in self.logged]

    @property
    def states(self) -> dict[Path, int]:
        """The states that it has kept, and the step of each."""
        found = (self.tree / "checkpoints").glob("*/state.json")
        return {path.parent: json.loads(path.read_text()).get("step", 0) for path in found}

    @property
    def newest_state(self) -> Path:
        return max(self.states, key=self.states.__getitem__)

    @property
    def loras(self) -> dict[str, bytes]:
        """The numbers of each LoRA: its header tells of its session and its time."""
        contents = {path.name: path.read_bytes() for path in self.model.glob("*.safetensors")}
        return {name: one[8 + int.from_bytes(one[:8], "little") :] for name, one in contents.items()}

    def configure(self, name: str, content: Mapping[str, Any]) -> None:
        """Write one of SageMaker's JSON files, such as hyperparameters."""
        folder = self.tree / "input" / "config"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(content))

    def mount(self, channel: str, content: Path) -> Path:
        """Make a channel of a file or folder."""
        folder = self.tree / "input" / "data" / channel
        folder.parent.mkdir(parents=True, exist_ok=True)
        if content.is_dir():
            folder.symlink_to(content)
        else:
            folder.mkdir()
            (folder / content.name).symlink_to(content)
        return folder

    def pretend(self, *gpus: str, cuda: str | None = "13.0") -> None:
        """Let nvidia-smi tell of `gpus` and torch of its build for `cuda`. The job still runs on the CPU."""
        write_nvidia_smi(self.scratch / "bin", *gpus)
        write_torch(self.scratch / "cuda", cuda)
        for name, folder in (("PATH", "bin"), ("PYTHONPATH", "cuda")):
            there = filter(None, [self.environment.get(name)])
            self.environment[name] = os.pathsep.join([str(self.scratch / folder), *there])

    def start(self, *flags: str) -> "subprocess.Popen[str]":
        """Start `train` as SageMaker does."""
        self._process = subprocess.Popen(
            [*self.prefix, sys.executable, "-m", "entrypoint", "train", *flags],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return self._process

    def run(self, *flags: str, timeout: float = 240) -> Result:
        """Run `train` to its end."""
        process = self.start(*flags)
        out, err = process.communicate(timeout=timeout)
        return Result(process.returncode, out, err)

    def run_until(self, text: str, number: int, *flags: str, timeout: float = 240) -> Result:
        """Run `train`, send a signal when a line holds `text`, and wait for its end."""
        return self.run_and(text, lambda process: process.send_signal(number), *flags, timeout=timeout)

    def run_and(
        self,
        text: str,
        act: Callable[["subprocess.Popen[str]"], object],
        *flags: str,
        timeout: float = 240,
    ) -> Result:
        """Run `train`, do something to its process when a line holds `text`, and wait for its end."""
        process = self.start(*flags)
        assert process.stdout is not None
        assert process.stderr is not None
        killer = threading.Timer(timeout, process.kill)
        killer.start()
        try:
            seen = []
            for line in process.stdout:
                seen.append(line)
                if text in line:
                    act(process)
                    break
            rest, err = process.communicate()
        finally:
            killer.cancel()
        return Result(process.returncode, "".join(seen) + rest, err)

    def end(self) -> None:
        """Leave nothing running."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(120)
        shutil.rmtree(self.scratch, ignore_errors=True)


def write_nvidia_smi(folder: Path, *gpus: str, memory: str = "[N/A]") -> None:
    """An nvidia-smi for PATH that tells of `gpus`, such as "Tesla T4, 7.5, 580.65.06", with this memory."""
    folder.mkdir()
    tool = folder / "nvidia-smi"
    lines = (f"{gpu}, {memory}" if gpu.count(",") == 2 else gpu for gpu in gpus)  # others are warnings
    tool.write_text("\n".join(["#!/bin/sh", *(f"echo '{line}'" for line in lines)]))
    tool.chmod(0o755)


def write_torch(folder: Path, cuda: str | None) -> None:
    """A torch for PYTHONPATH that is built for `cuda` to whom looks, and the real one to whom imports it."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text(_HANDED_OVER)
    (folder / "torch" / "version.py").write_text(
        f"from typing import Optional\n\n__version__ = '2.12.1'\ncuda: Optional[str] = {cuda!r}\n"
    )


def write_compat(folder: Path, version: str) -> Path:
    """NVIDIA's forward-compatibility libraries of a driver's version, by their names; returns `folder`."""
    folder.mkdir()
    (folder / f"libcuda.so.{version}").touch()
    (folder / "libcuda.so.1").symlink_to(f"libcuda.so.{version}")
    return folder


def write_dataset(folder: Path, *, side: int = 96) -> Path:
    """Four pictures of coloured shapes with captions, in `2_shape` below `folder`; returns `folder`."""
    rng = np.random.default_rng(0)
    subset = folder / "2_shape"
    subset.mkdir(parents=True)
    for number, colour in enumerate(("red", "green", "blue", "grey")):
        pixels = rng.integers(0, 60, (side, side, 3), np.uint8)
        channels = slice(None) if colour == "grey" else number
        pixels[side // 4 : -side // 4, side // 4 : -side // 4, channels] += 150
        Image.fromarray(pixels).save(subset / f"{number}.png")
        (subset / f"{number}.txt").write_text(f"a {colour} square, noise")
    return folder


def esd_parameters(
    output: object, model: object, pictures: object, toml: object, kind: Kind = "sd15", **params: object
) -> str:
    """What ESD's s3_location leads to: its parameter JSON. `params` stand beside the places in it."""
    places = {"s3_model_path": str(model), "s3_data_path": str(pictures), "s3_toml_path": str(toml)}
    training = {"fm_type": {"sd15": "sd_1_5", "sdxl": "sd_xl"}[kind], **places}
    told = {"id": "1f", "training-type": "kohya", "s3-output-path": str(output)}
    return json.dumps({**told, "params": {"training_params": training, **params}})
