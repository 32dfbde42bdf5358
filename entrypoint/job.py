"""The job: resolve → check → fetch → prepare → train → verify → publish. Nothing reaches back."""

import errno
import hashlib
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from entrypoint import (
    captions,
    dataset,
    mending,
    outbox,
    pictures,
    publish,
    report,
    resize,
    states,
    stops,
    trainer,
)
from entrypoint import model as base_model
from entrypoint.check import Plan, check, processes
from entrypoint.checkpoint import Lora, verify_lora
from entrypoint.console import fail, say, warn
from entrypoint.contract import Tree
from entrypoint.diagnosis import last_words
from entrypoint.facts import Facts, facts
from entrypoint.failures import (
    BadLora,
    JobError,
    Problem,
    Stopped,
    TrainerFailed,
    Unfit,
    collecting,
)
from entrypoint.files import File, Single, name_of
from entrypoint.keeper import Keeper
from entrypoint.outbox import Outbox
from entrypoint.record import Inputs, Job, Looked, Prepared
from entrypoint.request import Source, resolve
from entrypoint.states import Taken
from entrypoint.storage import RemoteObject, Storage
from kohya import config, networks, tokenizers
from kohya.buckets import Size
from kohya.problem import counted
from kohya.states import FOLDER, VARIABLE


def run(arguments: Sequence[str]) -> int:
    """Run a job to its end and return the exit code: 0 only if a verified LoRA exists."""
    storage = Storage()
    error: BaseException | None = None
    sent = Outbox(storage)
    keeper: Keeper | None = None
    with tempfile.TemporaryDirectory(prefix="kohya-job-", ignore_cleanup_errors=True) as work:
        job = Job(Tree.from_environment(), Path(work))
        job.tree.forget_failure()
        try:
            try:
                stops.raise_them()
                with job.stage("resolve"):
                    job.request = resolve(arguments, job.tree, storage)
                with job.stage("check"):
                    job.plan = check(job.request, job.tree, scratch(), storage)
                    _say_plan(job.plan)
                with job.stage("fetch"):
                    job.inputs = fetch(job.plan, storage)
                    job.looked = look(job.inputs)
                    taken = states.take(job.plan.states, job.work, storage)
                with job.stage("prepare"):
                    job.prepared = prepare(job.inputs, job.looked, taken, job)
                with job.stage("train"):
                    keeper = Keeper(job, job.prepared, sent, _verified)
                    with keeper.watching():
                        ended = train(job.prepared)
                with job.stage("verify"):
                    keeper.sweep(ended=True)
                    job.loras = verify(job.prepared, ended, keeper)
            finally:  # there is nothing left to stop, and publishing has its own time
                stops.note_them()
        except (Exception, Stopped) as caught:  # a defect of ours must leave a failure file too
            error = caught
        return finish(job, error, keeper, sent)


def scratch() -> Path:
    """Where inputs are fetched to. What is whole and verified there is not fetched again."""
    return Path(tempfile.gettempdir()) / f"sagemaker-kohya-{os.getuid()}"


def fetch(plan: Plan, storage: Storage, *, pictures_only: bool = False) -> Inputs:
    """S3 to disk. What is on disk already stays where it is, but a streamed model, which is copied once."""
    root = scratch() / "inputs"
    wanted: dict[str, RemoteObject] = {}

    def local(file: File, name: str) -> Path:
        if isinstance(file, Path):
            return file
        wanted[name] = file
        return root / name

    def alone(single: Single) -> Path:
        path = single.file if isinstance(single.file, Path) else Path(single.file.uri.name)
        at = f"{_folder_of(single.file)}/{path.name}"
        if single.streamed:
            say(f"fetch: reading {path} once, in order")
            outbox.place({at: path}, root)
            return root / at
        return local(single.file, at)

    def below(source: Source, files: Mapping[str, File]) -> dict[str, Path]:
        folder = _folder_of(source.location)
        return {name: local(file, f"{folder}/{name}") for name, file in files.items()}

    request = plan.request
    model, weights = Path(), dict[str, list[Path]]()
    if not pictures_only:
        model = alone(Single(plan.model.file, plan.model.streamed))
        weights = {option: [alone(one) for one in found] for option, found in plan.extras.weights.items()}
    files = below(request.dataset, plan.dataset_files)
    reg = below(request.reg, plan.reg_files) if request.reg else {}
    tagger = alone(plan.tagger.model) if plan.tagger and not pictures_only else None
    fetched = storage.fetch(wanted, root) if wanted else ()
    return Inputs(plan, model, files, reg, weights, tagger, fetched)


