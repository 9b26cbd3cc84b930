"""best_of: the likeliest of more continuations than are shown."""

from typing import Any

import pytest

from tests.serving.client import Client

PATH = "/v1/completions"
SAMPLED: dict[str, Any] = {
    "prompt": "def fibonacci(n):\n",
    "temperature": 1,
    "seed": 7,
    "max_tokens": 6,
    "ignore_eos": True,
}


def mean_logprob(choice: dict[str, Any]) -> float:
    values = choice["logprobs"]["token_logprobs"]
    return sum(values) / len(values)


def test_the_likeliest_of_all_come_first(client: Client) -> None:
    everything = client.answer(PATH, **SAMPLED, n=5, logprobs=0)
    ranked = sorted(everything["choices"], key=mean_logprob, reverse=True)
    assert len({choice["text"] for choice in ranked}) == 5
    answer = client.answer(PATH, **SAMPLED, n=2, best_of=5, logprobs=0)
    assert [choice["text"] for choice in answer["choices"]] == [choice["text"] for choice in ranked[:2]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"] == everything["usage"] and answer["usage"]["completion_tokens"] == 30


def test_length_counts_by_the_token(client: Client) -> None:
    """A short continuation has a higher sum, and here not the higher mean."""
    from pjengine.outputs import CompletionOutput
    from pjengine.serving.ranking import likeliest, mean_logprob, summed_logprob

    def continuation(index: int, cumulative: float, length: int) -> CompletionOutput:
        return CompletionOutput(
            index=index, text="", token_ids=[1] * length, cumulative_logprob=cumulative, finish_reason="stop"
        )

    short, long = continuation(0, -4.0, 2), continuation(1, -6.0, 6)
    assert likeliest([short, long], 1, mean_logprob) == [long] and long.index == 0
    assert likeliest([short, long], 1, summed_logprob) == [short]


def test_logprobs_that_nobody_asked_for_are_not_shown(client: Client) -> None:
    [choice] = client.answer(PATH, **SAMPLED, best_of=5)["choices"]
    [shown] = client.answer(PATH, **SAMPLED, best_of=5, logprobs=1)["choices"]
    assert choice["logprobs"] is None and shown["logprobs"] is not None
    assert choice["text"] == shown["text"]


def test_each_prompt_has_its_own_best(client: Client) -> None:
    prompts = ["import os\n", "class Stack:\n"]
    both = client.answer(PATH, **{**SAMPLED, "prompt": prompts}, n=2, best_of=3)
    each = [client.answer(PATH, **{**SAMPLED, "prompt": prompt}, n=2, best_of=3) for prompt in prompts]
    wanted = [choice["text"] for answer in each for choice in answer["choices"]]
    assert [choice["text"] for choice in both["choices"]] == wanted
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]


def test_generate_ranks_by_the_sum(client: Client) -> None:
    """As Python does; here one continuation is short, and the likeliest only by its sum."""
    fields = {**SAMPLED, "stop": "by"}
    choices = client.answer(PATH, **fields, n=4, logprobs=0)["choices"]
    ranked = sorted(choices, key=lambda choice: -sum(choice["logprobs"]["token_logprobs"]))
    assert ranked[0] is not max(choices, key=mean_logprob)
    wanted = [SAMPLED["prompt"] + choice["text"] for choice in ranked[:2]]
    assert client.answer("/generate", **fields, n=2, best_of=4) == {"text": wanted}


def test_best_of_n_is_n(client: Client) -> None:
    plain = client.answer(PATH, **SAMPLED, n=2)["choices"]
    assert client.answer(PATH, **SAMPLED, n=2, best_of=2)["choices"] == plain
    streamed = client.events(PATH, **SAMPLED, n=2, best_of=2)
    assert {choice["index"] for event in streamed for choice in event["choices"]} == {0, 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 3, "best_of": 2}, "at least n=3"),
        ({"best_of": 0}, "at least n=1"),
        ({"best_of": 16385}, "at most 16384"),
        ({"best_of": 2, "stream": True}, "not streamed"),
        ({"best_of": 2, "temperature": 0}, "raise temperature"),
        ({"best_of": 2, "max_tokens": 0, "echo": True}, "asks for none"),
    ],
)
def test_what_cannot_be_chosen_from_is_refused(client: Client, changes: dict[str, Any], message: str) -> None:
    status, error = client.error(PATH, **{**SAMPLED, **changes})
    assert (status, error["param"]) == (400, "best_of") and message in error["message"]


def test_chat_has_no_best(client: Client) -> None:
    messages = [{"role": "user", "content": "a"}]
    status, error = client.error("/v1/chat/completions", messages=messages, best_of=2)
    assert (status, error["param"]) == (400, "best_of") and "not supported here" in error["message"]
