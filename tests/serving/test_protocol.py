"""What a body may hold: every field of it counts, or is refused by name."""

import dataclasses
import json
import time
from itertools import pairwise
from typing import Any

import pytest

from tests.serving.client import Client, error_of

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "a", "max_tokens": 1},
    CHAT: {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/generate": {"prompt": "a", "max_tokens": 1},
}

# Route, what is laid over its body, the field that is named, a part of the message.
MISTAKES: dict[str, tuple[str, dict[str, Any], str | None, str]] = {
    "unknown": (COMPLETIONS, {"temprature": 1}, "temprature", "did you mean 'temperature'?"),
    "unlike any": (CHAT, {"quxzzy": 1}, "quxzzy", "there is no field 'quxzzy'"),
    "unknown in options": (
        COMPLETIONS,
        {"stream": True, "stream_options": {"include_usag": True}},
        "include_usag",
        "did you mean 'include_usage'?",
    ),
    "no prompt": (COMPLETIONS, {"prompt": None}, "prompt", "prompt: Field required"),
    "empty prompt": (COMPLETIONS, {"prompt": ""}, "prompt", "the prompt is empty"),
    "empty list": (COMPLETIONS, {"prompt": []}, "prompt", "at least one is needed"),
    "empty tokens": (COMPLETIONS, {"prompt": [[1], []]}, "prompt", "the prompt is empty"),
    "mixed prompts": (COMPLETIONS, {"prompt": ["a", 1]}, "prompt", "prompt.list[str].1"),
    "too long": (COMPLETIONS, {"prompt": [5] * 1024}, "prompt", "1024 tokens; with max_model_len=1024"),
    "far too long": (COMPLETIONS, {"prompt": "a" * 10**6}, "prompt", "the prompt has 1000000 characters"),
    "far too long, plain": (
        COMPLETIONS,
        {"prompt": "a" * 10**6, "add_special_tokens": False},
        "prompt",
        "the prompt has 1000000 characters",
    ),
    "far too long to generate": ("/generate", {"prompt": "a" * 10**6}, "prompt", "1000000 characters"),
    "far too long a talk": (
        CHAT,
        {"messages": [{"role": "user", "content": "a" * 10**6}]},
        "messages",
        "tokens of at most",
    ),
    "no such token": (COMPLETIONS, {"prompt": [5, 4096]}, None, "token id 4096 is out of the vocabulary"),
    "surrogate": (COMPLETIONS, {"prompt": "\ud800"}, None, "lone surrogate"),
    "too many": (
        COMPLETIONS,
        {"prompt": ["a"] * 200, "n": 100},
        "n",
        "20000, and this server takes at most 128",
    ),
    "too many of one": (COMPLETIONS, {"n": 129}, "n", "prompts x n is 129"),
    "too many to choose from": (COMPLETIONS, {"n": 1, "best_of": 129}, "best_of", "x best_of is 129"),
    "text for number": (COMPLETIONS, {"temperature": "1"}, "temperature", "valid number"),
    "flag for number": (COMPLETIONS, {"max_tokens": True}, "max_tokens", "valid integer"),
    "fraction": (COMPLETIONS, {"n": 1.5}, "n", "valid integer"),
    "number for flag": (CHAT, {"stream": 1}, "stream", "valid boolean"),
    "temperature": (CHAT, {"temperature": 2.5}, "temperature", "must be in [0, 2], got 2.5"),
    "top_p": (COMPLETIONS, {"top_p": 0}, "top_p", "must be in (0, 1]"),
    "n": (COMPLETIONS, {"n": 0}, "n", "n must be in [1, 16384]"),
    "greedy n": (COMPLETIONS, {"n": 2, "temperature": 0}, "n", "n=2 greedy continuations"),
    "max_tokens": (CHAT, {"max_tokens": 0}, "max_tokens", "at least 1"),
    "nothing to show": (COMPLETIONS, {"max_tokens": 0}, "max_tokens", "without echo"),
    "empty stop": (COMPLETIONS, {"stop": ["a", ""]}, "stop", "free of empty strings"),
    "bias": (COMPLETIONS, {"logit_bias": {"5000": 1}}, "logit_bias", "within the vocabulary"),
    "logprobs": (COMPLETIONS, {"logprobs": 21}, "logprobs", "at most max_logprobs=20"),
    "top_logprobs": (
        CHAT,
        {"logprobs": True, "top_logprobs": 21},
        "top_logprobs",
        "top_logprobs must be at most max_logprobs=20, got 21: ask for fewer",
    ),
    "long talk": (
        CHAT,
        {"messages": [{"role": "user", "content": "a b " * 2000}]},
        "messages",
        "with max_model_len=1024",
    ),
    "many prompts": (COMPLETIONS, {"prompt": [[1]] * 300_000}, "prompt", "at most 4096 items"),
    "many texts": (COMPLETIONS, {"prompt": ["a"] * 300_000}, "prompt", "at most 4096 items"),
    "many messages": (
        CHAT,
        {"messages": [{"role": "user", "content": "a"}] * 70_000},
        "messages",
        "at most 65536, got 70000",
    ),
    "many parts": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 35_000}] * 2},
        "messages",
        "at most 65536, got 70002",
    ),
    "many tools": (
        CHAT,
        {"tools": [{"type": "function", "function": {"name": "f"}}] * 2000},
        "tools",
        "at most 1024 items",
    ),
    "many bad words": (COMPLETIONS, {"bad_words": ["a"] * 900_000}, "bad_words", "at most 4096 items"),
    "many stops": (CHAT, {"stop": ["a"] * 5000}, "stop", "at most 4096 items"),
    "many stop tokens": ("/generate", {"stop_token_ids": [1] * 5000}, "stop_token_ids", "at most 4096"),
    "many allowed": (
        COMPLETIONS,
        {"allowed_token_ids": [1] * 600_000},
        "allowed_token_ids",
        "at most 524288",
    ),
    "top_logprobs alone": (CHAT, {"top_logprobs": 2}, "top_logprobs", "needs logprobs=true"),
    "two limits": (CHAT, {"max_completion_tokens": 2}, "max_tokens", "give one"),
    "streamed prompt": (CHAT, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "not streamed"),
    "options": (CHAT, {"stream_options": {"include_usage": True}}, "stream_options", "needs stream=true"),
    "usage": (
        CHAT,
        {"stream": True, "stream_options": {"continuous_usage_stats": True}},
        "stream_options",
        "needs include_usage",
    ),
    "priority": (COMPLETIONS, {"priority": 1}, "priority", "scheduling_policy='priority'"),
    "truncation side": (COMPLETIONS, {"truncation_side": "right"}, "truncation_side", "should be 'left'"),
    "no messages": (CHAT, {"messages": []}, "messages", "at least 1 item"),
    "no role": (CHAT, {"messages": [{"content": "a"}]}, "messages", "messages.0.role: Field required"),
    "role": (CHAT, {"messages": [{"role": "robot", "content": "a"}]}, "messages", "messages.0.role"),
    "no content": (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages", "needs content"),
    "picture": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "image_url",
        "only text is supported",
    ),
    "two ends": (
        CHAT,
        {"continue_final_message": True},
        "continue_final_message",
        "add_generation_prompt=false",
    ),
    "nothing to see": ("/generate", {"logprobs": 1}, "logprobs", "there is no field 'logprobs'"),
    "beams that are drawn": (
        *("/generate", {"use_beam_search": True, "temperature": 0.5}, "temperature"),
        "temperature must be 0 with use_beam_search",
    ),
    "streamed beams": (
        *(COMPLETIONS, {"use_beam_search": True, "n": 2, "stream": True}, "use_beam_search"),
        "not streamed",
    ),
    "a length penalty of nothing": (COMPLETIONS, {"length_penalty": 2}, "length_penalty", "is for beams"),
}


