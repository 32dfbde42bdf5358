"""The base model: found, told from its header before it is fetched, and handed over as one .safetensors file.

.safetensors   as it is
.ckpt          converted, without running any of it
.tar           ESD's early form: one of the two, taken out of it
"""

import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from entrypoint import checkpoint, ckpt, files, foreign, header
from entrypoint.checkpoint import Prediction
from entrypoint.console import say
from entrypoint.failures import Problem, Unfit
from entrypoint.files import File
from entrypoint.header import Header, NotABaseModel, Sparing, guarded, shown
from entrypoint.request import JobRequest, Source
from entrypoint.storage import Storage
from kohya.config import Kind, Merged

_MODELS = (".safetensors", ".ckpt")
_ENDINGS = (*_MODELS, ".tar")
_OTHERS = (  # what people give as well, and are told about
    "model_index.json", ".gguf", ".pt", ".pth", ".bin", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z",
)  # fmt: skip
_MEMBERS = 100  # in a tar, each of which costs a request to S3
_TAR_HEADERS = 1_000_000  # bytes
_ITSELF = "Give the model itself"
_UNTOLD = Prediction(None, False)


@dataclass(frozen=True)
class Member:
    """A file inside a tar: its bytes lie there in one piece."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class ModelFile:
    """The base model as it was found."""

    file: File
    size: int  # bytes
    member: Member | None  # where it lies inside a tar
    streamed: bool
    converted: int = 0  # bytes of the .safetensors that a .ckpt is made into
    prediction: Prediction = _UNTOLD

    @property
    def name(self) -> str:
        """Of the file that holds the tensors."""
        return files.name_of(self.file) if self.member is None else self.member.name

    @property
    def copied(self) -> int:
        """The bytes that `unpacked` puts on disk."""
        return self.converted + (0 if self.member is None else self.member.size)


def find(request: JobRequest, storage: Storage) -> tuple[ModelFile, Kind]:
    """The base model's file and, from its header, its kind. Raises Unfit and StorageError."""
    file = _file(request.model, storage)
    where = f"{request.model.where}: {files.name_of(file)}"
    try:
        with files.opened(file, storage) as opened:
            member, tensors, metadata = _read(opened, files.size(file), files.name_of(file))
        kind = checkpoint.identify(tensors)
    except NotABaseModel as error:
        raise Unfit([Problem(where, str(error), error.fix)]) from error
    except OSError as error:
        wrong, fix = f"it cannot be read ({error.strerror})", "Check its path and permissions"
        raise Unfit([Problem(where, wrong, fix)]) from error
    if request.kind not in (None, kind):
        wrong = f"it is an {kind} model, and the job asks for {request.kind}"
        raise Unfit([Problem(where, wrong, f"Give an {request.kind} model, or ask for {kind}")])
    name = files.name_of(file) if member is None else member.name
    converted = sum(map(header.size_of, tensors.values())) if name.endswith(".ckpt") else 0
    told = checkpoint.prediction(tensors, metadata)
    return ModelFile(file, files.size(file), member, request.model.streamed, converted, told), kind


def settle(model: ModelFile, where: str, merged: Merged) -> tuple[Merged, list[Problem]]:
    """Hold what the U-Net predicts against the configuration. Otherwise the LoRA is bad, with exit code 0."""
    told, values = model.prediction, merged.values
    at = f"{where}: {files.name_of(model.file)}"
    if told.v and not values.get("v_parameterization"):
        fix = "Write v_parameterization = true"
        if told.zero_snr and not values.get("zero_terminal_snr"):
            fix += " and zero_terminal_snr = true"
        wrong = "it is a v-prediction model, and without v_parameterization its LoRA would be bad"
        return merged, [Problem(at, wrong, fix)]
    notes = []
    if told.v is False and values.get("v_parameterization"):
        set_at = merged.settings["v_parameterization"].where
        notes.append(f"{set_at}: v_parameterization is set, and by its metadata {at} predicts noise, not v")
    if told.zero_snr and not values.get("zero_terminal_snr"):
        notes.append(f"{at} was trained with zero_terminal_snr, which is not set")
    return replace(merged, notes=(*merged.notes, *notes)), []


