"""The GPUs of this machine, and whether the trainer's torch runs on them with the driver that is there."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from entrypoint.failures import Problem, Unfit

COMPAT = "/opt/cuda-compat"  # where an image has NVIDIA's forward-compatibility libraries, if it has them
COMPAT_VARIABLE = "CUDA_COMPAT_DIR"  # names another folder

# By CUDA's major version the branch of the oldest driver: NVIDIA, CUDA Compatibility, "Minor Version
# Compatibility", table 1, https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
_OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}

# By CUDA's major version the oldest compute capability: PyTorch's RELEASE.md, "PyTorch CUDA Support Matrix",
# for 2.9 to 2.11. CUDA 12 has none here: it begins with 5.0, 7.0 or 7.5, as the build may be.
_OLDEST_GPU = {13: 7.5}

# The branches of older drivers that the libraries of CUDA 13.0 run on: those that NVIDIA's own images
# nvidia/cuda:13.0.1 and 13.0.2 let through (NVIDIA_REQUIRE_CUDA in their environment).
_FORWARD_BRANCHES = {535, 550, 565, 570, 575}

# In the names of data-centre GPUs that CUDA 13 runs on. They have forward compatibility for certain, desktop
# cards have none, and of RTX cards NVIDIA says "select" (CUDA Compatibility, "Forward Compatibility").
_DATA_CENTRE = re.compile(
    r"\b(T4G?|A(2|10|10G|10M|16|30|40|100|800)|L(2|4|20|40|40S)|H(20|100|200|800)|GH200|G?B200)\b"
)


@dataclass(frozen=True)
class Gpu:
    """The GPUs of this machine: the first one, and how many there are."""

    name: str
    capability: float | None  # CUDA compute capability: 7.5 for a T4, 8.6 for an A10G; None: not told
    count: int
    driver: str | None = None  # the host's, also in a container: 580.65.06; None: not told
    memory: int | None = None  # bytes of one of them; None: not told


_MIB = 1 << 20

# The GPUs of configs/gpu, by their files' names: NVIDIA's data sheets, and
# https://developer.nvidia.com/cuda-gpus. Of the A100 the smaller one.
NAMED = {
    "t4": Gpu("Tesla T4", 7.5, 1, memory=15360 * _MIB),
    "a10g": Gpu("NVIDIA A10G", 8.6, 1, memory=23028 * _MIB),
    "l4": Gpu("NVIDIA L4", 8.9, 1, memory=23034 * _MIB),
    "l40s": Gpu("NVIDIA L40S", 8.9, 1, memory=46068 * _MIB),
    "a100": Gpu("NVIDIA A100", 8.0, 1, memory=40960 * _MIB),
    "h100": Gpu("NVIDIA H100", 9.0, 1, memory=81559 * _MIB),
}
UNNAMED = Gpu("a GPU that is not named", 8.0, 1)  # for which no preset is there, and that has bf16


@dataclass(frozen=True)
class Compat:
    """NVIDIA's forward-compatibility libraries, in the place of the driver's own; `why` they are used."""

    folder: Path
    why: str

    def environment(self) -> dict[str, str]:
        """What a process needs to find them first. Only the trainer's: nvidia-smi needs the driver's own."""
        path = [str(self.folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        return {"LD_LIBRARY_PATH": os.pathsep.join(path)}


def find_gpu() -> Gpu | None:
    """The GPUs, as the driver's own tool tells them; None where there is none."""
    # The tool of an old driver knows no compute_cap, and then tells nothing: yet its age is to be told.
    told = _ask("name", "compute_cap", "driver_version", "memory.total") or _ask("name", "driver_version")
    count = _visible(len(told))
    if not count:
        return None
    capability, driver = told[0].get("compute_cap", ""), told[0]["driver_version"]
    memory = re.fullmatch(r"(\d+) MiB", told[0].get("memory.total", ""))
    return Gpu(
        told[0]["name"],
        float(capability) if re.fullmatch(r"\d+\.\d+", capability) else None,  # it may be "[N/A]"
        count,
        driver if re.fullmatch(r"\d{3}(\.\d+)+", driver) else None,
        int(memory[1]) << 20 if memory else None,
    )


