"""Writes into README.md what is made from the code: `make readme`.

What stands between the lines `<!-- NAME -->` and `<!-- /NAME -->` is made, the rest is written by people.
"""

from pathlib import Path

from entrypoint import hyperparameters

FILE = Path(__file__).parents[1] / "README.md"
_MADE = {"hyperparameters": hyperparameters.table}


def renewed(text: str) -> str:
    """The README's text with everything that is made from the code made anew."""
    for name, lines in _MADE.items():
        begin, end = f"<!-- {name} -->\n\n", f"\n\n<!-- /{name} -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        assert after, f"README.md has no place for {name}"
        text = before + begin + "\n".join(lines()) + end + after
    return text


if __name__ == "__main__":
    FILE.write_text(renewed(FILE.read_text(encoding="utf-8")), encoding="utf-8")
