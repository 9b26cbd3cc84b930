"""Which models have the same bits in decode steps of any size, and that their products are made for it."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pjengine.models.attention import PagedAttend
from pjengine.models.batch_invariance import is_batch_invariant
from pjengine.models.config import ExpertConfig
from pjengine.models.decoder import Decoder
from pjengine.models.registry import build_model
from pjengine.models.shapes import SHAPES
from pjengine.models.state import Batch, KVCache, kv_shape
from tests.kernels.cases import cuda_mesh, cuda_target

COUNTS = (64, 128, 256, 512)
LLAMA = SHAPES["llama-8b"]


def is_invariant(
    model: Decoder, counts: tuple[int, ...] = COUNTS, *, gpu: str = "NVIDIA H200", **options: Any
) -> bool:
    with jax.sharding.use_abstract_mesh(cuda_mesh(gpu)):
        return is_batch_invariant(model, counts, **{"max_slots": 8192, **options})


def model_of(dtype: str = "bfloat16", num_devices: int = 1, **fields: Any) -> Decoder:
    return build_model(dataclasses.replace(LLAMA, **fields), jnp.dtype(dtype), num_devices)


def test_models_like_llama_are() -> None:
    assert is_invariant(model_of())
    assert is_invariant(model_of(qkv_bias=True, out_bias=True))
    assert is_invariant(build_model(SHAPES["llama2-13b"], jnp.dtype("float16"), 1))


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "float32"},  # no kernel
        {"num_devices": 2},  # sums over devices
        {"vocab_size": 50257},  # no multiple of a block
        {"activation": "gelu"},
        {"mlp_bias": True},
        {"qk_norm": "head"},  # a sum by XLA
        {"norm": "layer"},
        {"residual_scale": 0.5},
        {"head_dim": 512},  # more than the attention kernel takes
        {"experts": ExpertConfig(num_experts=8, num_choices=2, inner_size=1024)},
        {"num_heads": 32, "num_kv_heads": 1},  # 64 rows have more programs for a sequence than 512
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_others_are_not(fields: dict[str, Any]) -> None:
    assert not is_invariant(model_of(**fields))


def test_nor_are_other_platforms_backends_and_sizes() -> None:
    model = model_of()
    assert not is_batch_invariant(model, COUNTS, max_slots=8192)  # a CPU
    assert not is_invariant(model, gpu="NVIDIA A100-SXM4-80GB")
    assert not is_invariant(model, backend="triton")
    assert not is_invariant(model, (64, 100))
    assert not is_invariant(build_model(SHAPES["opt-125m"], jnp.dtype("bfloat16"), 1))


def lowered(model: Decoder, num_seqs: int) -> str:
    """A decode step and its logits, for an H200."""
    struct: Any = jax.ShapeDtypeStruct
    row = struct((num_seqs,), jnp.int32)
    pages = struct(kv_shape(model.config, 64, 16), model.dtype)
    cache = KVCache(pages, pages, struct((64, 16), jnp.int32))
    params = jax.eval_shape(model.init, jax.random.key(0))

    def run(params: Any, cache: KVCache, row: jax.Array, page_table: jax.Array) -> jax.Array:
        batch = Batch(row, row, row, row, page_table, row, None)
        hidden, _ = model.run(params, row, row, row, cache, PagedAttend(batch, 64))
        return model.logits(params, hidden)

    with cuda_target():
        traced = jax.jit(run).trace(params, cache, row, struct((num_seqs, 4), jnp.int32))
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_the_model_of_such_an_engine_trains() -> None:
    model = dataclasses.replace(model_of(num_layers=1), is_batch_invariant=True)
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((2, 65), jnp.int32)
    with cuda_target():
        grads = jax.eval_shape(
            jax.grad(lambda params, tokens: model.logprobs(params, tokens).sum()), params, tokens
        )
    assert jax.tree.map(lambda x: x.shape, grads) == jax.tree.map(lambda x: x.shape, params)


@pytest.mark.parametrize("num_seqs", [1, 64, 512])
def test_the_library_makes_no_product_of_an_invariant_step(num_seqs: int) -> None:
    model = model_of(num_layers=1)
    assert re.findall(r"stablehlo\.dot_general", lowered(model, num_seqs))
    invariant = dataclasses.replace(model, is_batch_invariant=True)
    assert "stablehlo.dot_general" not in lowered(invariant, num_seqs)
