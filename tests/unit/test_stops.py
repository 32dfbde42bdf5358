import os
import signal
import time
from collections.abc import Iterator

import pytest

from entrypoint import stops
from entrypoint.failures import Stopped


@pytest.fixture(autouse=True)
def as_in_a_job() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in stops.SIGNALS}
    stops.raise_them()
    yield
    stops.raise_them()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_stop_begins_to_count_and_a_second_one_hurries() -> None:
    assert stops.seconds_left() == float("inf")
    assert stops.since() is None
    with pytest.raises(Stopped, match="SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert 0 < stops.seconds_left() <= stops.SECONDS
    assert not stops.hurried()
    os.kill(os.getpid(), signal.SIGTERM)  # is not raised: there is nothing left to end
    assert stops.hurried()
    assert 0 < stops.seconds_left() <= stops.HURRIED
    os.kill(os.getpid(), signal.SIGTERM)  # gives no new time
    assert stops.seconds_left() <= stops.HURRIED


def test_one_that_is_held_back_is_raised_once_at_the_end() -> None:
    with pytest.raises(Stopped, match="SIGINT"), stops.held_back() as come:
        assert not come.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        assert come.is_set()
        assert not stops.hurried()
    assert not stops.hurried()
    os.kill(os.getpid(), signal.SIGINT)
    assert stops.hurried()


def test_a_stop_while_publishing_has_all_of_the_time() -> None:
    stops.note_them()
    os.kill(os.getpid(), signal.SIGTERM)
    since = stops.since()
    assert since is not None
    assert time.monotonic() - since < stops.SECONDS
    assert stops.seconds_left() <= stops.SECONDS
