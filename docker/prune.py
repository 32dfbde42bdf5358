"""Take out of the installed packages what no job can load, and write down what was taken.

    python3 prune.py SITE_PACKAGES REPORT

A shared library goes only when no other file in the image names it: no ELF file links it, and neither an ELF
file nor Python code holds its name, by which dlopen would find it. This is looked up anew in every build, and
a library that is named ends it. REPORT gets a line a reason: bytes, files, reason.
"""

import mmap
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

# What goes: its reason, and globs below site-packages.
GONE = {
    "static archives": ["**/*.a"],
    "headers, where the image has no C++ or CUDA compiler": [
        "nvidia/**/include",
        "torch/include",
        "torch/share/cmake",
        "triton/backends/amd/include",
    ],
    "tests": [
        "torch/test",
        "triton/FileCheck",
        "triton/instrumentation/*Test*",
        "triton/plugins/*Test*",
        *(f"{package}/**/tests" for package in ("sympy", "networkx", "mpmath", "functorch")),
    ],
    "compilers of protocol buffers": ["torch/bin/protoc*"],
    "Triton's profiler, with a CUPTI of its own": [
        "triton/profiler",
        "triton/_C/libproton.so",
        "triton/backends/nvidia/lib/cupti",
    ],
    "Triton's disassemblers": ["triton/backends/nvidia/bin/cuobjdump", "triton/backends/nvidia/bin/nvdisasm"],
    "libraries that nothing loads": [
        "nvidia/**/libnvrtc*.alt.so.*",
        "nvidia/**/libcusolverMg.so.*",
        "nvidia/**/libcufftw.so.*",
        "nvidia/**/libnvblas.so.*",
        "nvidia/**/libnvperf_target.so",
        "nvidia/**/libpcsamplingutil.so",
        "nvidia/**/libcheckpoint.so",
        "onnxruntime/capi/libonnxruntime.so.*",
    ],
}
BITSANDBYTES = "bitsandbytes' libraries for other devices and CUDA versions"  # it composes their names

CATALOGUE = "cuda/pathfinder"  # a table of every library that NVIDIA has, to find one that is asked for


def main(packages: Path, report: Path) -> None:
    chosen = {why: _matching(packages, globs) for why, globs in GONE.items()}
    chosen[BITSANDBYTES] = _of_other_devices(packages)
    gone = {file: why for why, files in chosen.items() for file in files}
    if named := list(_named(packages, gone)):
        sys.exit("\n".join(f"prune.py: {library} cannot go, {file} names it" for library, file in named))
    lines = []
    for why, files in chosen.items():
        size = sum(file.lstat().st_size for file in files)
        lines.append(f"{size}\t{len(files)}\t{why}\n")
    for file in gone:
        file.unlink()
    for folder in sorted((one for one in packages.rglob("*") if one.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            shutil.rmtree(folder)
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text("".join(lines), encoding="utf-8")
    print("".join(lines))


def _matching(packages: Path, globs: list[str]) -> list[Path]:
    found = [path for glob in globs for path in packages.glob(glob)]
    files = [file for path in found for file in (path.rglob("*") if path.is_dir() else [path])]
    return sorted({file for file in files if not file.is_dir() or file.is_symlink()})


def _of_other_devices(packages: Path) -> list[Path]:
    """bitsandbytes takes the library of torch's CUDA version; the one for the CPU stays too."""
    version = packages / "torch" / "version.py"
    cuda = re.search(r"^cuda: .* = '([\d.]+)'", version.read_text(), re.M) if version.exists() else None
    if cuda is None:
        return []
    own = packages / "bitsandbytes" / f"libbitsandbytes_cuda{cuda[1].replace('.', '')}.so"
    if not own.exists():
        sys.exit(f"prune.py: bitsandbytes has no {own.name}")
    keep = {own, own.with_name("libbitsandbytes_cpu.so")}
    return sorted(file for file in own.parent.glob("libbitsandbytes_*.so") if file not in keep)


def _named(packages: Path, gone: dict[Path, str]) -> Iterator[tuple[str, Path]]:
    """The libraries that are to go, each with the files that stay and name it."""
    stay = [
        file for file in packages.rglob("*") if file not in gone and file.is_file() and file.stat().st_size
    ]
    left = {_library(file.name) for file in stay}
    names = {_library(file.name) for file, why in gone.items() if ".so" in file.name and why != BITSANDBYTES}
    for file in stay:
        if file.is_relative_to(packages / CATALOGUE):
            continue
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if file.suffix == ".py" or content[:4] == b"\x7fELF":
                yield from ((name, file) for name in names - left if content.find(name.encode()) >= 0)


def _library(name: str) -> str:
    """A library's name without its version: libcufftw.so of libcufftw.so.12."""
    return name[: name.find(".so") + 3] if ".so" in name else name


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
