"""The command `check`: what it reports, in which form, and that it leaves the machine alone."""

import itertools
import json
import math
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from entrypoint import checked
from entrypoint.checked import Report
from entrypoint.gpu import NAMED
from entrypoint.storage import S3Uri, Storage
from kohya import config
from kohya.config import Kind
from tests.harness import write_dataset, write_nvidia_smi

Look = Callable[..., Report]


@pytest.fixture(autouse=True)
def laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine without a GPU, a trainer or an /opt/ml; nothing may appear in its tree."""
    tree = tmp_path / "ml"
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tree))
    monkeypatch.setenv("SD_SCRIPTS_DIR", str(tmp_path / "nowhere"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    yield tree
    assert not tree.exists()


@pytest.fixture
def flags(base_models: dict[Kind, Path], pictures: Path) -> list[str]:
    return [f"--model_uri={base_models['sd15']}", f"--dataset_uri={pictures}"]


@pytest.fixture
def job_toml(tmp_path: Path, flags: list[str]) -> Look:
    """Look at a job with this TOML."""

    def made(text: str, **more: Any) -> Report:
        (tmp_path / "job.toml").write_text(text)
        return checked.look([*flags, f"--config_uri={tmp_path / 'job.toml'}"], **more)

    return made


def told(report: Report) -> str:
    return " | ".join(map(str, report.problems))


def test_a_fit_job_without_a_trainer_or_a_gpu(flags: list[str]) -> None:
    report = checked.look([*flags, "--output_uri=/nowhere/that/can/be/made"])
    assert (report.exit_code, report.result, report.problems) == (0, "fit", ())
    assert not any("sd-scripts" in note for note in report.notes)
    assert any("--gpu=t4|" in note for note in report.notes)


def test_three_mistakes_are_three_problems_in_one_report(
    job_toml: Look, tmp_path: Path, flags: list[str]
) -> None:
    write_dataset(tmp_path / "data")
    (tmp_path / "data" / "2_shape").rename(tmp_path / "data" / "shape")
    flags[1] = f"--dataset_uri={tmp_path / 'data'}"
    report = job_toml('netwrok_dim = 8\nunet_lr = "fast"')
    assert report.exit_code == 2
    assert report.result == "unfit: 3 problems"
    for said in ("Did you mean network_dim", '"fast" is not a number', "Rename it to 10_shape"):
        assert told(report).count(said) == 1


@pytest.mark.parametrize(
    ("dataset", "subset", "wrong"),
    [
        ("resolution = 128", "", "min_bucket_reso = 256 is above resolution = 128,128"),
        ("resolution = [1280, 512]", "", "max_bucket_reso = 1024 is below resolution = 1280,512"),
        ("resolution = 0", "", "a side is shorter than 64 pixels"),
        ("bucket_reso_steps = 0", "", "bucket_reso_steps = 0 is no multiple of 64"),
        ("", "random_crop = true", "random_crop changes pictures, and cache_latents keeps them"),
    ],
)
def test_a_dataset_configs_own_sizes_and_caches(
    dataset: str, subset: str, wrong: str, job_toml: Look, tmp_path: Path
) -> None:
    """They are held against the job's, and the presets'; reading the pictures too does no harm."""
    tables = f"[[datasets]]\n{dataset}\n[[datasets.subsets]]\nimage_dir = '2_shape'\n{subset}\n"
    (tmp_path / "data.toml").write_text(tables + "caption_extension = '.txt'\n")
    report = job_toml("dataset_config = 'data.toml'", pictures=True)
    assert wrong in told(report)
    assert "[[datasets]] 1, subset 1" in told(report)


def test_what_does_not_go_together_is_told_although_there_is_no_base_model(flags: list[str]) -> None:
    """But for what may fit one of the kinds: max_bucket_reso is below SDXL's resolution, and not SD1.5's."""
    flags[0] = "--model_uri=/nowhere/model.safetensors"
    asked = ["--optimizer_type=adam8bit", "--mixed_precision=fp16", "--max_bucket_reso=800"]
    report = checked.look([*flags, *asked], gpu="none")
    assert [problem.where for problem in report.problems] == [
        "flag --model_uri: /nowhere/model.safetensors",
        "flag --optimizer_type",
        "flag --mixed_precision",
    ]
    told = report.as_json()["configuration"]
    assert told["max_bucket_reso"] == {"value": 800, "where": "flag --max_bucket_reso"}
    assert "network_dim" not in told


def test_a_toml_with_a_mistake_is_read_all_the_same(job_toml: Look) -> None:
    report = job_toml('seed = 1\nseed = 2\nlr_scheduler = "cosin"\n[a.b]\nx = 1\n[c]\nunet_lr = "fast"')
    assert [problem.where.rpartition("/")[2] for problem in report.problems] == [
        "job.toml line 1 and 2",
        "job.toml",
        "job.toml line 7",
        "job.toml line 3",
    ]


def test_a_dataset_config_that_cannot_be_read_leaves_nothing_out(job_toml: Look) -> None:
    report = job_toml("dataset_config = 'data.toml'")
    assert len(report.problems) == 1
    assert "left out" not in " ".join(report.notes)
    assert report.facts is None


def test_a_conflict_of_the_job_is_not_told_again_for_each_folder(job_toml: Look, tmp_path: Path) -> None:
    tables = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = '2_shape'\ncaption_extension = '.txt'\n"
    (tmp_path / "data.toml").write_text(tables * 2)
    asked = "cache_latents = true\nrandom_crop = true\nresolution = 128\nmin_bucket_reso = 256\n"
    report = job_toml(f"dataset_config = 'data.toml'\n{asked}")
    assert [problem.where.rpartition("/")[2] for problem in report.problems] == [
        "job.toml line 5",
        "job.toml line 3",
    ]


def test_sizes_that_make_no_bucket_are_told_with_pictures_too(flags: list[str]) -> None:
    for size in ("--resolution=0,0", "--resolution=32"):
        report = checked.look([*flags, size, "--bucket_no_upscale=false"], pictures=True)
        assert "a side is shorter than 64 pixels" in told(report)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_precision_of_gpus_is_for_another_machine(job_toml: Look, precision: str) -> None:
    report = job_toml(f'mixed_precision = "{precision}"\nxformers = true')
    assert report.exit_code == 0
    assert report.as_json()["configuration"]["xformers"]["value"] is True


def test_the_gpu_that_is_named_counts(job_toml: Look) -> None:
    report = job_toml('mixed_precision = "bf16"', gpu="T4")
    assert "bf16 does not run on a Tesla T4" in told(report)
    report = job_toml("seed = 1", gpu="t4")
    assert report.as_json()["configuration"]["mixed_precision"]["where"].startswith("configs/gpu/t4.toml")
    assert not any("--gpu=" in note for note in report.notes)
    assert "fp16 does not run on a CPU" in told(job_toml('mixed_precision = "fp16"', gpu="none"))
    assert "flag --gpu: 'h10' is not one of t4, a10g" in told(job_toml("seed = 1", gpu="h10"))


def test_a_gpu_that_is_here_counts(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nvidia_smi(tmp_path / "bin", "Tesla T4, 7.5, 580.65.06")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    report = checked.look(flags)
    assert report.as_json()["gpu"] == "Tesla T4"
    assert report.as_json()["configuration"]["mixed_precision"]["value"] == "fp16"


def test_every_gpu_that_can_be_named_has_its_preset() -> None:
    assert NAMED.keys() == {file.stem for file in Path(config.__file__).parents[1].glob("configs/gpu/*.toml")}
    for name, gpu in NAMED.items():
        assert config.gpu_preset(gpu.name) == config.preset(f"gpu/{name}")
        opening = (Path(config.__file__).parents[1] / f"configs/gpu/{name}.toml").read_text().split("\n")[0]
        assert f"compute capability {gpu.capability}" in opening
        assert f"{math.ceil((gpu.memory or 0) / 2**33) * 8} " in opening  # nvidia-smi tells a little less


def test_pictures_are_read_only_when_asked(flags: list[str], tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data") / "2_shape"
    (folder / "1.png").write_bytes(b"no picture")
    flags[1] = f"--dataset_uri={tmp_path / 'data'}"
    assert checked.look(flags).exit_code == 0
    report = checked.look([*flags, "--seed=x"], pictures=True)  # with another problem as well
    assert "1.png: the picture cannot be read" in told(report)
    assert len(report.problems) == 2
    report = checked.look(["--model_uri=/nowhere", flags[1]], pictures=True)
    assert any("the pictures were not read" in note for note in report.notes)


def test_from_s3_only_pictures_are_fetched_and_nothing_is_written(
    base_models: dict[Kind, Path], pictures: Path, bucket: S3Uri, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    storage = Storage()
    storage.upload({base_models["sdxl"]: bucket / "model.safetensors"})
    storage.upload({one: bucket / f"data/2_shape/{one.name}" for one in (pictures / "2_shape").iterdir()})
    before = {item.uri for item in storage.list(S3Uri(bucket.bucket, ""))}
    monkeypatch.setattr(Storage, "check_writable", None)
    keys = {"model": "model.safetensors", "dataset": "data", "output": "out", "logs": "logs"}
    uris = [f"--{name}_uri={bucket / key}" for name, key in keys.items()]
    report = checked.look(uris)
    assert report.exit_code == 0
    assert not (tmp_path / "tmp").exists()
    report = checked.look(uris, pictures=True)
    assert report.exit_code == 0
    assert len(list((tmp_path / "tmp").rglob("*.png"))) == 4
    assert not list((tmp_path / "tmp").rglob("*.safetensors"))
    assert {item.uri for item in storage.list(S3Uri(bucket.bucket, ""))} == before
    assert checked.look([*uris, f"--config_uri={bucket / 'nowhere.toml'}"]).exit_code == 2


def test_storage_that_does_not_answer_is_no_unfit_job(
    flags: list[str], bucket: S3Uri, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    report = checked.look([*flags, f"--config_uri={bucket / 'job.toml'}"])
    assert report.exit_code == 1
    assert report.result == "not known: storage did not answer; 1 problem"
    assert "S3 cannot be reached" in told(report)


def test_channels_are_looked_at_too(
    base_models: dict[Kind, Path], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "channels"
    (tree / "input/data").mkdir(parents=True)
    (tree / "input/config").mkdir()
    (tree / "input/data/model").symlink_to(base_models["sdxl"].parent)
    (tree / "input/data/dataset").symlink_to(pictures)
    (tree / "input/config/hyperparameters.json").write_text('{"network_dim": "8"}')
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tree))
    before = sorted(tree.rglob("*"))
    report = checked.look([])
    assert "there are 2 files (sd15.safetensors, sdxl.safetensors)" in told(report)
    assert report.as_json()["configuration"]["network_dim"] == {
        "value": 8,
        "where": "hyperparameter network_dim",
    }
    assert sorted(tree.rglob("*")) == before


def test_json_has_the_keys_that_it_promises(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert checked.run([*flags, "--json", "--pictures", "--gpu=a10g", "--wandb_api_key=12345"]) == 0
    report = json.loads(capsys.readouterr().out)
    documented = re.findall(r"^ {8}(\w+(?:, \w+)*)  ", Report.as_json.__doc__ or "", re.MULTILINE)
    assert [name for line in documented for name in line.split(", ")] == list(report)
    of_facts = re.search(r"^ {8}facts .*?: what", Report.as_json.__doc__ or "", re.MULTILINE | re.DOTALL)
    assert of_facts is not None
    told = report["facts"]
    assert set(re.findall(r"\w+", of_facts[0])) == {
        "facts", "what", *told, *told["folders"][0], *told["buckets"][0]
    }  # fmt: skip
    assert told["buckets"] == [{"width": 64, "height": 64, "pictures": 8}]
    assert (told["pictures"], told["with_repeats"], told["batches"], told["steps"]) == (4, 8, 4, 40)
    assert (told["epochs"], told["in_epochs"], told["exact"]) == (10, True, True)
    assert (report["fetch_bytes"], report["disk_bytes"]) == (0, 1_000_000_000)
    assert report["kind"] == "sd15"
    assert report["gpu"] == "NVIDIA A10G"
    assert report["configuration"]["wandb_api_key"]["value"] == "***"
    assert report["gpu_memory"]["least_bytes"] < report["gpu_memory"]["estimated_bytes"]


def test_json_of_a_request_that_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert checked.run(["--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert (report["fit"], report["exit_code"], report["kind"], report["configuration"]) == (
        False,
        2,
        None,
        {},
    )
    assert [problem["where"] for problem in report["problems"]] == ["model", "dataset"]
    assert all(problem.keys() == {"where", "wrong", "fix"} for problem in report["problems"])


def section(report: Report, title: str) -> list[str]:
    """The lines below a title, as they are printed."""
    lines = iter(checked.plain(report))
    while next(lines) != f"\n{title}":
        pass
    return list(itertools.takewhile(lambda line: not line.startswith("\n"), lines))


BUCKETS = "buckets, and how many pictures an epoch has in each"


def test_what_training_comes_to(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the listing the least; from the pictures what it is, with the buckets and what was seen."""
    reg = write_dataset(tmp_path / "reg", side=160)
    (reg / "2_shape").rename(reg / "1_shape")
    flags += [f"--reg_uri={reg}", "--max_train_epochs=3"]
    report = checked.look(flags)
    assert section(report, "data set") == [
        "  2_shape  4 pictures × 2  4 captions  0.1 MB",
        "  1_shape (regularisation)  4 pictures × 1  4 captions  0.3 MB",
        "  together  4 pictures, and 4 for regularisation",
    ]
    assert section(report, "training") == [
        "  at least 8 batches an epoch, of 8 pictures with repeats and as many for regularisation",
        "  3 epochs, at least 24 steps",
    ]
    assert "buckets, and the exact number of batches, show with check --pictures" in report.notes
    assert not any(title == BUCKETS and rows for title, rows in report.sections())

    report = checked.look([*flags, "--bucket_no_upscale=false"], pictures=True)
    assert section(report, BUCKETS) == ["  512×512  16"]
    assert section(report, "training")[1] == "  3 epochs, 24 steps"
    assert sum("smaller than the size that it is trained at" in note for note in report.notes) == 2
    assert not any("--pictures" in note for note in report.notes)
    assert capsys.readouterr().out == ""  # all of it stands in the report


