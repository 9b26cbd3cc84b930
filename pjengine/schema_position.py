"""Where in a JSON schema the part is that cannot be followed. Plain Python."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

MAPS = ("$defs", "definitions", "properties", "patternProperties")  # of names to schemas
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
SINGLE = ("items", "additionalProperties")
LITERALS = ("const", "enum")
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
ANNOTATIONS = ("default", "examples")  # what they hold is not looked at


def position_of(schema: Mapping[str, Any], reason: str, error_of: Callable[[dict[str, Any]], str]) -> str:
    """A JSON pointer to the smallest part that is refused for the same reason by itself; "#": the whole.

    `error_of` says why a schema is refused.
    """
    definitions = {name: schema[name] for name in MAPS[:2] if name in schema}
    pointer, part = "#", schema
    while True:
        for step, inner in _parts(part):
            if error_of({**definitions, **inner}) == reason:
                pointer, part = f"{pointer}/{step}", inner
                break
        else:
            return pointer


def inexact_number(schema: Mapping[str, Any]) -> tuple[str, int] | None:
    """Where a whole number is that llguidance would make another one of, and that number; None: nowhere.

    It reads numbers as float64, and puts them down as int64.
    """
    left: list[tuple[str, str, Any]] = [("schema", "#", schema)]  # a stack: schemas are nested deeply
    while left:
        kind, pointer, value = left.pop()
        if isinstance(value, int) and not isinstance(value, bool):
            if kind == "literal" and (abs(value) >= 2**63 or int(float(value)) != value):
                return pointer, value
        elif isinstance(value, Mapping):
            left += [(_kind(kind, key), f"{pointer}/{_escaped(key)}", own) for key, own in value.items()]
        elif isinstance(value, list):
            left += [(kind, f"{pointer}/{i}", own) for i, own in enumerate(value)]
    return None


def _kind(outer: str, key: str) -> str:
    """What is under a key of a schema, of "names" of schemas or of a "literal", where numbers count."""
    if outer != "schema":
        return "schema" if outer == "names" else outer
    if key in MAPS:
        return "names"
    if key in ANNOTATIONS:
        return "annotation"
    return "literal" if key in LITERALS + BOUNDS else "schema"


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
