"""Every check that can be made before the first byte of the model is paid for, and one report of them."""

import importlib.util
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from entrypoint import checkpoint, console, dataset
from entrypoint.checkpoint import NotABaseModel
from entrypoint.contract import Tree
from entrypoint.dataset import DataSet
from entrypoint.failures import Problem, Unfit, collecting
from entrypoint.request import JobRequest, Source
from entrypoint.storage import RemoteObject, S3Uri, Storage, safe_relative
from kohya import config, rules, sd_scripts, tokenizers
from kohya.builtin.options import problems as builtin_problems
from kohya.config import Kind, Merged, Setting
from kohya.sd_scripts import SdScripts

OUTPUT_BYTES = 1_000_000_000  # room for LoRAs, event logs and the trainer's own files
LONGEST_TMPDIR = 50  # characters, to which the job's and the workers' own folders are added
SHARED_MEMORY = 1 << 30  # bytes in /dev/shm, with which loader workers get on
_TOML_BYTES = 1 << 20
_MODEL_ENDINGS = (".safetensors", ".tar", ".ckpt")
_ESD_TAGGER = "enable_wd14_tagger"  # ESD's WebUI leaves its captioning flag in the TOML
_LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "tensorboard", "PIL")

File = RemoteObject | Path


@dataclass(frozen=True)
class ModelFile:
    """The base model as it was found."""

    file: File
    size: int  # bytes
    member: str | None  # its name inside a tar, ESD's early form
    streamed: bool


@dataclass(frozen=True)
class Gpu:
    """The first GPU of this machine."""

    name: str
    capability: float  # CUDA compute capability: 7.5 for a T4, 8.6 for an A10G


@dataclass(frozen=True)
class Plan:
    """A request that can be trained: what it is made of, and the configuration that results."""

    request: JobRequest
    kind: Kind
    model: ModelFile
    dataset: DataSet
    dataset_files: Mapping[str, File]  # by path below the data set's root
    merged: Merged
    gpu: Gpu | None
    sd_scripts: SdScripts | None  # None: the built-in trainer


def check(request: JobRequest, tree: Tree, scratch: Path, storage: Storage) -> Plan:
    """Look at everything that was named, without fetching it. Raises Unfit with every problem found."""
    problems = list(request.problems)
    model, merged, files, scripts = None, None, None, None
    kind, toml, gpu = request.kind, [], find_gpu()
    with collecting(problems):
        model, kind = _model(request, storage)
    with collecting(problems):
        toml = _toml(request, storage)
    if kind is None:  # the base model's own problem is told; the options' can be, held against all there are
        problems += config.merge("sdxl", [config.preset("sdxl"), toml, *request.layers]).problems
    else:
        merged = config.merge(kind, [config.preset(kind), _machine(gpu), toml, *request.layers])
        problems += merged.problems
        merged, wrong = rules.settle(kind, merged)
        problems += wrong
        scripts, merged, wrong = _trainer(request, kind, merged, gpu)
        problems += wrong
    with collecting(problems):
        files = _files(request.dataset, storage)
        data_set, wrong = dataset.inspect(
            {name: _size(file) for name, file in files.items()},
            str(request.dataset.location),
            caption_extension=str(merged.values.get("caption_extension", ".txt") if merged else ".txt"),
            allow_missing_captions=request.allow_missing_captions,
        )
        problems += wrong
        files = {name: files[name] for name in data_set.files}
    for place in (request.output, request.logs):
        if isinstance(place, S3Uri):
            with collecting(problems):
                storage.check_writable(place)
        elif place is not None and (problem := _unwritable(place, "Name another folder")):
            problems.append(problem)
    for folder in (tree.tensorboard, tree.failure.parent):
        if problem := _unwritable(folder, "Set SAGEMAKER_BASE_DIR to a folder of your own"):
            problems.append(problem)
    if model is not None and files is not None:
        problems += _disk(model, files, tree, scratch)
    if problems or model is None or kind is None or merged is None or files is None:
        raise Unfit(problems)
    return Plan(request, kind, model, data_set, files, merged, gpu, scripts)


