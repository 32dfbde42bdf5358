import pytest

from entrypoint.diagnosis import diagnose, last_words


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "torch.OutOfMemoryError: CUDA out of memory. Tried to",
            "The GPU ran out of memory",
        ),
        ("OSError: [Errno 28] No space left on device: '/x'", "The disk is full"),
        ("RuntimeError: DataLoader worker (pid 7) is killed by signal: Bus error.", "/dev/shm is too small"),
        (
            "RuntimeError: The NVIDIA driver on your system is too old",
            "driver is too old",
        ),
        ("ModuleNotFoundError: No module named 'bitsandbytes.nn'", "bitsandbytes is not installed"),
        ("No data found. Please verify arguments", "found no pictures"),
        ("RuntimeError: NaN detected in latents: /x/a.png", "made NaN of a picture. Set no_half_vae=true"),
        ("ValueError: optimizer got an empty parameter list", "Every learning rate is 0"),
    ],
)
def test_known_ends_are_told_with_the_way_out(line: str, said: str) -> None:
    told = diagnose(1, ["steps:  3%", line, "  File x, line 1"])
    assert told is not None
    assert said in told


def test_what_a_library_says_on_its_way_is_no_cause() -> None:
    line = "Failed to load CPU gemm_4bit_forward from kernels-community: No module named 'kernels'."
    assert diagnose(1, [line, "ValueError: strange"]) is None
    assert "ran out of memory" in str(diagnose(-9, [line]))


def test_sigkill_without_a_word_is_most_likely_memory() -> None:
    assert "ran out of memory" in str(diagnose(-9, ["step 4"]))
    assert "The disk is full" in str(diagnose(-9, ["No space left on device"]))


def test_what_is_not_known_is_not_guessed() -> None:
    assert diagnose(1, ["ValueError: strange"]) is None
    assert diagnose(-15, []) is None


SEVERAL = (
    "[rank1]: Traceback (most recent call last):",
    "[rank1]: RuntimeError: strange",
    "steps:   0%|          | 0/4 [00:00<?, ?it/s]",
    "W1122 02:25:50.480000 25763 torch/distributed/elastic/multiprocessing/api.py:1028] Sending process",
    "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:",
    "  exitcode  : -9 (pid: 25801)",
    "============================================================",
)


def test_of_several_processes_the_one_that_failed_has_the_last_word() -> None:
    assert last_words(SEVERAL) == "RuntimeError: strange"
    assert last_words(("a", "b", SEVERAL[3], SEVERAL[6])) == "b"
    assert last_words(("a", "b")) == "b"
    assert last_words(("a", "RuntimeError: mixed", SEVERAL[2])) == "RuntimeError: mixed"
    assert last_words(()) == "It printed nothing"


def test_one_of_several_that_was_killed_is_told() -> None:
    assert "ran out of memory" in str(diagnose(1, SEVERAL))
