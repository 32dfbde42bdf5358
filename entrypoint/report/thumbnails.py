"""A job's pictures for its report: small, as data URIs, of a size in bytes that is known before."""

import base64
import io
import re
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

from PIL import Image

from entrypoint import stops
from entrypoint.inputs import read_prompts
from entrypoint.pictures import FORMATS, MEGAPIXELS, THREADS, plain
from entrypoint.record import Job

PICTURES, SAMPLES = 48, 60  # shown
_PICTURE_BYTES, _SAMPLE_BYTES = 900_000, 700_000  # of all that are shown
_SIDES = (256, 192, 128, 96, 64)  # pixels: the largest that is small enough in bytes is taken
_QUALITY = 75
_LONGEST = 1000  # bytes of a caption
LAST_SECONDS = 10.0  # of the time after a stop: none of them is spent on what can be left out

# train_util.py:6572-6577 of v0.10.1: cat_e000001_00_20260101120000_42.png, and without the e after a step
_SAMPLE = re.compile(r"(?:.*_)?(e?)(\d{6})_(\d{2,})_\d{14}(?:_-?\d+)?\.png")


@dataclass(frozen=True)
class Thumbnail:
    """A picture, small, with what stands below it."""

    source: str  # a data URI
    name: str
    text: str | None
    written: bool = False  # whether the text is the tagger's


def of_data_set(job: Job) -> list[Thumbnail]:
    """Some of the pictures that were fetched, with their captions: of all folders alike."""
    if job.plan is None or job.inputs is None:
        return []
    files = {**job.inputs.dataset, **job.captions}
    every = (
        (picture.path, picture.caption or _beside(picture.path, subset.caption_extension))
        for subset in job.plan.dataset.subsets
        for picture in subset.pictures
    )
    count = sum(len(subset.pictures) for subset in job.plan.dataset.subsets)
    some = [*islice(every, 0, None, -(-count // PICTURES) or 1)]
    sources = _data_uris([files[path] for path, _ in some], _PICTURE_BYTES // PICTURES)
    return [
        Thumbnail(source, path, _text(files.get(caption)), caption in job.captions)
        for (path, caption), source in zip(some, sources, strict=True)
        if source is not None
    ]


def of_samples(job: Job) -> tuple[dict[str, list[Thumbnail]], int]:
    """The sample pictures by epoch or step, with their prompts, and how many more there are."""
    if job.prepared is None:
        return {}, 0
    found = {path: match for path in (job.prepared.output / "sample").glob("*.png")
             if (match := _SAMPLE.fullmatch(path.name))}  # fmt: skip
    order = sorted(found, key=lambda path: found[path].groups())
    some = order[:: -(-len(order) // SAMPLES) or 1]
    prompts = _prompts(job)
    rows: dict[str, list[Thumbnail]] = defaultdict(list)
    for path, source in zip(some, _data_uris(some, _SAMPLE_BYTES // SAMPLES), strict=True):
        of_epoch, number, prompt = found[path].groups()
        text = dict(enumerate(prompts)).get(int(prompt), "")
        if source is not None:
            when = f"{'epoch' if of_epoch else 'step'} {int(number):,}"
            rows[when].append(Thumbnail(source, path.name, text))
    return dict(rows), len(order) - sum(map(len, rows.values()))


def _beside(picture: str, extension: str) -> str:
    """Where the tagger's caption for a picture goes."""
    return str(PurePosixPath(picture).with_suffix(extension))


def _prompts(job: Job) -> list[str]:
    if job.plan is None or job.plan.extras.prompts is None:
        return []
    every = read_prompts(*job.plan.extras.prompts)
    return [str(one.get("prompt", "")) if isinstance(one, dict) else str(one) for one in every]


def _text(caption: Path | None) -> str | None:
    """The beginning of a caption; None where there is none."""
    if caption is None or not caption.is_file():
        return None
    with caption.open("rb") as file:
        return file.read(_LONGEST).decode("utf-8-sig", errors="ignore").strip()


def _data_uris(pictures: Sequence[Path], most: int) -> list[str | None]:
    """Each picture, at most `most` bytes long; None for one that cannot be read or made so small.

    None too for those that are left when the time after a stop is nearly up.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda path: _data_uri(path, most), pictures))


def _data_uri(path: Path, most: int) -> str | None:
    if stops.seconds_left() < LAST_SECONDS:
        return None
    with suppress(Exception):  # a damaged file brings forth errors of every kind, and is told elsewhere
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MEGAPIXELS * 1_000_000:
                return None
            image.draft("RGB", (2 * _SIDES[0], 2 * _SIDES[0]))  # a JPEG is unpacked at a half to an eighth
            picture = plain(image)
        for side in _SIDES:
            picture.thumbnail((side, side))
            out = io.BytesIO()
            picture.save(out, "WEBP", quality=_QUALITY)
            uri = f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"
            if len(uri) <= most:
                return uri
    return None
