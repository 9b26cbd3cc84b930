"""Where in a JSON schema the part is that cannot be followed. Plain Python."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

MAPS = ("$defs", "definitions", "properties", "patternProperties")  # of names to schemas
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
SINGLE = ("items", "additionalProperties")
LITERALS = ("const", "enum")
BOUNDS = {
    **dict.fromkeys(("maximum", "exclusiveMaximum"), "upper"),
    **dict.fromkeys(("minimum", "exclusiveMinimum"), "lower"),
    "multipleOf": "literal",
}
INT64_MAX = 2**63 - 1
ANNOTATIONS = ("default", "examples")  # what they hold is not looked at


def position_of(
    schema: Mapping[str, Any], reason: str, error_of: Callable[[dict[str, Any]], str]
) -> tuple[str, str]:
    """A JSON pointer to the smallest part that the whole is refused for ("#": itself), and why that part is.

    It is refused for the same reason by itself, or for its own where the reason names it. `error_of` says why
    a schema is refused.
    """
    definitions = {name: schema[name] for name in MAPS[:2] if name in schema}
    pointer, part = "#", schema
    while True:
        blamed = _blamed(reason)
        for step, inner in sorted(_parts(part), key=lambda own: own[0] != blamed):
            error = error_of({**definitions, **inner})
            if error and (step == blamed or error == reason):
                pointer, part, reason = f"{pointer}/{step}", inner, error
                break
        else:
            return pointer, reason


def _blamed(reason: str) -> str | None:
    """How a pointer goes on to the part that a reason names; None: it names none."""
    if found := re.search(r"required property '(.*)' is unsatisfiable", reason, re.DOTALL):
        return f"properties/{_escaped(found[1])}"
    if found := re.search(r"prefixItems\[(\d+)\] is unsatisfiable", reason):
        return f"prefixItems/{found[1]}"
    return "items" if "required item is unsatisfiable" in reason else None


def inexact_number(schema: Mapping[str, Any]) -> tuple[str, int] | None:
    """Where a whole number is that llguidance would make another one of, and that number; None: nowhere.

    It reads numbers as float64, and puts them down as int64: bounds at the ends of that, or beyond, become
    its ends, which forbids nothing that it could write.
    """
    left: list[tuple[str, str, Any]] = [("schema", "#", schema)]  # a stack: schemas are nested deeply
    while left:
        kind, pointer, value = left.pop()
        if isinstance(value, int) and not isinstance(value, bool):
            is_end = (kind == "upper" and value >= INT64_MAX) or (kind == "lower" and value <= -INT64_MAX)
            is_read = kind in ("literal", "upper", "lower") and not is_end
            if is_read and (abs(value) > INT64_MAX or int(float(value)) != value):
                return pointer, value
        elif isinstance(value, Mapping):
            left += [(_kind(kind, key), f"{pointer}/{_escaped(key)}", own) for key, own in value.items()]
        elif isinstance(value, list):
            left += [(kind, f"{pointer}/{i}", own) for i, own in enumerate(value)]
    return None


def _kind(outer: str, key: str) -> str:
    """What is under a key of a schema, of "names" of schemas, or of what has numbers that count."""
    if outer != "schema":
        return "schema" if outer == "names" else outer
    if key in MAPS:
        return "names"
    if key in ANNOTATIONS:
        return "annotation"
    if key in BOUNDS:
        return BOUNDS[key]
    return "literal" if key in LITERALS else "schema"


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schemas right in a schema, and how a pointer goes on to each."""
    for name in MAPS:
        inner = schema.get(name)
        if isinstance(inner, dict):
            yield from (
                (f"{name}/{_escaped(key)}", own) for key, own in inner.items() if isinstance(own, dict)
            )
    for name in LISTS:
        inner = schema.get(name)
        if isinstance(inner, list):
            yield from ((f"{name}/{i}", own) for i, own in enumerate(inner) if isinstance(own, dict))
    yield from ((name, schema[name]) for name in SINGLE if isinstance(schema.get(name), dict))


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")
