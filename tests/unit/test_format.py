"""`format`: the text that comes out, what is said of it, and that it means what it meant."""

import json
import os
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from entrypoint import formatting
from kohya import config
from kohya.format import formatted

MESSY = """\
# my cat

[network]
network_dim = "8"   # small
lr_restart_cycles = 2
# the rates
unet_lr = "1e-4"
text_encoder_lr = 5e-5

seed = 1
[more]
optimizer_args = [
  "weight_decay=0.1",  # more
  "betas=0.9,0.99",
]
xformers="False" # "#"
resolution = [512, 768]
max_train_epochs = 10.0
network_alpha = 4
"""
NEAT = """\
# my cat

[network]
lr_scheduler_num_cycles = 2
network_dim = 8  # small
# the rates
unet_lr = 0.0001
text_encoder_lr = [5e-05]

seed = 1
[more]
resolution = "512,768"
xformers = false  # "#"
max_train_epochs = 10
optimizer_args = [
  "weight_decay=0.1",  # more
  "betas=0.9,0.99",
]
network_alpha = 4
"""


def test_types_aliases_and_order_are_corrected_and_all_else_stays() -> None:
    result = formatted(MESSY, "job.toml")
    assert result.text == NEAT
    assert result.problems == ()
    assert result.changes == (
        'job.toml line 4: network_dim = "8" becomes network_dim = 8',
        "job.toml line 5: lr_restart_cycles = 2 becomes lr_scheduler_num_cycles = 2",
        'job.toml line 7: unet_lr = "1e-4" becomes unet_lr = 0.0001',
        "job.toml line 8: text_encoder_lr = 5e-05 becomes text_encoder_lr = [5e-05]",
        'job.toml line 16: xformers = "False" becomes xformers = false',
        'job.toml line 17: resolution = [512, 768] becomes resolution = "512,768"',
        "job.toml line 18: max_train_epochs = 10.0 becomes max_train_epochs = 10",
        "job.toml line 4: 2 options in the parser's order",
        "job.toml line 12: 5 options in the parser's order",
    )


def test_the_rates_of_two_text_encoders_become_the_one_that_sd_scripts_has() -> None:
    """Where they are the same: its own SDXL document writes them so. Others are told, and left."""
    text = 'seed = 1\ntext_encoder_lr2 = "1e-5"  # big\n[b]\ntext_encoder_lr1 = 1e-5  # small\nunet_lr = 1\n'
    result = formatted(text, "f")
    assert result.text == "seed = 1\ntext_encoder_lr = [1e-05]  # big  # small\n[b]\nunet_lr = 1\n"
    assert result.problems == ()
    said = "text_encoder_lr1 and text_encoder_lr2 become text_encoder_lr = [1e-05]"
    assert result.changes == (f"f line 2 and 4: {said}",)
    assert formatted(result.text, "f").changes == ()
    for line in ("text_encoder_lr1 = 2", "text_encoder_lr1 = 'fast'", "text_encoder_lr = [1]", "seed = 1"):
        result = formatted(f"text_encoder_lr2 = 1\n{line}\n", "f")
        assert result.text == f"text_encoder_lr2 = 1\n{line}\n"
        assert "text_encoder_lr2 is no option of sd-scripts" in str(result.problems[0])
        assert "Write text_encoder_lr = 1e-5: sd-scripts trains both" in str(result.problems[0])


def test_a_switch_that_is_a_number_becomes_one() -> None:
    assert formatted("xformers = 1", "f").text == "xformers = true"


@pytest.mark.parametrize("kind", config.KINDS)
def test_the_presets_are_neat_but_for_their_order(kind: str) -> None:
    text = (Path(config.__file__).parents[1] / "configs" / f"{kind}.toml").read_text()
    assert all("parser's order" in change for change in formatted(text, "f").changes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed = 1\nseed = 2\n", "line 1 and 2: seed is set twice"),
        ("[a]\nseed = 1\n[b]\nseed = 2\n", "line 2 and 4: seed is set twice"),
        ("lr_restart_cycles = 0\n[b]\nlr_restart_cycles = false\n", "line 1 and 3: lr_restart_cycles is set"),
        ("lr_restart_cycles = 1\nlr_scheduler_num_cycles = 2\n", "are the same option"),
        ("[a.b]\nseed = '1'\n", "stands inside another"),
        ("netwrok_dim = '8'\n", "is no option of sd-scripts"),
        ("a = {b = 1, c = 2}\nx.y = 3\n", "b is no option"),
        ("clip_skip = '99'\n", "is too large"),
        ("seed = [1,\n", "it is not TOML"),
        ("a." * 200 + "b = 1\n", "a key with 100 parts"),
        ("a = " + "[" * 5000, "it is not TOML"),
        ("a = [\n" + "1,\n" * 100_000, "it is not TOML"),
        ("a = [\n" + "1,\n" * 100_000 + "]", "a is no option"),
        ("a = [\n" + "[1],\n" * 10_000 + "]", "line 1 begins a value of more than 100 lines that close one"),
        ("network_args = '" + "#" * 100_000 + "'", ""),  # of which each might begin a comment
    ],
)
def test_what_is_not_safe_is_told_and_left(text: str, said: str) -> None:
    result = formatted(text, "f")
    assert said in " ".join(map(str, result.problems))
    if "[a.b]" not in text:
        assert (result.text, result.changes) == (text, ())


