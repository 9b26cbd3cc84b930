"""Scores and perplexity equal the dense forward, and completions share the pages of their prompt."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.engine.rescheduling import reschedule, settle
from tests.golden import golden as goldens

LONG = np.random.default_rng(5).integers(0, 160, 75).tolist()
OPTIONS = [[3, 1, 4], [15], [9, 2, 6, 5, 3, 5], [8, 9]]


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
    """Log-probabilities of each token of a sequence after those before, [tokens - 1], and the likeliest's."""
    import jax
    import jax.numpy as jnp

    forward = jax.jit(llm.engine.runner.model.forward)

    def logprobs(tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        padded = jnp.asarray([tokens + [0] * (96 - len(tokens))], jnp.int32)
        logits = np.asarray(forward(llm.params, padded))[0, : len(tokens) - 1].astype(np.float64)
        logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        return logits[np.arange(len(tokens) - 1), tokens[1:]], logits.argmax(axis=-1)

    return logprobs


def check(score: Any, dense: Any, prompt: list[int], completion: list[int]) -> None:
    logprobs, best = dense(prompt + completion)
    assert score.token_ids == completion
    np.testing.assert_allclose(score.logprobs, logprobs[len(prompt) - 1 :], atol=1e-4)
    assert score.logprob == pytest.approx(sum(score.logprobs))
    assert score.is_greedy == (best[len(prompt) - 1 :].tolist() == completion)


@pytest.mark.parametrize("is_caching", [True, False], ids=["prefix cache", "no prefix cache"])
def test_completions_are_scored_as_by_the_dense_forward_for_the_cost_of_one_prompt(
    llm: Any, dense: Any, is_caching: bool
) -> None:
    """The prompt comes in chunks: it is longer than a step."""
    engine = llm.engine
    num_pages = engine.runner.config.num_pages
    reschedule(engine, num_pages=num_pages, is_caching=is_caching)
    computed: list[int] = []
    schedule = engine.scheduler.schedule

    def counted() -> Any:
        computed.append((made := schedule()).num_tokens)
        return made

    engine.scheduler.schedule = counted
    [output] = llm.score(LONG, OPTIONS, use_tqdm=False)
    assert output.prompt_token_ids == LONG
    for score, option in zip(output.outputs, OPTIONS, strict=True):
        check(score, dense, LONG, option)
    # Of 75 tokens four pages are shared. The last one has to be computed: the first logprob comes from it.
    assert [score.num_cached_tokens for score in output.outputs] == [0, 64, 64, 64]
    rest = len(LONG) - 64 - 1
    assert sum(computed) == 64 + sum(rest + len(option) for option in OPTIONS)
    settle(engine)


def test_several_prompts_are_scored_beside_requests_that_generate(llm: Any, dense: Any) -> None:
    from pjengine import SamplingParams

    own = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    [alone] = llm.generate([LONG[:20]], own, use_tqdm=False)
    chunks = llm.stream([LONG[:20]], own)
    tokens = next(chunks).token_ids
    prompts, completions = [LONG[:40], LONG[30:34], [7]], [[[1, 2], [3]], [[4] * 40], [[5]]]
    outputs = llm.score(prompts, completions, use_tqdm=False)
    assert tokens + [t for chunk in chunks for t in chunk.token_ids] == alone.outputs[0].token_ids
    for output, prompt, each in zip(outputs, prompts, completions, strict=True):
        for score, completion in zip(output.outputs, each, strict=True):
            check(score, dense, prompt, completion)


def test_a_completion_that_is_preempted_half_way_has_the_same_score(llm: Any, dense: Any) -> None:
    from pjengine import SamplingParams

    engine, prompt, completion = llm.engine, LONG[:50], (LONG * 2)[60:100]
    reschedule(engine, num_pages=8, is_caching=False)  # prompt and completion take all but one
    chunks = llm.stream([LONG[:14]], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    next(chunks)
    [output] = llm.score(prompt, [completion], use_tqdm=False)
    assert engine.scheduler.num_preemptions > 0
    assert sum(len(chunk.token_ids) for chunk in chunks) > 0
    check(output.outputs[0], dense, prompt, completion)
    settle(engine)
    reschedule(engine, is_caching=True)


def test_a_prompt_and_its_completion_may_fill_the_model_to_its_last_position(llm: Any, dense: Any) -> None:
    prompt, completion = LONG[:60], (LONG * 2)[60:96]
    [output] = llm.score(prompt, [completion], use_tqdm=False)
    check(output.outputs[0], dense, prompt, completion)
    with pytest.raises(ValueError, match="60 and 37 tokens, 1 more together than max_model_len=96"):
        llm.score(prompt, [[*completion, 5]])


def test_greedy_continuations_are_known_as_such_and_transformers_agrees(llm: Any) -> None:
    golden = goldens.load("gqa")
    [output] = llm.score([golden.prompt], [[golden.tokens[:8], [*golden.tokens[:7], 0]]], use_tqdm=False)
    assert [score.is_greedy for score in output.outputs] == [True, False]
    logits = golden.last_logits.astype(np.float64)[:3]
    wanted = logits[np.arange(3), golden.prompt[-3:]] - np.log(np.exp(logits).sum(axis=-1))
    [output] = llm.score(golden.prompt[:-3], [golden.prompt[-3:]], use_tqdm=False)
    np.testing.assert_allclose(output.outputs[0].logprobs, wanted, atol=1e-4)


def test_perplexity_in_windows_counts_each_token_once(llm: Any, dense: Any) -> None:
    text = (LONG * 2)[:130]
    windows = [(0, 64), (16, 80), (32, 96), (48, 112), (64, 128), (80, 130)]
    total, end = 0.0, 1
    for begin, stop in windows:  # as transformers' page on perplexity has it
        total += dense(text[begin:stop])[0][end - begin - 1 :].sum()
        end = stop
    whole, short = llm.perplexity([text, LONG], stride=16, max_window=64, use_tqdm=False)
    assert whole.num_tokens == 129 and short.num_tokens == len(LONG) - 1
    assert whole.logprob == pytest.approx(total, abs=1e-3)
    assert whole.perplexity == pytest.approx(np.exp(-total / 129), rel=1e-4)
    [one] = llm.perplexity(LONG, use_tqdm=False)
    assert one.logprob == pytest.approx(dense(LONG)[0].sum(), abs=1e-3)


def test_texts_are_encoded_together_and_divided_where_the_prompts_own_tokens_end(demo: Any) -> None:
    from pjengine.scoring import prepare_scores

    encode = demo.engine.tokenizer.encode
    text, completions = "def f():\n    return ", ["None", "0", "self.x"]
    prepared = prepare_scores(demo.engine, text, completions)
    assert prepared.prompt.text == text and prepared.prompt.token_ids == encode(text)
    for generation, completion in zip(prepared.generations, completions, strict=True):
        found: Any = generation.prompt_logprobs
        assert found.token_ids == encode(text + completion)
        shared = found.token_ids[: found.first]
        assert shared == encode(text)[: found.first] and len(shared) >= len(encode(text)) - 1
    with pytest.raises(ValueError, match="'f' joins its prompt 'de' in one token"):
        demo.score("de", ["f"])
    with pytest.raises(ValueError, match="got token ids as the prompt of 'x'"):
        demo.score([1, 2], ["x"])


def test_logits_that_are_no_numbers_are_an_error_not_a_score(llm: Any) -> None:
    runner = llm.engine.runner
    whole = runner.params
    runner.params = {**whole, "final_norm": whole["final_norm"] * np.float32(np.nan)}
    try:
        with pytest.raises(RuntimeError, match=r"a completion was not scored: .*\(NaN\)"):
            llm.score([1, 2], [[3]], use_tqdm=False)
    finally:
        runner.params = whole
        llm.reset_prefix_cache()
