"""Random JSON schemas of every kind that people write, small enough for a model that says anything."""

import random
from collections.abc import Iterator
from typing import Any

PATTERNS = ("^[a-c]{1,4}$", r"^\d{3}-\d{2}$", "^(red|green)-[0-9a-f]{2}$", "^[A-Z][a-z]{0,5}( [A-Z])?$")
NAMES = ("id", "a b", 'quo"te', "naïve", "x", "items", "日本", "back\\slash")
MORE = {"patternProperties": {"^k[0-9]{1,3}$": {"type": "boolean"}}, "maxProperties": 6}
NODE = {
    "type": "object",
    "properties": {
        "value": {"type": "boolean"},
        "next": {"type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 2},
    },
    "required": ["value", "next"],
    "additionalProperties": False,
}


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema whose definitions, where it refers to any, are in it."""
    schema = _any(rng, depth)
    defs = {"n": NODE, "s": _leaf(rng)}
    return {**schema, "$defs": defs} if any("$ref" in part for part in parts(schema)) else schema


def parts(schema: Any) -> Iterator[dict[str, Any]]:
    """A schema and all schemas in it; among them what only looks like one."""
    if isinstance(schema, dict):
        yield schema
    for inner in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from parts(inner)


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    if depth == 0 or rng.random() < 0.2:
        return _leaf(rng)
    make = rng.choice((_object, _object, _object, _array, _array, _tuple, _union, _reference))
    return make(rng, depth - 1)


def _leaf(rng: random.Random) -> dict[str, Any]:
    low, high, length = rng.randint(-500, 3), rng.randint(4, 2000), rng.randint(1, 8)
    leaves: list[dict[str, Any]] = [
        {"type": rng.choice(("null", "boolean"))},
        {"type": "integer", "minimum": low, "maximum": high},
        {"type": "integer", "exclusiveMinimum": low, "maximum": high, "multipleOf": rng.randint(2, 7)},
        {"type": ["integer", "null"], "minimum": low, "exclusiveMaximum": high},
        {"type": "number", "minimum": low, "exclusiveMaximum": high, "multipleOf": 0.25},
        {"allOf": [{"type": "integer", "minimum": low}, {"maximum": high}]},
        {"type": "string", "maxLength": length},
        {"type": "string", "minLength": length, "maxLength": length + 3},
        {"type": "string", "pattern": rng.choice(PATTERNS)},
        {"type": "string", "format": rng.choice(("date", "uuid", "ipv4"))},
        {"enum": rng.sample(["a", "bé", 1, 2.5, None, True, [1], {"x": 1}, "two words"], 3)},
        {"const": rng.choice(["c", 7, {"k": [None]}, "line\nbreak"])},
    ]
    return {"description": "one of many"} | rng.choice(leaves)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(1, 3))
    schema = {
        "title": "An object",
        "type": "object",
        "properties": {name: _any(rng, depth) for name in names},
        "required": rng.sample(names, rng.randint(0, len(names))),
        "additionalProperties": False,
    }
    return {**schema, "required": names, **MORE} if rng.random() < 0.3 else schema


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(0, 1)
    return {"type": "array", "items": _any(rng, depth), "minItems": low, "maxItems": low + 1}


def _tuple(rng: random.Random, depth: int) -> dict[str, Any]:
    items = [_any(rng, depth) for _ in range(rng.randint(1, 3))]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": rng.randint(0, len(items))}


def _union(rng: random.Random, depth: int) -> dict[str, Any]:
    if rng.random() < 0.3:  # the two exclude each other
        return {
            "oneOf": [{"type": "string", "maxLength": 5}, {"type": "integer", "minimum": 0, "maximum": 99}]
        }
    return {"anyOf": [_any(rng, depth) for _ in range(rng.randint(1, 3))]}


def _reference(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{rng.choice('ns')}"}
