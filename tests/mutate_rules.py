"""Deletes the rules one at a time, and shows that each deletion turns a test red.

    make mutate
    python -m tests.mutate_rules kohya/rules.py

A rule is a statement that tells what is wrong or what was mended: it makes a Problem, raises an error, or
holds a sentence; one that gathers what others tell; or an entry of a table that such a place reads. Each is
deleted in a copy of the project, and the tests of its module are run there. Prints the survivors; exits with
1 if there are any.
"""

import ast
import copy
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).parents[1]
AT_ONCE = 2
SECONDS = 300.0  # in which tests end on a busy machine; a deletion that makes them hang has been noticed
TESTS = {  # each module, and the tests in tests/unit that must notice: quick ones
    "kohya/rules.py": ["test_rules.py"],
    "kohya/config.py": ["test_config.py", "test_request.py"],
    "kohya/format.py": ["test_format.py"],
    "kohya/networks.py": ["test_networks.py", "test_rules.py"],
    "kohya/dataset_config.py": ["test_dataset_config.py"],
    "kohya/sd_scripts.py": ["test_sd_scripts.py"],
    "kohya/tokenizers.py": ["test_tokenizers.py"],
    "kohya/builtin/options.py": ["test_builtin_options.py"],
    "entrypoint/captions.py": ["test_captions.py"],
    "entrypoint/check.py": [
        "test_check.py",
        "test_inputs.py",
        "../contract/test_refusals.py",
        "test_checked.py",
    ],
    "entrypoint/checked.py": ["test_checked.py"],
    "entrypoint/checkpoint.py": ["test_checkpoint.py", "test_inputs.py"],
    "entrypoint/ckpt.py": ["test_ckpt.py"],
    "entrypoint/console.py": ["test_console.py", "test_request.py"],
    "entrypoint/contract.py": ["test_contract.py", "test_request.py"],
    "entrypoint/dataset.py": ["test_dataset.py", "test_inputs.py"],
    "entrypoint/diagnosis.py": ["test_diagnosis.py"],
    "entrypoint/failures.py": ["test_failures.py", "test_check.py"],
    "entrypoint/files.py": ["test_inputs.py", "test_model.py", "test_dataset.py", "test_format.py"],
    "entrypoint/foreign.py": ["test_checkpoint.py"],
    "entrypoint/gpu.py": ["test_gpu.py"],
    "entrypoint/header.py": ["test_header.py"],
    "entrypoint/inputs.py": ["test_inputs.py", "test_publish.py", "test_check.py"],
    "entrypoint/memory.py": ["test_memory.py"],
    "entrypoint/model.py": ["test_model.py"],
    "entrypoint/pickled.py": ["test_ckpt.py"],
    "entrypoint/pictures.py": ["test_pictures.py"],
    "entrypoint/request.py": ["test_request.py"],
    "entrypoint/resize.py": ["test_resize.py"],
    "entrypoint/storage/errors.py": ["test_storage_errors.py"],
    "entrypoint/storage/objects.py": ["test_storage_errors.py", "test_dataset.py", "test_storage.py"],
}
MAKERS = {"Problem", "Conflict", "WrongFile", "NotABaseModel", "change"}
GATHERED = {"problems", "notes"}
# The same examples each time: what chance finds is not what notices.
_QUIET = ["-x", "-q", "--hypothesis-seed=0", "-p", "no:cacheprovider", "-p", "no:xdist"]
Change = Callable[
    [ast.AST], ast.stmt | ast.expr
]  # changes a node, and returns the rule that it no longer has


@dataclass(frozen=True)
class Deletion:
    """A module without one of its rules."""

    module: str
    line: int
    what: str
    source: str


def deletions(module: str) -> Iterator[Deletion]:
    """Every rule of a module, deleted."""
    text = (ROOT / module).read_text(encoding="utf-8")
    tree = ast.parse(text)
    for place, node in enumerate(ast.walk(tree)):
        for change in _changes(node):
            without = copy.deepcopy(tree)
            rule = change(next(one for number, one in enumerate(ast.walk(without)) if number == place))
            source = ast.unparse(ast.fix_missing_locations(without))
            yield Deletion(module, rule.lineno, ast.unparse(rule).partition("\n")[0][:100], source)


def _changes(node: ast.AST) -> Iterator[Change]:
    for field in ("body", "orelse"):
        statements = getattr(node, field, None)
        for place, statement in enumerate(statements if isinstance(statements, list) else ()):
            if _is_rule(statement):
                yield lambda found, field=field, place=place: _silence(getattr(found, field), place)
    if isinstance(node, ast.Assign | ast.AnnAssign) and _is_table(node):
        for inner, literal in enumerate(ast.walk(node)):
            for place in range(len(_entries(literal, literal is node.value))):
                yield lambda found, inner=inner, place=place: _cut(found, inner, place)


def _is_rule(statement: ast.stmt) -> bool:
    """Whether this statement itself, and none inside it, tells of something."""
    match statement:
        case ast.Raise(exc=ast.Call(func=func)):
            return ast.unparse(func) != "AssertionError"  # of ourselves: it is never raised
        case ast.Expr(value=ast.Yield(value=told)):
            return isinstance(told, ast.Tuple) or _tells(statement)
        case ast.Expr(value=ast.Call(func=ast.Attribute(attr="append" | "warn"))) | ast.Return():
            return _tells(statement)
        case ast.AugAssign(target=ast.Name(id=name)):
            return name in GATHERED or _tells(statement)
        case ast.Assign():
            return _makes(statement) and "change" in ast.unparse(statement)
    return False


