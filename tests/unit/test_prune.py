"""docker/prune.py on a small tree: what goes, and what ends a build."""

import subprocess
import sys
from pathlib import Path

import pytest

PRUNE = Path(__file__).parents[2] / "docker" / "prune.py"
ELF = b"\x7fELF"


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    for name, content in {
        "nvidia/cu13/lib/libcusolverMg.so.12": ELF,
        "nvidia/cu13/lib/libcusolver.so.12": ELF + b"\0libcublas.so.13\0",
        "nvidia/cu13/lib/libcudart_static.a": b"!<arch>",
        "nvidia/cu13/include/cuda.h": b"",
        "nvidia/cusolver.dist-info/licences.txt": b"libcusolverMg.so",
        "cuda/pathfinder/catalogue.py": b"'libcusolverMg.so.12'",
        "triton/backends/nvidia/include/cuda.h": b"for launchers",
        "triton/profiler/session.py": b"import libproton.so",
        "triton/_C/libproton.so": ELF,
        "sympy/core/tests/test_core.py": b"assert",
        "torch/version.py": b"cuda: Optional[str] = '13.0'\n",
        "bitsandbytes/libbitsandbytes_cpu.so": ELF,
        "bitsandbytes/libbitsandbytes_cuda128.so": ELF,
        "bitsandbytes/libbitsandbytes_cuda130.so": ELF,
    }.items():
        file = tmp_path / "packages" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return tmp_path / "packages"


def prune(packages: Path) -> "subprocess.CompletedProcess[str]":
    report = packages.parent / "made" / "removed.tsv"
    command = [sys.executable, str(PRUNE), str(packages), str(report)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_what_no_job_can_load_goes_and_is_written_down(packages: Path) -> None:
    assert prune(packages).returncode == 0
    assert {str(file.relative_to(packages)) for file in packages.rglob("*") if file.is_file()} == {
        "nvidia/cu13/lib/libcusolver.so.12",
        "nvidia/cusolver.dist-info/licences.txt",
        "cuda/pathfinder/catalogue.py",
        "triton/backends/nvidia/include/cuda.h",
        "torch/version.py",
        "bitsandbytes/libbitsandbytes_cpu.so",
        "bitsandbytes/libbitsandbytes_cuda130.so",
    }
    assert not (packages / "sympy").exists()
    lines = [line.split("\t") for line in (packages.parent / "made" / "removed.tsv").read_text().splitlines()]
    assert ["7", "1", "static archives"] in lines
    assert ["4", "1", "libraries that nothing loads"] in lines


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("nvidia/cu13/lib/libother.so.1", ELF + b"\0libcusolverMg.so.12\0"),
        ("torch/solvers.py", b"ctypes.CDLL('libcusolverMg.so')"),
    ],
)
def test_a_library_that_something_names_ends_the_build(name: str, content: bytes, packages: Path) -> None:
    (packages / name).write_bytes(content)
    ended = prune(packages)
    assert ended.returncode == 1
    assert "libcusolverMg.so cannot go, " in ended.stderr
    assert f"{name} names it" in ended.stderr
    assert (packages / "nvidia/cu13/lib/libcusolverMg.so.12").exists()


def test_a_cuda_version_that_bitsandbytes_lacks_ends_the_build(packages: Path) -> None:
    (packages / "torch" / "version.py").write_text("cuda: Optional[str] = '14.0'\n")
    ended = prune(packages)
    assert (ended.returncode, ended.stderr) == (
        1,
        "prune.py: bitsandbytes has no libbitsandbytes_cuda140.so\n",
    )
