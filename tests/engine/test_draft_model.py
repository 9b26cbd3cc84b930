"""A draft model changes no token, and its pages have no holes: where it is the model, every draft holds."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.edits import NO_EDITS
from tests.engine.rescheduling import reschedule, settle
from tests.golden import golden as goldens

VOCAB_SIZE, NUM_DRAFTS = 160, 3
SIZES: dict[str, Any] = {
    "dtype": "float32",
    "max_num_seqs": 2,
    "max_num_batched_tokens": 32,
    "warm_up": False,
}
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
WARM: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 5, "max_tokens": 40}
PROMPTS = [np.random.default_rng(i).integers(3, VOCAB_SIZE, 20 + 25 * i).tolist() for i in range(3)]


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first layer of the model of `gqa_folder`."""
    from safetensors.numpy import save_file

    golden, folder = goldens.load("gqa"), tmp_path_factory.mktemp("smaller")
    (folder / "config.json").write_text(json.dumps({**golden.config, "num_hidden_layers": 1}))
    is_left = {name: ".layers." not in name or ".layers.0." in name for name in golden.weights()}
    weights = {name: array for name, array in golden.weights().items() if is_left[name]}
    save_file(
        {name: array.astype(np.float32) for name, array in weights.items()}, folder / "model.safetensors"
    )
    return folder


def open_llm(folder: Path, draft: Path | None, **settings: Any) -> Any:
    """An engine that, with a draft model, speculates in every step that it can."""
    from pjengine import LLM

    wanted = None if draft is None else {"model": draft, "num_speculative_tokens": NUM_DRAFTS}
    llm = LLM(folder, speculative_config=wanted, **{"tokenizer": "demo", **SIZES, **settings})
    if draft is not None:
        set_speculating(llm, lambda *_: True)
        make_programs(llm, NO_EDITS)
    return llm


def make_programs(llm: Any, edits: Any) -> None:
    """Those that speculate, with such edits."""
    runner = llm.engine.runner
    while not runner.can_draft(SIZES["max_num_seqs"], np.array(edits.needs)):
        runner.wait_for_programs()
        for error in runner._programs.failed.values():
            raise error


def set_speculating(llm: Any, pays: Any) -> None:
    llm.engine.scheduler.speculation._pays = pays


@pytest.fixture(scope="module")
def plain(gqa_folder: Path) -> Iterator[Any]:
    with open_llm(gqa_folder, None) as llm:
        yield llm


@pytest.fixture(scope="module")
def other(gqa_folder: Path, smaller: Path) -> Iterator[Any]:
    with open_llm(gqa_folder, smaller) as llm:
        yield llm
        settle(llm.engine)


@pytest.fixture(scope="module")
def same(gqa_folder: Path) -> Iterator[Any]:
    """The draft model is the model."""
    with open_llm(gqa_folder, gqa_folder) as llm:
        yield llm
        settle(llm.engine)


CASES: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "sampled": WARM,
    "several continuations": {**WARM, "n": 2, "top_p": 1.0, "min_p": 0.05, "top_k": 30},
    "stop string": {**WARM, "temperature": 1.3, "stop": ["!", "A", "z"]},
    "10 tokens": {**GREEDY, "max_tokens": 10},
    "to the end of the text": {**WARM, "max_tokens": 150},
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_without_a_draft_model(plain: Any, other: Any, name: str) -> None:
    from pjengine import SamplingParams

    params = SamplingParams(**CASES[name])
    wanted, drafted = (llm.generate(PROMPTS, params, use_tqdm=False) for llm in (plain, other))
    for ours, theirs in zip(drafted, wanted, strict=True):
        assert ours.outputs == theirs.outputs
    counts = other.engine.scheduler.speculation
    assert 0 < counts.num_accepted_tokens < counts.num_draft_tokens
    other.engine.scheduler.check_integrity()


