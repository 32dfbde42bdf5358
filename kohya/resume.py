"""Going on from a state in sd-scripts, exactly: the step that follows is the one that was not made.

sd-scripts v0.10.1 restores weights, optimizer, schedule and random numbers. What it gets wrong it gets wrong
in a few lines (train_network.py:1233-1273, 1338-1346, 1403-1407): it takes optimizer steps for batches, its
count starts again from the remainder, the first epoch that it runs is one too late after a boundary, and the
pictures come in another order. It is mended from outside, through accelerate:

- the number that its load hook reads from train_state.json becomes a `Done`, with which those lines come out
  right;
- `Accelerator.skip_first_batches`, which it calls for the epoch that was broken off, gives that epoch's
  remaining batches in that epoch's order. The order is known from the random numbers that the epoch began
  with, which each state holds in data_order.safetensors.
"""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ORDER = "data_order.safetensors"


class Done(int):
    """Optimizer steps that lie behind a resumed run, as `initial_step` of sd-scripts' arithmetic.

    `*= gradient_accumulation_steps` and `-= batches of an epoch` leave it as it is, so that the count goes on
    from it. `// steps of an epoch` is the epoch (from 0) in which the last of them was made: after a boundary
    too, for what follows an epoch's last step, its LoRA among it, may not have been done. `max_train_steps >`
    holds for a finished run as well, which then has no step left to make.
    """

    def __imul__(self, _accumulation: object) -> "Done":
        return self

    def __isub__(self, _batches: object) -> "Done":
        return self

    def __floordiv__(self, steps_per_epoch: int) -> int:
        return (int(self) - 1) // steps_per_epoch

    def __lt__(self, max_train_steps: int) -> bool:
        return int(self) <= max_train_steps


class DataOrder:
    """In which order an epoch's batches come: the random numbers that it began with decide.

    With several processes accelerate gives the sampler a generator of its own, which must stand in each of
    them where it stood when the state was saved.
    """

    def __init__(self) -> None:
        self._began: dict[str, Any] = {}  # generator → its state when the running epoch began
        self._sampler: Any = None  # the sampler's generator, when the state was saved

    def begin(self, loader: Any) -> None:
        """An epoch of accelerate's `loader` begins."""
        self._began = {name: generator.get_state() for name, generator in _generators(loader).items()}

    def save(self, folder: Path, loader: Any) -> None:
        """Write data_order.safetensors into a state's folder."""
        from safetensors.torch import save_file  # noqa: PLC0415 (it imports torch; the job reads this file)

        own = loader.synchronized_generator
        now = {} if own is None else {"now.sampler": own.get_state()}
        save_file({**{f"began.{name}": state for name, state in self._began.items()}, **now}, folder / ORDER)

    def load(self, folder: Path) -> bool:
        """Read it back; False where there is none, as in a state that plain sd-scripts saved."""
        from safetensors.torch import load_file  # noqa: PLC0415

        if not (folder / ORDER).exists():
            return False
        states = load_file(folder / ORDER)
        self._sampler = states.pop("now.sampler", None)
        self._began = {name.removeprefix("began."): state for name, state in states.items()}
        return True

    def rest(self, loader: Any, skipped: Any | None, epoch: int) -> Iterator[Any]:
        """What is left of `epoch` (from 1): `skipped`, which is `loader` without its first batches, in order.

        None: nothing is left. Only the order is drawn again; no other random number is. The first item is
        none of the batches: sd-scripts passes over it (train_network.py:1405-1407).
        """
        yield None
        python = random.getstate()
        # its buckets are shuffled once an epoch, with a seed of their own
        loader.dataset.set_current_epoch(epoch)
        random.setstate(python)
        generators = _generators(loader)
        after = {name: generator.get_state() for name, generator in generators.items()}
        if self._sampler is not None:
            after["sampler"] = self._sampler
        batches: Iterator[Any] = iter(())
        if skipped is not None:
            for name, generator in generators.items():
                generator.set_state(self._began.get(name, after[name]))
            batches = iter(skipped)
            batches = itertools.chain([next(batches)], batches)  # the first one draws the order
        for name, generator in generators.items():
            generator.set_state(after[name])
        yield from batches


def _generators(loader: Any) -> dict[str, Any]:
    """torch's own generator and, with several processes, the sampler's."""
    import torch  # noqa: PLC0415

    found: dict[str, Any] = {"torch": torch.default_generator}
    if loader.synchronized_generator is not None:
        found["sampler"] = loader.synchronized_generator
    return found
