import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from entrypoint import console, report, stops
from entrypoint.checkpoint import Lora
from entrypoint.contract import Tree
from entrypoint.failures import Problem, Stopped, TrainerFailed, Unfit
from entrypoint.outbox import Outbox
from entrypoint.record import Job
from entrypoint.report import curves
from entrypoint.report.curves import Curve
from entrypoint.storage import Storage
from kohya import config
from kohya.config import Kind
from tests.reports import Page, prepared, write_log, write_samples

DONE = report.Ending(0, "")


@pytest.fixture(autouse=True)
def unwarned() -> Iterator[None]:
    """No warning of an earlier test."""
    console._warned.clear()
    yield
    console._warned.clear()


@pytest.fixture
def job(tmp_path: Path, base_models: dict[Kind, Path], pictures: Path) -> Job:
    """A job whose trainer is about to start."""
    return prepared(tmp_path, base_models["sd15"], pictures)


def html(job: Job, ending: report.Ending = DONE, event_log: Path | None = None) -> str:
    return report.page(job, ending, report.draw(job, event_log))


def published(job: Job, ending: report.Ending = DONE, *, record: bool = True) -> Path:
    """The report of a job, as it is published; unless `record` its output does not answer."""
    outbox = Outbox(Storage())
    if record and job.request is not None and isinstance(job.request.output, Path):
        (job.work / "job.json").touch()
        outbox.send({"job.json": job.work / "job.json"}, job.request.output)
    report.publish(job, ending, None, outbox)
    return job.tree.data / "report.html"


# -- what it tells ----------------------------------------------------------------------------------


def test_a_completed_job(job: Job, tmp_path: Path) -> None:
    job.loras = [Lora(tmp_path / "shape.safetensors", 264, 4, 557_700)]
    job.seconds = {"resolve": 0.25, "train": 75.0}
    console.warn("the event log could not be sent for now")
    page = Page(html(job, event_log=write_log(tmp_path / "log", 8)))
    for text in (
        "Completed in 1 min 15 s: 1 LoRA has been opened and checked.",
        "SD1.5", "builtin", "none", "8 of 8",
        "shape.safetensors", "557.7 kB", "264",
        "resolve", "0.25 s", "1 min 15 s",
        "2_shape/0.png", "a red square, noise",
        "network_dim", "hyperparameter network_dim",
        "base model", "sd15.safetensors", "4 pictures, 92.7 kB",
        "the event log could not be sent for now",
        "loss", "learning rate", "step",
    ):  # fmt: skip
        page.at(text)
    assert page.at("Completed") < page.at("Warnings") < page.at("LoRAs") < page.at("Stages")
    assert len(page.pictures) == 4
    bars = [attributes["style"] for tag, attributes in page.tags if tag == "div" and "style" in attributes]
    assert bars == ["width: 0.3%", "width: 100.0%"]


def test_a_failed_job_tells_the_cause_first_and_the_trainers_last_words(job: Job) -> None:
    assert job.prepared is not None
    job.prepared.log.write_text("".join(f"line {number}\n" for number in range(100)))
    with pytest.raises(TrainerFailed), job.stage("train"):
        raise TrainerFailed("too little memory. Set gradient_checkpointing=true.")
    page = Page(html(job, report.Ending(1, "too little memory. Set gradient_checkpointing=true.")))
    assert page.at("in the stage train") < page.at("gradient_checkpointing=true") < page.at("line 80")
    assert page.at("line 80") < page.at("Stages")
    assert not [word for word in page.words if "line 79" in word]


def test_an_unfit_job_lists_its_problems_with_what_to_do(tmp_path: Path) -> None:
    job = Job(Tree(tmp_path / "ml"), tmp_path)
    problems = [
        Problem("hyperparameter seed", "it is no number", "Write seed = 1"),
        Problem("x", "y", "Is it z?"),
    ]
    error = Unfit(problems)
    page = Page(html(job, report.Ending.of(2, str(error), error)))
    assert page.at("Unfit: 2 problems") < page.at("hyperparameter seed") < page.at("Write seed = 1.")
    assert page.words[page.at("y. Is it z?")] == "y. Is it z?"
    assert not page.pictures
    assert "hyperparameter train_batch_size" not in page.words
    setting = config.Setting("train_batch_size", 3, "hyperparameter train_batch_size")
    error = Unfit(problems, config.merge("sd15", [[setting]]))
    page = Page(html(job, report.Ending.of(2, str(error), error)))
    assert page.at("train_batch_size") < page.at("hyperparameter train_batch_size")


