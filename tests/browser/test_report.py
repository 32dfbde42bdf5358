"""report.html in a browser. SCREENSHOTS=FOLDER keeps a picture of each page, to be looked at."""

import os
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from entrypoint import console, report
from entrypoint.checkpoint import Lora
from entrypoint.failures import Problem, Unfit
from kohya.config import Kind
from tests.browser.conftest import Browser
from tests.reports import prepared, write_log, write_samples

STEPS = 64
VIEWS = [*product((1000, 400), ("light", "dark"))]
PROMPTS = "a red square on noise\na blue square, at night --w 64 --h 64\n"

# What a curve looks like: its points, whether they lie inside the drawing, its stroke, and the page behind.
# Colours are [red, green, blue].
_CURVE = """
const line = document.querySelector(arguments[0]), svg = line.ownerSVGElement;
const places = line.getAttribute("d").match(/[ML] *[-\\d.]+ [-\\d.]+/g);
const points = places.map(one => one.slice(1).trim().split(" ").map(Number));
const box = svg.viewBox.baseVal, style = getComputedStyle(line);
const colour = text => text.match(/\\d+/g).slice(0, 3).map(Number);
return {
  points: points.length,
  inside: points.every(([x, y]) => x >= 0 && x <= box.width && y >= 0 && y <= box.height),
  shown: svg.getBoundingClientRect().width,
  width: parseFloat(style.strokeWidth),
  stroke: colour(style.stroke),
  behind: colour(getComputedStyle(line.closest("section")).backgroundColor),
};
"""
_CONTRAST = """
const colour = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
const light = c => c.map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
  if (!c.includes("rgba") && c !== "transparent") return colour(c); } return [255, 255, 255]; };
const bad = [];
for (const e of document.querySelectorAll("main *")) {
  if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
  const style = getComputedStyle(e), drawn = e.namespaceURI.endsWith("svg") ? style.fill : style.color;
  const [a, b] = [light(colour(drawn)), light(behind(e))].sort((x, y) => y - x);
  if ((a + 0.05) / (b + 0.05) < 4.5) bad.push(e.tagName + ": " + e.textContent.trim().slice(0, 40));
}
return bad;
"""


@pytest.fixture
def page(tmp_path: Path, base_models: dict[Kind, Path], pictures: Path) -> Callable[[report.Ending], str]:
    """Writes the report of a job that went as far as it does, and returns its address."""

    def write(ending: report.Ending) -> str:
        job = prepared(tmp_path, base_models["sd15"], pictures, prompts=PROMPTS)
        assert job.prepared is not None
        job.seconds |= {"train": 318.2, "verify": 0.4, "publish": 2.1}
        file = tmp_path / "report.html"
        log = None
        if ending.exit_code == 0:
            job.loras = [
                Lora(tmp_path / f"shape{part}.safetensors", 264, 4, 557_700) for part in ("-000001", "")
            ]
            write_samples(job.prepared.output, ["e000001", "e000002"], 2)
            log = write_log(tmp_path / "log", STEPS)
        else:
            job.broke = "train"
            job.prepared.log.write_text("loading the base model\n" + "a very long line " * 20 + "\n")
        file.write_text(report.page(job, ending, report.draw(job, log)))
        return file.as_uri()

    console._warned.clear()
    return write


def look(browser: Browser, url: str, name: str) -> list[tuple[int, str]]:
    """Open a page in every view: nothing is complained of, nothing hard to read, nothing scrolls sideways."""
    for width, theme in VIEWS:
        browser.open(url, width=width, theme=theme)
        browser.run("for (const one of document.querySelectorAll('details')) one.open = true")
        assert browser.errors == []
        assert browser.run("return document.documentElement.scrollWidth") == width
        assert browser.run(_CONTRAST) == []
        if folder := os.environ.get("SCREENSHOTS"):
            browser.photograph(Path(folder) / f"{name}-{width}-{theme}.png")
    return VIEWS


def test_a_completed_job(browser: Browser, page: Callable[[report.Ending], str]) -> None:
    url = page(report.Ending(0, ""))
    for width, theme in look(browser, url, "completed"):
        browser.open(url, width=width, theme=theme)
        for line in ("#loss-each-step path", "#loss-smoothed path", "#rate-unet path"):
            curve = browser.run(_CURVE, line)
            assert curve["points"] == STEPS
            assert curve["inside"]
            assert curve["shown"] > 300
            assert curve["width"] >= 1
            assert max(abs(a - b) for a, b in zip(curve["stroke"], curve["behind"], strict=True)) > 50
        assert (
            browser.run("return getComputedStyle(document.body).backgroundColor")
            == {
                "light": "rgb(246, 247, 249)",
                "dark": "rgb(15, 18, 22)",
            }[theme]
        )
        broken = "return [...document.images].filter(one => !one.complete || !one.naturalWidth).length"
        assert browser.run("return document.images.length") == 8
        assert browser.run(broken) == 0
    text = browser.run("return document.body.innerText")
    assert "a blue square, at night" in text
    assert "learning rate" in browser.run("return document.body.textContent")


def test_a_failed_job(browser: Browser, page: Callable[[report.Ending], str]) -> None:
    cause = (
        "The GPU has too little memory; set gradient_checkpointing = true or a smaller batch. (Exit code 1.)"
    )
    url = page(report.Ending(1, cause))
    look(browser, url, "failed")
    top = browser.run("return document.querySelector('.cause p').getBoundingClientRect().top")
    assert 0 < top < 900  # seen without scrolling, on a phone too


def test_an_unfit_job(browser: Browser, page: Callable[[report.Ending], str]) -> None:
    problems = [
        Problem("s3://bucket/" + "a-long-name/" * 12, "it is no number", "Write network_dim = 32"),
        Problem("hyperparameter seed", "it is no number", "Write seed = 1"),
    ]
    error = Unfit(problems)
    look(browser, page(report.Ending.of(2, str(error), error)), "unfit")
    assert browser.run("return document.querySelectorAll('.cause li').length") == 2
