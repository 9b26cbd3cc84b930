"""Tools and reasoning in /v1/chat/completions: what may be asked, what the template sees, what comes back."""

import json
from typing import Any

import pytest

from tests.serving.call_texts import WRITERS, hermes
from tests.serving.client import Client, error_of, make_client

PATH = "/v1/chat/completions"
USER = {"role": "user", "content": "Weather?"}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "What it is like outside",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "get_time"}}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
ANSWERED = {"role": "tool", "tool_call_id": "call_1", "content": "Rain"}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
AUTO = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}


def greedy(max_tokens: int = 2, **fields: Any) -> dict[str, Any]:
    return {"messages": [USER], "temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, **fields}


def strict(tool: dict[str, Any]) -> dict[str, Any]:
    return {**tool, "function": {**tool["function"], "strict": True}}


def _tool(properties: dict[str, Any], name: str = "f") -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": properties}},
    }


MISTAKES: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "no tools": ({"tools": []}, "tools", "tools is empty"),
    "choice alone": ({"tool_choice": "auto"}, "tool_choice", "tool_choice needs tools"),
    "required alone": ({"tool_choice": "required"}, "tool_choice", "tool_choice needs tools"),
    "name alone": ({"tool_choice": NAMED}, "tool_choice", "tool_choice needs tools"),
    "unknown choice": ({"tools": [CLOCK], "tool_choice": "any"}, "tool_choice", "tool_choice"),
    "other name": ({"tools": [CLOCK], "tool_choice": NAMED}, "tool_choice", "of tools there are get_time"),
    "surrogates": (
        {"tools": [CLOCK, _tool({"\ud800": {"enum": ["\ud801"]}})], "tool_choice": "required"},
        "tools",
        "tools: the parameters of 'f': json holds a lone surrogate",
    ),
    "strict surrogates": (
        {"tools": [strict(_tool({"a": {"const": "\ud801"}}))]},
        "tools",
        "tools: the parameters of 'f': json holds a lone surrogate",
    ),
    "long parameters": (
        {
            "tools": [_tool({"a": {"const": "b" * 10**6}})],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
        },
        "tools",
        "tools: the parameters of 'f': json must have at most 1000000 characters",
    ),
    "long together": (
        {
            "tools": [_tool({"a": {"const": "b" * 600_000}}, name) for name in "fg"],
            "tool_choice": "required",
        },
        "tools",
        "tools: their parameters, together: json must have at most 1000000 characters",
    ),
    "what no grammar knows": (
        {"tools": [_tool({"a": {"type": "x"}})], "tool_choice": "required"},
        "tools",
        "tools.json=",
    ),
    "twice": ({"tools": [CLOCK, CLOCK]}, "tools", "two functions of the name 'get_time'"),
    "kind": ({"tools": [{"type": "web_search"}]}, "tools", "'function'"),
    "unknown field": ({"tools": [{**CLOCK, "x": 1}]}, "x", "there is no field 'x'"),
    "name": ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "function.name"),
    "of a user": (
        {"messages": [{**USER, "tool_calls": [CALL]}]},
        "tool_calls",
        "tool_calls is for the role assistant",
    ),
    "thinking user": ({"messages": [{**USER, "reasoning": "a"}]}, "reasoning", "is for the role assistant"),
    "no id": ({"messages": [{"role": "tool", "content": "a"}]}, "tool_call_id", "go together"),
    "id of a user": ({"messages": [{**USER, "tool_call_id": "a"}]}, "tool_call_id", "go together"),
    "nothing said": ({"messages": [{**CALLED, "tool_calls": []}]}, "messages", "needs content"),
    "broken arguments": (
        {"messages": [{**CALLED, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{"}}]}]},
        "messages",
        "must be a JSON object, got '{'",
    ),
    "list of arguments": (
        {"messages": [{**CALLED, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "[]"}}]}]},
        "messages",
        "must be a JSON object, got '[]'",
    ),
}


