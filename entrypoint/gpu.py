"""The GPUs of this machine."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """The GPUs of this machine: the first one, and how many there are."""

    name: str
    capability: float | None  # CUDA compute capability: 7.5 for a T4, 8.6 for an A10G; None: not told
    count: int
    driver: str | None = None  # the host's, also in a container: 580.65.06; None: not told


def find_gpu() -> Gpu | None:
    """The GPUs, as the driver's own tool tells them; None where there is none."""
    # The tool of an old driver knows no compute_cap, and then tells nothing: yet its age is to be told.
    told = _ask("name", "compute_cap", "driver_version") or _ask("name", "driver_version")
    count = _visible(len(told))
    if not count:
        return None
    capability, driver = told[0].get("compute_cap", ""), told[0]["driver_version"]
    return Gpu(
        told[0]["name"],
        float(capability) if re.fullmatch(r"\d+\.\d+", capability) else None,  # it may be "[N/A]"
        count,
        driver if re.fullmatch(r"\d{3}(\.\d+)+", driver) else None,
    )


def _ask(*fields: str) -> list[dict[str, str]]:
    """What nvidia-smi tells of each GPU; nothing where it fails."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return []
    rows = [line.rsplit(",", len(fields) - 1) for line in told.splitlines()]
    # A line of another form is a warning.
    return [dict(zip(fields, map(str.strip, row), strict=True)) for row in rows if len(row) == len(fields)]


def _visible(count: int) -> int:
    """How many of `count` GPUs the trainer will see."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return count if named is None else min(count, len([name for name in named.split(",") if name.strip()]))
