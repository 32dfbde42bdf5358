"""Every check that can be made before the first byte of the model is paid for, and one report of them."""

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from entrypoint import captions, console, files, inputs, memory, resize, states
from entrypoint import model as base_model
from entrypoint.captions import Tagger
from entrypoint.contract import Tree
from entrypoint.dataset import DataSet
from entrypoint.failures import Problem, Unfit, collecting
from entrypoint.files import File, Single
from entrypoint.gpu import Compat, Gpu, compatibility, find_gpu
from entrypoint.hyperparameters import Trainer
from entrypoint.inputs import Extras
from entrypoint.model import ModelFile
from entrypoint.request import ESD_TAGGER, Captioning, JobRequest, Location, Source
from entrypoint.states import State
from entrypoint.storage import RemoteObject, S3Uri, Storage
from kohya import config, rules, sd_scripts, tokenizers
from kohya.builtin.options import lacks as builtin_lacks
from kohya.config import Kind, Merged, Setting
from kohya.sd_scripts import SdScripts

OUTPUT_BYTES = 1_000_000_000  # room for LoRAs, event logs and the trainer's own files
LONGEST_TMPDIR = 50  # characters, to which the job's and the workers' own folders are added
SHARED_MEMORY = 1 << 30  # bytes in /dev/shm, with which loader workers get on
_LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "tensorboard", "PIL")


@dataclass(frozen=True)
class Plan:
    """A request that can be trained: what it is made of, and the configuration that results."""

    request: JobRequest
    kind: Kind
    model: ModelFile
    dataset: DataSet
    dataset_files: Mapping[str, File]  # by path below the data set's root
    reg: DataSet | None  # regularisation pictures
    reg_files: Mapping[str, File]
    extras: Extras
    merged: Merged
    gpu: Gpu | None
    compat: Compat | None  # None: the driver's own libraries serve
    sd_scripts: SdScripts | None  # None: the built-in trainer
    tagger: Tagger | None  # None: no captions are asked for
    run: Mapping[str, Any]  # what is to be learned: of a run that goes on it must be the same; here alone
    states: Sequence[State]  # that the job may go on from, the newest first

    @property
    def inputs(self) -> Iterator[File]:
        """Every file that it is made of, but for the configuration."""
        yield self.model.file
        yield from (single.file for found in self.extras.weights.values() for single in found)
        yield from [self.tagger.model.file] if self.tagger else []
        yield from self.dataset_files.values()
        yield from self.reg_files.values()

    @property
    def notes(self) -> list[str]:
        """What was chosen or left out, but for the configuration's own notes."""
        compat = [self.compat.why] if self.compat is not None else []
        reg = self.reg.notes if self.reg is not None else ()
        return [*compat, *self.dataset.notes, *(f"regularisation pictures: {note}" for note in reg)]


@dataclass(frozen=True)
class Here:
    """The folders of the machine that the job is to run on, where that is this one."""

    tree: Tree
    scratch: Path


@dataclass(frozen=True)
class Findings:
    """All that was found, of a request that can be trained and of one that cannot."""

    problems: tuple[Problem, ...]
    merged: Merged
    gpu: Gpu | None
    kind: Kind | None
    model: ModelFile | None
    dataset: DataSet | None
    reg: DataSet | None
    plan: Plan | None  # where there are a base model and a data set, with problems or without


def check(request: JobRequest, tree: Tree, scratch: Path, storage: Storage) -> Plan:
    """Look at everything that was named, without fetching it. Raises Unfit with every problem found."""
    found = examine(request, find_gpu(), storage, Here(tree, scratch))
    if found.problems or found.plan is None:
        raise Unfit(found.problems, found.merged)
    return found.plan


