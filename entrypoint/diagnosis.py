"""What a trainer died of, told from its exit code and its last lines, with the way out."""

import re
import signal
from collections.abc import Iterable, Sequence

_CAUSES = (  # what the last lines hold; what it means, and the way out
    (
        r"CUDA out of memory|torch\.OutOfMemoryError|CUDA error: out of memory|The GPU has too little memory",
        "The GPU ran out of memory. Set gradient_checkpointing=true, a smaller train_batch_size, network_dim "
        "or resolution, or take an instance with a larger GPU.",
    ),
    (
        r"No space left on device|Disk quota exceeded",
        "The disk is full. Give the job a larger volume (VolumeSizeInGB), or save fewer LoRAs.",
    ),
    (
        r"Bus error|unable to open shared memory object|unable to mmap \d+ bytes",
        "/dev/shm is too small for the loader's workers. Set max_data_loader_n_workers=0, or start the "
        "container with --shm-size=1g.",
    ),
    (
        r"driver on your system is too old|CUDA driver version is insufficient|on non supported HW",
        "The GPU's driver is too old for this CUDA. Use a newer driver, or an image for an older CUDA.",
    ),
    (
        r"(?m)^(?:\[rank\d+\]: )?(?:ModuleNotFoundError|ImportError): No module named '(\w+)",
        "{0} is not installed where the trainer runs. Install it there, or do without it.",
    ),
    (
        r"NaN detected in latents",
        "The VAE made NaN of a picture. Set no_half_vae=true, or mixed_precision=bf16.",
    ),
    (
        r"optimizer got an empty parameter list",
        "Every learning rate is 0, so there was nothing to train. Set learning_rate or unet_lr.",
    ),
    (r"No data found", "The trainer found no pictures."),
)


# How the launcher of several processes reports on them; what they said themselves comes before it.
_REPORT = "torch/distributed/elastic"
_BAR = re.compile(r"\d%\|")  # tqdm draws its bar once more when an error ends it, below the error
_RANK = re.compile(r"\[rank\d+\]: ")
_KILLED = re.compile(r"exitcode\s*: -9\b")


def last_words(tail: Sequence[str]) -> str:
    """The line that a trainer ended with; of several processes, the last line of the one that failed."""
    report = next((number for number, line in enumerate(tail) if _REPORT in line), len(tail))
    own = [line for line in tail[:report] if not _BAR.search(line)] or tail
    said = [line for line in own if _RANK.match(line)] or own
    return _RANK.sub("", said[-1]) if said else "It printed nothing"


def diagnose(code: int, tail: Iterable[str]) -> str | None:
    """The cause of the end of a trainer with a `code` that is not 0 (negative: a signal); None if unknown."""
    text = "\n".join(tail)
    for pattern, cause in _CAUSES:
        if found := re.search(pattern, text):
            return cause.format(*found.groups())
    if code == -signal.SIGKILL or _KILLED.search(text):
        return (
            "The trainer was killed, most likely because the machine ran out of memory. "
            "Take an instance with more of it, or set max_data_loader_n_workers=0."
        )
    return None
