"""The stand-in for AWS, one for the tests of a module: moto's memory is the process', and others empty it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.stand_in import StandIn
from tests.lora_jobs.client import Person


@pytest.fixture(scope="module")
def aws() -> Iterator[StandIn]:
    with StandIn() as running:
        yield running


@pytest.fixture
def person(aws: StandIn, tmp_path: Path) -> Person:
    return Person(aws, tmp_path)
