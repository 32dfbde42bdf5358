"""A TOML of the trainer's options, corrected where that is safe; everything else in it stays as it was.

Lines are kept, and so are comments, blank lines and sections: to sd-scripts a section's name means nothing,
to a person it is a heading. No library does it: those that keep comments let no key be renamed or moved.
What is corrected:

types     "1e-4" becomes 1e-4, "false" becomes false, 512 becomes "512": as its option is declared
aliases   lr_restart_cycles becomes lr_scheduler_num_cycles
rates     text_encoder_lr1 and text_encoder_lr2 become text_encoder_lr, where they are the same
order     options that follow each other without a blank or a comment line stand as in sd-scripts' parser
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import tomli_w

from kohya import config
from kohya.config import Setting
from kohya.problem import Problem

_CLOSES = re.compile("""[]}]|\"{3}|'{3}""")  # a line in which a value of several lines may end
_MOST = 100  # places at which a value or its comment may end: each is tried


@dataclass(frozen=True)
class Formatted:
    """The text as it should be, what was changed on the way, and what nobody but its author can mend."""

    text: str
    changes: tuple[str, ...]
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class _Piece:
    """A blank line, a comment or a section's heading; or a key, its value and comment, in all their lines."""

    line: int
    text: str
    setting: Setting | None = None


def formatted(text: str, where: str) -> Formatted:
    """`text`, corrected. A second time it changes nothing, and it means what it meant to config.merge."""
    text = text.replace("\r\n", "\n")  # as TOML reads it
    settings, problems = config.read(text, where)
    changes: list[str] = []
    rate = _rate(settings)
    unknown = [one for one in settings if rate is None or one.name not in config.TEXT_ENCODER_LRS]
    problems += config.merge("sdxl", [unknown]).problems  # sdxl has every option
    try:
        config.parse(text)
    except ValueError:  # which config.read has told
        return Formatted(text, (), tuple(problems))
    try:
        pieces = list(_pieces(text))
    except ValueError as error:
        return Formatted(text, (), (*problems, Problem(where, str(error), "Write it in one line")))
    names = [piece.setting.name for piece in pieces if piece.setting]
    if len({config.ALIASES.get(name, name) for name in names}) < len(names):  # their order decides
        return Formatted(text, (), (*problems, *_under_two_names(names, where)))
    pieces = list(_joined(pieces, rate, where, changes))
    pieces = [_corrected(piece, where, changes) for piece in pieces]
    return Formatted("\n".join(_ordered(pieces, where, changes)), tuple(changes), tuple(problems))


def _pieces(text: str) -> Iterator[_Piece]:
    """The lines of a TOML text, those of one value together. Raises ValueError over a value too long."""
    lines = text.split("\n")
    first = 0
    while first < len(lines):
        end = first + 1
        if not lines[first].lstrip().startswith(("#", "[")) and lines[first].strip():
            ends = (number for number in range(end, len(lines) + 1)
                    if number == end or _CLOSES.search(lines[number - 1]))  # fmt: skip
            for end in islice(ends, _MOST):
                if found := _parsed("\n".join(lines[first:end])):
                    break
            else:
                raise ValueError(f"line {first + 1} begins a value of more than {_MOST} lines that close one")
            ((name, value),) = found.items()
            named = name in config.options() or name in config.ALIASES or name in config.TEXT_ENCODER_LRS
            setting = Setting(name, value, "") if named else None
            yield _Piece(first + 1, "\n".join(lines[first:end]), setting)
        else:
            yield _Piece(first + 1, lines[first])
        first = end


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        return config.parse(text)
    except ValueError:
        return None


def _under_two_names(names: Sequence[str], where: str) -> Iterator[Problem]:
    """Options that are set under two names; those that are set twice under one config.read has told."""
    for old, new in config.ALIASES.items():
        if {old, new} <= set(names):
            yield Problem(where, f"{old} and {new} are the same option", "Keep one of the two lines")


def _rate(settings: Sequence[Setting]) -> Setting | None:
    """The one rate of both text encoders, where each is given by a name that sd-scripts does not have."""
    given = {setting.name: setting.value for setting in settings}
    if "text_encoder_lr" in given or not given.keys() >= set(config.TEXT_ENCODER_LRS):
        return None
    both = [Setting("text_encoder_lr", given[name], "") for name in config.TEXT_ENCODER_LRS]
    first, second = (config.merge("sdxl", [[one]]).settings.get("text_encoder_lr") for one in both)
    return first if first == second else None


def _joined(
    pieces: Sequence[_Piece], rate: Setting | None, where: str, changes: list[str]
) -> Iterator[_Piece]:
    """The pieces, with `rate` in the place of the first of the two that they stand for."""
    two = [piece for piece in pieces if piece.setting and piece.setting.name in config.TEXT_ENCODER_LRS]
    for piece in pieces:
        if piece not in two:
            yield piece
        elif rate is None:
            yield _Piece(piece.line, piece.text)
        elif piece is two[0]:
            told = f"text_encoder_lr = {_toml(rate.value)}"
            lines = " and ".join(str(one.line) for one in two)
            changes.append(f"{where} line {lines}: {' and '.join(config.TEXT_ENCODER_LRS)} become {told}")
            yield _Piece(piece.line, told + "".join(map(_comment, two)), rate)


def _corrected(piece: _Piece, where: str, changes: list[str]) -> _Piece:
    """A key under its option's name, and with a value of its option's type; what is wrong stays."""
    if piece.setting is None or piece.text.count("#") > _MOST:
        return piece
    old = piece.setting
    new = config.merge("sdxl", [[old]]).settings.get(config.ALIASES.get(old.name, old.name))
    if new is None or (new.name == old.name and _is_same(old.value, new.value)):
        return piece
    said = f"{old.name} = {_toml(old.value)}", f"{new.name} = {_toml(new.value)}"
    changes.append(f"{where} line {piece.line}: {said[0][:80]} becomes {said[1][:80]}")
    return _Piece(piece.line, f"{said[1]}{_comment(piece)}", new)


def _is_same(old: Any, new: Any) -> bool:
    """Whether sd-scripts would take both for the same: an int does where a float is declared."""
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_is_same, old, new))
    whole = isinstance(old, int) and not isinstance(old, bool) and isinstance(new, float)
    return bool(old == new) and (whole or type(old) is type(new))


def _comment(piece: _Piece) -> str:
    """The comment behind a value."""
    value = _parsed(piece.text)
    for place, character in enumerate(piece.text):
        if character == "#" and _parsed(piece.text[:place]) == value:
            return f"  {piece.text[place:]}"
    return ""


def _ordered(pieces: Sequence[_Piece], where: str, changes: list[str]) -> Iterator[str]:
    """The pieces' texts, those of options that follow each other in the parser's order."""
    places = {name: place for place, name in enumerate(config.options())}
    group: list[_Piece] = []
    for piece in [*pieces, None]:
        if piece is not None and piece.setting is not None:
            group.append(piece)
            continue
        if group:
            ordered = sorted(group, key=lambda one: places.get(one.setting.name if one.setting else "", -1))
            if ordered != group:
                changes.append(f"{where} line {group[0].line}: {len(group)} options in the parser's order")
            yield from (one.text for one in ordered)
            group = []
        if piece is not None:
            yield piece.text


def _toml(value: Any) -> str:
    """A value as TOML, in one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").rstrip("\n")
