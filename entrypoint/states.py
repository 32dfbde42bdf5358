"""Where states live, and which one a job goes on from.

A state is a folder that a trainer resumes from. The newest lies in one of two places, state-a and state-b, in
/opt/ml/checkpoints and below checkpoint_uri; the next one takes the other place, so that one is always whole
and no more than two take room. States that were asked for (save_state) lie beside them under their own names,
and in loras/ the LoRAs that were finished by then.

    state-a/state.json      the manifest, written last; without it there is no state
    state-a/event_log       what was logged by the state's step
    state-a/…               the trainer's files

A state is taken when each of its files has the checksum that its manifest states, and when what was to be
learned is the same: base model, data set, and all options but those that change speed or what is written.
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from entrypoint import files
from entrypoint.console import SECRET_OPTIONS, say, warn
from entrypoint.dataset import DataSet
from entrypoint.event_log import Before, EventLog
from entrypoint.failures import Outage, Problem, StorageError, collecting
from entrypoint.files import File, Single
from entrypoint.inputs import PLACED
from entrypoint.model import ModelFile
from entrypoint.outbox import whole
from entrypoint.request import JobRequest, Location, Source
from entrypoint.storage import RemoteObject, Storage, unsafe
from kohya import config
from kohya.states import LOGGED, NOT_LEARNED, STEP

MANIFEST = "state.json"
LORAS = "loras"
PLACES = ("state-a", "state-b")
FINISHED = {"finished": True}  # in the manifest of a state that nothing is to go on from
_LOG = "event_log"
_CHUNK = 4 << 20
_SHOWN = 5  # differences in one sentence


class _Fact(BaseModel):
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What is said of a state, in the folder that holds it."""

    format: Literal[1] = 1
    step: int  # optimizer steps that are done
    run: dict[str, Any]  # what was to be learned
    event_log: str | None  # the event log's name below its folder
    files: dict[str, _Fact]
    loras: dict[str, _Fact]


@dataclass(frozen=True)
class State:
    """A state that was found, and not yet read."""

    place: Location  # the folder that it lies in, beside others
    name: str
    manifest: Manifest
    there: Mapping[str, File]  # the files of `place`, by path below it


@dataclass(frozen=True)
class Taken:
    """A state that is whole, in the job's own scratch, with what belongs to it."""

    name: str
    place: Location  # where it was found
    step: int
    folder: Path
    before: Before | None
    loras: Mapping[str, Path]


def identity(
    request: JobRequest,
    kind: str,
    model: ModelFile,
    *,
    data: tuple[DataSet, Mapping[str, File]],
    reg: tuple[DataSet, Mapping[str, File]] | None,
    weights: Mapping[str, Sequence[Single]],
    values: Mapping[str, Any],
    dataset_config: Any,
    processes: int,
) -> dict[str, Any]:
    """What is to be learned, as JSON has it: of a run that goes on it must be the same.

    `processes`: how many train together. A step is a batch of each, so that a step's number means less or
    more of the data with another count.
    """
    own = {
        "base model": _told_of(model.file),
        "VAE and weights": [_told_of(one.file) for found in weights.values() for one in found],
        "data set": _listed(*data),
        "regularisation pictures": _listed(*reg) if reg else None,
        "kind": kind,
        "trainer": request.trainer,
        "output_name": values.get("output_name", "lora"),
        "resize": [request.resize, request.resize_crop],
        "caption": [request.caption.general, request.caption.character] if request.caption else None,
        "dataset_config": dataset_config,
        "GPUs that train": processes,
    }
    left_out = NOT_LEARNED | config.OWNED | PLACED | SECRET_OPTIONS | own.keys()
    learned = {name: value for name, value in values.items() if name not in left_out}
    result: dict[str, Any] = json.loads(json.dumps({**own, **learned}, default=str))
    return result


def find(
    places: Sequence[Location], run: Mapping[str, Any], storage: Storage
) -> tuple[list[State], list[Problem]]:
    """The states in these folders, the newest first; problems where that one is of another run."""
    found: list[State] = []
    problems: list[Problem] = []
    for place in places:
        with collecting(problems):
            found += _found(place, storage)
    found.sort(key=lambda state: -state.manifest.step)
    compared = [(state, list(_differences(state.manifest.run, run))) for state in found]
    for state, told in compared[:1]:
        if told:
            more = f" and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
            wrong = f"it is of another run: {'; '.join(told[:_SHOWN])}{more}"
            fix = "Ask for the same, or empty this folder, or name another (CheckpointConfig, checkpoint_uri)"
            problems.append(Problem(_where(state), wrong, fix))
    return [state for state, told in compared if not told], problems


