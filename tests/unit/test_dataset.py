import gc
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from entrypoint import files
from entrypoint.dataset import DataSet, Picture, as_given, inspect, inspect_folders, link, places
from entrypoint.failures import StorageError, Unfit
from entrypoint.request import Source
from entrypoint.storage import RemoteObject, S3Uri, Storage
from entrypoint.storage.objects import safe_relative
from kohya.dataset_config import Folder
from kohya.problem import Problem


def look(*paths: str, allow_missing_captions: bool = False) -> tuple[DataSet, list[Problem]]:
    """The data set that a listing of files of 10 bytes shows."""
    sizes = dict.fromkeys(paths, 10)
    return inspect(sizes, "s3://b/cats", allow_missing_captions=allow_missing_captions)


def named(data_set: DataSet) -> list[str]:
    """Every file that training needs."""
    found = (name for subset in data_set.subsets for picture in subset.pictures
             for name in (picture.path, picture.caption))  # fmt: skip
    return [name for name in found if name is not None]


def told(*paths: str) -> str:
    return " ".join(map(str, look(*paths)[1]))


def test_folders_with_numbers_are_taken_as_they_are() -> None:
    data_set, problems = look(
        "10_cat/a.png", "10_cat/a.txt", "2_dog/b.JPG", "2_dog/b.txt", "3/c.webp", "3/c.txt"
    )
    assert problems == []
    assert [(subset.folder, subset.repeats) for subset in data_set.subsets] == [
        ("10_cat", 10),
        ("2_dog", 2),
        ("3", 3),
    ]
    assert (data_set.pictures, data_set.repeated) == (3, 15)
    assert named(data_set) == [
        "10_cat/a.png",
        "10_cat/a.txt",
        "2_dog/b.JPG",
        "2_dog/b.txt",
        "3/c.webp",
        "3/c.txt",
    ]


def test_a_flat_folder_is_wrapped_and_said() -> None:
    data_set, problems = look("a.png", "a.txt")
    assert problems == []
    assert data_set.subsets[0].folder == "10_cats"
    assert data_set.repeated == 10
    assert "taken as 10_cats" in data_set.notes[0]


@pytest.mark.parametrize("name", ["cat", "10cat", "_cat", "-1_cat"])
def test_a_folder_that_sd_scripts_would_skip_is_named(name: str) -> None:
    said = told(f"{name}/a.png", f"{name}/a.txt")
    assert f"s3://b/cats/{name}: the folder's name does not say how often to repeat its 1 picture" in said


def test_zero_repeats_are_refused() -> None:
    assert "repeated 0 times" in told("0_cat/a.png", "0_cat/a.txt")


def test_pictures_beside_and_below_the_folders_are_refused() -> None:
    said = told("1_cat/a.png", "1_cat/a.txt", "b.png", "1_cat/more/c.png")
    assert "does not look beside the folders, and would leave out 1 picture (b.png)" in said
    assert "s3://b/cats/1_cat/more: sd-scripts does not look this deep, and would leave out 1 picture" in said


def test_a_folder_that_was_copied_one_level_too_deep_is_to_be_moved_up() -> None:
    assert "Move 10_cat up, right below s3://b/cats." in told(
        "pictures/10_cat/a.png", "pictures/10_cat/a.txt"
    )


def test_no_picture_at_all() -> None:
    assert "there is no picture" in told()
    assert "among its 2 files" in told("1_cat/a.gif", "1_cat/a.txt")


def test_hidden_files_are_not_looked_at() -> None:
    assert look("1_cat/a.png", "1_cat/a.txt", "1_cat/.b.png", ".trash/c.png", "1_cat/.DS_Store")[1] == []


def test_missing_captions_are_counted_and_named_unless_allowed() -> None:
    paths = ("1_cat/a.png", "1_cat/b.png", "1_cat/b.txt", "1_cat/c.png", "1_cat/d.png", "1_cat/e.png")
    said = " ".join(map(str, look(*paths)[1]))
    assert (
        "of 5 pictures, 4 without a caption in a .txt file of the same name: a.png, c.png, d.png, …" in said
    )
    assert "allow_missing_captions=true" in said
    data_set, problems = look(*paths, allow_missing_captions=True)
    assert problems == []
    assert data_set.pictures == 5


@pytest.mark.parametrize("ending", [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".PNG"])
def test_pictures_that_sd_scripts_reads(ending: str) -> None:
    data_set, problems = look(f"1_cat/a{ending}", "1_cat/a.txt")
    assert (data_set.pictures, problems) == (1, [])


