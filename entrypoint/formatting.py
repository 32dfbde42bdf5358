"""`format`."""

from collections.abc import Sequence


def run(arguments: Sequence[str]) -> int:
    return 2
