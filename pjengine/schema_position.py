"""Where in a JSON schema the part is that cannot be followed. Plain Python."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

MAPS = ("$defs", "definitions", "properties", "patternProperties")  # of names to schemas
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
SINGLE = ("items", "additionalProperties")


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
