"""entrypoint.captions: the tagger found, its pixels, its tags, and captions written where there are none."""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from entrypoint import captions, check, dataset
from entrypoint.captions import Tagger, find, write
from entrypoint.contract import Tree
from entrypoint.failures import Unfit
from entrypoint.files import Single
from entrypoint.inputs import Extras
from entrypoint.request import Captioning, resolve
from entrypoint.storage import Storage
from tests.tagger import TAGS, write_tagger

COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200), "black": (0, 0, 0)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tagger(tmp_path / "tagger")


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tagger | None]:
    """The tagger that is found for a job with some flags."""
    monkeypatch.delenv("TAGGER_DIR", raising=False)
    monkeypatch.setattr(captions, "BUILT_IN", tmp_path / "opt" / "tagger")

    def made(**flags: str) -> Tagger | None:
        flags = {"model_uri": "/m", "dataset_uri": "/d", **flags}
        words = [f"--{name}={value}" for name, value in flags.items()]
        return find(resolve(words, Tree(tmp_path / "ml"), Storage()), Storage())

    return made


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(Unfit) as raised:
        call()
    return str(raised.value)


def test_a_tagger_comes_from_its_uri_from_a_variable_or_with_the_image(
    asked: Callable[..., Tagger], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tagger = asked(caption="wd14", tagger_uri=str(folder))
    assert tagger.model == Single(folder / "model.onnx", streamed=False)
    assert tagger.tags == tuple((name, str(category)) for name, category, *_ in TAGS)
    assert tagger.asked == Captioning("flag --caption", 0.35, 0.85)
    write_tagger(tmp_path / "opt" / "tagger")
    assert asked(caption="wd14").model.file == tmp_path / "opt" / "tagger" / "model.onnx"
    monkeypatch.setenv("TAGGER_DIR", str(folder))
    assert asked(caption="wd14").model.file == folder / "model.onnx"
    monkeypatch.setenv("TAGGER_DIR", str(tmp_path / "none"))
    assert f"TAGGER_DIR: {tmp_path / 'none'}: it is not a folder" in refused(lambda: asked(caption="wd14"))


def test_a_tagger_in_a_channel_is_found(tmp_path: Path, folder: Path) -> None:
    data = tmp_path / "ml" / "input" / "data"
    data.mkdir(parents=True)
    (data / "tagger").symlink_to(folder)
    request = resolve(
        ["--model_uri=/m", "--dataset_uri=/d", "--caption=wd14"], Tree(tmp_path / "ml"), Storage()
    )
    tagger = find(request, Storage())
    assert tagger is not None
    assert tagger.where == f"channel tagger: {data / 'tagger'}"


def test_no_captions_asked_for(asked: Callable[..., Tagger | None], folder: Path) -> None:
    assert asked() is None
    said = refused(lambda: asked(tagger_uri=str(folder)))
    assert "flag --tagger_uri: there is a tagger, and nothing asks for captions. Add caption=wd14" in said


def test_no_tagger_anywhere(asked: Callable[..., Tagger | None]) -> None:
    said = refused(lambda: asked(caption="wd14"))
    assert "flag --caption: it asks for captions, and there is no tagger" in said
    assert "Add a channel tagger with model.onnx and selected_tags.csv, or type --tagger_uri=s3://" in said


def test_no_onnxruntime(
    asked: Callable[..., Tagger | None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    said = refused(lambda: asked(caption="wd14", tagger_uri=str(folder)))
    assert "pip install 'sagemaker-kohya[caption]'" in said


@pytest.mark.parametrize("name", ["model.onnx", "selected_tags.csv"])
def test_a_file_that_is_missing(asked: Callable[..., Tagger | None], folder: Path, name: str) -> None:
    (folder / name).rename(folder / "other")
    said = refused(lambda: asked(caption="wd14", tagger_uri=str(folder)))
    assert f"flag --tagger_uri: {folder}: there is no {name}; there are: " in said
    assert "other" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no column name and no category"),
        ("tag_id,name,count\n0,cat,1\n", "names no column category"),
        ("tag_id,name,category,count\n0,sensitive,9,1\n", "no tag is of the category 0"),
        ('tag_id,name,category,count\n0,"cat"s,0,1\n', "it is no list of tags"),
        ("tag_id,name,category,count\n0,cat,0,1\n1\n", "line 3 has no name or no category"),
    ],
)
def test_a_list_of_tags_that_is_none(
    asked: Callable[..., Tagger | None], folder: Path, text: str, said: str
) -> None:
    (folder / "selected_tags.csv").write_text(text)
    told = refused(lambda: asked(caption="wd14", tagger_uri=str(folder)))
    assert f"flag --tagger_uri: {folder / 'selected_tags.csv'}: " in told
    assert said in told


def test_a_tagger_that_is_fetched_needs_room(folder: Path, tmp_path: Path) -> None:
    size = (folder / "model.onnx").stat().st_size
    base, nothing = check.ModelFile(tmp_path / "base", 10**9, None, streamed=False), Extras({}, None, None)
    for streamed in (True, False):
        tagger = Tagger(Captioning(""), "", Single(folder / "model.onnx", streamed), ())
        assert check._to_fetch(base, [], nothing, tagger) == (size if streamed else 0)


class Pictures:
    """A data set, and the trainer's tree of it."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder, self.root, self.tagger = root / "data", root / "tree", self._tagger(folder)
        (self.folder / "1_cat").mkdir(parents=True)

    def _tagger(self, folder: Path) -> Tagger:
        rows = tuple((name, str(category)) for name, category, *_ in TAGS)
        return Tagger(Captioning("flag --caption"), "the tagger", Single(folder / "model.onnx", False), rows)

    def add(self, name: str, picture: Image.Image, caption: str | None = None) -> Path:
        path = self.folder / "1_cat" / name
        picture.save(path)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption)
        return path

    def write(self, tagger: Tagger | None = None) -> dict[str, str]:
        """The captions that were written, by path below the data set's root."""
        tagger = tagger or self.tagger
        given = {
            path.relative_to(self.folder).as_posix(): path
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }
        sizes = {name: path.stat().st_size for name, path in given.items()}
        data_set, wrong = dataset.inspect(sizes, str(self.folder), allow_missing_captions=True)
        assert wrong == []
        links = dataset.link(data_set, given, self.root)
        model = tagger.model.file
        assert isinstance(model, Path)
        made: dict[str, Path] = {}
        write(tagger, model, data_set, root=self.root, links=links, given=given, written=made)
        return {name: path.read_text() for name, path in made.items()}


@pytest.fixture
def pictures(tmp_path: Path, folder: Path) -> Pictures:
    return Pictures(tmp_path, folder)


def test_captions_are_written_where_there_are_none_and_nowhere_else(
    pictures: Pictures, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, colour in COLOURS.items():
        pictures.add(f"{name}.png", Image.new("RGB", (40, 40), colour))
    kept = pictures.add("own.png", Image.new("RGB", (40, 40), COLOURS["red"]), "my own words")
    before = sorted(pictures.folder.rglob("*"))

    made = pictures.write()

    assert made == {
        "1_cat/black.txt": "^_^\n",
        "1_cat/blue.txt": "azure (hero), blue square, ^_^\n",
        "1_cat/green.txt": "green square, ^_^\n",
        "1_cat/red.txt": "red square, ^_^\n",
    }
    assert sorted(pictures.folder.rglob("*")) == before
    assert kept.with_suffix(".txt").read_text() == "my own words"
    tree = pictures.root / "1_cat"
    assert (tree / "own.txt").read_text() == "my own words"
    assert (tree / "red.txt").read_text() == "red square, ^_^\n"
    said = capsys.readouterr().out
    assert (
        "prepare: 4 of 5 pictures without a caption; the tagger writes what is missing: general tags from "
        "0.35 on" in said
    )
    assert re.search(r"prepare: 4 captions written, \d+\.\d\d pictures/s", said)


def test_all_captions_are_there(pictures: Pictures, capsys: pytest.CaptureFixture[str]) -> None:
    """The model is not even loaded."""
    pictures.add("own.png", Image.new("RGB", (40, 40)), "my own words")
    model = pictures.tagger.model.file
    assert isinstance(model, Path)
    model.write_text("no model")
    assert pictures.write() == {}
    assert "0 of 1 picture without a caption" in capsys.readouterr().out


def test_no_captions_are_asked_for() -> None:
    nothing = dataset.DataSet((), ())
    made: dict[str, Path] = {}
    write(None, None, nothing, root=Path(), links={}, given={}, written=made)
    assert made == {}


def test_a_picture_without_any_likely_tag_gets_the_likeliest(
    pictures: Pictures, capsys: pytest.CaptureFixture[str]
) -> None:
    black = pictures.add("black.png", Image.new("RGB", (40, 40)))
    pictures.add("red.png", Image.new("RGB", (40, 40), COLOURS["red"]))
    tagger = replace(pictures.tagger, asked=Captioning("flag", general=0.9))
    assert pictures.write(tagger) == {"1_cat/black.txt": "^_^\n", "1_cat/red.txt": "red square\n"}
    said = capsys.readouterr().out
    assert f"no tag is likely enough, and the likeliest alone is the caption: {black} (^_^)\n" in said


def test_the_thresholds_count_each_for_its_own_tags() -> None:
    tags = (("a_cat", "0"), ("the_hero", "4"), ("sensitive", "9"))
    probabilities = np.array([0.5, 0.5, 1], np.float32)

    def caption(general: float, character: float) -> list[str]:
        tagger = Tagger(Captioning("", general, character), "", Single(Path(), False), tags)
        return tagger.caption(probabilities)[0]

    assert caption(0.5, 0.6) == ["a cat"]
    assert caption(0.6, 0.5) == ["the hero"]
    assert caption(0.5, 0.5) == ["the hero", "a cat"]


def test_many_pictures_in_batches_of_the_models_own_size(tmp_path: Path) -> None:
    """20 pictures: with a batch of any size, or one of 3 that the model insists on."""
    for number, size in enumerate(("n", 3)):
        root = tmp_path / str(number)
        pictures = Pictures(root, write_tagger(root / "tagger", shape=(size, 32, 32, 3)))
        for name in range(20):
            pictures.add(f"{name}.png", Image.new("RGB", (40, 40), [*COLOURS.values()][name % 3]))
        made = pictures.write()
        assert len(made) == 20
        assert made["1_cat/12.txt"] == "red square, ^_^\n"
        assert made["1_cat/19.txt"] == "green square, ^_^\n"


def test_a_folder_that_is_trained_twice_is_looked_at_once(pictures: Pictures, tmp_path: Path) -> None:
    path = pictures.add("a.png", Image.new("RGB", (40, 40), COLOURS["red"]))
    subset = dataset.Subset("0/cat", 1, (dataset.Picture("cat/a.png", None),), ".txt")
    data_set = dataset.DataSet((subset, replace(subset, folder="1/cat", caption_extension=".caption")), ())
    given = {"cat/a.png": path}
    links = dataset.link(data_set, given, tmp_path / "tree")
    model = pictures.tagger.model.file
    assert isinstance(model, Path)
    made: dict[str, Path] = {}
    write(pictures.tagger, model, data_set, root=tmp_path / "tree", links=links, given=given, written=made)
    assert made == {
        "cat/a.txt": tmp_path / "tree/0/cat/a.txt",
        "cat/a.caption": tmp_path / "tree/1/cat/a.caption",
    }
    assert {path.read_text() for path in made.values()} == {"red square, ^_^\n"}


def test_pixels(tmp_path: Path) -> None:
    """BGR from 0 to 255, turned as its EXIF says, in the middle of a white square, on white."""
    file = tmp_path / "wide.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of what is seen is on the left
    Image.new("RGB", (64, 32), (200, 100, 0)).save(file, quality=100, subsampling=0, exif=exif)
    pixels = captions._pixels(file, "wide.jpg", 16)
    assert pixels.shape == (16, 16, 3)
    assert pixels.dtype == np.float32
    assert (pixels[:, :4] == 255).all()
    assert (pixels[:, 12:] == 255).all()
    assert np.abs(pixels[:, 4:12] - (0, 100, 200)).max() <= 2
    clear = tmp_path / "clear.png"
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(clear)
    assert (captions._pixels(clear, "clear.png", 16) == 255).all()


@pytest.mark.parametrize(
    ("tag", "spelled"),
    [
        ("long_hair", "long hair"),
        ("azure_(hero)", "azure (hero)"),
        ("2023_(year)", "2023 (year)"),
        ("été_(season)", "été (season)"),
        # those that SmilingWolf's own page spares
        *(
            (face, face)
            for face in ["0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<"]
        ),
        *((face, face) for face in ["3_3", "6_9", ">_o", "@_@", "^_^", "o_o", "u_u", "x_x", "|_|", "||_||"]),
    ],
)
def test_spelling(tag: str, spelled: str) -> None:
    assert captions._spelled(tag) == spelled


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shape": ("n", 3, 32, 32)}, "it takes ['n', 3, 32, 32], and a WD14 tagger takes pictures as"),
        ({"shape": ("n", 32, 16, 3)}, "it takes ['n', 32, 16, 3]"),
        ({"tags": TAGS[:-1]}, "it gives 6 numbers, and selected_tags.csv has 7 tags"),
        ({"sigmoid": False}, "what it gives is no probability from 0 to 1"),
    ],
)
def test_a_model_that_is_no_tagger(pictures: Pictures, change: dict[str, object], said: str) -> None:
    model = pictures.tagger.model.file
    assert isinstance(model, Path)
    write_tagger(model.parent, **change)  # type: ignore[arg-type]
    pictures.add("a.png", Image.new("RGB", (40, 40)))
    told = refused(pictures.write)
    assert told.startswith(f"{model}: {said}")


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x08\x0a" * 99])
def test_a_model_that_is_damaged(
    pictures: Pictures, content: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    model = pictures.tagger.model.file
    assert isinstance(model, Path)
    model.write_bytes(content)
    pictures.add("a.png", Image.new("RGB", (40, 40)))
    told = refused(pictures.write)
    assert told.startswith(f"{model}: it cannot be loaded (")
    assert str(model) not in told.partition("(")[2]
    assert capfd.readouterr().err == ""


def test_a_model_that_does_not_run(pictures: Pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    """As onnxruntime says it, without its codes."""

    def run(*_: object) -> None:
        raise RuntimeError("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Got invalid dimensions for input: x")

    monkeypatch.setattr("onnxruntime.InferenceSession.run", run)
    pictures.add("a.png", Image.new("RGB", (40, 40)))
    said = f"{pictures.tagger.model.file}: it does not run (Got invalid dimensions for input: x). Give a WD14"
    assert refused(pictures.write).startswith(said)


def test_pictures_that_cannot_be_read_are_told_together(pictures: Pictures) -> None:
    for name in ("a.png", "b.png"):
        pictures.add(name, Image.new("RGB", (40, 40))).write_bytes(b"no picture")
    pictures.add("c.png", Image.new("RGB", (40, 40)))
    told = refused(pictures.write)
    assert "2 problems" in told
    assert f"{pictures.folder / '1_cat' / 'b.png'}: the picture cannot be read" in told
