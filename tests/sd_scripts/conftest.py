"""A job with the real sd-scripts on a narrow base model."""

from pathlib import Path

import pytest

from tests.harness import NARROW, TINY, Job


@pytest.fixture
def narrow(job: Job, pictures: Path) -> Job:
    """A job by channels of two steps that lacks its base model."""
    job.environment["PYTHONPATH"] = str(NARROW)
    job.mount("dataset", pictures)
    lengths = {"max_train_epochs": "", "max_train_steps": "2", "save_every_n_epochs": ""}
    job.configure("hyperparameters", {**TINY, **lengths, "trainer": "sd-scripts"})
    return job