@pytest.mark.parametrize("ending", [".avif", ".gif", ".heic", ".heif", ".jfif", ".jxl", ".tif", ".tiff"])
def test_pictures_that_sd_scripts_does_not_read(ending: str) -> None:
    said = told("1_cat/a.png", "1_cat/a.txt", f"1_cat/b{ending}")
    assert f"would leave out 1 picture (b{ending}). Save them as .png or .jpg, or take them out" in said


@pytest.mark.parametrize("ending", [".caption", ".tags", ".cap"])
def test_endings_that_tools_give_their_captions(ending: str) -> None:
    assert f"it has a {ending} file. Set caption_extension={ending}" in told("1_a/a.png", f"1_a/a{ending}")
    notes = look("1_a/a.png", "1_a/a.txt", f"1_a/b{ending}")[0].notes
    assert notes == (f"left out: 1 caption without a picture (b{ending})",)


@pytest.mark.parametrize("name", ["__MACOSX/a.png", "@eaDir/a.png", "Thumbs.db", "desktop.ini", ".a.png"])
def test_files_that_no_person_put_there(name: str) -> None:
    data_set, problems = look("1_cat/a.png", "1_cat/a.txt", name)
    assert problems == []
    assert data_set.notes == (f"left out: 1 hidden file ({Path(name).name})",)


def test_captions_of_another_ending_are_missing() -> None:
    assert "without a caption" in told("1_cat/a.png", "1_cat/a.caption")
    sizes = {"1_cat/a.png": 10, "1_cat/a.caption": 10}
    assert inspect(sizes, "x", caption_extension=".caption")[1] == []


@pytest.mark.parametrize(
    ("extension", "name"), [(".TXT", "a.TXT"), (".cap.txt", "a.cap.txt"), ("txt", "a.txt")]
)
def test_captions_keep_the_ending_that_the_trainer_looks_for(
    extension: str, name: str, tmp_path: Path
) -> None:
    data_set, problems = inspect({"1_cat/a.png": 10, f"1_cat/{name}": 10}, "x", caption_extension=extension)
    assert problems == []
    links = link(data_set, {path: tmp_path / path for path in named(data_set)}, tmp_path / "tree")
    assert {path.name for path in links} == {"a.png", name}


def test_an_empty_caption_is_refused() -> None:
    problems = inspect({"1_cat/a.png": 10, "1_cat/a.txt": 0}, "x")[1]
    assert "1 empty caption (a.txt)" in str(problems[0])


def test_two_pictures_that_share_a_caption_are_refused() -> None:
    assert "2 pictures (a.jpg, a.png) with the same name" in told("1_cat/a.png", "1_cat/a.jpg", "1_cat/a.txt")


def test_folders_that_a_dataset_config_names(tmp_path: Path) -> None:
    def folder(image_dir: str, extension: str = ".txt", **more: bool) -> Folder:
        facts = {"is_reg": False, "has_class": False, **more}
        return Folder(image_dir, "data.toml", repeats=3, caption_extension=extension, **facts)

    sizes = dict.fromkeys(("a.png", "a.txt", "deep/er/b.png", "deep/er/b.cap", "deep/er/b.txt"), 10)
    wanted = [folder("."), folder("deep/er"), folder("deep/er", ".cap")]
    data_set, problems = inspect_folders(sizes, "s3://b/My cats", wanted)
    assert problems == []
    assert (data_set.pictures, data_set.repeated, data_set.bytes) == (2, 9, 40)
    links = link(data_set, {name: tmp_path / name for name in sizes}, tmp_path / "tree")
    assert {path.relative_to(tmp_path / "tree").as_posix(): name for path, name in links.items()} == {
        "0/My_cats/a.png": "a.png",
        "0/My_cats/a.txt": "a.txt",
        "1/er/b.png": "deep/er/b.png",
        "1/er/b.txt": "deep/er/b.txt",
        "2/er/b.png": "deep/er/b.png",
        "2/er/b.cap": "deep/er/b.cap",
    }
    said = str(inspect_folders(sizes, "s3://b/cats", [folder("deep")])[1][0])
    assert 'no picture is right inside the folder "deep" of s3://b/cats' in said
    assert "there are: ., deep/er" in said
    assert "without a caption" in str(inspect_folders(sizes, "x", [folder(".", ".cap")])[1][0])
    said = str(inspect_folders({**sizes, "a.png": 0}, "x", [folder(".")])[1][0])
    assert said == "x/.: 1 picture (a.png) with 0 bytes. Upload them again, or take them out."
    for stands_in in ("is_reg", "has_class"):
        assert inspect_folders(sizes, "x", [folder(".", ".cap", **{stands_in: True})])[1] == []


def test_regularisation_pictures_are_not_wrapped() -> None:
    assert "does not look beside the folders" in str(
        inspect({"a.png": 10, "a.txt": 10}, "x", flat=False)[1][0]
    )


