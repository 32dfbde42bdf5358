"""Captions on request: a WD14 tagger writes those that are missing, into the trainer's own tree.

A tagger is two files, as SmilingWolf publishes them. model.onnx takes pictures (n, side, side, 3) in float32:
blue, green, red from 0 to 255, padded to a square with white. It gives a probability for each row of
selected_tags.csv, whose category is 9 for a rating, 0 for a general tag and 4 for a character.
Source: finetune/tag_images_by_wd14_tagger.py of sd-scripts v0.10.1, lines 47-75 and 228-243.
"""

import csv
import importlib.util
import io
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
from PIL import Image

from entrypoint import files
from entrypoint.console import say
from entrypoint.dataset import PICTURES, DataSet
from entrypoint.failures import Problem, Unfit, collecting
from entrypoint.files import File, Single
from entrypoint.pictures import opened, plain
from entrypoint.rate import Rate
from entrypoint.request import Captioning, JobRequest, Source
from entrypoint.storage import Storage
from kohya.problem import counted

MODEL, TAGS = "model.onnx", "selected_tags.csv"
BUILT_IN = Path("/opt/tagger")  # where an image may hold one; TAGGER_DIR names another folder
_COLUMNS = ("name", "category")  # beside tag_id and count
_GENERAL, _CHARACTER = "0", "4"
_BATCH = 8  # pictures, where the model leaves it open
_SHOWN = 5  # pictures in one note

Pixels = npt.NDArray[np.float32]  # (side, side, 3): height, width, BGR
Probabilities = npt.NDArray[np.float32]  # (tags,) or (pictures, tags), 0 to 1


@dataclass(frozen=True)
class Tagger:
    """A tagger as it was found, and what is asked of it."""

    asked: Captioning
    where: str
    model: Single
    tags: tuple[tuple[str, str], ...]  # name and category, in the order of the model's output

    def caption(self, probabilities: Probabilities) -> tuple[list[str], bool]:
        """A picture's tags, likeliest first, characters before the others.

        Where none is likely enough it is the likeliest general tag, and the second value is False: an empty
        caption ends sd-scripts with an AssertionError.
        """

        found = probabilities.tolist()

        def ranked(category: str, threshold: float) -> list[str]:
            likely = [(-p, name) for p, (name, own) in zip(found, self.tags, strict=True)
                      if own == category and p >= threshold]  # fmt: skip
            return [_spelled(name) for _, name in sorted(likely)]

        if likely := ranked(_CHARACTER, self.asked.character) + ranked(_GENERAL, self.asked.general):
            return likely, True
        return ranked(_GENERAL, 0)[:1], False


def find(request: JobRequest, storage: Storage, *, here: bool = True) -> Tagger | None:
    """The tagger, if captions are asked for: looked at, not fetched. Raises Unfit with all that is wrong.

    Unless the job is to run `here`, nothing is said of this machine: the image may have what it lacks.
    """
    asked, problems = request.caption, list[Problem]()
    if asked is None:
        if request.tagger is not None:
            wrong = "there is a tagger, and nothing asks for captions"
            raise Unfit([Problem(request.tagger.where, wrong, "Add caption=wd14, or remove it")])
        return None
    if not here and request.tagger is None:
        return None
    if here and importlib.util.find_spec("onnxruntime") is None:
        wrong = "captions are written with onnxruntime, which cannot be imported here"
        problems.append(Problem(asked.where, wrong, "Type: pip install 'sagemaker-kohya[caption]'"))
    found = None
    with collecting(problems):
        found = _found(asked, request.tagger or _built_in(asked), storage)
    if found is None or problems:
        raise Unfit(problems)
    return found


def _built_in(asked: Captioning) -> Source:
    """The tagger of the image or of TAGGER_DIR. Raises Unfit where there is neither."""
    if named := os.environ.get("TAGGER_DIR"):
        return Source(Path(named).expanduser().absolute(), "TAGGER_DIR")
    if (BUILT_IN / MODEL).is_file():  # the image has the folder in any case
        return Source(BUILT_IN, "the image's tagger")
    wrong = f"it asks for captions, and there is no tagger: no channel tagger, no tagger_uri, no {BUILT_IN}"
    fix = f"Add a channel tagger with {MODEL} and {TAGS}, or type --tagger_uri=s3://BUCKET/tagger"
    raise Unfit([Problem(asked.where, wrong, fix)])