def examine(request: JobRequest, gpu: Gpu | None, storage: Storage, here: Here | None) -> Findings:
    """Look at everything that was named, without fetching it, for a machine with this GPU.

    `here`: None where the job is to run elsewhere. Then nothing is written, nor asked of this machine: not
    its trainer, its disk, its driver or its right to write to the outputs.
    """
    problems = list(request.problems)
    model, data_set, reg, scripts, compat, tagger = None, None, None, None, None, None
    data_files: Mapping[str, File] = {}
    reg_files: Mapping[str, File] = {}
    toml: list[Setting] = []
    kind, beside = request.kind, None
    with collecting(problems):
        model, kind = base_model.find(request, storage)
    with collecting(problems):
        toml, beside = _toml(request, storage, problems)
    request, toml = _esd_captioning(request, toml)
    with collecting(problems):
        tagger = captions.find(request, storage, here=here is not None)
    held = kind or "sdxl"  # which has every option, where the base model has a problem of its own
    machine = _machine(gpu, here=here is not None)
    merged = config.merge(held, [config.preset(held), machine, toml, *request.layers])
    problems += merged.problems
    extras, merged, wrong = inputs.find(request, beside, kind, merged, storage)
    problems += wrong
    problems += resize.problems(request, merged, extras)
    merged, wrong = _settled(request, kind, merged, extras, machine)
    problems += wrong
    if model is not None:
        merged, wrong = base_model.settle(model, request.model.where, merged)
        problems += wrong
    scripts, merged, wrong = _trainer(request, held, merged, gpu, here=here is not None)
    problems += wrong
    with collecting(problems):
        if here is not None and (scripts is not None or request.trainer == "builtin"):
            compat = compatibility(gpu, scripts.python if scripts else sys.executable)
    with collecting(problems):
        data_set, data_files, wrong = inputs.pictures(request, request.dataset, merged, extras, storage)
        problems += wrong
    with collecting(problems):
        if request.reg is not None:
            reg, reg_files, wrong = inputs.pictures(request, request.reg, merged, extras, storage)
            problems += wrong
    plan = None
    if model is not None and kind is not None:
        merged, wrong = _memory(request, kind, model.size, merged, gpu, here=here is not None)
        problems += wrong
    if model is not None and kind is not None and data_set is not None:
        plan = Plan(
            request, kind, model, data_set, data_files, reg, reg_files, extras, merged, gpu, compat, scripts,
            tagger, {}, (),
        )  # fmt: skip
        plan = _going_on(plan, here, storage, problems)
    if here is not None:
        problems += _outputs(request, here, storage)
        problems += _disk(to_fetch(plan), here) if plan else []
    return Findings(tuple(problems), merged, gpu, kind, model, data_set, reg, plan)


def _memory(
    request: JobRequest, kind: Kind, size: int, merged: Merged, gpu: Gpu | None, *, here: bool
) -> tuple[Merged, list[Problem]]:
    host = memory.of_this_machine() if here and request.trainer == "sd-scripts" else None
    notes = memory.notes(kind, size, merged, gpu)
    problems = [*memory.problems(kind, size, merged, gpu, host)]
    return replace(merged, notes=(*merged.notes, *notes)), problems


def _going_on(plan: Plan, here: Here | None, storage: Storage, problems: list[Problem]) -> Plan:
    """The plan with what is to be learned, and the states that have learned some of it.

    A job that is to run elsewhere has neither. One that the user lets go on from another state has none at
    first, and its own after a break.
    """
    if here is None:
        return plan
    request, described = plan.request, plan.extras.dataset_config
    run = states.identity(
        request,
        plan.kind,
        plan.model,
        data=(plan.dataset, plan.dataset_files),
        reg=(plan.reg, plan.reg_files) if plan.reg else None,
        weights=plan.extras.weights,
        values=plan.merged.values,
        dataset_config=described.content if described else None,
        processes=processes(request, plan.gpu),
    )
    places = [here.tree.checkpoints, *([request.checkpoints] if request.checkpoints else [])]
    found, wrong = states.find(places, run, storage)
    if "resume" not in plan.merged.settings:
        problems += wrong
    return replace(plan, run=run, states=found)


def _toml(
    request: JobRequest, storage: Storage, problems: list[Problem]
) -> tuple[list[Setting], Location | None]:
    """The settings of the user's TOML, as far as it can be read, and the folder that it lies in."""
    if request.config is None:
        return [], None
    found = _configuration(request, request.config, storage)
    if found is None:
        return [], request.config.location
    file, text = found
    settings, wrong = config.read(text, files.name_of(file), any_depth=request.flat)
    problems += wrong
    for setting in settings:
        if setting.name in console.SECRET_OPTIONS:
            console.hide(map(str, setting.value if isinstance(setting.value, list) else [setting.value]))
    return list(settings), files.folder_of(file)


