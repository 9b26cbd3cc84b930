"""Sliding windows, on a clock that the test moves."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pjengine.serving.recent import Recent
    from pjengine.stats import EngineStats


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def recent(clock: Clock) -> "Recent":
    from pjengine.serving.recent import Recent

    return Recent(clock)


def stats(prompt: int = 0, generation: int = 0, running: int = 0, waiting: int = 0) -> "EngineStats":
    from pjengine.stats import EngineStats

    return EngineStats(
        num_running=running,
        num_waiting=waiting,
        kv_cache_usage=0.0,
        num_prompt_tokens=prompt,
        num_generation_tokens=generation,
        num_preemptions=0,
        num_cache_queries=0,
        num_cache_hits=0,
        num_recompiles=0,
        kernel_backends={},
    )


def test_percentiles_are_of_the_last_minute(recent: "Recent", clock: Clock) -> None:
    assert recent.ttft.summary() == {"count": 0, "p50": None, "p90": None, "p99": None}
    recent.ttft.add(1000.0)
    clock.now_s += 30
    for value in range(101):
        recent.ttft.add(value)
    recent.ttft.add(None)  # none is known
    assert recent.ttft.summary()["count"] == 102
    clock.now_s += 31
    assert recent.ttft.summary() == {"count": 101, "p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert recent.tpot.summary()["count"] == 0
    clock.now_s += 31
    assert recent.ttft.summary()["count"] == 0


def test_a_minute_of_very_many_requests_has_the_newest(recent: "Recent") -> None:
    for value in range(10_000):
        recent.tpot.add(value)
    summary = recent.tpot.summary()
    assert summary["count"] == 4096 and summary["p50"] == pytest.approx(9999 - 4095 / 2)


def test_a_sample_is_what_has_been_done_since_the_last(recent: "Recent", clock: Clock) -> None:
    recent.sample(stats())
    assert (recent.num_samples, recent.samples(0)) == (0, [])
    clock.now_s += 2
    recent.sample(stats(prompt=100, generation=50, running=3, waiting=1))
    clock.now_s += 0.5
    recent.sample(stats(prompt=100, generation=60))
    assert recent.samples(0) == [[50.0, 25.0, 3, 1], [0.0, 20.0, 0, 0]]
    assert recent.samples(1) == [[0.0, 20.0, 0, 0]] and recent.samples(2) == recent.samples(7) == []
    clock.now_s += 1
    recent.sample(stats(prompt=4))  # the engine has started over
    assert recent.samples(2) == [[0.0, 0.0, 0, 0]]


def test_five_minutes_of_samples_are_kept(recent: "Recent", clock: Clock) -> None:
    for second in range(1001):
        recent.sample(stats(generation=second * second))
        clock.now_s += 1
    assert recent.num_samples == 1000 and len(recent.samples(0)) == 300
    assert [sample[1] for sample in recent.samples(998)] == [1997.0, 1999.0]