VALUES = st.one_of(
    st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.lists(st.text(), max_size=3),
    st.sampled_from(["1e-4", "8", "true", "0", "", "a # b", [512, 768], 2.0, ["x=1"], [[1]]]),
)  # fmt: skip
TABLES = st.dictionaries(st.sampled_from([*config.options(), *config.ALIASES, "nope"]), VALUES, max_size=5)
LINES = st.lists(st.sampled_from(["", "# a comment", "  ", "[again]"]), max_size=3)


@settings(deadline=None)
@given(TABLES, TABLES, LINES, st.sampled_from(["\n", "\r\n"]))
def test_a_second_time_changes_nothing_and_the_meaning_stays(
    top: dict[str, object], more: dict[str, object], lines: list[str], end: str
) -> None:
    text = end.join([*tomli_w.dumps(top).splitlines(), *lines, *tomli_w.dumps({"more": more}).splitlines()])
    result = formatted(text, "f")
    assert formatted(result.text, "f").text == result.text
    assert formatted(result.text, "f").changes == ()
    assert len(formatted(result.text, "f").problems) == len(result.problems)
    for line in ("# a comment", "[again]"):
        assert result.text.count(line) == text.count(line)
    before, after = (config.merge("sdxl", [config.read(one, "f")[0]]) for one in (text, result.text))
    assert before.values == after.values
    assert len(before.problems) == len(after.problems)


@settings(deadline=None)
@given(st.text())
def test_no_text_brings_it_down(text: str) -> None:
    once = formatted(text, "f").text
    assert formatted(once, "f").text == once


def test_the_command_prints_the_text_and_says_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "job.toml"
    file.write_text(MESSY)
    assert formatting.run([str(file)]) == 0
    told = capsys.readouterr()
    assert told.out == NEAT
    assert f'{file} line 4: network_dim = "8" becomes network_dim = 8' in told.err
    assert file.read_text() == MESSY
    file.write_text("nope = 1\nseed = '1'\n")
    assert formatting.run([str(file), "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["text"] == "nope = 1\nseed = 1\n"
    assert (len(told["changes"]), [one["where"] for one in told["problems"]]) == (1, [f"{file} line 1"])


def test_write_replaces_the_file_in_one_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, link = tmp_path / "job.toml", tmp_path / "link.toml"
    file.write_text(MESSY)
    file.chmod(0o640)
    link.symlink_to(file)
    assert formatting.run([str(link), "--write"]) == 0
    assert capsys.readouterr().out == ""
    assert link.is_symlink()
    assert file.read_text() == NEAT
    assert file.stat().st_mode & 0o777 == 0o640
    before = file.stat().st_ino
    assert formatting.run([str(file), "--write"]) == 0
    assert file.stat().st_ino == before  # nothing to change, nothing written
    assert {one.name for one in tmp_path.iterdir()} == {"job.toml", "link.toml"}


def test_a_file_that_cannot_be_replaced_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "job.toml"
    file.write_text(MESSY)

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert formatting.run([str(file), "--write"]) == 1
    assert "it cannot be written (No space left on device)" in capsys.readouterr().err
    assert file.read_text() == MESSY
    assert os.listdir(tmp_path) == ["job.toml"]  # noqa: PTH208


@pytest.mark.parametrize(
    ("content", "said"), [(b"\xff", "cannot be read"), (b"#" * (1 << 27), "1 MiB"), (None, "cannot")]
)
def test_a_file_that_is_no_text_is_told(
    content: bytes | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "job.toml").write_bytes(content)
    assert formatting.run([str(tmp_path / "job.toml"), "--write"]) == 2
    assert said in capsys.readouterr().err
