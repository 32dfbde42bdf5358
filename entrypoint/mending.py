"""Pictures and captions that sd-scripts would take for something else, mended in the trainer's own tree.

What is mended stands there in the place of a link; the data set itself is never written to.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from entrypoint.console import say
from entrypoint.dataset import DataSet, places
from entrypoint.pictures import FORMATS, THREADS, Seen, plain
from kohya.problem import counted


def mend(data_set: DataSet, seen: Seen, root: Path, alpha_mask: bool) -> Mapping[Path, Path]:
    """Mend what was seen in the tree of links under `root`.

    `alpha_mask`: whether the trainer reads transparency itself, unless a dataset_config says otherwise.
    Returns for each file that came out under another name the link that it stands for.
    """
    masks = [
        subset.values.get("alpha_mask", alpha_mask) for subset in data_set.subsets for _ in subset.pictures
    ]
    pictures: list[tuple[Path, bool]] = []
    captions: set[Path] = set()
    for number, (picture, place, caption) in enumerate(places(data_set, root)):
        if number in seen.mend:
            pictures.append((place, bool(masks[number])))
        if picture.caption in seen.unmark:
            captions.add(caption)
    with ThreadPoolExecutor(THREADS) as pool:
        made = dict(
            zip(pool.map(lambda one: _picture(*one), pictures), [place for place, _ in pictures], strict=True)
        )
    for caption in captions:
        text = caption.read_bytes().decode("utf-8-sig")
        caption.unlink()
        caption.write_bytes(text.encode("utf-8"))
    if made or captions:
        mended = f"{counted(len(made), 'picture')} and {counted(len(captions), 'caption')}"
        say(f"prepare: {mended} mended; the data set stays as it is")
    return made


def _picture(link: Path, alpha_mask: bool) -> Path:
    """Upright, 8 bits a colour, on white unless its transparency is wanted. A PNG: it loses nothing."""
    target = link.with_suffix(".png")
    with Image.open(link, formats=FORMATS) as opened:
        picture = plain(opened, keep_alpha=alpha_mask)
        link.unlink()
        picture.save(target, compress_level=1)
    return target
