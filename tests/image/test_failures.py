"""How a job in the image tells that it failed."""

from tests.contract.test_failures import assert_refused
from tests.harness import TINY
from tests.image.container import ContainerJob


def test_an_unfit_request_is_told_cause_first(ready: ContainerJob) -> None:
    ready.configure("hyperparameters", {**TINY, "train_batch_size": "none"})
    result = ready.run()
    assert_refused(ready, result, 'hyperparameter train_batch_size: train_batch_size = "none" is not a whole')
    assert ready.failure is not None
    assert ready.failure.startswith("hyperparameter train_batch_size: ")


def test_a_trainer_that_fails_is_told_cause_first(ready: ContainerJob, trainer: str) -> None:
    rates = {"unet_lr": "1e10", "text_encoder_lr": "1e10", "max_train_epochs": "300"}
    ready.configure("hyperparameters", {**TINY, **rates, "trainer": trainer})
    result = ready.run()
    assert result.code == 1, result.out + result.err
    assert ready.failure is not None
    assert ready.failure.startswith("The loss was not a number for 10 steps in a row")
    assert len(ready.failure.encode()) <= 1024
    assert "Traceback" not in ready.failure + result.err
    assert "shape.safetensors" not in {path.name for path in ready.model.iterdir()}
