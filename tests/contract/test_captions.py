"""Captions and resizing on request: the whole job, and what is refused before anything is fetched."""

import errno
import json
import re
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import entrypoint.job
from entrypoint import record, stops
from entrypoint.captions import Probabilities, Tagger
from entrypoint.check import Plan, check
from entrypoint.contract import Tree
from entrypoint.failures import Unfit
from entrypoint.job import fetch, look, prepare, scratch
from entrypoint.request import resolve
from entrypoint.storage import S3Uri, Storage
from kohya.config import Kind
from tests.contract.test_job import ESD_TOML, assert_completed, put
from tests.harness import TINY, Job, esd_parameters, write_dataset
from tests.s3 import S3Server
from tests.tagger import write_tagger

CAPTIONS = {"0.txt": "red square, ^_^\n", "1.txt": "green square, ^_^\n", "3.txt": "^_^\n"}


@pytest.fixture
def uncaptioned(tmp_path: Path) -> Path:
    """Four pictures, of which one, the blue square, has a caption."""
    folder = write_dataset(tmp_path / "pictures")
    for name in CAPTIONS:
        (folder / "2_shape" / name).unlink()
    return folder


def test_captions_from_a_channel_and_resized_pictures(
    job: Job, base_models: dict[Kind, Path], uncaptioned: Path, tmp_path: Path
) -> None:
    """They are written for the trainer and kept for the user; channels are left as they are."""
    job.mount("model", base_models["sd15"])
    job.mount("dataset", uncaptioned)
    tagger = job.mount("tagger", write_tagger(tmp_path / "tagger"))
    job.configure("inputdataconfig", {"tagger": {"TrainingInputMode": "FastFile"}})
    job.configure("hyperparameters", {**TINY, "caption": "wd14", "resize": "64", "resize_crop": "true"})
    before = {path: path.read_bytes() for path in uncaptioned.rglob("*") if path.is_file()}

    result = job.run(f"--output_uri={tmp_path / 'out'}")

    assert_completed(result, job, "sd15")
    assert {path: path.read_bytes() for path in uncaptioned.rglob("*") if path.is_file()} == before
    kept = job.tree / "output" / "data" / "captions" / "2_shape"
    assert {path.name: path.read_text() for path in kept.iterdir()} == CAPTIONS
    assert (tmp_path / "out" / "captions" / "2_shape" / "0.txt").read_text() == CAPTIONS["0.txt"]
    assert f"prepare: 3 of 4 pictures without a caption; channel tagger: {tagger} writes what" in result.out
    assert "prepare: 4 of 4 pictures changed, cropped to at most 64×64 pixels" in result.out
    assert re.search(r"prepare: 3 captions written, \d+\.\d\d pictures/s", result.out)
    assert f"the captions are kept in {kept.parent}, where they can be corrected" in result.out
    assert job.record["captions_written"] == 3
    assert str(tagger / "model.onnx") in {item["path"] for item in job.record["inputs"]}
    assert f"fetch: reading {tagger / 'model.onnx'} once, in order" in result.out


@pytest.fixture
def here(
    tmp_path: Path, base_models: dict[Kind, Path], uncaptioned: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], int]]:
    """Run a job that asks for captions in this process, whose answer to signals is put back."""
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tmp_path / "ml"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    places = {"model": base_models["sd15"], "dataset": uncaptioned, "output": tmp_path / "out"}
    places["tagger"] = write_tagger(tmp_path / "tagger", shape=(1, 32, 32, 3))
    asked = {**TINY, "caption": "wd14", **{f"{name}_uri": str(path) for name, path in places.items()}}
    before = {number: signal.getsignal(number) for number in stops.SIGNALS}
    yield lambda: entrypoint.job.run([f"--{name}={value}" for name, value in asked.items()])
    for number, handler in before.items():
        signal.signal(number, handler)


def kept(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (folder / "captions" / "2_shape").iterdir()}


