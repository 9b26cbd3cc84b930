"""The scheduler alone, against a device that is a dictionary: no JAX."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pjengine.page_pool import PagePool
from pjengine.request import Request, RequestStatus
from pjengine.sampling_params import SamplingParams
from pjengine.scheduler import Schedule, Scheduler


def make_request(name: str, num_prompt: int, max_tokens: int) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=list(range(num_prompt)),
        params=SamplingParams(max_tokens=max_tokens),
        max_total_tokens=num_prompt + max_tokens,
        eos_token_ids=frozenset(),
        seed=0,
    )


def make_scheduler(
    num_pages: int = 64, page_size: int = 4, max_num_seqs: int = 8, max_num_batched_tokens: int = 16
) -> Scheduler:
    return Scheduler(PagePool(num_pages), page_size, max_num_seqs, max_num_batched_tokens)


class StubDevice:
    """Runs schedules one step late, as the engine does. Checks that every token is computed once, in order.

    The "KV cache" maps (page, offset) to (request, position); a token's value is a function of all
    the tokens before it, read through the request's pages: a wrong page shows as a wrong token.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.cache: dict[tuple[int, int], int] = {}
        self.tables: dict[int, dict[int, int]] = {}
        self.last_tokens: dict[int, int] = {}
        self.in_flight: list[tuple[Schedule, list[int]]] = []

    def run(self, schedule: Schedule) -> list[int]:
        size = self.scheduler.page_size
        tokens = []
        for chunk in schedule.chunks:
            if chunk.is_admitted:
                self.tables[chunk.row] = {}
            table = self.tables[chunk.row]
            table.update(chunk.new_pages)
            for position in range(chunk.start, chunk.start + chunk.length):
                known = chunk.request.known_tokens(position, position + 1)
                value = self.last_tokens[chunk.row] if chunk.is_decode else known[0]
                self.cache[table[position // size], position % size] = value
            context = [self.cache[table[p // size], p % size] for p in range(chunk.start + chunk.length)]
            tokens.append(next_token(context))
            if chunk.is_sampled:
                self.last_tokens[chunk.row] = tokens[-1]
        return tokens

    def step(self) -> Schedule:
        schedule = self.scheduler.schedule()
        assert schedule.num_tokens <= self.scheduler.max_num_batched_tokens
        self.in_flight.append((schedule, self.run(schedule)))
        if len(self.in_flight) > 1 or not schedule.chunks:
            self.read()
        self.scheduler.check_integrity()
        return schedule

    def read(self) -> None:
        schedule, tokens = self.in_flight.pop(0)
        for chunk, token in zip(schedule.chunks, tokens, strict=True):
            request = chunk.request
            if chunk.is_sampled and chunk.epoch == request.epoch and not request.is_finished:
                request.num_pending -= 1
                request.append(token)
        self.scheduler.finish([c.request for c in schedule.chunks if c.request.is_finished])


def next_token(context: list[int]) -> int:
    return hash(tuple(context)) % 997


def expected(request: Request) -> list[int]:
    tokens = list(request.prompt_token_ids)
    while len(tokens) < request.max_total_tokens:
        tokens.append(next_token(tokens))
    return tokens[len(request.prompt_token_ids) :]


def test_decodes_go_first_and_a_long_prompt_is_cut_to_the_budget() -> None:
    scheduler = make_scheduler()
    device = StubDevice(scheduler)
    scheduler.add(make_request("short", 3, 20))
    device.step()
    scheduler.add(make_request("long", 40, 4))
    schedule = device.step()
    assert [(c.request.request_id, c.length, c.is_decode) for c in schedule.chunks] == [
        ("short", 1, True),
        ("long", 15, False),
    ]
    assert not schedule.is_decode
    assert [c.is_sampled for c in schedule.chunks] == [True, False]


def test_the_latest_request_is_preempted_and_resumes_with_the_same_tokens() -> None:
    scheduler = make_scheduler(num_pages=9, max_num_seqs=4)  # 32 tokens of room
    device = StubDevice(scheduler)
    first, second = make_request("first", 8, 20), make_request("second", 8, 20)
    scheduler.add(first)
    scheduler.add(second)
    while scheduler.has_requests:
        device.step()
    assert first.metrics.num_preemptions == 0
    assert second.metrics.num_preemptions > 0
    assert first.output_token_ids == expected(first)
    assert second.output_token_ids == expected(second)


def test_a_request_that_can_never_fit_is_refused_with_numbers() -> None:
    scheduler = make_scheduler(num_pages=5)
    with pytest.raises(ValueError, match=r"18 tokens, which need 5 pages of 4; the KV cache has 4"):
        scheduler.add(make_request("big", 10, 8))
    scheduler.add(make_request("exact", 10, 7))  # 17 tokens, of which the last is never computed
    assert len(scheduler.waiting) == 1


def test_nothing_is_scheduled_beyond_the_token_limit() -> None:
    scheduler = make_scheduler()
    device = StubDevice(scheduler)
    request = make_request("one", 4, 1)
    scheduler.add(request)
    assert device.step().num_tokens == 4
    assert device.step().chunks == []
    assert request.is_finished and not scheduler.has_requests


def test_finish_frees_waiting_and_running_requests_alike() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    running, waiting = make_request("running", 4, 4), make_request("waiting", 4, 4)
    scheduler.add(running)
    scheduler.add(waiting)
    scheduler.schedule()
    assert waiting.status is RequestStatus.WAITING
    scheduler.finish([running, waiting])
    assert not scheduler.has_requests
    assert scheduler.pool.num_free == scheduler.pool.num_usable
    scheduler.check_integrity()


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_pages=st.integers(12, 60),
    max_num_seqs=st.integers(1, 9),
    max_num_batched_tokens=st.integers(9, 40),
)
def test_any_schedule_gives_each_request_what_it_would_get_alone(
    seed: int, num_pages: int, max_num_seqs: int, max_num_batched_tokens: int
) -> None:
    rng = random.Random(seed)
    scheduler = make_scheduler(num_pages, 4, max_num_seqs, max_num_batched_tokens)
    device = StubDevice(scheduler)
    limit = 4 * (num_pages - 1)
    requests: list[Request] = []
    aborted: set[str] = set()
    for _ in range(200):
        if rng.random() < 0.3 and len(requests) < 12:
            num_prompt = rng.randint(1, limit // 2)
            request = make_request(str(len(requests)), num_prompt, rng.randint(1, limit // 2))
            requests.append(request)
            scheduler.add(request)
        live = [r for r in requests if not r.is_finished]
        if live and rng.random() < 0.05:
            victim = rng.choice(live)
            victim.finish("abort")
            aborted.add(victim.request_id)
            scheduler.finish([victim])
        device.step()
    for _ in range(20_000):
        if not scheduler.has_requests:
            break
        device.step()
    assert not scheduler.has_requests, "requests are stuck"
    assert scheduler.pool.num_free == scheduler.pool.num_usable
    for request in requests:
        if request.request_id not in aborted:
            assert request.output_token_ids == expected(request)
