import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from entrypoint.checkpoint import Lora
from entrypoint.contract import Tree
from entrypoint.failures import BadLora
from entrypoint.keeper import Keeper
from entrypoint.outbox import Outbox
from entrypoint.storage import Storage


class Run:
    """A trainer's folders, and the keeper of them; a LoRA works when it ends with a full stop."""

    def __init__(self, root: Path, checkpoints: Path | None = None) -> None:
        self.root, self.tree = root, Tree(root / "ml")
        request = SimpleNamespace(
            output=None, logs=None, checkpoints=checkpoints or root / "there", flat=False
        )
        plan = SimpleNamespace(request=request, run={"seed": 1}, states=())
        self.output, self.states = root / "output", root / "states"
        for folder in (self.output, self.states):
            folder.mkdir()
        self.prepared: Any = SimpleNamespace(
            plan=plan,
            output=self.output,
            states=self.states,
            logs=root / "logs",
            taken=None,
            output_name="cat",
        )
        self.outbox = Outbox(Storage())
        job: Any = SimpleNamespace(tree=self.tree, work=root)
        self.keeper = Keeper(job, self.prepared, self.outbox, self._verify)

    def write(self, name: str, text: str) -> Path:
        file = self.output / name
        file.write_text(text)
        return file

    def state(self, step: int, folder: Path | None = None) -> Path:
        made = (folder or self.states) / f"cat-step{step:08d}-state"
        made.mkdir()
        (made / "train_state.json").write_text(json.dumps({"current_step": step}))
        (made / "random_states_0.pkl").touch()
        return made

    @property
    def kept(self) -> set[str]:
        return {path.name for path in self.tree.model.glob("*")}

    def steps(self) -> dict[str, int]:
        found = self.tree.checkpoints.glob("*/state.json")
        return {path.parent.name: json.loads(path.read_text())["step"] for path in found}

    @staticmethod
    def _verify(path: Path, _prepared: Any) -> Lora:
        if not path.read_text().endswith("."):
            raise BadLora(f"{path.name} is none")
        return Lora(path, 1, 4, 1)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = Run(tmp_path)
    yield made
    made.outbox.wait()


def test_a_lora_is_kept_when_it_is_whole_and_works(run: Run) -> None:
    file = run.write("cat-1.safetensors", "half")
    for _ in range(3):  # a slow writer
        run.keeper.sweep()
    assert run.kept == set()
    file.write_text("whole.")
    run.keeper.sweep()
    assert run.kept == set()  # it may still grow
    run.keeper.sweep()
    assert run.kept == {"cat-1.safetensors"}
    assert (run.tree.checkpoints / "loras" / "cat-1.safetensors").read_text() == "whole."
    run.write("cat.safetensors", "the last one.")
    run.keeper.sweep(ended=True)
    assert run.kept == {"cat-1.safetensors", "cat.safetensors"}


def test_what_the_trainer_removes_goes_from_the_model_folder_too(run: Run) -> None:
    file = run.write("cat-1.safetensors", "whole.")
    run.keeper.sweep(ended=True)
    file.unlink()
    run.keeper.sweep()
    assert run.kept == set()


def test_a_state_is_kept_after_the_loras_that_were_made_before_it(run: Run) -> None:
    run.write("cat-1.safetensors", "whole.")
    run.state(4)
    run.keeper.sweep()
    assert run.steps() == {}
    run.write("cat-2.safetensors", "one that is being written")
    run.keeper.sweep()
    assert run.steps() == {"state-a": 4}
    assert not [*run.states.iterdir()]
    manifest = json.loads((run.tree.checkpoints / "state-a" / "state.json").read_text())
    assert set(manifest["loras"]) == {"cat-1.safetensors"}


def test_the_newest_states_are_kept_and_those_that_were_asked_for(run: Run) -> None:
    for step in (4, 8):
        run.state(step)
        run.keeper.sweep()
    run.state(12)
    run.state(13, run.output)
    unfinished = run.state(16, run.output)
    (unfinished / "random_states_0.pkl").unlink()
    run.keeper.sweep(ended=True)
    assert run.steps() == {"state-a": 12, "state-b": 8, "cat-step00000013-state": 13}


