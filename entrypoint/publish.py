"""What goes where: the results in SageMaker's folders, and in S3 or a path where the job asks for it."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from entrypoint.console import SECRET_OPTIONS, redact, say
from entrypoint.failures import JobError
from entrypoint.inputs import PLACED
from entrypoint.record import Job, Prepared
from entrypoint.request import JobRequest, Location
from entrypoint.storage import Storage
from kohya import config


def results(job: Job, storage: Storage) -> None:
    """LoRAs, states, the merged configuration, samples and event logs, each where its reader expects it.

    A job that ended before it was prepared has none of them, but perhaps captions.
    """
    faults: list[str] = []
    if job.prepared is not None and job.request is not None:
        _training(job, job.prepared, job.request, storage, faults)
    if job.captions and job.request is not None:
        _captions(job, job.request, storage, faults)
    if faults:
        raise JobError(" ".join(faults))


def _captions(job: Job, request: JobRequest, storage: Storage, faults: list[str]) -> None:
    """What the tagger has written, to be corrected."""
    written = {f"captions/{name}": path for name, path in job.captions.items()}
    with _noted(faults):
        place(written, job.tree.data)
        say(f"publish: the captions are kept in {job.tree.data / 'captions'}, where they can be corrected")
    with _noted(faults):
        if request.output is not None and not request.flat:
            send(written, request.output, storage)


def _training(job: Job, prepared: Prepared, request: JobRequest, storage: Storage, faults: list[str]) -> None:
    """The configuration is written so that the job can be run again from it: without the job's own paths,
    and without secrets.
    """
    values = {**prepared.plan.merged.values, "output_name": prepared.output_name}
    not_again = config.OWNED | PLACED | SECRET_OPTIONS | {"resume", "skip_until_initial_step"}
    again = {name: value for name, value in values.items() if name not in not_again}
    kept = job.work / f"{prepared.output_name}.toml"
    loras = {lora.path.name: lora.path for lora in job.loras}
    with _noted(faults):
        place(loras, job.tree.model)
    with _noted(faults):
        if request.output is not None:
            send(loras, request.output, storage)
    with _noted(faults):
        for state in prepared.output.glob("*-state"):
            shutil.copytree(state, job.tree.checkpoints / state.name, dirs_exist_ok=True)
    with _noted(faults):
        kept.write_text(redact(config.dump(again)), encoding="utf-8")
        place({kept.name: kept}, job.tree.model)
        if request.output is not None and not request.flat:
            send({kept.name: kept}, request.output, storage)
    samples = {f"sample/{path.name}": path for path in sorted((prepared.output / "sample").glob("*"))}
    with _noted(faults):
        place(samples, job.tree.data)
    with _noted(faults):
        if request.output is not None and not request.flat:
            send(samples, request.output, storage)
    with _noted(faults):
        if request.logs is not None:
            send(event_logs(job.tree.tensorboard, job.started, flat=request.flat), request.logs, storage)


@contextmanager
def _noted(faults: list[str]) -> Iterator[None]:
    """Go on after a fault: what cannot be put in one place is still put in the others."""
    try:
        yield
    except (JobError, OSError) as fault:
        faults.append(f"{str(fault).rstrip('.')}.")


def record(job: Job, exit_code: int, cause: str, storage: Storage) -> None:
    """job.json, the last of all, beside the LoRA."""
    file = job.work / "job.json"
    told = json.dumps(job.as_json(exit_code, cause), indent=2, ensure_ascii=False)
    file.write_text(redact(told) + "\n", encoding="utf-8", errors="backslashreplace")
    place({file.name: file}, job.tree.model)
    if job.request is not None and job.request.output is not None and not job.request.flat:
        send({file.name: file}, job.request.output, storage)


def place(files: Mapping[str, Path], folder: Path) -> None:
    """Copy files into `folder` under the given names, each whole before it has its name."""
    for name, source in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        shutil.copyfile(source, part)
        part.replace(target)


def send(files: Mapping[str, Path], location: Location, storage: Storage) -> None:
    """Copy files under the given names to a folder or an S3 prefix. Nothing there is ever deleted."""
    if isinstance(location, Path):
        place(files, location)
    elif files:
        storage.upload({source: location / name for name, source in files.items()})


def event_logs(folder: Path, since: float, *, flat: bool) -> dict[str, Path]:
    """The event logs under `folder` written since a time (seconds of the epoch), by the name to publish.

    `flat`: ESD's page reads one file a job, and no folders. accelerate writes a second file, of the
    hyperparameters, in a folder below the first one; the loss is in the first one.
    """
    found = [path for path in sorted(folder.rglob("events.out.tfevents.*")) if path.stat().st_mtime >= since]
    if flat:
        return {path.name: path for path in found if path.parent.name == "network_train"}
    return {path.relative_to(folder).as_posix(): path for path in found}