def test_the_tree_links_to_the_files_and_leaves_them_alone(tmp_path: Path) -> None:
    source = tmp_path / "channel"
    for name in ("a.JPG", "A.TXT", "b.png", "b.txt"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    files = {path.name: path for path in source.iterdir()}
    data_set, problems = inspect(dict.fromkeys(files, 5), "/data/My cats!")
    assert problems == []
    root = tmp_path / "tree"
    links = link(data_set, files, root)
    assert links[root / "10_My_cats" / "a.jpg"] == "a.JPG"
    told = as_given(
        f"{root}/10_My_cats/a.jpg cannot be read",
        {str(path): f"s3://b/{name}" for path, name in links.items()},
    )
    assert told == "s3://b/a.JPG cannot be read"
    made = {path.relative_to(root).as_posix(): path.read_text() for path in root.rglob("*.*")}
    assert made == {
        "10_My_cats/a.jpg": "a.JPG",
        "10_My_cats/a.txt": "A.TXT",
        "10_My_cats/b.png": "b.png",
        "10_My_cats/b.txt": "b.txt",
    }
    (root / "10_My_cats" / "a.npz").write_text("cache")
    assert sorted(path.name for path in source.iterdir()) == ["A.TXT", "a.JPG", "b.png", "b.txt"]


def test_pictures_of_a_kind_that_is_not_read_are_told() -> None:
    sizes = {"10_cat/a.png": 9, "10_cat/a.txt": 9, "10_cat/b.heic": 9, "10_cat/c.GIF": 9}
    _, problems = inspect(sizes, "data")
    assert len(problems) == 1
    assert "would leave out 2 pictures (b.heic, c.GIF)" in str(problems[0])


def test_what_is_no_part_of_the_data_set_is_said_in_a_line_a_kind() -> None:
    data_set, problems = look(
        "1_cat/a.png", "1_cat/a.txt", "1_cat/a_0512x0512_sd.npz", "1_cat/b.txt", "1_cat/c.txt",
        "1_cat/.DS_Store", "1_cat/._a.png", "__MACOSX/1_cat/a.png", "1_cat/Thumbs.db", "meta_cap.json",
        "README",
    )  # fmt: skip
    assert problems == []
    assert named(data_set) == ["1_cat/a.png", "1_cat/a.txt"]
    assert data_set.notes == (
        "left out: 4 hidden files (.DS_Store, ._a.png, Thumbs.db, …)",
        "left out: 1 latent cache (a_0512x0512_sd.npz)",
        "left out: 2 captions without a picture (b.txt, c.txt)",
        "left out: 2 other files (README, meta_cap.json)",
    )
    assert look("1_cat/a.png", "1_cat/a.txt")[0].notes == ()


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (("1_cat/a.png", "1_cat/a.caption"), "it has a .caption file. Set caption_extension=.caption"),
        (("1_cat/a.png", "1_cat/a.png.txt"), "it has a .png.txt file. Set caption_extension=.png.txt"),
        (
            ("1_cat/a.png", "1_cat/A.CAPTION", "1_cat/b.png", "1_cat/b.caption", "1_cat/c.png"),
            "2 have a .caption file. Set caption_extension=.caption, or rename the captions to .txt",
        ),
        (("1_cat/a.png",), "a.png. Add the captions, or set allow_missing_captions=true"),
    ],
)
def test_captions_with_another_ending_are_found(paths: tuple[str, ...], said: str) -> None:
    assert said in told(*paths)


def test_pictures_without_a_byte_are_refused() -> None:
    problems = inspect({"1_cat/a.png": 0, "1_cat/a.txt": 5, "1_cat/b.png": 1, "1_cat/b.txt": 5}, "x")[1]
    assert str(problems[0]).startswith("x/1_cat: 1 picture (a.png) with 0 bytes. Upload them again")


def test_names_that_differ_in_case_alone_are_refused() -> None:
    said = told("1_cat/A.png", "1_cat/A.txt", "1_cat/a.png", "1_cat/a.txt")
    assert "2 pictures (A.png, a.png) whose names differ in upper and lower case alone" in said
    assert look("1_Cat/a.png", "1_Cat/a.txt", "1_cat/a.png", "1_cat/a.txt")[1] == []


def test_a_folder_counts_its_bytes() -> None:
    data_set, _ = look("1_cat/a.png", "1_cat/a.txt", "1_cat/b.txt")
    assert data_set.subsets[0].bytes == 20


def test_a_long_name_leaves_room_for_the_repeats() -> None:
    data_set, _ = inspect({"a.png": 1, "a.txt": 1}, "/data/" + "x" * 255)
    assert len(data_set.subsets[0].folder) < 255


