"""entrypoint.resize: what is changed, what is not, and how."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from entrypoint import files, resize
from entrypoint.contract import Tree
from entrypoint.failures import Unfit
from entrypoint.inputs import Extras
from entrypoint.request import JobRequest, resolve
from entrypoint.storage import Storage
from kohya import config, dataset_config
from kohya.config import Setting
from kohya.dataset_config import DatasetConfig


@pytest.fixture
def asked(tmp_path: Path) -> Callable[..., JobRequest]:
    def made(**flags: str) -> JobRequest:
        flags = {"model_uri": "/m", "dataset_uri": "/d", **flags}
        return resolve([f"--{name}={value}" for name, value in flags.items()], Tree(tmp_path), Storage())

    return made


class Pictures:
    """Pictures in a folder of the user's, and links to them in a trainer's tree."""

    def __init__(self, folder: Path) -> None:
        self.given: dict[str, files.File] = {}
        self.links: dict[Path, str] = {}
        self.folder, self.tree = folder / "given", folder / "tree"
        self.folder.mkdir()
        self.tree.mkdir()

    def add(self, name: str, picture: Image.Image, **how: object) -> Path:
        path = self.folder / name
        picture.save(path, **how)
        self.given[name] = path
        self.links[self.tree / name] = name
        (self.tree / name).symlink_to(path)
        return self.tree / name


@pytest.fixture
def pictures(tmp_path: Path) -> Pictures:
    return Pictures(tmp_path)


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    shape = (height, width, len(Image.new(mode, (1, 1)).getbands()))
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, shape, np.uint8).squeeze(), mode)


@pytest.mark.parametrize(
    ("size", "side", "crop", "becomes"),
    [
        ((1000, 500), 100, False, (200, 100)),
        ((500, 1000), 100, False, (100, 200)),
        ((1001, 333), 100, False, (301, 100)),
        ((100, 4000), 100, False, (100, 4000)),
        ((99, 4000), 100, False, (99, 4000)),
        ((1000, 500), 100, True, (100, 100)),
        ((1000, 90), 100, True, (90, 90)),
        ((50, 50), 100, True, (50, 50)),
    ],
)
def test_sizes(size: tuple[int, int], side: int, crop: bool, becomes: tuple[int, int]) -> None:
    assert resize.resized(size, side, crop) == becomes


@pytest.mark.parametrize(
    ("resize_to", "values", "said"),
    [
        ("512", {}, "with bucket_no_upscale a square picture is then trained at 512×512. With resize = 1024"),
        ("500", {}, "trained at 448×448"),
        ("512", {"bucket_no_upscale": False}, "pictures lose detail, and are enlarged again"),
        ("512", {"enable_bucket": False}, "pictures lose detail, and are enlarged again"),
        ("512", {"resolution": "1024,512"}, "resize = 512 is below resolution = 1024,512"),
        ("725", {"resolution": "1024,512"}, ""),  # a square has as many pixels
        ("512", {"resolution": "512"}, ""),
        ("1024", {}, ""),
    ],
)
def test_a_size_below_the_resolution_is_said(
    asked: Callable[..., JobRequest], resize_to: str, values: dict[str, object], said: str
) -> None:
    layer = [Setting(name, value, "flag") for name, value in values.items()]
    merged = config.merge("sdxl", [config.preset("sdxl"), layer])
    told = list(resize.notes(asked(resize=resize_to), merged, Extras({}, None, None)))
    assert bool(told) == bool(said)
    assert said in " ".join(told)
    assert list(resize.notes(asked(), merged, Extras({}, None, None))) == []


def test_a_size_below_a_dataset_configs_resolution_is_said_once_for_each(
    asked: Callable[..., JobRequest],
) -> None:
    tables = "".join(
        f"[[datasets]]\nresolution = {side}\n[[datasets.subsets]]\nimage_dir = 'cat'\n"
        for side in (512, 768, 768, 1024)
    )
    merged = config.merge("sdxl", [config.preset("sdxl")])
    described, wrong = dataset_config.read(tables, "x", merged.values)
    assert wrong == []
    told = " ".join(resize.notes(asked(resize="600"), merged, Extras({}, None, described)))
    assert told.count("is below resolution") == 2
    assert "= 768,768" in told
    assert "= 1024,1024" in told


def test_large_pictures_become_small_and_others_stay(
    asked: Callable[..., JobRequest], pictures: Pictures, capsys: pytest.CaptureFixture[str]
) -> None:
    large, small = noise(300, 200), noise(150, 100)
    link = pictures.add("large.jpg", large, quality=95)
    kept = pictures.add("small.png", small)
    caption = pictures.tree / "large.txt"
    before = {path: path.read_bytes() for path in pictures.folder.iterdir()}

    tree = resize.apply(asked(resize="100"), {**pictures.links, caption: "large.txt"}, pictures.given)

    assert tree == {link.with_suffix(".png"): "large.jpg", kept: "small.png", caption: "large.txt"}
    assert not link.is_symlink()
    assert not link.with_suffix(".png").is_symlink()
    assert kept.is_symlink()
    with Image.open(link.with_suffix(".png")) as made, Image.open(pictures.folder / "large.jpg") as source:
        assert made.format == "PNG"
        expected = source.resize((150, 100), Image.Resampling.LANCZOS)
        assert np.array_equal(np.asarray(made), np.asarray(expected))
    assert {path: path.read_bytes() for path in pictures.folder.iterdir()} == before
    said = capsys.readouterr().out
    assert (
        "prepare: 1 of 2 pictures changed, their shorter side brought to at most 100 pixels: 0.0 MB, " in said
    )
    assert " pictures/s" in said


def test_nothing_is_asked_for(asked: Callable[..., JobRequest], pictures: Pictures) -> None:
    link = pictures.add("large.png", noise(300, 200))
    assert resize.apply(asked(), pictures.links, pictures.given) == pictures.links
    assert link.is_symlink()
    assert resize.room(asked(), pictures.given) == 0


def test_a_square_out_of_the_middle(asked: Callable[..., JobRequest], pictures: Pictures) -> None:
    """Cropped alone where it is small already: not a value changes."""
    wide = noise(301, 100)
    link = pictures.add("wide.png", wide)
    pictures.add("square.png", noise(100, 100))
    tree = resize.apply(asked(resize="200", resize_crop="true"), pictures.links, pictures.given)
    assert set(tree.values()) == {"wide.png", "square.png"}
    assert (pictures.tree / "square.png").is_symlink()
    with Image.open(link) as made:
        assert np.array_equal(np.asarray(made), np.asarray(wide)[:, 100:200])


def test_exif_and_alpha_are_applied_to_small_pictures_too(
    asked: Callable[..., JobRequest], pictures: Pictures
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = pictures.add("turned.png", noise(40, 20), exif=exif)
    clear = pictures.add("clear.png", Image.new("RGBA", (8, 8), (10, 20, 30, 0)))
    half = pictures.add("half.png", Image.new("LA", (8, 8), (0, 128)))
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0])
    hole = pictures.add("hole.png", palette, transparency=0)
    resize.apply(asked(resize="100"), pictures.links, pictures.given)
    with Image.open(turned) as made:
        assert made.size == (20, 40)
        assert made.getexif().get(0x0112) is None
        expected = np.rot90(np.asarray(noise(40, 20)), -1)
        assert np.array_equal(np.asarray(made), expected)
    for path, value in ((clear, 255), (half, 127), (hole, 255)):
        assert not path.is_symlink()
        with Image.open(path) as made:
            assert made.mode == "RGB"
            assert (np.asarray(made) == value).all()


def test_16_bits_become_8(asked: Callable[..., JobRequest], pictures: Pictures) -> None:
    link = pictures.add("grey.png", Image.fromarray(np.full((80, 80), 0x4000, np.uint16)))
    resize.apply(asked(resize="64"), pictures.links, pictures.given)
    with Image.open(link) as made:
        assert made.mode == "RGB"
        assert (np.asarray(made) == 0x40).all()


def test_a_picture_that_is_linked_twice_is_stored_once(
    asked: Callable[..., JobRequest], pictures: Pictures
) -> None:
    link = pictures.add("large.jpg", noise(300, 200))
    other = pictures.tree / "other.jpg"
    other.symlink_to(pictures.folder / "large.jpg")
    pictures.links[other] = "large.jpg"
    tree = resize.apply(asked(resize="100"), pictures.links, pictures.given)
    assert tree == dict.fromkeys((link.with_suffix(".png"), other.with_suffix(".png")), "large.jpg")
    assert other.with_suffix(".png").resolve() == link.with_suffix(".png")


def test_pictures_that_cannot_be_read_are_told_together(
    asked: Callable[..., JobRequest], pictures: Pictures
) -> None:
    for name in ("a.png", "b.png"):
        pictures.add(name, noise(300, 200))
        (pictures.folder / name).write_bytes(b"no picture")
    with pytest.raises(Unfit) as raised:
        resize.apply(asked(resize="100"), pictures.links, pictures.given)
    assert "2 problems" in str(raised.value)
    assert f"{pictures.folder / 'b.png'}: the picture cannot be read" in str(raised.value)


def test_alpha_that_is_trained_with_is_not_taken_away(asked: Callable[..., JobRequest]) -> None:
    none = Extras({}, None, None)
    table = DatasetConfig({"datasets": [{"subsets": [{"alpha_mask": True}]}]}, ())
    mask = config.merge("sd15", [[Setting("alpha_mask", True, "flag --alpha_mask")]])
    described = config.merge("sd15", [[Setting("dataset_config", "d.toml", "flag --dataset_config")]])
    for merged, extras, where in (
        (mask, none, "flag --alpha_mask"),
        (described, Extras({}, None, table), "flag --dataset_config"),
    ):
        assert resize.problems(asked(), merged, extras) == []
        (problem,) = resize.problems(asked(resize="512"), merged, extras)
        assert problem.where == where
        assert "alpha_mask trains where a picture is opaque" in problem.wrong
    assert resize.problems(asked(resize="512"), config.merge("sd15", []), none) == []


def test_the_room_is_estimated(asked: Callable[..., JobRequest], tmp_path: Path) -> None:
    """From the side, or from the file's size where that is so small that the picture is."""
    given: dict[str, files.File] = {}
    for name, size in (("large.JPG", 1 << 20), ("small.png", 1 << 10), ("large.txt", 1 << 20)):
        (tmp_path / name).write_bytes(bytes(size))
        given[name] = tmp_path / name
    assert resize.room(asked(resize="512"), given) == 2.5 * 512 * 512 + 16 * 1024
