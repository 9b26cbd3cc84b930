"""Bare text -> the JSON that a schema means by it."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

_MOST_STEPS = 8  # through references and parts of a schema: more are a circle
_KINDS: tuple[tuple[str, type], ...] = (
    ("boolean", bool),  # which is an int, too
    ("integer", int),
    ("number", float),
    ("object", dict),
    ("array", list),
    ("null", type(None)),
    ("string", str),
)


def types_of(schema: Mapping[str, Any], key: str) -> frozenset[str]:
    """The JSON types that a property may have; one of which nothing is said is a string."""
    properties = schema.get("properties")
    own = properties.get(key) if isinstance(properties, Mapping) else None
    return frozenset(_types(own, schema, _MOST_STEPS)) or frozenset({"string"})


def _types(own: Any, root: Mapping[str, Any], num_steps: int) -> Iterator[str]:
    if not isinstance(own, Mapping) or not num_steps:
        return
    kind = own.get("type")
    yield from (name for name in _list(kind) or [kind] if isinstance(name, str))
    for name in ("anyOf", "oneOf", "allOf"):
        for part in _list(own.get(name)):
            yield from _types(part, root, num_steps - 1)
    yield from _types(_target(own.get("$ref"), root), root, num_steps - 1)
    if kind is None:
        for value in [*_list(own.get("enum")), *([own["const"]] if "const" in own else [])]:
            yield _name_of(value)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _target(reference: Any, root: Mapping[str, Any]) -> Any:
    """What a reference within the schema points to; None: nothing, or something elsewhere."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    found: Any = root
    for step in reference.split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _name_of(value: Any) -> str:
    return next(name for name, kind in _KINDS if isinstance(value, kind))


def json_of(text: str, types: frozenset[str]) -> str:
    """The value of one of the types that the text writes; the text as a string where it writes none."""
    bare = text.strip()
    word = {"none": "null"}.get(bare.lower(), bare.lower())
    if (word == "null" and "null" in types) or (word in ("true", "false") and "boolean" in types):
        return word
    try:
        name = _name_of(json.loads(bare, parse_constant=_refuse))
    except (ValueError, RecursionError):
        name = "string"
    is_meant = name in types or (name == "integer" and "number" in types)
    return bare if is_meant and name != "string" else json.dumps(text, ensure_ascii=False)


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
