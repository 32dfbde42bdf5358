"""entrypoint.model: the base model found in a channel or in S3, told from a few bytes, and handed over."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save, save_file

from entrypoint import header, model
from entrypoint.contract import Tree
from entrypoint.failures import Unfit
from entrypoint.model import ModelFile, find, settle, unpacked
from entrypoint.request import JobRequest, resolve
from entrypoint.storage import RemoteObject, S3Uri, Storage
from kohya import config
from kohya.config import KINDS, Kind, Setting
from tests.unit.test_checkpoint import names_and_shapes


def tensors(kind: Kind) -> dict[str, np.ndarray]:
    """Every tensor of a base model, next to none of its numbers."""
    shapes = names_and_shapes(f"base_{kind}")
    first = "model.diffusion_model.input_blocks.0.0.weight"
    return {
        name: np.zeros([1, 4, 1, 1] if name == first else [min(1, *shape, 1)] * bool(shape), np.float16)
        for name, shape in shapes.items()
    }


def as_ckpt(kind: Kind) -> bytes:
    file = io.BytesIO()
    torch.save({"state_dict": {name: torch.from_numpy(it) for name, it in tensors(kind).items()}}, file)
    return file.getvalue()


def as_tar(members: Mapping[str, bytes], *more: tarfile.TarInfo, mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in more:
            archive.addfile(info)
    return file.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.fixture(scope="module")
def sd15() -> bytes:
    return save(tensors("sd15"))


def asked(where: object, tree: Path) -> JobRequest:
    flags = [f"--model_uri={where}", f"--dataset_uri={tree}", "--output_name=x"]
    return resolve(flags, Tree(tree / "ml"), Storage())


def told(where: Path) -> str:
    with pytest.raises(Unfit) as error:
        find(asked(where, where.parent), Storage())
    assert len(error.value.problems) == 1
    assert str(where) in error.value.problems[0].where
    return str(error.value)


def written(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["m.safetensors", "m.ckpt", "m.tar", "ckpt in a.tar"])
def test_every_form_becomes_one_safetensors_file(kind: Kind, form: str, tmp_path: Path) -> None:
    inside = as_ckpt(kind) if "ckpt" in form else save(tensors(kind))
    name = "models/m.ckpt" if "ckpt" in form else "../../m.safetensors"
    content = as_tar({"./read.me": b"x", "._m.safetensors": b"x", name: inside}) if ".tar" in form else inside
    folder = written(tmp_path / "channel", {form: content, ".cache/x.txt": b"x", "._m.ckpt": b"x"})
    found, told_kind = find(asked(folder, tmp_path), Storage())
    assert told_kind == kind
    (tmp_path / "work").mkdir()
    path = unpacked(found, folder / form, tmp_path / "work")
    assert path == (folder / form if form == "m.safetensors" else tmp_path / "work" / "model.safetensors")
    assert load_file(path).keys() == tensors(kind).keys()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["channel", "work"]


def test_what_is_put_on_disk_is_counted(tmp_path: Path, sd15: bytes) -> None:
    numbers = sum(it.nbytes for it in tensors("sd15").values())
    for name, content, copied in (
        ("a.safetensors", sd15, 0),
        ("a.tar", as_tar({"m.safetensors": sd15}), len(sd15)),
        ("a.ckpt", (pickled := as_ckpt("sd15")), numbers),
        ("b.tar", as_tar({"m.ckpt": pickled}), len(pickled) + numbers),
    ):
        (tmp_path / name).write_bytes(content)
        assert find(asked(tmp_path / name, tmp_path), Storage())[0].copied == copied, name


class FromMemory(Storage):
    """S3 with one object, and how much of it was read."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.content, self.read_bytes, self.requests = content, 0, 0

    def head(self, uri: S3Uri) -> RemoteObject:
        return RemoteObject(uri, len(self.content), "e")

    def read_range(self, uri: S3Uri, start: int, length: int) -> bytes:
        self.requests += 1
        self.read_bytes += length
        return self.content[start : start + length]