def _esd_captioning(request: JobRequest, toml: list[Setting]) -> tuple[JobRequest, list[Setting]]:
    """ESD's TOML without its captioning flag, and the request with it, if the parameters did not have it."""
    if not request.flat:
        return request, toml
    for setting in toml:
        if setting.name == ESD_TAGGER and str(setting.value).lower() not in ("false", ""):
            where = f"{setting.where}: {ESD_TAGGER}"
            request = replace(request, caption=request.caption or Captioning(where))
    ours = (ESD_TAGGER, "general_threshold", "character_threshold")
    return request, [setting for setting in toml if setting.name not in ours]


def _configuration(request: JobRequest, source: Source, storage: Storage) -> tuple[File, str] | None:
    """The TOML that is the configuration, and its content; None where other files alone lie there.

    Where there are several, those that an option names, here or in one of them, are something else.
    """
    every = [one for layer in request.layers for one in layer]
    named = {str(PurePosixPath(str(one.value))) for one in every if one.name in inputs.BESIDE}
    endings = (".toml", ".txt", ".json") if named else (".toml",)
    there = files.matching(source, endings, "configuration", storage)
    if source.location.name not in there:
        there = {name: file for name, file in there.items() if name.endswith(".toml") and name not in named}
    if not there:
        return None
    texts = {
        name: files.text_of(file, f"{source.where}: {files.name_of(file)}", storage)
        for name, file in there.items()
    }
    if len(texts) > 1:
        settings = [one for name, text in texts.items() for one in config.read(text, name)[0]]
        named = {str(PurePosixPath(str(one.value))) for one in settings if one.name in inputs.BESIDE}
        there = {name: file for name, file in there.items() if name not in named} or there
    fix = "Leave one, or name the configuration itself"
    file = files.sole(there, source, fix)
    return file, texts[next(iter(there))]


def _machine(gpu: Gpu | None, *, here: bool = True) -> Sequence[Setting]:
    """What suits the machine: the GPU's preset and, of this machine, how many workers load pictures.

    For a GPU without a preset bf16 from compute capability 8.0, else fp16; none on a CPU.
    """
    precision = "no" if gpu is None else "bf16" if (gpu.capability or 0) >= 8 else "fp16"
    where = "this machine has no GPU" if here else "a machine without a GPU"
    if gpu is not None:
        where = f"{gpu.name}, compute capability {gpu.capability or 'unknown'}"
    workers = Setting("max_data_loader_n_workers", _workers(), "this machine's cores and /dev/shm")
    return (
        Setting("mixed_precision", precision, where),
        *([workers] if here else []),
        *(config.gpu_preset(gpu.name) if gpu else ()),
    )


def _workers() -> int:
    """How many processes may load pictures; 0 where they would die or hang, and the trainer does it itself.

    They hand pictures over in /dev/shm, of which Docker gives 64 MB, and talk through sockets in TMPDIR,
    whose paths have at most 107 characters (unix(7)).
    """
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    fits = shared >= SHARED_MEMORY and len(tempfile.gettempdir()) <= LONGEST_TMPDIR
    return min(8, os.cpu_count() or 1) if fits else 0


def _settled(
    request: JobRequest, kind: Kind | None, merged: Merged, extras: Extras, machine: Sequence[Setting]
) -> tuple[Merged, list[Problem]]:
    """The configuration where presets give way to what is asked for, and what does not go together."""
    if kind is None:
        return merged, _of_either_kind(merged, machine)
    merged, problems = rules.settle(kind, merged)
    merged = replace(merged, notes=(*merged.notes, *resize.notes(request, merged, extras)))
    return merged, [*problems, *_of_folders(kind, merged, extras, {one.wrong for one in problems})]


def _of_either_kind(merged: Merged, machine: Sequence[Setting]) -> list[Problem]:
    """What does not go together whatever the base model is, for where that could not be told."""
    own = {name: setting for name, setting in merged.settings.items() if not setting.of_preset}
    found = []
    for kind in config.KINDS:
        usual = config.merge(kind, [config.preset(kind), machine])
        found.append(rules.settle(kind, replace(usual, settings={**usual.settings, **own}))[1])
    return [problem for problem in found[0] if problem in found[1]]


def _of_folders(kind: Kind, merged: Merged, extras: Extras, told: set[str]) -> Iterator[Problem]:
    """What does not go together in a dataset_config's folders; what is `told` of the job is not repeated."""
    for folder in extras.dataset_config.folders if extras.dataset_config else ():
        for conflict in rules.of_folder(kind, merged.values, folder.values):
            if conflict.wrong not in told:
                yield Problem(folder.where, conflict.wrong, conflict.fix)


