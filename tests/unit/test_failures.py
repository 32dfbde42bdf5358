import pytest

from entrypoint.failures import JobError, Problem, StorageError, Unfit, collecting

A = Problem("flag --seed", "it is not a number", "Write --seed=1")
B = Problem("model", "it is missing", "Name it")


def test_one_problem_is_told_as_it_is() -> None:
    assert str(Unfit([A])) == "flag --seed: it is not a number. Write --seed=1."


def test_several_problems_are_counted_and_told_together() -> None:
    assert str(Unfit([A, B])) == f"2 problems: (1) {A} (2) {B}"


def test_collecting_goes_on_after_a_problem() -> None:
    problems: list[Problem] = []
    with collecting(problems):
        raise Unfit([A])
    with collecting(problems):
        raise StorageError(B)
    assert problems == [A, B]


def test_collecting_lets_other_errors_through() -> None:
    with pytest.raises(JobError, match="broken"), collecting([]):
        raise JobError("broken")


def test_a_path_that_cannot_be_used_is_a_problem_like_others() -> None:
    problems: list[Problem] = []
    with collecting(problems):
        raise PermissionError(13, "Permission denied", "/root/model")
    assert [str(one) for one in problems] == [
        "/root/model: it cannot be used (Permission denied). Correct the path."
    ]