@pytest.mark.parametrize(("changes", "param", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named(llm: Any, changes: dict[str, Any], param: str | None, message: str) -> None:
    body = json.dumps({**greedy(), **changes})  # as it is: surrogates are written \ud800
    headers = {"content-type": "application/json"}
    status, error = error_of(make_client(llm, **AUTO).send("POST", PATH, content=body, headers=headers))
    assert (status, error["param"]) == (400, param)
    assert message in error["message"]


def test_what_the_server_was_not_told_is_refused_with_the_flag(client: Client) -> None:
    choices: tuple[dict[str, Any], ...] = ({}, {"tool_choice": "auto"})
    for choice in choices:
        status, error = client.error(PATH, **greedy(tools=[CLOCK], **choice))
        assert (status, error["param"]) == (400, "tool_choice")
        assert "--enable-auto-tool-choice" in error["message"] and "--tool-call-parser" in error["message"]
    status, error = client.error(PATH, **greedy(include_reasoning=False))
    assert (status, error["param"]) == (400, "include_reasoning") and "--reasoning-parser" in error["message"]
    client.answer(PATH, **greedy(tools=[CLOCK], tool_choice="none"))


def test_names_of_parsers_are_checked_at_the_start() -> None:
    from pjengine.serving.server_config import ServerConfig

    with pytest.raises(ValueError, match="tool_call_parser must be one of hermes, llama3_json, mistral"):
        ServerConfig(tool_call_parser="hermez")
    with pytest.raises(ValueError, match="reasoning_parser must be one of deepseek_r1, qwen3"):
        ServerConfig(reasoning_parser="r1")
    with pytest.raises(ValueError, match="enable_auto_tool_choice needs tool_call_parser"):
        ServerConfig(enable_auto_tool_choice=True)


def rendered(client: Client, template: str, **fields: Any) -> str:
    messages = fields.pop("messages", [USER])
    answer = client.answer(
        PATH, **greedy(1, messages=messages, chat_template=template, return_token_ids=True, **fields)
    )
    return client.answer("/detokenize", tokens=answer["prompt_token_ids"])["prompt"]


def test_the_template_sees_the_tools_as_they_were_sent(llm: Any) -> None:
    trusting = make_client(llm, trust_request_chat_template=True, **AUTO)
    tools = [WEATHER, {**CLOCK, "function": {**CLOCK["function"], "parameters": None}}]
    template = "{{ tools | tojson }}"
    wanted = [WEATHER, CLOCK]  # null is as if left out
    for choice in ({}, {"tool_choice": "auto"}, {"tool_choice": "none"}):
        assert json.loads(rendered(trusting, template, tools=tools, **choice)) == wanted
    tokens = trusting.answer("/tokenize", messages=[USER], tools=tools, chat_template=template)["tokens"]
    assert json.loads(trusting.answer("/detokenize", tokens=tokens)["prompt"]) == wanted
    hidden = {"exclude_tools_when_tool_choice_none": True}
    hiding = make_client(llm, trust_request_chat_template=True, **hidden, **AUTO)
    assert rendered(hiding, "{{ tools }}", tools=tools, tool_choice="none") == "None"
    assert json.loads(rendered(hiding, template, tools=tools)) == wanted


def test_the_template_sees_calls_their_results_and_reasoning(llm: Any) -> None:
    trusting = make_client(llm, trust_request_chat_template=True)
    called = {**CALLED, "reasoning": "so"}
    seen = json.loads(rendered(trusting, "{{ messages | tojson }}", messages=[USER, called, ANSWERED]))
    function = {"name": "get_weather", "arguments": {"city": "Paris"}}
    wanted = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        "reasoning": "so",
        "reasoning_content": "so",
    }
    assert wanted.items() <= seen[1].items()
    assert seen[2] == ANSWERED
    older = {"role": "assistant", "content": "a", "reasoning_content": "so"}
    [seen_older] = json.loads(rendered(trusting, "{{ messages | tojson }}", messages=[older]))
    assert {**older, "reasoning": "so"}.items() <= seen_older.items()
    empty = {**CALLED, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": ""}}]}
    [seen_empty] = json.loads(rendered(trusting, "{{ messages | tojson }}", messages=[empty]))
    assert seen_empty["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_what_a_model_writes_becomes_calls(llm: Any, write: Any) -> None:
    client = make_client(llm, enable_auto_tool_choice=True, tool_call_parser=WRITERS[write])
    text = write("Well,", [("get_weather", {"city": "Zürich 🐍"}), ("get_time", {})])
    shown = {"logprobs": True, "return_token_ids": True}
    body = greedy(250, tools=[WEATHER, CLOCK], structured_outputs={"choice": [text]}, **shown)
    answer = client.answer(PATH, **body)
    [choice] = answer["choices"]
    message = choice["message"]
    assert (choice["finish_reason"], message["content"]) == ("tool_calls", "Well,")
    functions = [call["function"] for call in message["tool_calls"]]
    assert [own["name"] for own in functions] == ["get_weather", "get_time"]
    assert [json.loads(own["arguments"]) for own in functions] == [{"city": "Zürich 🐍"}, {}]
    # Beside it, all tokens are told of.
    tokens = choice["token_ids"]
    spelled = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"])
    assert spelled.decode().removesuffix("<|endoftext|>") == text
    assert answer["usage"]["completion_tokens"] == len(tokens) == len(choice["logprobs"]["content"])
    events = client.events(PATH, **body)
    streamed = [chunk for event in events[1:] for chunk in event["choices"]]
    assert [token for chunk in streamed for token in chunk["token_ids"]] == tokens
    pieces = [piece for chunk in streamed for piece in chunk["delta"].get("tool_calls", ())]
    for index, own in enumerate(functions):
        mine = [piece["function"] for piece in pieces if piece["index"] == index]
        assert mine[0]["name"] == own["name"]
        assert "".join(piece["arguments"] for piece in mine) == own["arguments"]
    client.assert_idle()


STRICT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # What the grammar lets a model write, and where it stops it.
    "hermes": (
        (
            "a <tool> is {}",
            'Look:\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>\nDone',
            '<tool_call>{"name": "get_time", "arguments": {"any": [1]}}</tool_call>',
        ),
        (
            "<tool_call>Rome",
            '<tool_call>{"name": "get_rain"',
            '<tool_call>{"name": "get_weather", "arguments": {"town"',
            '<tool_call>{"name": "get_weather", "arguments": {"city": 1',
            '<tool_call>{"name": "get_weather", "arguments": {}',
        ),
    ),
    "llama3_json": (
        (
            "a {}",
            '{"name": "get_weather", "parameters": {"city": "Rome"}}; {"name": "get_time", "parameters": {}}',
        ),
        ('{"city"', ' {"name"', '{"name": "get_weather", "parameters": {"city": 1', "<|python_tag|>"),
    ),
}


@pytest.mark.parametrize("name", STRICT)
def test_calls_of_strict_tools_hold_to_their_schemas(llm: Any, name: str) -> None:
    from pjengine.serving.message_reader import MessageForm
    from pjengine.serving.protocol import ChatRequest

    client = make_client(llm, enable_auto_tool_choice=True, tool_call_parser=name)
    engine = client.service.llm.engine

    def wanted(**fields: Any) -> Any:
        tools = [strict(WEATHER), CLOCK]
        body = ChatRequest.model_validate({"messages": [USER], "tools": tools, **fields})
        form = MessageForm(body, client.service.config)
        return form.sampling_params(client.service.default_params, client.service.prompts).structured_outputs

    def follows(form: Any, text: str) -> bool:
        matcher = engine._preparation.grammars.matcher(form)
        for token in engine.tokenizer.encode(text):
            matcher.consume(token)
        return not matcher.error

    allowed, forbidden = STRICT[name]
    form = wanted()
    assert [text for text in allowed if not follows(form, text)] == []
    assert [text for text in forbidden if follows(form, text)] == []
    twice = hermes("", [("get_time", {})] * 2) if name == "hermes" else allowed[1]
    assert follows(form, twice) and not follows(wanted(parallel_tool_calls=False), twice)


@pytest.mark.parametrize("name", ["mistral", "qwen3"])
def test_strict_tools_are_refused_where_nothing_holds_the_model_to_them(llm: Any, name: str) -> None:
    client = make_client(llm, enable_auto_tool_choice=True, tool_call_parser=name)
    status, error = client.error(PATH, **greedy(tools=[strict(CLOCK)]))
    assert (status, error["param"]) == (400, "tools") and "strict=true is not held" in error["message"]


class Answers:
    """What a client is told of outputs of the engine that say this."""

    def __init__(self, client: Client, prompt: str = "", **fields: Any) -> None:
        from pjengine.serving.chat import _ChatForm
        from pjengine.serving.message_reader import MessageForm
        from pjengine.serving.protocol import ChatRequest

        body = ChatRequest.model_validate({"messages": [USER], **fields})
        self.prompt = prompt
        self.form = _ChatForm(body, client.service, MessageForm(body, client.service.config))

    def choices(self, *texts: str, end: str | None = None) -> list[dict[str, Any]]:
        from pjengine.outputs import CompletionOutput, RequestMetrics, RequestOutput

        outputs = [
            CompletionOutput(index=index, text=text, token_ids=[index], finish_reason=end)
            for index, text in enumerate(texts)
        ]
        return self.form.choices(
            0,
            RequestOutput(
                request_id="a",
                prompt=self.prompt,
                prompt_token_ids=[1],
                outputs=outputs,
                finished=end is not None,
                num_cached_tokens=0,
                metrics=RequestMetrics(),
            ),
        )

    def stream(self, text: str, end: str = "stop") -> list[dict[str, Any]]:
        """Letter by letter."""
        chunks = [chunk for char in text for chunk in self.choices(char)]
        return [*chunks, *self.choices("", end=end)]


TEXT = hermes("I look.", [("get_weather", {"city": "Paris"}), ("get_time", {})])


def test_calls_of_a_message(llm: Any) -> None:
    client = make_client(llm, **AUTO)
    [choice] = Answers(client, tools=[WEATHER, CLOCK]).choices(TEXT, end="stop")
    message = choice["message"]
    assert (choice["finish_reason"], message["content"]) == ("tool_calls", "I look.")
    assert [call.pop("id")[:5] for call in message["tool_calls"]] == ["call_", "call_"]
    assert message["tool_calls"] == [
        {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}},
        {"type": "function", "function": {"name": "get_time", "arguments": "{}"}},
    ]
    [choice] = Answers(client, tools=[CLOCK]).choices(hermes("", [("get_time", {})]), end="stop")
    assert choice["message"]["content"] is None
    [choice] = Answers(client, tools=[CLOCK]).choices("It is noon.", end="stop")
    assert choice["finish_reason"] == "stop" and "tool_calls" not in choice["message"]
    [choice] = Answers(client, tools=[CLOCK]).choices(TEXT[:-14], end="length")
    assert choice["finish_reason"] == "length" and len(choice["message"]["tool_calls"]) == 2


def test_calls_are_content_where_none_may_be_called(llm: Any) -> None:
    client = make_client(llm, **AUTO)
    both: tuple[dict[str, Any], ...] = ({}, {"tools": [CLOCK], "tool_choice": "none"})
    for fields in both:
        [choice] = Answers(client, **fields).choices(TEXT, end="stop")
        assert (choice["message"]["content"], choice["finish_reason"]) == (TEXT, "stop")


def test_a_stream_adds_up_to_the_message(llm: Any) -> None:
    client = make_client(llm, reasoning_parser="qwen3", **AUTO)
    text = f"<think>Hm.</think>{TEXT}"
    [whole] = Answers(client, tools=[WEATHER, CLOCK]).choices(text, end="stop")
    first, *chunks = Answers(client, tools=[WEATHER, CLOCK], stream=True).stream(text)
    assert first["delta"] == {"role": "assistant", "content": ""}
    deltas = [chunk["delta"] for chunk in chunks]
    for name in ("content", "reasoning"):
        assert "".join(delta.get(name, "") for delta in deltas) == whole["message"][name]
    pieces = [piece for delta in deltas for piece in delta.get("tool_calls", ())]
    for index, call in enumerate(whole["message"]["tool_calls"]):
        begin, *rest = [piece for piece in pieces if piece["index"] == index]
        assert begin["id"] and begin["type"] == "function"
        assert begin["function"]["name"] == call["function"]["name"]
        assert all(
            piece.keys() == {"index", "function"} and piece["function"].keys() == {"arguments"}
            for piece in rest
        )
        arguments = [piece["function"]["arguments"] for piece in (begin, *rest)]
        assert "".join(arguments) == call["function"]["arguments"]
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["tool_calls"]


def test_each_choice_is_read_for_itself(llm: Any) -> None:
    client = make_client(llm, **AUTO)
    texts = (TEXT, "No.")
    both = Answers(client, tools=[CLOCK], n=2, stream=True)
    chunks = [
        chunk
        for pair in zip(*(text.ljust(len(TEXT)) for text in texts), strict=True)
        for chunk in both.choices(*pair)
    ]
    chunks += both.choices("", "", end="stop")
    ends = [(chunk["index"], chunk["finish_reason"]) for chunk in chunks if chunk["finish_reason"]]
    assert ends == [(0, "tool_calls"), (1, "stop")]
    assert {chunk["index"] for chunk in chunks if chunk["delta"].get("tool_calls")} == {0}


def test_reasoning_is_split_or_left_out(llm: Any) -> None:
    client = make_client(llm, reasoning_parser="deepseek_r1")
    text = "Hm.</think>Yes."

    def message(text: str, prompt: str = "", **fields: Any) -> dict[str, Any]:
        [choice] = Answers(client, prompt, **fields).choices(text, end="stop")
        return {name: value for name, value in choice["message"].items() if name not in ("role", "refusal")}

    assert message(text) == {"reasoning": "Hm.", "content": "Yes."}
    assert message(text, include_reasoning=False) == {"content": "Yes."}
    assert message("Yes.", prompt="<think>\n\n</think>\n\n") == {"reasoning": None, "content": "Yes."}
    begun: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False}
    messages = [USER, {"role": "assistant", "content": "<think>Hm.</think>Ye"}]
    assert message("s.", messages=messages, **begun) == {"reasoning": None, "content": "s."}
    echoed = message("s.", messages=messages, echo=True, **begun)
    assert echoed["content"] == "<think>Hm.</think>Yes."
    chunks = Answers(client, include_reasoning=False, stream=True).stream(text)
    assert all("reasoning" not in chunk["delta"] for chunk in chunks)
    assert "".join(chunk["delta"]["content"] for chunk in chunks) == "Yes."