def _found(asked: Captioning, source: Source, storage: Storage) -> Tagger:
    where = f"{source.where}: {source.location}"
    there = files.listing(source, storage)
    if missing := [name for name in (MODEL, TAGS) if name not in there]:
        seen = ", ".join(sorted(there)[:5]) or "none"
        wrong = f"there is no {' and no '.join(missing)}; there are: {seen}"
        raise Unfit([Problem(where, wrong, f"Put a WD14 tagger there: {MODEL} and {TAGS}")])
    at = f"{source.where}: {files.name_of(there[TAGS])}"
    tags = _tags(files.text_of(there[TAGS], at, storage), at)
    return Tagger(asked, where, Single(there[MODEL], source.streamed), tags)


def _tags(text: str, where: str) -> tuple[tuple[str, str], ...]:
    """Name and category of each tag. Raises Unfit where the text is no list of tags."""
    fix = f"Give the {TAGS} that belongs to the model"
    try:
        rows = csv.DictReader(io.StringIO(text), strict=True)
        if missing := [name for name in _COLUMNS if name not in (rows.fieldnames or ())]:
            raise Unfit([Problem(where, f"its first line names no column {' and no '.join(missing)}", fix)])
        tags = []
        for row in rows:
            if not row["name"] or not row["category"]:
                raise Unfit([Problem(where, f"line {rows.line_num} has no name or no category", fix)])
            tags.append((row["name"], row["category"]))
    except csv.Error as error:
        raise Unfit([Problem(where, f"it is no list of tags ({error})", fix)]) from error
    if not any(category == _GENERAL for _, category in tags):
        raise Unfit([Problem(where, f"no tag is of the category {_GENERAL}", fix)])
    return tuple(tags)


def write(
    tagger: Tagger | None,
    model: Path | None,
    data_set: DataSet,
    *,
    root: Path,
    links: Mapping[Path, str],
    given: Mapping[str, File],
    written: dict[str, Path],
) -> None:
    """Write the captions that are missing in the trainer's tree.

    `model`: the tagger's model on disk; `root`: the tree; `links`: of each file in it the path below the data
    set's root; `given`: the file by that path. Each caption that is whole comes into `written`, by its path
    below the data set: whatever happens then, it is known. Raises Unfit where the model or a picture cannot
    be used.
    """
    if tagger is None or model is None:
        return
    extensions = {root / subset.folder: subset.caption_extension for subset in data_set.subsets}
    captions: dict[str, list[Path]] = defaultdict(list)  # a dataset_config may name a folder twice
    pictures: dict[str, Path] = {}
    total = set()
    for made, path in links.items():
        if made.suffix not in PICTURES:
            continue
        total.add(path)
        if not (caption := made.with_suffix(extensions[made.parent])).exists():
            captions[path].append(caption)
            pictures[path] = made
    say(
        f"prepare: {len(pictures)} of {counted(len(total), 'picture')} without a caption; "
        f"{tagger.where} writes what is missing: "
        f"general tags from {tagger.asked.general:g} on, characters from {tagger.asked.character:g} on"
    )
    if tagger.asked.note:
        say(f"prepare: {tagger.asked.note}")
    if not pictures:
        return
    names = {path: files.name_of(given[path]) for path in pictures}
    rate, unsure = Rate("prepare: captioning", len(pictures)), []
    for path, probabilities in _tagged(_Session(tagger, model), pictures, names):
        tags, sure = tagger.caption(probabilities)
        if not sure:
            unsure.append(f"{names[path]} ({tags[0]})")
        for caption in captions[path]:
            with caption.open("x", encoding="utf-8") as file:  # never over one that is there
                file.write(", ".join(tags) + "\n")
            written[str(PurePosixPath(path).with_suffix(extensions[caption.parent]))] = caption
        rate.add(1)
    if unsure:
        more = f" and {len(unsure) - _SHOWN} more" if len(unsure) > _SHOWN else ""
        shown = ", ".join(unsure[:_SHOWN])
        say(f"prepare: no tag is likely enough, and the likeliest alone is the caption: {shown}{more}")
    say(f"prepare: {counted(len(pictures), 'caption')} written, {rate}")


