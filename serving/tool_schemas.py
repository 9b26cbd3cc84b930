"""The JSON schemas that an answer is held to where it must call tools."""

from collections.abc import Mapping, Sequence
from typing import Any

from pjengine.serving.tools import Function

# Their values are no schemas; and those whose values are objects of schemas, by names that may be any.
_DATA = ("const", "default", "enum", "example", "examples")
_NAMED = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")


def calls_schema(functions: Sequence[Function], *, is_one: bool) -> dict[str, Any]:
    """Of a list of calls, `[{"name": ..., "parameters": {...}}, ...]`; `is_one`: of exactly one."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "enum": [function.name]},
                "parameters": _moved(
                    function.schema_of_arguments, f"#/items/anyOf/{index}/properties/parameters"
                ),
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for index, function in enumerate(functions)
    ]
    return {"type": "array", "minItems": 1, **({"maxItems": 1} if is_one else {}), "items": {"anyOf": calls}}


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
