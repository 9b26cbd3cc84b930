"""Tools and reasoning as OpenAI's client meets them, of a server in a process of its own."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.serving.process import RANDOM, start_server

MESSAGES: list[Any] = [{"role": "user", "content": "What is it like outside?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "Rome"]},
                "days": {"$ref": "#/$defs/Days"},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"Days": {"type": "integer", "minimum": 1, "maximum": 9}},
        },
        "strict": True,
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "get_time", "strict": True}}
SAMPLED: dict[str, Any] = {"model": "demo", "temperature": 1, "seed": 5, "max_tokens": 400}
REQUIRED: dict[str, Any] = {
    **SAMPLED,
    "tools": [WEATHER, CLOCK],
    "tool_choice": "required",
    "parallel_tool_calls": False,
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """Of a model with random weights, which is taken for one that calls tools and thinks as Qwen3 does."""
    options = ("--enable-auto-tool-choice", "--tool-call-parser=hermes", "--reasoning-parser=qwen3")
    folder = tmp_path_factory.mktemp("server")
    with start_server(folder, "--model=demo", "--port=0", *options, *RANDOM) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            yield client


def check(call: Any) -> None:
    """The call is one of a tool that there is, with arguments that its schema allows."""
    assert call.id.startswith("call_") and call.type == "function"
    arguments = json.loads(call.function.arguments)
    if call.function.name == "get_time":
        assert arguments == {}
        return
    assert call.function.name == "get_weather" and arguments.keys() == {"city", "days"}
    assert arguments["city"] in ("Paris", "Rome") and arguments["days"] in range(1, 10)


def test_required_calls_are_calls(client: openai.OpenAI) -> None:
    create: Any = client.chat.completions.create
    answer = create(messages=MESSAGES, n=3, **REQUIRED)
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        [call] = choice.message.tool_calls
        check(call)
    result = {"role": "tool", "tool_call_id": call.id, "content": "Rain"}
    again = [*MESSAGES, answer.choices[-1].message, result]
    last = create(messages=again, tools=[CLOCK], tool_choice="none", **SAMPLED).choices[0].message
    assert last.content and not last.tool_calls


def test_required_calls_are_streamed(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(messages=MESSAGES, **REQUIRED) as stream:
        grown = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        choice = stream.get_final_completion().choices[0]
    assert choice.message.tool_calls is not None and len(choice.message.tool_calls) == 1
    call = choice.message.tool_calls[0]
    check(call)
    assert choice.finish_reason == "tool_calls" and grown[-1].arguments == call.function.arguments


def test_a_tool_that_is_named_is_called(client: openai.OpenAI) -> None:
    choice: Any = {"type": "function", "function": {"name": "get_weather"}}
    create: Any = client.chat.completions.create
    body = {"messages": MESSAGES, "tools": [CLOCK, WEATHER], "tool_choice": choice, **SAMPLED}
    whole = create(**body, logprobs=True).choices[0]
    [call] = whole.message.tool_calls
    assert (whole.finish_reason, call.function.name) == ("stop", "get_weather")
    check(call)
    text = "".join(entry.token for entry in whole.logprobs.content)
    assert text.lstrip().startswith(call.function.arguments)  # it might have thought first
    deltas = [chunk.choices[0].delta for chunk in create(**body, stream=True)]
    pieces = [piece for delta in deltas for piece in delta.tool_calls or ()]
    assert pieces[0].function.name == "get_weather" and len(pieces) > 3
    assert "".join(piece.function.arguments for piece in pieces) == call.function.arguments


def test_what_the_model_decides_to_call_is_called_when_it_has_thought(client: openai.OpenAI) -> None:
    text = (
        "<think>\nOutside? <tool_call> may help.\n</think>\n\nI look.\n<tool_call>\n"
        '{"name": "get_weather", "arguments": {"city": "Rome", "days": 1}}\n</tool_call>'
    )
    loose = {**WEATHER, "function": {**WEATHER["function"], "strict": False}}  # leaves room for a grammar
    create: Any = client.chat.completions.create
    # A grammar stands for the model's own will: this one has never seen a tool.
    forced = {"structured_outputs": {"choice": [text]}}
    body = {"messages": MESSAGES, "tools": [loose], "extra_body": forced, **SAMPLED}
    answer = create(**body)
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "\n\nI look."
    assert choice.message.reasoning == "\nOutside? <tool_call> may help.\n"
    check(choice.message.tool_calls[0])
    chunks = list(create(**body, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == answer.usage
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert "".join(delta.content or "" for delta in deltas) == choice.message.content
    assert "".join(getattr(delta, "reasoning", None) or "" for delta in deltas) == choice.message.reasoning
    assert chunks[-2].choices[0].finish_reason == "tool_calls"
    hidden = create(**{**body, "extra_body": {**forced, "include_reasoning": False}}).choices[0]
    assert not hasattr(hidden.message, "reasoning") and hidden.message.content == choice.message.content


def test_a_schema_that_cannot_be_followed_is_refused(client: openai.OpenAI) -> None:
    create: Any = client.chat.completions.create
    odd = {"type": "function", "function": {"name": "f", "parameters": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        create(messages=MESSAGES, **{**REQUIRED, "tools": [odd]})
    assert caught.value.param == "tools"
    with pytest.raises(openai.BadRequestError, match="no room for another form") as caught:
        create(messages=MESSAGES, response_format={"type": "json_object"}, **REQUIRED)
    assert caught.value.param == "tools"