def test_states_are_sent_with_the_manifest_last(run: Run) -> None:
    run.write("cat-1.safetensors", "whole.")
    run.state(4)
    run.keeper.sweep(ended=True)
    sent = [(sorted(files), location) for files, location in run.keeper.left()]
    there = run.root / "there"
    files = ["loras/cat-1.safetensors", "state-a/random_states_0.pkl", "state-a/train_state.json"]
    assert sent == [(["state-a/state.json"], there), (files, there), (["state-a/state.json"], there)]
    for content, location in run.keeper.left():
        run.outbox.send(content, location)
    assert json.loads((there / "state-a" / "state.json").read_text())["step"] == 4
    assert [*run.keeper.left()] == []
    for content, location in run.keeper.finish():
        run.outbox.send(content, location)
    assert json.loads((there / "state-a" / "state.json").read_text())["finished"]


def test_what_cannot_be_kept_is_told_once_and_tried_again(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run.tree.base.mkdir()
    run.tree.model.write_text("a file in the way")
    run.write("cat-1.safetensors", "whole.")
    for _ in range(3):
        run.keeper.sweep(ended=True)
    assert capsys.readouterr().err.count("WARNING: a LoRA could not be kept") == 1
    run.tree.model.unlink()
    run.keeper.sweep(ended=True)
    assert run.kept == {"cat-1.safetensors"}


def test_a_fault_in_sending_does_not_end_the_sweeping(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("entrypoint.keeper.SWEEP_SECONDS", 0.01)

    def broken(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(run.outbox, "begin", broken)
    with run.keeper.watching():
        run.write("cat-1.safetensors", "whole.")
        while not run.kept:
            shutil.disk_usage("/")


@pytest.mark.parametrize("removed", [True, False])
def test_a_lora_that_is_not_looked_at_yet_holds_a_state_up_and_one_that_is_gone_does_not(
    removed: bool, run: Run
) -> None:
    lora = run.write("cat-1.safetensors", "whole.")
    run.keeper.sweep()
    run.state(4)
    lora.write_text("another.")
    run.keeper.sweep()
    assert run.steps() == {}
    if removed:
        lora.unlink()
    run.keeper.sweep()
    assert run.steps() == {"state-a": 4}


def test_a_lora_that_is_made_again_and_is_bad_leaves_the_good_one(run: Run) -> None:
    file = run.write("cat-1.safetensors", "whole.")
    run.keeper.sweep(ended=True)
    file.write_text("half")
    run.keeper.sweep(ended=True)
    assert (run.root / "kept" / "cat-1.safetensors").read_text() == "whole."
    assert (run.tree.model / "cat-1.safetensors").read_text() == "whole."


def test_states_that_the_trainer_removes_go_too(run: Run) -> None:
    state = run.state(13, run.output)
    run.keeper.sweep(ended=True)
    assert run.steps() == {state.name: 13}
    shutil.rmtree(state)
    run.keeper.sweep()
    assert run.steps() == {}


def test_of_two_places_far_away_one_is_always_whole(run: Run) -> None:
    there = run.root / "there"

    def send(*, only: int | None = None) -> None:
        for content, location in [*run.keeper.left()][:only]:
            run.outbox.send(content, location)

    def whole() -> list[int]:
        found = (json.loads(path.read_text()) for path in there.glob("state-*/state.json"))
        return [manifest["step"] for manifest in found if "step" in manifest]

    run.state(10)
    run.keeper.sweep(ended=True)
    send()
    assert whole() == [10]
    for step in (20, 30):  # of which no more than the mark goes through
        run.state(step)
        run.keeper.sweep(ended=True)
        send(only=1)
        assert whole() == [10]
    send()
    assert sorted(whole()) == [10, 30]


def test_a_place_that_is_the_jobs_own_is_not_sent_to(tmp_path: Path) -> None:
    made = Run(tmp_path, checkpoints=tmp_path / "ml" / "checkpoints")
    made.state(4)
    made.keeper.sweep(ended=True)
    for content, location in made.keeper.left():
        made.outbox.send(content, location)
    assert made.steps() == {"state-a": 4}


def test_it_sweeps_while_the_trainer_runs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("entrypoint.keeper.SWEEP_SECONDS", 0.01)
    run.write("cat-1.safetensors", "whole.")
    with run.keeper.watching():
        while not run.kept:
            shutil.disk_usage("/")
    assert run.kept == {"cat-1.safetensors"}
