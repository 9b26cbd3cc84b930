"""The schema that forced calls are held to."""

from typing import Any

import pytest

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TREE = {
    "type": "object",
    "properties": {
        "left": {"$ref": "#"},
        "place": {"$ref": "#/$defs/Place"},
        "$ref": {"type": "string", "default": "$ref"},
        "note": {"const": {"$ref": "#/$defs/Place"}},
        "default": {"anyOf": [{"$ref": "#/$defs/Place"}, {"$ref": "http://elsewhere#/a"}]},
    },
    "$defs": {"Place": {"type": "object", "properties": {"inner": {"$ref": "#/$defs/Place"}}}},
}


def functions(*schemas: Any) -> Any:
    from pjengine.serving.tools import Function

    return [Function(name=f"f{index}", parameters=schema) for index, schema in enumerate(schemas)]


def schema(*schemas: Any, is_one: bool = False) -> Any:
    from pjengine.serving.tool_schemas import calls_schema

    return calls_schema(functions(*schemas), is_one=is_one)


def test_each_tool_has_its_own_arguments() -> None:
    first, second = schema(CITY, None)["items"]["anyOf"]
    assert first["properties"] == {"name": {"type": "string", "enum": ["f0"]}, "parameters": CITY}
    assert first["required"] == ["name", "parameters"] and first["additionalProperties"] is False
    assert second["properties"]["parameters"] == {
        "type": "object",
        "properties": {},
        "additionalProperties": False,
    }
    assert list(first["properties"]) == ["name", "parameters"]  # the order in which they are written


def test_at_least_one_call_and_no_more_where_they_are_not_parallel() -> None:
    assert (schema(CITY)["type"], schema(CITY)["minItems"], "maxItems" in schema(CITY)) == ("array", 1, False)
    assert schema(CITY, is_one=True)["maxItems"] == 1


def test_references_point_to_where_the_schema_has_gone() -> None:
    place = "#/items/anyOf/1/properties/parameters"
    moved = schema(CITY, TREE)["items"]["anyOf"][1]["properties"]["parameters"]
    assert moved["properties"] == {
        "left": {"$ref": place},
        "place": {"$ref": f"{place}/$defs/Place"},
        "$ref": {"type": "string", "default": "$ref"},
        "note": {"const": {"$ref": "#/$defs/Place"}},
        "default": {"anyOf": [{"$ref": f"{place}/$defs/Place"}, {"$ref": "http://elsewhere#/a"}]},
    }
    assert moved["$defs"]["Place"]["properties"] == {"inner": {"$ref": f"{place}/$defs/Place"}}


@pytest.mark.parametrize("is_parallel", [True, False])
def test_the_request_is_held_to_it(is_parallel: bool) -> None:
    from pjengine import SamplingParams
    from pjengine.serving.message_reader import MessageForm
    from pjengine.serving.prompt_reader import PromptReader
    from pjengine.serving.protocol import ChatRequest
    from pjengine.serving.server_config import ServerConfig

    def forced(choice: Any) -> Any:
        tools = [
            {"type": "function", "function": {"name": f"f{i}", "parameters": own}}
            for i, own in enumerate((CITY, TREE))
        ]
        body = ChatRequest.model_validate(
            {
                "messages": [{"role": "user", "content": "a"}],
                "tools": tools,
                "tool_choice": choice,
                "parallel_tool_calls": is_parallel,
            }
        )
        config = ServerConfig(enable_auto_tool_choice=True, tool_call_parser="hermes")
        params = MessageForm(body, config).sampling_params(SamplingParams(), PromptReader(tokenizer=None))
        return None if params.structured_outputs is None else params.structured_outputs.json

    assert forced("required") == schema(CITY, TREE, is_one=not is_parallel)
    assert forced({"type": "function", "function": {"name": "f1"}}) == TREE
    assert forced("auto") is forced("none") is None