def look(inputs: Inputs) -> Looked:
    """Open every picture and caption that was fetched. Raises Unfit with all that cannot be used."""
    plan, problems = inputs.plan, list[Problem]()
    seen: list[pictures.Seen] = []
    for found, files, on_disk in (
        (plan.dataset, plan.dataset_files, inputs.dataset),
        (plan.reg, plan.reg_files, inputs.reg),
    ):
        with collecting(problems):
            if found is not None:
                names = {name: name_of(file) for name, file in files.items()}
                seen.append(
                    pictures.check(found, on_disk, names, plan.merged.values, resize.sizes(plan.request))
                )
    if problems:
        raise Unfit(problems)
    for note in (note for one in seen for note in one.notes):
        say(f"fetch: {note}")
    data, reg = seen[0], seen[1] if plan.reg is not None else None
    told = _facts(plan, (data.sizes, reg.sizes if reg else ()))
    for line in told.lines():
        say(f"fetch: {line}")
    return Looked(data, reg, told)


def prepare(inputs: Inputs, looked: Looked, taken: Taken | None, job: Job) -> Prepared:
    """The tree that the trainer sees, and the configuration that it reads. `taken`: what it goes on from.

    Captions come into `job` while the tagger writes them.
    """
    work = job.work
    plan = inputs.plan
    output, logs, unasked = work / "output", work / "logs", work / "states"
    for folder in (output, logs, unasked):
        folder.mkdir()
    origins: dict[str, str] = {}
    for name, found, seen, files, on_disk in (
        ("dataset", plan.dataset, looked.dataset, plan.dataset_files, inputs.dataset),
        ("reg", plan.reg, looked.reg, plan.reg_files, inputs.reg),
    ):
        if found is None or seen is None:
            continue
        root = work / name
        links = dataset.link(found, on_disk, root)
        for made, link in mending.mend(found, seen, root, bool(plan.merged.values.get("alpha_mask"))).items():
            links[made] = links.pop(link)
        links = resize.apply(plan.request, links, files)
        if name == "dataset":
            captions.write(
                plan.tagger, inputs.tagger, found, root=root, links=links, given=files, written=job.captions
            )
        origins |= {str(path): name_of(files[source]) for path, source in links.items()}
    owned: dict[str, object] = {
        "pretrained_model_name_or_path": str(base_model.unpacked(plan.model, inputs.model, work)),
        "output_dir": str(output),
        "logging_dir": str(logs),
        "tokenizer_cache_dir": str(tokenizers.folder()),
        **_pictures(plan, work),
    }
    for option, paths in inputs.weights.items():
        owned[option] = [str(path) for path in paths] if option == "base_weights" else str(paths[0])
    if plan.extras.prompts is not None:
        name, text = plan.extras.prompts
        prompts = work / f"prompts{PurePosixPath(name).suffix}"
        prompts.write_text(text, encoding="utf-8")
        owned["sample_prompts"] = str(prompts)
    settings = dict(plan.merged.settings)
    if taken is not None:
        outbox.place(taken.loras, output)
        for begun in ("initial_epoch", "initial_step"):  # which sd-scripts would believe, and not the state
            settings.pop(begun, None)
        owned["resume"] = str(taken.folder)
        if plan.sd_scripts is not None:
            owned["skip_until_initial_step"] = True
    merged = config.own(replace(plan.merged, settings=settings), owned)
    if "output_name" not in merged.settings:
        merged = config.own(merged, {"output_name": "lora"})
    for note in merged.notes:
        say(f"prepare: {note}")
    config_file = work / "config.toml"
    config_file.write_text(config.dump(merged.values), encoding="utf-8")
    return Prepared(plan, merged, config_file, output, unasked, logs, taken, work / "trainer.log", origins)


