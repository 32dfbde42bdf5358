"""Looking into the pictures and captions themselves, once they are on disk and before anything is trained.

sd-scripts ends in an error at the first of them that it cannot use, minutes later and with a message that
names neither the file as the user knows it nor the way out; and some it trains on as nobody meant it:
lying on its side, with what lies beneath its transparent parts, or all white. Those are mended in the
trainer's own tree (entrypoint/mending.py); the rest is refused, all at once.
"""

import hashlib
import io
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, ImageFile

from entrypoint import png
from entrypoint.console import say
from entrypoint.dataset import DataSet
from entrypoint.failures import Problem, Unfit
from kohya import tokenizers
from kohya.buckets import Buckets, Size
from kohya.problem import counted

MEGAPIXELS = 100  # a larger picture fills the memory of who opens it: 100 take 0.3 GB
THREADS = 8  # Pillow unpacks outside of Python's lock
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # whatever the ending says
TRANSPARENT = frozenset({"RGBA", "LA", "PA", "La"})  # Pillow's modes of files with an alpha channel
ORIENTATION = 0x0112  # the EXIF tag
_SIDEWAYS = frozenset({5, 6, 7, 8})  # its values that swap width and height
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNED, _CLEAR, _DEEP = (
    "turned as its EXIF tag says",
    "transparent, put onto white",
    "16 bits a colour, made 8",
)
_SHOWN = 20  # files in one report
_NAMED = 3  # files in one note

# Refused by its header instead, at a size of our own and with the way out.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True)
class Seen:
    """What the pictures and captions of a data set turned out to be."""

    sizes: Sequence[Size]  # of each picture in order, as the trainer sees it once it is mended
    mend: Mapping[int, Sequence[str]]  # what is to be mended on a picture, by its place in that order
    unmark: frozenset[str]  # captions that begin with a byte order mark
    notes: tuple[str, ...]


@dataclass(slots=True)
class _Look:
    """One picture."""

    size: Size = (0, 0)
    bytes: int = 0
    mend: tuple[str, ...] = ()
    animated: bool = False
    cmyk: bool = False
    wrong: tuple[str, str] | None = None


def check(
    data_set: DataSet,
    files: Mapping[str, Path],
    names: Mapping[str, str],
    values: Any,
    resized: Callable[[Size], Size] = lambda size: size,
) -> Seen:
    """Open every picture and caption. Raises Unfit with all that the trainer could not use.

    `files` and `names`: where each file of the data set lies, and what the user calls it. `values`: the
    trainer's options. `resized`: what becomes of a picture's size before it is trained on.
    """
    begun = time.monotonic()
    asked = [
        ({**values, **subset.values}, picture) for subset in data_set.subsets for picture in subset.pictures
    ]
    paths = [picture.path for _, picture in asked]
    problems: list[Problem] = []
    with ThreadPoolExecutor(THREADS) as pool:
        looks = list(pool.map(lambda one: _picture(files[one[1].path], one[0], resized), asked))
        problems += [
            Problem(names[path], *look.wrong) for path, look in zip(paths, looks, strict=True) if look.wrong
        ]
        notes = [*_picture_notes(paths, looks, names), *_enlarged(asked, looks)]
        notes += _duplicates(paths, looks, files, pool)
    captions = [(own, picture.caption) for own, picture in asked if picture.caption is not None]
    texts, unmark, longer = [], set(), dict[str, None]()
    for own, name in captions:
        text, lines, marked, wrong = _caption(files[name], bool(own.get("enable_wildcard")))
        texts.append(text)
        if wrong is not None:
            problems.append(Problem(names[name], *wrong))
        if marked:
            unmark.add(name)
        if lines > 1 and not own.get("enable_wildcard"):
            longer[names[name]] = None
    if longer:
        more = f" and {len(longer) - 1} more" if len(longer) > 1 else ""
        notes.append(f"sd-scripts reads the first line only of {next(iter(longer))}{more}")
    if unmark:
        notes.append(
            f"{_some(unmark, 'caption')}: a byte order mark is taken out, of which the first tag would begin"
        )
    problems = list(dict.fromkeys(problems))  # a dataset_config may name a folder twice
    if len(problems) > _SHOWN:
        more = counted(len(problems) - _SHOWN, "more file")
        left = Problem("the data set", f"{more} cannot be used", "Mend these first")
        problems = [*problems[:_SHOWN], left]
    if problems:
        raise Unfit(problems)
    notes += _too_long(captions, texts)
    opened_ = counted(len(set(paths)), "picture"), counted(len({name for _, name in captions}), "caption")
    say(f"fetch: {' and '.join(opened_)} opened in {time.monotonic() - begun:.1f} s")
    mend = {number: look.mend for number, look in enumerate(looks) if look.mend}
    common: dict[Size, Size] = {}  # thousands of pictures share a few sizes
    sizes = [common.setdefault(look.size, look.size) for look in looks]
    return Seen(sizes, mend, frozenset(unmark), tuple(notes))