NAMES = st.text(
    st.sampled_from("ab.A_1 é\udc80/\\\n") | st.characters(), min_size=1, max_size=20
)  # a surrogate stands for a byte that is no text


@given(st.lists(NAMES, max_size=6), st.sampled_from([".txt", ".png.txt", "caption"]))
@example(["\udc80"], ".txt")
@settings(max_examples=200, deadline=None)
def test_no_key_leaves_the_tree_or_stops_the_report(keys: list[str], extension: str) -> None:
    """Whatever keys there are: each is refused, or becomes a file right where it belongs."""
    folder = S3Uri("b", "cats")
    paths = []
    for key in keys:
        for name in (key, f"1_cat/{key}.png", f"1_cat/{key}.txt"):
            try:
                paths.append(safe_relative(S3Uri("b", f"cats/{name}"), folder))
            except StorageError:
                continue
    root = Path("/tree")
    for path in paths:
        assert (root / path).parts == (*root.parts, *path.split("/"))
    for wrapped in (True, False):
        data_set, _ = inspect(dict.fromkeys(paths, 1), str(folder), caption_extension=extension, flat=wrapped)
        folders = {root / subset.folder for subset in data_set.subsets}
        for _, picture, caption in places(data_set, root):
            for place in (picture, caption):
                assert place.parent in folders
                assert place.parent.parent == root
                assert ".." not in place.parts
        assert set(named(data_set)) <= set(paths)
        listed = list(dict.fromkeys(paths))
        assert {listed[place] for place in data_set.places} == set(named(data_set))


class Bucket(Storage):
    """One that lists these keys."""

    def __init__(self, *keys: str) -> None:
        super().__init__()
        self.keys = keys

    def list(self, folder: S3Uri) -> Iterator[RemoteObject]:
        return (RemoteObject(S3Uri(folder.bucket, key), 1, 32 * "e") for key in self.keys)


def test_a_path_that_is_no_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(Unfit) as caught:
            files.listing(Source(path, "flag --dataset_uri"), Storage())
        assert str(caught.value) == f"flag --dataset_uri: {path}: it is not a folder. Correct the path."


def test_every_key_that_leaves_its_folder_is_told() -> None:
    source = Source(S3Uri("b", "cats"), "dataset_uri")
    assert list(files.listing(source, Bucket("cats/1_a/b.png"))) == ["1_a/b.png"]
    with pytest.raises(Unfit) as caught:
        files.listing(source, Bucket("cats/../x.png", "cats/a.png", "cats//y.png"))
    assert [problem.wrong for problem in caught.value.problems] == [
        "the key leads out of its folder",
        "the key holds an empty name between slashes",
    ]
    with pytest.raises(Unfit) as caught:
        files.listing(source, Bucket(*(f"cats/../{number}.png" for number in range(30))))
    assert len(caught.value.problems) == 21
    assert str(caught.value.problems[-1]) == "s3://b/cats: 10 more keys are unfit. Rename these first."


def test_a_listing_is_the_folder_on_disk(tmp_path: Path) -> None:
    for name in ("1_cat/b.png", "1_cat/a.png", "1_cat.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = files.listing(Source(tmp_path, "dataset_uri"), Storage())
    assert list(found.items()) == [
        (name, tmp_path / name) for name in ("1_cat.txt", "1_cat/a.png", "1_cat/b.png")
    ]
    assert dict(found.sizes) == {"1_cat.txt": 9, "1_cat/a.png": 11, "1_cat/b.png": 11}


def test_pictures_are_a_sequence() -> None:
    data_set, _ = look("1_cat/a.png", "1_cat/a.txt", "1_cat/b.png", allow_missing_captions=True)
    a, b = Picture("1_cat/a.png", "1_cat/a.txt"), Picture("1_cat/b.png", None)
    pictures = data_set.subsets[0].pictures
    assert (len(pictures), list(pictures), pictures[-1], list(pictures[1:])) == (2, [a, b], b, [b])
    with pytest.raises(IndexError):
        pictures[2]


def test_a_captioned_picture_takes_less_than_200_bytes() -> None:
    count = 5000
    keys = [f"cats/1_cat/{number:06}.{ending}" for number in range(count) for ending in ("png", "txt")]
    source = Source(S3Uri("b", "cats"), "dataset_uri")
    gc.collect()
    tracemalloc.start()
    try:
        found = files.listing(source, Bucket(*keys))
        data_set, problems = inspect(found.sizes, "s3://b/cats")
        kept = found.only(data_set.places)
        del found
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (problems, data_set.pictures, len(kept)) == ([], count, 2 * count)
    assert now < 150 * count
    assert peak < 200 * count
