"""Keeps what a trainer leaves in its folders, while it goes on: LoRAs, states, the event log.

Only what is whole leaves those folders, and only LoRAs that work. What is kept lies in SageMaker's folders,
and goes from there to where the job asks for it.
"""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from entrypoint import contract
from entrypoint.checkpoint import Lora
from entrypoint.console import say, warn
from entrypoint.event_log import EventLog
from entrypoint.failures import BadLora
from entrypoint.outbox import Batch, Outbox, whole
from entrypoint.record import Job, Prepared
from entrypoint.request import Location
from entrypoint.states import FINISHED, LORAS, MANIFEST, PLACES, Shelf
from kohya.states import STEP

SWEEP_SECONDS = 1.0
PAUSE_SECONDS = 30.0  # after a fault, before the same is tried again
LOG_SECONDS = 30.0  # between two times that the event log is sent


class Keeper:
    """One run's. `verify` raises BadLora for a LoRA that does not work."""

    def __init__(
        self, job: Job, prepared: Prepared, outbox: Outbox, verify: Callable[[Path, Prepared], Lora]
    ) -> None:
        self._tree, self._prepared, self._outbox, self._verify = job.tree, prepared, outbox, verify
        plan, taken = prepared.plan, prepared.taken
        self._flat, self._output = plan.request.flat, plan.request.output
        self._logs = _elsewhere(plan.request.logs, job.tree.tensorboard)
        self._checkpoints = _elsewhere(plan.request.checkpoints, job.tree.checkpoints)
        name = contract.job_name()  # an attempt that left no state is written over by the next one
        self._log = EventLog(
            prepared.logs,
            job.tree.tensorboard,
            taken.before if taken else None,
            f"{name}/events.out.tfevents.{name}" if name else None,
        )
        self._shelf = Shelf(job.tree.checkpoints, plan.run, taken)
        self._scratch = job.work / "kept"
        self._scratch.mkdir()
        self._lock = threading.Lock()  # after a stop the last sweep may begin before the thread has ended
        self._looked: dict[Path, object] = {}  # how a file or folder was in the last sweep
        self._dealt: dict[Path, object] = {}  # and how it was when it was dealt with
        self._loras: dict[str, Lora] = {}  # verified copies, by name
        self._states: dict[str, None] = {}  # names of those that are kept, the newest last
        self._taken: tuple[Path, list[Path]] | None = None  # a state, and the LoRAs that there were with it
        self._sending: set[str] = set()  # states that were begun to be sent
        self._far = {state.name: state for state in plan.states if state.place == self._checkpoints}
        whole = [taken.name] if taken and taken.place == self._checkpoints else self._far
        self._whole = next((name for name in whole if name in PLACES), None)  # below checkpoint_uri
        self._target: str | None = None  # the place there that the newest state was begun to be sent to
        self._logged = -LOG_SECONDS
        self._paused: dict[str, float] = {}  # what failed, and until when it is not tried again
        self._told: set[str] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Sweep while the trainer runs, in a thread of its own: no step waits for it."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(SWEEP_SECONDS):
                self.sweep()
                with self._lock, self._tried("what is kept", "sent", ended=False):
                    if not ended.is_set() and not self._outbox.busy:
                        self._outbox.begin([*self._due()])

        thread = threading.Thread(target=watch, daemon=True)
        try:
            thread.start()
            yield
        finally:
            ended.set()
            thread.join()

    def sweep(self, *, ended: bool = False) -> None:
        """Keep what has become whole since the last time. `ended`: nobody writes any more."""
        with self._lock:
            for name, keep in (
                ("the event log", self._keep_log),
                ("a LoRA", self._keep_loras),
                ("a state", self._keep_states),
            ):
                if ended or time.monotonic() >= self._paused.get(name, 0):
                    with self._tried(name, "kept", ended=ended):
                        keep(ended)

    def verified(self, path: Path) -> Lora | None:
        """What is known of a LoRA in the trainer's folder, if it was verified as it is now."""
        lora = self._loras.get(path.name)
        return replace(lora, path=path) if lora and self._dealt.get(path) == _look(path) else None

    def left(self) -> Iterator[Batch]:
        """What is still to be sent after a trainer has ended before its time, besides LoRAs."""
        yield from self._states_due()
        yield from self.log()

    @property
    def event_log(self) -> Path:
        """Where the event log is, with what was logged before a break. There may be nothing yet."""
        return self._log.file

    def log(self) -> Iterator[Batch]:
        """The event log."""
        if self._logs is None or not self._log.file.is_file():
            return
        copy = self._scratch / "event_log"  # of a file that grows: nothing is sent that is cut off
        with whole(copy) as part:
            shutil.copyfile(self._log.file, part)
        # ESD's page reads one file a job, and no folders; one that goes on has the name that it had before.
        flat = f"events.out.tfevents.{self._prepared.output_name}"
        yield {flat if self._flat else str(self._log.name): copy}, self._logs

    def finish(self) -> Iterator[Batch]:
        """The job is done, and nothing is to go on from its states: mark them so; what is to be sent."""
        marked = self._shelf.finish()
        if self._checkpoints is None:
            return
        asked = {name: state.manifest for name, state in self._far.items() if name not in PLACES}
        for name, manifest in asked.items():  # of an earlier attempt, on another machine
            marked = self._mark(name, manifest.model_dump() | FINISHED) | marked
        for name in PLACES:
            marked |= self._mark(name)
        yield marked, self._checkpoints

    def _due(self) -> Iterator[Batch]:
        if time.monotonic() - self._logged >= LOG_SECONDS:
            self._logged = time.monotonic()
            yield from self.log()
        if self._output is not None:
            yield {name: lora.path for name, lora in self._loras.items()}, self._output
        yield from self._states_due()

    def _states_due(self) -> Iterator[Batch]:
        """The newest state, and those that were asked for: each with its manifest last.

        The newest goes to the place of the two that does not hold a whole one.
        """
        self._sending.clear()
        if self._checkpoints is None:
            return
        if self._target is not None:
            mark, name = self._mark(self._target), f"{self._target}/{MANIFEST}"
            if self._outbox.has_any(name, self._checkpoints) and not self._outbox.has(
                mark, self._checkpoints
            ):
                self._whole = self._target  # its manifest has followed the mark
        newest = [name for name in self._states if name in PLACES][-1:]
        for name in newest:
            if self._target is None or not self._is_there(name, self._target, self._checkpoints):
                self._target = PLACES[self._whole == PLACES[0]]
                yield from self._state(name, self._target, self._checkpoints)
        for name in self._states.keys() - {*PLACES}:
            if not self._is_there(name, name, self._checkpoints):
                yield from self._state(name, name, self._checkpoints)

    def _is_there(self, name: str, place: str, location: Location) -> bool:
        return self._outbox.has({f"{place}/{MANIFEST}": self._shelf.folder / name / MANIFEST}, location)

    def _state(self, name: str, there: str, location: Location) -> Iterator[Batch]:
        folder = self._shelf.folder / name
        self._sending.add(name)
        yield self._mark(there), location
        paths = {f"{LORAS}/{lora}": self._shelf.folder / LORAS / lora for lora in self._loras}
        for path in folder.rglob("*"):
            if path.is_file() and path.name != MANIFEST:
                paths[f"{there}/{path.relative_to(folder).as_posix()}"] = path
        yield paths, location
        yield {f"{there}/{MANIFEST}": folder / MANIFEST}, location

    def _mark(self, name: str, manifest: Mapping[str, Any] = FINISHED) -> dict[str, Path]:
        """A manifest that takes the place of a state's: while its files are replaced, or for ever."""
        file = self._scratch / f"{name}.json"
        if not file.exists():
            file.write_text(json.dumps(manifest), encoding="utf-8")
        return {f"{name}/{MANIFEST}": file}

    def _keep_log(self, _ended: bool) -> None:
        self._log.grow()

    def _keep_states(self, ended: bool) -> None:
        """The newest state that was saved unasked, and those that were asked for."""
        self._keep_taken(ended)
        for state in sorted(self._prepared.states.glob("*-state"))[-1:]:
            if self._taken is None:
                mine = self._scratch / state.name
                state.rename(mine)  # the trainer removes it as soon as the next one is whole
                self._taken = mine, [*self._prepared.output.glob("*.safetensors")]
                self._keep_taken(ended)
        there = {path.name: path for path in sorted(self._prepared.output.glob("*-state"))}
        for name, state in there.items():
            # while it is being written: the random numbers come last
            if (state / STEP).exists() and [*state.glob("random_states*")] and self._is_steady(state, ended):
                self._keep(state, name)
                self._dealt[state] = self._looked[state]
        for name in self._states.keys() - {*PLACES} - there.keys():  # save_last_n_epochs_state and the like
            if name not in self._busy:
                shutil.rmtree(self._shelf.folder / name)
                del self._states[name]

    def _keep_taken(self, ended: bool) -> None:
        """Keep the state that was taken from the trainer, after the LoRAs that it made before.

        A job that goes on from it does not make them again.
        """
        if self._taken is None:
            return
        state, before = self._taken
        if ended or all(self._is_dealt_with(lora) or not lora.exists() for lora in before):
            self._taken = None
            try:
                self._keep(state, None)
            finally:
                shutil.rmtree(state)

    @property
    def _busy(self) -> set[str]:
        return self._sending if self._outbox.busy else set()

    def _keep(self, state: Path, name: str | None) -> None:
        with suppress(OSError):
            self._log.grow()  # up to what the state says of it
        place = self._shelf.keep(state, self._log, name=name, busy=self._busy)
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
            try:
                with whole(copy) as part:  # one that is being sent under this name stays as it is
                    shutil.copy2(path, part)
                    lora = self._verify(part, self._prepared)
            except BadLora:  # it is still being written, or the job will tell of it at its end
                pass
            else:
                self._outbox.send({name: copy}, self._tree.model)
                self._shelf.keep_lora(copy, name)
                self._loras[name] = replace(lora, path=copy)
            self._dealt[path] = self._looked[path]
        for name in self._loras.keys() - there.keys():  # save_last_n_epochs and the like
            (self._tree.model / name).unlink(missing_ok=True)
            self._shelf.forget_lora(name)
            self._loras.pop(name).path.unlink()

    def _is_steady(self, path: Path, ended: bool) -> bool:
        """Whether a file or folder is as in the last sweep, and was not dealt with since it became so."""
        now = _look(path)
        before, self._looked[path] = self._looked.get(path), now
        return (ended or before == now) and self._dealt.get(path) != now

    def _is_dealt_with(self, path: Path) -> bool:
        return path in self._dealt and self._dealt[path] == self._looked[path]

    @contextmanager
    def _tried(self, what: str, done: str, *, ended: bool) -> Iterator[None]:
        """After a fault go on with everything else: what is kept is worth more than to know why."""
        try:
            yield
        except Exception as fault:
            self._paused[what] = time.monotonic() + PAUSE_SECONDS
            told = f"{what} could not be {done}{'' if ended else ' for now'}: {fault}"
            if told not in self._told:
                warn(told)
            self._told.add(told)


def _elsewhere(location: Location | None, own: Path) -> Location | None:
    """A place that is not the job's own folder: what lies there is there already."""
    return None if isinstance(location, Path) and location.resolve() == own.resolve() else location


def _look(path: Path) -> object:
    """How a file or folder looks from outside."""
    inside = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [(one, one.stat().st_size, one.stat().st_mtime_ns) for one in inside]