def find_gpu() -> Gpu | None:
    """The first GPU, as the driver's own tool tells it; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        name, capability = told.splitlines()[0].rsplit(",", 1)
        return Gpu(name.strip(), float(capability))
    except (subprocess.SubprocessError, OSError, IndexError, ValueError):
        return None


def _model(request: JobRequest, storage: Storage) -> tuple[ModelFile, Kind]:
    """The base model's file and, from its header, its kind."""
    file = _one_file(request.model, _MODEL_ENDINGS, "base model", storage)
    where = f"{request.model.where}: {_name(file)}"
    try:
        with _opened(file, storage) as opened:
            member, header = _header(opened, _size(file), _name(file))
        kind = checkpoint.identify(header)
    except NotABaseModel as error:
        fix = "Give a Stable Diffusion 1.5 or SDXL checkpoint as one .safetensors file"
        raise Unfit([Problem(where, str(error), fix)]) from error
    except OSError as error:
        wrong, fix = f"it cannot be read ({error.strerror})", "Check its path and permissions"
        raise Unfit([Problem(where, wrong, fix)]) from error
    if request.kind not in (None, kind):
        wrong = f"it is an {kind} model, and the job asks for {request.kind}"
        raise Unfit([Problem(where, wrong, f"Give an {request.kind} model, or ask for {kind}")])
    return ModelFile(file, _size(file), member, request.model.streamed), kind


def _header(file: BinaryIO, size: int, name: str) -> tuple[str | None, checkpoint.Header]:
    """The header of a safetensors file, or of the one inside a tar together with its name there."""
    if name.endswith(".ckpt"):
        raise NotABaseModel("it is a .ckpt, a pickle that can run code when it is loaded")
    if not name.endswith(".tar"):
        return None, checkpoint.read_header(file, size)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            found = [member for member in archive if member.isfile() and _is_model(member.name)]
            inside = archive.extractfile(found[0]) if len(found) == 1 else None
            if inside is None:
                raise NotABaseModel(f"the tar holds {len(found)} .safetensors files, and must hold one")
            return found[0].name, checkpoint.read_header(cast(BinaryIO, inside), found[0].size)
    except tarfile.TarError as error:
        raise NotABaseModel(f"it is not a plain tar ({error})") from error


def _is_model(name: str) -> bool:
    return name.endswith(".safetensors") and not PurePosixPath(name).name.startswith("._")  # of macOS


def _toml(request: JobRequest, storage: Storage) -> list[Setting]:
    """The settings of the user's TOML; none where there is none."""
    if request.config is None:
        return []
    file = _one_file(request.config, (".toml",), "configuration", storage)
    where = f"{request.config.where}: {_name(file)}"
    try:
        with _opened(file, storage) as opened:
            content = opened.read(_TOML_BYTES + 1)
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise Unfit([Problem(where, f"it cannot be read ({error})", "Save it as UTF-8")]) from error
    if len(content) > _TOML_BYTES:
        raise Unfit(
            [Problem(where, "it has more than 1 MiB", "Give a TOML that holds the configuration alone")]
        )
    settings, problems = config.read(text, _name(file), any_depth=request.flat)
    for setting in settings:
        if setting.name in console.SECRET_OPTIONS:
            console.hide(map(str, setting.value if isinstance(setting.value, list) else [setting.value]))
    if request.flat:
        asked = [setting for setting in settings if setting.name == _ESD_TAGGER]
        settings = tuple(setting for setting in settings if setting.name != _ESD_TAGGER)
        if asked and str(asked[0].value).lower() not in ("false", ""):
            wrong = f"{_ESD_TAGGER} asks for captions, and this image holds no tagger"
            problems.append(Problem(asked[0].where, wrong, f"Write {_ESD_TAGGER} = false"))
    if problems:
        raise Unfit(problems)
    return list(settings)