@pytest.mark.slow
def test_logprobs_and_penalties_are_those_without_a_draft_model(plain: Any, other: Any) -> None:
    from pjengine import SamplingParams

    params = SamplingParams(**WARM, logprobs=2, repetition_penalty=1.3, ignore_eos=True)
    num_before = other.engine.scheduler.speculation.num_draft_tokens
    [wanted] = plain.generate(PROMPTS[0], params, use_tqdm=False)
    for _ in range(200):  # until there are programs for such edits
        [drafted] = other.generate(PROMPTS[0], params, use_tqdm=False)
        other.engine.runner.wait_for_programs()
        if other.engine.scheduler.speculation.num_draft_tokens > num_before:
            break
    [theirs], [ours] = wanted.outputs, drafted.outputs
    assert ours.token_ids == theirs.token_ids and len(ours.logprobs) == len(ours.token_ids)
    for one, two in zip(ours.logprobs, theirs.logprobs, strict=True):
        assert list(one) == list(two)
        got, expected = ([place.logprob for place in own.values()] for own in (one, two))
        np.testing.assert_allclose(got, expected, atol=1e-4)
    assert other.engine.scheduler.speculation.num_draft_tokens > num_before


@pytest.mark.parametrize("case", [GREEDY, {**WARM, "ignore_eos": True}], ids=["greedy", "sampled"])
def test_all_drafts_of_the_model_itself_hold(same: Any, case: dict[str, Any]) -> None:
    """After plain steps beside ones that speculate, prompts in pieces, cached prompts, and preemption."""
    from pjengine import SamplingParams

    speculation = same.engine.scheduler.speculation
    before = speculation.num_draft_tokens, speculation.num_accepted_tokens
    turns = iter(range(10**6))
    set_speculating(same, lambda *_: next(turns) % 4 != 0)
    params = SamplingParams(**{**case, "max_tokens": 60})
    first = same.generate(PROMPTS, params, use_tqdm=False)
    again = same.generate([[*PROMPTS[2], *first[2].outputs[0].token_ids, 7]], params, use_tqdm=False)
    assert again[0].num_cached_tokens > len(PROMPTS[2])
    reschedule(same.engine, num_pages=12)
    tight = same.generate(PROMPTS, params, use_tqdm=False)
    assert [own.outputs for own in tight] == [own.outputs for own in first]
    assert sum(own.metrics.num_preemptions for own in tight) > 0
    reschedule(same.engine)
    set_speculating(same, lambda *_: True)
    num_tried = speculation.num_draft_tokens - before[0]
    assert num_tried > 200 and speculation.num_accepted_tokens - before[1] == num_tried


@pytest.mark.slow
def test_any_schedule_keeps_its_pages_and_its_tokens(plain: Any, other: Any) -> None:
    from pjengine import SamplingParams

    # Steps differ in number with the time that programs take to make: requests must not.
    rng, whims = np.random.default_rng(3), np.random.default_rng(4)
    reschedule(other.engine, num_pages=10)
    set_speculating(other, lambda *_: whims.random() < 0.7)
    wanted: list[tuple[list[int], Any]] = []
    generations: list[Any] = []
    for i in range(400):
        if len(wanted) < 14 and rng.random() < 0.1:
            length, shared = (int(rng.integers(1, most)) for most in (70, 60))
            prompt = [*PROMPTS[2][:shared], *rng.integers(3, VOCAB_SIZE, length).tolist()][:length]
            temperature = float(rng.choice([0, 0.8]))
            params = SamplingParams(
                temperature=temperature,
                seed=i,
                n=1 + (temperature > 0),
                max_tokens=int(rng.integers(20, 60)),
                ignore_eos=True,
            )
            wanted.append((prompt, params))
            generations.append(other.engine.add_request(prompt, params, request_id=f"any {len(wanted)}"))
        elif generations and rng.random() < 0.01:
            other.engine.abort_request(f"any {len(wanted)}")
        other.engine.step()
        other.engine.scheduler.check_integrity()
    while other.engine.has_unfinished_requests():
        other.engine.step()
        other.engine.scheduler.check_integrity()
    reschedule(other.engine)
    set_speculating(other, lambda *_: True)
    outputs = [generation.output() for generation in generations]
    alone = plain.generate([prompt for prompt, _ in wanted], [params for _, params in wanted], use_tqdm=False)
    num_whole = 0
    for ours, theirs in zip(outputs, alone, strict=True):
        if all(own.finish_reason != "abort" for own in ours.outputs):
            assert [own.token_ids for own in ours.outputs] == [own.token_ids for own in theirs.outputs]
            num_whole += 1
    assert num_whole > 5 and sum(own.metrics.num_preemptions for own in outputs) > 0