def _tells(node: ast.AST) -> bool:
    return _makes(node) or any(
        isinstance(one, ast.Constant) and isinstance(one.value, str) and one.value.count(" ") > 1
        for one in ast.walk(node)
    )


def _makes(node: ast.AST) -> bool:
    calls = (ast.unparse(one.func) for one in ast.walk(node) if isinstance(one, ast.Call))
    return any(call.rpartition(".")[2] in MAKERS for call in calls)


def _silence(statements: list[ast.stmt], place: int) -> ast.stmt:
    """Put what says nothing in the place of a statement."""
    old = statements[place]
    if isinstance(old, ast.Return):
        listed = any(isinstance(one, ast.List | ast.ListComp) for one in ast.walk(old))
        silent = ast.Return(ast.List([], ast.Load()) if listed else ast.Constant(None))
        # what is told as a tuple is told by one of several lines, and then it is the next one's turn
        statements[place] = ast.Pass() if isinstance(old.value, ast.Tuple) else silent
    elif isinstance(old, ast.Expr) and isinstance(old.value, ast.Yield):
        statements[place] = ast.parse("if False: yield").body[0]  # what stays is a generator
    else:
        statements[place] = ast.Pass()
    return old


def _is_table(statement: ast.Assign | ast.AnnAssign) -> bool:
    """A module's constant, or what a function chooses a sentence from."""
    target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
    if not isinstance(target, ast.Name) or statement.value is None:
        return False
    literal = isinstance(statement.value, ast.Dict | ast.Tuple)
    return target.id.strip("_").isupper() or (literal and target.id.islower() and _tells(statement))


def _entries(literal: ast.AST, whole: bool = True) -> list[ast.expr]:
    """A table's entries; those of a short tuple inside it are the columns of a row."""
    if isinstance(literal, ast.Dict):
        return literal.values
    entries = literal.elts if isinstance(literal, ast.Set | ast.Tuple | ast.List) else []
    return entries if whole or isinstance(literal, ast.Set) or len(entries) > 3 else []


def _cut(table: ast.AST, inner: int, place: int) -> ast.expr:
    literal = next(one for number, one in enumerate(ast.walk(table)) if number == inner)
    key = literal.keys.pop(place) if isinstance(literal, ast.Dict) else None
    value = _entries(literal).pop(place)
    return key or value


def is_noticed(deletion: Deletion, project: Path) -> bool:
    """Whether a test of the module turns red in this copy of the project."""
    file = project / deletion.module
    kept = file.read_text(encoding="utf-8")
    file.write_text(deletion.source, encoding="utf-8")
    try:
        return _run([f"tests/unit/{name}" for name in TESTS[deletion.module]], project) != 0
    finally:
        file.write_text(kept, encoding="utf-8")


def _run(tests: list[str], project: Path) -> int:
    """pytest's exit code, in a child of this process, where what takes long to import is there already."""
    child = os.fork()
    if child == 0:
        os.chdir(project)
        del sys.modules["tests"]  # the package that this file is in
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        sys.path.insert(0, str(project))
        sys.dont_write_bytecode = True
        code = 3
        try:
            code = int(pytest.main([*_QUIET, *tests]))
        finally:
            os._exit(code)
    end = time.monotonic() + SECONDS
    while (told := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, 9)
        time.sleep(0.02)
    return told[1]


def main(modules: list[str]) -> int:
    for module in modules:
        if unknown := {module} - TESTS.keys():
            print(f"{unknown.pop()} has no tests named here; there are {', '.join(TESTS)}", file=sys.stderr)
            return 2
    with tempfile.TemporaryDirectory() as folder:
        projects: Queue[Path] = Queue()
        for number in range(AT_ONCE):
            projects.put(Path(shutil.copytree(ROOT, Path(folder) / str(number), ignore=_NOT_COPIED)))

        def noticed(deletion: Deletion) -> bool:
            project = projects.get()
            try:
                return is_noticed(deletion, project)
            finally:
                projects.put(project)

        survivors, count = [], 0
        for module in modules:
            tests, project = [f"tests/unit/{name}" for name in TESTS[module]], projects.queue[0]
            if _run(tests, project):
                print(f"{module}: its tests fail as it is", file=sys.stderr)
                return 2
            made = list(deletions(module))
            with ThreadPoolExecutor(AT_ONCE) as pool:
                left = [one for one, seen in zip(made, pool.map(noticed, made), strict=True) if not seen]
            print(f"{module}: {len(made)} rules, {len(left)} that no test misses", flush=True)
            for one in left:
                print(f"  line {one.line}: {one.what}", flush=True)
            survivors += left
            count += len(made)
    print(f"{count} deletions, {len(survivors)} survivors")
    return 1 if survivors else 0


_NOT_COPIED = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "demo-out", "ml")

if __name__ == "__main__":
    # Imported here once, and not by each child; nothing of the project itself, which each child has changed.
    import boto3  # noqa: F401
    import hypothesis  # noqa: F401
    import numpy as np  # noqa: F401
    import PIL.Image  # noqa: F401
    import pydantic  # noqa: F401
    import pytest
    import torch  # noqa: F401

    sys.exit(main(sys.argv[1:] or list(TESTS)))
