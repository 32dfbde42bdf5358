"""A whole job in each way that a container can be held down, and in all of them together."""

from typing import Any

import pytest

from tests.contract.test_job import assert_completed
from tests.harness import TINY
from tests.image.container import ALL_HARDENED, HARDENED, ContainerJob, Subject
from tests.image.test_jobs import assert_quiet


@pytest.mark.parametrize("mode", HARDENED)
def test_one_restriction(ready: ContainerJob, mode: str) -> None:
    ready.options |= HARDENED[mode]
    result = ready.run()
    assert_completed(result, ready, "sd15")
    assert_quiet(result)


def test_all_restrictions_together(ready: ContainerJob, trainer: str) -> None:
    ready.configure("hyperparameters", {**TINY, "trainer": trainer})
    ready.options |= ALL_HARDENED
    result = ready.run()
    assert_completed(result, ready, "sd15")
    assert_quiet(result)


def test_a_small_dev_shm(ready: ContainerJob, trainer: str) -> None:
    """Docker gives 64 MB, through which loader workers would hand over pictures."""
    ready.options["shm_size"] = "64m"
    told = ready.subject.shell("stat --file-system --format '%S %b' /dev/shm", **ready.options)
    block, blocks = map(int, told.split())
    assert block * blocks == 64 << 20
    ready.configure("hyperparameters", {**TINY, "trainer": trainer, "max_data_loader_n_workers": "2"})
    assert_completed(ready.run(), ready, "sd15")


@pytest.mark.parametrize("options", [{"user": "1000:1000"}, ALL_HARDENED], ids=["user", "all"])
def test_a_user_who_can_write_nowhere_is_told(subject: Subject, options: dict[str, Any]) -> None:
    """There is no /opt/ml in the image, and only root could make it."""
    result = subject.run(**options)
    assert result.code == 2, result.out + result.err
    assert "/opt/ml/output/failure cannot be written: " in result.err
    assert "Set SAGEMAKER_BASE_DIR." in result.err
    assert "Traceback" not in result.out + result.err