@pytest.mark.parametrize("form", ["safetensors", "ckpt", "tar"])
def test_a_model_in_s3_is_told_from_a_few_of_its_bytes(form: str, tmp_path: Path) -> None:
    """Its numbers, 40 MB of them, stay where they are."""
    whole = {**tensors("sd15"), "model_ema.x": np.zeros(20_000_000, np.float16)}
    content = save(whole)
    if form == "ckpt":
        file = io.BytesIO()
        torch.save({name: torch.from_numpy(it) for name, it in whole.items()}, file)
        content = file.getvalue()
    if form == "tar":
        content = as_tar({"a.txt": bytes(5_000_000), "m.safetensors": content})
    storage = FromMemory(content)
    _, kind = find(asked(f"s3://bucket/m.{form}", tmp_path), storage)
    assert kind == "sd15"
    assert storage.read_bytes < 3_000_000
    assert storage.requests < 30


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["model_index.json", "unet/a.safetensors", "vae/b.safetensors"], "in diffusers' format"),
        (["model_index.json", "transformer/a.safetensors", "vae/b.safetensors"], "in diffusers' format"),
        (["unet/a.safetensors", "unet/config.json", "vae/b.safetensors"], "in diffusers' format"),
        (["sub/model_index.json", "sub/unet/a.bin"], "convert_diffusers_to_original_sdxl.py"),
        (["a.safetensors", "b.ckpt"], "there are 2 files (a.safetensors, b.ckpt)"),
        (["a.txt"], "there is no base model (.safetensors, .ckpt, .tar)"),
        (["a.gguf"], "it is not a safetensors file"),
        (["a.bin", "b.bin"], "there are 2 files"),
    ],
)
def test_folders(files: list[str], said: str, tmp_path: Path) -> None:
    assert said in told(written(tmp_path / "m", dict.fromkeys(files, b"words " * 9)))


