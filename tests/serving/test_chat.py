"""/v1/chat/completions: the chat template before the engine, and messages behind it."""

from typing import Any

import pytest

from tests.serving.client import Client, make_client

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "system", "content": "Write code."}, {"role": "user", "content": "A class"}]
# What the packaged model's template makes of them.
PROMPT = "# system: Write code.\n# user: A class\n# assistant:"


def greedy(max_tokens: int = 8, **fields: Any) -> dict[str, Any]:
    return {"messages": MESSAGES, "temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, **fields}


def sampled(max_tokens: int = 8, **fields: Any) -> dict[str, Any]:
    return {**greedy(max_tokens), "temperature": 1, "seed": 7, **fields}


def completion(client: Client, prompt: str, **body: Any) -> str:
    wanted = {name: value for name, value in body.items() if name != "messages"}
    return client.answer("/v1/completions", prompt=prompt, **wanted)["choices"][0]["text"]


def test_an_answer_is_the_completion_of_the_rendered_prompt(client: Client) -> None:
    answer = client.answer(PATH, model="demo", return_token_ids=True, **greedy())
    [choice] = answer["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": completion(client, PROMPT, **greedy()),
        "refusal": None,
    }
    assert (choice["finish_reason"], choice["stop_reason"], choice["logprobs"]) == ("length", None, None)
    tokenizer = client.service.llm.engine.tokenizer
    assert answer["prompt_token_ids"] == tokenizer.encode(PROMPT) and len(choice["token_ids"]) == 8
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    assert answer["usage"]["total_tokens"] == len(answer["prompt_token_ids"]) + 8


def test_a_stream_begins_with_each_role_and_adds_up_to_the_messages(client: Client) -> None:
    body = sampled(12, n=2, return_token_ids=True)
    wanted = client.answer(PATH, **body)
    events = client.events(PATH, **body, stream_options={"include_usage": True})
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    *events, end = events
    assert (end["choices"], end["usage"]) == ([], wanted["usage"])
    assert [event.get("prompt_token_ids") for event in events] == [wanted["prompt_token_ids"]] + [None] * (
        len(events) - 1
    )
    for choice in wanted["choices"]:
        first, *others = [
            chunk for event in events for chunk in event["choices"] if chunk["index"] == choice["index"]
        ]
        assert first["delta"] == {"role": "assistant", "content": ""} and first["finish_reason"] is None
        assert "".join(chunk["delta"]["content"] for chunk in others) == choice["message"]["content"]
        assert [token for chunk in others for token in chunk["token_ids"]] == choice["token_ids"]
        assert [chunk["finish_reason"] for chunk in others] == [None] * (len(others) - 1) + ["length"]


def test_logprobs_name_each_token_its_bytes_and_the_likeliest(client: Client) -> None:
    body = sampled(12, logprobs=True, top_logprobs=2, return_token_ids=True)
    [choice] = client.answer(PATH, **body)["choices"]
    content = choice["logprobs"]["content"]
    tokenizer = client.service.llm.engine.tokenizer
    assert len(content) == 12
    for token_id, entry in zip(choice["token_ids"], content, strict=True):
        assert entry["token"] == tokenizer.decode([token_id], skip_special_tokens=False)
        first, second = entry["top_logprobs"]
        assert first["logprob"] >= second["logprob"] and entry["logprob"] <= first["logprob"]
    joined = b"".join(bytes(entry["bytes"]) for entry in content)
    assert joined.decode(errors="replace") == choice["message"]["content"]
    events = client.events(PATH, **body)
    streamed = [chunk["logprobs"]["content"] for event in events[1:] for chunk in event["choices"]]
    assert [entry["token"] for entries in streamed for entry in entries] == [
        entry["token"] for entry in content
    ]
    [choice] = client.answer(PATH, **sampled(2, logprobs=True))["choices"]
    assert [entry["top_logprobs"] for entry in choice["logprobs"]["content"]] == [[], []]


def test_bytes_are_those_of_the_token_even_within_a_character(client: Client) -> None:
    from pjengine.serving.logprobs import Spelling

    tokenizer = client.service.llm.engine.tokenizer
    spelling = Spelling(tokenizer=tokenizer, is_by_id=False)
    tokens = tokenizer.encode("naïve €uro \N{SNAKE} \ufffd")
    texts = [spelling.decode(token) or "" for token in tokens]
    assert any("\ufffd" in text for text in texts)
    parts = [spelling.utf8(token, text) for token, text in zip(tokens, texts, strict=True)]
    assert b"".join(bytes(part or ()) for part in parts).decode() == "naïve €uro \N{SNAKE} \ufffd"


def test_without_a_limit_an_answer_may_fill_the_context(client: Client) -> None:
    body = greedy(0, stop_token_ids=None)
    del body["max_tokens"]
    body["messages"] = [{"role": "user", "content": "x " * 495}]
    answer = client.answer(PATH, **body)
    assert answer["usage"]["total_tokens"] == 1024
    assert answer["choices"][0]["finish_reason"] == "length"


def test_both_names_of_the_limit_count(client: Client) -> None:
    body = greedy(3)
    assert client.answer(PATH, **body, max_completion_tokens=3)["usage"]["completion_tokens"] == 3
    del body["max_tokens"]
    assert client.answer(PATH, **body, max_completion_tokens=2)["usage"]["completion_tokens"] == 2


def test_parts_of_a_message_are_lines(client: Client) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    one, other = (
        client.answer("/tokenize", messages=[{"role": "user", "content": content}])["tokens"]
        for content in (parts, "a\nb")
    )
    assert one == other


def test_a_final_message_is_continued_and_echoed(client: Client) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "class"}]
    body = greedy(4, messages=messages, continue_final_message=True, add_generation_prompt=False)
    prompt = PROMPT.removesuffix("assistant:") + "assistant: class"
    text = completion(client, prompt, **greedy(4))
    assert client.answer(PATH, **body)["choices"][0]["message"]["content"] == text
    assert client.answer(PATH, **body, echo=True)["choices"][0]["message"]["content"] == "class" + text
    events = client.events(PATH, **body, echo=True)
    assert "".join(event["choices"][0]["delta"]["content"] for event in events) == "class" + text
    assert (
        client.answer(PATH, **greedy(4), echo=True)["choices"] == client.answer(PATH, **greedy(4))["choices"]
    )


