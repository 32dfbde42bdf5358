import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from kohya import metrics
from kohya.launch import Watch

OPENING = """running training / 学習開始
  num epochs / epoch数: 2
  batch size per device / バッチサイズ: 3
  gradient accumulation steps / 勾配を合計するステップ数 = 2
  total optimization steps / 学習ステップ数: 8"""


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watch:
    """A watch on an accelerator that saves an empty state, and a pipe to read its records from."""
    read_end, write_end = os.pipe()
    monkeypatch.setenv(metrics.VARIABLE, str(write_end))
    made = Watch(tmp_path, "cat")
    made.accelerator = SimpleNamespace(
        num_processes=1,
        sync_gradients=True,
        save_state=lambda folder: Path(folder).mkdir(),
        end_training=lambda: os.close(write_end),
    )
    made.pipe = os.fdopen(read_end, encoding="utf-8")  # type: ignore[attr-defined]
    return made


def begin(watch: Watch) -> None:
    for line in OPENING.splitlines():
        watch.on_print(line)
    watch.on_print("\nepoch 1/2\n")


def batch(watch: Watch, loss: float, step: int, *, sync: bool) -> None:
    watch.accelerator.sync_gradients = sync
    watch.on_log({"loss/current": loss, "loss/average": 0.5, "lr/unet": 1e-4}, step)


def test_records_follow_optimizer_steps_not_batches(watch: Watch) -> None:
    begin(watch)
    batch(watch, 0.2, 0, sync=False)
    batch(watch, 0.4, 1, sync=True)
    watch.on_log({"loss/epoch_average": 0.3}, 1)
    watch.on_print("\nepoch 2/2\n")
    batch(watch, 0.6, 2, sync=True)
    watch.accelerator.end_training()
    assert list(metrics.read(watch.pipe)) == [  # type: ignore[attr-defined]
        metrics.Start(steps=8, epochs=2, images_per_step=6),
        metrics.Step(1, 1, pytest.approx(0.3), 0.5, {"unet": 1e-4}),
        metrics.Step(2, 2, 0.6, 0.5, {"unet": 1e-4}),
    ]


def test_a_stop_before_the_first_epoch_ends_at_once(watch: Watch) -> None:
    with pytest.raises(SystemExit) as caught:
        watch.on_signal(15, None)
    assert caught.value.code == 143


def test_a_stop_saves_a_state_at_the_end_of_the_running_step(watch: Watch, tmp_path: Path) -> None:
    begin(watch)
    watch.on_signal(15, None)
    batch(watch, 0.2, 0, sync=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as caught:
        batch(watch, 0.2, 1, sync=True)
    assert caught.value.code == 143
    assert [path.name for path in tmp_path.iterdir()] == ["cat-step00000001-state"]