@pytest.mark.parametrize(
    ("parser", "prompt", "good", "bad"),
    [
        ("deepseek_r1", "", "Hm. {\n</think>\n\nJSON", "JSON</think>JSON"),
        ("deepseek_r1", "</think>\n", "JSON", "Hm."),
        ("qwen3", "<think>\n", "Hm.</think>JSON", "Hm.</think>Yes."),
        ("qwen3", "", "<think>Hm.</think>\nJSON", "Hm."),
        ("qwen3", "", "JSON", "<think>Hm.</think>Yes."),
    ],
)
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_model_thinks_before_a_call_that_is_forced(
    llm: Any, parser: str, prompt: str, good: str, bad: str, choice: Any
) -> None:
    from pjengine.serving.message_reader import MessageForm
    from pjengine.serving.protocol import ChatRequest

    config = make_client(llm, reasoning_parser=parser).service.config
    body = ChatRequest.model_validate({"messages": [USER], "tools": [WEATHER], "tool_choice": choice})
    form = MessageForm(body, config)
    wanted = form.form_after(prompt)
    assert wanted is not None
    arguments = '{"city": "Paris"}'
    call = f'[{{"name": "get_weather", "parameters": {arguments}}}]' if choice == "required" else arguments

    def error(text: str) -> str:
        matcher = llm.engine._preparation.grammars.matcher(wanted)
        for token in llm.engine.tokenizer.encode(text, add_special_tokens=False):
            matcher.consume(token)
        return matcher.error

    text = good.replace("JSON", call)
    assert not error(text) and "doesn't satisfy" in error(bad.replace("JSON", call[1:]))
    parts = form.reader(prompt).push(text, is_last=True)
    assert (parts.reasoning.strip(), parts.content) == (
        ("Hm. {" if "{" in good else "Hm.") * ("Hm" in good),
        "",
    )
    assert [own.arguments for own in parts.calls] == [arguments]


