"""The compiled step: state is donated and updated in place, and every schedule finds its program."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest


def make_runner(**sizes: int) -> Any:
    from pjengine.compile_cache import open_compile_cache
    from pjengine.config import RunnerConfig, compile_cache_folder
    from pjengine.models.registry import build_model
    from pjengine.models.shapes import SHAPES
    from pjengine.runner import Runner
    from pjengine.sharding.mesh import make_mesh, replicated

    model = build_model(SHAPES["tiny"], jnp.dtype("float32"))
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


@pytest.mark.parametrize("index", range(5))
def test_the_cache_is_updated_in_place_and_never_copied(runner: Any, index: int) -> None:
    layout = runner.layouts()[index]
    assert len(runner.layouts()) == 5 and layout.is_decode == (index < 3)
    memory = runner.lower(layout).compile().memory_analysis()
    kv_bytes = runner.cache.k.nbytes + runner.cache.v.nbytes
    assert memory.alias_size_in_bytes >= kv_bytes
    # The reference attention gathers the pages of a few sequences; a copy of the cache would be far more.
    assert memory.temp_size_in_bytes < kv_bytes / 4


def test_donated_state_is_gone_after_a_step(runner: Any) -> None:
    from pjengine.scheduler import Schedule

    before = runner.cache.k
    runner.launch(Schedule([]))
    assert before.is_deleted() and not runner.cache.k.is_deleted()


def test_buckets_are_powers_of_two_and_the_limit(runner: Any) -> None:
    from pjengine.config import buckets

    assert buckets(1, 6) == (1, 2, 4, 6)
    assert buckets(32, 32) == (32,)
    assert [layout.num_tokens for layout in runner.layouts()] == [1, 2, 4, 32, 64]


def test_at_most_24_programs_at_the_largest_default_sizes() -> None:
    from pjengine.config import RunnerConfig

    config = RunnerConfig(
        num_pages=2, page_size=16, max_model_len=8192, max_num_seqs=1024, max_num_batched_tokens=16384
    )
    assert len(config.decode_buckets) + len(config.mixed_buckets) <= 24


def test_a_compilation_after_warm_up_is_counted() -> None:
    runner = make_runner(max_num_seqs=1, max_num_batched_tokens=16)
    runner.wait_until_warm()
    assert len(runner.programs) == len(runner.layouts()) == 2
    assert runner.recompiles_after_warmup == 0
    runner.program(dataclasses.replace(runner.layouts()[0], num_tokens=2))
    assert runner.recompiles_after_warmup == 1


def test_a_reset_runner_starts_with_empty_pages(runner: Any) -> None:
    runner.cache.k.delete()  # as a failed step may leave it
    runner.reset()
    assert not jnp.any(runner.cache.k) and not jnp.any(runner.rows.page_table)
