"""The JSON schemas that an answer is held to where it must call tools."""

from collections.abc import Mapping, Sequence
from typing import Any

from pjengine.serving.tools import Function

# Their values are no schemas; and those whose values are objects of schemas, by names that may be any.
_DATA = ("const", "default", "enum", "example", "examples")
_NAMED = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")


def calls_schema(functions: Sequence[Function], *, is_one: bool) -> dict[str, Any]:
    """Of a list of calls, `[{"name": ..., "parameters": {...}}, ...]`; `is_one`: of exactly one."""
    schemas = [(function.name, function.schema_of_arguments) for function in functions]
    items = any_call_schema(schemas, "parameters", root="#/items")
    return {"type": "array", "minItems": 1, **({"maxItems": 1} if is_one else {}), "items": items}


def any_call_schema(
    schemas: Sequence[tuple[str, Mapping[str, Any]]], key: str, *, root: str
) -> dict[str, Any]:
    """Of a call of one of the functions, with its arguments under `key`, for a place at `root`."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "enum": [name]},
                key: _moved(schema, f"{root}/anyOf/{index}/properties/{key}"),
            },
            "required": ["name", key],
            "additionalProperties": False,
        }
        for index, (name, schema) in enumerate(schemas)
    ]
    return {"anyOf": calls}


def _moved(schema: Any, root: str) -> Any:
    """The schema, with its references to itself, for a place at `root` of another."""
    if isinstance(schema, list):
        return [_moved(part, root) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[key] = root + value[1:]
        elif key in _NAMED and isinstance(value, Mapping):
            moved[key] = {name: _moved(part, root) for name, part in value.items()}
        else:
            moved[key] = value if key in _DATA else _moved(value, root)
    return moved
