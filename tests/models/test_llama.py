"""What serving and training have in common, with Llama: pages against dense, gradients, shapes."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import golden as goldens


def build(golden: goldens.Golden, folder: Path) -> tuple[Any, Any]:
    from pjengine.models.checkpoint import open_checkpoint
    from pjengine.models.loader import load_params
    from pjengine.models.registry import build_model, parse_config

    goldens.write_checkpoint(golden, folder)
    model = build_model(parse_config(golden.config), jnp.dtype("float32"))
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    checkpoint = open_checkpoint(folder)
    return model, load_params(checkpoint, model.weight_table(), abstract, num_layers=model.config.num_layers)


@pytest.mark.parametrize("name", ["mqa", "gqa", "attention_bias"])
def test_paged_logits_equal_one_dense_forward(name: str, tmp_path: Path) -> None:
    """Chunks of 5 tokens, then single tokens: the same logits at every position as all at once."""
    from pjengine.models.attention import PagedAttend
    from pjengine.models.state import Batch, KVCache, kv_shape

    golden = goldens.load(name)
    model, params = build(golden, tmp_path)
    tokens = jnp.asarray(golden.prompt + golden.tokens[:20], jnp.int32)
    num_pages, page_size = 12, 16
    shape = kv_shape(model.config, num_pages, page_size)
    cache: KVCache | None = KVCache(
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((num_pages, page_size), jnp.int32),
    )
    table = jnp.asarray([[7, 3, 9, 1, 5, 11, 2, 8]], jnp.int32)

    @jax.jit
    def run(params: Any, cache: Any, tokens: Any, positions: Any, is_decode: Any) -> tuple[Any, Any]:
        kv_lens = positions[-1:] + 1
        batch = Batch(
            tokens=tokens,
            positions=positions,
            rope_lens=positions + 1,
            slots=table[0][positions // page_size] * page_size + positions % page_size,
            page_table=table,
            kv_lens=kv_lens,
            cu_q_lens=None if len(tokens) == 1 else jnp.asarray([0, len(tokens)], jnp.int32),
        )
        attend = PagedAttend(batch, num_pages=num_pages)
        hidden, cache = model.run(params, tokens, positions, batch.rope_lens, cache, attend)
        return model.logits(params, hidden), cache

    num_prompt = len(golden.prompt)
    starts = [*range(0, num_prompt, 5), *range(num_prompt, len(tokens))]
    paged = []
    for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
        positions = jnp.arange(start, stop, dtype=jnp.int32)
        logits, cache = run(params, cache, tokens[start:stop], positions, start >= num_prompt)
        paged.append(np.asarray(logits))
    dense = np.asarray(jax.jit(model.forward)(params, tokens[None]))[0]
    np.testing.assert_allclose(np.concatenate(paged), dense, atol=1e-4, rtol=0)


def test_gradients_flow_through_the_serving_model(tmp_path: Path) -> None:
    golden = goldens.load("gqa")
    model, params = build(golden, tmp_path)
    tokens = jnp.asarray([golden.prompt], jnp.int32)

    def loss(params: Any) -> Any:
        logits = jax.nn.log_softmax(model.forward(params, tokens[:, :-1]))
        return -jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1).mean()

    grads = jax.jit(jax.grad(loss))(params)
    direction = jax.tree.map(lambda g: g / 100, grads)
    slope = sum(float(jnp.vdot(g, d)) for g, d in zip(*map(jax.tree.leaves, (grads, direction)), strict=True))
    ahead = loss(jax.tree.map(lambda p, d: p + d / 50, params, direction))
    behind = loss(jax.tree.map(lambda p, d: p - d / 50, params, direction))
    assert abs(float(ahead - behind) * 25 - slope) < 0.02 * slope


def test_70b_shapes_need_no_memory() -> None:
    import dataclasses

    from pjengine.models.registry import build_model
    from pjengine.models.shapes import SHAPES

    config = dataclasses.replace(
        SHAPES["llama-8b"], hidden_size=8192, num_heads=64, intermediate_size=28672, num_layers=80
    )
    abstract = jax.eval_shape(build_model(config, jnp.dtype("bfloat16")).init, jax.random.key(0))
    assert abstract["layers"]["qkv"].shape == (80, 8192, 8, 10, 128)
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == 70_553_706_496
