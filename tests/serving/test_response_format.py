"""response_format and structured_outputs: answers that have a form, and what is refused."""

import asyncio
import json
import re
from typing import Any

import jsonschema
import pytest

from tests.serving.client import Client

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "x", "max_tokens": 300, "temperature": 1.0, "seed": 1},
    CHAT: {"messages": [{"role": "user", "content": "x"}], "max_tokens": 300, "temperature": 1.0, "seed": 1},
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"]},
        "share": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["colour", "share"],
    "additionalProperties": False,
}


def json_schema(schema: Any = SCHEMA, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "colours", "schema": schema, **more}}


def text_of(choice: dict[str, Any]) -> str:
    return choice["text"] if "text" in choice else choice["message"]["content"]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "more", [{}, {"strict": True}, {"strict": False, "description": "of a flag"}], ids=str
)
def test_an_answer_follows_a_json_schema(client: Client, path: str, more: dict[str, Any]) -> None:
    answer = client.answer(path, **BODIES[path], n=2, response_format=json_schema(**more))
    for choice in answer["choices"]:
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
        jsonschema.validate(json.loads(text_of(choice)), SCHEMA)


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_put_together_is_the_answer(client: Client, path: str) -> None:
    fields = {**BODIES[path], "response_format": json_schema()}
    [choice] = client.answer(path, **fields)["choices"]
    parts = [event["choices"][0] for event in client.events(path, **fields)]
    texts = [part["text"] if "text" in part else part["delta"].get("content", "") for part in parts]
    assert "".join(texts) == text_of(choice) and parts[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize("path", BODIES)
def test_any_json_object_may_be_asked_for(client: Client, path: str) -> None:
    [choice] = client.answer(path, **BODIES[path], response_format={"type": "json_object"})["choices"]
    assert text_of(choice).startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(text_of(choice)), dict)


@pytest.mark.parametrize("path", BODIES)
def test_text_is_any_text(client: Client, path: str) -> None:
    plain = client.answer(path, **BODIES[path])
    asked = client.answer(path, **BODIES[path], response_format={"type": "text"})
    assert [text_of(choice) for choice in asked["choices"]] == [
        text_of(choice) for choice in plain["choices"]
    ]


FORMS: list[tuple[dict[str, Any], str]] = [
    ({"regex": "[a-f]{4}"}, "[a-f]{4}"),
    ({"choice": ["left", "right"], "json": None}, "left|right"),
    ({"grammar": 'start: "<" /[0-9]{2}/ ">"'}, "<[0-9]{2}>"),
    ({"json": {"enum": ["a", 1]}}, '"a"|1'),
    ({"json": '{"const": [1]}', "disable_any_whitespace": True}, r"\[1\]"),
    ({"json": {"const": [1]}, "whitespace_pattern": "_"}, r"\[_?1_?\]"),
]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(("form", "pattern"), FORMS, ids=str)
def test_structured_outputs_take_what_vllm_takes(
    client: Client, path: str, form: dict[str, Any], pattern: str
) -> None:
    [choice] = client.answer(path, **BODIES[path], structured_outputs=form)["choices"]
    assert re.fullmatch(pattern, text_of(choice)) and choice["finish_reason"] == "stop"


def test_the_plain_route_takes_structured_outputs(client: Client) -> None:
    answer = client.answer("/generate", prompt="x", max_tokens=9, structured_outputs={"choice": ["yes"]})
    assert answer == {"text": ["xyes"]}
    status, error = client.error("/generate", prompt="x", response_format={"type": "json_object"})
    assert (status, error["param"]) == (400, "response_format")


# Its states are few at first, and later beyond all bounds.
GROWING = "x{60}([a-d]*a[a-d]{60}|[a-d]*b[a-d]{61}|[a-d]*c[a-d]{62}|[a-d]*d[a-d]{63}){9}"


def test_a_grammar_that_fails_part_way_is_the_callers_mistake(client: Client) -> None:
    fields = {**BODIES[COMPLETIONS], "structured_outputs": {"regex": GROWING}}
    status, error = client.error(COMPLETIONS, **fields)
    assert (status, error["param"]) == (400, "structured_outputs")
    assert f"structured_outputs.regex={GROWING!r:.80} cannot be followed any further" in error["message"]
    assert "too many" in error["message"]
    *parts, last = client.events(COMPLETIONS, **fields)
    assert "".join(part["choices"][0]["text"] for part in parts).startswith("x" * 60)
    assert last == {"error": error}
    [choice] = client.answer(COMPLETIONS, prompt="x", structured_outputs={"choice": ["yes"]})["choices"]
    assert choice["text"] == "yes"


def test_a_grammar_that_takes_long_to_compile_holds_up_nobody_else(llm: Any) -> None:
    from pjengine import SamplingParams, StructuredOutputsParams

    async def last(params: Any) -> Any:
        return [output async for output in llm.generate("x", params)][-1]

    async def main() -> None:
        plain, form = SamplingParams(max_tokens=4), StructuredOutputsParams(choice=["slow"])
        with llm.engine._preparation.grammars._compiling:  # as while one is compiled
            waiting = asyncio.create_task(last(SamplingParams(structured_outputs=form)))
            assert (await last(plain)).finished
            assert not waiting.done()
        assert (await waiting).outputs[0].text == "slow"

    asyncio.run(asyncio.wait_for(main(), 60))


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "xml"}}, "response_format", "'text', 'json_object'"),
    ({"response_format": {}}, "response_format", "type"),
    ({"response_format": "json_object"}, "response_format", "dictionary"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema goes with the type"),
    (
        {"response_format": {**json_schema(), "type": "text"}},
        "response_format",
        "got 'text' and json_schema=",
    ),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format", "schema"),
    ({"response_format": json_schema(schema=3)}, "response_format", "schema"),
    ({"response_format": json_schema(strikt=True)}, "response_format", "strikt"),
    ({"response_format": json_schema({"type": "strin"})}, "response_format", "Invalid type: strin"),
    (
        {"response_format": json_schema({"const": 2**53 + 1})},
        "response_format",
        "at #/const; got 90071992547",
    ),
    (
        {"structured_outputs": {"json": {"enum": [2**64]}}},
        "structured_outputs",
        "at #/enum/0; got 18446744073",
    ),
    ({"response_format": json_schema({"not": {}})}, "response_format", 'Unimplemented keys: ["not"]'),
    (
        {"response_format": {"type": "structural_tag", "structures": [], "triggers": []}},
        "response_format",
        "structural_tag is refused",
    ),
    (
        {"response_format": json_schema(), "structured_outputs": {"regex": "a"}},
        "structured_outputs",
        "two forms: give one",
    ),
    ({"structured_outputs": {}}, "structured_outputs", "exactly one of json, regex"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one of"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs", "at least one text"),
    ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", "unclosed group"),
    ({"structured_outputs": {"grammar": "start: foo"}}, "structured_outputs", 'unknown name: "foo"'),
    ({"structured_outputs": {"regex": "a{1000000000}"}}, "structured_outputs", "too many expressions"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", "structural_tag is refused"),
    ({"structured_outputs": {"disable_additional_properties": True}}, "structured_outputs", "Extra inputs"),
    ({"guided_json": {"type": "object"}}, "guided_json", "taken by structured_outputs"),
    ({"guided_regex": "a"}, "guided_regex", "taken by structured_outputs"),
]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(("fields", "param", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_is_not_possible_is_refused_by_name(
    client: Client, path: str, fields: dict[str, Any], param: str, message: str
) -> None:
    status, error = client.error(path, **BODIES[path], **fields)
    assert (status, error["param"]) == (400, param)
    assert message in error["message"]