def take(states: Sequence[State], work: Path, storage: Storage) -> Taken | None:
    """The first of these that is whole, copied below `work`; a broken one is passed over with a word."""
    for state in states:
        folder = work / f"resumed-{state.name}"
        shutil.rmtree(folder, ignore_errors=True)
        names = {f"{state.name}/{name}": name for name in state.manifest.files}
        if broken := _copy(state, names, state.manifest.files, folder, storage):
            warn(f"{_where(state)} is broken and passed over: {broken}")
            shutil.rmtree(folder, ignore_errors=True)
            continue
        loras: dict[str, Path] = {}
        for name, fact in state.manifest.loras.items():
            if lost := _copy(state, {f"{LORAS}/{name}": name}, {name: fact}, work / LORAS, storage):
                warn(f"{name}, which was finished before the break, is lost: {lost}")
            else:
                loras[name] = work / LORAS / name
        log, logged = folder / _LOG, state.manifest.event_log
        before = Before(log, logged) if logged and not unsafe(logged) and log.exists() else None
        say(f"fetch: going on after step {state.manifest.step} from {_where(state)}")
        return Taken(state.name, state.place, state.manifest.step, folder, before, loras)
    return None


class Shelf:
    """The folder that a running job keeps its states in."""

    def __init__(self, folder: Path, run: Mapping[str, Any], taken: Taken | None) -> None:
        self.folder = folder
        self._run = run
        self._last = taken.name if taken and taken.name in PLACES else PLACES[1]
        self._loras: dict[str, _Fact] = {}
        self.step = 0  # of the state that was kept last

    def keep_lora(self, lora: Path, name: str) -> None:
        """Keep a finished LoRA: a job that goes on elsewhere must not lose it. Raises OSError."""
        with whole(self.folder / LORAS / name) as part:
            fact = _copied(lora, part)
        self._loras[name] = fact

    def forget_lora(self, name: str) -> None:
        """A LoRA that the trainer has removed: states that follow do without it."""
        self._loras.pop(name, None)

    def keep(self, state: Path, log: EventLog, *, name: str | None = None, busy: Container[str] = ()) -> str:
        """Copy a state beside its place and rename it into it; returns the place's name. Raises OSError.

        `name`: of one that was asked for. `busy`: places that are not to be touched. Where there is no room
        beside it, the older state makes room first.
        """
        other = PLACES[self._last == PLACES[0]]
        place = name or (self._last if other in busy else other)
        try:
            self._put(state, log, place)
        except OSError:
            if place == self._last or not (self.folder / place).exists():
                raise
            shutil.rmtree(self.folder / place)
            self._put(state, log, place)
        if name is None:
            self._last = place
        return place

    def _put(self, state: Path, log: EventLog, place: str) -> None:
        partial, old = self.folder / f".{place}.partial", self.folder / f".{place}.old"
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)
        try:
            facts = {}
            for path in sorted(path for path in state.rglob("*") if path.is_file()):
                relative = path.relative_to(state).as_posix()
                facts[relative] = _copied(path, partial / relative)
            length = _read(state / LOGGED).get("bytes")
            if length is not None and log.name is not None:
                log.until(length, partial / _LOG)
                facts[_LOG] = _fact(partial / _LOG)
            step, run = _read(state / STEP)["current_step"], dict(self._run)
            manifest = Manifest(step=step, run=run, event_log=log.name, files=facts, loras=self._loras)
            (partial / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
            if (self.folder / place).exists():
                (self.folder / place).rename(old)
            partial.rename(self.folder / place)
        finally:
            for left in (partial, old):
                shutil.rmtree(left, ignore_errors=True)
        self.step = step

    def finish(self) -> dict[str, Path]:
        """The job is done, and nothing goes on from here: its states are marked so, and give their room back.

        Those that were asked for keep their files. Returns the manifests by their paths below the folder.
        Nothing that is copied from here meanwhile is lost by it: LoRAs lie in the model folder by now.
        """
        marked = {}
        for file in sorted(self.folder.glob(f"*/{MANIFEST}")):
            place = file.parent
            with whole(file) as part:
                part.write_text(json.dumps(_read(file) | FINISHED), encoding="utf-8")
            marked[f"{place.name}/{MANIFEST}"] = file
            for path in place.iterdir() if place.name in PLACES else ():
                if path != file:
                    path.unlink() if path.is_file() else shutil.rmtree(path)
        shutil.rmtree(self.folder / LORAS, ignore_errors=True)
        return marked


def _found(place: Location, storage: Storage) -> Iterator[State]:
    """The states in one folder. Raises StorageError."""
    if isinstance(place, Path) and not place.is_dir():
        return
    there = files.listing(Source(place, "states"), storage)
    for path, file in there.items():
        name, _, rest = path.partition("/")
        if rest != MANIFEST or name.startswith("."):
            continue
        try:
            content = _manifest(file, storage)
            if not content.get("finished"):
                yield State(place, name, Manifest.model_validate(content), there)
        except (OSError, ValueError, ValidationError, AttributeError) as error:
            warn(f"{files.name_of(file)} cannot be read, and its state is passed over: {error}")


def _manifest(file: File, storage: Storage) -> dict[str, Any]:
    """A manifest's content. Fetched where it is in S3: a range that is read alone has no checksum."""
    with TemporaryDirectory() as folder:
        if isinstance(file, RemoteObject):
            storage.fetch({MANIFEST: file}, Path(folder), what="check: manifest")
            file = Path(folder, MANIFEST)
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            yield f"{name} was {_shown(before.get(name))} and is {_shown(now.get(name))}"


def _shown(value: Any) -> str:
    text = "not set" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _told_of(file: File) -> str:
    """A file in a few words: of another one with the same name and size S3 has another ETag."""
    etag = f", {file.etag}" if isinstance(file, RemoteObject) else ""
    return f"{files.name_of(file).rpartition('/')[2]}, {files.size(file)} bytes{etag}"


def _listed(data_set: DataSet, there: Mapping[str, File]) -> str:
    """A data set in a few words: pictures and captions by their names and sizes."""
    digest = hashlib.sha256()
    for subset in data_set.subsets:
        digest.update(f"{subset.repeats}/{subset.folder}\0".encode(errors="surrogateescape"))
    for name, file in there.items():
        digest.update(f"{name}\0{files.size(file)}\0".encode(errors="surrogateescape"))
    return f"{data_set.pictures} pictures, {digest.hexdigest()[:12]}"


def _copy(
    state: State, names: Mapping[str, str], facts: Mapping[str, _Fact], folder: Path, storage: Storage
) -> str | None:
    """Copy files by their paths below the state's place to names below `folder`; what is wrong with one.

    Raises OSError and StorageError where the disk is full or S3 is away, and nothing is wrong with the state.
    """
    there = {name: state.there.get(path) for path, name in names.items()}
    for name, file in there.items():
        if file is None or unsafe(name):
            return f"{name} is missing"
    try:
        remote = {name: file for name, file in there.items() if isinstance(file, RemoteObject)}
        if remote:
            storage.fetch(remote, folder, what="fetch: state")
        for name, file in there.items():
            found = _copied(file, folder / name) if isinstance(file, Path) else _fact(folder / name)
            if found != facts[name]:
                return f"{name} is not what was written"
    except (OSError, StorageError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or (isinstance(error, StorageError) and isinstance(error.problem, Outage)):
            raise  # nothing is wrong with the state: the next attempt takes it
        return str(error)
    return None


def _copied(source: Path, target: Path) -> _Fact:
    """Copy a file, and tell what was copied."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with source.open("rb") as before, target.open("wb") as after:
        while chunk := before.read(_CHUNK):
            digest.update(chunk)
            after.write(chunk)
        return _Fact(bytes=after.tell(), sha256=digest.hexdigest())


def _fact(file: Path) -> _Fact:
    with file.open("rb") as source:
        return _Fact(bytes=file.stat().st_size, sha256=hashlib.file_digest(source, "sha256").hexdigest())


def _read(file: Path) -> dict[str, Any]:
    """A JSON object that this job has written; empty where there is none."""
    if not file.exists():
        return {}
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def _where(state: State) -> str:
    return f"{str(state.place).rstrip('/')}/{state.name}"