def _trainer(
    request: JobRequest, kind: Kind, merged: Merged, gpu: Gpu | None, *, here: bool
) -> tuple[SdScripts | None, Merged, list[Problem]]:
    """The trainer, the configuration that suits it, and what it lacks or does not do."""
    precision = merged.settings["mixed_precision"]
    problems = []
    if precision.value == "fp16" and gpu is None:
        wrong = "mixed_precision = fp16 does not run on a CPU, and this machine has no GPU"
        problems.append(Problem(precision.where, wrong, "Write mixed_precision=no"))
    if precision.value == "bf16" and gpu is not None and (gpu.capability or 8) < 8:
        wrong = f"mixed_precision = bf16 does not run on a {gpu.name}"
        problems.append(Problem(precision.where, wrong, "Write mixed_precision=fp16"))
    if here and not (tokenizers.folder() / tokenizers.CLIP_L / tokenizers.FILES[0]).exists():
        wrong = f"the CLIP tokenizers are not in {tokenizers.folder()}"
        problems.append(Problem(f"trainer {request.trainer}", wrong, "Type: python -m kohya.tokenizers"))
    if "resume" in merged.settings and here:
        merged, wrong_state = _resumed(request.trainer, merged)
        problems += wrong_state
    if request.trainer == "builtin":
        return None, merged, [*problems, *(_absent_libraries() if here else []), *_builtin(merged)]
    try:
        found = sd_scripts.find() if here else None
    except sd_scripts.MissingSdScripts as error:
        fix = "Type make sd-scripts, or set SD_SCRIPTS_DIR, or take the small trainer: --trainer=builtin"
        return None, merged, [*problems, Problem("trainer sd-scripts", str(error), fix)]
    merged, wrongs = _sd_scripts(found, kind, merged, gpu)
    return found, merged, [*problems, *wrongs]


def _resumed(trainer: Trainer, merged: Merged) -> tuple[Merged, list[Problem]]:
    """The configuration of a run that goes on from a state, and what is wrong with the state's folder."""
    resume = merged.settings["resume"]
    folder = Path(os.path.expanduser(str(resume.value))).absolute()  # noqa: PTH111 (Path's raises for ~nobody)
    own = "random_states.bin" if trainer == "builtin" else "random_states_0.pkl"
    if missing := [name for name in ("train_state.json", own) if not (folder / name).is_file()]:
        wrong = f"{folder} is no state of the trainer {trainer}: there is no {missing[0]} in it"
        return merged, [Problem(resume.where, wrong, "Name a folder such as lora-step00000012-state")]
    return config.change(merged, {"resume": str(folder)}, resume.where), []


def _absent_libraries() -> list[Problem]:
    """What the built-in trainer lacks."""
    absent = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    wrong = f"{', '.join(absent)} cannot be imported here"
    return [Problem("trainer builtin", wrong, "Type: pip install 'sagemaker-kohya[train]'")] if absent else []


def _builtin(merged: Merged) -> list[Problem]:
    """The options that the built-in trainer does not have."""
    problems = []
    owned = dict.fromkeys(config.OWNED, "the job's")
    for name, wrong, fix in builtin_lacks({**merged.values, **owned}):
        where = merged.settings[name].where if name in merged.settings else "trainer builtin"
        problems.append(Problem(where, wrong if where.endswith(name) else f"{name}: {wrong}", fix))
    return problems


def _sd_scripts(
    found: SdScripts | None, kind: Kind, merged: Merged, gpu: Gpu | None
) -> tuple[Merged, list[Problem]]:
    """The configuration as sd-scripts runs it, and what its Python lacks. `found`: None for one elsewhere."""
    values = merged.values
    problems = _lacking(found, merged) if found else []
    if values.get("xformers") and (gpu is None or (found and found.lacks(["xformers"]))):
        why = "xformers needs a GPU" if gpu is None else "xformers is not installed"
        merged = config.change(merged, {"xformers": False, "sdpa": True}, why)
    if values.get("persistent_data_loader_workers") and values.get("max_data_loader_n_workers") == 0:
        why = "max_data_loader_n_workers is 0, and nothing can persist"
        merged = config.change(merged, {"persistent_data_loader_workers": False}, why)
    own_vae = "vae" not in values  # a VAE that is given instead may be one that was mended for fp16
    if kind == "sdxl" and own_vae and values["mixed_precision"] == "fp16" and not values.get("no_half_vae"):
        merged = config.change(merged, {"no_half_vae": True}, "SDXL's VAE makes NaN in fp16")
    if values.get("log_with") == "wandb":
        merged = config.change(merged, {"log_with": "all"}, "the job reads each step from TensorBoard's log")
    if gpu is not None and gpu.count > 1 and "ddp_timeout" not in values:
        merged = config.change(merged, {"ddp_timeout": 120}, "the processes wait while latents are cached")
    own = {"console_log_simple": True, **({"skip_until_initial_step": True} if "resume" in values else {})}
    return config.change(merged, own, "the job"), problems