@pytest.mark.parametrize(
    "ending", [".gguf", ".pt", ".pth", ".bin", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z"]
)
def test_what_people_give_as_well_is_told_as_what_it_is(ending: str, tmp_path: Path) -> None:
    said = told(written(tmp_path / "m", {f"model{ending}": b"\x1f\x8b\x08" + bytes(64)}))
    assert f"model{ending}: it is compressed with gzip. Unpack it, and give the model itself" in said


def test_a_path_that_leads_nowhere(tmp_path: Path) -> None:
    assert "m.ckpt: there is no such file or folder. Correct the path." in told(tmp_path / "m.ckpt")


def test_one_file_beside_a_diffusers_folders_parts_is_the_model(tmp_path: Path, sd15: bytes) -> None:
    names = ["model_index.json", "unet/a.safetensors", "text_encoder/b.safetensors", "vae/c.safetensors"]
    folder = written(tmp_path / "m", {**dict.fromkeys(names, b"x"), "m.safetensors": sd15})
    assert find(asked(folder, tmp_path), Storage())[0].file == folder / "m.safetensors"


def test_a_name_that_sd_scripts_would_load_as_a_pickle(tmp_path: Path, sd15: bytes) -> None:
    (tmp_path / "m.pt").write_bytes(sd15)
    assert "Name it .safetensors" in told(tmp_path / "m.pt")


def test_tars_that_hold_no_one_model(tmp_path: Path, sd15: bytes) -> None:
    whole = as_tar({"m.safetensors": sd15})
    cases: dict[str, bytes] = {
        "holds 0 files": as_tar({"a.txt": b"x", "a.tar": whole}),
        "holds 2 files that end in .safetensors or .ckpt (a.safetensors, b/c.ckpt)": as_tar(
            {"a.safetensors": sd15, "b/c.ckpt": b"x"}
        ),
        "m.safetensors in the tar is a link": as_tar({}, link("m.safetensors", "/etc/passwd")),
        "x.ckpt in the tar is a link": as_tar({"a": sd15}, link("x.ckpt", "a", tarfile.LNKTYPE)),
        "d.ckpt in the tar is a link, a device or a folder": as_tar({}, link("d.ckpt", "", tarfile.CHRTYPE)),
        "f.ckpt in the tar is a link, a device or a folder": as_tar({}, link("f.ckpt", "", tarfile.FIFOTYPE)),
        "e.ckpt in the tar is a link, a device or a folder": as_tar({}, link("e.ckpt", "", tarfile.DIRTYPE)),
        "holds more than 100 files": as_tar(dict.fromkeys(map(str, range(101)), b"")),
        "a tar compressed with gzip": as_tar({"m.safetensors": sd15}, mode="w:gz"),
        "a tar compressed with bzip2": as_tar({"m.safetensors": sd15}, mode="w:bz2"),
        "a tar compressed with xz": as_tar({"m.safetensors": sd15}, mode="w:xz"),
        "it is no tar, or a damaged one (ReadError": b"words " * 1000,
        "it is no tar, or a damaged one (ReadError: e": b"",
        "it is no tar, or a damaged one (ReadError: un": whole[:2000],
        "no sensible header length": as_tar({"m.safetensors": b"words " * 9}),
        "cut off or damaged": as_tar({"m.safetensors": sd15[:-1]}),
        "calls os.system": as_tar({"m.ckpt": _hostile()}),
    }
    for said, content in cases.items():
        (tmp_path / "m.tar").write_bytes(content)
        assert said in told(tmp_path / "m.tar"), said


def _hostile() -> bytes:
    from tests.unit.test_ckpt import with_pickle  # noqa: PLC0415

    return with_pickle(b"cos\nsystem\n.")


def test_a_tar_cut_off_within_its_model_alone(tmp_path: Path, sd15: bytes) -> None:
    whole = as_tar({"m.safetensors": sd15})
    (tmp_path / "m.tar").write_bytes(whole[: 512 + len(sd15) - 1])
    assert "a damaged one (ReadError: unexpected end of data)" in told(tmp_path / "m.tar")


def test_a_sparse_file_in_a_tar(tmp_path: Path) -> None:
    info = tarfile.TarInfo("m.safetensors")
    info.size, info.pax_headers = 0, {"GNU.sparse.map": "0,0", "GNU.sparse.size": "10"}
    (tmp_path / "m.tar").write_bytes(as_tar({}, info, mode="w"))
    assert "m.safetensors in the tar is a sparse file" in told(tmp_path / "m.tar")


def test_a_tar_whose_headers_ask_for_too_much(tmp_path: Path) -> None:
    info = tarfile.TarInfo("m.safetensors")
    info.pax_headers = {"comment": "x" * 2_000_000}
    (tmp_path / "m.tar").write_bytes(as_tar({}, info))
    assert "larger than that of any model" in told(tmp_path / "m.tar")


def test_a_file_that_changed_since_it_was_looked_at(tmp_path: Path, sd15: bytes) -> None:
    whole = as_tar({"m.safetensors": sd15})
    (tmp_path / "m.tar").write_bytes(whole)
    found, _ = find(asked(tmp_path / "m.tar", tmp_path), Storage())
    (tmp_path / "m.tar").write_bytes(whole[:1000])
    with pytest.raises(Unfit, match=r"bytes before m\.safetensors does"):
        unpacked(found, tmp_path / "m.tar", tmp_path)


def test_another_kind_and_a_file_that_cannot_be_read(tmp_path: Path, sd15: bytes) -> None:
    (tmp_path / "m.safetensors").write_bytes(sd15)
    request = asked(tmp_path / "m.safetensors", tmp_path)
    with pytest.raises(Unfit, match="it is an sd15 model, and the job asks for sdxl"):
        find(type(request)(**{**vars(request), "kind": "sdxl"}), Storage())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(header, "read", _denied)
        assert "it cannot be read (Permission denied)" in told(tmp_path / "m.safetensors")


def _denied(*_: object) -> Any:
    raise PermissionError(13, "Permission denied")


def merged_with(**values: object) -> config.Merged:
    layer = [Setting(name, value, f"flag --{name}") for name, value in values.items()]
    return config.merge("sdxl", [config.preset("sdxl"), layer])


@pytest.mark.parametrize(
    ("v", "zero_snr", "values", "problem", "note"),
    [
        (None, False, {}, "", ""),
        (None, False, {"v_parameterization": True}, "", ""),
        (False, False, {}, "", ""),
        (True, False, {"v_parameterization": True}, "", ""),
        (True, False, {}, "Write v_parameterization = true.", ""),
        (True, False, {"v_parameterization": False}, "Write v_parameterization = true.", ""),
        (True, True, {}, "Write v_parameterization = true and zero_terminal_snr = true.", ""),
        (True, True, {"zero_terminal_snr": True}, "Write v_parameterization = true.", ""),
        (True, True, {"v_parameterization": True}, "", "trained with zero_terminal_snr"),
        (True, True, {"v_parameterization": True, "zero_terminal_snr": True}, "", ""),
        (False, False, {"v_parameterization": True}, "", "flag --v_parameterization: v_parameterization is"),
    ],
)
def test_a_v_prediction_model_wants_v_parameterization(
    v: bool | None, zero_snr: bool, values: dict[str, object], problem: str, note: str
) -> None:
    file = ModelFile(Path("m.safetensors"), 1, None, False, 0, model.Prediction(v, zero_snr))
    before = merged_with(**values)
    merged, problems = settle(file, "channel model", before)
    assert [str(one).rpartition("bad. ")[2] for one in problems] == [problem] * bool(problem)
    assert [note in one for one in merged.notes[len(before.notes) :]] == [True] * bool(note)


def test_a_v_prediction_model_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({**tensors("sdxl"), "v_pred": np.zeros(0), "ztsnr": np.zeros(0)}, path)
    assert find(asked(path, tmp_path), Storage())[0].prediction == model.Prediction(True, True)
    save_file(tensors("sdxl"), path, {"modelspec.prediction_type": "epsilon"})
    assert find(asked(path, tmp_path), Storage())[0].prediction == model.Prediction(False, False)
