import math
import re

import pytest

from entrypoint.progress import METRIC_DEFINITIONS, Progress
from kohya.metrics import Start, Step

LINE = re.compile(
    r"step=\d+/\d+ epoch=\d+/\d+ loss=\d+\.\d{4} avg_loss=\d+\.\d{4} lr=\d\.\de[+-]\d\d"
    r"( images_per_s=\d+\.\d\d eta_s=\d+)?"
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def steps(progress: Progress, clock: Clock, count: int, seconds: float) -> None:
    for number in range(1, count + 1):
        clock.now += seconds
        progress.take(Step(number, 1 + (number - 1) // 4, 0.5, 0.25, {"unet": 1e-4}))


def test_a_metric_line_as_it_is_spelled(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = Progress(terminal=False, clock=clock)
    progress.take(Start(steps=8, epochs=2, images_per_step=3))
    steps(progress, clock, 5, seconds=2.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step=1/8 epoch=1/2 loss=0.5000 avg_loss=0.2500 lr=1.0e-04"
    assert lines[-1] == (
        "step=5/8 epoch=2/2 loss=0.5000 avg_loss=0.2500 lr=1.0e-04 images_per_s=1.50 eta_s=6"
    )
    assert all(LINE.fullmatch(line) for line in lines)


def test_fast_steps_are_told_once_a_second_and_the_last_one_always(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Clock()
    progress = Progress(terminal=False, clock=clock)
    progress.take(Start(steps=40, epochs=1, images_per_step=1))
    steps(progress, clock, 40, seconds=0.25)
    told = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert told == [f"step={number}/40" for number in (1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 40)]


def test_a_run_that_goes_on_counts_its_own_speed(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = Progress(terminal=False, clock=clock)
    progress.take(Start(steps=100, epochs=1, images_per_step=1, step=90))
    for number in (91, 92):
        clock.now += 1.0
        progress.take(Step(number, 1, 0.5, 0.5, {"unet": 1e-4}))
    assert "images_per_s=1.00 eta_s=8" in capsys.readouterr().out


def test_a_terminal_gets_a_bar_instead_of_lines(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = Progress(terminal=True, clock=clock)
    progress.take(Start(steps=4, epochs=1, images_per_step=1))
    progress.write("epoch 1/1")
    steps(progress, clock, 4, seconds=1.0)
    progress.close()
    out = capsys.readouterr().out
    assert "step=" not in out
    assert "4/4" in out
    assert "epoch 1/1\n" in out


def test_ten_steps_of_nan_in_a_row_raise_the_alarm_and_fewer_do_not() -> None:
    progress = Progress(terminal=False)
    progress.take(Start(steps=100, epochs=1, images_per_step=1))
    for number, loss in enumerate([math.nan] * 9 + [0.5] + [math.nan] * 9, 1):
        progress.take(Step(number, 1, loss, 0.5, {"unet": 1e-4}))
        assert progress.alarm is None
    progress.take(Step(20, 1, math.inf, 0.5, {"unet": 1e-4}))
    assert progress.alarm is not None
    assert "not a number for 10 steps in a row" in progress.alarm


def test_a_long_silence_says_what_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = Progress(terminal=False, clock=clock)
    progress.write("caching latents.")
    for clock.now in (59, 60, 61, 119, 120):
        progress.listen()
    progress.take(Start(steps=8, epochs=2, images_per_step=3, step=4))
    clock.now += 60
    progress.listen()
    assert capsys.readouterr().out.splitlines() == [
        "caching latents.",
        "train: nothing from the trainer for 60 s, waiting for the first step; its last line was: "
        "caching latents.",
        "train: nothing from the trainer for 120 s, waiting for the first step; its last line was: "
        "caching latents.",
        "train: nothing from the trainer for 60 s, waiting for step 5; its last line was: caching latents.",
    ]


# What sd-scripts v0.10.1 prints, and the job beside it.
OTHERS = """\
steps:  50%|█████     | 4/8 [00:03<00:03,  1.23it/s, avr_loss=0.0971]
steps: 100%|██████████| 8/8 [00:06<00:00,  1.27it/s, Average key norm=0.12, avr_loss=0.1]
epoch 1/2
  num epochs / epoch数: 2
  total optimization steps / 学習ステップ数: 8
  gradient accumulation steps / 勾配を合計するステップ数 = 1
epoch is incremented. current_epoch: 0, epoch: 1
prepare optimizer, data loader etc.
text_encoder_lr=5e-05 unet_lr=0.0001 lr=1.0e-04
saving checkpoint: /tmp/output/shape-000001.safetensors
model saved. loss=0.1234
training is done: 8 steps, average loss 0.4377
check: sd15 base model, 0.04 GB; 4 pictures, 8 an epoch with repeats
fetch: 4 batches an epoch, 2 epochs, 8 steps
"""


def test_metrics_are_read_from_metric_lines_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """Names and expressions within the limits of CreateTrainingJob; a number that is none gives no point."""
    progress = Progress(terminal=False, clock=Clock())
    progress.take(Start(steps=8, epochs=2, images_per_step=1))
    progress.take(Step(8, 2, math.nan, math.inf, {"unet": 1e-5}))
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "step=8/8 epoch=2/2 loss=nan avg_loss=inf lr=1.0e-05"
    read = {}
    for definition in METRIC_DEFINITIONS:
        name, expression = definition["Name"], definition["Regex"]
        assert 0 < len(name) <= 255
        assert 0 < len(expression) <= 500
        assert re.compile(expression).groups == 1
        assert not [other for other in OTHERS.splitlines() if re.search(expression, other)]
        if match := re.search(expression, line):
            read[name] = float(match[1])
    assert len(METRIC_DEFINITIONS) <= 40
    assert read == {"train:step": 8, "train:epoch": 2, "train:lr": 1e-5}
