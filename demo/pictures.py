"""The embedded data set: real photographs out of the wheels of scikit-image and scikit-learn.

Only files that lie inside the wheels (their RECORD lists them), so that no network is touched;
`skimage.data` fetches the others with pooch. They are copied as they are: PNG and JPEG, grey and
colour, several shapes, 300 to 1000 pixels a side. By scikit-image's docstrings they are in the public
domain or CC0; china.jpg and flower.jpg are CC BY 2.0 (sklearn/datasets/images/README.txt).
"""

import shutil
from importlib.util import find_spec
from pathlib import Path

PICTURES = Path("skimage/data"), Path("sklearn/datasets/images")
REPEATS = 2

# file in a wheel → what is to be seen on it, written by looking at it
CAPTIONS = {
    "astronaut.png": "photo of a smiling astronaut in an orange space suit, in front of a flag and a shuttle",
    "brick.png": "photo of a brick wall, black and white",
    "camera.png": "photo of a man in a dark coat behind a camera on a tripod, on a lawn, black and white",
    "chelsea.png": "photo of a tabby cat, close-up of its face",
    "china.jpg": "photo of a Chinese tower of four storeys above trees, beside a lake",
    "coffee.png": "photo of a red cup of coffee on a saucer with a spoon, on a wooden table",
    "coins.png": "photo of four rows of ancient coins on a dark background, black and white",
    "flower.jpg": "photo of an orange dahlia in front of dark green leaves",
    "grass.png": "photo of grass and leaves from above, black and white",
    "gravel.png": "photo of gravel from above, black and white",
    "hubble_deep_field.jpg": "photo of many distant galaxies in a black sky, taken by a space telescope",
    "moon.png": "photo of the surface of the moon with a crater, black and white",
    "motorcycle_left.png": "photo of a red motorcycle parked in a garage, shelves behind it",
    "rocket.jpg": "photo of a white rocket on its launch pad between lattice towers, at dusk",
}


def write(folder: Path) -> Path:
    """Copy the photographs, each with its caption in a `.txt`, into `folder`/2_photo; return `folder`."""
    target = folder / f"{REPEATS}_photo"
    target.mkdir(parents=True, exist_ok=True)
    sources = {file.name: file for wheel in PICTURES for file in _inside(wheel)}
    for name, caption in CAPTIONS.items():
        shutil.copyfile(sources[name], target / name)
        (target / name).with_suffix(".txt").write_text(caption + "\n")
    return folder


def _inside(folder: Path) -> list[Path]:
    """The files of an installed package's folder, without importing the package (which takes seconds)."""
    package, *rest = folder.parts
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed. Type: pip install '.[demo]'.")
    return [file for file in Path(spec.origin).parent.joinpath(*rest).iterdir() if file.is_file()]
