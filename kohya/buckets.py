"""Which size each picture is trained at, and how many batches, steps and epochs come of it.

Source: sd-scripts v0.10.1, library/train_util.py and library/model_util.py; the lines of each part stand at
it. tests/sd_scripts/test_facts.py holds all of it to sd-scripts itself.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

Size = tuple[int, int]  # width, height in pixels


@dataclass(frozen=True)
class Buckets:
    """The buckets of one data set; train_util.py:216-350, 747-773."""

    resolution: Size
    enabled: bool = False  # if not, there is one, the resolution itself
    smallest: int = 256
    largest: int = 1024
    steps: int = 64
    no_upscale: bool = False

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Buckets":
        """The buckets that sd-scripts' options describe, or the keys of a dataset_config."""

        def given(name: str, otherwise: int) -> int:
            return int(values[name]) if values.get(name) is not None else otherwise

        steps = given("bucket_reso_steps", 64) or 64
        return cls(
            resolution(values.get("resolution") or 512),
            bool(values.get("enable_bucket")),
            given("min_bucket_reso", 256) // steps * steps,
            -(-given("max_bucket_reso", 1024) // steps) * steps,
            steps,
            bool(values.get("bucket_no_upscale")),
        )

    def choose(self, size: Size) -> tuple[Size, Size]:
        """The bucket of a picture of `size`, and the size that it is given before it is cropped to it.

        A bucket with a side of 0 stands for a picture that sd-scripts ends in an error at.
        """
        return _choose(self, size)  # most pictures of a data set have one of a few sizes

    @cached_property
    def ratios(self) -> list[tuple[float, Size]]:
        """Width by height of every bucket that there may be, in sd-scripts' order."""
        return [(width / height, (width, height)) for width, height in self.sizes]

    @cached_property
    def sizes(self) -> list[Size]:
        """Every bucket that there may be; model_util.py:1316-1344. Without upscaling there may be others."""
        if not self.enabled:
            return [self.resolution]
        area = self.resolution[0] * self.resolution[1]
        square = int(math.sqrt(area) // self.steps) * self.steps
        sizes = {(square, square)}
        for width in range(self.smallest or self.steps, self.largest + 1, self.steps):
            height = min(self.largest, area // width // self.steps * self.steps)
            if height >= self.smallest:
                sizes |= {(width, height), (height, width)}
        return sorted(size for size in sizes if min(size))


@lru_cache(1 << 12)
def _choose(buckets: Buckets, size: Size) -> tuple[Size, Size]:
    if not min(buckets.resolution) or not buckets.sizes:  # the options are told by kohya/rules.py
        return (0, 0), (0, 0)
    width, height = size
    ratio = width / height
    if buckets.enabled and buckets.no_upscale:
        resized = _shrunk(buckets, size)
        return (resized[0] - resized[0] % buckets.steps, resized[1] - resized[1] % buckets.steps), resized
    bucket = size
    if bucket not in buckets.sizes:
        bucket = min(buckets.ratios, key=lambda found: abs(found[0] - ratio))[1]
    scale = bucket[1] / height if ratio > bucket[0] / bucket[1] else bucket[0] / width
    return bucket, (int(width * scale + 0.5), int(height * scale + 0.5))


def _shrunk(buckets: Buckets, size: Size) -> Size:
    """`size`, or where its area is too large the size with the same ratio and one side on a step."""

    def on_step(length: float) -> int:
        return int(length + 0.5) // buckets.steps * buckets.steps

    area = buckets.resolution[0] * buckets.resolution[1]
    if size[0] * size[1] <= area:
        return size
    ratio = size[0] / size[1]
    wide = math.sqrt(area * ratio)
    by_width, by_height = on_step(wide), on_step(area / wide)
    height_of_width, width_of_height = on_step(by_width / ratio), on_step(by_height * ratio)
    if not height_of_width or not by_height:  # sd-scripts divides by both
        return 0, 0
    if abs(by_width / height_of_width - ratio) < abs(width_of_height / by_height - ratio):
        return by_width, int(by_width / ratio + 0.5)
    return int(by_height * ratio + 0.5), by_height


def resolution(value: object) -> Size:
    """Width and height of an option's "512" or "512,768", or of a dataset_config's 512 or [512, 768]."""
    sides = value if isinstance(value, Sequence) and not isinstance(value, str) else str(value).split(",")
    return int(sides[0]), int(sides[-1])


def reg_repeats(trained: int, repeats: Sequence[int]) -> list[int]:
    """How often an epoch has each regularisation picture, of which `repeats` says it for one round.

    `trained`: the pictures to train on, repeats counted. sd-scripts goes round until it has as many, and adds
    1 to each picture after the first round (train_util.py:2166-2179). 0: the picture is not used.
    """
    found, left = [0] * len(repeats), trained
    for number, repeat in enumerate(repeats):
        if left <= 0:
            return found
        found[number] = repeat
        left -= repeat
    if found and left > 0:
        rounds, more = divmod(left, len(found))
        found = [count + rounds + (number < more) for number, count in enumerate(found)]
    return found


def steps(batches: int, values: Mapping[str, Any], processes: int = 1) -> tuple[int, int]:
    """Optimizer steps and epochs of a whole run; train_network.py:799-803, 978-979.

    `batches`: in one epoch, of all processes together.
    """
    accumulated = values.get("gradient_accumulation_steps") or 1
    epochs, count = values.get("max_train_epochs"), values.get("max_train_steps")
    if epochs is not None:
        count = epochs * math.ceil(batches / processes / accumulated)
    elif count is None:
        count = 1600  # sd-scripts' default
    per_epoch = math.ceil(math.ceil(batches / processes) / accumulated)
    return int(count), math.ceil(count / per_epoch) if per_epoch else 0