def test_a_forced_call_behind_reasoning_comes_from_the_engine(llm: Any) -> None:
    client = make_client(llm, reasoning_parser="qwen3")
    fields = {"tools": [CLOCK], "tool_choice": "required", "parallel_tool_calls": False, "temperature": 1}
    mark = llm.engine.tokenizer.encode("<", add_special_tokens=False)[0]
    for bias, thinks in ((100, True), (-100, False)):
        body = {"messages": [USER], "seed": 1, "max_tokens": 200, **fields, "logit_bias": {str(mark): bias}}
        [choice] = client.answer(PATH, **body)["choices"]
        message = choice["message"]
        assert (message["reasoning"] is not None) == thinks, message
        if not thinks:
            [call] = message["tool_calls"]
            assert call["function"] == {"name": "get_time", "arguments": "{}"}
    client.assert_idle()


def test_tokens_are_shown_even_where_they_settle_nothing(llm: Any) -> None:
    client = make_client(llm, **AUTO)
    chunks = Answers(client, tools=[CLOCK], stream=True, return_token_ids=True).stream("a<tool_box>")
    assert [chunk["delta"]["content"] for chunk in chunks[1:4]] == ["a", "", ""]
    assert [chunk["token_ids"] for chunk in chunks[1:]] == [[0]] * 12


