"""Runs an sd-scripts entry script in this process, its files untouched.

    python -m kohya.launch /path/to/train_network.py --config_file=merged.toml

Before the script runs, hooks are put on accelerate's public API:

- `Accelerator.print` tells how many steps and epochs there will be, and when an epoch begins;
- `TensorBoardTracker.log` is called once a batch: from it each optimizer step becomes a metric record. The
  loss in it is the step's own; the one on sd-scripts' progress bar is smoothed;
- `TensorBoardTracker.store_init_configuration` would write a second event log, of hyperparameters: it is
  left out, so that a run is one file;
- the data loader's iterator is asked for the next batch when a step is over, in every process;
- with that, `Accelerator.prepare`, `skip_first_batches` and accelerate's own hooks on saving and loading a
  state, a run goes on exactly where it was (kohya/resume.py).

On SIGTERM, and every KOHYA_STATE_EVERY_MINUTES, a state is saved at the end of the running optimizer step,
and in it the LoRA so far; after SIGTERM the process then exits with 143. What follows the step in sd-scripts
(train_network.py:1440-1590 of v0.10.1) has been done by then. After the last step of all there is no next
batch, and nothing left to save a state for. Several processes agree on the step, and each writes its own
random numbers; all else is written by the first.
"""

import ctypes
import json
import math
import os
import re
import runpy
import shutil
import signal
import sys
import time
import tomllib
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kohya import metrics, states
from kohya.resume import DataOrder, Done

_STEPS = re.compile(r"total optimization steps.*: (\d+)")
_EPOCHS = re.compile(r"num epochs.*: (\d+)")
_BATCHES = re.compile(r"num batches per epoch.*: (\d+)")
_BATCH = re.compile(r"batch size per device.*: (\d+)")
_EPOCH = re.compile(r"\s*epoch (\d+)/\d+")
_PR_SET_PDEATHSIG = 1  # prctl(2)