def _machine(gpu: Gpu | None) -> Sequence[Setting]:
    """What suits this machine: bf16 from compute capability 8.0, fp16 below, none on a CPU; and workers."""
    precision = "no" if gpu is None else "bf16" if gpu.capability >= 8 else "fp16"
    where = f"this machine's {gpu.name}" if gpu else "this machine has no GPU"
    return (
        Setting("mixed_precision", precision, where),
        Setting("max_data_loader_n_workers", _workers(), "this machine's cores and /dev/shm"),
    )


def _workers() -> int:
    """How many processes may load pictures; 0 where they would die or hang, and the trainer does it itself.

    They hand pictures over in /dev/shm, of which Docker gives 64 MB, and talk through sockets in TMPDIR,
    whose paths have at most 107 characters (unix(7)).
    """
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    fits = shared >= SHARED_MEMORY and len(tempfile.gettempdir()) <= LONGEST_TMPDIR
    return min(8, os.cpu_count() or 1) if fits else 0


def _trainer(
    request: JobRequest, kind: Kind, merged: Merged, gpu: Gpu | None
) -> tuple[SdScripts | None, Merged, list[Problem]]:
    """The trainer, the configuration that suits it, and what it lacks or does not do."""
    precision = merged.settings["mixed_precision"]
    problems = []
    if precision.value == "fp16" and gpu is None:
        wrong = "mixed_precision = fp16 does not run on a CPU, and this machine has no GPU"
        problems.append(Problem(precision.where, wrong, "Write mixed_precision=no"))
    if precision.value == "bf16" and gpu is not None and gpu.capability < 8:
        wrong = f"mixed_precision = bf16 does not run on a {gpu.name}"
        problems.append(Problem(precision.where, wrong, "Write mixed_precision=fp16"))
    if not (tokenizers.folder() / tokenizers.CLIP_L / tokenizers.FILES[0]).exists():
        wrong = f"the CLIP tokenizers are not in {tokenizers.folder()}"
        problems.append(Problem(f"trainer {request.trainer}", wrong, "Type: python -m kohya.tokenizers"))
    if request.trainer == "builtin":
        return None, merged, [*problems, *_builtin(kind, merged)]
    try:
        found = sd_scripts.find()
    except sd_scripts.MissingSdScripts as error:
        fix = "Type make sd-scripts, or set SD_SCRIPTS_DIR, or take the small trainer: --trainer=builtin"
        return None, merged, [*problems, Problem("trainer sd-scripts", str(error), fix)]
    merged, wrongs = _sd_scripts(found, kind, merged, gpu)
    return found, merged, [*problems, *wrongs]


def _builtin(kind: Kind, merged: Merged) -> list[Problem]:
    """What the built-in trainer lacks, and the options that it does not have."""
    problems = []
    if absent := [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]:
        wrong = f"{', '.join(absent)} cannot be imported here"
        problems.append(Problem("trainer builtin", wrong, "Type: pip install 'sagemaker-kohya[train]'"))
    owned = dict.fromkeys(config.OWNED, "the job's")
    for name, wrong, fix in builtin_problems({**merged.values, **owned}, kind):
        where = merged.settings[name].where if name in merged.settings else "trainer builtin"
        problems.append(Problem(where, wrong if where.endswith(name) else f"{name}: {wrong}", fix))
    return problems


def _sd_scripts(
    found: SdScripts, kind: Kind, merged: Merged, gpu: Gpu | None
) -> tuple[Merged, list[Problem]]:
    """The configuration as sd-scripts runs it, and what its Python lacks."""
    values, problems = merged.values, []
    wanted = rules.modules(values)
    if values.get("xformers") and (gpu is None or found.lacks(["xformers"])):
        why = "xformers needs a GPU" if gpu is None else "xformers is not installed"
        merged = config.change(merged, {"xformers": False, "sdpa": True}, why)
    for module in found.lacks([*_LIBRARIES, *wanted]):
        where = merged.settings[wanted[module]].where if module in wanted else "trainer sd-scripts"
        wrong = f"{module} cannot be imported by {found.python}"
        fix = f"Type: {found.python} -m pip install {rules.package(module)}"
        problems.append(Problem(where, wrong, fix))
    for name, lacking in found.lacks_classes(rules.classes(values)).items():
        wrong = f"{lacking} cannot be imported by {found.python}"
        problems.append(Problem(merged.settings[name].where, wrong, "Correct its name"))
    if values.get("persistent_data_loader_workers") and not values.get("max_data_loader_n_workers"):
        why = "max_data_loader_n_workers is 0, and nothing can persist"
        merged = config.change(merged, {"persistent_data_loader_workers": False}, why)
    if kind == "sdxl" and values["mixed_precision"] == "fp16" and not values.get("no_half_vae"):
        merged = config.change(merged, {"no_half_vae": True}, "SDXL's VAE makes NaN in fp16")
    return config.change(merged, {"console_log_simple": True}, "the job"), problems


