"""Engines beside each other on devices that answer at once: requests are divided, and none is lost."""

import asyncio
import random
import threading
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

TOKEN = 7  # what every step answers
SIZES: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True, "warm_up": False}
SIZES |= {"max_num_seqs": 4, "max_num_batched_tokens": 32, "decode_steps": 1, "max_model_len": 256}
SIZES |= {"kv_cache_memory_bytes": 2**20, "compile_cache_dir": ""}


def answer_at_once(runner: Any) -> None:
    """Takes programs that compute nothing."""
    from pjengine.step import StepOutput

    for layout in runner.layouts():
        answer = StepOutput(jnp.full((layout.depth, layout.num_seqs), TOKEN, jnp.int32))
        runner.use(layout, lambda params, cache, rows, blob, answer=answer: (cache, rows, answer))


def when_called(runner: Any, do: Any) -> None:
    """Has every program do something first."""
    for layout, program in list(runner.programs.items()):

        def run(*arguments: Any, program: Any = program) -> Any:
            do()
            return program(*arguments)

        runner.use(layout, run)


def make_engine() -> Any:
    from pjengine import EngineConfig
    from pjengine.replicas import start_engine

    engine: Any = start_engine(EngineConfig(model="tiny", data_parallel_size=2, **SIZES))
    for own in engine.engines:
        answer_at_once(own.runner)
    return engine


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    engine = make_engine()
    yield engine
    engine.close()


@pytest.fixture
def llm() -> Iterator[Any]:
    from pjengine import AsyncLLM

    llm = AsyncLLM.from_engine(make_engine())
    yield llm
    llm.close()


def exactly(max_tokens: int, **fields: Any) -> Any:
    from pjengine import SamplingParams

    return SamplingParams(ignore_eos=True, max_tokens=max_tokens, **fields)


def loads(engine: Any) -> list[int]:
    return [replica.load for replica in engine._replicas]


def finish(engine: Any) -> None:
    while engine.has_unfinished_requests():
        engine.advance()
    assert loads(engine) == [0, 0] and not engine._places and not engine._forks
    for own in engine.engines:
        own.scheduler.check_integrity()
        assert not own.has_unfinished_requests() and not own.scheduler.has_requests
        assert own.scheduler.pool.num_free == own.scheduler.pool.num_usable


def run_any_requests(engine: Any, seed: int, share_aborted: float, is_sharing: bool) -> None:
    rng = random.Random(seed)
    beginning = rng.choices(range(10, 100), k=64)
    made, aborted = [], set()
    for _ in range(rng.randint(1, 40)):
        if rng.random() < 0.6:
            tokens = beginning[: rng.randint(1, 64)] if is_sharing else []
            prompt = tokens + rng.choices(range(10, 100), k=rng.randint(1, 40))
            generation = engine.prepare(prompt, exactly(rng.randint(1, 20), n=rng.choice([1, 1, 3])))
            cached, before = engine._cached(generation.request), loads(engine)
            engine.submit(generation)
            chosen = generation.request.metrics.engine_index
            assert before[chosen] - min(before) <= cached[chosen]
            made.append(generation)
        elif made and rng.random() < share_aborted:
            generation = rng.choice(made)
            engine.abort_request(generation.request.request_id)
            aborted.add(generation)
        else:
            engine.advance()
    finish(engine)
    for generation in made:
        for completion in generation.completions:
            request = completion.request
            most = request.max_total_tokens - len(request.prompt_token_ids)
            assert request.metrics.engine_index == generation.request.metrics.engine_index
            assert set(request.output_token_ids) <= {TOKEN}
            if request.finish_reason == "length":
                assert len(request.output_token_ids) == most
            else:
                assert request.finish_reason == "abort" and generation in aborted
    engine.reset_prefix_cache()


def test_whatever_comes_and_goes_no_request_is_lost_and_the_load_is_balanced(
    engine: Any, unchecked_types: None
) -> None:
    @settings(max_examples=15, deadline=None)
    @given(seed=st.integers(0, 2**32), share_aborted=st.sampled_from([0, 0.5]), is_sharing=st.booleans())
    def check(seed: int, share_aborted: float, is_sharing: bool) -> None:
        run_any_requests(engine, seed, share_aborted, is_sharing)

    check()