class Watch:
    """What is known of the run, from what passes through accelerate."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        """`values`: sd-scripts' options."""
        self.stopping = False
        self.accelerator: Any = None
        self._values = values
        self._timer = states.Timer()
        self._writer = metrics.Writer()
        self._facts: dict[str, int] = {}
        self._epoch = 0
        self._losses: list[float] = []  # of the batches of the running optimizer step
        self._recent: deque[float] = deque()  # of the batches of the last epoch's worth of this run
        self._network: Any = None
        self._optimizers: list[Any] = []
        self._loader: Any = None
        self._rest: Any = None  # the loader without what a resumed run has seen of its first epoch
        self._step = 0
        self._trained = False  # whether any batch was, since a state was loaded
        self._order = DataOrder()
        self._done = Done(0)
        self._flushed = time.monotonic()

    @property
    def resumed(self) -> bool:
        """Whether the run goes on from a state."""
        return self._done > 0

    def on_signal(self, _number: int, _frame: object) -> None:
        """Before the first step there is nothing to save."""
        if self._epoch == 0:
            raise SystemExit(143)
        self.stopping = True

    def on_print(self, text: str) -> None:
        """A line of sd-scripts'. The number of optimizer steps comes last of those that open a run."""
        for name, pattern in (("epochs", _EPOCHS), ("batches", _BATCHES), ("batch", _BATCH)):
            if found := pattern.search(text):
                self._facts[name] = int(found[1])
        if found := _EPOCH.fullmatch(text.strip("\n")):
            self._epoch = int(found[1])
        if found := _STEPS.search(text):
            self._begin(int(found[1]))

    def _begin(self, steps: int) -> None:
        if self._done > steps:
            raise SystemExit(
                f"The state is at step {int(self._done)}, and this run has {steps} steps only: "
                "set max_train_steps or max_train_epochs to at least what the state's run had."
            )
        self._recent = deque(maxlen=self._facts.get("batches"))
        self._facts["steps"] = steps
        images = self._facts.get("batch", 1) * self.accelerator.gradient_accumulation_steps
        images *= self.accelerator.num_processes
        if self.accelerator.is_main_process:
            epochs = self._facts.get("epochs", 1)
            self._writer.write(metrics.Start(steps, epochs, images, int(self._done), os.getpid()))

    def on_prepare(self, prepared: Any) -> None:
        """What accelerate returns: among it the optimizer and, before the one for validation, the loader."""
        from accelerate.data_loader import DataLoaderShard  # noqa: PLC0415 (see hook)
        from accelerate.optimizer import AcceleratedOptimizer  # noqa: PLC0415

        for item in prepared if isinstance(prepared, tuple) else (prepared,):
            if isinstance(item, AcceleratedOptimizer):
                self._optimizers.append(item)
            elif isinstance(item, DataLoaderShard) and self._loader is None:
                self._loader = item

    def on_iterate(self, loader: Any, batches: Iterator[Any]) -> Iterator[Any]:
        """`batches` of `loader`. Between two that are trained on an optimizer step may have ended."""
        if loader is self._loader:
            self._order.begin(loader)
        trains = loader in (self._loader, self._rest)
        for batch in batches:
            self._trained |= trains
            yield batch
            if trains and self.accelerator.sync_gradients:
                self._step += 1
                self._on_step()
        if loader is self._rest:
            self._rest = None  # and with it its workers, where they persist

    def on_save(self, models: list[Any], _weights: object, folder: str) -> None:
        """A state is being saved to `folder`, by this launcher or by sd-scripts."""
        for model in map(self.accelerator.unwrap_model, models):
            if hasattr(model, "save_weights"):  # of those that are prepared, only the LoRA's network has it
                self._network = model
        if self.accelerator.is_main_process:
            self._order.save(Path(folder), self._loader)
            for tracker in self.accelerator.trackers:
                if tracker.name == "tensorboard":
                    states.note_log(Path(folder), tracker.writer)

    def on_saved(self, folder: str) -> None:
        """A state is saved. sd-scripts counts one step more than there are where it has made none."""
        file = Path(folder, "train_state.json")
        if self.resumed and not self._trained and self.accelerator.is_main_process:
            told = json.loads(file.read_text(encoding="utf-8"))
            file.write_text(json.dumps({**told, "current_step": int(self._done)}), encoding="utf-8")

    def on_load(self, hook: Any, folder: str) -> None:
        """A state was loaded, and sd-scripts' `hook` has read its number of steps."""
        name = "steps_from_state"
        steps = hook.__closure__[hook.__code__.co_freevars.index(name)]
        self._done = steps.cell_contents = Done(steps.cell_contents)
        self._step = int(self._done)
        if not self._order.load(Path(folder)):
            print(f"{folder} does not tell the order of the pictures: some may be seen twice", flush=True)

    def on_skip(self, loader: Any, skip: Any) -> Iterator[Any]:
        """The rest of the epoch in which the state was saved. `skip(n)`: `loader` without n batches."""
        accumulation = self.accelerator.gradient_accumulation_steps
        per_epoch = math.ceil(len(loader) / accumulation)
        epoch = self._done // per_epoch
        skipped = (int(self._done) - epoch * per_epoch) * accumulation
        finished = skipped >= len(loader) or self._done >= self._facts["steps"]
        self._rest = None if finished else skip(skipped)
        return self._order.rest(loader, self._rest, epoch + 1)

    def mend(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """`values` for the event log. A resumed sd-scripts averages over zeros for what it has not seen."""
        if "loss/current" in values:
            self._recent.append(float(values["loss/current"]))
        averages = {name for name in ("loss/average", "loss/epoch_average") if name in values}
        if not self.resumed or not averages:
            return values
        if not self._recent:
            return {name: value for name, value in values.items() if name not in averages}
        return {**values, **dict.fromkeys(averages, sum(self._recent) / len(self._recent))}

    def on_log(self, values: Mapping[str, Any], step: int, writer: Any) -> None:
        """The values of a batch, in the first process; with those that end an optimizer step its record."""
        if "loss/current" not in values:
            return
        if time.monotonic() - self._flushed > states.FLUSH_SECONDS:
            self._flushed = time.monotonic()
            writer.flush()
        self._losses.append(float(values["loss/current"]))
        if not self.accelerator.sync_gradients:
            return
        loss = sum(self._losses) / len(self._losses)
        self._losses.clear()
        rates = {
            name.removeprefix("lr/"): float(rate) for name, rate in values.items() if name.startswith("lr/")
        }
        self._writer.write(metrics.Step(step, self._epoch, loss, float(values["loss/average"]), rates))

    def _on_step(self) -> None:
        """An optimizer step, with all that belongs to it, is over: save a state if one is due, or stop."""
        if self._agreed(self.stopping or self._timer.due):
            self._save(self._step)
        if self._agreed(self.stopping):
            if self.accelerator.is_main_process:
                print(f"stopped after step {self._step}", flush=True)
            self.accelerator.end_training()
            raise SystemExit(143)

    def _agreed(self, wanted: bool) -> bool:
        """Whether any of the processes wants it. All of them ask at the end of each step."""
        if self.accelerator.num_processes == 1:
            return wanted
        if wanted:
            self.accelerator.set_trigger()
        return bool(self.accelerator.check_trigger())

    def _save(self, step: int) -> None:
        """A state, whole before it has its name. On one device training goes on without one that fails."""
        name = f"{self._values['output_name']}-step{step:08d}-state"
        if Path(self._values["output_dir"], name).exists():  # sd-scripts has just saved it: save_state
            return
        folder = states.folder(self._values["output_dir"]) / name
        partial = folder.with_name(f".{name}.partial")
        try:
            self._write_state(partial, step)
            if self.accelerator.is_main_process:
                partial.rename(folder)
                print(f"the state after step {step} is saved", flush=True)
                self._timer.saved(folder)
        except Exception as error:  # of a full disk torch, safetensors and Python tell in ways of their own
            if self.accelerator.num_processes > 1:  # the others wait for this one
                raise
            shutil.rmtree(partial, ignore_errors=True)
            print(f"the state after step {step} could not be saved: {error}", flush=True)
        self._timer.restart()

    def _write_state(self, folder: Path, step: int) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(folder))
        if self.accelerator.is_main_process:
            self._save_lora(folder / f"{self._values['output_name']}.safetensors", step)
        self.accelerator.wait_for_everyone()

    def _save_lora(self, file: Path, step: int) -> None:
        """The LoRA so far, in the precision of those that sd-scripts saves."""
        import torch  # noqa: PLC0415 (see hook)

        dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "float": torch.float32}
        names = ("output_name", "network_module", "network_dim", "network_alpha")
        metadata = {f"ss_{name}": str(self._values.get(name)) for name in names}
        metadata |= {"ss_steps": str(step), "ss_epoch": str(self._epoch)}
        if arguments := self._values.get("network_args"):
            metadata["ss_network_args"] = json.dumps(dict(pair.split("=", 1) for pair in arguments))
        for optimizer in self._optimizers:  # schedule-free ones average the weights
            optimizer.eval()
        self._network.save_weights(str(file), dtypes.get(self._values.get("save_precision", "")), metadata)
        for optimizer in self._optimizers:
            optimizer.train()


