"""What is wrong with a request, in the one form that every report uses; and how every report counts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where it stands, what is wrong with it, and the way out."""

    where: str  # a file, key or line: "hyperparameter network_dim", "s3://bucket/data"
    wrong: str  # what is wrong and what was expected; no full stop
    fix: str  # what to do or to type; no full stop, but a question mark where it is a question

    def __str__(self) -> str:
        return f"{self.where}: {self.wrong}. {self.fix}{'' if self.fix.endswith('?') else '.'}"


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number and its noun: "1 picture", "2 pictures", "1,600 steps"."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