def _picture(path: Path, values: Mapping[str, Any], resized: Callable[[Size], Size]) -> _Look:
    """One picture: its size, what is to be mended, and what keeps it from being trained on."""
    look = _Look()
    try:
        look.bytes = path.stat().st_size
        with Image.open(path, formats=FORMATS) as picture:
            look.size = picture.size
            if picture.width * picture.height > MEGAPIXELS * 1_000_000:
                pixels = f"{picture.width}×{picture.height} pixels"
                wrong = f"it has {pixels}, and more than {MEGAPIXELS} million are not read"
                look.wrong = wrong, "Make it smaller, or take it out"
                return look
            look.animated = picture.format != "MPO" and bool(getattr(picture, "is_animated", False))
            look.cmyk = picture.mode == "CMYK"
            look.mend = tuple(_wanting(picture, path, bool(values.get("alpha_mask"))))
            if _TURNED in look.mend and orientation(picture) in _SIDEWAYS:
                look.size = look.size[1], look.size[0]  # of the header: a draft is smaller
    except Exception as error:  # a damaged file brings forth errors of every kind
        look.wrong = _unreadable(error)
        return look
    look.size = resized(look.size)
    look.wrong = next(_size(*look.size, values), None)
    return look


def _wanting(picture: ImageFile.ImageFile, path: Path, alpha_mask: bool) -> Iterator[str]:
    """What is to be mended; the picture is read to its end on the way. Raises whatever Pillow does.

    load_image of sd-scripts (train_util.py:2948-2961) knows neither EXIF nor alpha, unless alpha_mask is set,
    and what has 16 bits a colour becomes white by Pillow's convert.
    """
    if orientation(picture) > 1:
        yield _TURNED
    if picture.mode.startswith("I"):
        yield _DEEP
    alpha = picture.mode in TRANSPARENT or "transparency" in picture.info
    if picture.format == "JPEG":  # is read whole, and unpacked at an eighth of its size
        picture.draft("RGB", (1, 1))
    if picture.format == "PNG":
        picture.verify()  # every chunk's checksum, and that the last one is there
        png.unpack(path)
        if not alpha:
            return
        with Image.open(path, formats=FORMATS) as again:
            if _is_clear(again) and not alpha_mask:
                yield _CLEAR
        return
    picture.load()
    if alpha and not alpha_mask and _is_clear(picture):
        yield _CLEAR


@contextmanager
def opened(path: Path, name: str) -> Iterator[Image.Image]:
    """A picture, not yet read. Raises Unfit, with the user's `name` for it, where it cannot be."""
    try:
        with Image.open(path) as picture:
            yield picture
    except Exception as error:  # a damaged file brings forth errors of every kind
        raise Unfit([Problem(name, *_unreadable(error))]) from error


