import pytest

from entrypoint.stall import Stall


class Trainer:
    """A trainer that says how much CPU it has used, and a clock."""

    now = 0.0
    used = 0.0

    def clock(self) -> float:
        return self.now

    def cpu_times(self) -> "Trainer":
        return self

    @property
    def user(self) -> float:
        return self.used

    system = 0.0


def hangs_after(seconds: float, *, cpu: float = 0.0, prints: bool = False, gpu: bool = False) -> float | None:
    """When a trainer is taken to hang that has been silent for a while; None: never, in ten times as long."""
    trainer = Trainer()
    stall = Stall(seconds, lambda: [trainer], gpu_works=lambda: gpu, clock=trainer.clock)  # type: ignore[list-item]
    while trainer.now < 10 * seconds:
        trainer.now += 0.5
        trainer.used += 0.5 * cpu
        if stall.hangs(trainer.now if prints else 0.0):
            return trainer.now
    return None


def test_silence_without_work_is_a_hang() -> None:
    assert hangs_after(60) == 60
    assert hangs_after(60, cpu=0.01) == 60  # threads that wait


@pytest.mark.parametrize("life", [{"cpu": 0.5}, {"prints": True}, {"gpu": True}])
def test_a_sign_of_life_is_none(life: dict[str, float]) -> None:
    assert hangs_after(60, **life) is None  # type: ignore[arg-type]


def test_a_process_that_ends_is_life() -> None:
    trainer = Trainer()
    trainer.used = 100
    stall = Stall(60, lambda: [trainer], gpu_works=lambda: False, clock=trainer.clock)  # type: ignore[list-item]
    trainer.now = 30
    assert not stall.hangs(0)
    trainer.now, trainer.used = 60, 3
    assert not stall.hangs(0)


def test_without_a_time_nothing_hangs() -> None:
    trainer = Trainer()
    stall = Stall(0, lambda: [trainer], gpu_works=lambda: False, clock=trainer.clock)  # type: ignore[list-item]
    trainer.now = 1e9
    assert not stall.hangs(0)