def test_of_a_stopped_job_that_it_was_stopped(job: Job, tmp_path: Path) -> None:
    ending = report.Ending(Stopped.exit_code, "The job was stopped (SIGTERM).")
    page = Page(html(job, ending, write_log(tmp_path / "log", 3)))
    assert re.fullmatch(r"Stopped after .* s, at step 3 of 8\.", page.words[page.at("Stopped after")])
    assert page.at("Stopped after") < page.at("SIGTERM") < page.at("Start it again") < page.at("Stages")


def test_sample_pictures_stand_by_epoch_and_step_with_their_prompts(
    tmp_path: Path, base_models: dict[Kind, Path], pictures: Path
) -> None:
    job = prepared(tmp_path, base_models["sd15"], pictures, prompts="a cat\n# no prompt\na dog --w 64\n")
    assert job.prepared is not None
    write_samples(job.prepared.output, ["e000002", "e000001", "000012"], 2)
    page = Page(html(job))
    assert page.at("step 12") < page.at("epoch 1") < page.at("epoch 2")
    assert [word for word in page.words if word in ("a cat", "a dog --w 64")] == ["a cat", "a dog --w 64"] * 3


def test_captions_of_the_tagger_are_told_from_others(job: Job, tmp_path: Path) -> None:
    written = tmp_path / "0.txt"
    written.write_text("red, square")
    job.captions["2_shape/0.txt"] = written
    page = Page(html(job))
    assert page.at("1 of the captions were written") < page.at("red, square")
    assert page.words.count("tagger") == 1
    assert "a red square, noise" not in page.words


def test_pictures_are_shown_as_a_person_sees_them(tmp_path: Path, base_models: dict[Kind, Path]) -> None:
    subset = tmp_path / "odd" / "1_odd"
    subset.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # it lies on its side
    Image.new("RGB", (300, 200), "red").save(subset / "0.jpg", exif=exif)
    Image.new("RGBA", (200, 200), (255, 0, 0, 0)).save(subset / "1.png")
    for number in range(2):
        (subset / f"{number}.txt").write_text("a picture")
    first, second = Page(html(prepared(tmp_path, base_models["sd15"], tmp_path / "odd"))).pictures
    assert first.size == (171, 256)
    assert second.convert("RGB").getpixel((50, 50)) == (255, 255, 255)


# -- what it must not do ----------------------------------------------------------------------------


def test_it_stays_small_with_many_pictures_and_long_captions(
    tmp_path: Path, base_models: dict[Kind, Path]
) -> None:
    subset = tmp_path / "many" / "1_noise"
    subset.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(8):  # noise is what no format makes small
        pixels = rng.integers(0, 255, (300, 400, 3), np.uint8)
        Image.fromarray(pixels).save(subset / f"{number}.jpg", quality=95)
    for number in range(8, 500):
        (subset / f"{number}.jpg").hardlink_to(subset / f"{number % 8}.jpg")
    for number in range(500):
        (subset / f"{number}.txt").write_text("ein sehr langer Satz über Rauschen, " * 100)
    job = prepared(tmp_path, base_models["sd15"], tmp_path / "many", prompts="a cat\n" * 4)
    assert job.prepared is not None
    write_samples(job.prepared.output, [f"{step:06d}" for step in range(10)], 4, side=512)
    for number in range(300):
        console.warn(f"{number}: {'long ' * 1000}")
    text = html(job, event_log=write_log(tmp_path / "log", 3000))
    assert len(text.encode()) < 3_000_000
    page = Page(text)
    assert len(page.pictures) == 46 + 40
    assert max(map(len, page.sources)) < 19_000
    page.at("and 454 more pictures")
    assert page.at("99: long long") < page.at("and 200 more, which are in the log")
    assert not [word for word in page.words if word.startswith("100: long")]
    assert "more" not in page.words[page.at("Sample pictures")]