@pytest.mark.parametrize(("trainer", "steps"), [("sd-scripts", 20), ("builtin", 40)])
def test_two_gpus_share_the_steps(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: str, steps: int
) -> None:
    write_nvidia_smi(tmp_path / "bin", *["Tesla T4, 7.5, 580.65.06"] * 2)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    for pictures in (False, True):
        report = checked.look([*flags, f"--trainer={trainer}", "--max_train_epochs=10"], pictures=pictures)
        assert report.as_json()["facts"]["steps"] == steps


def test_many_folders_and_buckets_are_told_in_a_few_lines(flags: list[str], tmp_path: Path) -> None:
    for number in range(14):
        folder = tmp_path / "data" / f"{number + 1}_x"
        folder.mkdir(parents=True)
        Image.new("RGB", (64 * (number + 1), 64)).save(folder / "a.png")
        (folder / "a.txt").write_text("a cat")
    flags[1] = f"--dataset_uri={tmp_path / 'data'}"
    report = checked.look(flags, pictures=True)
    told = section(report, "data set")
    assert len(told) == 14
    assert told[-2:] == ["  and 2 more folders  2 pictures", "  together  14 pictures"]
    told = section(report, BUCKETS)
    assert (len(told), told[0], told[-1]) == (13, "  896×64  14", "  and 2 more  3")
    assert len(report.as_json()["facts"]["folders"]) == 14


