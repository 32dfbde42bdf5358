"""Runs an sd-scripts entry script in this process, its files untouched.

    python -m kohya.launch /path/to/train_network.py --config_file=merged.toml

Before the script runs, hooks are put on accelerate's public API:

- `Accelerator.print` tells how many steps and epochs there will be, and when an epoch begins;
- `TensorBoardTracker.log` is called once a batch: from it each optimizer step becomes a metric record. The
  loss in it is the step's own; the one on sd-scripts' progress bar is smoothed;
- `TensorBoardTracker.store_init_configuration` would write a second event log, of hyperparameters: it is
  left out, so that a run is one file.

On SIGTERM a state is saved at the end of the running optimizer step, and the process exits with 143. What
follows the step in sd-scripts (train_network.py:1440-1500 of v0.10.1) has been done by then, so the state is
the one that sd-scripts itself would have saved there.
"""

import re
import runpy
import signal
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kohya import metrics

_STEPS = re.compile(r"total optimization steps.*: (\d+)")
_EPOCHS = re.compile(r"num epochs.*: (\d+)")
_BATCH = re.compile(r"batch size per device.*: (\d+)")
_ACCUMULATION = re.compile(r"gradient accumulation steps.*= (\d+)")
_EPOCH = re.compile(r"\s*epoch (\d+)/\d+")


class Watch:
    """What is known of the run, from what passes through accelerate."""

    def __init__(self, output_dir: Path, output_name: str) -> None:
        self.stopping = False
        self.accelerator: Any = None
        self._writer = metrics.Writer()
        self._output_dir, self._output_name = output_dir, output_name
        self._facts: dict[str, int] = {}
        self._epoch = 0
        self._losses: list[float] = []  # of the batches of the running optimizer step

    def on_signal(self, _number: int, _frame: object) -> None:
        """Before the first step there is nothing to save."""
        if self._epoch == 0:
            raise SystemExit(143)
        self.stopping = True

    def on_print(self, text: str) -> None:
        """A line of sd-scripts'. The number of optimizer steps comes last of those that open a run."""
        for name, pattern in (("epochs", _EPOCHS), ("batch", _BATCH), ("accumulation", _ACCUMULATION)):
            if found := pattern.search(text):
                self._facts[name] = int(found[1])
        if found := _EPOCH.fullmatch(text.strip("\n")):
            self._epoch = int(found[1])
        if found := _STEPS.search(text):
            images = self._facts.get("batch", 1) * self._facts.get("accumulation", 1)
            images *= self.accelerator.num_processes
            self._writer.write(metrics.Start(int(found[1]), self._facts.get("epochs", 1), images))

    def on_log(self, values: Mapping[str, Any], step: int) -> None:
        """The values of a batch; at the end of an optimizer step its record, and a state if one is due."""
        if "loss/current" not in values:
            return
        self._losses.append(float(values["loss/current"]))
        if not self.accelerator.sync_gradients:
            return
        loss = sum(self._losses) / len(self._losses)
        self._losses.clear()
        rates = {
            name.removeprefix("lr/"): float(rate) for name, rate in values.items() if name.startswith("lr/")
        }
        self._writer.write(metrics.Step(step, self._epoch, loss, float(values["loss/average"]), rates))
        if self.stopping:
            self._save(step)
            self.accelerator.end_training()
            raise SystemExit(143)

    def _save(self, step: int) -> None:
        """A state, whole before it has its name. Its model.safetensors is the LoRA so far."""
        folder = self._output_dir / f"{self._output_name}-step{step:08d}-state"
        partial = folder.with_name(f".{folder.name}.partial")
        self.accelerator.save_state(str(partial))
        partial.rename(folder)
        print(f"stopped after step {step}; the state is {folder}", flush=True)


def hook(watch: Watch) -> None:
    """Put the hooks on accelerate's public API."""
    from accelerate import Accelerator  # noqa: PLC0415 (takes seconds, and only the trainer's Python has it)
    from accelerate.tracking import TensorBoardTracker  # noqa: PLC0415

    made, printed, logged = Accelerator.__init__, Accelerator.print, TensorBoardTracker.log

    def make(self: Any, *arguments: Any, **named: Any) -> None:
        made(self, *arguments, **named)
        watch.accelerator = self

    def tell(self: Any, *arguments: Any, **named: Any) -> None:
        printed(self, *arguments, **named)
        watch.on_print(" ".join(map(str, arguments)))

    def log(self: Any, values: Any, step: Any = None, **named: Any) -> None:
        logged(self, values, step, **named)
        watch.on_log(values, step)

    Accelerator.__init__ = make
    Accelerator.print = tell
    TensorBoardTracker.log = log
    TensorBoardTracker.store_init_configuration = lambda *_: None


def main() -> None:
    """Run the script that the first argument names with the arguments after it."""
    script, *arguments = sys.argv[1:]
    path = next(argument.partition("=")[2] for argument in arguments if argument.startswith("--config_file="))
    values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    watch = Watch(Path(values["output_dir"]), values["output_name"])
    signal.signal(signal.SIGTERM, watch.on_signal)
    hook(watch)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))  # as if Python had started the script itself
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
