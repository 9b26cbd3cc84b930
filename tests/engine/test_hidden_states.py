"""Hidden states and embeddings of prompts: in chunks, pooled, beside other requests, preempted, in order."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.engine.rescheduling import reschedule, settle
from tests.golden import golden as goldens

LONG = np.random.default_rng(5).integers(0, 160, 75).tolist()


@pytest.fixture(scope="module")
def llm(gqa_folder: Any) -> Iterator[Any]:
    from pjengine import LLM

    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "max_model_len": 96}
    with LLM(gqa_folder, dtype="float32", warm_up=False, skip_tokenizer_init=True, **sizes) as llm:
        yield llm
        assert not llm.engine.has_unfinished_requests()
        llm.engine.scheduler.check_integrity()


@pytest.fixture(scope="module")
def dense(llm: Any) -> Any:
    """All hidden states of a sequence, [layers + 1, tokens, width]."""
    import jax
    import jax.numpy as jnp

    from pjengine.models.attention import dense_attend
    from pjengine.models.kept_states import KeptStates

    model = llm.engine.runner.model
    numbers = jnp.arange(model.config.num_layers + 1, dtype=jnp.int32)
    positions = jnp.arange(96, dtype=jnp.int32)

    @jax.jit
    def forward(params: Any, tokens: Any) -> Any:
        room = KeptStates.empty(numbers, model.config, 96, model.dtype)
        result = model.run_keeping(params, tokens, positions, positions + 1, None, dense_attend, room)
        return result[2].wanted

    def states(tokens: list[int]) -> np.ndarray:
        padded = jnp.asarray(tokens + [0] * (96 - len(tokens)), jnp.int32)
        return np.asarray(forward(llm.params, padded))[:, : len(tokens)]

    return states


def params(layers: Any = (-1,), pooling: str | None = None, **fields: Any) -> Any:
    from pjengine import HiddenStatesParams, SamplingParams

    wanted = HiddenStatesParams(layers=layers, pooling=pooling)
    return SamplingParams(**{"temperature": 0, "max_tokens": 1, "hidden_states": wanted, **fields})


def states(llm: Any, prompts: Any, own: Any) -> list[np.ndarray]:
    return [output.hidden_states for output in llm.generate(prompts, own, use_tqdm=False)]


def test_states_of_chosen_layers_equal_those_of_transformers_whatever_the_chunks(llm: Any) -> None:
    golden = goldens.load("gqa")
    with np.load(goldens.FOLDER / "hidden_states.npz") as file:
        wanted = file["gqa"]
    num_layers = len(wanted) - 1
    for _ in range(2):  # the prefix cache has pages now, and is not read
        [found] = states(llm, [golden.prompt], params((0, -1, 1, -num_layers)))
        assert found.dtype == np.float32 and found.shape[:2] == (4, len(golden.prompt))
        np.testing.assert_allclose(found[:, -4:], wanted[[0, -1, 1, 1], :4], atol=2e-4, rtol=2e-4)
        np.testing.assert_array_equal(found[2], found[3])


def test_pooled_states_are_the_mean_and_the_last_of_all(llm: Any, dense: Any) -> None:
    prompts = [LONG, LONG[:33], LONG[40:47], [5]]
    for layers in ((-1, 0), (1,)):
        means = states(llm, prompts, params(layers, "mean"))
        lasts = states(llm, prompts, params(layers, "last"))
        for prompt, mean, last in zip(prompts, means, lasts, strict=True):
            wanted = dense(prompt)[list(layers)]
            np.testing.assert_allclose(mean, wanted.mean(axis=1), atol=2e-4)
            np.testing.assert_allclose(last, wanted[:, -1], atol=2e-4)


def test_the_last_state_alone_reads_the_prefix_cache(llm: Any, dense: Any) -> None:
    llm.reset_prefix_cache()
    first, again = (llm.generate([LONG], params((-1,), "last"), use_tqdm=False)[0] for _ in range(2))
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 64)
    np.testing.assert_allclose(again.hidden_states[0], dense(LONG)[-1, -1], atol=2e-4)
    [mean] = llm.generate([LONG], params((-1,), "mean"), use_tqdm=False)
    assert mean.num_cached_tokens == 0


def test_different_wishes_run_beside_each_other_and_beside_those_without(llm: Any, dense: Any) -> None:
    """Those of other layers never share a step."""
    from pjengine import SamplingParams

    plain = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    [alone] = llm.generate([LONG[:20]], plain, use_tqdm=False)
    own = [
        plain,
        params((0, 1), None, max_tokens=5),
        params((-1,), "mean", prompt_logprobs=0),
        params((0, 1), "last"),
        params((-1,), "mean", n=2, temperature=1.0, max_tokens=3, seed=1),
        plain,
    ]
    prompts = [LONG[:20], LONG[5:50], LONG[:60], LONG[:45], LONG[7:45], LONG[:20]]
    kept = []
    schedule = llm.engine.scheduler.schedule

    def watched() -> Any:
        made = schedule()
        asking = [
            c for c in made.chunks if c.request.edits.layers and c.start < len(c.request.prompt_token_ids)
        ]
        kept.append({chunk.request.edits.layers for chunk in asking})
        return made

    llm.engine.scheduler.schedule = watched
    try:
        outputs = llm.generate(prompts, own, use_tqdm=False)
    finally:
        del llm.engine.scheduler.schedule
    assert max(map(len, kept)) == 1 and len(set.union(*kept)) == 2
    for output in (outputs[0], outputs[-1]):
        assert output.outputs[0].token_ids == alone.outputs[0].token_ids and output.hidden_states is None
    wanted = [dense(prompt) for prompt in prompts]
    np.testing.assert_allclose(outputs[1].hidden_states, wanted[1][:2], atol=2e-4)
    np.testing.assert_allclose(outputs[2].hidden_states, wanted[2][-1:].mean(axis=1), atol=2e-4)
    np.testing.assert_allclose(outputs[3].hidden_states, wanted[3][:2, -1], atol=2e-4)
    np.testing.assert_allclose(outputs[4].hidden_states, wanted[4][-1:].mean(axis=1), atol=2e-4)
    assert len(outputs[2].prompt_logprobs) == 60 and len(outputs[4].outputs) == 2


@pytest.mark.parametrize("pooling", [None, "mean", "last"])
def test_a_prompt_that_is_preempted_half_way_has_the_same_states(
    llm: Any, dense: Any, pooling: str | None
) -> None:
    from pjengine import SamplingParams

    engine, prompt = llm.engine, (LONG * 2)[3:93]
    reschedule(engine, num_pages=8)  # the prompt takes all but one
    chunks = llm.stream([LONG[:14]], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    next(chunks)
    [found] = states(llm, [prompt], params((-1,), pooling))
    assert engine.scheduler.num_preemptions > 0
    assert sum(len(chunk.token_ids) for chunk in chunks) > 0
    every = dense(prompt)[-1:]
    wanted = {None: every, "mean": every.mean(axis=1), "last": every[:, -1]}[pooling]
    np.testing.assert_allclose(found, wanted, atol=2e-4)
    settle(engine)
    reschedule(engine)


def test_chunks_under_way_when_a_prompt_is_preempted_do_not_count() -> None:
    from pjengine.hidden_states import PromptStates, StateArrays

    every = np.random.default_rng(1).normal(size=(2, 8, 3)).astype(np.float32)
    for pooling in (None, "mean", "last"):
        own = PromptStates(8, [1, 0], pooling)
        for start, end in ((0, 3), (3, 6), (0, 5), (3, 6), (5, 8), (0, 4)):
            part = every[:, start:end]
            pooled = (part.sum(axis=1) if pooling == "mean" else part[:, -1])[:, None]
            assert (own.result() is not None) == ((start, end) == (0, 4))
            own.put(start, end - start, StateArrays(pooled, np.pad(part, ((0, 0), (2, 1), (0, 0)))), 0, 2)
        wanted = {None: every, "mean": every.mean(axis=1), "last": every[:, -1]}[pooling]
        found: Any = own.result()
        np.testing.assert_allclose(found, wanted[::-1], rtol=1e-5)


def test_outputs_of_what_is_new_hold_the_states_once(llm: Any) -> None:
    from pjengine import RequestOutputKind

    for kind, counts in ((RequestOutputKind.DELTA, [1, 0, 0]), (RequestOutputKind.CUMULATIVE, [1, 1, 1])):
        own = params((0,), "mean", max_tokens=3, output_kind=kind, ignore_eos=True)
        llm.engine.add_request(LONG[:40], own)
        found = []
        while llm.engine.has_unfinished_requests():
            found += llm.engine.step()
        assert [int(output.hidden_states is not None) for output in found] == counts


def test_embeddings_are_pooled_states_of_length_one(llm: Any, dense: Any) -> None:
    prompts = [LONG, LONG[:9]]
    last, mean, raw = (
        llm.encode(prompts, use_tqdm=False),
        llm.encode(prompts, pooling="mean", use_tqdm=False),
        llm.encode(prompts, pooling="mean", layer=1, normalize=False, use_tqdm=False),
    )
    for i, prompt in enumerate(prompts):
        every = dense(prompt)
        for found, wanted in ((last[i], every[-1, -1]), (mean[i], every[-1].mean(axis=0))):
            assert found.prompt_token_ids == prompt and found.embedding.dtype == np.float32
            np.testing.assert_allclose(found.embedding, wanted / np.linalg.norm(wanted), atol=1e-4)
        np.testing.assert_allclose(raw[i].embedding, every[1].mean(axis=0), atol=2e-4)
    [cut] = llm.encode([LONG], truncate_prompt_tokens=9, use_tqdm=False)
    assert cut.prompt_token_ids == LONG[-9:]


def test_a_state_that_is_no_number_stays_with_its_prompt(llm: Any, dense: Any) -> None:
    """Token 3 is broken: the prompt that has it fails, and those in the same steps do not notice."""
    runner = llm.engine.runner
    good, whole = [token for token in LONG if token != 3], runner.params
    embed = whole["embed"].at[3].set(np.nan)
    runner.params = {**whole, "embed": embed, "head": whole["head"]}
    try:
        outputs = llm.generate([good[:9], [1, 3], good[9:20]], params((-1,), "mean"), use_tqdm=False)
        with pytest.raises(RuntimeError, match=r"has no embedding: .*\(NaN\)"):
            llm.encode([good[:9], [1, 3]], use_tqdm=False)
    finally:
        runner.params = whole
        llm.reset_prefix_cache()
    assert outputs[1].outputs[0].finish_reason == "error" and np.isnan(outputs[1].hidden_states).all()
    for output in (outputs[0], outputs[2]):
        wanted = dense(output.prompt_token_ids)[-1:].mean(axis=1)
        np.testing.assert_allclose(output.hidden_states, wanted, atol=2e-4)


def test_a_step_keeps_no_more_states_than_there_is_room_for_and_nobody_starves() -> None:
    from pjengine.edits import NO_EDITS, Edits
    from tests.engine.stub_device import StubDevice, expected
    from tests.engine.test_scheduler import make_request, make_scheduler

    scheduler = make_scheduler(num_pages=128, max_num_batched_tokens=64)
    scheduler.mixed_sizes, scheduler.max_states = (8, 16, 32, 64), 64
    device = StubDevice(scheduler)
    wishes = [NO_EDITS, Edits(layers=(0, 1, 2)), Edits(layers=(4,), pooling="mean"), Edits(layers=(0, 1, 2))]
    requests = [make_request("a" * (i + 1), 40, 8, edits=wishes[i % 4]) for i in range(8)]
    for request in requests:
        scheduler.add(request)
    while scheduler.has_requests:
        schedule = device.step()
        asking = [c for c in schedule.chunks if c.request.edits.layers and c.start < 40]
        assert len({chunk.request.edits.layers for chunk in asking}) <= 1
        for chunk in asking:
            # Three layers have the room of four.
            assert schedule.num_tokens <= (16 if len(chunk.request.edits.layers) == 3 else 64)
    for request in requests:
        assert request.output_token_ids == expected(request)


def test_steps_without_such_requests_run_programs_that_know_nothing_of_them(llm: Any) -> None:
    from pjengine import SamplingParams

    asked, stages_for = [], llm.engine.runner.stages_for

    def noted(wanted: Any) -> Any:
        asked.append(wanted)
        return stages_for(wanted)

    llm.engine.runner.stages_for = noted
    try:
        llm.generate([LONG[:40]], params((0,)), use_tqdm=False)
        assert {stages.model.num_states for stages in asked if not stages.model.is_decode} == {1}
        asked.clear()
        llm.generate([LONG[:40]], SamplingParams(max_tokens=4), use_tqdm=False)
    finally:
        del llm.engine.runner.stages_for
    assert asked and all(s.draw is None and s.model.num_states == 0 for s in asked)
