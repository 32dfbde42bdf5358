from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from entrypoint import dataset, pictures
from entrypoint.failures import Unfit

BUCKETS = {"resolution": "512,512", "enable_bucket": True, "bucket_no_upscale": True, "cache_latents": True}


def told(folder: Path, **values: Any) -> list[str]:
    """Every problem with the files in `folder`, which the user knows as s3://b/<name>."""
    files = {f"1_cat/{path.name}": path for path in sorted(folder.iterdir())}
    names = {name: f"s3://b/{name}" for name in files}
    found, problems = dataset.inspect({name: path.stat().st_size for name, path in files.items()}, "s3://b")
    assert problems == []
    try:
        pictures.check(found, files, names, {**BUCKETS, **values})
    except Unfit as error:
        return [str(problem) for problem in error.problems]
    return []


def write(path: Path, size: tuple[int, int] = (128, 96), caption: bytes = b"a cat") -> Path:
    Image.linear_gradient("L").resize(size).convert("RGB").save(path)
    path.with_suffix(".txt").write_bytes(caption)
    return path


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp"])
def test_a_picture_that_is_cut_off_or_no_picture_is_refused(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"a.{ending}")
    assert told(tmp_path) == []
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    said = told(tmp_path)
    assert len(said) == 1
    assert said[0].startswith(f"s3://b/1_cat/a.{ending}: the picture cannot be read")
    path.write_bytes(b"no picture at all")
    assert "the picture cannot be read (cannot identify image file)" in told(tmp_path)[0]


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        (b"a caf\xe9", "the caption is not UTF-8 (byte 5). Save it as UTF-8."),
        (b" \n\t\n", "the caption is blank. Write a caption, or delete the file."),
        (b"\na cat", "the caption's first line is blank, and sd-scripts reads that alone"),
    ],
)
def test_a_caption_that_cannot_be_read_is_refused(tmp_path: Path, caption: bytes, said: str) -> None:
    write(tmp_path / "a.png", caption=caption)
    assert told(tmp_path)[0].startswith(f"s3://b/1_cat/a.txt: {said}")


def test_a_byte_order_mark_and_another_line_are_no_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a.png", caption=b"\xef\xbb\xbfa cat\nin a box\n")
    assert told(tmp_path) == []
    assert "reads the first line only of s3://b/1_cat/a.txt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("size", "values", "said"),
    [
        ((63, 96), {}, "it is 63×96 pixels, and a side becomes shorter than 64"),
        ((64, 64), {}, ""),
        ((20, 96), {"bucket_no_upscale": False}, ""),
        ((9000, 100), {}, "a side becomes shorter than 64"),
        ((128, 96), {"enable_bucket": False}, ""),
        ((128, 96), {"enable_bucket": False, "cache_latents": False}, "none is resized"),
        ((512, 512), {"enable_bucket": False, "cache_latents": False}, ""),
        ((600, 512), {"enable_bucket": False, "cache_latents": False, "random_crop": True}, ""),
    ],
)
def test_a_picture_of_a_size_that_cannot_be_trained_is_refused(
    tmp_path: Path, size: tuple[int, int], values: dict[str, Any], said: str
) -> None:
    write(tmp_path / "a.png", size)
    found = told(tmp_path, **values)
    assert bool(found) == bool(said)
    assert said in " ".join(found)


def test_all_are_told_at_once_up_to_a_limit(tmp_path: Path) -> None:
    for number in range(25):
        write(tmp_path / f"{number:02}.png", caption=b" ").write_bytes(b"x")
    said = told(tmp_path)
    assert len(said) == 21
    assert said[-1] == "the data set: 30 more files cannot be used. Mend these first."