def test_a_template_comes_from_requests_only_where_they_are_trusted(client: Client, llm: Any) -> None:
    body = {"messages": MESSAGES, "chat_template": "{{ messages[1].content }}{{ mark }}"}
    for path in (PATH, "/tokenize"):
        status, error = client.error(path, **body)
        assert (status, error["param"]) == (400, "chat_template")
        assert "--trust-request-chat-template" in error["message"]
    trusting = make_client(llm, trust_request_chat_template=True, default_chat_template_kwargs={"mark": "?"})

    def text(**more: Any) -> str:
        tokens = trusting.answer("/tokenize", **body, **more)["tokens"]
        return trusting.answer("/detokenize", tokens=tokens)["prompt"]

    assert text() == "A class?"
    assert text(chat_template_kwargs={"mark": "!"}) == "A class!"
    for name in ("chat_template", "tokenize", "tools", "messages", "add_generation_prompt"):
        status, error = trusting.error("/tokenize", **body, chat_template_kwargs={name: "x"})
        assert (status, error["param"]) == (400, "chat_template_kwargs") and name in error["message"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only one message') }}",
        "{{ messages[9].content }}",
        "{% for",
        "{{ 1 // 0 }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for i in range(10**9) %}x{% endfor %}",
    ],
)
def test_a_template_that_fails_is_the_callers_mistake(llm: Any, template: str) -> None:
    trusting = make_client(llm, trust_request_chat_template=True)
    status, error = trusting.error(PATH, **greedy(2), chat_template=template)
    assert status == 400 and "the chat template does not take these messages" in error["message"]


def test_the_role_of_answers_can_be_chosen(llm: Any) -> None:
    client = make_client(llm, response_role="robot")
    assert client.answer(PATH, **greedy(1))["choices"][0]["message"]["role"] == "robot"
    assert client.events(PATH, **greedy(1))[0]["choices"][0]["delta"]["role"] == "robot"
