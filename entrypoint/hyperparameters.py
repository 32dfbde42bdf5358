"""The job's own hyperparameters: what each takes, its default, and what it is for.

All others are options of sd-scripts under their own names. The README's table is made from this one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kohya.config import KINDS

Trainer = Literal["sd-scripts", "builtin"]
TRAINERS: tuple[Trainer, ...] = ("sd-scripts", "builtin")  # the first is the default
STATE_EVERY_MINUTES = 5
STALL_MINUTES = 30
# The defaults of SmilingWolf's own pages for general tags and for characters.
GENERAL_THRESHOLD, CHARACTER_THRESHOLD = 0.35, 0.85
PIXELS = (64, 4096)  # the latents of less are no picture, and no LoRA is trained on more

_PLACE = "S3 URI or path"
_SWITCH = ("true", "false")


@dataclass(frozen=True)
class Hyperparameter:
    """`takes`: the values to choose from, or what a value is. `default`: None where there is none."""

    takes: tuple[str, ...] | str
    default: Any
    meaning: str
    otherwise: str = "none"  # what stands for a default where there is none

    @property
    def values(self) -> str:
        """What it takes, and its default."""
        takes = self.takes if isinstance(self.takes, str) else ", ".join(f"`{one}`" for one in self.takes)
        if self.default is None:
            return f"{takes}; {self.otherwise}" if self.otherwise else takes
        return f"{takes}; `{self.default}`"


def _input(meaning: str) -> Hyperparameter:
    return Hyperparameter(_PLACE, None, meaning, otherwise="")


HYPERPARAMETERS: Mapping[str, Hyperparameter] = {
    "model_uri": _input("the base model, where there is no channel `model`"),
    "dataset_uri": _input("the data set, where there is no channel `dataset`"),
    "config_uri": _input("a TOML, where there is no channel `config`"),
    "vae_uri": _input("a VAE, where there is no channel `vae`"),
    "reg_uri": _input("regularisation pictures, where there is no channel `reg`"),
    "weights_uri": _input("LoRAs to begin with, where there is no channel `weights`"),
    "tagger_uri": _input("a WD14 tagger, where there is no channel `tagger`; also beside `s3_location`"),
    "output_uri": Hyperparameter(
        _PLACE, None, "what comes out is published there too: a LoRA as soon as it is verified"
    ),
    "logs_uri": Hyperparameter(_PLACE, None, "the event log is published there too, at least once a minute"),
    "checkpoint_uri": Hyperparameter(
        _PLACE, None, "states are kept there too, and a job that is started again goes on from them"
    ),
    "s3_location": _input("ESD's parameter JSON; excludes the URIs above"),
    "kind": Hyperparameter(KINDS, None, "a mismatch is refused", otherwise="told from the base model"),
    "trainer": Hyperparameter(TRAINERS, TRAINERS[0], "which of the two trainers"),
    "allow_missing_captions": Hyperparameter(
        _SWITCH, "false", "pictures without a caption are trained on their folder's name"
    ),
    "caption": Hyperparameter(("wd14",), None, "missing captions are written by the tagger"),
    "caption_general_threshold": Hyperparameter(
        "above 0, up to 1", GENERAL_THRESHOLD, "how sure the tagger must be of a general tag"
    ),
    "caption_character_threshold": Hyperparameter(
        "above 0, up to 1", CHARACTER_THRESHOLD, "and of a character"
    ),
    "resize": Hyperparameter(
        f"pixels, {PIXELS[0]} to {PIXELS[1]}", None, "the shorter side that larger pictures get"
    ),
    "resize_crop": Hyperparameter(_SWITCH, "false", "and cropped to squares"),
    "state_every_minutes": Hyperparameter(
        "a number", STATE_EVERY_MINUTES, "how often a state is saved while it trains; 0: only when it stops"
    ),
    "stall_minutes": Hyperparameter(
        "a number",
        STALL_MINUTES,
        "after how long a trainer is ended that prints nothing and uses neither CPU nor GPU; 0: never",
    ),
}


def table() -> Iterator[str]:
    """The README's table, by lines of Markdown."""
    yield "| name | value; default | |"
    yield "|---|---|---|"
    for name, one in HYPERPARAMETERS.items():
        yield f"| `{name}` | {one.values} | {one.meaning} |"