def test_nothing_is_told_of_what_is_not_known(flags: list[str], tmp_path: Path) -> None:
    """Without a base model its preset, and so the number of steps; without pictures all of it."""
    report = checked.look(["--model_uri=/nowhere", flags[1]])
    titles = {title for title, rows in report.sections() if rows}
    assert "data set" in titles
    assert report.as_json()["facts"] is None
    assert not any("--pictures" in note for note in report.notes)
    assert not titles & {"training", BUCKETS}
    (tmp_path / "empty").mkdir()
    report = checked.look([flags[0], f"--dataset_uri={tmp_path / 'empty'}"])
    assert report.as_json()["facts"] is None
    assert "data set" not in {title for title, _ in report.sections()}


def test_what_resizing_takes_away_is_said(flags: list[str]) -> None:
    report = checked.look([*flags, "--resize=256"])
    assert any("resize = 256 is below resolution = 512,512" in note for note in report.notes)


def test_plain_text_begins_with_the_result(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert checked.run([*flags, "--network_dim=x", "--training_comment=\x1b[2J\na"]) == 2
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[:4] == [
        "unfit: 1 problem",
        "",
        "problems",
        '  flag --network_dim: network_dim = "x" is not a whole number. Write for example network_dim = 32',
    ]
    for title in ("notes", "base model", "data set", "training", "job", "configuration"):
        assert title in lines
    assert "  2_shape  4 pictures × 2  4 captions  0.1 MB" in lines
    assert "  disk  1.0 GB, of which 1.0 GB are for what is made" in lines
    assert "\x1b" not in out


def test_on_a_terminal_the_report_has_80_columns_and_colour(
    flags: list[str], tmp_path: Path, laptop: Path
) -> None:
    near, far = pty.openpty()
    flags[1] = f"--dataset_uri={tmp_path / ('long' * 30)}"
    command = [sys.executable, "-m", "entrypoint", "check", *flags, "--training_comment=[red]x[/red]"]
    child = subprocess.Popen(command, stdout=far, stderr=subprocess.PIPE, env={**os.environ, "TERM": "xterm"})
    os.close(far)
    out = b""
    while True:
        try:
            out += os.read(near, 1 << 16)
        except OSError:
            break
    assert child.wait() == 2
    text = out.decode()
    assert text.startswith("\x1b[1;31munfit: 1 problem")
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert "[red]x[/red]" in plain
    assert max(map(len, plain.replace("\r", "").splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--help"], 0), (["check", "--help"], 0), ([], 2), (["chekc"], 2), (["check"], 2)],
)
def test_the_command_line(arguments: list[str], code: int) -> None:
    command = [sys.executable, "-m", "entrypoint", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == code
    assert "Traceback" not in ended.stderr
    assert ("usage: python -m entrypoint train" in ended.stdout) == (code == 0)
