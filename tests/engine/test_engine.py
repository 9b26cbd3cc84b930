"""Requests together give what each gives alone; nothing leaks; a failure leaves a usable engine."""

import gc
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest


def open_llm(folder: Path, **sizes: Any) -> Any:
    from pjengine import LLM

    defaults = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "warm_up": False,
        "skip_tokenizer_init": True,
    }
    return LLM(folder, dtype="float32", **{**defaults, **sizes})


def make_requests(num: int, vocab_size: int) -> tuple[list[list[int]], list[Any]]:
    """Mixed lengths; every second one greedy, the others sampled with a seed and filters."""
    from pjengine import SamplingParams

    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, vocab_size, int(rng.integers(1, 40))).tolist() for _ in range(num)]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 11},
        {"temperature": 0.8, "seed": 12, "top_k": 20},
        {"temperature": 1.2, "seed": 13, "top_p": 0.9, "min_p": 0.02},
    ]
    lens = rng.integers(1, 30, num)
    params = [
        SamplingParams(max_tokens=int(length), ignore_eos=True, **kinds[i % len(kinds)])
        for i, length in enumerate(lens)
    ]
    return prompts, params


def kv_bytes(llm: Any, num_tokens: int) -> int:
    """What `num_tokens` take, and the null page."""
    config = llm.engine.runner.config
    pages = -(-num_tokens // config.page_size) + 1
    return pages * llm.engine.memory_plan.page_bytes


@pytest.mark.slow
def test_64_requests_through_a_quarter_of_the_pages_equal_each_alone(
    gqa_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pjengine.step.FEW", 8)  # steps of both kinds
    with open_llm(gqa_folder, max_num_seqs=64, max_num_batched_tokens=64, max_model_len=80) as llm:
        prompts, params = make_requests(64, llm.engine.model_config.vocab_size)
        alone = [
            llm.generate([prompt], own, use_tqdm=False)[0].outputs[0].token_ids
            for prompt, own in zip(prompts, params, strict=True)
        ]
        pages = [-(-(len(p) + s.max_tokens - 1) // 16) for p, s in zip(prompts, params, strict=True)]
        quarter = kv_bytes(llm, sum(pages) * 16 // 4)
    sizes = {"max_num_seqs": 64, "max_num_batched_tokens": 64, "max_model_len": 80}
    for decode_steps in (1, 5):
        settings = {"kv_cache_memory_bytes": quarter, "decode_steps": decode_steps, **sizes}
        with open_llm(gqa_folder, **settings) as llm:
            assert llm.engine.runner.config.num_pages - 1 <= sum(pages) // 4
            llm.engine.scheduler.num_spare_pages = 0
            outputs = llm.generate(prompts, params, use_tqdm=False)
            assert [output.outputs[0].token_ids for output in outputs] == alone
            assert sum(output.metrics.num_preemptions for output in outputs) > 0, "the pool was too large"
            scheduler = llm.engine.scheduler
            scheduler.check_integrity()
            assert scheduler.pool.num_free == scheduler.pool.num_usable


def test_what_ends_among_several_tokens_of_one_launch_ends_there(demo: Any) -> None:
    from pjengine import LLM, SamplingParams

    prompt = "def add(a, b):"
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 40}
    (plain,) = demo.generate(prompt, SamplingParams(**greedy), use_tqdm=False)
    text, ids = plain.outputs[0].text, plain.outputs[0].token_ids
    wanted = [
        SamplingParams(**greedy),
        SamplingParams(**greedy, stop=text[9:14]),
        SamplingParams(**greedy, stop_token_ids=[ids[6]]),
        SamplingParams(**{**greedy, "max_tokens": 11}),
        SamplingParams(temperature=1.0, seed=5, max_tokens=40),  # meets the end of the text
    ]
    alone = [demo.generate(prompt, params, use_tqdm=False)[0].outputs[0] for params in wanted]
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "warm_up": False}
    with LLM("demo", dtype="float32", decode_steps=8, **sizes) as llm:
        outputs = llm.generate([prompt] * len(wanted), wanted, use_tqdm=False)
    for output, own in zip(outputs, alone, strict=True):
        got = output.outputs[0]
        assert (got.text, got.token_ids) == (own.text, own.token_ids)
        assert (got.finish_reason, got.stop_reason) == (own.finish_reason, own.stop_reason)


def test_nothing_is_compiled_after_warm_up(gqa_folder: Path) -> None:
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 80, "warm_up": True}
    with open_llm(gqa_folder, **sizes) as llm:
        prompts, params = make_requests(20, llm.engine.model_config.vocab_size)
        llm.generate(prompts, params, use_tqdm=False)
        runner = llm.engine.runner
        runner.wait_until_warm()
        assert runner.recompiles_after_warmup == 0
        assert set(runner.programs) == set(runner.layouts())


@pytest.mark.slow
def test_five_cycles_of_create_and_close_return_the_memory(gqa_folder: Path) -> None:
    def live_bytes() -> int:
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    sizes = []
    for _ in range(6):
        with open_llm(gqa_folder, max_num_seqs=2, max_num_batched_tokens=16) as llm:
            llm.generate([[1, 2, 3]], use_tqdm=False)
            assert live_bytes() > llm.engine.memory_plan.kv_bytes
        del llm
        sizes.append(live_bytes())
    assert len(set(sizes[1:])) == 1, sizes  # the first cycle may leave constants of JAX's own


@pytest.mark.gpu
def test_five_cycles_return_the_memory_of_the_gpu(gqa_folder: Path) -> None:
    in_use = []
    for _ in range(6):
        with open_llm(gqa_folder, max_num_seqs=2, max_num_batched_tokens=16) as llm:
            llm.generate([[1, 2, 3]], use_tqdm=False)
            kv = llm.engine.memory_plan.kv_bytes
        del llm
        gc.collect()
        stats = jax.devices()[0].memory_stats()
        assert stats is not None
        in_use.append(stats["bytes_in_use"])
    assert max(in_use[1:]) - min(in_use[1:]) < kv / 100, in_use


def test_a_closed_llm_says_so(gqa_folder: Path) -> None:
    llm = open_llm(gqa_folder)
    llm.close()
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate([[1]])


BAD_PROMPTS = [
    ([], "empty"),
    ("text", "needs a tokenizer"),
    (list(range(80)), "80 tokens.*max_model_len=80"),
    ([5, 10_000], "token id 10000 is out of the vocabulary"),
    ([5, -1], "token id -1 is out of the vocabulary"),
    ({"prompt_token_ids": []}, "empty"),
    ({"tokens": [1]}, "'tokens'"),
    ({}, "nothing"),
    ([1.5], "whole numbers"),
    ([[1, 2], [3]], "whole numbers"),
]


@pytest.fixture(scope="module")
def llm(gqa_folder: Path) -> Any:
    with open_llm(gqa_folder, max_model_len=80) as llm:
        yield llm


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS, ids=lambda v: str(v)[:30])
def test_a_bad_prompt_is_refused_and_its_batch_leaves_nothing_behind(
    llm: Any, prompt: Any, message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        llm.generate([[1, 2, 3], prompt], use_tqdm=False)
    assert not llm.engine.has_unfinished_requests() and not llm.engine.scheduler.has_requests
    [output] = llm.generate([[1, 2, 3]], use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 16


def test_the_longest_prompt_that_fits_gets_one_token(llm: Any) -> None:
    [output] = llm.generate([[1] * 79], use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 1
    assert output.outputs[0].finish_reason == "length"


def test_params_must_be_one_or_one_each(llm: Any) -> None:
    from pjengine import SamplingParams

    with pytest.raises(ValueError, match="one for each of the 3 prompts, got 2"):
        llm.generate([[1], [2], [3]], [SamplingParams()] * 2)
    outputs = llm.generate(
        [[1], [2]], [SamplingParams(max_tokens=2), SamplingParams(max_tokens=3)], use_tqdm=False
    )
    assert [len(output.outputs[0].token_ids) for output in outputs] == [2, 3]


def test_numpy_and_dict_prompts_are_taken_in_order(llm: Any) -> None:
    prompts = [np.array([1, 2]), {"prompt_token_ids": [3]}, [4, 5, 6]]
    outputs = llm.generate(prompts, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == [[1, 2], [3], [4, 5, 6]]
    assert llm.generate([], use_tqdm=False) == []


def test_step_returns_growing_outputs_and_abort_ends_them_at_any_moment(llm: Any) -> None:
    from pjengine import SamplingParams

    engine = llm.engine
    params = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0)
    whole = llm.generate([[1, 2]], params, use_tqdm=False)[0].outputs[0].token_ids
    for num_steps in range(10):
        engine.add_request([1, 2], params, request_id="kept")
        engine.add_request([3, 4], params, request_id="aborted")
        seen = []
        for _ in range(num_steps):
            seen += [output for output in engine.step() if output.request_id == "kept"]
        engine.abort_request("aborted")
        engine.abort_request("aborted")
        engine.abort_request("never heard of")
        while engine.has_unfinished_requests():
            seen += [output for output in engine.step() if output.request_id == "kept"]
        lens = [len(output.outputs[0].token_ids) for output in seen]
        assert lens == list(range(1, 9))
        assert [output.finished for output in seen] == [False] * 7 + [True]
        assert seen[-1].outputs[0].token_ids == whole
        engine.scheduler.check_integrity()
        assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_usable


def test_tokens_that_end_nothing_are_not_looked_at_one_by_one(
    llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pjengine import SamplingParams
    from pjengine.generation import Completion

    def params(**fields: Any) -> Any:
        return SamplingParams(temperature=0, max_tokens=20, **fields)

    [plain] = llm.generate([[1, 2]], params(ignore_eos=True), use_tqdm=False)
    ids = plain.outputs[0].token_ids
    unseen = [token for token in range(160) if token not in ids]
    push, pushed = Completion.push, list[int]()

    def note_and_push(self: Any, token: int, *args: Any) -> None:
        pushed.append(token)
        push(self, token, *args)

    monkeypatch.setattr(Completion, "push", note_and_push)
    for fields in ({}, {"stop_token_ids": unseen[:5]}, {"stop_token_ids": [*unseen[:5], ids[12]]}):
        pushed.clear()
        [output] = llm.generate([[1, 2]], params(ignore_eos=True, **fields), use_tqdm=False)
        stop = fields.get("stop_token_ids", [])
        cut = next((i + 1 for i, token in enumerate(ids) if token in stop), 20)
        assert output.outputs[0].token_ids == ids[:cut]
        assert pushed == [ids[0], ids[cut - 1]], "the first, of the prompt, and the last"


def test_an_id_in_use_is_refused(llm: Any) -> None:
    engine = llm.engine
    engine.add_request([1], request_id="twice")
    with pytest.raises(ValueError, match="'twice' is in use"):
        engine.add_request([2], request_id="twice")
    engine.abort_request("twice")
    assert not engine.has_unfinished_requests()


def test_a_failed_step_aborts_what_runs_and_the_engine_goes_on(
    llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = llm.engine
    before = llm.generate([[1, 2, 3]], use_tqdm=False)[0].outputs[0].token_ids[:1]
    generation = engine.add_request([1, 2, 3])
    engine.step()

    def fail(*_: Any) -> None:
        engine.runner.cache.k.delete()  # as donation leaves it when the program then fails
        raise RuntimeError("the device is out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "launch", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.step()
    assert generation.request.finish_reason == "abort"
    assert not engine.has_unfinished_requests()
    assert len(before) == 1
    assert len(llm.generate([[1, 2, 3]], use_tqdm=False)[0].outputs[0].token_ids) == 16


def test_unseeded_requests_follow_the_engine_s_seed(gqa_folder: Path) -> None:
    def run(seed: int) -> list[list[int]]:
        with open_llm(gqa_folder, max_num_seqs=2, seed=seed) as llm:
            outputs = llm.generate([[1, 2, 3]] * 3, use_tqdm=False)
            return [output.outputs[0].token_ids for output in outputs]

    first = run(0)
    assert first == run(0)
    assert first != run(1)
    assert first[0] != first[1]


def test_nan_logits_end_their_own_request_and_no_other(gqa_folder: Path) -> None:
    from pjengine import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    clean = [[1, 2, 3], [4, 5, 6, 7], [8] * 20]
    with open_llm(gqa_folder) as llm:
        wanted = [output.outputs[0].token_ids for output in llm.generate(clean, params, use_tqdm=False)]
        used = {token for tokens in [*wanted, *clean] for token in tokens}
        poison = next(token for token in range(llm.engine.model_config.vocab_size) if token not in used)
        embed = llm.params["embed"]
        llm.params["embed"] = embed.at[poison].set(np.nan)
        for _ in range(2):
            first, broken, *rest = llm.generate(
                [clean[0], [9, poison, 10], *clean[1:]], params, use_tqdm=False
            )
            assert broken.outputs[0].finish_reason == "error" and broken.outputs[0].token_ids == []
            assert [output.outputs[0].token_ids for output in (first, *rest)] == wanted
