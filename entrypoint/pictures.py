"""Looking into the pictures and captions themselves, once they are on disk and before anything is trained.

sd-scripts ends in an error at the first of them that it cannot use, minutes later and with a message that
names neither the file as the user knows it nor the way out.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from entrypoint.console import say
from entrypoint.dataset import DataSet
from entrypoint.failures import Problem, Unfit

_THREADS = 8
_SHOWN = 20  # files in one report


def check(data_set: DataSet, files: Mapping[str, Path], names: Mapping[str, str], values: Any) -> None:
    """Open every picture and caption. Raises Unfit with all that the trainer could not use.

    `files` and `names`: where each file of the data set lies, and what the user calls it. `values`: the
    trainer's options.
    """
    pictures = [picture for subset in data_set.subsets for picture in subset.pictures]
    captions = [picture.caption for picture in pictures if picture.caption is not None]
    problems: list[Problem] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        wrongs = pool.map(lambda picture: _picture(files[picture.path], values), pictures)
        for picture, told in zip(pictures, wrongs, strict=True):
            if told is not None:
                problems.append(Problem(names[picture.path], *told))
    longer = []
    for name in captions:
        lines, told = _caption(files[name], bool(values.get("enable_wildcard")))
        if told is not None:
            problems.append(Problem(names[name], *told))
        elif lines > 1:
            longer.append(names[name])
    if longer and not values.get("enable_wildcard"):
        more = f" and {len(longer) - 1} more" if len(longer) > 1 else ""
        say(f"fetch: sd-scripts reads the first line only of {longer[0]}{more}")
    if len(problems) > _SHOWN:
        left = Problem(
            "the data set", f"{len(problems) - _SHOWN} more files cannot be used", "Mend these first"
        )
        problems = [*problems[:_SHOWN], left]
    if problems:
        raise Unfit(problems)


def _picture(path: Path, values: Mapping[str, Any]) -> tuple[str, str] | None:
    """What keeps a picture from being trained on, and the way out."""
    try:
        with Image.open(path) as picture:
            size = picture.size
            if picture.format == "PNG":
                picture.verify()  # every chunk's checksum, and that the last one is there
            elif picture.format != "WEBP":  # Pillow opens no WebP that is cut off, and unpacking one is slow
                picture.draft("RGB", (1, 1))  # a JPEG is read whole, and unpacked at an eighth of its size
                picture.load()
    except Exception as error:  # a damaged file brings forth errors of every kind
        return f"the picture cannot be read ({_short(error)})", "Save it again, or take it out"
    return next(_size(*size, values), None)


def _size(width: int, height: int, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong with a picture's size (train_util.py:281-345, 1625-1647)."""
    asked, _, other = str(values.get("resolution", "512")).partition(",")
    wide, high = int(asked), int(other or asked)
    if values.get("enable_bucket"):
        steps = int(values.get("bucket_reso_steps", 64))
        if not values.get("bucket_no_upscale"):
            return
        scale = min(1.0, (wide * high / (width * height)) ** 0.5)
        if min(width, height) * scale < steps:
            wrong = f"it is {width}×{height} pixels, and a side becomes shorter than {steps}"
            yield wrong, "Take a larger picture, crop it, or set bucket_no_upscale=false"
    elif not (values.get("cache_latents") or values.get("cache_latents_to_disk")):
        exact = width == wide and height == high
        large = bool(values.get("random_crop")) and width >= wide and height >= high
        if not exact and not large:
            wrong = f"it is {width}×{height} pixels, and without buckets and cached latents none is resized"
            yield wrong, "Set enable_bucket=true or cache_latents=true"


def _caption(path: Path, wildcard: bool) -> tuple[int, tuple[str, str] | None]:
    """How many lines a caption has, and what is wrong with it (train_util.py:1955-1968)."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        return 0, (f"the caption is not UTF-8 (byte {error.start})", "Save it as UTF-8")
    filled = [line for line in lines if line.strip()]
    if not filled:
        return 0, ("the caption is blank", "Write a caption, or delete the file")
    if not lines[0].strip() and not wildcard:
        return 0, ("the caption's first line is blank, and sd-scripts reads that alone", "Delete that line")
    return len(filled), None


def _short(error: BaseException) -> str:
    """What Pillow says, without its path."""
    text = str(error).partition(" '/")[0] or type(error).__name__
    return text if len(text) <= 80 else text[:77] + "…"
