from typing import Any

import pytest

from pjengine.request import Request
from pjengine.sampling_params import MIN_TEMPERATURE, RequestOutputKind, SamplingParams

pytestmark = pytest.mark.usefixtures("unchecked_types")  # it is our own refusals that are looked at
HUGE = 10**5000  # more digits than Python prints, and no float
BAD_VALUES: list[tuple[str, Any]] = [
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", float("nan")),
    ("temperature", "hot"),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("seed", -2),
    ("seed", 2**63),
    ("seed", 1.0),
    ("max_tokens", 0),
    ("max_tokens", "many"),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", [1]),
    ("stop_token_ids", ["a"]),
    ("stop_token_ids", 3),
    ("ignore_eos", 1),
    ("detokenize", None),
    ("n", 0),
    ("n", 16385),
    ("n", 1.0),
    ("n", True),
    ("best_of", 0),
    ("best_of", 2.0),
    ("use_beam_search", 1),
    ("length_penalty", "1"),
    ("length_penalty", float("inf")),
    ("length_penalty", 11),
    ("early_stopping", "always"),
    ("early_stopping", 1),
    ("presence_penalty", 2.1),
    ("presence_penalty", float("nan")),
    ("presence_penalty", None),
    ("frequency_penalty", -2.1),
    ("frequency_penalty", "1"),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1),
    ("repetition_penalty", float("inf")),
    ("repetition_penalty", []),
    ("min_tokens", -1),
    ("min_tokens", 17),
    ("min_tokens", None),
    ("logprobs", -2),
    ("logprobs", True),
    ("logprobs", "5"),
    ("prompt_logprobs", -2),
    ("prompt_logprobs", 1.0),
    ("logprob_token_ids", []),
    ("logprob_token_ids", [1.5]),
    ("logprob_token_ids", 7),
    ("flat_logprobs", 1),
    ("skip_special_tokens", 0),
    ("spaces_between_special_tokens", None),
    ("include_stop_str_in_output", "yes"),
    ("output_kind", "delta"),
    ("output_kind", 1),
    ("logit_bias", [1]),
    ("logit_bias", {"1": 1.0}),
    ("logit_bias", {1: "x"}),
    ("logit_bias", {1: True}),
    ("logit_bias", {1: float("nan")}),
    ("allowed_token_ids", []),
    ("allowed_token_ids", ["a"]),
    ("allowed_token_ids", 4),
    ("bad_words", "word"),
    ("bad_words", [""]),
    ("bad_words", [3]),
    ("logits_processors", len),
    ("logits_processors", ["ban"]),
    ("logits_processors", [len] * 9),
    ("truncate_prompt_tokens", 0),
    ("truncate_prompt_tokens", -2),
    ("truncate_prompt_tokens", 1.0),
    ("skip_reading_prefix_cache", 1),
    ("repetition_penalty", 1e-50),
    ("repetition_penalty", 1e300),
    ("logit_bias", {1: HUGE, 2: None}),
    *(
        (name, HUGE)
        for name in ("presence_penalty", "frequency_penalty", "repetition_penalty", "temperature")
    ),
    *((name, HUGE) for name in ("top_p", "min_p", "seed", "n", "min_tokens")),
    *((name, -HUGE) for name in ("logprobs", "prompt_logprobs", "max_tokens", "truncate_prompt_tokens")),
]

BAD_PAIRS: list[tuple[dict[str, Any], str]] = [
    ({"n": 2, "temperature": 0}, "n=2 greedy"),
    ({"n": 3, "best_of": 2}, "best_of must be at least n=3, got 2"),
    ({"best_of": 2, "temperature": 0}, "best_of=2 greedy"),
    ({"use_beam_search": True, "best_of": 4}, "temperature must be 0 .* set temperature=0; got 1.0"),
    ({"use_beam_search": True, "n": 65, "temperature": 0}, "n must be at most 64 beams, got 65"),
    ({"best_of": 2, "output_kind": RequestOutputKind.DELTA}, "must not be DELTA"),
    (
        {"use_beam_search": True, "temperature": 0, "output_kind": RequestOutputKind.DELTA},
        "must not be DELTA",
    ),
    ({"length_penalty": 2.0}, "length_penalty=2.0 is for beams: it needs use_beam_search=True"),
    ({"early_stopping": "never"}, "early_stopping=never is for beams"),
    ({"use_beam_search": True}, "temperature must be 0 with use_beam_search.*got 1.0"),
    *(
        ({"use_beam_search": True, "temperature": 0, **more}, rf"{next(iter(more))} must be")
        for more in (
            {"top_p": 0.9},
            {"top_k": 5},
            {"min_p": 0.1},
            {"seed": 3},
            {"stop": "a"},
            {"logprobs": 1},
            {"prompt_logprobs": 1},
            {"logprob_token_ids": [1]},
            {"best_of": 65},
            {"best_of": 2, "n": 3},
        )
    ),
    ({"min_tokens": 4, "max_tokens": 3}, "min_tokens=4 must not exceed max_tokens=3"),
    ({"logprobs": 3, "logprob_token_ids": [1, 2]}, "logprobs must be None or 2, got 3"),
    ({"prompt_logprobs": 1, "skip_reading_prefix_cache": False}, "skip_reading_prefix_cache"),
    ({"stop": ["x"], "detokenize": False}, "detokenize=True"),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES, ids=[name for name, _ in BAD_VALUES])
def test_a_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}.* (got|must not)"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("value", [1.5, True, "5", None])
def test_a_top_k_that_is_no_whole_number_is_a_type_error_as_in_vllm(value: Any) -> None:
    with pytest.raises(TypeError, match="top_k must be int, got"):
        SamplingParams(top_k=value)


def test_numbers_beyond_what_the_device_keeps_are_taken_where_they_mean_something() -> None:
    SamplingParams(logit_bias={1: HUGE, 2: float("inf")}, top_k=HUGE, max_tokens=HUGE, top_p=1e-300)


@pytest.mark.parametrize(("fields", "message"), BAD_PAIRS, ids=lambda v: str(v)[:30])
def test_fields_that_do_not_go_together_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)


@pytest.mark.parametrize("name", ["extra_args", "thinking_token_budget"])
def test_an_unknown_field_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        SamplingParams(**dict[str, Any]({name: None}))


def test_every_field_takes_what_vllm_takes() -> None:
    optional = "seed stop stop_token_ids max_tokens logprobs prompt_logprobs logprob_token_ids logit_bias"
    optional += " best_of allowed_token_ids bad_words truncate_prompt_tokens skip_reading_prefix_cache"
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


def test_temperatures_near_zero_are_raised_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    for temperature in (1e-6, 1e-3):
        assert SamplingParams(temperature=temperature).temperature == MIN_TEMPERATURE
        assert f"temperature={temperature} is raised to 0.01" in caplog.text
    caplog.clear()
    assert [SamplingParams(temperature=t).temperature for t in (0, MIN_TEMPERATURE, 0.5)] == [0, 0.01, 0.5]
    assert SamplingParams(temperature=0).is_greedy and not caplog.text


def make_request(**params: object) -> Request:
    return Request(
        request_id="r",
        prompt_token_ids=[1, 2, 3],
        params=SamplingParams(**params),  # type: ignore[arg-type]
        max_total_tokens=6,
        eos_token_ids=frozenset({9}),
        more_eos_token_ids=frozenset({8}),
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
        ({"stop_token_ids": [9]}, 9, "stop", None),
        ({"stop_token_ids": [9], "ignore_eos": True}, 9, "stop", 9),
        ({}, 8, "stop", 8),
        ({"ignore_eos": True}, 8, None, None),
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
