"""entrypoint.gpu: what nvidia-smi tells."""

import os
from pathlib import Path

import pytest

from entrypoint.gpu import Gpu, find_gpu
from tests.harness import write_nvidia_smi


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that hides no GPU."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def told(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> Gpu | None:
    """The GPU of a machine whose nvidia-smi prints `lines`."""
    write_nvidia_smi(folder / "bin", *lines)
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)
    return find_gpu()


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
    for visible, found in (("0,1", 2), ("1", 1), ("", None)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        seen = find_gpu()
        assert (seen.count if seen else None) == found
