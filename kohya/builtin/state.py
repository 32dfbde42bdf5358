"""What a run resumes from: a folder, written beside its place and renamed into it.

    model.safetensors   the LoRA, float32
    optimizer.bin       AdamW's state, and the gradient scaler's
    scheduler.bin       the learning rates' schedule
    random_states.bin   Python's, numpy's and torch's generators
    train_state.json    sd-scripts' two numbers, and where in the data the run stood

Nothing in it is a pickle that could run code: torch reads the .bin files with weights_only. A state is taken
between two optimizer steps, and a run that resumes from it goes on as if it had never stopped.
"""

import json
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError  # type: ignore[attr-defined]
from safetensors.torch import load_file, save_file
from torch.utils.tensorboard import SummaryWriter

from kohya import states
from kohya.builtin import BuiltinError

_PARTS = ("optimizer", "scheduler", "random_states")


class StateError(BuiltinError):
    """The state is damaged, or does not fit the run."""


@dataclass
class Position:
    """Where a run stands: everything that decides what comes next, besides tensors and generators."""

    fingerprint: Mapping[str, Any]  # what must be the same in a run that resumes
    current_epoch: int = 0  # from 1; sd-scripts' name
    current_step: int = 0  # optimizer steps done; sd-scripts' name
    batch: int = 0  # batches of this epoch that are done
    epoch_ended: bool = True  # its log line and its LoRA are written too
    order_seed: int = 0  # of the torch generator that orders this epoch's batches
    seed: int = 0
    losses: list[float] = field(default_factory=list)  # of the last epoch's worth of batches
    total: float = 0.0

    def add(self, loss: float) -> None:
        """A batch is done. After the first epoch its loss takes its predecessor's place. :6668-6688"""
        if self.current_epoch == 1:
            self.losses.append(loss)
        else:
            self.losses += [0.0] * (self.batch + 1 - len(self.losses))
            self.total -= self.losses[self.batch]
            self.losses[self.batch] = loss
        self.total += loss
        self.batch += 1

    @property
    def average(self) -> float:
        return self.total / len(self.losses) if self.losses else 0.0


def save(
    folder: Path,
    at: Position,
    tensors: Mapping[str, torch.Tensor],
    parts: Mapping[str, Any],
    events: SummaryWriter | None,
) -> None:
    """Write a state to `folder`. `parts`: the state dictionaries of optimizer and scheduler.

    A state that cannot be written leaves nothing behind, and raises what the disk, torch or safetensors says.
    """
    with _whole(folder) as partial:
        partial.mkdir(parents=True)
        save_file({key: value.cpu() for key, value in tensors.items()}, partial / "model.safetensors")
        for name, part in {**parts, "random_states": _generators()}.items():
            torch.save(part, partial / f"{name}.bin")
        (partial / "train_state.json").write_text(json.dumps({"format": 1, **asdict(at)}))
        if events is not None:
            states.note_log(partial, events)


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write it to, which takes its name at the end, or goes where that fails."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load(folder: Path) -> tuple[Position, dict[str, torch.Tensor], dict[str, Any]]:
    """Position, LoRA tensors and the parts' state dictionaries.

    Raises StateError where the state is missing, damaged or sd-scripts' own.
    """
    if not folder.is_dir():
        raise StateError(f"There is no state at {folder}.")
    try:
        values = json.loads((folder / "train_state.json").read_text())
        if values.pop("format", None) != 1:
            raise ValueError("it was not written by this trainer")
        tensors = load_file(folder / "model.safetensors")
        parts = {name: torch.load(folder / f"{name}.bin", weights_only=True) for name in _PARTS}
        return Position(**values), tensors, parts
    except (
        OSError,
        ValueError,
        TypeError,
        RuntimeError,
        EOFError,
        SafetensorError,
        UnpicklingError,
    ) as error:
        raise StateError(
            f"The state {folder} cannot be read: {' '.join(str(error).split())[:200]}."
        ) from None


def check(at: Position, fingerprint: Mapping[str, Any], steps: int) -> None:
    """Raise StateError where the run differs from the state's in `fingerprint`, or is over before it."""
    for name, value in fingerprint.items():
        if (before := at.fingerprint.get(name)) != value:
            raise StateError(f"The state belongs to a run where {name} is {before}, and here it is {value}.")
    if at.current_step > steps:
        raise StateError(f"The state is at step {at.current_step}, and this run has {steps} steps only.")


def restore_generators(saved: Mapping[str, Any]) -> None:
    """Put Python's, numpy's and torch's generators back, the last thing before training goes on."""
    version, numbers, gauss = saved["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = saved["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(saved["torch"])
    if torch.cuda.is_available() and saved["cuda"]:
        torch.cuda.set_rng_state_all(saved["cuda"])


def _generators() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [name, [int(key) for key in keys], *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
