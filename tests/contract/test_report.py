"""What a job that ran leaves to be looked at: report.html, and lines that SageMaker reads metrics from."""

import re
import signal

from entrypoint.progress import METRIC_DEFINITIONS
from tests.harness import METRIC, Job
from tests.reports import Page


def fields(line: str) -> dict[str, float]:
    """The numbers of a metric line by their metric's name, read without a regular expression."""
    values = dict(part.split("=") for part in line.split())
    return {f"train:{name}": float(value.split("/")[0]) for name, value in values.items()}


def test_every_expression_matches_the_metric_lines_of_a_job_and_nothing_else(ready: Job) -> None:
    result = ready.run()
    assert result.code == 0, result.out + result.err
    log = [*result.lines, *result.err.splitlines()]
    metrics = {number: fields(line) for number, line in enumerate(log) if METRIC.fullmatch(line)}
    assert len(metrics) >= 2
    names = [definition["Name"] for definition in METRIC_DEFINITIONS]
    assert set(names) == {name for one in metrics.values() for name in one}
    for definition in METRIC_DEFINITIONS:
        name, expression = definition["Name"], re.compile(definition["Regex"])
        found = {number: match for number, line in enumerate(log) if (match := expression.search(line))}
        values = {number: float(match[1]) for number, match in found.items()}
        assert values == {number: one[name] for number, one in metrics.items() if name in one}, name
    page = Page((ready.tree / "output" / "data" / "report.html").read_text())
    page.at("Completed in")
    page.at("shape.safetensors")
    assert "report" not in ready.record["seconds"]


def test_after_a_break_the_curve_has_the_steps_of_before(ready: Job) -> None:
    file = ready.tree / "output" / "data" / "report.html"
    assert ready.run_until("epoch=2/4", signal.SIGTERM, "--max_train_epochs=4").code == 143
    stopped = file.read_text()
    before = len(ready.steps)
    Page(stopped).at(f"at step {before} of 16.")
    assert points(stopped) == before
    result = ready.run("--max_train_epochs=4")
    assert result.code == 0, result.out + result.err
    assert points(file.read_text()) == 16


def points(text: str) -> int:
    """Of the curve of each step's loss."""
    (curve,) = re.findall(r'id="loss-each-step">\s*<path d="([^"]*)"', text)
    return len(re.findall("[ML]", curve))


def test_an_unfit_job_imports_nothing_to_draw_with(ready: Job) -> None:
    ready.environment["PYTHONPROFILEIMPORTTIME"] = "1"
    result = ready.run("--network_dim=x")
    assert result.code == 2
    imported = {
        line.split("|")[-1].strip() for line in result.err.splitlines() if line.startswith("import time:")
    }
    assert "jinja2" in imported
    assert not imported & {"matplotlib", "tensorboard", "torch"}
    page = Page((ready.tree / "output" / "data" / "report.html").read_text())
    assert page.at("Unfit: 1 problem") < page.at("flag --network_dim") < page.at("Stages")
