import json
from pathlib import Path

import pytest

from entrypoint.contract import FAILURE_BYTES, Tree


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    (tmp_path / "input" / "config").mkdir(parents=True)
    return Tree(tmp_path)


def put(tree: Tree, name: str, content: object) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (tree.base / "input" / "config" / name).write_text(text)


def mount(tree: Tree, *names: str) -> None:
    for name in names:
        (tree.base / "input" / "data" / name).mkdir(parents=True)


def test_all_files_are_optional(tmp_path: Path) -> None:
    tree = Tree(tmp_path / "nothing")
    assert tree.hyperparameters() == ({}, [])
    assert tree.channels() == ({}, [])
    assert tree.hosts() == (["algo-1"], [])


def test_base_folder_is_moved_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SAGEMAKER_BASE_DIR", raising=False)
    assert Tree.from_environment().model == Path("/opt/ml/model")
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tmp_path))
    assert Tree.from_environment().model == tmp_path / "model"


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        ("fp16", "fp16"),
        ('"fp16"', "fp16"),  # as the SDK's Framework estimators send it
        ("0.0001", "0.0001"),
        ("true", "true"),
        ('["a=1", "b=2"]', '["a=1", "b=2"]'),
        ('"s3://bucket/train/param-1.json"', "s3://bucket/train/param-1.json"),
        ('"unfinished', '"unfinished'),
        ('""', ""),
        ('say "hi"', 'say "hi"'),
    ],
)
def test_hyperparameters_lose_the_quotes_that_the_sdk_adds(tree: Tree, sent: str, meant: str) -> None:
    put(tree, "hyperparameters.json", {"name": sent})
    assert tree.hyperparameters() == ({"name": meant}, [])


def test_what_the_platform_adds_for_itself_is_ignored(tree: Tree) -> None:
    put(
        tree,
        "hyperparameters.json",
        {"_tuning_objective_metric": "loss", "sagemaker_program": "x.py", "seed": "1"},
    )
    assert tree.hyperparameters() == ({"seed": "1"}, [])


def test_a_failure_that_is_no_text_is_written_all_the_same(tree: Tree) -> None:
    tree.write_failure("picture caf\udce9.png")
    assert tree.failure.read_text() == "picture caf\\udce9.png"


def test_null_hyperparameters_are_not_set(tree: Tree) -> None:
    put(tree, "hyperparameters.json", {"a": "null", "b": None, "c": "1"})
    assert tree.hyperparameters()[0] == {"c": "1"}


@pytest.mark.parametrize("content", ["{", "[]", '"text"'])
def test_a_damaged_file_is_a_problem_that_names_it(tree: Tree, content: str) -> None:
    put(tree, "hyperparameters.json", content)
    values, problems = tree.hyperparameters()
    assert values == {}
    assert "hyperparameters.json" in str(problems[0])


def test_channels_are_found_with_and_without_their_description(tree: Tree) -> None:
    mount(tree, "model", "dataset")
    put(tree, "inputdataconfig.json", {"model": {"TrainingInputMode": "FastFile"}, "dataset": {}})
    channels, problems = tree.channels()
    assert problems == []
    assert channels["model"].streamed
    assert not channels["dataset"].streamed
    assert channels["dataset"].path == tree.base / "input" / "data" / "dataset"


def test_manifests_beside_channels_are_ignored(tree: Tree) -> None:
    mount(tree, "model", "model-manifest")
    put(tree, "inputdataconfig.json", {"model": {}, "model-manifest": {}})
    channels, problems = tree.channels()
    assert (list(channels), problems) == (["model"], [])


def test_a_manifest_without_its_channel_is_no_manifest(tree: Tree) -> None:
    mount(tree, "other-manifest")
    assert "other-manifest" in str(tree.channels()[1][0])


def test_pipe_mode_is_refused_with_the_way_out(tree: Tree) -> None:
    mount(tree, "dataset")
    put(tree, "inputdataconfig.json", {"dataset": {"TrainingInputMode": "Pipe"}})
    channels, problems = tree.channels()
    assert channels == {}
    assert "Pipe" in str(problems[0])
    assert "FastFile" in str(problems[0])


def test_unknown_and_unmounted_channels_are_problems(tree: Tree) -> None:
    mount(tree, "training")
    put(tree, "inputdataconfig.json", {"dataset": {}})
    problems = " ".join(map(str, tree.channels()[1]))
    assert "channel training" in problems
    assert "the channels are model, dataset, config, vae, reg, weights" in problems
    assert "inputdataconfig.json names it" in problems


def test_more_than_one_host_is_refused(tree: Tree) -> None:
    put(tree, "resourceconfig.json", {"current_host": "algo-1", "hosts": ["algo-1", "algo-2"]})
    assert "2 hosts" in str(tree.hosts()[1][0])
    put(tree, "resourceconfig.json", {"current_host": "algo-1", "hosts": ["algo-1"]})
    assert tree.hosts()[1] == []


def test_hosts_that_are_no_list(tree: Tree) -> None:
    put(tree, "resourceconfig.json", {"hosts": "algo-1"})
    hosts, problems = tree.hosts()
    assert hosts == []
    assert str(problems[0]).startswith("resourceconfig.json: hosts: it is not a list. Write a JSON list")


def test_failure_file_holds_whole_characters_within_the_limit(tree: Tree) -> None:
    tree.write_failure("The cause: " + "絵" * 1000)
    content = tree.failure.read_bytes()
    assert FAILURE_BYTES - 2 <= len(content) <= FAILURE_BYTES
    assert content.decode().startswith("The cause: 絵")


def test_room_for_the_failure_file_is_held_free(tmp_path: Path) -> None:
    """A disk that is full by the end still takes the cause."""
    tree = Tree(tmp_path)
    tree.forget_failure()
    (held,) = (tmp_path / "output").iterdir()
    assert held.stat().st_size >= 4096
    tree.write_failure("It failed.")
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["failure"]
