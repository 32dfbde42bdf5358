"""Resizing on request: large pictures become small once, and not again each time that they are read.

It happens in the trainer's own tree, where a picture takes the place of its link; what is small already
stays a link. Sizes are pixels.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from entrypoint import files
from entrypoint.console import say
from entrypoint.dataset import PICTURES
from entrypoint.failures import Problem, Unfit
from entrypoint.files import File
from entrypoint.inputs import Extras
from entrypoint.pictures import opened, orientation, plain
from entrypoint.rate import Rate
from entrypoint.request import JobRequest
from kohya.buckets import Buckets, Size
from kohya.config import Merged
from kohya.problem import counted


def problems(request: JobRequest, merged: Merged, extras: Extras) -> list[Problem]:
    """What is asked for besides, and goes under with a picture's alpha."""
    if request.resize is None:
        return []
    fix = "Remove resize, or alpha_mask"
    asked = [merged.settings["alpha_mask"].where] if merged.values.get("alpha_mask") else []
    content = extras.dataset_config.content if extras.dataset_config else {}
    tables = [one for dataset in content.get("datasets", ()) for one in dataset["subsets"]]
    if any(table.get("alpha_mask") for table in tables):
        asked.append(merged.settings["dataset_config"].where)
    wrong = "alpha_mask trains where a picture is opaque, and resize lays pictures onto white"
    return [Problem(where, wrong, fix) for where in asked]


def notes(request: JobRequest, merged: Merged, extras: Extras) -> Iterator[str]:
    """What comes of pictures that are made smaller than what they are to be trained at."""
    side, described = request.resize, extras.dataset_config
    if side is None:
        return
    own = [folder.values for folder in described.folders] if described else [{}]
    for buckets in dict.fromkeys(Buckets.of({**merged.values, **values}) for values in own):
        width, height = buckets.resolution
        if side * side >= width * height:
            continue
        told = f"resize = {side} is below resolution = {width},{height}: "
        if buckets.enabled and buckets.no_upscale:
            small = "×".join(map(str, buckets.choose((side, side))[0]))
            told += f"with bucket_no_upscale a square picture is then trained at {small}"
        else:
            told += "pictures lose detail, and are enlarged again to be trained on"
        yield f"{told}. With resize = {max(width, height)} they keep what can be trained on"


def room(request: JobRequest, pictures: Mapping[str, File]) -> int:
    """An estimate of the bytes that the resized pictures take.

    A photograph has some 1.8 bytes a pixel as PNG, and sides of 4:3. A small file is a small picture, and not
    resized; a JPEG has seldom less than 1 bit a pixel.
    """
    side = request.resize
    if side is None:
        return 0
    sizes = (files.size(file) for name, file in pictures.items() if name.lower().endswith(PICTURES))
    return sum(min(5 * side * side // 2, 16 * size) for size in sizes)


def resized(size: tuple[int, int], side: int, crop: bool) -> tuple[int, int]:
    """What becomes of a picture's width and height. None is ever enlarged."""
    width, height = size
    least = min(width, height)
    if crop:
        return (min(least, side),) * 2
    if least <= side:
        return size
    return max(side, round(width * side / least)), max(side, round(height * side / least))


def sizes(request: JobRequest) -> Callable[[Size], Size]:
    """What becomes of a picture's size in this job."""
    side, crop = request.resize, request.resize_crop
    return (lambda size: size) if side is None else (lambda size: resized(size, side, crop))


def apply(request: JobRequest, links: Mapping[Path, str], given: Mapping[str, File]) -> dict[Path, str]:
    """Resize the pictures of the trainer's tree, losslessly, as PNG. Returns the tree as it is then.

    `links`: of each file in the tree its path below the data set's root; `given`: the file by that path.
    Raises Unfit with all pictures that cannot be read.
    """
    if request.resize is None:
        return dict(links)
    side, crop = request.resize, request.resize_crop
    places: dict[str, list[Path]] = defaultdict(list)  # a dataset_config may name a folder twice
    for made, path in links.items():
        if made.suffix in PICTURES:
            places[path].append(made)
    names = {path: files.name_of(given[path]) for path in places}
    rate, wrong, done = Rate("prepare: resizing", len(places)), list[Problem](), dict[str, int]()
    tree = dict(links)

    def one(path: str) -> int | Unfit:
        try:
            return _replace(places[path], side, crop, names[path])
        except Unfit as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow holds no lock while it works
        for path, size in zip(places, pool.map(one, places), strict=True):
            rate.add(1)
            if isinstance(size, Unfit):
                wrong += size.problems
            elif size:
                done[path] = size
    if wrong:
        raise Unfit(wrong)
    for path in done:
        for made in places[path]:
            del tree[made]
            tree[made.with_suffix(".png")] = path
    how = f"cropped to at most {side}×{side}" if crop else f"their shorter side brought to at most {side}"
    say(
        f"prepare: {len(done)} of {counted(len(places), 'picture')} changed, {how} pixels: "
        f"{sum(done.values()) / 1e6:.1f} MB, {rate}"
    )
    return tree


def _replace(places: list[Path], side: int, crop: bool, name: str) -> int:
    """Put a picture's small form in the place of its links. Returns its bytes; 0 where it may stay."""
    with opened(places[0], name) as image:
        turned = orientation(image) > 1
        if image.size == resized(image.size, side, crop) and not turned and not image.has_transparency_data:
            return 0
        made = plain(image)
    size = resized(made.size, side, crop)
    if crop:
        least = min(made.size)
        left, top = (made.width - least) // 2, (made.height - least) // 2
        made = made.crop((left, top, left + least, top + least))
    if made.size != size:
        made = made.resize(size, Image.Resampling.LANCZOS)
    for place in places:
        place.unlink()  # the link, not the picture
    first, *others = (place.with_suffix(".png") for place in places)
    # Lossless at every level, and 1 is fast. No profile: sd-scripts takes the numbers as they are.
    made.save(first, "PNG", compress_level=1, icc_profile=None)
    for other in others:
        other.symlink_to(first)
    return first.stat().st_size
