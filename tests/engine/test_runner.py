"""The compiled step: state is donated and updated in place, and every schedule finds its program."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def make_runner(model: Any = None, **sizes: Any) -> Any:
    from pjengine.compile_cache import open_compile_cache
    from pjengine.config import RunnerConfig, compile_cache_folder
    from pjengine.models.registry import build_model
    from pjengine.models.shapes import SHAPES
    from pjengine.runner import Runner
    from pjengine.sharding.mesh import make_mesh, replicated

    model = model or build_model(SHAPES["tiny"], jnp.dtype("float32"))
    params = jax.jit(model.init)(jax.random.key(0))
    defaults: dict[str, Any] = {
        "num_pages": 512, "page_size": 16, "max_model_len": 128,
        "max_num_seqs": 4, "max_num_batched_tokens": 64,
    }  # fmt: skip
    config = RunnerConfig(**{**defaults, **sizes})
    cache = open_compile_cache(compile_cache_folder(None))
    return Runner(model, params, config, replicated(make_mesh(jax.devices()[:1])), cache)


@pytest.fixture(scope="module")
def runner() -> Any:
    return make_runner()


@pytest.mark.parametrize(
    ("index", "changes"),
    [
        *((index, {}) for index in range(5)),
        (2, {"depth": 4}),
        (2, {"ends_in_logits": True}),
        (3, {"ends_in_logits": True, "num_prompt_top": 2}),
    ],
)
def test_the_cache_is_updated_in_place_and_never_copied(
    runner: Any, index: int, changes: dict[str, Any]
) -> None:
    layout = dataclasses.replace(runner.layouts()[index], **changes)
    assert len(runner.layouts()) == 5 and layout.is_decode == (index < 3)
    memory = runner.compiler.lower(layout).compile().memory_analysis()
    kv_bytes = runner.cache.k.nbytes + runner.cache.v.nbytes
    assert memory.alias_size_in_bytes >= kv_bytes
    # The reference attention gathers the pages of a few sequences; a copy of the cache would be far more.
    assert memory.temp_size_in_bytes < kv_bytes / 4


def test_drawing_updates_rows_in_place_and_copies_no_token_ids(runner: Any) -> None:
    from pjengine.draw import DrawLayout
    from pjengine.edit_sizes import EditSizes

    def double(token_ids: Any, logits: Any) -> Any:
        return 2 * logits

    sizes = EditSizes(
        num_bias=2, num_bad_words=2, bad_word_len=4, has_penalties=True, num_top=2,
        num_processed=4, chains=((double,),),
    )  # fmt: skip
    memory = runner.compiler.lower(DrawLayout(4, sizes)).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= sum(leaf.nbytes for leaf in runner.rows)
    assert memory.temp_size_in_bytes < runner.cache.token_ids.nbytes


def test_beams_copy_their_last_pages_in_place_and_nothing_more(runner: Any) -> None:
    from pjengine.draw import DrawLayout
    from pjengine.edit_sizes import EditSizes

    sizes = EditSizes(num_beams=4, num_beam_searches=2, beam_width=4, num_beam_ends=2)
    memory = runner.compiler.lower(DrawLayout(4, sizes)).compile().memory_analysis()
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((runner.cache, runner.rows)))
    assert memory.alias_size_in_bytes >= state_bytes
    # Eight pages of each layer, beside a few copies of the logits.
    num_pages, vocab_size = runner.config.num_pages, runner.model.config.vocab_size
    copied = 8 * (runner.cache.k.nbytes + runner.cache.v.nbytes) / num_pages
    assert memory.temp_size_in_bytes < 2 * copied + 8 * 4 * 4 * vocab_size


def test_donated_state_is_gone_after_a_step(runner: Any) -> None:
    from pjengine.page_pool import PagePool
    from pjengine.scheduler import Scheduler

    before = runner.cache.k
    runner.launch(Scheduler(PagePool(2), 16, max_num_seqs=4, max_num_batched_tokens=64).schedule())
    assert before.is_deleted() and not runner.cache.k.is_deleted()


def test_buckets_are_powers_of_two_and_the_limit(runner: Any) -> None:
    from pjengine.config import buckets

    assert buckets(1, 6) == (1, 2, 4, 6)
    assert buckets(32, 32) == (32,)
    assert [layout.num_tokens for layout in runner.layouts()] == [1, 2, 4, 32, 64]


def sizes(max_num_seqs: int, max_num_batched_tokens: int) -> Any:
    from pjengine.config import RunnerConfig

    return RunnerConfig(
        num_pages=2,
        page_size=16,
        max_model_len=8192,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
    )


def test_at_most_25_programs_at_the_largest_default_sizes() -> None:
    config = sizes(1024, 16384)
    assert len(config.decode_buckets) + len(config.mixed_buckets) <= 25


@pytest.mark.parametrize("max_num_seqs", [1, 2, 100, 128, 129, 256, 300, 1000, 1024, 3000])
def test_large_decode_steps_are_padded_by_an_eighth_of_the_limit_at_most(max_num_seqs: int) -> None:
    chosen = sizes(max_num_seqs, 16384).decode_buckets
    assert chosen[0] == 1 and chosen[-1] == max_num_seqs and list(chosen) == sorted(set(chosen))
    for smaller, larger in itertools.pairwise(chosen):
        assert larger <= max(2 * smaller, smaller + max(128, max_num_seqs // 8))


def test_a_deterministic_engine_has_decodes_of_several_sizes_where_bits_do_not_depend_on_them() -> None:
    fixed = dataclasses.replace(sizes(512, 512), is_deterministic=True)
    assert fixed.decode_buckets == (512,)
    assert dataclasses.replace(fixed, is_batch_invariant=True).decode_buckets == (64, 128, 256, 512)
    assert dataclasses.replace(fixed, is_batch_invariant=True, max_num_seqs=48).decode_buckets == (48,)
    runner = make_runner(
        max_num_seqs=96, max_num_batched_tokens=96, is_deterministic=True, is_batch_invariant=True
    )
    layouts = runner.layouts()
    assert [(own.num_tokens, own.is_decode) for own in layouts] == [(64, True), (96, True), (96, False)]
    assert all(layout.ends_in_logits for layout in layouts)
    runner.close()


def test_a_compilation_after_warm_up_is_counted() -> None:
    from pjengine.draw import Stages

    runner = make_runner(max_num_seqs=1, max_num_batched_tokens=16)
    runner.wait_until_warm()
    assert len(runner.programs) == len(runner.layouts()) == 2
    assert runner.recompiles_after_warmup == 0
    stages = Stages(dataclasses.replace(runner.layouts()[0], num_tokens=2))
    assert runner.stages_for(stages) == stages
    assert runner.recompiles_after_warmup == 1


def test_a_step_runs_as_a_larger_one_until_its_own_program_pays() -> None:
    from pjengine.draw import DrawLayout, Stages
    from pjengine.edit_sizes import EditSizes
    from pjengine.runner import PATIENCE

    runner = make_runner(max_num_seqs=2, max_num_batched_tokens=16)
    one, two, _ = (dataclasses.replace(layout, ends_in_logits=True) for layout in runner.layouts())
    bias = EditSizes(num_bias=2)
    small, large = Stages(one, DrawLayout(1, bias)), Stages(two, DrawLayout(2, bias))
    assert runner.stages_for(large) == large
    for _ in range(PATIENCE):
        assert runner.stages_for(small) == large
    while not {*small}.issubset(runner.programs):
        runner.wait_for_programs()
    assert runner.stages_for(small) == small


def needs_of(*edits: Any) -> np.ndarray:
    from pjengine.edits import join_needs

    return join_needs(np.array([own.needs for own in edits]))


def test_edits_can_be_made_once_their_largest_programs_are_there() -> None:
    from pjengine.draw import DrawLayout
    from pjengine.edit_sizes import sizes_for
    from pjengine.edits import NO_EDITS, Edits

    runner = make_runner(max_num_seqs=2, max_num_batched_tokens=16)
    wanted = [Edits(bias={1: 1.0, 2: 1.0}), Edits(num_logprobs=3, num_prompt_logprobs=1)]
    now, soon = needs_of(wanted[0]), needs_of(*wanted)
    while not runner.can_edit(now, lambda: soon):
        runner.wait_for_programs()
    sizes = sizes_for(soon, 64)
    assert (sizes.num_bias, sizes.num_top) == (2, 4)
    decode, mixed, draw = sorted(runner.programs, key=lambda own: (type(own) is DrawLayout, own.size))
    assert (mixed.is_decode, mixed.num_tokens, mixed.num_prompt_top) == (False, 16, 1)
    assert (decode.is_decode, decode.num_tokens, decode.num_prompt_top) == (True, 2, None)
    assert draw == DrawLayout(2, sizes)  # after either
    for covered in (soon, needs_of(NO_EDITS)):  # with the same ones
        assert runner.can_edit(covered, lambda: soon)
    other = needs_of(Edits(allowed=(1,)))
    assert not runner.can_edit(other, lambda: other)
    runner.close()


def test_of_programs_that_depend_on_edits_only_those_used_last_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pjengine import runner as module
    from pjengine.draw import Stages
    from pjengine.edits import Edits

    monkeypatch.setattr(module, "MAX_EDITING", 2)
    runner = make_runner(max_num_seqs=1, max_num_batched_tokens=16)
    plain, _ = runner.layouts()
    runner.stages_for(Stages(plain))

    def ask(edits: Edits) -> set[Any]:
        needs = needs_of(edits)
        while not runner.can_edit(needs, lambda: needs):
            runner.wait_for_programs()
        assert plain in runner.programs and len(runner.programs) <= 3 + 2
        return set(runner.programs)

    first = ask(Edits(allowed=(1,)))
    second = ask(Edits(bias={1: 1.0}))  # the model's programs are the same
    assert second > first and (len(first), len(second)) == (4, 5)
    assert ask(Edits(allowed=(1,))) == second  # used again, it outlives the other
    assert ask(Edits(bad_words=((1,),))) & second == first
    for num_logprobs in (1, 3, 7):
        ask(Edits(num_logprobs=num_logprobs))
    runner.close()


def test_a_program_that_fails_is_told_once_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from pjengine.edits import Edits
    from pjengine.programs import CompilationError
    from pjengine.step_compiler import StepCompiler

    runner = make_runner(max_num_seqs=2, max_num_batched_tokens=16)
    lower = StepCompiler.lower
    is_broken = True

    def fail(self: Any, layout: Any) -> Any:
        if is_broken:
            raise MemoryError("no room")
        return lower(self, layout)

    monkeypatch.setattr(StepCompiler, "lower", fail)
    now, soon = needs_of(Edits(allowed=(1,))), needs_of(Edits(allowed=(1, 2, 3)))
    with pytest.raises(CompilationError, match="no room"):  # for `soon` first, then for `now`
        while not runner.can_edit(now, lambda: soon):
            runner.wait_for_programs()
    is_broken = False
    while not runner.can_edit(now, lambda: now):
        runner.wait_for_programs()
    runner.close()


def test_a_reset_runner_starts_with_empty_pages(runner: Any) -> None:
    runner.cache.k.delete()  # as a failed step may leave it
    runner.reset()
    assert not jnp.any(runner.cache.k) and not jnp.any(runner.rows.page_table)