def plain(picture: Image.Image, *, keep_alpha: bool = False) -> Image.Image:
    """A picture as a person sees it: upright, 8 bits a colour, on white unless its alpha is to be kept."""
    picture = upright(picture)
    if picture.mode.startswith("I;16"):
        picture = picture.convert("I")
    if picture.mode == "I":  # of which `convert` alone would make 255 wherever there is more
        picture = picture.point(lambda value: value * (1 / 256)).convert("L")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    if keep_alpha:
        return picture
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def upright(picture: Image.Image) -> Image.Image:
    """A picture turned as its EXIF tag says. The EXIF itself, which may be damaged, is not written again."""
    turn = _TURNS.get(orientation(picture))
    return picture if turn is None else picture.transpose(turn)


def orientation(picture: Image.Image) -> int:
    """1 for upright. A PNG is not unpacked for it, as getexif() would where there is none."""
    if picture.format == "PNG" and "exif" not in picture.info:
        return 1
    found = picture.getexif().get(ORIENTATION, 1)
    return found if isinstance(found, int) and found in range(1, 9) else 1


def _is_clear(picture: Image.Image) -> bool:
    """Whether a picture with an alpha channel makes use of it."""
    alpha = (
        picture.getchannel("A") if picture.mode in TRANSPARENT else picture.convert("RGBA").getchannel("A")
    )
    lowest = alpha.getextrema()[0]
    return isinstance(lowest, int | float) and lowest < 255