def test_a_prompt_goes_where_its_beginning_is_cached_unless_there_is_more_to_do_than_that_saves(
    engine: Any,
) -> None:
    first, other = [11] * 64, [12] * 64
    placed = [engine.add_request(prompt, exactly(4)).request for prompt in (first, other)]
    assert [request.metrics.engine_index for request in placed] == [0, 1]
    finish(engine)
    again = engine.add_request([*other, 13], exactly(4)).request
    assert (again.metrics.engine_index, loads(engine)) == (1, [0, 5])  # all but a token of it is cached
    engine.add_request([14] * 100, exactly(4))
    assert loads(engine) == [104, 5]
    assert engine.add_request([*first, 13], exactly(4)).request.metrics.engine_index == 1
    finish(engine)
    assert again.num_cached_tokens == 64
    engine.reset_prefix_cache()
    assert engine.add_request([*other, 13], exactly(4)).request.metrics.engine_index == 0
    finish(engine)
    engine.reset_prefix_cache()


def test_what_is_scored_together_stays_together(engine: Any) -> None:
    from pjengine.scoring import prepare_scores

    prepared = prepare_scores(engine, [11] * 40, [[1, 2], [3], [4, 5, 6]])
    for generation in prepared.generations:
        engine.submit(generation)
    assert {own.request.metrics.engine_index for own in prepared.generations} == {0}
    assert loads(engine)[1] == 0
    for own in prepared.generations:
        engine.abort_request(own.request.request_id)
    finish(engine)


def test_an_id_in_use_is_refused_whichever_engine_has_it(engine: Any) -> None:
    engine.add_request([11], exactly(4, n=2), request_id="a")
    for request_id in ("a", "1_a"):
        with pytest.raises(ValueError, match=f"request id '{request_id}' is in use"):
            engine.add_request([11], exactly(4), request_id=request_id)
    engine.advance()  # has the first engine's step under way, or ended
    engine.abort_request("1_a")  # no request, but a continuation
    assert "a" in engine
    engine.abort_request("a")
    again = engine.add_request([11], exactly(4), request_id="a")
    finish(engine)
    assert again.request.finish_reason == "length"


def test_numbers_are_those_of_all_engines(engine: Any) -> None:
    from pjengine.stats import read_own_stats, read_stats

    before = [read_own_stats(own) for own in engine.engines]
    for _ in range(2):
        engine.add_request([11] * 20, exactly(3))
    finish(engine)
    after, both = [read_own_stats(own) for own in engine.engines], read_stats(engine)
    for then, now in zip(before, after, strict=True):
        assert now.num_generation_tokens - then.num_generation_tokens == 3
    assert both.num_generation_tokens == sum(own.num_generation_tokens for own in after)
    assert both.kv_cache_usage == 0 and both.num_running == 0


def test_an_engine_waits_for_no_other(llm: Any) -> None:
    """The first one is in the middle of a step until a request of the second has come and gone."""
    is_going, may_go = threading.Event(), threading.Event()

    def hold() -> None:
        is_going.set()
        assert may_go.wait(60)

    when_called(llm.engine.engines[0].runner, hold)

    async def main() -> None:
        async def run(prompt: list[int], request_id: str) -> Any:
            async for output in llm.generate(prompt, exactly(4), request_id):
                last = output
            return last

        held = asyncio.create_task(run([11] * 80, "held"))
        await asyncio.to_thread(is_going.wait, 60)
        for request_id in ("other", "and another"):
            other = await asyncio.wait_for(run([12] * 8, request_id), 60)
            assert other.metrics.engine_index == 1 and not held.done()
        may_go.set()
        output = await asyncio.wait_for(held, 60)
        assert output.metrics.engine_index == 0 and len(output.outputs[0].token_ids) == 4

    asyncio.run(main())


