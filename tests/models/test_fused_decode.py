"""The few kernels of a decode step, interpreted, against the Block they stand for."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.models import fused_decode, llama
from pjengine.models.attention import PagedAttend
from pjengine.models.llama import Llama
from pjengine.models.shapes import SHAPES
from pjengine.models.state import Batch, KVCache, kv_shape
from tests.kernels.cases import cuda_target

NUM_PAGES = 6
CONFIG = dataclasses.replace(
    SHAPES["tiny"], hidden_size=256, intermediate_size=512, num_heads=8, num_kv_heads=2, head_dim=32,
    rope=dataclasses.replace(SHAPES["tiny"].rope, rotary_dim=32), dtype="bfloat16",
)  # fmt: skip


def random_params(model: Llama) -> Any:
    """Norms and biases that are not all ones and zeros."""
    params = model.init(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 100))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape, x.dtype), params)


def run(model: Llama, params: Any, cache: KVCache, num_seqs: int, backend: str | None) -> tuple[Any, KVCache]:
    """One decode step of sequences of 5, 6, … tokens, the last of them padding."""
    positions = 5 + jnp.arange(num_seqs, dtype=jnp.int32)
    table = 1 + jnp.arange(num_seqs, dtype=jnp.int32)[:, None]
    is_padding = jnp.arange(num_seqs) == num_seqs - 1 if num_seqs > 1 else jnp.zeros(1, bool)
    batch = Batch(
        tokens=(7 * positions) % 256,
        positions=positions,
        rope_lens=positions + 1,
        slots=jnp.where(is_padding, -1, table[:, 0] * 16 + positions),
        page_table=table,
        kv_lens=jnp.where(is_padding, 0, positions + 1),
        cu_q_lens=None,
    )
    attend = PagedAttend(batch, NUM_PAGES, model.scale, backend)
    hidden, after = model.forward(params, batch.tokens, positions, batch.rope_lens, cache, attend)
    assert after is not None
    return hidden, after


def random_cache(model: Llama, dtype: str) -> KVCache:
    shape = kv_shape(model.config, NUM_PAGES, 16)
    k, v = (jax.random.normal(key, shape).astype(dtype) for key in jax.random.split(jax.random.key(2)))
    return KVCache(k, v, jnp.zeros((NUM_PAGES, 16), jnp.int32))


@pytest.mark.parametrize("has_biases", [False, True])
@pytest.mark.parametrize("num_seqs", [1, 5])
def test_fused_layers_compute_what_the_block_computes(num_seqs: int, has_biases: bool) -> None:
    config = dataclasses.replace(CONFIG, attention_bias=has_biases, mlp_bias=has_biases)
    model = Llama(config, jnp.dtype("bfloat16"))
    exact = Llama(config, jnp.dtype("float32"))
    params = random_params(model)
    cache = random_cache(model, "bfloat16")
    assert fused_decode.is_fused(
        config, params["embed"][:num_seqs], PagedAttend(_no_batch(), NUM_PAGES, 1.0, "triton_interpret")
    )
    fused = run(model, params, cache, num_seqs, "triton_interpret")
    block = run(model, params, cache, num_seqs, "reference")
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    truth = run(exact, wide, random_cache(model, "float32"), num_seqs, "reference")

    def error(found: Any, wanted: Any) -> float:
        found, wanted = (np.asarray(x, np.float32) for x in (found, wanted))
        return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))

    for name, ours, theirs, right in (
        ("hidden", fused[0], block[0], truth[0]),
        ("k", fused[1].k, block[1].k, truth[1].k),
        ("v", fused[1].v, block[1].v, truth[1].v),
    ):
        assert error(ours, right) < 1.5 * error(theirs, right) + 1e-4, name
    untouched = np.asarray(cache.k.astype(jnp.float32)) == np.asarray(fused[1].k.astype(jnp.float32))
    assert untouched.mean() > 0.9


def _no_batch(cu_q_lens: Any = None) -> Batch:
    empty = jnp.zeros((0,), jnp.int32)
    return Batch(empty, empty, empty, empty, jnp.zeros((0, 1), jnp.int32), empty, cu_q_lens)


def test_fused_only_where_the_kernels_can_and_were_measured_to_pay() -> None:
    x = jnp.zeros((4, 256), jnp.bfloat16)
    decode = PagedAttend(_no_batch(), NUM_PAGES, 1.0, "triton_interpret")
    assert fused_decode.is_fused(CONFIG, x, decode)
    assert not fused_decode.is_fused(CONFIG, x.astype(jnp.float32), decode)
    assert not fused_decode.is_fused(CONFIG, x.astype(jnp.float16), decode)
    assert not fused_decode.is_fused(CONFIG, jnp.zeros((64, 256), jnp.bfloat16), decode)
    assert not fused_decode.is_fused(dataclasses.replace(CONFIG, intermediate_size=520), x, decode)
    assert not fused_decode.is_fused(CONFIG, x, dataclasses.replace(decode, backend="reference"))
    assert not fused_decode.is_fused(CONFIG, x, dataclasses.replace(decode, backend=None))  # on a CPU
    mixed = _no_batch(jnp.zeros((1,), jnp.int32))
    assert not fused_decode.is_fused(CONFIG, x, dataclasses.replace(decode, batch=mixed))


def test_a_layer_is_five_kernels() -> None:
    model = Llama(CONFIG, jnp.dtype("bfloat16"))
    params = jax.eval_shape(model.init, jax.random.key(0))
    cache = jax.eval_shape(lambda: random_cache(model, "bfloat16"))
    with cuda_target():
        traced = jax.jit(lambda params, cache: run(model, params, cache, 5, None)).trace(params, cache)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"call @\w+_triton", text)) == 5 * CONFIG.num_layers
    # All layers share them; but the first norm came from no product, and the last one nobody finishes.
    assert text.count("@__gpu$xla.gpu.triton(") == 5 + 2


def test_gradients_never_meet_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("fused layers in the dense forward")

    monkeypatch.setattr(llama, "fused_layers", refuse)
    model = Llama(CONFIG, jnp.dtype("bfloat16"))
    params = model.init(jax.random.key(0))
    jax.grad(lambda params: model.dense_logits(params, jnp.ones((1, 4), jnp.int32)).sum())(params)
