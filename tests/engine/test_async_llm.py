"""Many tasks, one engine: each gets what it would get alone, and whoever leaves frees its pages."""

import asyncio
import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
PROMPTS = ["def fibonacci(n):\n", "import os\n", "class Stack:\n    ", "for i in range(10):\n    "]
# Few programs, and small: compiling is what these tests would spend their time with.
TINY: dict[str, Any] = {
    "dtype": "float32",
    "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
    "warm_up": False,
}


def params(max_tokens: int = 12, **fields: Any) -> Any:
    from pjengine import SamplingParams

    return SamplingParams(**{"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, **fields})


def settle(llm: Any) -> None:
    """Returns once the engine's thread has made every call that it was asked for."""
    is_done = threading.Event()
    llm._thread.inbox.put(is_done.set)
    assert is_done.wait(30)


def assert_idle(llm: Any) -> None:
    settle(llm)
    scheduler = llm.engine.scheduler
    assert not llm.engine.has_unfinished_requests() and not scheduler.has_requests
    assert not llm._thread._open and not llm._thread._live
    assert scheduler.pool.num_free == scheduler.pool.num_usable
    scheduler.check_integrity()


def mixed_requests() -> list[tuple[str, Any]]:
    """64 of them: greedy and sampled ones, of several lengths."""
    return [
        (PROMPTS[i % 4] + "x" * (i % 7), params(4 + i % 9, temperature=0.8 * (i % 2), seed=i))
        for i in range(64)
    ]


@pytest.fixture(scope="module")
def shared(full_compile: None) -> Iterator[tuple[Any, list[Any]]]:
    """The packaged model, and what `LLM.generate` gives for `mixed_requests` on the same engine."""
    from pjengine import LLM, AsyncLLM

    offline = LLM("demo", **TINY)
    prompts, each = zip(*mixed_requests(), strict=True)
    wanted = offline.generate(prompts, each, use_tqdm=False)
    llm = AsyncLLM.from_engine(offline.engine)
    yield llm, wanted
    llm.close()


@pytest.fixture
def llm(shared: tuple[Any, list[Any]]) -> Iterator[Any]:
    """The packaged model; a test leaves nothing behind."""
    yield shared[0]
    assert_idle(shared[0])


async def collect(outputs: AsyncIterator[Any]) -> list[Any]:
    return [output async for output in outputs]


async def last(outputs: AsyncIterator[Any]) -> Any:
    return (await collect(outputs))[-1]


def run(main: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(main, 60))


def test_64_tasks_get_what_generate_gives(llm: Any, shared: tuple[Any, list[Any]]) -> None:
    async def main() -> list[list[Any]]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(collect(llm.generate(*own))) for own in mixed_requests()]
        return [task.result() for task in tasks]

    for outputs, expected in zip(run(main()), shared[1], strict=True):
        assert outputs[-1].outputs == expected.outputs
        assert outputs[-1].prompt == expected.prompt
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        for before, after in pairwise(outputs):  # each holds those before it
            tokens = before.outputs[0].token_ids
            assert after.outputs[0].token_ids[: len(tokens)] == tokens
            assert after.outputs[0].text.startswith(before.outputs[0].text)


def test_prompts_go_first_where_whole_answers_are_waited_for(demo: Any, gqa_folder: Path) -> None:
    from pjengine import LLM, AsyncLLM

    assert demo.engine.scheduler.prefill_first
    for setting in ({"prefill_first": False}, {"deterministic": True}):
        with LLM(gqa_folder, skip_tokenizer_init=True, **TINY, **setting) as other:
            assert not other.engine.scheduler.prefill_first
    llm = AsyncLLM(gqa_folder, skip_tokenizer_init=True, **TINY)
    assert not llm.engine.scheduler.prefill_first
    llm.close()


def test_a_cumulative_text_never_shows_the_start_of_a_stop_string(llm: Any) -> None:
    text = run(last(llm.generate(PROMPTS[1], params(24)))).outputs[0].text
    stop = text[10:16]
    outputs = run(collect(llm.generate(PROMPTS[1], params(24, stop=stop))))
    end = text.find(stop)
    assert (outputs[-1].outputs[0].text, outputs[-1].outputs[0].stop_reason) == (text[:end], stop)
    assert all(text[:end].startswith(output.outputs[0].text) for output in outputs)


@pytest.mark.parametrize("n", [1, 3])
def test_each_kind_of_output_adds_up_to_the_same(llm: Any, n: int) -> None:
    from pjengine.sampling_params import RequestOutputKind

    async def main() -> None:
        whole, deltas, final = await asyncio.gather(
            *(
                collect(llm.generate(PROMPTS[0], params(n=n, temperature=1, seed=5, output_kind=kind)))
                for kind in RequestOutputKind
            )
        )
        wanted = [(own.text, own.token_ids, "length") for own in whole[-1].outputs]
        assert len(wanted) == n and len(deltas) > 1
        texts, tokens = [""] * n, [list[int]() for _ in range(n)]
        for output in deltas:
            for own in output.outputs:
                texts[own.index] += own.text
                tokens[own.index] += own.token_ids
        assert list(zip(texts, tokens, ["length"] * n, strict=True)) == wanted
        assert [output.finished for output in deltas] == [False] * (len(deltas) - 1) + [True]
        [output] = final
        assert [(own.text, own.token_ids, own.finish_reason) for own in output.outputs] == wanted

    run(main())


@pytest.mark.parametrize("n", [1, 3])
def test_a_consumer_that_comes_late_gets_the_end_with_the_last_tokens(
    llm: Any, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pjengine.sampling_params import RequestOutputKind

    class LateLock:
        """The consumer's thread gets it when the request has ended."""

        def __init__(self, completion: Any) -> None:
            self.request, self.lock = completion.request, completion._lock

        def __enter__(self) -> bool:
            while threading.current_thread() is threading.main_thread() and not self.request.is_finished:
                time.sleep(0.001)
            return self.lock.__enter__()

        def __exit__(self, *error: Any) -> None:
            self.lock.__exit__(*error)

    def prepare(*args: Any, **options: Any) -> Any:
        generation = original(*args, **options)
        for completion in generation.completions:
            completion._lock = LateLock(completion)
        return generation

    original = llm.engine.prepare
    monkeypatch.setattr(llm.engine, "prepare", prepare)
    for kind in RequestOutputKind:
        [output] = run(collect(llm.generate(PROMPTS[0], params(n=n, temperature=1, output_kind=kind))))
        assert output.finished and [own.index for own in output.outputs] == list(range(n))
        assert all(len(own.token_ids) == 12 and own.finish_reason == "length" for own in output.outputs)


def test_leaving_the_loop_frees_the_pages(llm: Any) -> None:
    async def main() -> None:
        async for _ in llm.generate(PROMPTS[0], params(900)):
            break
        while asyncio.all_tasks() - {asyncio.current_task()} or llm._thread._open:
            await asyncio.sleep(0)  # the event loop closes the generator in a task of its own
        assert_idle(llm)

    run(main())


def test_closing_the_generator_frees_the_pages(llm: Any) -> None:
    async def main() -> None:
        async with aclosing(llm.generate(PROMPTS[0], params(900))) as outputs:
            await anext(outputs)
            settle(llm)
            assert llm.engine.has_unfinished_requests()
        assert_idle(llm)

    run(main())


@pytest.mark.parametrize("is_started", [True, False])
def test_cancelling_the_task_frees_the_pages(llm: Any, is_started: bool) -> None:
    async def main() -> None:
        started = asyncio.Event()

        async def consume() -> None:
            async for _ in llm.generate(PROMPTS[0], params(900)):
                started.set()

        task = asyncio.create_task(consume())
        await (started.wait() if is_started else asyncio.sleep(0))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        llm._thread._preparer.submit(int).result()  # what was being tokenized has been handed over
        assert_idle(llm)

    run(main())


def test_an_abort_ends_the_iterator(llm: Any) -> None:
    async def main() -> None:
        outputs = llm.generate(PROMPTS[0], params(900), "mine")
        first = await anext(outputs)
        assert not first.finished
        await llm.abort("mine")
        *_, end = await collect(outputs)
        assert end.finished and end.outputs[0].finish_reason == "abort"
        assert end.outputs[0].token_ids[:1] == first.outputs[0].token_ids[:1]
        assert end.metrics.finished_s >= end.metrics.last_token_s
        await llm.abort("mine")
        await llm.abort("never heard of")

    run(main())


def test_an_abort_before_the_prompt_is_tokenized_gives_an_empty_output(llm: Any) -> None:
    async def main() -> None:
        is_released = threading.Event()
        llm._thread._preparer.submit(is_released.wait)
        task = asyncio.create_task(collect(llm.generate(PROMPTS[0], params(), "mine")))
        await asyncio.sleep(0)
        await llm.abort("mine")
        settle(llm)
        is_released.set()
        [output] = await task
        assert output.outputs[0].finish_reason == "abort" and not output.outputs[0].token_ids
        assert output.metrics.scheduled_s is None and output.metrics.queue_s is None

    run(main())


def test_a_panic_of_the_tokenizer_ends_its_request(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):  # as those of Rust
        pass

    def prepare(*_: Any, **__: Any) -> Any:
        raise Panic("index out of bounds")

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(llm.engine, "prepare", prepare)
            with pytest.raises(RuntimeError, match=r"could not be prepared: Panic.*index out of bounds"):
                await last(llm.generate(PROMPTS[0], params(4)))
        assert len((await last(llm.generate(PROMPTS[0], params(4)))).outputs[0].token_ids) == 4

    run(main())


BAD: list[tuple[Any, dict[str, Any], str]] = [
    ("", {}, "empty"),
    ([5, 10**6], {}, "token id 1000000 is out of the vocabulary"),
    ([1] * 1024, {}, "1024 tokens.*max_model_len=1024"),
    ({"tokens": [1]}, {}, "'tokens'"),
    ([1.5], {}, "whole numbers"),
    ("x", {"priority": 1}, "scheduling_policy"),
]


@pytest.mark.parametrize(("prompt", "options", "message"), BAD, ids=lambda value: str(value)[:20])
def test_bad_input_is_refused_and_others_go_on(
    llm: Any, prompt: Any, options: dict[str, Any], message: str
) -> None:
    async def main() -> None:
        other = asyncio.create_task(last(llm.generate(PROMPTS[0], params(4))))
        with pytest.raises((ValueError, TypeError), match=message):
            await last(llm.generate(prompt, params(), **options))
        assert len((await other).outputs[0].token_ids) == 4

    run(main())


def test_an_id_in_use_is_refused_and_free_again_afterwards(llm: Any) -> None:
    async def main() -> None:
        async with aclosing(llm.generate(PROMPTS[0], params(900), "mine")) as outputs:
            await anext(outputs)
            with pytest.raises(ValueError, match="'mine' is in use"):
                await last(llm.generate(PROMPTS[1], params(), "mine"))
            assert not (await anext(outputs)).finished
        again = await last(llm.generate(PROMPTS[1], params(3), "mine"))
        assert (again.request_id, len(again.outputs[0].token_ids)) == ("mine", 3)

    run(main())


def test_a_failed_step_raises_where_its_requests_wait_and_later_ones_run(
    llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pjengine import EngineGenerateError

    async def main() -> None:
        tasks = [asyncio.create_task(collect(llm.generate(prompt, params(900)))) for prompt in PROMPTS]
        await asyncio.sleep(0)
        llm._thread._preparer.submit(int).result()  # all four are tokenized
        settle(llm)  # two run, two are in the queue
        runner = llm.engine.runner
        launch = runner.launch

        def fail(*_: Any) -> None:
            monkeypatch.setattr(runner, "launch", launch)
            raise MemoryError("the device is full")

        monkeypatch.setattr(runner, "launch", fail)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for error in results:
            assert isinstance(error, EngineGenerateError) and isinstance(error.__cause__, MemoryError)
            assert "the device is full" in str(error)
        assert len({id(error) for error in results}) == len(PROMPTS)
        assert llm.is_running and not llm.errored
        await llm.check_health()
        assert len((await last(llm.generate(PROMPTS[0], params(5)))).outputs[0].token_ids) == 5

    run(main())


def test_two_event_loops_in_two_threads(llm: Any) -> None:
    wanted = [run(last(llm.generate(prompt, params()))).outputs for prompt in PROMPTS]
    results: dict[int, list[Any]] = {}

    async def main(which: int) -> None:
        both = asyncio.gather(*[last(llm.generate(prompt, params())) for prompt in PROMPTS])
        results[which] = [output.outputs for output in await both]

    threads = [threading.Thread(target=lambda i=i: run(main(i))) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {0: wanted, 1: wanted}


def test_the_prefix_cache_is_reset_between_two_steps(llm: Any) -> None:
    async def main() -> list[int]:
        from pjengine import SamplingParams

        prompt, own = "import os\n" * 20, SamplingParams(max_tokens=2, temperature=0)
        cached = []
        for is_reset in (True, False, True):
            if is_reset:
                await llm.reset_prefix_cache()
            cached.append((await last(llm.generate(prompt, own))).num_cached_tokens)
        return cached

    first, second, third = run(main())
    assert first == third == 0 < second


def test_a_slow_consumer_gets_the_newest_output(llm: Any) -> None:
    async def main() -> None:
        wanted = (await last(llm.generate(PROMPTS[0], params(40)))).outputs
        outputs = llm.generate(PROMPTS[0], params(40))
        first = await anext(outputs)
        while llm.engine.has_unfinished_requests():  # and this event loop stands still
            settle(llm)
        rest = await collect(outputs)
        assert len(first.outputs[0].token_ids) < 40
        assert [output.finished for output in rest] == [True] and rest[0].outputs == wanted

    run(main())


def test_requests_run_in_order_of_arrival(llm: Any) -> None:
    async def main() -> None:
        # Long prompts take longer to tokenize; they keep their place all the same.
        prompts = [PROMPTS[i % 4] * (40 if i % 3 == 0 else 1) for i in range(12)]
        each = await asyncio.gather(*[last(llm.generate(prompt, params(3))) for prompt in prompts])
        arrivals = [output.metrics.arrival_s for output in each]
        starts = [output.metrics.scheduled_s for output in each]
        assert arrivals == sorted(arrivals) and starts == sorted(starts)

    run(main())


def test_metrics_follow_each_other(llm: Any) -> None:
    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(last(llm.generate(p, params(6)))) for p in PROMPTS * 3]
        for metrics in (task.result().metrics for task in tasks):
            times = [
                metrics.arrival_s,
                metrics.scheduled_s,
                metrics.first_token_s,
                metrics.last_token_s,
                metrics.finished_s,
            ]
            assert times == sorted(times)
            assert metrics.num_generation_tokens == 6 and metrics.num_preemptions == 0
            assert metrics.decode_s == metrics.last_token_s - metrics.first_token_s > 0
            assert metrics.tpot_s == pytest.approx(metrics.decode_s / 5)
            assert metrics.ttft_s == pytest.approx(metrics.queue_s + metrics.prefill_s)
            assert metrics.ttft_s + metrics.decode_s <= metrics.e2e_s + 1e-9
        one = await last(llm.generate(PROMPTS[0], params(1)))
        assert one.metrics.tpot_s is None and one.metrics.decode_s == 0

    run(main())


@pytest.mark.parametrize("is_signalled", [False, True])
def test_an_event_loop_that_went_away_leaves_no_request(llm: Any, is_signalled: bool) -> None:
    loop = asyncio.new_event_loop()
    outputs = llm.generate(PROMPTS[0], params(900), "orphan")
    loop.run_until_complete(anext(outputs))
    while is_signalled and not llm._thread._open["orphan"].is_signalled:
        settle(llm)
    loop.close()
    while "orphan" in llm._thread._open:
        settle(llm)
    assert_idle(llm)


def test_close_ends_what_runs_and_refuses_the_rest(gqa_folder: Path) -> None:
    from pjengine import AsyncLLM, EngineDeadError

    async def main() -> None:
        async with AsyncLLM(gqa_folder, skip_tokenizer_init=True, **{**TINY, "max_num_seqs": 1}) as llm:
            outputs = [llm.generate([1, 2, 3], params(100)) for _ in range(4)]
            await anext(outputs[0])
            tasks = [asyncio.create_task(collect(own)) for own in outputs]
            await asyncio.sleep(0)
            llm._thread._preparer.submit(int).result()  # all four are tokenized
            is_released = threading.Event()
            llm._thread._preparer.submit(is_released.wait)
            late = asyncio.create_task(collect(llm.generate([4], params())))
            await asyncio.sleep(0)
            closing = asyncio.create_task(asyncio.to_thread(llm.close))
            with pytest.raises(EngineDeadError, match="closed"):
                while True:
                    await llm.check_health()
                    await asyncio.sleep(0)
            is_released.set()
            with pytest.raises(EngineDeadError, match="closed"):
                await late
            for results in await asyncio.gather(*tasks):
                assert results[-1].finished and results[-1].outputs[0].finish_reason == "abort"
            await closing
            with pytest.raises(EngineDeadError, match="closed"):
                await anext(llm.generate([1]))
        llm.close()
        assert not llm.is_running and not llm.errored

    run(main())


def test_an_engine_that_cannot_start_over_is_dead(gqa_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pjengine import AsyncLLM, EngineDeadError

    def fail(*_: Any) -> None:
        raise RuntimeError("the device has fallen off the bus")

    async def main() -> None:
        async with AsyncLLM(gqa_folder, skip_tokenizer_init=True, **TINY) as llm:
            monkeypatch.setattr(llm.engine.runner, "launch", fail)
            monkeypatch.setattr(llm.engine.runner, "reset", fail)
            tasks = [collect(llm.generate([1, 2, 3], params())) for _ in range(4)]
            for error in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(error, EngineDeadError) and "off the bus" in str(error.__cause__)
            assert llm.errored and not llm.is_running
            with pytest.raises(EngineDeadError, match="off the bus"):
                await llm.check_health()

    run(main())


def test_without_references_the_engine_ends(gqa_folder: Path) -> None:
    from pjengine import AsyncLLM

    llm = AsyncLLM(gqa_folder, skip_tokenizer_init=True, **TINY)
    thread, runner = llm._thread._thread, weakref.ref(llm.engine.runner)
    del llm
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()
    gc.collect()
    assert runner() is None


def test_the_interpreter_exits_without_close(gqa_folder: Path) -> None:
    script = f"""
import asyncio
from pjengine import AsyncLLM, SamplingParams

idle, busy = [
    AsyncLLM({str(gqa_folder)!r}, skip_tokenizer_init=True, **{TINY}, kv_cache_memory_bytes=2**20)
    for _ in range(2)
]
loop = asyncio.new_event_loop()
outputs = busy.generate([1, 2, 3], SamplingParams(max_tokens=100, ignore_eos=True))
print(loop.run_until_complete(anext(outputs)).outputs[0].token_ids)
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0 and ended.stdout.startswith("["), ended.stderr
    assert "Traceback" not in ended.stderr and "Fatal" not in ended.stderr, ended.stderr