def test_pages_and_parameters_of_both_are_freed_and_started_over(gqa_folder: Path, smaller: Path) -> None:
    from pjengine import LLM

    wanted = {"method": "draft_model", "model": str(smaller), "num_speculative_tokens": 2}
    llm = LLM(gqa_folder, skip_tokenizer_init=True, speculative_config=wanted, **SIZES)
    runner: Any = llm.engine.runner
    assert set(llm.params) == {"embed", "layers", "final_norm", "head"}
    assert (
        len(llm.params["layers"]["qkv"]) == 3 and runner.cache.draft_k.shape[1:] == runner.cache.k.shape[1:]
    )
    before: Any = runner.cache
    runner.reset()
    assert before.draft_k.is_deleted() and not np.any(np.asarray(runner.cache.draft_v))
    arrays = jax.tree.leaves((runner.params, runner.cache))
    llm.close()
    assert len(arrays) > 20 and all(leaf.is_deleted() for leaf in arrays)


def make_pair(**changes: Any) -> Any:
    from pjengine.models.pair import Pair
    from pjengine.models.registry import build_model
    from pjengine.models.shapes import SHAPES

    tiny, dtype = SHAPES["tiny"], jnp.dtype("float32")
    draft = replace(tiny, **{"num_layers": 1, "num_kv_heads": 1, **changes})
    return Pair.of(build_model(tiny, dtype), build_model(draft, dtype))


def test_both_caches_are_updated_in_place_and_never_copied() -> None:
    from pjengine.speculation_config import SpeculationConfig
    from tests.engine.test_runner import make_runner

    speculation = SpeculationConfig(num_drafts=4, model="tiny")
    runner = make_runner(make_pair(), speculation=speculation, max_num_seqs=1)
    plain, drafting = runner.layouts()[0], runner.layouts()[-1]
    mixed = next(layout for layout in runner.layouts() if not layout.is_decode)
    assert drafting.num_drafts == 4
    for layout in (plain, mixed, drafting):
        memory = runner.compiler.lower(layout).compile().memory_analysis()
        donated = jax.tree.leaves((runner.cache, runner.rows))
        assert memory.alias_size_in_bytes >= sum(leaf.nbytes for leaf in donated)
        assert memory.temp_size_in_bytes < runner.cache.draft_k.nbytes
    runner.close()


def test_beams_copy_the_draft_models_pages_too() -> None:
    from pjengine.beam_selection import _copy_pages
    from pjengine.models.state import KVCache

    rng = np.random.default_rng(0)
    k, v, draft_k, draft_v = (jnp.asarray(rng.normal(size=(n, 1, 2, 2))) for n in (8, 8, 12, 12))
    cache = KVCache(k, v, jnp.arange(8, dtype=jnp.int32).reshape(4, 2), draft_k, draft_v)
    sources, targets = [jnp.array([1, 2])], [jnp.array([3, 1])]
    first_pages = [np.array([0, 4], np.int32)]
    after = _copy_pages(cache, sources, targets, jnp.array([True, False]), first_pages)
    for old, new in zip(jax.tree.leaves(cache), jax.tree.leaves(after), strict=True):
        layers = old.reshape(-1, 4, *old.shape[1:])
        np.testing.assert_array_equal(new.reshape(layers.shape), layers.at[:, 3].set(layers[:, 1]))


