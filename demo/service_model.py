"""Requests and answers held against AWS's own description of SageMaker, which botocore ships.

botocore checks types, required members and the least lengths before it sends. The service also checks
patterns, the greatest lengths and the enumerations: so does this.
"""

import re
from collections.abc import Iterator
from typing import Any

import botocore.session
from botocore.model import ListShape, MapShape, Shape, StructureShape
from botocore.validate import ParamValidator

MODEL = botocore.session.get_session().get_service_model("sagemaker")


def problems(shape: Shape, value: Any) -> list[str]:
    """What SageMaker would not take in `value`, in its own words."""
    report = ParamValidator().validate(value, shape)
    if report.has_errors():
        return [str(report.generate_report())]
    return list(_beyond(shape, value, ""))


def _beyond(shape: Shape, value: Any, where: str) -> Iterator[str]:
    """Constraints that botocore leaves to the service."""
    if isinstance(shape, StructureShape):
        for name, inner in value.items():
            yield from _beyond(shape.members[name], inner, f"{where}.{name[0].lower()}{name[1:]}")
    elif isinstance(shape, ListShape):
        for number, inner in enumerate(value, 1):
            yield from _beyond(shape.member, inner, f"{where}.{number}.member")
    elif isinstance(shape, MapShape):
        for key, inner in value.items():
            yield from _beyond(shape.key, key, f"{where}.{key}")
            yield from _beyond(shape.value, inner, f"{where}.{key}")
    told = f"Value '{value}' at '{where.lstrip('.')}' failed to satisfy constraint: Member must"
    facts = shape.metadata
    number = shape.type_name in ("integer", "long", "float")
    if "max" in facts and (value if number else len(value)) > facts["max"]:
        limit = f"have value less than or equal to {facts['max']}"
        yield f"{told} {limit if number else limit.replace('value', 'length')}"
    if "enum" in facts and value not in facts["enum"]:
        yield f"{told} satisfy enum value set: [{', '.join(facts['enum'])}]"
    if "pattern" in facts and not re.fullmatch(_in_python(facts["pattern"]), value, re.DOTALL):
        yield f"{told} satisfy regular expression pattern: {facts['pattern']}"


def _in_python(pattern: str) -> str:
    """A pattern of AWS's, which are Java's: letters, numbers and separators have names there."""
    for java, python in ((r"\p{L}", r"\w"), (r"\p{N}", r"\d"), (r"\p{Z}", r"\s")):
        pattern = pattern.replace(java, python)
    return pattern