def test_nothing_comes_from_elsewhere_and_no_text_becomes_markup(
    tmp_path: Path, base_models: dict[Kind, Path], pictures: Path
) -> None:
    bad = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
    subset = tmp_path / "bad" / "1_<b>"
    subset.mkdir(parents=True)
    (subset / "<i>.png").write_bytes((pictures / "2_shape" / "0.png").read_bytes())
    (subset / "<i>.txt").write_text(bad)
    job = prepared(tmp_path, base_models["sd15"], tmp_path / "bad", training_comment=bad, prompts=f"{bad}\n")
    assert job.prepared is not None
    write_samples(job.prepared.output, ["000001"], 1)
    console.warn(bad)
    job.prepared.log.write_text(bad)
    job.broke = "train"
    text = html(job, report.Ending(1, bad), write_log(tmp_path / "log", 8))
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "iframe", "object", "b", "i"}
    assert len([word for word in page.words if "<script>alert(1)<" in word]) == 6  # shown as it is
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href"):
            assert str(attributes.get(name, "data:")).startswith(("data:", "#")), tag
    assert not re.findall(r"url\((?!#)|@import", text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_secrets_are_left_out_also_where_a_text_is_cut(
    tmp_path: Path, base_models: dict[Kind, Path], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "hf_<pst&pst>"
    monkeypatch.setattr(console, "_secrets", {secret})
    job = prepared(tmp_path, base_models["sd15"], pictures, training_comment=secret, output_name=secret)
    assert job.prepared is not None
    merged = config.change(job.prepared.merged, {"wandb_api_key": "of this one nobody knows"}, "job.toml")
    job.prepared = replace(job.prepared, merged=merged)
    job.prepared.log.write_text(f"{'x' * 490}{secret}\n")
    job.broke = "train"
    text = html(job, report.Ending(1, "GET https://x/y?X-Amz-Signature=abcdef failed"))
    assert "pst" not in text
    assert "nobody knows" not in text
    assert "hf_" not in text
    assert "abcdef" not in text
    assert "Signature=***" in text


# -- where it goes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True])
def test_it_goes_to_the_output_too_but_not_to_esds(
    flat: bool, tmp_path: Path, base_models: dict[Kind, Path], pictures: Path
) -> None:
    job = prepared(tmp_path, base_models["sd15"], pictures, output=tmp_path / "out", flat=flat)
    assert published(job).is_file()
    assert (tmp_path / "out" / "report.html").is_file() == (not flat)


def test_it_is_not_tried_where_nothing_else_could_be_sent(
    tmp_path: Path, base_models: dict[Kind, Path], pictures: Path
) -> None:
    job = prepared(tmp_path, base_models["sd15"], pictures, output=tmp_path / "out")
    assert published(job, record=False).is_file()
    assert not (tmp_path / "out" / "report.html").exists()


def test_a_fault_is_a_warning(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.tree.data.write_text("a file where the folder should be")
    published(job)
    told = capsys.readouterr().err
    assert told.startswith("WARNING: report.html could not be made or published")
    assert "Traceback" not in told


def test_what_cannot_be_drawn_is_left_out(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else is, because of it."""

    def broken(*_: object) -> None:
        raise ValueError("it is odd")

    log = write_log(tmp_path / "log", 3)
    for name, told in (("of_samples", "sample pictures"), ("of_data_set", "pictures of the data set")):
        with monkeypatch.context() as patch:
            patch.setattr(report.thumbnails, name, broken)
            page = Page(html(job, event_log=log))
        assert any(tag == "svg" for tag, _ in page.tags)
        assert bool(page.pictures) == (name != "of_data_set")
        assert capsys.readouterr().err == f"WARNING: report.html has no {told}: it is odd\n"
    log.write_bytes(b"no event log at all")
    page = Page(html(job, event_log=log))
    assert page.pictures


@pytest.mark.parametrize(
    ("left", "written", "drawn"), [(2.0, False, False), (10.0, True, False), (60.0, True, True)]
)
def test_after_a_stop_there_may_be_little_time(
    left: float, written: bool, drawn: bool, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.tree.data.mkdir(parents=True)
    (job.tree.data / "report.html").write_text("an earlier job's")
    monkeypatch.setattr(stops, "seconds_left", lambda: left)
    file = published(job)
    assert file.exists() == written
    assert not written or ("data:image" in file.read_text()) == drawn
    assert not [*job.tree.data.glob(".*")]


def test_what_can_be_left_out_is_left_out_when_the_time_after_a_stop_is_nearly_up(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there was enough of it when the report was begun."""
    left, read = iter([60.0]), list[Path]()
    monkeypatch.setattr(stops, "seconds_left", lambda: next(left, 9.0))
    monkeypatch.setattr(report, "_curves", lambda log: read.append(log) or (None, None, None))
    (tmp_path / "log").write_bytes(b"some")
    report.publish(job, DONE, tmp_path / "log", Outbox(Storage()))
    assert "data:image" not in (job.tree.data / "report.html").read_text()
    assert not read


# -- curves -----------------------------------------------------------------------------------------


def test_a_thinned_curve_keeps_its_peaks_and_ends() -> None:
    values = np.ones(10_000)
    values[[1234, 5678]] = 9.0, -9.0
    values[4000:4100] = math.nan
    thin = curves.thinned(Curve(np.arange(1.0, 10_001), values))
    assert curves.POINTS / 2 <= len(thin.values) <= curves.POINTS + 2
    assert (np.nanmax(thin.values), np.nanmin(thin.values)) == (9.0, -9.0)
    assert (thin.steps[0], thin.steps[-1]) == (1, 10_000)
    assert (np.diff(thin.steps) > 0).all()
    few = Curve(np.arange(5.0), np.ones(5))
    assert curves.thinned(few) is few


def test_smoothing_passes_over_what_is_no_number() -> None:
    assert curves.smoothed([2.0, math.nan, 2.0])[::2] == pytest.approx([2.0, 2.0])
    assert math.isnan(curves.smoothed([2.0, math.nan])[1])


def test_each_rate_is_read_once_under_its_own_name(tmp_path: Path) -> None:
    """sd-scripts writes a rate under an older name too (train_network.py:85-120)."""
    loss, rates = curves.read(write_log(tmp_path / "log", 4, broken_at=2))
    assert loss is not None
    assert loss.steps.tolist() == [1, 2, 3, 4]
    assert np.isnan(loss.values).tolist() == [False, True, False, False]
    assert list(rates) == ["textencoder", "unet"]
    assert rates["unet"].values[0] == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("logged", "shown"),
    [
        ({"unet": 1e-4, "textencoder": 1e-4, "group1": 1e-4}, ["textencoder", "unet"]),  # at the same rate
        ({"unet": 1e-4, "textencoder": 1e-4}, ["unet"]),  # the U-Net alone
        ({"unet": 1.0, "d*lr/unet": 3e-4, "group0": 1.0, "d*lr/group0": 3e-4}, ["d*lr/unet"]),  # Prodigy
        ({"group0": 1e-4, "group1": 2e-4}, ["group0", "group1"]),  # a network that names none
    ],
)
def test_the_names_of_rates(logged: dict[str, float], shown: list[str], tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as log:
        for name, rate in logged.items():
            log.add_scalar(f"lr/{name}", rate, 1)
    (file,) = tmp_path.iterdir()
    assert sorted(curves.read(file)[1]) == shown


def test_a_log_without_a_loss_has_no_curve(job: Job, tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path / "log")) as log:
        log.add_scalar("other", 1.0, 1)
    (file,) = (tmp_path / "log").iterdir()
    assert "<svg" not in html(job, event_log=file)
    assert "<svg" not in html(job, event_log=tmp_path / "nothing")