def train(prepared: Prepared) -> trainer.Ended:
    """Run the trainer to its end."""
    plan, config_file = prepared.plan, prepared.config_file
    temporary = prepared.log.with_name("tmp")  # where workers and compilers leave things
    temporary.mkdir()
    environment = {
        "TMPDIR": str(temporary),
        "HF_HUB_OFFLINE": "1",
        VARIABLE: str(plan.request.state_every_minutes),
        FOLDER: str(prepared.states),
    }
    if plan.sd_scripts is None:
        command = [sys.executable, "-m", "kohya.builtin", plan.kind, f"--config_file={config_file}"]
    else:
        command = plan.sd_scripts.command(plan.kind, config_file, plan.gpu.count if plan.gpu else 1)
        environment |= plan.sd_scripts.environment()
    if plan.compat is not None:
        environment |= plan.compat.environment()
    return trainer.run(command, environment, prepared.log, 60 * plan.request.stall_minutes)


def verify(prepared: Prepared, ended: trainer.Ended, keeper: Keeper) -> list[Lora]:
    """Every LoRA that the trainer left, the last one among them; a bad one fails the job.

    Raises TrainerFailed when there is no last LoRA, whatever the trainer's exit code.
    """
    final = prepared.output / f"{prepared.output_name}.safetensors"
    if ended.code != 0 or not final.exists():
        last = dataset.as_given(last_words(ended.tail).rstrip("."), prepared.origins)
        how = f"exit code {ended.code}" if ended.code >= 0 else signal.Signals(-ended.code).name
        left = "" if final.exists() else f" and left no {final.name}"
        raise TrainerFailed(f"{ended.cause or f'{last}.'} (The trainer ended with {how}{left}.)")
    paths = sorted(prepared.output.glob("*.safetensors"))
    return [keeper.verified(path) or _verified(path, prepared) for path in paths]


def finish(job: Job, error: BaseException | None, keeper: Keeper | None, sent: Outbox) -> int:
    """Publish whatever there is, tell how the job ended, and return the exit code."""
    exit_code, cause = _told(error)
    if exit_code in (0, Stopped.exit_code):
        job.tree.give_room()
    else:
        job.tree.write_failure(cause)  # before anything is sent: a slow upload must not cost the cause
    try:
        with job.stage("publish"):
            _publish(job, error, keeper, sent)
    except Exception as fault:  # whatever it is, the job must still tell how it ended
        unpublished = f"The results could not all be published: {fault}"
        if kept := [lora.path.name for lora in job.loras if (job.tree.model / lora.path.name).exists()]:
            unpublished += f" {', '.join(kept)} lies in {job.tree.model}."
        if error is None:
            error, exit_code, cause = fault, 1, unpublished
            job.tree.write_failure(cause)
        else:
            warn(unpublished)
    if error is None and keeper is not None:
        try:
            for files, location in keeper.finish():
                sent.send(files, location)
        except Exception as fault:
            warn(f"the job's states could not be marked as done, and remain: {fault}")
    try:
        publish.record(job, exit_code, cause, sent)
    except Exception as fault:
        warn(f"job.json could not be published: {fault}")
    ending = report.Ending.of(exit_code, cause, error)
    report.publish(job, ending, keeper.event_log if keeper else None, sent)
    _tell(job, error, cause)
    return exit_code


def _publish(job: Job, error: BaseException | None, keeper: Keeper | None, sent: Outbox) -> None:
    if job.prepared is None or keeper is None:
        publish.results(job, sent, ())
        return
    if error is not None:
        keeper.sweep(ended=True)
        job.loras = _good_ones(job.prepared, keeper)
    sent.wait()
    publish.results(job, sent, keeper.log() if error is None else keeper.left())


