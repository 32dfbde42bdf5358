"""Every way in which a job ends badly, and what the process exits with.

JobError            1    the job failed
├── Unfit           2    the request cannot be trained; holds every problem that was found
├── StorageError    1    S3 or the disk said no (2, as a problem, while the request is checked)
├── TrainerFailed   1    the trainer ended without a LoRA
└── BadLora         1    the trainer left a LoRA that does not work

Stopped             143  SIGTERM: SageMaker stops the job; no failure file is written
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kohya.config import Merged
from kohya.problem import Problem

__all__ = ["BadLora", "JobError", "Outage", "Problem", "Stopped", "StorageError", "TrainerFailed", "Unfit"]


class JobError(Exception):
    """The job failed. Its text is the cause, in sentences that a person can act on."""

    exit_code = 1


class Unfit(JobError):
    """The request cannot be trained. All its problems are told together, of `merged` as far as that came."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem], merged: Merged | None = None) -> None:
        self.problems = tuple(problems)
        self.merged = merged
        if len(self.problems) == 1:
            super().__init__(str(self.problems[0]))
        else:
            told = " ".join(f"({number}) {problem}" for number, problem in enumerate(self.problems, 1))
            super().__init__(f"{len(self.problems)} problems: {told}")


class StorageError(JobError):
    """S3, or the disk that it is fetched to, did not do what was asked."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        super().__init__(str(problem))


class Outage(Problem):
    """Storage gave no answer, or none for now: the request may be fit all the same."""


class TrainerFailed(JobError):
    """The trainer ended without a LoRA."""


class BadLora(JobError):
    """The trainer left a LoRA that does not open, lacks keys, or holds numbers that cannot work."""


class Stopped(BaseException):
    """SIGTERM arrived. No Exception, so that no library takes it for an error of its own and tries again."""

    exit_code = 143


@contextmanager
def collecting(problems: list[Problem]) -> Iterator[None]:
    """Add the problems that are raised inside to `problems`, so that the checks after it still run."""
    try:
        yield
    except Unfit as error:
        problems += error.problems
    except StorageError as error:
        problems.append(error.problem)
    except OSError as error:  # of a path that was given
        problems.append(
            Problem(str(error.filename), f"it cannot be used ({error.strerror})", "Correct the path")
        )