def _size(width: int, height: int, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong with a picture's size (train_util.py:281-345, 1625-1647)."""
    buckets = Buckets.of(values)
    if buckets.enabled:
        if 0 in buckets.choose((width, height))[0]:
            wrong = f"it is {width}×{height} pixels, and a side becomes shorter than {buckets.steps}"
            yield wrong, "Take a larger picture, crop it, or set bucket_no_upscale=false"
    elif not (values.get("cache_latents") or values.get("cache_latents_to_disk")):
        wide, high = buckets.resolution
        exact = width == wide and height == high
        large = bool(values.get("random_crop")) and width >= wide and height >= high
        if not exact and not large:
            wrong = f"it is {width}×{height} pixels, and without buckets and cached latents none is resized"
            yield wrong, "Set enable_bucket=true or cache_latents=true"


def _picture_notes(paths: Sequence[str], looks: Sequence[_Look], names: Mapping[str, str]) -> Iterator[str]:
    """What is mended, and what is trained on otherwise than it looks."""
    by_kind: dict[str, set[str]] = defaultdict(set)
    for path, look in zip(paths, looks, strict=True):
        for kind in look.mend:
            by_kind[kind].add(names[path])
        if look.animated:
            by_kind["animated, of which the first frame is trained on"].add(names[path])
        if look.cmyk:
            by_kind["in CMYK, whose colours are converted without its profile"].add(names[path])
    for kind, found in by_kind.items():
        yield f"{_some(found)}: {kind}"


def _enlarged(asked: Sequence[tuple[Mapping[str, Any], Any]], looks: Sequence[_Look]) -> Iterator[str]:
    """How many pictures are smaller than what they are trained at."""
    small = {
        picture.path
        for (values, picture), look in zip(asked, looks, strict=True)
        if look.wrong is None and Buckets.of(values).choose(look.size)[1] > look.size
    }
    if small:
        every = counted(len({picture.path for _, picture in asked}), "picture")
        yield f"{len(small):,} of {every}: smaller than the size that it is trained at, and enlarged"


def _duplicates(
    paths: Sequence[str], looks: Sequence[_Look], files: Mapping[str, Path], pool: ThreadPoolExecutor
) -> Iterator[str]:
    """Pictures that are the same file, byte by byte. Those of one length alone are read for it."""
    by_length: dict[int, set[str]] = defaultdict(set)
    for path, look in zip(paths, looks, strict=True):
        if look.wrong is None:
            by_length[look.bytes].add(path)
    alike = sorted(path for found in by_length.values() if len(found) > 1 for path in found)
    by_content: dict[bytes, list[str]] = defaultdict(list)
    for path, digest in zip(alike, pool.map(lambda path: _digest(files[path]), alike), strict=True):
        by_content[digest].append(path)
    again = [found for found in by_content.values() if len(found) > 1]
    if again:
        shown = "; ".join(" = ".join(found[:_NAMED]) for found in again[:_NAMED])
        count = counted(sum(len(found) - 1 for found in again), "picture")
        yield f"{count} there more than once, and trained on as often: {shown}"


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()


def _caption(path: Path, wildcard: bool) -> tuple[str, int, bool, tuple[str, str] | None]:
    """A caption as sd-scripts reads it (train_util.py:1946-1970): its text, and how many lines there are.

    Also whether it begins with a byte order mark, and what is wrong with it.
    """
    content = path.read_bytes()
    marked = content.startswith(b"\xef\xbb\xbf")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content:
        return "", 0, False, ("the caption is UTF-16, or no text", "Save it as UTF-8")
    try:
        lines = io.StringIO(content.decode("utf-8-sig"), newline=None).readlines()
    except UnicodeDecodeError as error:
        return "", 0, False, (f"the caption is not UTF-8 (byte {error.start})", "Save it as UTF-8")
    filled = [line.strip() for line in lines if line.strip()]
    if not filled:
        return "", 0, marked, ("the caption is blank", "Write a caption, or delete the file")
    if not lines[0].strip() and not wildcard:
        wrong = "the caption's first line is blank, and sd-scripts reads that alone"
        return "", 0, marked, (wrong, "Delete that line")
    return max(filled, key=len) if wildcard else filled[0], len(filled), marked, None


def _too_long(captions: Sequence[tuple[Mapping[str, Any], str]], texts: Sequence[str]) -> Iterator[str]:
    """How many captions are cut at max_token_length; 75 where it is not set."""
    whole = [
        " ".join(filter(None, (own.get("caption_prefix"), text, own.get("caption_suffix"))))
        for (own, _), text in zip(captions, texts, strict=True)
    ]
    # A token has one character at least: short captions need not be counted, nor the counter be loaded.
    limits = [int(own.get("max_token_length") or 75) for own, _ in captions]
    doubtful = [number for number, text in enumerate(whole) if len(text) > limits[number]]
    counts = tokenizers.count([whole[number] for number in doubtful], tokenizers.folder()) if doubtful else []
    for limit in sorted(set(limits)):
        cut = Counter(
            {
                captions[number][1]: count
                for number, count in zip(doubtful, counts or (), strict=False)
                if limits[number] == limit and count > limit
            }
        )
        if cut:
            shown = ", ".join(
                f"{PurePosixPath(name).name}: {count}" for name, count in cut.most_common(_NAMED)
            )
            more = ", …" if len(cut) > _NAMED else ""
            fix = "Shorten them" if limit >= 225 else "max_token_length=225 takes more"
            has, is_cut = ("caption has", "is") if len(cut) == 1 else ("captions have", "are")
            yield f"{len(cut)} {has} more than {limit} tokens, and {is_cut} cut ({shown}{more}). {fix}"


def _some(names: Iterable[str], noun: str = "picture") -> str:
    """How many, and the first few: "4 pictures (a.png, b.png, c.png, …)"."""
    found = sorted(names)
    shown = ", ".join(PurePosixPath(name).name for name in found[:_NAMED])
    more = ", …" if len(found) > _NAMED else ""
    return f"{counted(len(found), noun)} ({shown}{more})"


def _unreadable(error: BaseException) -> tuple[str, str]:
    """What is wrong, in Pillow's words without its path, and the way out."""
    text = str(error).partition(" '/")[0] or type(error).__name__
    text = text if len(text) <= 80 else text[:77] + "…"
    return f"the picture cannot be read ({text})", "Save it again, or take it out"