def test_a_stop_while_captions_are_written_keeps_those_that_are(
    here: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caption, asked = Tagger.caption, iter(range(9))

    def stopped_at_the_third(self: Tagger, probabilities: Probabilities) -> tuple[list[str], bool]:
        if next(asked) == 2:
            signal.raise_signal(signal.SIGTERM)
        return caption(self, probabilities)

    monkeypatch.setattr(Tagger, "caption", stopped_at_the_third)
    assert here() == 143
    written = {name: CAPTIONS[name] for name in ("0.txt", "1.txt")}
    assert kept(tmp_path / "ml" / "output" / "data") == kept(tmp_path / "out") == written
    record = json.loads((tmp_path / "ml" / "model" / "job.json").read_text())
    assert (record["result"], record["captions_written"]) == ("stopped", 2)


def test_captions_are_kept_when_what_comes_after_fails(
    here: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")

    monkeypatch.setattr("entrypoint.model.unpacked", full)
    assert here() == 1
    assert kept(tmp_path / "ml" / "output" / "data") == kept(tmp_path / "out") == CAPTIONS


@pytest.mark.parametrize(("form", "given"), [("api", "channel"), ("webui", "TAGGER_DIR"), ("webui", "uri")])
def test_esd_asks_for_captions(
    form: str,
    given: str,
    s3: S3Server,
    bucket: S3Uri,
    base_models: dict[Kind, Path],
    uncaptioned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The API puts its flag beside the parameters, the WebUI among those that also land in the TOML."""
    monkeypatch.delenv("TAGGER_DIR", raising=False)
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tagger, flags, tree = write_tagger(tmp_path / "tagger"), ["--trainer=builtin"], Tree(tmp_path / "ml")
    if given == "channel":
        (tree.base / "input" / "data").mkdir(parents=True)
        (tree.base / "input" / "data" / "tagger").symlink_to(tagger)
    elif given == "uri":
        flags.append(f"--tagger_uri={put(s3, bucket / 'tagger', tagger)}")
    else:
        monkeypatch.setenv("TAGGER_DIR", str(tagger))
    told = {
        "enable_wd14_tagger": True,
        "wd14_tagger_params": {"general_threshold": "0", "character_threshold": "0.9"},
    }
    put(s3, bucket / "dataset/shape/2_shape", uncaptioned / "2_shape")
    put(s3, bucket / "model/base.safetensors", base_models["sd15"])
    toml = ESD_TOML.replace("enable_wd14_tagger = false", "enable_wd14_tagger = true")
    put(s3, bucket / "kohya/train/1f/input/job.toml", toml if form == "webui" else ESD_TOML)
    parameters = esd_parameters(
        bucket / "custom/1f",
        bucket / "model/base.safetensors",
        bucket / "dataset/shape",
        bucket / "kohya/train/1f/input/job.toml",
        **(told if form == "api" else {"config_params": told}),
    )
    location = put(s3, bucket / "train/param-1f.json", parameters)
    storage, work = Storage(), tmp_path / "work"
    work.mkdir()
    job = record.Job(tree, work)

    request = resolve([*flags, f"--s3_location={location}", "--save_last_n_epochs="], tree, storage)
    inputs = fetch(check(request, tree, scratch(), storage), storage)
    prepare(inputs, look(inputs), None, job)

    assert {name: path.read_text() for name, path in job.captions.items()} == {
        f"2_shape/{name}": text for name, text in CAPTIONS.items()
    }
    assert (work / "dataset" / "2_shape" / "2.txt").read_text() == "a blue square, noise"
    said = capsys.readouterr().out
    assert "general tags from 0.35 on, characters from 0.9 on" in said
    assert "ESD's threshold 0 stands for the default" in said


Ask = Callable[..., "Plan | str"]


@pytest.fixture
def ask(tmp_path: Path, base_models: dict[Kind, Path], monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Check a job: the plan for it, or every problem with it."""
    monkeypatch.delenv("TAGGER_DIR", raising=False)

    def made(dataset: Path, *flags: str, **asked: str) -> Plan | str:
        asked = {"model_uri": str(base_models["sd15"]), "dataset_uri": str(dataset), **TINY, **asked}
        words = [*(f"--{name}={value}" for name, value in asked.items()), *flags]
        tree = Tree(tmp_path / "ml")
        try:
            return check(resolve(words, tree, Storage()), tree, tmp_path / "scratch", Storage())
        except Unfit as error:
            return str(error)

    return made


def test_missing_captions_are_no_problem_when_they_are_written(
    ask: Ask, uncaptioned: Path, tmp_path: Path
) -> None:
    told = ask(uncaptioned)
    assert isinstance(told, str)
    assert "3 without a caption" in told
    tagger = write_tagger(tmp_path / "tagger")
    assert isinstance(ask(uncaptioned, caption="wd14", tagger_uri=str(tagger)), Plan)
    described = '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "2_shape"\n'
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "data.toml").write_text(f'{described}caption_extension = ".txt"\n')
    more = {"config_uri": str(tmp_path / "config"), "dataset_config": "data.toml", "trainer": "sd-scripts"}
    for asked, refused in (({}, True), ({"caption": "wd14", "tagger_uri": str(tagger)}, False)):
        told = ask(uncaptioned, **more, **asked)
        assert ("3 without a caption" in str(told)) == refused


def test_a_tagger_in_s3(
    ask: Ask,
    s3: S3Server,
    bucket: S3Uri,
    uncaptioned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its list of tags is read, its model is not."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    tagger = write_tagger(tmp_path / "tagger")
    put(s3, bucket / "tagger", tagger)
    plan = ask(uncaptioned, caption="wd14", tagger_uri=str(bucket / "tagger"))
    assert isinstance(plan, Plan)
    assert plan.tagger is not None
    assert str(getattr(plan.tagger.model.file, "uri", "")) == str(bucket / "tagger" / "model.onnx")
    told = ask(uncaptioned, caption="wd14", tagger_uri=str(bucket / "none"))
    assert f"flag --tagger_uri: {bucket / 'none'}: there is no model.onnx and no selected_tags.csv" in str(
        told
    )


def test_what_is_refused_together(ask: Ask, uncaptioned: Path) -> None:
    told = ask(uncaptioned, "--alpha_mask", caption="wd14", resize="512", trainer="sd-scripts")
    assert isinstance(told, str)
    assert "flag --caption: it asks for captions, and there is no tagger" in told
    assert "flag --alpha_mask: alpha_mask trains where a picture is opaque" in told


@pytest.mark.parametrize(("value", "asked"), [("true", True), ('"true"', True), ("false", False)])
def test_esds_flag_in_the_toml_alone(
    ask: Ask, uncaptioned: Path, tmp_path: Path, base_models: dict[Kind, Path], value: str, asked: bool
) -> None:
    toml = ESD_TOML.replace("enable_wd14_tagger = false", f"enable_wd14_tagger = {value}")
    tables = '[training.wd14_tagger_params]\ngeneral_threshold = "0"\ncharacter_threshold = "0"\n'
    (tmp_path / "job.toml").write_text(toml + tables)
    parameters = esd_parameters(tmp_path / "out", base_models["sd15"], uncaptioned, tmp_path / "job.toml")
    (tmp_path / "p.json").write_text(parameters)
    tree = Tree(tmp_path / "ml")
    request = resolve(
        [f"--s3_location={tmp_path / 'p.json'}", "--trainer=builtin", "--save_last_n_epochs="],
        tree,
        Storage(),
    )
    with pytest.raises(Unfit) as raised:
        check(request, tree, tmp_path / "scratch", Storage())
    told = str(raised.value)
    flag = re.search(r"job.toml line \d+: enable_wd14_tagger: it asks for captions", told)
    assert (flag is not None) == asked
    assert ("3 without a caption" in told) != asked
    assert "general_threshold" not in told


def test_resized_pictures_find_room(
    ask: Ask, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused where the disk has room for all the rest, but not for what resizing makes."""
    monkeypatch.setattr(
        "entrypoint.resize.room", lambda request, files: 10**15 if request.resize and files else 0
    )
    assert isinstance(ask(pictures), Plan)
    told = ask(pictures, resize="64")
    assert isinstance(told, str)
    assert f"{tmp_path / 'scratch'}: the inputs and the trainer's files need 1,000,00" in told