class _Session:
    """The tagger's model, loaded, and tried on a white picture."""

    def __init__(self, tagger: Tagger, model: Path) -> None:
        import onnxruntime  # noqa: PLC0415 — of the extra `caption`, and for nothing else

        self._where = files.name_of(tagger.model.file)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = os.cpu_count() or 1
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # of onnxruntime's own, one class for each of its status codes
            raise self._unfit(f"it cannot be loaded ({_short(error, model)})") from error
        entry = self._session.get_inputs()[0]
        self._entry, shape = entry.name, entry.shape
        if len(shape) != 4 or not isinstance(shape[1], int) or shape[1:] != [shape[1], shape[1], 3]:
            raise self._unfit(f"it takes {shape}, and a WD14 tagger takes pictures as [n, side, side, 3]")
        self.side = shape[1]
        self._fixed = isinstance(shape[0], int)
        self.batch = shape[0] if self._fixed else _BATCH
        tried = self.probabilities(np.full((1, self.side, self.side, 3), 255, np.float32))
        if tried.shape != (1, len(tagger.tags)):
            numbers = counted(tried.shape[-1], "number")
            raise self._unfit(f"it gives {numbers}, and {TAGS} has {counted(len(tagger.tags), 'tag')}")
        if not ((tried >= 0) & (tried <= 1)).all():  # not so where it is NaN either
            raise self._unfit("what it gives is no probability from 0 to 1")

    def probabilities(self, pixels: Pixels) -> Probabilities:
        """(pictures, tags) for (pictures, side, side, 3)."""
        wanted = len(pixels)
        if self._fixed and wanted < self.batch:
            rest = np.zeros((self.batch - wanted, *pixels.shape[1:]), np.float32)
            pixels = np.concatenate([pixels, rest])
        try:
            found: Probabilities = self._session.run(None, {self._entry: pixels})[0][:wanted]
        except Exception as error:
            raise self._unfit(f"it does not run ({_short(error)})") from error
        return found

    def _unfit(self, wrong: str) -> Unfit:
        return Unfit([Problem(self._where, wrong, f"Give a WD14 tagger's {MODEL}, with its {TAGS}")])


def _tagged(
    session: _Session, pictures: Mapping[str, Path], names: Mapping[str, str]
) -> Iterator[tuple[str, Probabilities]]:
    """Each picture with its probabilities. The next pictures are read while the model looks at these.

    Raises Unfit, when all are done, with those that cannot be read.
    """
    paths, size = list(pictures), session.batch
    batches = [paths[start : start + size] for start in range(0, len(paths), size)]
    wrong: list[Problem] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def begin(batch: Sequence[str]) -> "list[tuple[str, Future[Pixels]]]":
            return [(path, pool.submit(_pixels, pictures[path], names[path], session.side)) for path in batch]

        waiting = begin(batches[0])
        for following in [*batches[1:], []]:
            loaded, waiting = waiting, begin(following)
            found = {}
            for path, pixels in loaded:
                with collecting(wrong):
                    found[path] = pixels.result()
            if found:
                yield from zip(found, session.probabilities(np.stack([*found.values()])), strict=True)
    if wrong:
        raise Unfit(wrong)


def _pixels(path: Path, name: str, side: int) -> Pixels:
    """A picture as the tagger looks at it. Raises Unfit where it cannot be read."""
    with opened(path, name) as image:
        image.draft("RGB", (2 * side, 2 * side))  # a JPEG is unpacked at a half to an eighth of its size
        picture = plain(image)
    scale = side / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    square = Image.new("RGB", (side, side), (255, 255, 255))
    small = picture.resize((width, height), Image.Resampling.BICUBIC)
    square.paste(small, ((side - width) // 2, (side - height) // 2))
    return np.asarray(square, np.float32)[:, :, ::-1]


def _short(error: Exception, model: Path | None = None) -> str:
    """What onnxruntime says, without its codes, which come first, and the path that the model has here."""
    return str(error).split(" : ")[-1].replace(str(model), MODEL).strip()[:120]


def _spelled(tag: str) -> str:
    """A tag as captions have it: with spaces, but for faces such as ^_^ and (o)_(o), which have no word."""
    return tag.replace("_", " ") if re.search("[^\\W_]{2}", tag) else tag
