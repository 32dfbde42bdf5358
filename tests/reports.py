"""Jobs as their reports find them, made without training; and reports, taken apart."""

import base64
import io
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from entrypoint import job as stages
from entrypoint.check import check
from entrypoint.contract import Tree
from entrypoint.record import Job
from entrypoint.request import resolve
from entrypoint.storage import Storage
from tests import harness


class Page(HTMLParser):
    """A report as a browser takes it apart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] != "style" and data.strip():
            self.words.append(data.strip())

    @property
    def sources(self) -> list[str]:
        return [str(attributes["src"]) for tag, attributes in self.tags if tag == "img"]

    @property
    def pictures(self) -> list[Image.Image]:
        return [Image.open(io.BytesIO(base64.b64decode(one.partition(",")[2]))) for one in self.sources]

    def at(self, text: str) -> int:
        """Where a text stands, counted in texts."""
        found = [number for number, word in enumerate(self.words) if text in word]
        assert found, text
        return found[0]


def prepared(
    folder: Path,
    model: Path,
    pictures: Path,
    *,
    prompts: str = "",
    output: Path | None = None,
    flat: bool = False,
    **hyperparameters: str,
) -> Job:
    """A job up to where its trainer would start, by its own stages. `prompts`: of sample pictures."""
    asked = {**harness.TINY, **hyperparameters}
    tree = harness.Job(folder)
    tree.mount("model", model)
    tree.mount("dataset", pictures)
    if output:
        asked["output_uri"] = str(output)
    tree.configure("hyperparameters", asked)
    tree.end()
    job = Job(Tree(tree.tree), folder / "work")
    job.work.mkdir()
    storage = Storage()
    with job.stage("resolve"):
        job.request = replace(resolve((), job.tree, storage), flat=flat)
    with job.stage("check"):
        job.plan = check(job.request, job.tree, folder / "scratch", storage)
        if prompts:  # of which the built-in trainer draws none
            job.plan = replace(job.plan, extras=replace(job.plan.extras, prompts=("prompts.txt", prompts)))
    with job.stage("fetch"):
        job.inputs = stages.fetch(job.plan, storage)
        job.looked = stages.look(job.inputs)
    with job.stage("prepare"):
        job.prepared = stages.prepare(job.inputs, job.looked, None, job)
    return job


def write_log(folder: Path, steps: int, *, broken_at: int = 0) -> Path:
    """An event log as trainers write it."""
    with SummaryWriter(str(folder)) as log:
        for step in range(1, steps + 1):
            loss = math.inf if step == broken_at else 0.1 + 0.05 * math.sin(step) + 1 / (step + 9)
            rate = 5e-5 * (1 + math.cos(math.pi * (step - 1) / steps))
            log.add_scalar("loss/current", loss, step)
            log.add_scalar("lr/textencoder", rate / 10, step)
            log.add_scalar("lr/unet", rate, step)
            log.add_scalar("lr/group1", rate, step)
    (file,) = folder.iterdir()
    return file


def write_samples(output: Path, when: list[str], prompts: int, *, side: int = 96) -> None:
    """Sample pictures under the names that sd-scripts gives them (train_util.py:6572-6577)."""
    (output / "sample").mkdir()
    rng = np.random.default_rng(0)
    for number, name in enumerate(when):
        for prompt in range(prompts):
            shape = np.linspace(0, 160, side)[None, :, None] + np.array([20 * number, 60 * prompt, 40])
            pixels = (shape + rng.integers(0, 40, (side, side, 3))).clip(0, 255).astype(np.uint8)
            file = output / "sample" / f"cat_x_{name}_{prompt:02d}_20260101120000_42.png"
            Image.fromarray(pixels).save(file)