def unpacked(model: ModelFile, path: Path, folder: Path) -> Path:
    """The base model, fetched to `path`, as a .safetensors file: made in `folder`, if it is none yet.

    Raises Unfit where the file is not what it was when it was looked at, OSError where the disk says no.
    """
    if model.copied:
        say(f"prepare: the base model in {path.name} becomes one .safetensors file")
    try:
        if model.member is not None:
            ending = next(ending for ending in _MODELS if model.member.name.endswith(ending))
            taken = folder / f"model{ending}"  # nothing else of the member's name counts
            _take_out(path, model.member, taken)
            path = taken
        if model.name.endswith(".ckpt"):
            ckpt.convert(path, folder / "model.safetensors")
            if model.member is not None:
                path.unlink()
            path = folder / "model.safetensors"
    except NotABaseModel as error:
        raise Unfit([Problem(files.name_of(model.file), str(error), error.fix)]) from error
    return path


def _take_out(archive: Path, member: Member, target: Path) -> None:
    with archive.open("rb") as source, target.open("wb") as out:
        source.seek(member.offset)
        left = member.size
        while left and (chunk := source.read(min(left, 1 << 24))):
            out.write(chunk)
            left -= len(chunk)
    if left:
        raise NotABaseModel(
            f"the tar ends {left:,} bytes before {shown(member.name)} does", "Upload it again"
        )


def _file(source: Source, storage: Storage) -> File:
    """The one file that is the model. Raises Unfit, naming what lies there instead."""
    there = files.matching(source, _ENDINGS, "base model", storage, others=_OTHERS)
    paths = {name: PurePosixPath(name) for name in there}
    folders = {path.parent for path in paths.values() if path.name == "model_index.json"}
    folders |= {path.parent.parent for path in paths.values() if path.parent.name == "unet"}
    loose = {  # such a folder may hold the model as one file as well, beside its parts
        name: there[name]
        for name, path in paths.items()
        if name.endswith(_ENDINGS)
        and not path.name.startswith("._")  # of macOS
        and not any(folder in path.parent.parents for folder in folders)
    }
    if folders and not loose:
        wrong = "it is a model in diffusers' format, a folder of parts, and the job takes one file"
        raise Unfit([Problem(f"{source.where}: {source.location}", wrong, foreign.DIFFUSERS)])
    return files.sole(loose or there, source, "Leave one, or name the base model itself")


def _read(file: BinaryIO, size: int, name: str) -> tuple[Member | None, Header, Mapping[str, str]]:
    """The tensors of a model and its metadata; for a tar, where the model lies in it as well."""
    if not name.endswith(".tar"):
        return None, *_tensors(file, size, name)
    member = _member(file, size)
    file.seek(member.offset)
    inside = cast(BinaryIO, Sparing(file, member.size, header.MAX_HEADER + ckpt.MAX_READ))
    return member, *_tensors(inside, member.size, member.name)


def _tensors(file: BinaryIO, size: int, name: str) -> tuple[Header, Mapping[str, str]]:
    if name.endswith(".ckpt"):
        return ckpt.read_header(file, size), {}
    tensors, metadata = header.read(file, size)
    if not name.endswith(".safetensors"):  # by which sd-scripts decides how to load it (model_util.py:961)
        raise NotABaseModel("it is a safetensors file, and its name does not say so", "Name it .safetensors")
    return tensors, metadata


def _member(file: BinaryIO, size: int) -> Member:
    """The one model in a tar. Nothing is followed and nothing is written: a name in it leads nowhere."""
    if how := header.compression(file.read(8)):
        raise NotABaseModel(f"it is a tar compressed with {how}", "Unpack it, and give the model itself")
    file.seek(0)
    found: list[tarfile.TarInfo] = []
    with (
        guarded("tar"),
        tarfile.open(fileobj=cast(Any, Sparing(file, size, _TAR_HEADERS)), mode="r:") as archive,
    ):
        for number, member in enumerate(archive):
            if number == _MEMBERS:
                raise NotABaseModel(f"the tar holds more than {_MEMBERS} files", _ITSELF)
            if member.name.endswith(_MODELS) and not PurePosixPath(member.name).name.startswith("._"):
                found.append(member)
    if len(found) != 1:
        names = f" ({', '.join(shown(one.name) for one in found[:5])})" if found else ""
        wrong = (
            f"the tar holds {len(found)} files that end in {' or '.join(_MODELS)}{names}, and must hold one"
        )
        raise NotABaseModel(wrong, _ITSELF)
    member = found[0]
    if not member.isreg() or member.issparse():
        kind = "a sparse file" if member.isreg() else "a link, a device or a folder"
        raise NotABaseModel(f"{shown(member.name)} in the tar is {kind}, and no plain file", _ITSELF)
    return Member(member.name, member.offset_data, member.size)