def _files(source: Source, storage: Storage) -> dict[str, File]:
    """Every file of a folder, by its path below it."""
    location = source.location
    if isinstance(location, S3Uri):
        return {safe_relative(item.uri, location): item for item in storage.list(location)}
    if not location.is_dir():
        raise Unfit([Problem(f"{source.where}: {location}", "it is not a folder", "Correct the path")])
    return {path.relative_to(location).as_posix(): path for path in _walk(location)}


def _walk(root: Path) -> Iterator[Path]:
    """Every file below a folder, through links to folders too, but never twice into the same one."""
    seen: set[Path] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        if (real := Path(folder).resolve()) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (path for name in files if (path := Path(folder, name)).is_file())


def _disk(model: ModelFile, files: Mapping[str, File], tree: Tree, scratch: Path) -> list[Problem]:
    """Whether what is fetched and what is made find room, and whether the results can be written."""
    fetched = sum(file.size for file in files.values() if isinstance(file, RemoteObject))
    if isinstance(model.file, RemoteObject) or model.streamed:
        fetched += model.size
    if model.member is not None:
        fetched += model.size
    problems = []
    for folder, needed, what in (
        (scratch, fetched + OUTPUT_BYTES, "the inputs and the trainer's files"),
        (tree.model, OUTPUT_BYTES, "the LoRAs"),
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


def _one_file(source: Source, endings: tuple[str, ...], what: str, storage: Storage) -> File:
    """The file that `source` names, or the only one with such an ending in the folder that it names.

    Raises Unfit where there is none or more than one, StorageError where S3 says no.
    """
    location = source.location
    where = f"{source.where}: {location}"
    if isinstance(location, S3Uri) and location.key.endswith(endings):
        return storage.head(location)
    if isinstance(location, Path) and location.is_file():
        return location
    if isinstance(location, Path) and not location.is_dir():
        raise Unfit([Problem(where, "there is no such file or folder", "Correct the path")])
    files = _files(source, storage)
    found = [file for name, file in sorted(files.items()) if name.endswith(endings)]
    if len(found) == 1:
        return found[0]
    if not found:
        wrong, fix = f"there is no {what} ({', '.join(endings)})", "Put the file there, or name it"
    else:
        names = ", ".join(_name(file).rsplit("/", 1)[-1] for file in found[:5])
        wrong, fix = f"there are {len(found)} files ({names})", f"Leave one, or name the {what} itself"
    raise Unfit([Problem(where, wrong, fix)])


def _size(file: File) -> int:
    return file.size if isinstance(file, RemoteObject) else file.stat().st_size


def _name(file: File) -> str:
    return str(file) if isinstance(file, Path) else str(file.uri)


@contextmanager
def _opened(file: File, storage: Storage) -> Iterator[BinaryIO]:
    """The file for reading, wherever it is."""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            yield opened
    else:
        yield cast(BinaryIO, io.BufferedReader(_Ranges(file, storage), 1 << 16))


class _Ranges(io.RawIOBase):
    """An object in S3 as a file that is read by ranges: a header of it costs the header's bytes."""

    def __init__(self, file: RemoteObject, storage: Storage) -> None:
        self._file, self._storage, self._position = file, storage, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        length = min(len(buffer), self._file.size - self._position)
        if length <= 0:
            return 0
        content = self._storage.read_range(self._file.uri, self._position, length)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