def _tell(job: Job, error: BaseException | None, cause: str) -> None:
    """The last lines. The last one of all is what the failure file says, if there is one."""
    if isinstance(error, Unfit) and len(error.problems) > 1:
        for problem in error.problems:
            fail(str(problem))
    if isinstance(error, Stopped):
        say(cause)
    elif error is not None:
        fail(cause)
    else:
        names = ", ".join(lora.path.name for lora in job.loras)
        say(f"done in {sum(job.seconds.values()):.1f} s: {names} in {job.tree.model}")


def _told(error: BaseException | None) -> tuple[int, str]:
    """The exit code, and how the job ended in a sentence that names the cause."""
    if error is None:
        return 0, ""
    if isinstance(error, JobError | Stopped):
        return error.exit_code, str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return 1, f"The disk is full ({error.filename}). Give the job a larger volume (VolumeSizeInGB)."
    traceback.print_exception(error, file=sys.stderr)
    place = traceback.extract_tb(error.__traceback__)[-1]
    at = f"{Path(place.filename).name} line {place.lineno}"
    return 1, f"This is a defect of sagemaker-kohya: {type(error).__name__}: {error} ({at})."


def _say_plan(plan: Plan) -> None:
    for note in plan.notes:
        say(f"check: {note}")
    if plan.reg is not None:
        say(
            f"check: {counted(plan.reg.pictures, 'regularisation picture')}, {plan.reg.repeated:,} with "
            "repeats, of which an epoch uses as many as the data set has with repeats"
        )
    precision = plan.merged.settings["mixed_precision"]
    devices = f" on {plan.gpu.count} GPUs" if plan.gpu and plan.gpu.count > 1 else ""
    say(
        f"check: {plan.kind} base model, {plan.model.size / 1e9:.2f} GB; "
        f"{counted(plan.dataset.pictures, 'picture')}, {plan.dataset.repeated:,} an epoch with repeats; "
        f"trainer {plan.request.trainer}{devices}; mixed_precision {precision.value} ({precision.where})"
    )


def _facts(plan: Plan, sizes: tuple[Sequence[Size], Sequence[Size]]) -> Facts:
    together = processes(plan.request, plan.gpu)
    return facts(plan.dataset, plan.reg, plan.merged.values, sizes, together)


def _pictures(plan: Plan, work: Path) -> dict[str, str]:
    """The options that lead to the linked pictures. A dataset_config stands for both folders."""
    described = plan.extras.dataset_config
    if described is None:
        folders = ("train_data_dir", "dataset"), *([("reg_data_dir", "reg")] if plan.reg else [])
        return {option: str(work / name) for option, name in folders}
    trees = {False: (work / "dataset", iter(plan.dataset.subsets))}
    if plan.reg is not None:
        trees[True] = (work / "reg", iter(plan.reg.subsets))
    places = []
    for folder in described.folders:
        root, subsets = trees[folder.is_reg]
        places.append(str(root / next(subsets).folder))
    file = work / "dataset.json"  # which sd-scripts reads as well, and its TOML reader has gaps
    file.write_text(json.dumps(described.placed(places)), encoding="utf-8")
    return {"dataset_config": str(file)}


def _verified(path: Path, prepared: Prepared) -> Lora:
    return verify_lora(path, networks.expected(prepared.plan.kind, prepared.merged.values))


def _good_ones(prepared: Prepared, keeper: Keeper) -> list[Lora]:
    """The LoRAs of a job that failed or was stopped that work all the same."""
    good = []
    for path in sorted(prepared.output.glob("*.safetensors")):
        try:
            good.append(keeper.verified(path) or _verified(path, prepared))
        except BadLora as error:
            warn(f"not published: {error}")
    return good


def _folder_of(origin: File | object) -> str:
    """A folder's name for what comes from one place: always the same, so that it is found there again."""
    name = name_of(origin) if isinstance(origin, RemoteObject) else str(origin)
    return hashlib.sha256(name.encode()).hexdigest()[:16]
