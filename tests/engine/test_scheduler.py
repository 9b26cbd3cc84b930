"""The scheduler alone, against a device that is a dictionary: no JAX."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pjengine.config import buckets
from pjengine.edits import NEEDS, NO_EDITS, Edits, join_needs
from pjengine.page_pool import PagePool
from pjengine.processors import MAX_CHAINS, Chains
from pjengine.programs import CompilationError
from pjengine.request import Request, RequestStatus
from pjengine.row_table import MAX_END_IDS
from pjengine.sampling_params import SamplingParams
from pjengine.schedule import step_limit
from pjengine.scheduler import Scheduler
from tests.engine.stub_device import StubDevice, expected

MASKED = Edits(has_mask=True)


def make_request(name: str, num_prompt: int, max_tokens: int, **fields: Any) -> Request:
    prompt = fields.setdefault("prompt_token_ids", [1000 * len(name) + i for i in range(num_prompt)])
    return Request(
        request_id=name,
        params=SamplingParams(max_tokens=max_tokens),
        max_total_tokens=len(prompt) + max_tokens,
        eos_token_ids=frozenset(),
        seed=0,
        **fields,
    )


def make_scheduler(
    num_pages: int = 64,
    page_size: int = 4,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 16,
    is_caching: bool = True,
    decode_steps: int = 1,
) -> Scheduler:
    """No pages are spared, so that few make it preempt."""
    limits = (page_size, max_num_seqs, max_num_batched_tokens, is_caching, decode_steps)
    return Scheduler(PagePool(num_pages), *limits, num_spare_pages=0)


def test_decodes_go_first_and_a_long_prompt_is_cut_to_the_budget() -> None:
    scheduler = make_scheduler()
    device = StubDevice(scheduler)
    scheduler.add(make_request("short", 3, 20))
    device.step()
    scheduler.add(make_request("long", 40, 4))
    schedule = device.step()
    assert [request.request_id for request in schedule.decodes.requests] == ["short"]
    assert [(c.request.request_id, c.length, c.is_sampled) for c in schedule.chunks] == [("long", 15, False)]
    assert not schedule.is_decode


def test_decodes_wait_while_prompts_fill_steps_where_these_go_first() -> None:
    scheduler = make_scheduler(num_pages=64, max_num_batched_tokens=16)
    scheduler.prefill_first = True
    device = StubDevice(scheduler)
    scheduler.add(make_request("first", 3, 20))
    device.step()
    for name in ("a", "bb", "ccc"):
        scheduler.add(make_request(name, 14, 4))
    steps = [device.step() for _ in range(4)]
    assert [schedule.num_tokens for schedule in steps[:2]] == [16, 16]
    assert not any(schedule.decodes.requests for schedule in steps[:2])
    # What is left of the prompts does not fill a step: all go on together.
    assert [len(schedule.decodes.requests) for schedule in steps[2:]] == [3, 4]
    assert [chunk.length for chunk in steps[2].chunks] == [10]


def test_decodes_join_prompts_whose_cached_beginning_leaves_them_room() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16)
    scheduler.prefill_first = True
    device = StubDevice(scheduler)
    scheduler.add(make_request("first", 14, 20))
    device.step()
    scheduler.add(make_request("again", 18, 4))  # the same tokens, of which 12 are cached: 6 are left
    schedule = device.step()
    assert [chunk.length for chunk in schedule.chunks] == [6]
    assert [request.request_id for request in schedule.decodes.requests] == ["first"]


@pytest.mark.parametrize("limits", [{"num_pages": 11}, {"max_num_seqs": 1}], ids=["no pages", "no rows"])
def test_decodes_go_on_where_the_prompts_that_go_first_have_no_room(limits: dict[str, Any]) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16, **limits)
    scheduler.prefill_first = True
    device = StubDevice(scheduler)
    first = make_request("first", 17, 12)
    scheduler.add(first)
    device.step()
    device.step()
    for name in ("second", "third"):
        scheduler.add(make_request(name, 24, 4))
    assert [request.request_id for request in device.step().decodes.requests] == ["first"]
    for _ in range(60):
        device.step()
    assert not scheduler.has_requests and first.output_token_ids == expected(first)


@pytest.mark.parametrize(
    ("num_wanted", "num_decodes", "limit"),
    [
        (8192, 0, 8192),  # as many as fit
        (8224, 32, 8192),  # 32 tokens more would be padded by 8160
        (8224, 8200, 16384),  # the decodes alone need it
        (13000, 32, 16384),  # the rest would not be cheaper by itself
        (156, 24, 256),  # a small step costs as much as one twice its size
        (20000, 32, 16384),
        (5, 5, 128),
    ],
)
def test_a_step_takes_what_it_can_without_mostly_padding(
    num_wanted: int, num_decodes: int, limit: int
) -> None:
    assert step_limit(num_wanted, num_decodes, buckets(128, 16384)) == limit


def test_a_prompt_is_cut_where_the_rest_is_cheaper_in_the_next_step() -> None:
    scheduler = make_scheduler(2048, 16, 8, 4096)
    scheduler.mixed_sizes = buckets(32, 4096)
    device = StubDevice(scheduler)
    scheduler.add(make_request("decode", 4, 20))
    device.step()
    scheduler.add(make_request("long", 2050, 4))
    assert [chunk.length for chunk in device.step().chunks] == [2047]
    assert [chunk.length for chunk in device.step().chunks] == [3]


def test_the_latest_request_is_preempted_and_resumes_with_the_same_tokens() -> None:
    scheduler = make_scheduler(num_pages=9, max_num_seqs=4)  # 32 tokens of room
    device = StubDevice(scheduler)
    first, second = make_request("first", 8, 20), make_request("second", 8, 20)
    scheduler.add(first)
    scheduler.add(second)
    while scheduler.has_requests:
        device.step()
    assert first.metrics.num_preemptions == 0
    assert scheduler.num_preemptions == second.metrics.num_preemptions > 0
    assert scheduler.num_prompt_tokens == 16 and scheduler.num_waiting == 0  # each prompt once
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
    assert device.step().num_seqs == 0
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


def run_alone(device: StubDevice, request: Request) -> None:
    device.scheduler.add(request)
    while device.scheduler.has_requests:
        device.step()
    assert request.output_token_ids == expected(request)


def test_a_prompt_seen_before_is_not_computed_again() -> None:
    scheduler = make_scheduler()
    device = StubDevice(scheduler)
    prompt = list(range(10))
    run_alone(device, make_request("first", 10, 4, prompt_token_ids=prompt))
    again = make_request("again", 10, 4, prompt_token_ids=prompt)
    run_alone(device, again)
    assert again.num_cached_tokens == 8  # two full pages of four
    assert (scheduler.num_cache_queries, scheduler.num_cache_hits) == (20, 8)


def test_a_fully_cached_prompt_still_computes_its_last_token() -> None:
    scheduler = make_scheduler()
    device = StubDevice(scheduler)
    run_alone(device, make_request("first", 8, 1, prompt_token_ids=list(range(8))))
    again = make_request("again", 8, 1, prompt_token_ids=list(range(8)))
    run_alone(device, again)
    assert again.num_cached_tokens == 4


def test_generated_tokens_are_cached_for_the_next_turn() -> None:
    scheduler = make_scheduler()
    device = StubDevice(scheduler)
    first = make_request("first", 6, 6)
    run_alone(device, first)
    turn = make_request("turn", 0, 3, prompt_token_ids=first.prompt_token_ids + first.output_token_ids)
    run_alone(device, turn)
    assert turn.num_cached_tokens == 8  # 11 of 12 tokens were computed: two full pages


def test_requests_of_one_step_share_what_the_first_of_them_computes() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=32)
    device = StubDevice(scheduler)
    requests = [make_request(str(i), 0, 4, prompt_token_ids=[*range(8), i]) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    assert device.step().num_tokens == 9 + 1 + 1
    while scheduler.has_requests:
        device.step()
    assert [request.output_token_ids for request in requests] == [expected(request) for request in requests]


@pytest.mark.parametrize("fields", [{"salt": "tenant"}, {"is_cache_read": False}])
def test_a_salt_or_an_opt_out_computes_everything(fields: dict[str, Any]) -> None:
    scheduler = make_scheduler()
    device = StubDevice(scheduler)
    run_alone(device, make_request("first", 10, 4, prompt_token_ids=list(range(10))))
    again = make_request("again", 10, 4, prompt_token_ids=list(range(10)), **fields)
    run_alone(device, again)
    assert again.num_cached_tokens == 0


@pytest.mark.parametrize("is_caching", [False, True])
@pytest.mark.parametrize("num_batched", [16, 64])
def test_continuations_compute_their_prompt_once(is_caching: bool, num_batched: int) -> None:
    scheduler = make_scheduler(num_pages=128, max_num_batched_tokens=num_batched, is_caching=is_caching)
    device = StubDevice(scheduler)
    prompt = list(range(58))
    for round_ in range(2):  # the second group shares nothing with the first
        fork = f"group {round_}"
        first = make_request(
            "first", 0, 6, prompt_token_ids=prompt, fork=fork, salt=fork, is_cache_read=False
        )
        others = [make_request(f"{i}", 0, 6, prompt_token_ids=prompt, fork=fork, salt=fork) for i in range(3)]
        alone = make_request("alone", 0, 6, prompt_token_ids=prompt, is_cache_read=False)
        for request in (first, *others, alone):
            scheduler.add(request)
        lengths = {"group": 0, "alone": 0}
        while scheduler.has_requests:
            for chunk in device.step().chunks:
                lengths["alone" if chunk.request is alone else "group"] += chunk.length
        assert lengths == {"group": 58 + 3 * 2, "alone": 58}  # each its own last page, half full
        for request in (first, *others, alone):
            assert request.output_token_ids == expected(request)
    assert scheduler.pool.num_free == scheduler.pool.num_usable


def test_a_reset_cache_is_empty_and_what_runs_goes_on() -> None:
    scheduler = make_scheduler()
    device = StubDevice(scheduler)
    running = make_request("running", 10, 12, prompt_token_ids=list(range(10)))
    scheduler.add(running)
    device.step()
    scheduler.reset_prefix_cache()
    again = make_request("again", 10, 4, prompt_token_ids=list(range(10)))
    run_alone(device, again)
    assert again.num_cached_tokens == 0
    assert running.output_token_ids == expected(running)


def test_lower_priorities_are_admitted_first_and_preempted_last() -> None:
    scheduler = make_scheduler(num_pages=9, max_num_seqs=4)
    device = StubDevice(scheduler)
    low, high = make_request("low", 8, 20, priority=1), make_request("highest", 8, 20, priority=-1)
    scheduler.add(low)
    scheduler.add(high)
    assert scheduler.waiting == [high, low]
    while scheduler.has_requests:
        device.step()
    assert high.metrics.num_preemptions == 0 < low.metrics.num_preemptions
    assert [low.output_token_ids, high.output_token_ids] == [expected(low), expected(high)]


def test_a_request_whose_program_is_not_ready_waits_and_holds_up_nobody() -> None:
    scheduler = make_scheduler()
    device = StubDevice(scheduler)
    asked: list[tuple[list[int], list[int]]] = []
    ready: list[list[int]] = []

    def can_edit(now: np.ndarray, soon: Callable[[], np.ndarray]) -> bool:
        asked.append((now.tolist(), soon().tolist()))
        return now.tolist() in ready

    scheduler.can_edit = can_edit
    biased, banned = Edits(bias={1: 1.0}), Edits(allowed=(1,))
    both = join_needs(np.array([biased.needs, banned.needs])).tolist()
    first, second = make_request("first", 4, 9, edits=biased), make_request("second", 4, 4, edits=banned)
    plain = make_request("plain", 4, 4)
    for request in (first, second, plain):
        scheduler.add(request)
    assert [chunk.request for chunk in device.step().chunks] == [plain]
    assert asked == [(list(biased.needs), both)] and scheduler.waiting == [first, second]
    ready.append(list(biased.needs))
    assert [chunk.request for chunk in device.step().chunks] == [first]
    assert asked[-1][0] == both  # for the steps that both would be in
    ready.append(both)
    while scheduler.has_requests:
        device.step()
    assert [r.output_token_ids for r in (first, second, plain)] == [
        expected(first),
        expected(second),
        expected(plain),
    ]


def test_a_request_whose_program_cannot_be_made_is_refused_and_nobody_else() -> None:
    scheduler = make_scheduler()
    device = StubDevice(scheduler)

    def can_edit(now: np.ndarray, soon: Callable[[], np.ndarray]) -> bool:
        raise CompilationError("no room")

    scheduler.can_edit = can_edit
    edited, plain = make_request("edited", 4, 9, edits=Edits(allowed=(1,))), make_request("plain", 4, 4)
    scheduler.add(edited)
    scheduler.add(plain)
    schedule = device.step()
    assert schedule.refused == [(edited, "no room")]
    assert [chunk.request for chunk in schedule.chunks] == [plain]
    while scheduler.has_requests:
        assert not device.step().refused
    assert plain.output_token_ids == expected(plain)


def test_more_different_processors_than_a_program_holds_wait_for_each_other() -> None:
    scheduler = make_scheduler(num_pages=256, max_num_seqs=12, max_num_batched_tokens=64)
    device = StubDevice(scheduler)
    asked: list[tuple[int, int]] = []

    def can_edit(now: np.ndarray, soon: Callable[[], np.ndarray], chains: Chains) -> bool:
        asked.append((len(chains.now), len(chains.soon)))
        return True

    scheduler.can_edit = can_edit
    functions = [lambda token_ids, logits, number=number: logits for number in range(MAX_CHAINS + 2)]
    requests = [
        make_request(str(number), 4, 6 + number, edits=Edits(processors=(function,)))
        for number, function in enumerate([*functions, functions[0]])
    ]
    for request in requests:
        scheduler.add(request)
    largest = 0
    while scheduler.has_requests:
        largest = max(largest, len(device.step().chains))
    assert largest == MAX_CHAINS and asked[0] == (1, MAX_CHAINS)
    assert max(asked) == (MAX_CHAINS, MAX_CHAINS)
    assert [r.output_token_ids for r in requests] == [expected(r) for r in requests]


@pytest.mark.parametrize(
    ("first", "two_free", "one_free"),
    [({"processors": (max,)}, [(max,), (min,)], [(max,)]), ({"bias": {1: 1.0}}, [(min,)], [])],
)
def test_programs_are_asked_for_with_the_functions_of_those_that_the_free_rows_are_for(
    first: dict[str, Any], two_free: list[Any], one_free: list[Any]
) -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    device = StubDevice(scheduler)
    asked: list[tuple[int, frozenset[Any]]] = []

    def can_edit(now: np.ndarray, soon: Callable[[], np.ndarray], *chains: Chains) -> bool:
        asked.append((soon()[NEEDS.index("processed")], chains[0].soon if chains else frozenset()))
        return False

    scheduler.can_edit = can_edit
    all_edits = [Edits(**first), Edits(processors=(min,)), Edits(processors=(sum,)), NO_EDITS]
    for number, edits in enumerate(all_edits):
        scheduler.add(make_request(str(number), 4, 9, edits=edits))
    for wanted in (two_free, one_free):
        device.step()
        assert asked[-1] == (len(wanted), frozenset(wanted))


def test_what_only_prompts_need_is_gone_with_the_prompt() -> None:
    scheduler = make_scheduler(decode_steps=4)
    device = StubDevice(scheduler)
    scheduler.add(make_request("one", 4, 20, edits=Edits(num_prompt_logprobs=3)))
    assert device.step().needs.any()
    schedule = device.step()
    assert not schedule.needs.any() and schedule.decodes.lengths.tolist() == [4]


def test_a_step_with_logprobs_of_a_prompt_has_fewer_tokens_and_nobody_starves() -> None:
    scheduler = make_scheduler(num_pages=128, max_num_batched_tokens=64)
    scheduler.max_prompt_logprob_tokens = 16
    device = StubDevice(scheduler)
    listed = Edits(num_prompt_logprobs=3)
    requests = [make_request("a" * (i + 1), 40, 8, edits=listed if i % 2 else NO_EDITS) for i in range(6)]
    for request in requests:
        scheduler.add(request)
    sizes = []
    while scheduler.has_requests:
        schedule = device.step()
        if schedule.needs.any():
            sizes.append(schedule.num_tokens)
    assert max(sizes) == 16 and sum(sizes) >= 3 * 40
    for request in requests:
        assert request.output_token_ids == expected(request)


@pytest.mark.parametrize("window", [None, 64])
def test_a_page_to_grow_into_for_each_row_spares_most_preemptions(window: int | None) -> None:
    num_preemptions = []
    for num_spare_pages in (0, 1):
        scheduler = make_scheduler(
            num_pages=160, max_num_seqs=64, max_num_batched_tokens=128, is_caching=False
        )
        if window is not None:
            few, many = scheduler.pool, PagePool(4 * 160)
            scheduler = replace(scheduler, pool=many, window_pool=few, window=window)
        scheduler.num_spare_pages = num_spare_pages
        device, rng = StubDevice(scheduler), random.Random(0)
        requests = [make_request(str(i), rng.randint(4, 24), rng.randint(4, 40)) for i in range(200)]
        for request in requests:
            scheduler.add(request)
        while scheduler.has_requests:
            device.step()
        assert all(request.output_token_ids == expected(request) for request in requests)
        num_preemptions.append(scheduler.num_preemptions)
    assert num_preemptions[0] > 50 > 10 * num_preemptions[1], num_preemptions


def test_no_page_is_spared_for_rows_that_do_not_grow() -> None:
    scheduler = make_scheduler(num_pages=9, max_num_batched_tokens=64)
    scheduler.num_spare_pages = 1
    for index in range(8):
        scheduler.add(make_request(str(index), 3, 1))
    assert len(scheduler.schedule().chunks) == 8  # in as many pages as there are


def test_what_goes_before_a_row_takes_the_pages_that_are_spared_for_it() -> None:
    scheduler = make_scheduler(num_pages=11)
    scheduler.num_spare_pages = 4
    device = StubDevice(scheduler)
    scheduler.add(make_request("row", 8, 20, priority=1))
    device.step()
    late, urgent = make_request("late", 24, 4, priority=1), make_request("urgent", 24, 4)
    scheduler.add(late)
    device.step()
    assert late.status is RequestStatus.WAITING
    scheduler.add(urgent)
    device.step()
    assert urgent.status is RequestStatus.RUNNING and late.status is RequestStatus.WAITING


def test_a_prompt_takes_pages_from_a_decode_of_lower_priority() -> None:
    scheduler = make_scheduler(num_pages=13, max_num_seqs=4, max_num_batched_tokens=8)  # 48 tokens of room
    device = StubDevice(scheduler)
    low = [make_request(f"low{i}", 5, 12, priority=5) for i in range(3)]
    for request in low:
        scheduler.add(request)
    for _ in range(4):
        device.step()
    high = make_request("high", 24, 8, priority=-1)
    scheduler.add(high)
    while scheduler.has_requests:
        device.step()
    assert high.metrics.num_preemptions == 0 < sum(request.metrics.num_preemptions for request in low)
    for request in (*low, high):
        assert request.output_token_ids == expected(request)


def test_rows_that_decode_alone_get_several_tokens_as_far_as_limit_and_pages_go() -> None:
    scheduler = make_scheduler(num_pages=8, decode_steps=4)  # 28 tokens of room, 4 a page
    device = StubDevice(scheduler)
    short, long = make_request("short", 5, 3), make_request("long", 5, 12)
    scheduler.add(short)
    scheduler.add(long)
    assert device.step().num_tokens == 10
    assert device.step().decodes.lengths.tolist() == [2, 4]  # the last token is never computed
    edited = make_request("edited", 3, 6, edits=Edits(bias={1: 1.0}))
    scheduler.add(edited)
    while scheduler.has_requests:
        schedule = device.step()
        if edited in schedule.decodes.requests or schedule.chunks:
            assert (schedule.decodes.lengths == 1).all()
    for request in (short, long, edited):
        assert request.output_token_ids == expected(request)


def test_tokens_that_end_a_request_are_columns_unless_they_are_many() -> None:
    scheduler = make_scheduler()
    for name, ids in (("none", []), ("few", [5, 6, 7]), ("many", [*range(MAX_END_IDS + 1)])):
        request = make_request(name, 4, 4)
        request.params = SamplingParams(stop_token_ids=ids)
        scheduler.add(request)
    scheduler.schedule()
    table = scheduler.rows
    assert table.is_watched[:3].tolist() == [False, False, True]
    assert [set(ids) - {-1} for ids in table.end_ids[:3].tolist()] == [set(), {5, 6, 7}, set()]


def test_rows_with_a_grammar_decode_in_every_step_and_one_token_at_a_time() -> None:
    scheduler = make_scheduler(decode_steps=3)
    device = StubDevice(scheduler)
    bound, free = make_request("bound", 3, 12, edits=MASKED), make_request("free", 3, 40)
    scheduler.add(bound)
    scheduler.add(free)
    steps = [device.step() for _ in range(16)]
    assert all(step.decodes.lengths.tolist() == [1, 1] for step in steps[1:12])
    assert [[own.request_id for _, own in step.masked] for step in steps] == [["bound"]] * 12 + [[]] * 4
    assert steps[12].decodes.lengths.tolist() == [3]
    while scheduler.has_requests:
        device.step()
    assert bound.output_token_ids == expected(bound) and free.output_token_ids == expected(free)


@pytest.mark.parametrize(
    ("fields", "has_filters"),
    [
        ({"top_k": 3}, True),
        ({"top_p": 0.9}, True),
        ({"min_p": 0.1}, True),
        ({"top_k": -1}, False),
        ({"top_k": 3, "top_p": 0.9, "min_p": 0.1, "temperature": 0.0}, False),  # greedy, whatever else
    ],
)
def test_a_decode_says_whether_any_of_its_rows_has_filters(fields: dict[str, Any], has_filters: bool) -> None:
    scheduler = make_scheduler()
    device = StubDevice(scheduler)
    plain, other = make_request("plain", 3, 6), make_request("other", 3, 3)
    other.params = SamplingParams(max_tokens=3, **fields)
    scheduler.add(plain)
    scheduler.add(other)
    steps = [device.step() for _ in range(5)]
    decodes = [step for step in steps if step.is_decode]
    assert [step.has_filters for step in decodes] == [
        has_filters and other in s.decodes.requests for s in decodes
    ]
    assert {other in step.decodes.requests for step in decodes} == {False, True}
