from entrypoint.hyperparameters import HYPERPARAMETERS
from tests import readme


def test_what_is_made_from_the_code_is_up_to_date() -> None:
    text = readme.FILE.read_text(encoding="utf-8")
    assert readme.renewed(text) == text, "type make readme"
    assert f"`{next(iter(HYPERPARAMETERS))}`" in text
