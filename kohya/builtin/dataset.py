"""The data set as sd-scripts' DreamBooth method reads it: folders, captions, buckets, order, latents.

Source: library/train_util.py; the lines of each part stand at it.
"""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from kohya.buckets import Buckets, Size
from kohya.builtin import BuiltinError
from kohya.builtin.options import Options

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # all lower or all upper case, :103

Pixels = npt.NDArray[np.uint8]  # height, width, RGB


class DatasetError(BuiltinError):
    """The data set cannot be trained on. Names the file."""


@dataclass
class Picture:
    path: Path
    caption: str
    repeats: int
    size: Size
    bucket: Size = (0, 0)  # the size at which it is trained
    resized: Size = (0, 0)  # the size before it is cropped to the bucket
    latent: torch.Tensor | None = None  # (4, height / 8, width / 8), where latents are cached

    @property
    def crop(self) -> Size:
        """Left and top, as SDXL is told them: half of what the bucket is wider or higher, :351-366."""
        ratio, (width, height) = self.size[0] / self.size[1], self.bucket
        if width / height > ratio:
            return int((width - height * ratio) // 2), 0
        return 0, int((height - width / ratio) // 2)

    def pixels(self) -> torch.Tensor:
        """(3, height, width) between -1 and 1: resized, then cropped in the middle, :2965-2993."""
        with _opened(self.path) as file:
            image = _resize(np.asarray(file.convert("RGB")), self.resized)
        width, height = self.bucket
        left, top = (self.resized[0] - width) // 2, (self.resized[1] - height) // 2
        cropped = torch.tensor(image[top : top + height, left : left + width])
        return cropped.permute(2, 0, 1).contiguous().float().div(255).sub(0.5).div(0.5)


class Dataset:
    """All pictures, and the batches of an epoch in the order of which sd-scripts' loader picks them.

    Made, it has drawn one number and shuffled once. Source of the buckets: :898-990.
    """

    def __init__(self, pictures: list[Picture], options: Options) -> None:
        self.pictures, self.options, self.epoch = pictures, options, 0
        seed = random.randint(0, 2**31)
        chooser = buckets(options)
        for picture in pictures:
            picture.bucket, picture.resized = chooser.choose(picture.size)
            if 0 in picture.bucket:
                raise DatasetError(
                    f"{picture.path} is smaller than bucket_reso_steps, {chooser.steps} pixels."
                )
        self.resolutions = sorted({picture.bucket for picture in pictures})
        self.buckets = [
            [picture for picture in pictures if picture.bucket == size for _ in range(picture.repeats)]
            for size in self.resolutions
        ]
        size = options.train_batch_size
        self.batches = [(bucket, start) for bucket in self.buckets for start in range(0, len(bucket), size)]
        self.seed = 0
        self._shuffle()
        self.seed = seed  # sd-scripts sets it after the first shuffle, library/config_util.py:586-594

    def __len__(self) -> int:
        return len(self.batches)

    def go_to_epoch(self, epoch: int) -> None:
        """Shuffle once for every epoch up to `epoch`; each shuffle takes up what the last one left."""
        while self.epoch < epoch:
            self.epoch += 1
            self._shuffle()

    def batch(self, number: int) -> tuple[list[Picture], list[str]]:
        """Pictures and captions of batch `number` of the present order; shuffling captions draws."""
        bucket, start = self.batches[number]
        pictures = bucket[start : start + self.options.train_batch_size]
        return pictures, [self._caption(picture.caption) for picture in pictures]

    def _shuffle(self) -> None:
        random.seed(self.seed + self.epoch)
        random.shuffle(self.batches)
        for bucket in self.buckets:
            random.shuffle(bucket)

    def _caption(self, caption: str) -> str:
        """:854-905, without what builtin does not have."""
        options = self.options
        if not options.shuffle_caption:
            return caption
        tags = [tag.strip() for tag in caption.strip().split(options.caption_separator)]
        kept, shuffled = tags[: options.keep_tokens], tags[options.keep_tokens :]
        random.shuffle(shuffled)
        return ", ".join(kept + shuffled)


def buckets(options: Options) -> Buckets:
    return Buckets(
        options.size,
        options.enable_bucket,
        *options.bucket_range,
        options.bucket_reso_steps,
        options.bucket_no_upscale,
    )


def open_dataset(options: Options) -> Dataset:
    """Read folders, captions and sizes. Raises DatasetError.

    Folders are taken by name; sd-scripts takes them as the file system lists them.
    """
    root = Path(options.train_data_dir)
    if not root.is_dir():
        raise DatasetError(f"There is no data set at {root}.")
    pictures = [found for path in sorted(root.iterdir()) if path.is_dir() for found in _folder(path, options)]
    if not pictures:
        raise DatasetError(
            f"{root} holds no picture in a folder named N_name (N repeats, as in 10_cat); "
            f"pictures end in {', '.join(EXTENSIONS)}."
        )
    return Dataset(pictures, options)


def latents(pictures: Sequence[Picture], vae: torch.nn.Module, device: torch.device) -> torch.Tensor:
    """(pictures, 4, height / 8, width / 8), sampled from what the VAE says of pictures of one bucket."""
    weight = next(vae.parameters())
    images = torch.stack([picture.pixels() for picture in pictures]).to(device, weight.dtype)
    with torch.no_grad():
        sampled: torch.Tensor = vae.encode(images).latent_dist.sample()  # type: ignore[operator]
    return sampled


def cache_latents(dataset: Dataset, vae: torch.nn.Module, device: torch.device) -> Iterator[int]:
    """Fill every picture's latent, smallest buckets first; yields how many are done. :1120-1215."""
    done, size = 0, dataset.options.vae_batch_size
    waiting = sorted(dataset.pictures, key=lambda picture: picture.bucket[0] * picture.bucket[1])
    for _, run in groupby(waiting, key=lambda picture: picture.bucket):
        for group in batches(list(run), size):
            for member, latent in zip(group, latents(group, vae, device).cpu(), strict=True):
                member.latent = latent
            done += len(group)
            yield done


def batches(pictures: list[Picture], size: int) -> list[list[Picture]]:
    return [pictures[start : start + size] for start in range(0, len(pictures), size)]


def _folder(path: Path, options: Options) -> Iterator[Picture]:
    """Nothing where the name does not begin with a number of repeats."""
    repeats, _, words = path.name.partition("_")
    if not repeats.isdecimal() or int(repeats) < 1:
        return
    endings = {ending for extension in EXTENSIONS for ending in (extension, extension.upper())}
    for file in sorted(path.iterdir(), key=str):
        if file.suffix not in endings or file.name.startswith("."):
            continue
        caption = _read_caption(file.with_suffix("." + options.caption_extension.removeprefix(".")))
        with _opened(file) as image:
            yield Picture(file, words if caption is None else caption, int(repeats), image.size)
        if not options.cache_latents and not options.enable_bucket and image.size != options.size:
            raise DatasetError(
                f"{file} is {image.size[0]}×{image.size[1]} pixels, which without buckets and cached "
                "latents must be the resolution; set enable_bucket = true."
            )


def _read_caption(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DatasetError(f"The caption {path} is not UTF-8.") from None
    if not text:
        raise DatasetError(f"The caption {path} is empty.")
    return text.split("\n", 1)[0].strip()


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except OSError as error:
        raise DatasetError(f"The picture {path} cannot be read: {error}.") from None


def _resize(image: Pixels, size: Size) -> Pixels:
    """Area averages where no side grows, Lanczos otherwise; library/utils.py:216-264."""
    height, width = image.shape[:2]
    if (width, height) == size:
        return image
    if width < size[0] or height < size[1]:
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    sums = _average(_average(image.astype(np.float32), size[0], 1), size[1], 0)
    if (width, height) == (2 * size[0], 2 * size[1]):
        sums = np.floor(sums + np.float32(0.5))  # OpenCV's own shortcut for halving rounds halves up
    return np.clip(np.rint(sums), 0, 255).astype(np.uint8)


def _average(image: npt.NDArray[np.float32], size: int, axis: int) -> npt.NDArray[np.float32]:
    """Shrink one axis to `size`, each pixel the mean of the part that it covers: OpenCV's INTER_AREA.

    OpenCV ignores a part of less than a thousandth of a pixel (imgproc/src/resize.cpp, computeResizeAreaTab).
    """
    length = image.shape[axis]
    scale = length / size
    start = np.arange(size) * scale
    end = start + scale
    cell = np.minimum(scale, length - start)
    result = np.zeros((*image.shape[:axis], size, *image.shape[axis + 1 :]), np.float32)
    shape = [1, 1, 1]
    shape[axis] = size
    for offset in range(math.ceil(scale) + 1):
        source = np.floor(start).astype(int) + offset
        covered = np.minimum(end, source + 1) - np.maximum(start, source)
        weight = np.where((covered > 1e-3) & (source < length), covered / cell, 0).astype(np.float32)
        if weight.any():
            result += image.take(np.minimum(source, length - 1), axis) * weight.reshape(shape)
    return result
