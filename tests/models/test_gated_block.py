"""Blocks that take the gated product from the stack of all layers, against those that slice it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pjengine.models import block
from pjengine.models.attention import PagedAttend
from pjengine.models.llama import Llama
from pjengine.models.rope import RopeConfig
from pjengine.models.shapes import SHAPES
from pjengine.models.state import Batch, KVCache, kv_shape
from pjengine.pallas_kernels.gated_linear import GatedTiles, gated_mosaic
from tests.models.forward import error

PAGE_SIZE = 16
CONFIG = dataclasses.replace(SHAPES["tiny"], hidden_size=128, intermediate_size=256)


def random_params(model: Llama) -> Any:
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype), shapes)


def hidden(model: Llama, params: Any, num_tokens: int, backend: str | None) -> jax.Array:
    """Final hidden states of one prompt, a step of its own."""
    num_pages = num_tokens // PAGE_SIZE + 1
    positions = jnp.arange(num_tokens, dtype=jnp.int32)
    batch = Batch(
        tokens=(7 * positions) % 256,
        positions=positions,
        rope_lens=positions + 1,
        slots=positions + PAGE_SIZE,
        page_table=1 + jnp.arange(num_pages - 1, dtype=jnp.int32)[None],
        kv_lens=jnp.array([num_tokens], jnp.int32),
        cu_q_lens=jnp.array([0, num_tokens], jnp.int32),
    )
    pages = jnp.zeros(kv_shape(model.config, num_pages, PAGE_SIZE), model.dtype)
    cache = KVCache(pages, pages, jnp.zeros((num_pages, PAGE_SIZE), jnp.int32))
    attend = PagedAttend(batch, num_pages, backend)

    def forward(params: Any, cache: KVCache) -> jax.Array:
        return model.run(params, batch.tokens, positions, batch.rope_lens, cache, attend)[0]

    return jax.jit(forward)(params, cache)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("has_biases", [False, True])
def test_without_a_kernel_not_a_bit_changes(has_biases: bool, dtype: str) -> None:
    model = Llama(dataclasses.replace(CONFIG, mlp_bias=has_biases), jnp.dtype(dtype))
    params = random_params(model)
    sliced = hidden(model, params, 32, "reference")
    np.testing.assert_array_equal(hidden(model, params, 32, None), sliced)


def test_the_kernel_computes_each_layer_s_own_product(monkeypatch: pytest.MonkeyPatch) -> None:
    model, exact = Llama(CONFIG, jnp.dtype("bfloat16")), Llama(CONFIG, jnp.dtype("float32"))
    params = random_params(model)
    tiles = GatedTiles(
        num_stages=2, num_programs=2
    )  # those that would be chosen need more than a small model

    def interpreted(x: jax.Array, stack: jax.Array, layer: int) -> jax.Array:
        interpret = plgpu.InterpretGPUParams()
        return gated_mosaic(x, stack, jnp.int32(layer), tiles=tiles, interpret=interpret)

    monkeypatch.setattr(block, "gated_linear", interpreted)
    found = hidden(model, params, 64, None)
    sliced = hidden(model, params, 64, "reference")
    truth = hidden(exact, jax.tree.map(lambda x: x.astype(jnp.float32), params), 64, "reference")
    assert (found != sliced).any()
    assert error(found, truth) < 1.2 * error(sliced, truth)


def test_gradients_and_biases_never_meet_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("a kernel that takes neither")

    monkeypatch.setattr(block, "gated_linear", refuse)
    model = Llama(CONFIG, jnp.dtype("float32"))
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jnp.ones((1, 4), jnp.int32)
    jax.eval_shape(jax.grad(lambda params: model.forward(params, tokens).sum()), params)
    biased = Llama(dataclasses.replace(CONFIG, mlp_bias=True), jnp.dtype("float32"))
    params = jax.eval_shape(biased.init, jax.random.key(0))
    jax.eval_shape(lambda params: hidden(biased, params, 32, None), params)


@pytest.mark.gpu
def test_on_a_gpu_prompts_give_the_reference_s_states() -> None:
    config = dataclasses.replace(
        CONFIG, hidden_size=512, intermediate_size=4096, num_heads=8, num_kv_heads=2, head_dim=64,
        rope=RopeConfig(kind="default", theta=10000.0, rotary_dim=64),
    )  # fmt: skip
    model, exact = Llama(config, jnp.dtype("bfloat16")), Llama(config, jnp.dtype("float32"))
    params = random_params(model)
    found, sliced = hidden(model, params, 512, None), hidden(model, params, 512, "reference")
    truth = hidden(exact, jax.tree.map(lambda x: x.astype(jnp.float32), params), 512, "reference")
    assert error(found, truth) < 1.2 * error(sliced, truth)