def hook(watch: Watch) -> None:
    """Put the hooks on accelerate's public API."""
    from accelerate import Accelerator  # noqa: PLC0415 (takes seconds, and only the trainer's Python has it)
    from accelerate.data_loader import DataLoaderShard  # noqa: PLC0415
    from accelerate.tracking import TensorBoardTracker  # noqa: PLC0415

    made, printed, prepared = Accelerator.__init__, Accelerator.print, Accelerator.prepare
    saved = Accelerator.save_state
    skipped, registered = Accelerator.skip_first_batches, Accelerator.register_load_state_pre_hook
    logged, iterated = TensorBoardTracker.log, DataLoaderShard.__iter__

    def make(self: Any, *arguments: Any, **named: Any) -> None:
        made(self, *arguments, **named)
        watch.accelerator = self
        self.register_save_state_pre_hook(watch.on_save)

    def tell(self: Any, *arguments: Any, **named: Any) -> None:
        printed(self, *arguments, **named)
        watch.on_print(" ".join(map(str, arguments)))

    def prepare(self: Any, *arguments: Any, **named: Any) -> Any:
        result = prepared(self, *arguments, **named)
        watch.on_prepare(result)
        return result

    def save(self: Any, output_dir: str, *arguments: Any, **named: Any) -> Any:
        result = saved(self, output_dir, *arguments, **named)
        watch.on_saved(output_dir)
        return result

    def register(self: Any, hook: Any) -> Any:
        def load(models: list[Any], folder: str) -> None:
            hook(models, folder)
            watch.on_load(hook, folder)

        return registered(self, load)

    def skip(self: Any, loader: Any, num_batches: int = 0) -> Any:
        if not watch.resumed:  # initial_step without a state
            return skipped(self, loader, num_batches)
        return watch.on_skip(loader, lambda batches: skipped(self, loader, batches))

    def iterate(self: Any) -> Iterator[Any]:
        return watch.on_iterate(self, iterated(self))

    def log(self: Any, values: Any, step: Any = None, **named: Any) -> None:
        values = watch.mend(values)
        logged(self, values, step, **named)
        watch.on_log(values, step, self.writer)

    Accelerator.__init__, Accelerator.print, Accelerator.prepare = make, tell, prepare
    Accelerator.skip_first_batches, Accelerator.register_load_state_pre_hook = skip, register
    Accelerator.save_state = save
    DataLoaderShard.__iter__ = iterate
    TensorBoardTracker.log = log
    TensorBoardTracker.store_init_configuration = lambda *_: None


def main() -> None:
    """Run the script that the first argument names with the arguments after it."""
    script, *arguments = sys.argv[1:]
    path = next(argument.partition("=")[2] for argument in arguments if argument.startswith("--config_file="))
    values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    watch = Watch(values)
    signal.signal(signal.SIGTERM, watch.on_signal)
    if sys.platform == "linux":  # whoever started this process may be killed: stop then, as when asked to
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    hook(watch)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))  # as if Python had started the script itself
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