@pytest.mark.parametrize(("path", "changes", "param", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named(
    client: Client, path: str, changes: dict[str, Any], param: str | None, message: str
) -> None:
    body = json.dumps({**BODIES[path], **changes})  # as it is: surrogates are written \ud800
    response = client.send("POST", path, content=body, headers={"content-type": "application/json"})
    status, error = error_of(response)
    assert (status, error["type"], error["param"]) == (400, "BadRequestError", param)
    assert message in error["message"]


def test_fields_that_are_not_supported_are_refused_by_name(client: Client) -> None:
    from pjengine.serving.refusals import REFUSED_FIELDS, REFUSED_OUTSIDE_CHAT

    for path, body in BODIES.items():
        for name, refusal in (REFUSED_FIELDS if path == CHAT else REFUSED_OUTSIDE_CHAT).items():
            status, error = client.error(path, **body, **{name: {"something": "else"}})
            assert (status, error["param"]) == (400, name) and refusal.reason in error["message"]


def test_a_refused_field_may_ask_for_nothing(client: Client) -> None:
    from pjengine.serving.refusals import REFUSED_FIELDS, REFUSED_OUTSIDE_CHAT

    clients = {"service_tier": "auto", "metadata": {}, "store": False}  # what some send by themselves
    for path, body in BODIES.items():
        client.answer(path, **body, **clients)
        refused = REFUSED_FIELDS if path == CHAT else REFUSED_OUTSIDE_CHAT
        client.answer(path, **body, **dict.fromkeys(REFUSED_OUTSIDE_CHAT))
        client.answer(path, **body, **{name: refusal.neutral for name, refusal in refused.items()})
    reply: dict[str, Any] = {
        "role": "assistant",
        "content": "b",
        "refusal": None,
        "tool_calls": None,
        "annotations": [],
    }
    client.answer(CHAT, messages=[*BODIES[CHAT]["messages"], reply], max_tokens=1)


def test_null_is_the_default(client: Client) -> None:
    from pjengine.serving.protocol import ChatRequest, CompletionRequest, GenerateRequest

    for path, model in (
        (COMPLETIONS, CompletionRequest),
        (CHAT, ChatRequest),
        ("/generate", GenerateRequest),
    ):
        client.answer(path, **{**dict.fromkeys(model.model_fields), **BODIES[path]})


def test_every_sampling_parameter_can_be_sent_but_those_of_the_python_api() -> None:
    from pjengine import SamplingParams
    from pjengine.serving.protocol import ChatRequest, CompletionRequest

    python_only = {
        "output_kind",  # follows from `stream`
        "detokenize",
        "flat_logprobs",
        "logprob_token_ids",
        *("logits_processors", "activation_edits"),  # functions do not travel
        "skip_reading_prefix_cache",  # `cache_salt` is the server's way
        "hidden_states",  # those that stand for a text are at /v1/embeddings
    }
    wanted = {field.name for field in dataclasses.fields(SamplingParams)} - python_only
    assert wanted <= CompletionRequest.model_fields.keys() and wanted <= ChatRequest.model_fields.keys()
    assert not python_only & CompletionRequest.model_fields.keys()


def test_every_field_of_sampling_reaches_the_engine() -> None:
    from pjengine import SamplingParams, StructuredOutputsParams
    from pjengine.serving.protocol import CompletionRequest

    values: dict[str, Any] = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.1,
        "seed": 4,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "stop": ["x"],
        "stop_token_ids": [7],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "min_tokens": 1,
        "allowed_token_ids": [1, 2],
        "bad_words": ["y"],
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "truncate_prompt_tokens": 5,
        "prompt_logprobs": 1,
    }
    form: Any = {"regex": "a+"}
    body = CompletionRequest(prompt="a", logit_bias={"3": 1.5}, structured_outputs=form, **values)
    params = body.sampling_params(SamplingParams(), max_tokens=9, logprobs=2)
    assert {name: getattr(params, name) for name in values} == values
    assert (params.logit_bias, params.max_tokens, params.logprobs) == ({3: 1.5}, 9, 2)
    assert params.structured_outputs == StructuredOutputsParams(regex="a+")
    beams: dict[str, Any] = {
        "use_beam_search": True,
        "best_of": 4,
        "length_penalty": 2.0,
        "early_stopping": "never",
    }
    params = CompletionRequest(prompt="a", **beams).sampling_params(SamplingParams())
    assert {name: getattr(params, name) for name in beams} == beams and params.temperature == 0
    own = CompletionRequest.model_fields.keys() & {field.name for field in dataclasses.fields(params)}
    assert own == values.keys() | beams.keys() | {
        "logit_bias",
        "max_tokens",
        "logprobs",
        "structured_outputs",
    }


def test_what_is_left_out_is_the_models_own_default(client: Client) -> None:
    from pjengine.serving.protocol import CompletionRequest

    params = CompletionRequest(prompt="a").sampling_params(client.service.default_params)
    assert params.temperature == 0.6  # of the packaged model's generation_config.json


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"', "not valid JSON"),
        (b"", "must be a JSON object"),
        (b"[1]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b"\xff", "body"),
        (b"[" * 100_000, "body"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "body"),
    ],
    ids=["cut", "empty", "list", "null", "no UTF-8", "deep", "long number"],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/generate", "/tokenize"])
def test_a_body_that_is_no_object_is_refused(client: Client, path: str, content: bytes, message: str) -> None:
    response = client.send("POST", path, content=content, headers={"content-type": "application/json"})
    status, error = error_of(response)
    assert status == 400 and message in error["message"]


def test_json_comes_under_its_content_type_but_for_generate(client: Client) -> None:
    form = {"content-type": "application/x-www-form-urlencoded"}
    response = client.send("POST", COMPLETIONS, content=json.dumps(BODIES[COMPLETIONS]), headers=form)
    status, error = error_of(response)
    assert status == 400 and "Content-Type: application/json" in error["message"]
    response = client.send("POST", "/generate", content=json.dumps(BODIES["/generate"]), headers=form)
    assert response.status_code == 200


def test_an_unknown_model_is_not_found(client: Client) -> None:
    paths: dict[str, dict[str, Any]] = {
        COMPLETIONS: BODIES[COMPLETIONS],
        CHAT: BODIES[CHAT],
        "/tokenize": {"prompt": "a"},
        "/detokenize": {"tokens": [1]},
    }
    for path, body in paths.items():
        status, error = client.error(path, **body, model="gpt-4")
        assert (status, error["type"], error["param"]) == (404, "NotFoundError", "model")
        assert error["message"] == "The model `gpt-4` does not exist."


def test_other_paths_and_methods_have_errors_of_the_same_shape(client: Client) -> None:
    assert error_of(client.get("/nothing"))[0] == 404
    response = client.get(COMPLETIONS)
    assert error_of(response)[0] == 405 and response.headers["allow"] == "POST"


def test_generate_gives_prompt_and_text(client: Client) -> None:
    body = {"prompt": "import os\n", "max_tokens": 6, "temperature": 1, "seed": 3, "n": 2}
    wanted = [choice["text"] for choice in client.answer(COMPLETIONS, **body)["choices"]]
    assert client.answer("/generate", **body) == {"text": ["import os\n" + text for text in wanted]}
    response = client.post("/generate", **body, stream=True)
    *parts, rest = response.content.split(b"\0")
    objects = [json.loads(part)["text"] for part in parts]
    assert rest == b"" and objects[-1] == ["import os\n" + text for text in wanted] and len(objects) > 1
    for before, after in pairwise(objects):
        assert all(new.startswith(old) for old, new in zip(before, after, strict=True))


def test_a_body_of_a_million_items_is_refused_before_they_are_read() -> None:
    from pydantic import ValidationError

    from pjengine.serving.errors import ApiError
    from pjengine.serving.protocol import ChatRequest, CompletionRequest

    bodies: tuple[tuple[Any, dict[str, Any]], ...] = (
        (CompletionRequest, {"prompt": [[1]] * 10**6}),
        (CompletionRequest, {"prompt": ["a"] * 10**6}),
        (ChatRequest, {**BODIES[CHAT], "messages": [{"role": "user", "content": "a"}] * 10**6}),
        (ChatRequest, {**BODIES[CHAT], "tools": [{"type": "function", "function": {"name": "f"}}] * 10**6}),
    )
    for model, body in bodies:
        begun = time.process_time()
        with pytest.raises((ValidationError, ApiError)):
            model.model_validate(body)
        assert time.process_time() - begun < 0.5, model  # to read them all takes seconds


def test_a_prompt_far_too_long_is_taken_to_be_cut_and_not_to_be_counted(client: Client) -> None:
    prompt = "a b " * 100_000
    for fields in ({}, {"add_special_tokens": False}):
        client.answer(COMPLETIONS, prompt=prompt, max_tokens=1, truncate_prompt_tokens=8, **fields)
    status, error = client.error("/tokenize", prompt=prompt)
    assert (status, error["param"]) == (400, "prompt") and "400000 characters" in error["message"]


def test_the_document_describes_each_route_and_no_status_422(client: Client) -> None:
    document = client.get("/openapi.json").json()
    assert {COMPLETIONS, CHAT, "/generate", "/tokenize", "/metrics", "/health"} <= document["paths"].keys()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"] and "default" in operation["responses"], path
    names = [op["operationId"] for operations in document["paths"].values() for op in operations.values()]
    assert len(names) == len(set(names))
    schema = document["components"]["schemas"]["CompletionRequest"]
    assert schema["additionalProperties"] is False and "logit_bias" in schema["properties"]
    assert "swagger" in client.get("/docs").text
