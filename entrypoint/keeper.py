"""Keeps what a trainer leaves in its folders, while it goes on: LoRAs, states, the event log.

Only what is whole leaves those folders, and only LoRAs that work. What is kept lies in SageMaker's folders,
and goes from there to where the job asks for it.
"""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from entrypoint.checkpoint import Lora
from entrypoint.console import say, warn
from entrypoint.event_log import EventLog
from entrypoint.failures import BadLora
from entrypoint.outbox import Batch, Outbox
from entrypoint.record import Job, Prepared
from entrypoint.states import FINISHED, LORAS, MANIFEST, PLACES, Shelf
from kohya.states import STEP

SWEEP_SECONDS = 1.0
LOG_SECONDS = 30.0  # between two times that the event log is sent


class Keeper:
    """One run's. `verify` raises BadLora for a LoRA that does not work."""

    def __init__(
        self, job: Job, prepared: Prepared, outbox: Outbox, verify: Callable[[Path, Prepared], Lora]
    ) -> None:
        self._tree, self._prepared, self._outbox, self._verify = job.tree, prepared, outbox, verify
        self._request, taken = prepared.plan.request, prepared.taken
        self._log = EventLog(prepared.logs, job.tree.tensorboard, taken.before if taken else None)
        self._shelf = Shelf(job.tree.checkpoints, prepared.plan.run, taken)
        self._scratch = job.work / "kept"
        self._scratch.mkdir()
        self._looked: dict[Path, object] = {}  # how a file or folder was in the last sweep
        self._dealt: dict[Path, object] = {}  # and how it was when it was dealt with
        self._loras: dict[str, Path] = {}  # verified copies, by name
        self._states: dict[str, None] = {}  # names of those that are kept, the newest last
        self._taken: tuple[Path, list[Path]] | None = None  # a state, and the LoRAs that there were with it
        self._sending: str | None = None  # the state that was begun to be sent
        self._logged = -LOG_SECONDS
        self._told: set[str] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Sweep while the trainer runs, in a thread of its own: no step waits for it."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(SWEEP_SECONDS):
                self.sweep()
                if not self._outbox.busy:
                    self._outbox.begin([*self._due()])

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def sweep(self, *, ended: bool = False) -> None:
        """Keep what has become whole since the last time. `ended`: nobody writes any more."""
        for keep in (self._keep_log, self._keep_loras, self._keep_states):
            try:
                keep(ended)
            except (OSError, ValueError, KeyError) as fault:
                told = f"it cannot be kept, and is tried again: {fault}"
                if told not in self._told:
                    warn(told)
                self._told.add(told)

    def left(self) -> Iterator[Batch]:
        """What is still to be sent after the trainer has ended and the LoRAs are sent."""
        yield from self._log_due()
        yield from self._states_due()

    def finish(self) -> Iterator[Batch]:
        """The job is done, and nothing is to go on from its states: mark them so; what is to be sent."""
        marked = self._shelf.finish()
        if self._request.checkpoints is not None:  # an earlier attempt may have left both there
            yield {**self._replaced(*PLACES), **marked}, self._request.checkpoints

    def _due(self) -> Iterator[Batch]:
        if self._request.output is not None:
            yield self._loras, self._request.output
        if time.monotonic() - self._logged >= LOG_SECONDS:
            self._logged = time.monotonic()
            yield from self._log_due()
        yield from self._states_due()

    def _log_due(self) -> Iterator[Batch]:
        if self._request.logs is None or not self._log.file.is_file():
            return
        copy = self._scratch / "event_log"  # of a file that grows: nothing is sent that is cut off
        shutil.copyfile(self._log.file, copy)
        # ESD's page reads one file a job, and no folders; one that goes on has the name that it had before.
        flat = f"events.out.tfevents.{self._prepared.output_name}"
        yield {flat if self._request.flat else str(self._log.name): copy}, self._request.logs

    def _states_due(self) -> Iterator[Batch]:
        """The newest state, and those that were asked for: each with its manifest last."""
        location = self._request.checkpoints
        if location is None:
            return
        newest = [name for name in self._states if name in PLACES][-1:]
        for name in [*newest, *(name for name in self._states if name not in PLACES)]:
            folder = self._shelf.folder / name
            manifest = {f"{name}/{MANIFEST}": folder / MANIFEST}
            if self._outbox.has(manifest, location):
                continue
            self._sending = name
            yield self._replaced(name), location
            paths = {f"{LORAS}/{lora}": self._shelf.folder / LORAS / lora for lora in self._loras}
            for path in folder.rglob("*"):
                if path.is_file() and path.name != MANIFEST:
                    paths[f"{name}/{path.relative_to(folder).as_posix()}"] = path
            yield paths, location
            yield manifest, location

    def _replaced(self, *names: str) -> dict[str, Path]:
        """Manifests that take the place of these states', from which then nothing goes on."""
        files = {f"{name}/{MANIFEST}": self._scratch / f"{name}.json" for name in names}
        for file in files.values():
            file.write_text(json.dumps(FINISHED), encoding="utf-8")
        return files

    def _keep_log(self, _ended: bool) -> None:
        self._log.grow()

    def _keep_states(self, ended: bool) -> None:
        """The newest state that was saved unasked, and those that were asked for."""
        self._keep_taken(ended)
        for state in sorted(self._prepared.states.glob("*-state"))[-1:]:
            mine = self._scratch / state.name
            if self._taken is None:
                state.rename(mine)  # the trainer removes it as soon as the next one is whole
                self._taken = mine, [*self._prepared.output.glob("*.safetensors")]
                self._keep_taken(ended)
        for state in sorted(self._prepared.output.glob("*-state")):
            # while it is being written: the random numbers come last
            if (state / STEP).exists() and [*state.glob("random_states*")] and self._is_steady(state, ended):
                self._keep(state, state.name)
                self._dealt[state] = self._looked[state]

    def _keep_taken(self, ended: bool) -> None:
        """Keep the state that was taken from the trainer, after the LoRAs that it made before.

        A job that goes on from it does not make them again.
        """
        if self._taken is None:
            return
        state, before = self._taken
        if ended or all(self._looked.get(lora) == self._dealt.get(lora) for lora in before):
            self._taken = None
            try:
                self._keep(state, None)
            finally:
                shutil.rmtree(state)

    def _keep(self, state: Path, name: str | None) -> None:
        self._log.grow()  # up to what the state says of it
        busy = self._sending if self._outbox.busy else None
        place = self._shelf.keep(state, self._log, name=name, busy=busy)
        say(f"train: the state after step {self._shelf.step} is kept in {self._shelf.folder / place}")
        self._states.pop(place, None)
        self._states[place] = None

    def _keep_loras(self, ended: bool) -> None:
        """Every LoRA that the user asked for: a copy that nobody writes to, once that is verified."""
        there = {path.name: path for path in sorted(self._prepared.output.glob("*.safetensors"))}
        for name, path in there.items():
            if not self._is_steady(path, ended):
                continue
            copy = self._scratch / name
            shutil.copy2(path, copy)
            try:
                self._verify(copy, self._prepared)
            except BadLora:  # it is still being written, or the job will tell of it at its end
                copy.unlink()
            else:
                self._outbox.send({name: copy}, self._tree.model)
                self._shelf.keep_lora(copy, name)
                self._loras[name] = copy
            self._dealt[path] = self._looked[path]
        for name in self._loras.keys() - there.keys():  # save_last_n_epochs and the like
            (self._tree.model / name).unlink(missing_ok=True)
            self._loras.pop(name).unlink()

    def _is_steady(self, path: Path, ended: bool) -> bool:
        """Whether a file or folder is as in the last sweep, and was not dealt with since it became so."""
        now = _look(path)
        before, self._looked[path] = self._looked.get(path), now
        return (ended or before == now) and self._dealt.get(path) != now


def _look(path: Path) -> object:
    """How a file or folder looks from outside."""
    inside = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [(one, one.stat().st_size, one.stat().st_mtime_ns) for one in inside]
