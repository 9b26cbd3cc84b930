"""/v1/completions: what the engine gives, in OpenAI's words."""

from typing import Any

import pytest

from tests.serving.client import Client

PATH = "/v1/completions"
PROMPT = "def fibonacci(n):\n"


def greedy(max_tokens: int = 8, **fields: Any) -> dict[str, Any]:
    return {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, **fields}


def sampled(max_tokens: int = 8, **fields: Any) -> dict[str, Any]:
    return {"temperature": 1, "seed": 7, "max_tokens": max_tokens, "ignore_eos": True, **fields}


def encode(client: Client, text: str) -> list[int]:
    return client.service.llm.engine.tokenizer.encode(text)


def decode(client: Client, tokens: list[int]) -> str:
    return client.service.llm.engine.tokenizer.decode(tokens)


def assert_close(numbers: list[Any], wanted: list[Any]) -> None:
    """Logprobs of a prompt and what follows, from steps of other sizes."""
    assert numbers[0] is wanted[0] is None
    assert numbers[1:] == pytest.approx(wanted[1:], abs=1e-4)


def test_an_answer_has_every_field(client: Client) -> None:
    answer = client.answer(PATH, model="demo", prompt=PROMPT, **greedy(return_token_ids=True))
    [choice] = answer["choices"]
    tokens = choice.pop("token_ids")
    assert (
        len(tokens) == 8
        and choice.pop("text") == decode(client, encode(client, PROMPT) + tokens)[len(PROMPT) :]
    )
    assert choice.pop("prompt_token_ids") == encode(client, PROMPT)
    assert choice == {"index": 0, "logprobs": None, "finish_reason": "length", "stop_reason": None}
    num_prompt = len(encode(client, PROMPT))
    assert answer["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": 8,
        "total_tokens": num_prompt + 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert answer["object"] == "text_completion" and answer["model"] == "demo"
    assert answer["id"].startswith("cmpl-") and isinstance(answer["created"], int)


def test_choices_of_prompt_i_begin_at_i_times_n(client: Client) -> None:
    prompts = [PROMPT, "import os\n", "class Stack:\n"]
    answer = client.answer(PATH, prompt=prompts, **sampled(n=2))
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    for index, prompt in enumerate(prompts):
        for i in range(2):
            [own] = client.answer(PATH, prompt=prompt, **sampled(seed=7 + i))["choices"]
            assert answer["choices"][2 * index + i]["text"] == own["text"]
    assert answer["usage"]["prompt_tokens"] == sum(len(encode(client, prompt)) for prompt in prompts)
    assert answer["usage"]["completion_tokens"] == 6 * 8


def test_token_prompts_are_as_good_as_text(client: Client) -> None:
    tokens = encode(client, PROMPT)
    [wanted] = client.answer(PATH, prompt=PROMPT, **greedy())["choices"]
    [one] = client.answer(PATH, prompt=tokens, **greedy())["choices"]
    both = client.answer(PATH, prompt=[tokens, tokens], **greedy())["choices"]
    assert {one["text"], *(choice["text"] for choice in both)} == {wanted["text"]}


@pytest.mark.parametrize("extra", [{}, {"logprobs": 2, "echo": True}], ids=["plain", "logprobs"])
def test_chunks_put_together_are_the_answer(client: Client, extra: dict[str, Any]) -> None:
    body = {
        "prompt": [PROMPT, "import os\n"],
        "return_token_ids": True,
        **sampled(12, n=2, stop="zzz"),
        **extra,
    }
    wanted = client.answer(PATH, **body)
    events = client.events(PATH, **body)
    assert len({(event["id"], event["created"], event["model"], event["object"]) for event in events}) == 1
    for choice in wanted["choices"]:
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert all(len(event["choices"]) == 1 and "usage" not in event for event in events)
        assert "".join(chunk["text"] for chunk in own) == choice["text"]
        assert [token for chunk in own for token in chunk["token_ids"]] == choice["token_ids"]
        assert [chunk.get("prompt_token_ids") for chunk in own] == [choice["prompt_token_ids"]] + [None] * (
            len(own) - 1
        )
        assert [chunk["finish_reason"] for chunk in own] == [None] * (len(own) - 1) + ["length"]
        if extra:
            joined = {
                name: [value for chunk in own for value in chunk["logprobs"][name]]
                for name in choice["logprobs"]
            }
            for name in ("tokens", "text_offset"):
                assert joined[name] == choice["logprobs"][name]
            assert_close(joined["token_logprobs"], choice["logprobs"]["token_logprobs"])
            assert len(joined["top_logprobs"]) == len(joined["tokens"])
        else:
            assert choice["logprobs"] is None and all(chunk["logprobs"] is None for chunk in own)


def test_a_stream_has_no_chunk_without_news(client: Client) -> None:
    text = client.answer(PATH, prompt=PROMPT, **greedy(16))["choices"][0]["text"]
    events = client.events(PATH, prompt=PROMPT, **greedy(16, stop=text[-4:] + "?"))
    assert all(event["choices"][0]["text"] for event in events)
    assert "".join(event["choices"][0]["text"] for event in events) == text


def test_usage_comes_at_the_end_or_with_every_chunk(client: Client) -> None:
    wanted = client.answer(PATH, prompt=PROMPT, **greedy())["usage"]
    last = {"include_usage": True}
    *events, end = client.events(PATH, prompt=PROMPT, **greedy(), stream_options=last)
    assert all(event["usage"] is None for event in events)
    assert (end["choices"], end["usage"]) == ([], wanted)
    *events, end = client.events(
        PATH, prompt=PROMPT, **greedy(), stream_options={**last, "continuous_usage_stats": True}
    )
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[-1] == 8 and counts[0] < 8 and end["usage"] == wanted
    assert {event["usage"]["prompt_tokens"] for event in events} == {wanted["prompt_tokens"]}


def test_logprobs_are_parallel_lists_whose_offsets_point_into_the_text(client: Client) -> None:
    [choice] = client.answer(PATH, prompt=PROMPT, **greedy(logprobs=2, echo=True))["choices"]
    logprobs, text = choice["logprobs"], choice["text"]
    num_prompt = len(encode(client, PROMPT))
    assert text.startswith(PROMPT) and {len(values) for values in logprobs.values()} == {num_prompt + 8}
    for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
        assert text[offset:].startswith(token)
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    for number, token, top in list(
        zip(logprobs["token_logprobs"], logprobs["tokens"], logprobs["top_logprobs"], strict=True)
    )[1:]:
        assert number <= 0 and top[token] == number and len(top) in (2, 3)
    for number, top in zip(
        logprobs["token_logprobs"][num_prompt:], logprobs["top_logprobs"][num_prompt:], strict=True
    ):
        assert number == max(top.values())  # greedy


def test_no_tokens_with_echo_scores_the_prompt(client: Client) -> None:
    prompts = [PROMPT, "import os\n"]
    body = {"prompt": prompts, "echo": True, "logprobs": 2, "temperature": 0}
    longer = client.answer(PATH, **{**body, "max_tokens": 1})["choices"]
    answer = client.answer(PATH, **body, max_tokens=0)
    for choice, prompt, other in zip(answer["choices"], prompts, longer, strict=True):
        num_prompt = len(encode(client, prompt))
        assert (choice["text"], choice["finish_reason"]) == (prompt, "length")
        assert_close(choice["logprobs"]["token_logprobs"], other["logprobs"]["token_logprobs"][:num_prompt])
    assert answer["usage"]["completion_tokens"] == 0
    [event] = client.events(PATH, prompt=PROMPT, echo=True, max_tokens=0)
    assert event["choices"][0]["text"] == PROMPT


def test_prompt_logprobs_are_by_token_id(client: Client) -> None:
    tokens = encode(client, PROMPT)
    [choice] = client.answer(PATH, prompt=PROMPT, **greedy(1, prompt_logprobs=2))["choices"]
    first, *others = choice["prompt_logprobs"]
    assert first is None and len(others) == len(tokens) - 1
    for token, position in zip(tokens[1:], others, strict=True):
        own = position[str(token)]
        assert own.keys() == {"logprob", "rank", "decoded_token"}
        assert own["decoded_token"] == decode(client, [token]) and len(position) in (2, 3)
    assert "prompt_logprobs" not in client.answer(PATH, prompt=PROMPT, **greedy(1))["choices"][0]


def test_tokens_of_logprobs_are_written_as_ids_if_wanted(client: Client) -> None:
    body = greedy(2, logprobs=2, return_tokens_as_token_ids=True, return_token_ids=True)
    [choice] = client.answer(PATH, prompt=PROMPT, **body)["choices"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
    assert all(name.startswith("token_id:") for top in choice["logprobs"]["top_logprobs"] for name in top)


def test_stop_strings_and_ids_end_the_text_and_are_named(client: Client) -> None:
    whole = client.answer(PATH, prompt=PROMPT, **greedy(return_token_ids=True))["choices"][0]
    stop = whole["text"][4:7]
    [choice] = client.answer(PATH, prompt=PROMPT, **greedy(stop=["zzz", stop]))["choices"]
    end = whole["text"].index(stop)
    assert (choice["text"], choice["finish_reason"]) == (whole["text"][:end], "stop")
    assert choice["stop_reason"] == stop
    [kept] = client.answer(PATH, prompt=PROMPT, **greedy(stop=stop, include_stop_str_in_output=True))[
        "choices"
    ]
    assert kept["text"] == whole["text"][: end + len(stop)]
    token = whole["token_ids"][3]
    [choice] = client.answer(PATH, prompt=PROMPT, **greedy(stop_token_ids=[token]))["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", token)


def test_logit_bias_is_by_token_id_in_a_string(client: Client) -> None:
    [token, *_] = encode(client, "class")
    body = greedy(3, logit_bias={str(token): 100}, return_token_ids=True)
    assert client.answer(PATH, prompt=PROMPT, **body)["choices"][0]["token_ids"] == [token] * 3
    for name in ("x", "-1", "1.5", "", "9" * 30):
        status, error = client.error(PATH, prompt=PROMPT, logit_bias={name: 1})
        assert (status, error["param"]) == (400, "logit_bias")


def test_cached_pages_are_shared_under_one_salt_only(client: Client) -> None:
    prompt = "import os\nimport sys\n" * 12

    def num_cached(salt: str) -> int:
        usage = client.answer(PATH, prompt=prompt, cache_salt=salt, **greedy(1))["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert [num_cached("a") > 0, num_cached("a") > 0, num_cached("b") > 0] == [False, True, False]


def test_special_tokens_of_a_prompt_may_be_left_out(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = client.service.llm.engine.tokenizer.hf
    encode = type(hf).encode  # of a tokenizer that begins texts with token 0

    def encode_with_first(self: Any, text: str, add_special_tokens: bool = True) -> list[int]:
        return [0] * add_special_tokens + encode(self, text, add_special_tokens=False)

    monkeypatch.setattr(type(hf), "encode", encode_with_first)
    body = greedy(1, return_token_ids=True)

    def prompt(**more: Any) -> list[int]:
        return client.answer(PATH, prompt=PROMPT, **body, **more)["choices"][0]["prompt_token_ids"]

    assert prompt() == prompt(add_special_tokens=True) == [0, *prompt(add_special_tokens=False)]


def test_a_prompt_may_be_cut_at_its_left(client: Client) -> None:
    tokens = encode(client, PROMPT)
    body = greedy(2, truncate_prompt_tokens=3, truncation_side="left", echo=True, return_token_ids=True)
    [choice] = client.answer(PATH, prompt=PROMPT, **body)["choices"]
    assert choice["prompt_token_ids"] == tokens[-3:] and choice["text"].startswith(
        decode(client, tokens[-3:])
    )


def test_an_answer_is_named_by_its_client(client: Client) -> None:
    def name(headers: dict[str, str], **body: Any) -> str:
        body = {"prompt": PROMPT, **greedy(1), **body}
        response = client.send("POST", PATH, json=body, headers=headers)
        return response.json().get("id") or response.json()["error"]["param"]

    assert name({"X-Request-Id": "mine"}) == "cmpl-mine"
    assert name({}, request_id="body") == "cmpl-body"
    assert name({"X-Request-Id": "mine"}, request_id="body") == "cmpl-mine"
    assert name({}) != name({})
    assert name({"X-Request-Id": "two words"}) == "X-Request-Id"
    assert name({}, request_id="line\nbreak") == "request_id"
