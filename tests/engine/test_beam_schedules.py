"""Random schedules of beam searches among other requests, against a device that is a dictionary."""

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pjengine.edits import Edits
from pjengine.generation import Completion, Generation
from pjengine.page_groups import window_pages
from pjengine.page_pool import PagePool
from pjengine.preparation import add_beams
from pjengine.request import Request
from pjengine.sampling_params import SamplingParams
from pjengine.scheduler import Scheduler
from tests.engine.beam_device import BeamDevice, expected_beams, found
from tests.engine.stub_device import expected
from tests.engine.test_scheduler import make_request, make_scheduler
from tests.engine.unchecked import run_unchecked

# What must have happened, for the rest to mean anything, and how often at least.
WANTED = {
    "preempted": 20,
    "aborted": 20,
    "cached": 50,
    "ended early": 50,
    "beside others": 200,
    "several": 30,
}
seen: Counter[str] = Counter()


def make_beams(name: str, prompt: list[int], max_tokens: int, width: int, **fields: Any) -> Request:
    params = SamplingParams(
        max_tokens=max_tokens, temperature=0, use_beam_search=True, best_of=width, **fields.pop("search", {})
    )
    edits = Edits(beam_width=width)
    request = make_request(name, 0, max_tokens, prompt_token_ids=prompt, edits=edits, **fields)
    request.params = params
    add_beams(Generation([Completion(request)]))
    return request


def num_pages_needed(request: Request, page_size: int) -> int:
    num_shared = len(request.prompt_token_ids) // page_size
    return num_shared + len(request.row_requests) * (
        -(-(request.max_total_tokens - 1) // page_size) - num_shared
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    num_spare=st.integers(0, 4),
    max_num_seqs=st.integers(4, 9),
    max_num_batched_tokens=st.integers(9, 40),
    is_caching=st.booleans(),
    decode_steps=st.integers(1, 3),
    window=st.none() | st.integers(1, 20),
)
def check_any_schedule(
    seed: int,
    num_spare: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    is_caching: bool,
    decode_steps: int,
    window: int | None,
) -> None:
    rng = random.Random(seed)
    requests = [make_any(rng, number, max_num_seqs) for number in range(rng.randint(2, 7))]
    num_pages = 1 + max(num_pages_needed(request, 4) for request in requests) + num_spare
    scheduler = make_scheduler(num_pages, 4, max_num_seqs, max_num_batched_tokens, is_caching, decode_steps)
    if window is not None:
        most = 4 * int(window_pages(window, 40, 4, num_new=max_num_batched_tokens))
        window_pool = PagePool(1 + most + num_spare)
        scheduler = replace(scheduler, pool=PagePool(num_pages), window_pool=window_pool, window=window)
    scheduler.prefill_first, scheduler.num_spare_pages = seed % 2 == 1, seed % 3
    run(scheduler, requests, rng)


def make_any(rng: random.Random, number: int, max_num_seqs: int) -> Request:
    """A beam search or an ordinary request; prompts begin alike."""
    num_prompt, max_tokens = rng.randint(1, 20), rng.randint(1, 16)
    prompt = ([7] * rng.randint(0, 20) + [rng.randint(0, 1) for _ in range(num_prompt)])[:num_prompt]
    priority = rng.randint(0, 1)
    if rng.random() < 0.4:
        return make_request(str(number), 0, max_tokens, prompt_token_ids=prompt, priority=priority)
    search = {
        "early_stopping": rng.choice((True, False, "never")),
        "length_penalty": rng.choice((0.6, 1.0, 2.0)),
    }
    width = rng.randint(1, min(4, max_num_seqs))
    return make_beams(str(number), prompt, max_tokens, width, search=search, priority=priority)


def run(scheduler: Scheduler, requests: list[Request], rng: random.Random) -> None:
    device, waiting, aborted = BeamDevice(scheduler), list(requests), set[str]()
    for _ in range(20_000):
        if waiting and rng.random() < 0.5:
            scheduler.add(waiting.pop(0))
        live = [r for r in requests if r not in waiting and not r.is_finished]
        if live and rng.random() < 0.01:
            victim = rng.choice(live)
            victim.finish("abort")
            aborted.add(victim.request_id)
            scheduler.finish([victim])
            seen["aborted"] += victim.beams is not None
        if not waiting and not scheduler.has_requests:
            break
        schedule = device.step()
        seen["beside others"] += 0 < sum(len(s.seqs) for s in schedule.beams) < schedule.num_seqs
        seen["several"] += len(schedule.beams) > 1
    assert not scheduler.has_requests, "requests are stuck"
    assert all(pool.num_free == pool.num_usable for pool in scheduler.pools)
    for request in requests:
        if request.request_id in aborted:
            continue
        if request.beams is None:
            assert request.output_token_ids == expected(request)
            continue
        assert found(request.beams) == expected_beams(request)
        seen["preempted"] += request.metrics.num_preemptions > 0
        seen["cached"] += request.num_cached_tokens > 0
        seen["ended early"] += request.beams.num_tokens < request.beams.max_tokens


def check_many_schedules() -> None:
    check_any_schedule()
    assert not {name: seen[name] for name, least in WANTED.items() if seen[name] < least}, seen


def test_any_schedule_gives_each_search_what_it_would_find_alone() -> None:
    run_unchecked(check_many_schedules)


def test_beams_share_the_prompts_full_pages_and_have_a_last_one_each() -> None:
    scheduler = make_scheduler(num_pages=64)
    device = BeamDevice(scheduler)
    scheduler.add(make_beams("search", list(range(100, 110)), 8, 4))
    device.step()  # 10 tokens: two full pages, and one of two tokens
    assert scheduler.pool.num_usable - scheduler.pool.num_free == 2 + 4


def test_a_search_that_can_never_fit_is_refused_with_numbers() -> None:
    scheduler = make_scheduler(num_pages=2 + 4 * 2)
    search = make_beams("search", list(range(8)), 8, 4)  # 15 tokens are computed: two shared pages, two each
    with pytest.raises(ValueError, match=r"16 tokens in each of 4 beams, which need 10 pages of 4; .* has 9"):
        scheduler.add(search)
    with pytest.raises(ValueError, match=r"best_of=9 beams run at once, and max_num_seqs=8"):
        scheduler.add(make_beams("wide", [1], 2, 9))


def test_a_search_waits_until_all_of_its_rows_are_free() -> None:
    scheduler = make_scheduler(max_num_seqs=4)
    device = BeamDevice(scheduler)
    scheduler.add(make_request("first", 3, 4))
    scheduler.add(make_beams("search", [1, 2, 3], 4, 4))
    scheduler.add(make_request("last", 3, 1))  # it comes later, and does not overtake
    assert [chunk.request.request_id for chunk in device.step().chunks] == ["first"]
    while scheduler.has_requests:
        running = {request.request_id for request in scheduler.running}
        assert "first" not in running or running == {"first"}
        device.step()
