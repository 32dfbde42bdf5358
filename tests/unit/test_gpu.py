"""entrypoint.gpu: what nvidia-smi tells, and which driver, GPU and libraries go with which torch."""

import os
import sys
from pathlib import Path

import pytest
import torch

from entrypoint import gpu
from entrypoint.failures import Unfit
from entrypoint.gpu import Compat, Gpu, compatibility, find_gpu
from tests.harness import write_compat, write_nvidia_smi, write_torch

T4, A10G, L40S = ("Tesla T4", 7.5), ("NVIDIA A10G", 8.6), ("NVIDIA L40S", 8.9)
GEFORCE, V100 = ("NVIDIA GeForce RTX 4090", 8.9), ("Tesla V100-SXM2-16GB", 7.0)
CUDA_12, COMPAT = "make image CUDA=12", "make image CUDA_COMPAT=nvidia"


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without variables or libraries of its own."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    monkeypatch.setenv("CUDA_COMPAT_DIR", str(tmp_path / "compat"))


def told(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> Gpu | None:
    """The GPU of a machine whose nvidia-smi prints `lines`."""
    write_nvidia_smi(folder / "bin", *lines)
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)
    return find_gpu()


def met(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: tuple[str, float],
    driver: str | None,
    cuda: str | None,
) -> Compat | str | None:
    """What comes of a GPU, a driver and a torch: libraries, nothing, or the problem's text."""
    write_torch(folder / "torch", cuda)
    monkeypatch.setenv("PYTHONPATH", str(folder / "torch"))
    try:
        return compatibility(Gpu(*kind, 1, driver), sys.executable)
    except Unfit as error:
        return str(error)


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (["NVIDIA A100-SXM4-40GB, 8.0, 535.183.01"] * 2, Gpu("NVIDIA A100-SXM4-40GB", 8.0, 2, "535.183.01")),
        (["Tesla T4, 7.5, 580.65.06"], Gpu("Tesla T4", 7.5, 1, "580.65.06")),
        (["Tesla T4, 7.5, [N/A]"], Gpu("Tesla T4", 7.5, 1, None)),
        (["Tesla T4, [N/A], 550.90.07"], Gpu("Tesla T4", None, 1, "550.90.07")),
        (["Tesla T4, 7.5, 550.90.07", "WARNING: infoROM is corrupted"], Gpu("Tesla T4", 7.5, 1, "550.90.07")),
        (["No devices were found"], None),
        ([], None),
    ],
)
def test_the_gpu_is_told_by_nvidia_smi(
    lines: list[str], found: Gpu | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert told(tmp_path, monkeypatch, *lines) == found


def test_the_tool_of_an_old_driver_knows_no_capability(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told(tmp_path, monkeypatch)
    refusal = (
        "case $1 in *compute_cap*) echo 'Field \"compute_cap\" is not a valid field to query.'; exit 2; esac"
    )
    (tmp_path / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\n{refusal}\necho 'Tesla T4, 418.87.00'\n")
    assert find_gpu() == Gpu("Tesla T4", None, 1, "418.87.00")


def test_gpus_that_are_hidden_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told(tmp_path, monkeypatch, *["NVIDIA L4, 8.9, 580.65.06"] * 2)
    for visible, found in (("0,1", 2), ("1", 1), ("", None), ("-1", None), ("0,7,1", 1), ("GPU-5f", 1)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        seen = find_gpu()
        assert (seen.count if seen else None) == found


def test_cuda_is_told_as_torch_tells_it() -> None:
    assert gpu._cuda(sys.executable) == (torch.version.cuda or "")


@pytest.mark.parametrize("kind", [T4, A10G, GEFORCE])
@pytest.mark.parametrize(
    ("driver", "cuda"),
    [
        ("580.65.06", "13.0"),
        ("595.10", "13.0"),  # and must not get older libraries
        ("550.90.07", "12.8"),
        ("535.183.01", "12.8"),
        ("525.60.13", "12.8"),
        (None, "13.0"),  # what is not known refuses nothing
        ("550.90.07", "99.0"),
    ],
)
def test_a_driver_that_serves(
    kind: tuple[str, float], driver: str | None, cuda: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_compat(tmp_path / "compat", "580.65.06")
    assert met(tmp_path, monkeypatch, kind, driver, cuda) is None


@pytest.mark.parametrize("driver", ["535.183.01", "550.90.07", "570.211.01"])
@pytest.mark.parametrize(
    "kind", [T4, A10G, L40S, ("NVIDIA H100 80GB HBM3", 9.0), ("NVIDIA A100-SXM4-40GB", 8.0)]
)
def test_an_older_driver_and_the_libraries(
    kind: tuple[str, float], driver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_compat(tmp_path / "compat", "580.65.06")
    found = met(tmp_path, monkeypatch, kind, driver, "13.0")
    assert isinstance(found, Compat)
    assert found.why.startswith(f"the driver {driver} is older than CUDA 13.0 needs (580); ")
    assert found.environment() == {"LD_LIBRARY_PATH": str(folder)}
    monkeypatch.setenv("LD_LIBRARY_PATH", "/usr/local/nvidia/lib:/other")
    assert found.environment() == {"LD_LIBRARY_PATH": f"{folder}:/usr/local/nvidia/lib:/other"}
    monkeypatch.setenv("LD_LIBRARY_PATH", "")  # an empty part would be the working directory: ld.so(8)
    assert found.environment() == {"LD_LIBRARY_PATH": str(folder)}


@pytest.mark.parametrize("driver", ["565.57.01", "575.51.03"])
def test_other_drivers_that_the_libraries_serve(
    driver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_compat(tmp_path / "compat", "580.65.06")
    assert isinstance(met(tmp_path, monkeypatch, T4, driver, "13.0"), Compat)


@pytest.mark.parametrize("variable", [None, ""])
def test_the_libraries_of_the_image(
    variable: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_compat(tmp_path / "image", "580.65.06")
    monkeypatch.setattr(gpu, "COMPAT", str(folder))
    assert isinstance(met(tmp_path, monkeypatch, T4, "550.90.07", "13.0"), str)  # another folder is named
    if variable is None:
        monkeypatch.delenv("CUDA_COMPAT_DIR")
    else:
        monkeypatch.setenv("CUDA_COMPAT_DIR", variable)
    found = compatibility(Gpu(*T4, 1, "550.90.07"), sys.executable)
    assert found is not None
    assert found.folder == folder


@pytest.mark.parametrize(
    "there", ["nothing", "an empty folder", "535.54.03", "570.211.01", "1", "a lost link"]
)
def test_an_older_driver_without_libraries_that_serve(
    there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "compat"
    if there == "an empty folder":
        folder.mkdir()
    elif there == "a lost link":
        (write_compat(folder, "580.65.06") / "libcuda.so.580.65.06").unlink()
    elif there == "1":  # a copy without its version's name
        folder.mkdir()
        (folder / "libcuda.so.1").touch()
    elif there != "nothing":
        write_compat(folder, there)
    problem = met(tmp_path, monkeypatch, T4, "550.90.07", "13.0")
    assert isinstance(problem, str)
    assert problem.startswith("Tesla T4: the driver 550.90.07 is older than CUDA 13.0 needs (580). ")
    assert CUDA_12 in problem
    assert COMPAT in problem
    assert "driver 580 or newer" in problem


@pytest.mark.parametrize(
    ("kind", "driver"),
    [
        (GEFORCE, "550.90.07"),
        (("NVIDIA RTX A4000", 8.6), "550.90.07"),
        (("NVIDIA T400 4GB", 7.5), "550.90.07"),  # a desktop card
        (T4, "560.35.03"),  # a branch without forward compatibility
    ],
)
def test_what_has_no_forward_compatibility(
    kind: tuple[str, float], driver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_compat(tmp_path / "compat", "580.65.06")
    problem = met(tmp_path, monkeypatch, kind, driver, "13.0")
    assert isinstance(problem, str)
    assert CUDA_12 in problem
    assert COMPAT not in problem


@pytest.mark.parametrize(("cuda", "needed"), [("12.8", 525), ("13.0", 580)])
def test_a_driver_that_is_too_old_for_every_image(
    cuda: str, needed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_compat(tmp_path / "compat", "580.65.06")
    problem = met(tmp_path, monkeypatch, T4, "470.256.02", cuda)
    assert problem == (
        f"Tesla T4: the driver 470.256.02 is older than CUDA {cuda} needs ({needed}). "
        f"Take a host with driver {needed} or newer."
    )


def test_a_gpu_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = met(tmp_path, monkeypatch, V100, "580.65.06", "13.0")
    assert isinstance(problem, str)
    assert "compute capability 7.0 is too low for CUDA 13.0, which needs 7.5" in problem
    assert CUDA_12 in problem


def test_each_cuda_has_its_oldest_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, oldest in (("11.8", 450), ("12.8", 525), ("13.0", 580)):
        assert met(tmp_path / cuda, monkeypatch, T4, f"{oldest}.1", cuda) is None
        problem = met(tmp_path / f"{cuda} again", monkeypatch, T4, f"{oldest - 1}.1", cuda)
        assert isinstance(problem, str)
        assert f"the driver {oldest - 1}.1 is older than CUDA {cuda} needs ({oldest}). Take " in problem
        assert f"a host with driver {oldest} or newer." in problem


def test_cuda_12_has_the_older_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert met(tmp_path, monkeypatch, V100, "550.90.07", "12.8") is None


def test_a_torch_without_cuda_leaves_no_gpu_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = met(tmp_path, monkeypatch, T4, "580.65.06", None)
    assert isinstance(problem, str)
    assert "Tesla T4: the trainer's torch is built without CUDA" in problem
    assert "CUDA_VISIBLE_DEVICES=" in problem
    assert compatibility(None, sys.executable) is None


def test_a_python_without_torch_refuses_nothing(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    assert compatibility(Gpu(*T4, 1, "470.256.02"), python) is None


def test_the_gpus_that_can_be_named() -> None:
    told = {name: (one.capability, one.memory) for name, one in gpu.NAMED.items()}
    mib = 1 << 20
    assert told == {  # what nvidia-smi tells of them
        "t4": (7.5, 15360 * mib),
        "a10g": (8.6, 23028 * mib),
        "l4": (8.9, 23034 * mib),
        "l40s": (8.9, 46068 * mib),
        "a100": (8.0, 40960 * mib),
        "h100": (9.0, 81559 * mib),
    }
