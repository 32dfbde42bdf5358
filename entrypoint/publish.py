"""What goes where: the results in SageMaker's folders, and in S3 or a path where the job asks for it."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from entrypoint.console import SECRET_OPTIONS, redact, say
from entrypoint.failures import JobError
from entrypoint.inputs import PLACED
from entrypoint.outbox import Batch, Outbox
from entrypoint.record import Job
from entrypoint.request import JobRequest, Location
from kohya import config


def results(job: Job, outbox: Outbox, more: Iterable[Batch] = ()) -> None:
    """LoRAs, the merged configuration, samples and `more`, each where its reader expects it.

    What is there already stays as it is. A job that ended before it was prepared has none of them, but
    perhaps captions. Everything is tried; raises JobError with all that could not be published.
    """
    if job.request is None:
        return
    faults: list[str] = []
    request = job.request
    for batches in (_loras(job, request), more, _results(job, request), _captions(job, request)):
        failed: set[Location] = set()
        with _noted(faults):
            for files, location in batches:
                if location not in failed:  # no manifest without its state
                    failed.add(location)
                    with _noted(faults):
                        outbox.send(files, location)
                        failed.remove(location)
    if faults:
        raise JobError(" ".join(dict.fromkeys(faults)))


def _captions(job: Job, request: JobRequest) -> Iterator[Batch]:
    """What the tagger has written, to be corrected."""
    if not job.captions:
        return
    written = {f"captions/{name}": path for name, path in job.captions.items()}
    say(f"publish: the captions are kept in {job.tree.data / 'captions'}, where they can be corrected")
    yield written, job.tree.data
    if request.output is not None and not request.flat:
        yield written, request.output


def _loras(job: Job, request: JobRequest) -> Iterator[Batch]:
    loras = {lora.path.name: lora.path for lora in job.loras}
    yield loras, job.tree.model
    if request.output is not None:
        yield loras, request.output


def _results(job: Job, request: JobRequest) -> Iterator[Batch]:
    """The configuration is written so that the job can be run again from it: without the job's own paths,
    and without secrets.
    """
    if job.prepared is None:
        return
    prepared = job.prepared
    values = {**prepared.plan.merged.values, "output_name": prepared.output_name}
    not_again = config.OWNED | PLACED | SECRET_OPTIONS | {"resume", "skip_until_initial_step"}
    again = {name: value for name, value in values.items() if name not in not_again}
    samples = {f"sample/{path.name}": path for path in sorted((prepared.output / "sample").glob("*"))}
    yield samples, job.tree.data
    if request.output is not None and not request.flat:
        yield samples, request.output
    kept = job.work / f"{prepared.output_name}.toml"
    kept.write_text(redact(config.dump(again)), encoding="utf-8")
    yield {kept.name: kept}, job.tree.model
    if request.output is not None and not request.flat:
        yield {kept.name: kept}, request.output


@contextmanager
def _noted(faults: list[str]) -> Iterator[None]:
    """Go on after a fault: what cannot be put in one place is still put in the others."""
    try:
        yield
    except (JobError, OSError) as fault:
        faults.append(f"{str(fault).rstrip('.')}.")


def record(job: Job, exit_code: int, cause: str, outbox: Outbox) -> None:
    """job.json, beside the LoRA, when all results are there."""
    file = job.work / "job.json"
    told = json.dumps(job.as_json(exit_code, cause), indent=2, ensure_ascii=False)
    file.write_text(redact(told) + "\n", encoding="utf-8", errors="backslashreplace")
    outbox.send({file.name: file}, job.tree.model)
    if job.request is not None and job.request.output is not None and not job.request.flat:
        outbox.send({file.name: file}, job.request.output)
