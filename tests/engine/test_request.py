from typing import Any

import pytest

from pjengine.request import Request
from pjengine.sampling_params import MIN_TEMPERATURE, SamplingParams

BAD_VALUES = [
    ("temperature", -0.1, ValueError),
    ("temperature", 2.1, ValueError),
    ("temperature", float("nan"), ValueError),
    ("temperature", "hot", TypeError),
    ("top_p", 0.0, ValueError),
    ("top_p", 1.1, ValueError),
    ("top_k", -2, ValueError),
    ("top_k", 1.5, TypeError),
    ("top_k", True, TypeError),
    ("min_p", -0.1, ValueError),
    ("min_p", 1.1, ValueError),
    ("seed", -2, ValueError),
    ("seed", 2**63, ValueError),
    ("seed", 1.0, TypeError),
    ("max_tokens", 0, ValueError),
    ("max_tokens", "many", TypeError),
    ("stop", "", ValueError),
    ("stop", ["a", ""], ValueError),
    ("stop", [1], TypeError),
    ("stop_token_ids", ["a"], TypeError),
    ("stop_token_ids", 3, TypeError),
    ("ignore_eos", 1, TypeError),
    ("detokenize", None, TypeError),
    ("n", 0, ValueError),
    ("n", 16385, ValueError),
    ("n", 1.0, TypeError),
    ("n", True, TypeError),
    ("presence_penalty", 2.1, ValueError),
    ("presence_penalty", float("nan"), ValueError),
    ("presence_penalty", None, TypeError),
    ("frequency_penalty", -2.1, ValueError),
    ("frequency_penalty", "1", TypeError),
    ("repetition_penalty", 0.0, ValueError),
    ("repetition_penalty", -1, ValueError),
    ("repetition_penalty", float("inf"), ValueError),
    ("repetition_penalty", [], TypeError),
    ("min_tokens", -1, ValueError),
    ("min_tokens", 17, ValueError),
    ("min_tokens", None, TypeError),
    ("logprobs", -2, ValueError),
    ("logprobs", True, TypeError),
    ("logprobs", "5", TypeError),
    ("prompt_logprobs", -2, ValueError),
    ("prompt_logprobs", 1.0, TypeError),
    ("logprob_token_ids", [], ValueError),
    ("logprob_token_ids", [1.5], TypeError),
    ("logprob_token_ids", 7, TypeError),
    ("flat_logprobs", 1, TypeError),
    ("skip_special_tokens", 0, TypeError),
    ("spaces_between_special_tokens", None, TypeError),
    ("include_stop_str_in_output", "yes", TypeError),
    ("output_kind", "delta", TypeError),
    ("output_kind", 1, TypeError),
    ("logit_bias", [1], TypeError),
    ("logit_bias", {"1": 1.0}, TypeError),
    ("logit_bias", {1: "x"}, TypeError),
    ("logit_bias", {1: True}, TypeError),
    ("logit_bias", {1: float("nan")}, ValueError),
    ("allowed_token_ids", [], ValueError),
    ("allowed_token_ids", ["a"], TypeError),
    ("allowed_token_ids", 4, TypeError),
    ("bad_words", "word", TypeError),
    ("bad_words", [""], ValueError),
    ("bad_words", [3], TypeError),
    ("truncate_prompt_tokens", 0, ValueError),
    ("truncate_prompt_tokens", -2, ValueError),
    ("truncate_prompt_tokens", 1.0, TypeError),
    ("skip_reading_prefix_cache", 1, TypeError),
]

BAD_PAIRS: list[tuple[dict[str, Any], str]] = [
    ({"n": 2, "temperature": 0}, "n=2 greedy"),
    ({"min_tokens": 4, "max_tokens": 3}, "min_tokens=4 must not exceed max_tokens=3"),
    ({"logprobs": 3, "logprob_token_ids": [1, 2]}, "logprobs must be None or 2, got 3"),
    ({"prompt_logprobs": 1, "skip_reading_prefix_cache": False}, "skip_reading_prefix_cache"),
    ({"stop": ["x"], "detokenize": False}, "detokenize=True"),
]


@pytest.mark.parametrize(("name", "value", "error"), BAD_VALUES, ids=lambda v: str(v))
def test_a_bad_value_is_refused_by_name(name: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(("fields", "message"), BAD_PAIRS, ids=lambda v: str(v)[:30])
def test_fields_that_do_not_go_together_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)


@pytest.mark.parametrize(
    "name", ["best_of", "use_beam_search", "structured_outputs", "extra_args", "thinking_token_budget"]
)
def test_an_unknown_field_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        SamplingParams(**dict[str, Any]({name: None}))


def test_every_field_takes_what_vllm_takes() -> None:
    optional = "seed stop stop_token_ids max_tokens logprobs prompt_logprobs logprob_token_ids logit_bias"
    optional += " allowed_token_ids bad_words truncate_prompt_tokens skip_reading_prefix_cache"
    none: Any = dict.fromkeys(optional.split())
    SamplingParams(**none)
    SamplingParams(seed=-1, top_k=-1, stop=[], stop_token_ids=[], bad_words=[], logit_bias={}, logprobs=-1)
    SamplingParams(prompt_logprobs=0, logprobs=2, logprob_token_ids=[4, 5], repetition_penalty=3, n=16384)
    assert SamplingParams(prompt_logprobs=0).is_cache_read is False
    assert SamplingParams(skip_reading_prefix_cache=True).is_cache_read is False
    assert SamplingParams().is_cache_read is True


def test_stop_strings_need_text() -> None:
    with pytest.raises(ValueError, match="detokenize=True"):
        SamplingParams(stop="x", detokenize=False)


def test_temperatures_near_zero_are_greedy_or_raised() -> None:
    assert SamplingParams(temperature=1e-6).effective_temperature == 0
    assert SamplingParams(temperature=1e-3).effective_temperature == MIN_TEMPERATURE
    assert SamplingParams(temperature=0.5).effective_temperature == 0.5


def make_request(**params: object) -> Request:
    return Request(
        request_id="r",
        prompt_token_ids=[1, 2, 3],
        params=SamplingParams(**params),  # type: ignore[arg-type]
        max_total_tokens=6,
        eos_token_ids=frozenset({9}),
        seed=0,
    )


def test_known_tokens_span_prompt_and_output() -> None:
    request = make_request()
    request.output_token_ids = [4, 5]
    assert request.known_tokens(0, 2) == [1, 2]
    assert request.known_tokens(1, 4) == [2, 3, 4]
    assert request.known_tokens(3, 5) == [4, 5]


@pytest.mark.parametrize(
    ("params", "token", "reason", "stop_reason"),
    [
        ({}, 9, "stop", None),
        ({"ignore_eos": True}, 9, None, None),
        ({"stop_token_ids": [7]}, 7, "stop", 7),
        ({"stop_token_ids": [9]}, 9, "stop", 9),
        ({}, 7, None, None),
    ],
)
def test_what_ends_a_request(params: dict, token: int, reason: str | None, stop_reason: int | None) -> None:
    request = make_request(**params)
    request.append(token)
    assert (request.finish_reason, request.stop_reason) == (reason, stop_reason)


def test_a_request_ends_at_its_length() -> None:
    request = make_request()
    for token in (4, 5, 6):
        assert not request.is_finished
        request.append(token)
    assert request.finish_reason == "length"
    assert request.metrics.ttft_s is not None
