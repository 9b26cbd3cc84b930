"""Beam search over HTTP."""

from typing import Any

import pytest

from tests.serving.client import Client

BEAMS: dict[str, Any] = {"use_beam_search": True, "temperature": 0, "max_tokens": 5, "ignore_eos": True}
PROMPT = "def fibonacci(n):\n"


def test_the_best_beams_are_the_choices(client: Client) -> None:
    every = client.answer("/v1/completions", prompt=PROMPT, n=4, **BEAMS)
    texts = [choice["text"] for choice in every["choices"]]
    assert len(set(texts)) == 4 and every["usage"]["completion_tokens"] == 20
    assert [choice["index"] for choice in every["choices"]] == [0, 1, 2, 3]
    best = client.answer("/v1/completions", prompt=[PROMPT], n=2, best_of=4, early_stopping="never", **BEAMS)
    assert [choice["text"] for choice in best["choices"]] == texts[:2]
    assert client.answer("/generate", prompt=PROMPT, n=2, best_of=4, **BEAMS) == {
        "text": [PROMPT + text for text in texts[:2]]
    }
    client.assert_idle()


def test_conversations_have_beams_too(client: Client) -> None:
    messages = [{"role": "user", "content": "What is it like outside?"}]
    fields = {**BEAMS, "temperature": None, "length_penalty": 0.5}
    choices = client.answer("/v1/chat/completions", messages=messages, n=2, **fields)["choices"]
    assert len({choice["message"]["content"] for choice in choices}) == 2


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"n": 5}, "n", "n=5 beams run at once, and max_num_seqs=4"),
        ({"best_of": 5}, "best_of", "best_of=5 beams run at once"),
        (
            {"response_format": {"type": "json_object"}},
            "response_format",
            "response_format must be None with use_beam_search, whose beams are chosen by their logprobs "
            "alone: leave it out; got json_object",
        ),
        ({"n": 3, "best_of": 2}, "best_of", "at least n=3"),
        ({"stop": "a"}, "stop", "stop must be None with use_beam_search"),
        ({"stream": True}, "use_beam_search", "not streamed"),
        ({"early_stopping": "soon"}, "early_stopping", "early_stopping"),
        ({"max_tokens": 0, "echo": True}, "best_of", "asks for none"),
    ],
)
def test_what_beams_do_not_do_is_refused(
    client: Client, changes: dict[str, Any], param: str, message: str
) -> None:
    status, error = client.error("/v1/completions", prompt=PROMPT, **{**BEAMS, **changes})
    assert (status, error["param"]) == (400, param) and message in error["message"]


def test_beams_are_held_to_no_schema_of_tools(client: Client) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    messages = [{"role": "user", "content": "a"}]
    fields = {"messages": messages, "tools": [tool], "tool_choice": "required", **BEAMS}
    status, error = client.error("/v1/chat/completions", **fields)
    assert (status, error["param"]) == (400, "use_beam_search")
