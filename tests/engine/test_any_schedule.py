"""Random schedules against a device that is a dictionary: every request gets what it gets alone."""

import random
from collections import Counter
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pjengine.config import buckets
from pjengine.edits import NO_EDITS, Edits
from pjengine.page_groups import window_pages
from pjengine.page_pool import PagePool
from pjengine.request import Request
from pjengine.schedule import Schedule, state_limit
from pjengine.scheduler import Scheduler
from pjengine.speculation import Speculation
from pjengine.speculation_config import SpeculationConfig
from tests.engine.stub_device import StubDevice, expected
from tests.engine.test_scheduler import MASKED, make_request, make_scheduler
from tests.engine.unchecked import run_unchecked

# What must have happened in schedules with a window, for the rest to mean anything, and how often at least.
WANTED = {"preempted": 100, "cached": 100, "longer than the window": 1000, "cached behind the window": 50}
WANTED |= {"wrong drafts": 1000, "decodes wait": 100}  # and in schedules without one
seen: Counter[str] = Counter()
WISHES = (NO_EDITS, NO_EDITS, Edits(layers=(3,), pooling="mean"), Edits(layers=(0, 2, 5)))


class Whim(Speculation):
    """Speculates half of the time."""

    def __init__(self, num_drafts: int, num_rows: int, rng: random.Random) -> None:
        super().__init__(SpeculationConfig(num_drafts=num_drafts, lookup_min=1, lookup_max=1), num_rows)
        self.rng = rng

    def _pays(self, *_: Any) -> bool:
        return self.rng.random() < 0.5


@settings(max_examples=500, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_pages=st.integers(8, 32),
    max_num_seqs=st.integers(1, 9),
    max_num_batched_tokens=st.integers(9, 40),
    is_caching=st.booleans(),
    decode_steps=st.integers(1, 4),
    num_drafts=st.none() | st.integers(1, 3),
    share_masked=st.sampled_from([0, 0.3, 1]),
    window=st.none() | st.integers(1, 40),
    num_spare=st.integers(0, 16),
)
def check_any_schedule(
    seed: int,
    num_pages: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    is_caching: bool,
    decode_steps: int,
    num_drafts: int | None,
    share_masked: float,
    window: int | None,
    num_spare: int,
) -> None:
    rng = random.Random(seed)
    scheduler = make_scheduler(num_pages, 4, max_num_seqs, max_num_batched_tokens, is_caching, decode_steps)
    if window is not None:
        # As few pages as one request may need, and some more; of the other group as many at least.
        num_new = max(max_num_batched_tokens, 2 * (num_drafts or 0) + 1)
        needed = window_pages(window, 4 * (num_pages - 1), 4, num_new=num_new)
        scheduler = replace(
            scheduler,
            pool=PagePool(num_pages + rng.choice((0, 8, 40))),
            window_pool=PagePool(1 + needed + num_spare),
            window=window,
        )
    if num_drafts is not None:
        scheduler = replace(scheduler, speculation=Whim(num_drafts, max_num_seqs, rng))
    device = StubDevice(scheduler)
    scheduler.prefill_first, scheduler.num_spare_pages = seed % 4 > 1, seed % 3
    if seed % 2:
        scheduler.mixed_sizes = buckets(rng.randint(1, max_num_batched_tokens), max_num_batched_tokens)
        scheduler.max_states = rng.choice((None, rng.randint(1, 80)))
    limit = 4 * (num_pages - 1)
    requests: list[Request] = []
    aborted: set[str] = set()
    for _ in range(40):
        if rng.random() < 0.4 and len(requests) < 12:
            # Few distinct tokens in long runs: prompts share beginnings of every length.
            num_prompt, shared = rng.randint(1, limit // 2), rng.randint(0, limit // 2)
            prompt = ([7] * shared + [rng.randint(0, 1) for _ in range(num_prompt)])[:num_prompt]
            num_continuations, salt = rng.choice((1, 1, 2, 3)), rng.choice(["", "", "tenant"])
            fork = f"fork {len(requests)}" if num_continuations > 1 else ""
            has_no_cache = rng.random() < 0.2
            edits = MASKED if rng.random() < share_masked else rng.choice(WISHES)
            max_cached = rng.choice((None, None, rng.randint(0, num_prompt - 1)))
            group = [
                make_request(
                    str(len(requests) + i),
                    num_prompt,
                    rng.randint(1, limit // 2),
                    prompt_token_ids=prompt,
                    priority=priority,
                    salt=fork if fork and has_no_cache else salt,
                    fork=fork,
                    is_cache_read=i > 0 or not has_no_cache,
                    max_cached=max_cached,
                    edits=edits,
                )
                for priority in [rng.randint(0, 2)]
                for i in range(num_continuations)
            ]
            requests += group
            for request in group:
                scheduler.add(request)
        live = [r for r in requests if not r.is_finished]
        if live and rng.random() < 0.05:
            victim = rng.choice(live)
            victim.finish("abort")
            aborted.add(victim.request_id)
            scheduler.finish([victim])
        if rng.random() < 0.01:
            scheduler.reset_prefix_cache()
        table = scheduler.rows
        owners = [table.owner(row) for row in table.decoding().tolist()]
        schedule = device.step()
        check_layers(scheduler, schedule)
        # Whatever prompts come beside it, a row that decodes gets on, or has given its pages up.
        booked = {request.request_id for request in schedule.decodes.requests}
        waiting = [own for own in owners if own.row >= 0 and own.request_id not in booked]
        if waiting:  # or, where prompts go first, all wait while these fill a step
            seen["decodes wait"] += 1
            assert scheduler.prefill_first and schedule.chunks and not booked
            is_full = schedule.num_tokens + len(waiting) > max_num_batched_tokens
            assert is_full or any(own.edits.layers for own in requests)  # which may end a step early
        seen["wrong drafts"] += device.num_wrong_drafts
        device.num_wrong_drafts = 0
    for _ in range(20_000):
        if not scheduler.has_requests:
            break
        device.step()
    assert not scheduler.has_requests, "requests are stuck"
    assert all(pool.num_free == pool.num_usable for pool in scheduler.pools)
    for request in requests:
        if request.request_id not in aborted:
            assert request.output_token_ids == expected(request)
        if window is not None:
            seen["preempted"] += request.metrics.num_preemptions > 0
            seen["cached"] += request.num_cached_tokens > 0
            seen["longer than the window"] += request.num_known > window + 4
            seen["cached behind the window"] += request.num_cached_tokens > window + 4


def check_layers(scheduler: Scheduler, schedule: Schedule) -> None:
    """A step keeps hidden states of one set of layers, and not more of them than it may."""
    asking = [
        chunk.request.edits.layers
        for chunk in schedule.chunks
        if chunk.request.edits.layers and chunk.start < len(chunk.request.prompt_token_ids)
    ]
    assert len(set(asking)) <= 1
    if asking and scheduler.mixed_sizes:
        limit = state_limit(scheduler.max_states, len(asking[0]), scheduler.mixed_sizes)
        assert limit is None or schedule.num_tokens <= limit


def check_many_schedules() -> None:
    check_any_schedule()
    assert not {name: seen[name] for name, least in WANTED.items() if seen[name] < least}


def test_any_schedule_gives_each_request_what_it_would_get_alone() -> None:
    run_unchecked(check_many_schedules)