def test_a_request_can_be_aborted_in_the_middle_of_its_engines_step_and_its_id_used_again(llm: Any) -> None:
    is_going, may_go = threading.Event(), threading.Event()

    def hold() -> None:
        is_going.set()
        assert may_go.wait(60)

    when_called(llm.engine.engines[0].runner, hold)

    async def main() -> None:
        async def run() -> Any:
            async for output in llm.generate([11] * 8, exactly(200), "a"):
                last = output
            return last

        first = asyncio.create_task(run())
        await asyncio.to_thread(is_going.wait, 60)
        await llm.abort("a")
        may_go.set()
        output = await asyncio.wait_for(first, 60)
        assert output.finished and output.outputs[0].finish_reason == "abort"
        is_going.clear()
        may_go.clear()
        left = asyncio.create_task(run())
        await asyncio.to_thread(is_going.wait, 60)
        left.cancel()
        again = asyncio.create_task(run())
        await asyncio.sleep(0)
        may_go.set()
        output = await asyncio.wait_for(again, 60)
        assert output.outputs[0].finish_reason == "length" and len(output.outputs[0].token_ids) == 200

    asyncio.run(main())
    finish(llm.engine)


def fail_once(runner: Any) -> None:
    left = [RuntimeError("the device is on fire")]

    def fail() -> None:
        if left:
            raise left.pop()

    when_called(runner, fail)


def test_a_step_that_fails_ends_the_requests_of_its_engine_alone() -> None:
    engine = make_engine()
    fail_once(engine.engines[0].runner)
    made = [engine.add_request([token] * 8, exactly(9)) for token in (11, 12, 13, 14)]
    with pytest.raises(RuntimeError, match="on fire"):
        while engine.has_unfinished_requests():
            engine.advance()
    assert not engine.is_broken
    late = engine.add_request([15] * 8, exactly(9))
    finish(engine)
    reasons = [own.request.finish_reason for own in made]
    assert reasons == ["abort", "length", "abort", "length"]
    assert (late.request.metrics.engine_index, late.request.finish_reason) == (0, "length")
    engine.close()


def test_the_streams_of_an_engine_whose_step_fails_end_and_the_others_go_on(llm: Any) -> None:
    from pjengine import EngineGenerateError

    fail_once(llm.engine.engines[0].runner)

    async def main() -> None:
        async def run(token: int) -> Any:
            async for output in llm.generate([token] * 8, exactly(100)):
                last = output
            return last.outputs[0].finish_reason

        both: Any = await asyncio.gather(run(11), run(12), return_exceptions=True)
        first, second = both
        assert isinstance(first, EngineGenerateError) and "the device is on fire" in str(first)
        assert second == "length" == await run(13)
        await llm.check_health()

    asyncio.run(main())
    finish(llm.engine)


def test_an_engine_that_can_run_nothing_any_more_ends_all(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pjengine import EngineDeadError

    def fail(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    for own in llm.engine.engines[:1]:
        when_called(own.runner, fail)
        monkeypatch.setattr(own.runner, "reset", fail)

    async def main() -> None:
        with pytest.raises(EngineDeadError, match="the device is gone"):
            async for _ in llm.generate([11] * 8, exactly(4)):
                pass
        with pytest.raises(EngineDeadError):
            await llm.check_health()

    asyncio.run(main())
    assert llm.errored and not llm.is_running


def test_closing_ends_what_runs_on_every_engine() -> None:
    from pjengine import AsyncLLM

    llm = AsyncLLM.from_engine(make_engine())

    async def main() -> None:
        begun = asyncio.Event()

        async def run(token: int) -> Any:
            async for output in llm.generate([token] * 8, exactly(240)):
                begun.set()
                last = output
            return last.outputs[0].finish_reason

        tasks = [asyncio.create_task(run(token)) for token in (11, 12, 13)]
        await begun.wait()
        await asyncio.to_thread(llm.close)
        assert set(await asyncio.gather(*tasks)) <= {"abort", "length"}

    asyncio.run(main())
    assert not any(thread.is_alive() for thread in llm.engine._threads._threads)
    with pytest.raises(RuntimeError, match="these engines are closed"):
        llm.engine.add_request([11], exactly(1))


def test_throughput_is_that_of_all_engines() -> None:
    from pjengine import LLM
    from pjengine.bench import Workload, throughput
    from pjengine.stats import read_own_stats

    with LLM("tiny", data_parallel_size=2, **SIZES) as llm:
        for own in llm.engine.engines:
            answer_at_once(own.runner)
        result = throughput(llm, Workload([[11] * 8] * 6, [5] * 6))
        each = [read_own_stats(own).num_generation_tokens for own in llm.engine.engines]
        assert each == [15, 15] and result["recompiles_after_warmup"] == 0
        assert result["output_tokens_per_s"] == 30 / result["elapsed_s"]
