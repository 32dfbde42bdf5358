"""Python's packages in the image: all of them, as locked, and whole although parts were taken out."""

import json
import re
from pathlib import Path

import pytest

from tests.image.container import ALL_HARDENED, Subject
from tests.image.test_jobs import EXPECTED

DOCKER = Path(__file__).parents[2] / "docker"
SITE = "/opt/venv/lib/python3.11/site-packages"
BUILTIN = "torch diffusers transformers accelerate tensorboard safetensors boto3 awscrt pydantic PIL"
SD_SCRIPTS = """torchvision xformers xformers.ops bitsandbytes lycoris.kohya onnxruntime cv2 einops ftfy
    lion_pytorch prodigyopt pytorch_optimizer schedulefree triton"""

# Libraries that no file in the image provides: the driver's, which NVIDIA's container toolkit mounts, …
DRIVER = r"libcuda\.so\.1|libnvidia-.*"
# … and those of parts that their packages load only with the hardware or the launcher that they are for.
OPTIONAL = {
    r"nvidia/nvshmem/lib/nvshmem_(bootstrap|transport)_.*": r"lib(mpi|pmix|oshmem|mlx5|fabric|ucp|ucs)\.so.*",
    r"nvidia/.*/libcufile_rdma\.so\.1": r"lib(ibverbs|mlx5|rdmacm)\.so.*",
    r"triton/plugins/.*": r"libtriton\.so",  # which loads them
}


@pytest.fixture(scope="module")
def installed(subject: Subject) -> dict[str, str]:
    """Every distribution in the image, with its version."""
    script = """
        import importlib.metadata, json
        print(json.dumps({d.name: d.version for d in importlib.metadata.distributions()}))
    """
    told = json.loads(subject.python(script))
    return {_normal(name): version for name, version in told.items()}


def test_the_lock_is_what_is_installed(installed: dict[str, str], variant: str) -> None:
    """Nothing is missing, nothing is of another version, and nothing came along."""
    lock = (DOCKER / f"{variant}.txt").read_text()
    locked = {_normal(name): version for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", lock, re.M)}
    if variant == "cpu":  # torch is the build's to choose
        installed = {name: version for name, version in installed.items() if name != "torch"}
    assert installed == locked


def test_there_is_no_pip(installed: dict[str, str], subject: Subject) -> None:
    """What a job installed would be no part of what was tested."""
    assert "pip" not in installed
    assert subject.shell("command -v pip pip3 easy_install || true") == ""


def test_packages_load_without_a_word(subject: Subject, variant: str) -> None:
    """As a user without a name, with nothing to write to but /tmp."""
    modules = f"{BUILTIN} {SD_SCRIPTS if variant != 'cpu' else ''}".split()
    script = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    told = subject.python(script, *modules, **ALL_HARDENED)
    said = [line for line in told.splitlines() if not any(re.fullmatch(known, line) for known in EXPECTED)]
    assert said == []


# As Python's loader looks: a compiled file counts by its hash, or by the time and size of its source.
COMPILED = """
    import importlib.util, pathlib, struct, sys
    def is_compiled(file):
        cache = pathlib.Path(importlib.util.cache_from_source(file))
        if not cache.exists(): return False
        flags, time, size = struct.unpack("<4xIII", cache.read_bytes()[:16])
        return flags == 1 or flags == 0 and (time, size) == (int(file.stat().st_mtime), file.stat().st_size)
    files = [file for file in pathlib.Path(sys.argv[1]).rglob("*.py")]
    for file in files:
        if not is_compiled(file):
            try: compile(file.read_bytes(), file, "exec")
            except SyntaxError: continue  # for another version of Python
            print(file)
"""


def test_packages_are_compiled(subject: Subject) -> None:
    """No job can write there, and to compile torch anew takes each of them seconds."""
    assert subject.python(COMPILED, SITE, read_only=True) == ""  # else Python itself would mend it


def test_bitsandbytes_has_torchs_cuda(subject: Subject, variant: str) -> None:
    if variant == "cpu":
        pytest.skip("the CPU image has no bitsandbytes")
    script = """
        import pathlib, torch, sys
        name = f"libbitsandbytes_cuda{torch.version.cuda.replace('.', '')}.so"
        print(name, pathlib.Path(sys.argv[1], "bitsandbytes", name).exists())
    """
    number = variant.removeprefix("cuda")
    assert re.fullmatch(rf"libbitsandbytes_cuda{number}\d\.so True\n", subject.python(script, SITE))


# Each library as the loader sees it, with its own folder and those that torch's search path reaches.
LINKS = """
    import os, pathlib, re, subprocess, sys
    from concurrent.futures import ThreadPoolExecutor
    site = pathlib.Path(sys.argv[1])
    def told(file, **environment):
        environment = {"LD_TRACE_LOADED_OBJECTS": "1", "LD_WARN": "yes", **environment}
        loader = ["/lib64/ld-linux-x86-64.so.2", file]
        run = subprocess.run(loader, capture_output=True, text=True, env=environment)
        return run.stdout + run.stderr
    def missing(file):
        text = told(file, LD_LIBRARY_PATH=f"{path}:{file.parent}")
        return re.findall(r"(\\S+) => not found|(version .*) not found", text)
    def is_elf(file):
        with file.open("rb") as opened: return opened.read(4) == b"\\x7fELF"
    torch = sorted((site / "torch/lib").glob("*.so"))
    reached = {one for file in torch for one in re.findall(rf"=> ({site}\\S+)/\\S+ ", told(file))}
    path = ":".join(sorted({*map(os.path.realpath, reached), str(site / "torch/lib")}))
    files = [file for file in site.rglob("*") if file.is_file() and not file.is_symlink() and is_elf(file)]
    print(len(files))
    with ThreadPoolExecutor(4) as threads:
        for file, found in zip(files, threads.map(missing, files)):
            for names in found: print(file.relative_to(site), *names, sep="\\t")
"""


def test_every_library_finds_what_it_links(subject: Subject) -> None:
    count, *lines = subject.python(LINKS, SITE).splitlines()
    assert int(count) > 50
    unexpected = []
    for line in lines:
        file, library, _ = line.split("\t")
        allowed = [names for files, names in OPTIONAL.items() if re.fullmatch(files, file)]
        if not any(re.fullmatch(names, library) for names in [DRIVER, *allowed]):
            unexpected.append(line)
    assert unexpected == []


EXTENSION = r"""
    from triton.runtime.build import compile_module_from_src
    print(compile_module_from_src('''
    #include <Python.h>
    static PyObject *answer(PyObject *self, PyObject *none) { return PyLong_FromLong(42); }
    static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, 0}, {0}};
    static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "made", 0, -1, methods};
    PyMODINIT_FUNC PyInit_made(void) { return PyModule_Create(&module); }
    ''', "made").answer())
"""


def test_triton_can_build_its_launchers(subject: Subject, variant: str) -> None:
    """As it does when a model is compiled: in C, at run time. It loads it from /tmp: hence exec."""
    if variant == "cpu":
        pytest.skip("the CPU image has no Triton")
    assert subject.python(EXTENSION, **{**ALL_HARDENED, "tmpfs": {"/tmp": "exec"}}) == "42\n"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