def works() -> bool:
    """Whether a GPU computes right now; not so where that is not told."""
    return any(row["utilization.gpu"] not in ("0 %", "[N/A]") for row in _ask("utilization.gpu"))


def compatibility(gpu: Gpu | None, python: str | Path) -> Compat | None:
    """The libraries that the trainer, run by `python`, needs in the place of the driver's own; None: none.

    Raises Unfit where its torch would not run on the GPU. What is not known refuses nothing.
    """
    if gpu is None or (cuda := _cuda(python)) is None:
        return None
    if not cuda:
        # A GPU that a container sees was asked for, as a rule, and is paid for: the trainer would go on for
        # hours without it. Where the CPU is meant, hiding the GPU says so, and the values then suit the CPU.
        wrong = "the trainer's torch is built without CUDA, and would train on the CPU"
        fix = "Take the image with CUDA (make image), or hide the GPU with CUDA_VISIBLE_DEVICES= (empty)"
        raise Unfit([Problem(gpu.name, wrong, fix)])
    major = int(cuda.split(".")[0])
    oldest = _OLDEST_GPU.get(major)
    if oldest is not None and gpu.capability is not None and gpu.capability < oldest:
        wrong = f"its compute capability {gpu.capability} is too low for CUDA {cuda}, which needs {oldest}"
        raise Unfit([Problem(gpu.name, wrong, "Take the image for CUDA 12 (make image CUDA=12)")])
    needed, branch = _OLDEST_DRIVER.get(major), _branch(gpu.driver)
    if needed is None or branch is None or branch >= needed:
        return None
    wrong = f"the driver {gpu.driver} is older than CUDA {cuda} needs ({needed})"
    suits = branch in _FORWARD_BRANCHES and _DATA_CENTRE.search(gpu.name) is not None
    folder = Path(os.environ.get(COMPAT_VARIABLE) or COMPAT)
    # Libraries that are new enough for CUDA are newer than the driver: older ones would break it.
    if suits and (_branch(_version(folder)) or 0) >= needed:
        return Compat(folder, f"{wrong}; NVIDIA's forward-compatibility libraries are used")
    ways = ["the image for CUDA 12 (make image CUDA=12)"] if branch >= _OLDEST_DRIVER[12] else []
    ways += ["the one for older drivers of data-centre GPUs (make image CUDA_COMPAT=nvidia)"] if suits else []
    fix = f"Take {', or '.join([*ways, f'a host with driver {needed} or newer'])}"
    raise Unfit([Problem(gpu.name, wrong, fix)])


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
    if named is None:
        return count
    names = (name.strip() for name in named.split(","))
    seen = takewhile(lambda name: name.startswith(("GPU-", "MIG-")) or name in map(str, range(count)), names)
    return min(count, len(list(seen)))  # CUDA stops at the first name that is none, such as -1


def _cuda(python: str | Path) -> str | None:
    """The CUDA that the torch of `python` is built for: 13.0; empty: none; None: it cannot be told.

    torch/version.py holds it and imports nothing, where torch itself takes seconds.
    """
    code = (
        "import importlib.util as u, pathlib as p, runpy; torch = p.Path(u.find_spec('torch').origin); "
        "print(runpy.run_path(str(torch.with_name('version.py')))['cuda'] or '')"
    )
    told = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    cuda = told.stdout.strip()
    return cuda if told.returncode == 0 and re.fullmatch(r"(\d+\.\d+)?", cuda) else None


def _version(folder: Path) -> str:
    """Of the driver that the libcuda in `folder` is from: its file is libcuda.so.580.65.06. Empty: none."""
    library = folder / "libcuda.so.1"
    return library.resolve().name.removeprefix("libcuda.so.") if library.is_file() else ""


def _branch(driver: str | None) -> int | None:
    """The first number of a driver's version."""
    first = (driver or "").split(".")[0]
    return int(first) if first.isdecimal() else None
