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
]


@pytest.mark.parametrize(("name", "value", "error"), BAD_VALUES, ids=lambda v: str(v))
def test_a_bad_value_is_refused_by_name(name: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError, match="beam_width"):
        SamplingParams(beam_width=4)  # type: ignore[call-arg]


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