@pytest.fixture(scope="module")
def marked() -> Any:
    """A tokenizer in which the marks are special tokens."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    from pjengine.tokenizer import Tokenizer

    hf = PreTrainedTokenizerFast(tokenizer_object=Backend(WordLevel({"a": 0, "b": 1}, unk_token="a")))
    hf.add_tokens([AddedToken("<tool_call>", special=True), AddedToken("<think>", special=False)])
    return Tokenizer(hf=hf, has_byte_tokens=False)


def test_marks_that_are_special_tokens_become_part_of_the_text(marked: Any) -> None:
    from pjengine import SamplingParams
    from pjengine.serving.errors import ApiError
    from pjengine.serving.message_reader import MessageForm
    from pjengine.serving.prompt_reader import PromptReader
    from pjengine.serving.protocol import ChatRequest
    from pjengine.serving.server_config import ServerConfig

    reader = PromptReader(tokenizer=marked)

    def is_hidden(settings: dict[str, Any], **fields: Any) -> bool:
        body = ChatRequest.model_validate({"messages": [USER], **fields})
        form = MessageForm(body, ServerConfig(**settings))
        return form.sampling_params(SamplingParams(), reader).skip_special_tokens

    assert not is_hidden(AUTO, tools=[CLOCK])
    assert not is_hidden(AUTO, tools=[CLOCK], skip_special_tokens=True)
    assert is_hidden(AUTO) and is_hidden(AUTO, tools=[CLOCK], tool_choice="none")
    assert is_hidden(AUTO, tools=[CLOCK], tool_choice="required")  # JSON, without marks
    assert is_hidden({**AUTO, "tool_call_parser": "mistral"}, tools=[CLOCK])
    assert is_hidden({"reasoning_parser": "qwen3"})  # of which no mark is special
    with pytest.raises(ApiError, match="strict=true is not held"):
        is_hidden(AUTO, tools=[strict(CLOCK)])
    assert PromptReader(tokenizer=None).has_special(["<tool_call>"]) is False
