"""The scheduler over a hundred thousand requests, against a device that is a dictionary: no JAX."""

import random
from collections import Counter

import pytest

from pjengine.page_pool import PagePool
from pjengine.request import Request, RequestStatus
from pjengine.sampling_params import SamplingParams
from pjengine.scheduler import Scheduler
from tests.engine.stub_device import StubDevice, expected
from tests.engine.unchecked import run_unchecked

NUM_REQUESTS = 100_000
NUM_PAGES = 420
MAX_LIVE = 400  # more than rows: some always wait
MAX_STEPS = 20_000  # it takes some thousands
EOS_TOKEN_IDS = frozenset(range(0, 997, 33))
PHASES = ((6, (1, 2, 2, 3, 16)), (32, (1, 2, 3)), (4, (3, 16)))  # longest prompt, output lengths
PARAMS = {max_tokens: SamplingParams(max_tokens=max_tokens) for max_tokens in (1, 2, 3, 16)}


class Load:
    """Requests that come, are aborted, and are checked as they end."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.live: dict[str, Request] = {}
        self.num_made = 0
        self.seen: Counter[str] = Counter()
        self.prefixes = [[self.rng.randrange(997) for _ in range(24)] for _ in range(40)]

    def make(self) -> Request:
        """For some thousands of requests each: rows are scarce, then pages, then pages for what grows."""
        rng = self.rng
        longest, outputs = PHASES[self.num_made // 2000 % len(PHASES)]
        num_shared = rng.randint(0, longest * 3 // 4)
        prompt = rng.choice(self.prefixes)[:num_shared]
        prompt += [rng.randrange(997) for _ in range(rng.randint(1, longest // 4))]
        params = PARAMS[rng.choice(outputs)]
        request = Request(
            request_id=str(self.num_made),
            prompt_token_ids=prompt,
            params=params,
            max_total_tokens=len(prompt) + (params.max_tokens or 0),
            eos_token_ids=EOS_TOKEN_IDS,
            seed=0,
            priority=rng.choice((0, 0, 0, -1, 1)),
            salt=rng.choice(("", "", "", "tenant")),
            is_cache_read=rng.random() < 0.9,
        )
        self.num_made += 1
        self.live[request.request_id] = request
        return request

    def victims(self) -> list[Request]:
        """Some of the live ones, ended from outside: whether they wait, have been preempted, or run."""
        victims = self.rng.sample(
            list(self.live.values()), min(len(self.live), self.rng.choice((0, 0, 1, 8)))
        )
        for request in victims:
            was_preempted = request.metrics.num_preemptions > 0 and request.status is RequestStatus.WAITING
            self.seen["aborted when preempted" if was_preempted else f"aborted {request.status.value}"] += 1
            request.finish("abort")
        return victims

    def collect(self) -> None:
        """Takes leave of what has ended, with the tokens that it should have."""
        for request in [request for request in self.live.values() if request.is_finished]:
            del self.live[request.request_id]
            wanted = expected(request)
            if request.finish_reason == "abort":
                wanted = wanted[: len(request.output_token_ids)]
            assert request.output_token_ids == wanted
            assert request.row == -1 and not request.pages
            self.seen[str(request.finish_reason)] += 1
            self.seen["preempted"] += request.metrics.num_preemptions > 0
            self.seen["cached"] += request.num_cached_tokens > 0


@pytest.mark.slow
def test_100_000_requests_with_random_aborts_leave_an_empty_pool() -> None:
    run_unchecked(soak)


def soak() -> None:
    scheduler = Scheduler(PagePool(NUM_PAGES), page_size=4, max_num_seqs=256, max_num_batched_tokens=1024)
    device = StubDevice(scheduler)
    load = Load(seed=1)
    most_running = deepest = 0
    for _ in range(MAX_STEPS):
        if load.rng.random() < 0.5:
            while len(load.live) < MAX_LIVE and load.num_made < NUM_REQUESTS:
                scheduler.add(load.make())
        scheduler.finish(load.victims())
        scheduler.decode_steps = 1 + load.num_made // 1000 % 3
        scheduler.prefill_first = load.num_made // 3000 % 2 == 1
        scheduler.num_spare_pages = int(load.num_made // 5000 % 5 == 0)
        schedule = device.step()
        most_running = max(most_running, len(scheduler.running))
        deepest = max(deepest, *schedule.decodes.lengths.tolist(), 0)
        load.collect()
        if not load.live and load.num_made == NUM_REQUESTS:
            break
    assert not load.live and not scheduler.has_requests, "requests are stuck"
    assert scheduler.pool.num_free == scheduler.pool.num_usable
    scheduler.check_integrity()
    seen = load.seen
    assert seen["stop"] + seen["length"] + seen["abort"] == NUM_REQUESTS
    assert most_running == scheduler.max_num_seqs and deepest == 3
    often = ("stop", "length", "preempted", "cached", "aborted running", "aborted waiting")
    assert all(seen[name] > 1000 for name in often) and seen["aborted when preempted"] > 100, seen
