"""What `explain_schedule` says is what happened: held against schedulers whose every step is looked at."""

import gc
import json
import random
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pjengine import step_log
from pjengine.batching import Layout
from pjengine.page_pool import CACHED as CACHED_PAGE
from pjengine.request import Request
from pjengine.runner import Launched
from pjengine.schedule import Schedule
from pjengine.schedule_plot import plot_batch
from pjengine.schedule_record import ScheduleRecord, explain_schedule
from pjengine.scheduler import Scheduler
from pjengine.step_log import StepLog
from pjengine.step_record import CACHED, SHARED, State
from tests.engine.beam_device import BeamDevice
from tests.engine.test_beam_schedules import make_beams
from tests.engine.test_scheduler import make_request, make_scheduler


class WatchedDevice(BeamDevice):
    """Logs each step as an engine does, and keeps what is true while it runs."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__(scheduler)
        self.log = StepLog()
        self.truth: list[dict[str, list[int]]] = []  # of each step: the pages of each request
        self.cached: list[set[int]] = []

    def run(self, schedule: Schedule) -> list[list[int]]:
        if schedule.num_seqs:
            self.log.add(
                Launched(schedule, Layout(16, 8, 4, is_decode=schedule.is_decode)), self.scheduler, 0.0
            )
            self.truth.append({own.request_id: list(own.pages) for own in self.scheduler.running})
            states = self.scheduler.pool.states
            self.cached.append({page for page, state in enumerate(states) if state == CACHED_PAGE})
        return super().run(schedule)

    def step(self) -> Schedule:
        self.log.turn(0.0)
        with self.log.phase("schedule"):
            return super().step()

    def finish(self, *requests: Request) -> ScheduleRecord:
        for request in requests:
            self.scheduler.add(request)
        while self.scheduler.has_requests:
            self.step()
        return explain_schedule(self.log, self.scheduler)


def check_pages(record: ScheduleRecord, device: WatchedDevice) -> None:
    """Every page of every step is told as it was."""
    first, owners = record.steps[0].number, record.pages()
    ids = [own.request_id for own in record.requests]
    for column in range(len(record.steps)):
        truth = device.truth[first + column]
        held = {name: record.held_pages(ids.index(name), column) for name in truth}
        assert held == truth
        holders: dict[int, list[int]] = {}
        for name, pages in truth.items():
            for page in pages:
                holders.setdefault(page, []).append(ids.index(name))
        for page, own in enumerate(owners[:, column].tolist()):
            wanted = holders.get(page, [])
            if len(wanted) > 1:
                assert own == SHARED
            elif wanted:
                assert own == wanted[0]
            else:
                assert (own == CACHED) == (page in device.cached[first + column])
        assert record.steps[column].num_held_pages == len(holders)


@pytest.mark.parametrize("seed", range(6))
def test_pages_are_told_as_they_were_through_preemption_sharing_and_beams(seed: int) -> None:
    rng = random.Random(seed)
    device = WatchedDevice(make_scheduler(num_pages=23, decode_steps=1 + seed % 2))
    requests = []
    for number in range(8):
        prompt = [7] * rng.randint(0, 12) + [rng.randint(0, 1) for _ in range(rng.randint(1, 12))]
        name, max_tokens = f"r-{number}", rng.randint(2, 18)
        if number % 3 == 0:
            requests.append(make_beams(name, prompt, max_tokens, width=2))
        else:
            requests.append(make_request(name, 0, max_tokens, prompt_token_ids=prompt))
    record = device.finish(*requests)
    check_pages(record, device)
    assert (record.pages() == SHARED).any() and (record.pages() == CACHED).any()
    num_preempted = sum(step.num_preempted for step in record.steps)
    assert sum(own.num_preemptions for own in record.requests) == num_preempted
    total = {own.request_id: own for own in requests}
    for index, own in enumerate(record.requests):
        request = total.get(own.request_id)
        if request is not None and own.num_preemptions == 0 and request.beams is None and seed % 2 == 0:
            assert record.tokens[index].sum() + own.num_cached_tokens == request.max_total_tokens - 1


def test_the_chart_shows_waiting_cached_prefixes_preemption_and_the_late_read() -> None:
    device = WatchedDevice(make_scheduler(num_pages=8, max_num_seqs=2))
    record = device.finish(
        make_request("r-a", 0, 11, prompt_token_ids=[1] * 9),
        make_request("r-b", 0, 9, prompt_token_ids=[1] * 8 + [2]),
        make_request("r-c", 0, 1, prompt_token_ids=[3] * 20),
    )
    assert record.labels() == ["a", "b", "c"]
    assert record.chart().splitlines()[:-1] == [
        "step 0 to 14",
        "   a Pdddddddddd-",
        "   b cdddddddxcxcd",  # twice there is a page for it again, and none for its neighbour's next token
        "   c .............PP",
    ]


def test_only_the_last_steps_are_kept_and_no_request_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_log, "MAX_STEPS", 8)
    monkeypatch.setattr(step_log, "PRUNE", 4)
    device = WatchedDevice(make_scheduler(num_pages=19, max_num_seqs=2))
    requests = [make_request(f"r-{i}", 6, 5) for i in range(10)]
    ended = [weakref.ref(own) for own in requests]
    for _ in range(30):
        if requests:
            device.scheduler.add(requests.pop())
        device.step()
    record = device.finish()
    assert len(record.steps) <= 8 and record.steps[-1].number == device.log.num_steps - 1 > 20
    check_pages(record, device)
    assert len(device.log.admissions) <= 10
    gc.collect()
    assert [own() for own in ended] == [None] * 10


def test_a_run_begins_where_nothing_ran_and_nothing_waited() -> None:
    device = WatchedDevice(make_scheduler())
    device.finish(make_request("r-0", 5, 3))
    record = device.finish(make_request("r-1", 5, 2), make_request("r-2", 5, 4))
    assert [own.request_id for own in record.requests] == ["r-1", "r-2"]
    whole = explain_schedule(device.log, device.scheduler, 100)
    assert [own.request_id for own in whole.requests] == ["r-0", "r-1", "r-2"]
    assert len(explain_schedule(device.log, device.scheduler, 2).steps) == 2
    with pytest.raises(ValueError, match="num_steps must be a whole number, at least 1, got 0"):
        explain_schedule(device.log, device.scheduler, 0)


@pytest.fixture(scope="module")
def tiny() -> Iterator[Any]:
    from pjengine import LLM

    sizes: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "decode_steps": 1}
    with LLM("tiny", load_format="dummy", skip_tokenizer_init=True, warm_up=False, **sizes) as llm:
        yield llm


def generate(llm: Any) -> list[Any]:
    from pjengine import SamplingParams

    prompts = [[1 + i] * (6 + 5 * i) for i in range(6)]
    params = [SamplingParams(temperature=0, max_tokens=3 + i, ignore_eos=True) for i in range(6)]
    return llm.generate(prompts, params, use_tqdm=False)


def test_an_engine_tells_what_it_has_just_run(tiny: Any) -> None:
    with pytest.raises(ValueError, match="there is no step to explain yet"):
        tiny.explain_schedule()
    outputs = generate(tiny)
    record = tiny.explain_schedule()
    assert [own.request_id for own in record.requests] == [own.request_id for own in outputs]
    for own, output, tokens, found in zip(
        record.requests, outputs, record.tokens, record.cached_tokens, strict=True
    ):
        num_output = len(output.outputs[0].token_ids)
        assert own.num_output_tokens == num_output and own.ttft_s == output.metrics.ttft_s
        assert tokens.sum() + found.sum() == len(output.prompt_token_ids) + num_output - 1
    assert (record.states[4:, 0] == State.WAITING).all()  # four rows
    first, last = record.steps[0], record.steps[-1]
    assert first.program == "mixed 32" and last.program.startswith("decode ")
    assert first.num_prefill_tokens == 32 == first.num_padded_tokens
    assert first.launch_s > first.compile_s > 0  # start-up is not counted
    assert all(own.took_s and own.took_s > 0 for own in record.steps)
    number = last.number
    generate(tiny)
    assert tiny.explain_schedule().steps[0].number == number + 1
    with pytest.raises(ValueError, match=r"engine must be in 0\.\.0, got 1"):
        tiny.explain_schedule(engine=1)


@pytest.mark.parametrize("number", ["a", 1.5, True, 0])
def test_numbers_that_are_none_are_refused(tiny: Any, unchecked_types: None, number: Any) -> None:
    with pytest.raises(ValueError, match=f"num_steps must be a whole number, at least 1, got {number!r}$"):
        tiny.explain_schedule(num_steps=number)
    if number:
        with pytest.raises(ValueError, match=rf"engine must be in 0\.\.0, got {number!r}$"):
            tiny.explain_schedule(engine=number)


def test_text_and_json_have_all_steps_and_requests(tiny: Any) -> None:
    generate(tiny)
    record = tiny.explain_schedule()
    assert len(record.table().splitlines()) == 1 + len(record.steps)
    lines = str(record).splitlines()
    assert lines[0] == f"<ScheduleRecord of 6 requests in {len(record.steps)} steps>"
    assert len(lines) == 9 and "d" in lines[2]
    told = json.loads(record.to_json())
    assert [own["number"] for own in told["steps"]] == [own.number for own in record.steps]
    sums = dict.fromkeys([own["request_id"] for own in told["requests"]], 0)
    for part in told["batch"]:
        sums[part["request"]] += part["num_tokens"]
    assert list(sums.values()) == record.tokens.sum(axis=1).tolist()


def test_pictures_have_a_row_for_each_request_and_a_pixel_for_each_page(tiny: Any) -> None:
    generate(tiny)
    record = tiny.explain_schedule()
    batch, tokens, times = record.plot().axes
    assert [own.get_text() for own in batch.get_yticklabels()] == record.labels()
    assert [own.get_text() for own in batch.get_legend().get_texts()][:3] == ["waits", "prefill", "decode"]
    assert tokens.get_ylabel() == "tokens" and times.get_xlabel() == "step"
    [image] = record.plot_pages().axes[0].images
    assert image.get_array().shape == (record.pages().shape[0] - 1, len(record.steps))
    first_token, _ = record.plot_latencies().axes
    assert sum(bar.get_height() for bar in first_token.patches) == 6
    assert record._repr_png_().startswith(b"\x89PNG")


def test_a_wait_for_a_program_is_named_and_flattens_no_other_time(tiny: Any) -> None:
    generate(tiny)
    steps = [replace(own, compile_s=0.0) for own in tiny.explain_schedule().steps]
    record = tiny.explain_schedule()
    plain = plot_batch(record.labels(), steps, record.states, record.tokens, record.cached_tokens)
    steps[2] = replace(steps[2], launch_s=steps[2].launch_s + 60, compile_s=60.0)
    waited = plot_batch(record.labels(), steps, record.states, record.tokens, record.cached_tokens)
    heights = [max(bar.get_height() for bar in figure.axes[2].patches) for figure in (plain, waited)]
    assert heights[0] == pytest.approx(heights[1]) and heights[0] < 60_000
    titles = [figure.axes[2].get_title(loc="right") for figure in (plain, waited)]
    assert titles == ["", "▾ waited for programs to be made: 60.0 s in all"]


def test_without_matplotlib_pictures_name_the_extra(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    generate(tiny)
    record = tiny.explain_schedule()
    for name in [own for own in sys.modules if own.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'pjengine\[notebooks\]'"):
        record.plot()
    assert record._repr_png_() is None


def test_a_step_that_fails_begins_a_new_log_whose_numbers_go_on(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(tiny)
    number = tiny.explain_schedule().steps[-1].number
    with monkeypatch.context() as patch:
        patch.setattr(tiny.engine.runner, "launch", lambda schedule: np.zeros(1) @ np.zeros(2))
        with pytest.raises(ValueError):
            generate(tiny)
    generate(tiny)
    assert tiny.explain_schedule(num_steps=1000).steps[0].number == number + 1
