"""The figures of a load: when requests are sent, and what their times come to."""

import json
from typing import Any

import numpy as np
import pytest


def timing(start_s: float, *chunk_s: float, tokens: int = 0, error: str | None = None) -> Any:
    from pjengine.serving.load_client import Timing

    end_s = chunk_s[-1] if chunk_s else start_s + 1
    return Timing(start_s, end_s, list(chunk_s), tokens, error)


def demand(prompt: int, output: int) -> Any:
    from pjengine.serving.load_client import Demand

    return Demand(content=b"", num_prompt_tokens=prompt, num_output_tokens=output)


def test_arrivals_are_poisson_and_end_when_the_rate_says() -> None:
    from pjengine.serving.load_client import arrivals

    assert arrivals(3, None, 0) == [0.0] * 3
    times = np.array(arrivals(2000, 10.0, 1))
    gaps = np.diff(times)
    assert times[-1] == pytest.approx(200) and (gaps > 0).all()
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # as of an exponential distribution
    assert times.tolist() == arrivals(2000, 10.0, 1) != arrivals(2000, 10.0, 2)


def test_times_are_defined_as_by_vllm() -> None:
    from pjengine.serving.load_client import Load, summarize

    timings = [
        timing(1.0, 1.1, 1.2, 1.5, tokens=5),  # TTFT 100, E2EL 500, TPOT 400 / 4
        timing(2.0, 2.3, 2.5, tokens=11),  # TTFT 300, E2EL 500, TPOT 200 / 10
        timing(2.0, 2.2, tokens=1),  # TTFT 200, E2EL 200, no TPOT
        timing(2.1, error="refused"),
    ]
    demands = [demand(10, 5), demand(20, 11), demand(30, 1), demand(40, 9)]
    load = Load(timings=timings, duration_s=2.0, cpu_s=0.5, latest_s=0.003)
    result = summarize(load, demands, {"ttft": 250, "tpot": 100.001})
    assert (result["completed"], result["failed"], result["errors"]) == (3, 1, {"refused": 1})
    assert (result["prompt_tokens"], result["output_tokens"]) == (60, 17)
    assert (result["requests_per_s"], result["output_tokens_per_s"]) == (1.5, 8.5)
    assert result["total_tokens_per_s"] == 38.5
    expected = {
        "ttft": [100, 300, 200],
        "tpot": [100, 20],
        "itl": [100, 300, 200],
        "e2el": [500, 500, 200],
    }
    for name, values in expected.items():
        assert result[f"mean_{name}_ms"] == pytest.approx(np.mean(values)), name
        assert result[f"median_{name}_ms"] == pytest.approx(np.median(values)), name
        assert result[f"p99_{name}_ms"] == pytest.approx(np.percentile(values, 99)), name
    assert (result["goodput_per_s"], result["goodput_share"]) == (1.0, 0.5)  # the first and the third
    assert (result["client_cpu_share"], result["client_late_ms"]) == (0.25, 3.0)
    assert result["peak_concurrency"] == 3
    json.dumps(result)


def test_a_load_that_failed_whole_has_no_times() -> None:
    from pjengine.serving.load_client import Load, summarize

    load = Load(timings=[timing(0.0, error="no")], duration_s=1.0, cpu_s=0.0, latest_s=0.0)
    result = summarize(load, [demand(1, 1)], {"e2el": 5})
    assert result["median_ttft_ms"] is None and result["goodput_share"] == 0 and result["failed"] == 1


def test_an_end_and_a_start_at_one_moment_are_not_at_once() -> None:
    from pjengine.serving.load_client import peak_concurrency

    assert peak_concurrency([timing(0.0, 1.0), timing(1.0, 2.0), timing(1.5, 3.0)]) == 2


USAGE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (b"", "the stream ended with b''"),
        (b'{"error": {"message": "no room"}}', "no room"),
        (b'{"choices": [{}]}', "told no usage"),
        (json.dumps(USAGE).encode(), "wanted 3 prompt and 9 output tokens, got 3 and 2"),
    ],
)
def test_an_answer_that_is_not_what_was_demanded_has_failed(last: bytes, message: str) -> None:
    from pjengine.serving.http_client import RemoteError
    from pjengine.serving.load_client import _read_usage

    with pytest.raises(RemoteError, match=message):
        _read_usage(timing(0.0, 1.0, 2.0), last, demand(3, 9))


def test_the_event_of_the_usage_is_no_chunk_of_the_answer() -> None:
    from pjengine.serving.load_client import _read_usage

    answered = timing(0.0, 1.0, 2.0, 9.0)
    _read_usage(answered, json.dumps(USAGE).encode(), demand(3, 2))
    assert (answered.e2el_s, answered.tpot_s) == (2.0, 1.0)


def test_more_connections_than_files_may_be_open_are_refused() -> None:
    import resource

    from pjengine.serving.bench_serve_command import _check_open_files
    from pjengine.serving.open_files import allow_open_files

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
    try:
        assert allow_open_files(100) == 200
        assert allow_open_files(201) == 201 == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        with pytest.raises(ValueError, match="1000000000 connections at once are more than the"):
            _check_open_files(10**9)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