def test_a_plan_has_room_for_both_models() -> None:
    from pjengine import EngineConfig
    from pjengine.planning import plan_without_device

    config = EngineConfig(model="llama-8b")
    wanted = {"model": "llama-1b", "num_speculative_tokens": 4}
    alone, both = (
        plan_without_device(own, "h200") for own in (config, replace(config, speculative_config=wanted))
    )
    assert both.draft_page_bytes == 16 * 2 * 16 * 8 * 64 * 2
    assert both.page_bytes == alone.page_bytes + both.draft_page_bytes
    assert both.weights_bytes == alone.weights_bytes + both.draft_weights_bytes
    assert 0 <= alone.total_bytes - both.total_bytes + both.page_bytes < 2 * both.page_bytes
    table = both.table()
    assert "of them 2.30 GiB the draft model's" in table
    assert "163,840 B a token, of them 32,768 B the draft model's" in table
    assert "draft" not in alone.table()
    halved = plan_without_device(replace(config, speculative_config=wanted, tensor_parallel_size=2), "h200")
    assert halved.draft_page_bytes == both.draft_page_bytes / 2
    assert halved.draft_weights_bytes < 0.51 * both.draft_weights_bytes


def test_a_draft_model_with_windows_keeps_all_its_pages() -> None:
    from pjengine.config import EngineConfig
    from pjengine.loading import make_plan
    from pjengine.models.pair import empty_cache

    pair = make_pair(layer_windows=(16,))
    sizes = {"max_num_seqs": 2, "max_num_batched_tokens": 64}
    plan = make_plan(EngineConfig(model="tiny", max_model_len=64), pair, sizes, None)
    assert plan.window_group is None and plan.draft_page_bytes == 16 * 2 * 16 * 4
    cache: Any = empty_cache(pair, plan.num_pages, 16)
    assert len(cache.draft_k) == plan.num_pages


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "other vocabulary": (
        {"model": "demo"},
        ValueError,
        "vocabulary of 4096 tokens, and the model one of 160",
    ),
    "unknown": ({"model": "/no/such/model"}, OSError, "no such folder"),
    "no name": ({"model": ""}, ValueError, "must be a draft model's folder or Hub id, got ''"),
    "a number": ({"model": 3}, ValueError, "must be a draft model's folder or Hub id, got 3"),
    "none": ({"method": "draft_model"}, ValueError, "must be a draft model's folder or Hub id, got None"),
    "of n-grams": ({"method": "ngram", "model": "demo"}, ValueError, "model does not go with method='ngram'"),
    "with n-grams": (
        {"model": "demo", "prompt_lookup_max": 3},
        ValueError,
        "prompt_lookup_max does not go with method='draft_model'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_draft_model_that_cannot_be_is_refused(gqa_folder: Path, name: str) -> None:
    from pjengine import LLM

    wanted, error, message = BAD[name]
    config = {"num_speculative_tokens": 3, **wanted}
    with pytest.raises(error, match=message):
        LLM(gqa_folder, skip_tokenizer_init=True, speculative_config=config, **SIZES)


def test_sequences_longer_than_the_draft_models_positions_are_refused() -> None:
    from pjengine.config import EngineConfig
    from pjengine.loading import make_plan

    pair = make_pair(rope=None, has_learned_positions=True, max_position_embeddings=128)
    sizes = {"max_num_seqs": 2, "max_num_batched_tokens": 64}
    assert make_plan(EngineConfig(model="tiny", max_model_len=128), pair, sizes, None).max_model_len == 128
    with pytest.raises(ValueError, match="max_model_len=129 is beyond the 128 positions of the draft model"):
        make_plan(EngineConfig(model="tiny", max_model_len=129), pair, sizes, None)
