"""The few kernels of a decode step, against the Block they stand for."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.models import decoder, fused_decode
from pjengine.models.attention import PagedAttend
from pjengine.models.llama import Llama
from pjengine.models.rope import RopeConfig
from pjengine.models.shapes import SHAPES
from pjengine.models.state import Batch, KVCache, kv_shape
from tests.kernels.cases import cuda_target
from tests.models.forward import error, random_params, widened

NUM_PAGES = 34
CONFIG = dataclasses.replace(
    SHAPES["tiny"], hidden_size=256, intermediate_size=512, num_heads=8, num_kv_heads=2, head_dim=32,
    rope=RopeConfig(kind="default", theta=10000.0, rotary_dim=32), dtype="bfloat16",
)  # fmt: skip


def run(
    model: Llama, params: Any, cache: KVCache, num_seqs: int, backend: str | None, start: Any = 5
) -> tuple[Any, KVCache]:
    """One decode step of sequences of `start` tokens, and one more, and so on, the last of them padding.

    After those of 15, which fill their page, come those of none.
    """
    positions = (start + jnp.arange(num_seqs, dtype=jnp.int32)) % 16
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
    attend = PagedAttend(batch, NUM_PAGES, backend)
    hidden, after = model.run(params, batch.tokens, positions, batch.rope_lens, cache, attend)
    assert after is not None
    return hidden, after


def random_cache(model: Llama, dtype: str) -> KVCache:
    shape = kv_shape(model.config, NUM_PAGES, 16)
    k, v = (jax.random.normal(key, shape).astype(dtype) for key in jax.random.split(jax.random.key(2)))
    return KVCache(k, v, jnp.zeros((NUM_PAGES, 16), jnp.int32))


def run_from(
    starts: Sequence[int], model: Llama, params: Any, cache: KVCache, num_seqs: int, backend: str | None
) -> tuple[Any, ...]:
    """Hidden states, keys and values of a step from each of `starts`."""
    step = jax.jit(lambda params, cache, start: run(model, params, cache, num_seqs, backend, start))
    hidden, caches = zip(*(step(params, cache, jnp.int32(start)) for start in starts), strict=True)
    return tuple(jnp.stack(arrays) for arrays in (hidden, *zip(*((c.k, c.v) for c in caches), strict=True)))


BIASES: dict[str, Any] = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
# As Qwen 2 and Mistral have them, and as nobody does.
LIKE_LLAMA: dict[str, Any] = {
    "qkv_bias": True,
    "layer_windows": (5, None),
    "attention_softcap": 2.0,
    "has_sinks": True,
}


@pytest.mark.parametrize("fields", [{}, BIASES, LIKE_LLAMA], ids=["llama", "biases", "like llama"])
@pytest.mark.parametrize(
    ("num_seqs", "backend"),
    [
        (1, "triton_interpret"),
        pytest.param(5, "triton_interpret", marks=pytest.mark.slow),
        *(pytest.param(n, None, marks=pytest.mark.gpu) for n in (1, 5, 32)),  # the dispatch chooses
    ],
)
def test_fused_layers_are_no_less_exact_than_the_block(
    num_seqs: int, fields: dict[str, Any], backend: str | None
) -> None:
    config = dataclasses.replace(CONFIG, **fields)
    model, exact = Llama(config, jnp.dtype("bfloat16")), Llama(config, jnp.dtype("float32"))
    params, cache = random_params(model), random_cache(model, "bfloat16")
    assert fused_decode.is_fused(
        config, params["embed"][:num_seqs], PagedAttend(_no_batch(), NUM_PAGES, backend)
    )
    starts = range(3, 13) if num_seqs == 1 else [5]  # of a single row, either may be right by chance
    fused = run_from(starts, model, params, cache, num_seqs, backend)
    block = run_from(starts, model, params, cache, num_seqs, "reference")
    with jax.default_matmul_precision("highest"):
        wide = random_cache(model, "float32")
        truth = run_from(starts, exact, widened(params), wide, num_seqs, "reference")
    for name, ours, theirs, right in zip(("hidden", "k", "v"), fused, block, truth, strict=True):
        assert error(ours, right) <= 1.1 * error(theirs, right), name
    untouched = np.asarray(cache.k.astype(jnp.float32)) == np.asarray(fused[1][0].astype(jnp.float32))
    assert untouched.mean() > 0.9


def _no_batch(cu_q_lens: Any = None) -> Batch:
    empty = jnp.zeros((0,), jnp.int32)
    return Batch(empty, empty, empty, empty, jnp.zeros((0, 1), jnp.int32), empty, cu_q_lens)


def test_fused_only_where_the_kernels_can_and_were_measured_to_pay() -> None:
    x = jnp.zeros((4, 256), jnp.bfloat16)
    decode = PagedAttend(_no_batch(), NUM_PAGES, "triton_interpret")
    assert fused_decode.is_fused(CONFIG, x, decode)
    others: list[dict[str, Any]] = [
        {"norm": "layer"}, {"norm_offset": 1.0}, {"has_post_norms": True}, {"is_parallel": True},
        {"rope": RopeConfig(kind="default", theta=10000.0, rotary_dim=16)},
        {"layer_ropes": (None, CONFIG.rope)},
        {"qk_norm": "head"}, {"clip_qkv": 8.0}, {"activation": "gelu"}, {"is_gated": False},
        {"residual_scale": 0.5},
    ]  # fmt: skip
    for fields in others:
        assert not fused_decode.is_fused(dataclasses.replace(CONFIG, **fields), x, decode), fields
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

    monkeypatch.setattr(decoder, "fused_layers", refuse)
    model = Llama(CONFIG, jnp.dtype("bfloat16"))
    params = model.init(jax.random.key(0))
    jax.grad(lambda params: model.forward(params, jnp.ones((1, 4), jnp.int32)).sum())(params)