def _lacking(found: SdScripts, merged: Merged) -> list[Problem]:
    """What the options ask for, and the Python of sd-scripts does not have."""
    problems, wanted = [], rules.modules(merged.values)
    for module in found.lacks([*_LIBRARIES, *wanted]):
        where = merged.settings[wanted[module]].where if module in wanted else "trainer sd-scripts"
        wrong = f"{module} cannot be imported by {found.python}"
        fix = f"Type: {found.python} -m pip install {rules.package(module)}"
        problems.append(Problem(where, wrong, fix))
    for name, lacking in found.lacks_classes(rules.classes(merged.values)).items():
        wrong = f"{lacking} cannot be imported by {found.python}"
        problems.append(Problem(merged.settings[name].where, wrong, "Correct its name"))
    return problems


def processes(request: JobRequest, gpu: Gpu | None) -> int:
    """How many processes train together: one on each GPU, but for the built-in trainer."""
    return gpu.count if gpu and request.trainer == "sd-scripts" else 1


def to_fetch(plan: Plan) -> int:
    """The bytes that the job puts on disk before it trains; what resizing takes is an estimate."""
    pictures = chain(plan.dataset_files.values(), plan.reg_files.values())
    made = resize.room(plan.request, plan.dataset_files) + resize.room(plan.request, plan.reg_files)
    return _to_fetch(plan.model, pictures, plan.extras, plan.tagger) + made


def _to_fetch(model: ModelFile, pictures: Iterable[File], extras: Extras, tagger: Tagger | None) -> int:
    """The bytes that are put on disk: what lies in S3 or is streamed, and what is made of the model."""
    singles = [single for found in extras.weights.values() for single in found]
    singles += [Single(model.file, model.streamed), *([tagger.model] if tagger else [])]
    fetched = [one.file for one in singles if one.streamed or isinstance(one.file, RemoteObject)]
    every = chain(fetched, (file for file in pictures if isinstance(file, RemoteObject)))
    return sum(map(files.size, every)) + model.copied


def _outputs(request: JobRequest, here: Here, storage: Storage) -> list[Problem]:
    """What keeps the job from writing where it is asked to."""
    problems: list[Problem] = []
    for place in (request.output, request.logs, request.checkpoints):
        if isinstance(place, S3Uri):
            with collecting(problems):
                storage.check_writable(place)
        elif place is not None and (problem := _unwritable(place, "Name another folder")):
            problems.append(problem)
    for folder in (here.tree.tensorboard, here.tree.failure.parent):
        if problem := _unwritable(folder, "Set SAGEMAKER_BASE_DIR to a folder of your own"):
            problems.append(problem)
    return problems


def _disk(fetched: int, here: Here) -> list[Problem]:
    """Whether what is fetched and what is made find room, and whether the results can be written."""
    problems = []
    for folder, needed, what in (
        (here.scratch, fetched + OUTPUT_BYTES, "the inputs and the trainer's files"),
        (here.tree.model, OUTPUT_BYTES, "the LoRAs"),
    ):
        if problem := _unwritable(folder, "Set SAGEMAKER_BASE_DIR to a folder of your own"):
            problems.append(problem)
            continue
        if (free := shutil.disk_usage(folder).free) < needed:
            wrong = f"{what} need {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free"
            problems.append(Problem(str(folder), wrong, "Give the job a larger volume (VolumeSizeInGB)"))
    return problems


def _unwritable(folder: Path, fix: str) -> Problem | None:
    """What keeps the job from writing to a folder, which is made if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return Problem(str(folder), f"it cannot be written to ({error.strerror})", fix)
