"""Deterministic schedules, without JAX: a token is computed in one way, whatever else is asked for."""

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pjengine.page_groups import window_pages
from pjengine.page_pool import PagePool
from pjengine.request import Request
from pjengine.schedule import Schedule
from pjengine.scheduler import Scheduler
from pjengine.step_turns import MAX_DECODES, MAX_PROMPT_TOKENS, StepTurns
from tests.engine.stub_device import StubDevice, expected
from tests.engine.test_scheduler import MASKED, make_request, make_scheduler
from tests.engine.unchecked import run_unchecked

seen: Counter[str] = Counter()


def make_deterministic(*limits: Any) -> Scheduler:
    return replace(make_scheduler(*limits), is_deterministic=True)


def check_one_way(scheduler: Scheduler, schedule: Schedule) -> None:
    """Chunks have tokens of prompts only, decodes outputs only, and no step has both."""
    assert not (schedule.chunks and schedule.decodes.requests)
    for chunk in schedule.chunks:
        assert chunk.start + chunk.length <= len(chunk.request.prompt_token_ids)
    for request, start in zip(schedule.decodes.requests, schedule.decodes.starts, strict=True):
        assert start >= len(request.prompt_token_ids)
    for request in scheduler.running:
        for page in request.pages[len(request.prompt_token_ids) // scheduler.page_size :]:
            assert page not in scheduler.pool._hash_of, "a page with outputs is shared"
            seen["pages with outputs"] += 1


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_pages=st.integers(8, 32),
    max_num_seqs=st.integers(1, 9),
    max_num_batched_tokens=st.integers(9, 40),
    is_caching=st.booleans(),
    window=st.none() | st.integers(1, 40),
)
def check_any_schedule(
    seed: int, num_pages: int, max_num_seqs: int, max_num_batched_tokens: int, is_caching: bool, window: Any
) -> None:
    rng = random.Random(seed)
    scheduler = make_deterministic(num_pages, 4, max_num_seqs, max_num_batched_tokens, is_caching)
    if window is not None:
        needed = window_pages(window, 4 * (num_pages - 1), 4, num_new=max_num_batched_tokens)
        pool = PagePool(1 + needed + rng.randint(0, 16))
        scheduler = replace(scheduler, pool=PagePool(num_pages), window_pool=pool, window=window)
    device = StubDevice(scheduler)
    limit = 4 * (num_pages - 1)
    requests: list[Request] = []
    for _ in range(60):
        if rng.random() < 0.4 and len(requests) < 12:
            # Few distinct tokens: prompts share beginnings, and outputs could be taken for prompts.
            prompt = [7] * rng.randint(0, limit // 2) + [rng.randint(0, 1)]
            if requests and rng.random() < 0.3:
                earlier = rng.choice(requests)
                prompt = earlier.known_tokens(0, min(earlier.num_known, limit // 2))
            edits = {"edits": MASKED} if rng.random() < 0.3 else {}
            length = rng.randint(1, limit // 2)
            name = str(len(requests))
            request = make_request(
                name, 0, length, prompt_token_ids=prompt, priority=rng.randint(0, 2), **edits
            )
            requests.append(request)
            scheduler.add(request)
        check_one_way(scheduler, device.step())
    for _ in range(20_000):
        if not scheduler.has_requests:
            break
        check_one_way(scheduler, device.step())
    assert not scheduler.has_requests, "requests are stuck"
    assert all(pool.num_free == pool.num_usable for pool in scheduler.pools)
    for request in requests:
        assert request.output_token_ids == expected(request)
        seen["preempted"] += request.metrics.num_preemptions > 0
        seen["cached"] += request.num_cached_tokens > 0


def check_many_schedules() -> None:
    check_any_schedule()
    assert min(seen[name] for name in ("preempted", "cached", "pages with outputs")) >= 20, seen


def test_in_any_schedule_each_token_is_computed_in_one_way_only() -> None:
    run_unchecked(check_many_schedules)


def test_a_preempted_request_gets_its_outputs_again_one_by_one() -> None:
    scheduler = make_deterministic(7, 4, 2, 16)
    device = StubDevice(scheduler)
    first, second = make_request("a", 8, 12), make_request("b", 8, 12)
    scheduler.add(first)
    scheduler.add(second)
    again = []
    while scheduler.has_requests:
        schedule = device.step()
        if second.metrics.num_preemptions and second in schedule.decodes.requests:
            again.append(int(schedule.decodes.starts[schedule.decodes.requests.index(second)]))
    assert second.metrics.num_preemptions > 0
    last_time = again[len(again) - 1 - again[::-1].index(8) :]
    assert last_time == list(range(8, 19)), "from the first output on, after a preemption"
    assert (first.output_token_ids, second.output_token_ids) == (expected(first), expected(second))


def test_prompts_wait_a_few_steps_for_others_and_no_longer() -> None:
    turns = StepTurns()
    for _ in range(MAX_DECODES):
        assert not turns.is_for_prompts(4, 100, 512)
        turns.see(0)
    assert turns.is_for_prompts(4, 100, 512)


@pytest.mark.parametrize("num_decoding", [0, 4])
def test_prompts_that_fill_a_step_do_not_wait(num_decoding: int) -> None:
    assert StepTurns().is_for_prompts(num_decoding, 512, 512)


def test_prompts_without_anybody_beside_them_do_not_wait() -> None:
    assert StepTurns().is_for_prompts(0, 1, 512)


def test_rows_that_decode_get_on_however_many_prompts_come() -> None:
    turns, steps = StepTurns(), []
    for _ in range(40):
        steps.append(turns.is_for_prompts(4, 10**6, 512))
        turns.see(512 if steps[-1] else 0)
    in_a_row = MAX_PROMPT_TOKENS // 512
    assert steps[: in_a_row + 2] == [True] * in_a_row + [False, True]
