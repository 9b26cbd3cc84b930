"""Requests that schemathesis makes out of the server's own OpenAPI document: 2,500 of them, good and bad."""

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation.modes import GenerationMode
from schemathesis.specs.openapi import checks

from tests.serving.process import RANDOM, Server, start_server

TIMEOUT_S = 60  # for an answer; the first that needs a program waits until it is compiled
# A program with more room than a request needs is good enough here: none is made for the request alone.
SERVE = """
import sys
from pjengine import runner
from pjengine.serving.cli import main

runner.PATIENCE = sys.maxsize
sys.exit(main(["serve", "demo", "--port=0", *sys.argv[1:]]))
"""
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]


def numbers(least: float, most: float) -> Any:
    return {"type": "number", "minimum": least, "maximum": most}


def one_of(*values: int) -> Any:
    """A schema of whole numbers would stand for 1.0 as well, which the server refuses."""
    return {"enum": values}


def lists(item: Any, most: int, least: int = 0) -> Any:
    return {"type": "array", "items": item, "minItems": least, "maxItems": most}


TOKEN, COUNT = one_of(0, 5, 50, 500, 4095), one_of(1, 2, 3)
NONE = {"type": "null"}
# Needs the largest program that the requests below can need, so that few others are compiled.
LARGEST: dict[str, Any] = {
    "logit_bias": {"5": 1, "50": -1, "500": 0.5, "4000": 100},
    "allowed_token_ids": [5, 50, 500, 4000],
    "bad_words": ["self", "import os"],
    "logprobs": 5,
    "frequency_penalty": 1,
    "n": 3,
    "echo": True,
    "structured_outputs": {"regex": "(?s:.)*"},
}
# Schemas say types. Within these ranges, those of the model and of its parameters, most requests run.
RANGES: dict[str, Any] = {
    "model": {"const": "demo"},
    "prompt": {"type": "string", "minLength": 1, "maxLength": 12},
    "n": COUNT,
    "max_tokens": COUNT,
    "min_tokens": {"const": 1},
    "temperature": numbers(0.1, 2),
    "top_p": numbers(0.1, 1),
    "top_k": one_of(-1, 1, 100),
    "min_p": numbers(0, 1),
    "seed": one_of(0, 7, 2**63 - 1),
    "presence_penalty": numbers(-2, 2),
    "frequency_penalty": numbers(-2, 2),
    "repetition_penalty": numbers(0.1, 2),
    "stop": lists({"type": "string", "minLength": 1}, 4),
    "stop_token_ids": lists(TOKEN, 4),
    "allowed_token_ids": lists(TOKEN, 4, 4),
    "logit_bias": {
        "type": "object",
        "properties": {token: numbers(-100, 100) for token in LARGEST["logit_bias"]},
        "required": list(LARGEST["logit_bias"]),
        "additionalProperties": False,
    },
    "bad_words": {"const": LARGEST["bad_words"]},
    "truncate_prompt_tokens": COUNT,
    "prompt_logprobs": NONE,
    **dict.fromkeys(
        ("priority", "best_of", "suffix", "chat_template", "max_completion_tokens", "stream_options"), NONE
    ),
    **dict.fromkeys(("use_beam_search", "length_penalty", "early_stopping"), NONE),
}
OWN_RANGES: dict[str, Any] = {
    "CompletionRequest": {
        "prompt": {"anyOf": [RANGES["prompt"], lists(RANGES["prompt"], 3, 1), lists(TOKEN, 8, 1)]},
        "logprobs": {"const": LARGEST["logprobs"]},
        "structured_outputs": {"enum": [{"regex": "(?s:.)*"}, {"choice": ["self", "import"]}]},
        "response_format": NONE,
    },
    "ChatRequest": {
        "response_format": {"enum": [{"type": "text"}, {"type": "json_object"}]},
        **dict.fromkeys(("top_logprobs", "structured_outputs", "tools", "tool_choice"), NONE),
    },
    "Message": {
        "role": {"enum": ["system", "user", "assistant"]},
        "content": {"type": "string", "maxLength": 8},
        **dict.fromkeys(("tool_calls", "tool_call_id", "reasoning", "reasoning_content"), NONE),
    },
}


def narrowed(document: Any) -> Any:
    """The document, with ranges for what the bodies of requests that generate hold."""
    document = copy.deepcopy(document)
    for name in ("CompletionRequest", "ChatRequest", "GenerateRequest", "Message"):
        properties = document["components"]["schemas"][name]["properties"]
        ranges = RANGES | OWN_RANGES.get(name, {})
        properties |= {field: values for field, values in ranges.items() if field in properties}
    document["components"]["schemas"]["Message"]["required"] = ["role", "content"]
    return document


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = ("--max-model-len=128", "--disable-uvicorn-access-log", *RANDOM)
    with start_server(tmp_path_factory.mktemp("server"), *arguments, code=SERVE) as server:
        server.url  # noqa: B018 - waits
        yield server


class Fuzz:
    """Sends what is generated, and counts it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.session = requests.Session()
        self.answers: Counter[tuple[str, int]] = Counter()  # by operation and status

    def send(self, operation: Any, mode: GenerationMode, num_requests: int) -> None:
        @settings(
            max_examples=num_requests,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],  # what fails is not made smaller: that could take minutes
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def send(case: Any) -> None:
            response = case.call(base_url=self.url, session=self.session, timeout=TIMEOUT_S)
            self.answers[operation.label, response.status_code] += 1
            case.validate_response(response, checks=CHECKS)

        send()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_request_that_the_document_allows_or_forbids_breaks_the_server(server: Server) -> None:
    positive, negative = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
    document = requests.get(f"{server.url}/openapi.json", timeout=TIMEOUT_S).json()
    fuzz = Fuzz(server.url)
    largest = {"prompt": "a", "max_tokens": 3, **LARGEST}
    fuzz.session.post(f"{server.url}/v1/completions", json=largest, timeout=TIMEOUT_S).raise_for_status()
    for operation in map(as_operation, schemathesis.openapi.from_dict(document).get_all_operations()):
        has_body = any(True for _ in operation.body)
        has_query = any(True for _ in operation.query)
        fuzz.send(operation, positive, 200 if has_body else 75)  # fewer, where there are no more
        if has_body or has_query:  # any path and header is good
            # Conversations are slow to make wrong.
            is_nested = operation.path in ("/v1/chat/completions", "/tokenize")
            fuzz.send(operation, negative, 50 if has_query else 100 if is_nested else 275)
    for operation in map(
        as_operation, schemathesis.openapi.from_dict(narrowed(document)).get_all_operations()
    ):
        if operation.path in ("/v1/completions", "/v1/chat/completions", "/generate"):
            fuzz.send(operation, positive, 125)
            assert fuzz.answers[operation.label, 200] > 100, fuzz.answers
    assert fuzz.answers.total() >= 2500, fuzz.answers
    operations = {f"{method.upper()} {path}" for path, own in document["paths"].items() for method in own}
    assert {label for label, _ in fuzz.answers} == operations
    answer = fuzz.session.post(
        f"{server.url}/v1/completions", json={"prompt": "import os\n", "max_tokens": 4}, timeout=TIMEOUT_S
    ).json()
    assert answer["usage"]["completion_tokens"] == 4
    assert fuzz.session.get(f"{server.url}/load", timeout=TIMEOUT_S).json() == {"server_load": 0}
    assert "Traceback" not in server.log and "ERROR" not in server.log


def as_operation(result: Any) -> Any:
    return result.ok()
