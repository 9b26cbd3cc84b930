"""The two ways to attend, over the tokens at hand and over pages, are one attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.models.attention import PagedAttend, dense_attend
from pjengine.models.state import Batch, KVCache
from pjengine.pallas_kernels.attention_variant import AttentionVariant

LENGTH, KV_HEADS, GROUP, DIM, PAGE_SIZE, NUM_PAGES = 45, 2, 3, 16, 16, 5
SLOPES = jnp.asarray([0.5, 0.25, 0.125, 1.0, 0.1, 0.01])
SINKS = jnp.asarray([-3.0, 0.0, 1.0, 2.0, 10.0, -1.0])
VARIANTS = [
    AttentionVariant(),
    AttentionVariant(softcap=1.5),
    AttentionVariant(window=7),
    AttentionVariant(alibi_slopes=SLOPES),
    AttentionVariant(sinks=SINKS),
    AttentionVariant(softcap=1.5, window=7, alibi_slopes=SLOPES, sinks=SINKS),
]
IDS = ["plain", "softcap", "window", "alibi", "sinks", "all"]


def rotary(start: int, stop: int) -> tuple[jax.Array, jax.Array]:
    angle = jnp.arange(start, stop, dtype=jnp.float32)[:, None] * jnp.linspace(0.01, 1, DIM // 2)[None]
    return jnp.cos(angle), jnp.sin(angle)


@pytest.mark.parametrize(
    ("variant", "backend"),
    [
        *(pytest.param(variant, None, id=name) for name, variant in zip(IDS, VARIANTS, strict=True)),
        # Each feature alone is what the tests of the kernels look at.
        pytest.param(VARIANTS[0], "triton_interpret", id="plain, interpreted"),
        pytest.param(VARIANTS[-1], "triton_interpret", id="all, interpreted"),
    ],
)
def test_chunks_and_decodes_over_pages_equal_dense_attention(
    variant: AttentionVariant, backend: str | None
) -> None:
    qkv = jax.random.normal(jax.random.key(0), (LENGTH, KV_HEADS, GROUP + 2, DIM))
    dense, _ = dense_attend(qkv, None, layer=0, rotary=rotary(0, LENGTH), scale=0.3, variant=variant)
    pages = jnp.full((2 * NUM_PAGES, KV_HEADS, PAGE_SIZE, DIM), jnp.nan)
    cache: KVCache | None = KVCache(pages, pages, jnp.zeros((NUM_PAGES, PAGE_SIZE), jnp.int32))
    table = jnp.asarray([[3, 1, 4]], jnp.int32)
    paged = []
    for start, stop in ((0, 19), (19, 43), (43, 44), (44, 45)):
        positions = jnp.arange(start, stop, dtype=jnp.int32)
        batch = Batch(
            tokens=positions,
            positions=positions,
            rope_lens=positions + 1,
            slots=table[0][positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE,
            page_table=table,
            kv_lens=jnp.asarray([stop], jnp.int32),
            cu_q_lens=None if stop == start + 1 else jnp.asarray([0, stop - start], jnp.int32),
        )
        attend = PagedAttend(batch, NUM_PAGES, backend)
        out, cache = attend(
            qkv[start:stop], cache, layer=1, rotary=rotary(start, stop), scale=0.3, variant=variant
        )
        paged.append(out)
    np.testing.assert_allclose(np.concatenate(paged), dense, atol=2e-6)


def test_each_feature_changes_the_result() -> None:
    qkv = jax.random.normal(jax.random.key(0), (LENGTH, KV_HEADS, GROUP + 2, DIM))
    outs = [
        dense_attend(qkv, None, layer=0, rotary=rotary(0, LENGTH), scale=0.3, variant=v)[0] for v in VARIANTS
    ]
    for i, out in enumerate(outs):
        for other in outs[:i]:
            assert jnp.abs(out - other).max() > 0.01


def test_gradients_flow_through_every_feature() -> None:
    qkv = jax.random.normal(jax.random.key(0), (2, LENGTH, KV_HEADS, GROUP + 2, DIM))
    cos, sin = (jnp.broadcast_to(x[None], (2, *x.shape)) for x in rotary(0, LENGTH))

    def loss(qkv: jax.Array, sinks: jax.Array) -> jax.Array:
        variant = AttentionVariant(softcap=1.5, window=7, alibi_slopes=SLOPES, sinks=sinks)
        out, _ = dense_attend(qkv, None, layer=0, rotary=(cos, sin), scale=0.3, variant=variant)
        return jnp.sum(out**2)

    for grad in jax.grad(loss, argnums=(0, 1))(qkv, SINKS):
        assert jnp.isfinite(grad).all() and (jnp.abs(grad) > 0).any()


def test_a_variant_without_meaning_raises() -> None:
    qkv = jnp.ones((3, KV_HEADS, GROUP + 2, DIM))
    with pytest.raises(ValueError, match=r"sinks must have shape \(6,\)"):
        variant = AttentionVariant(sinks=jnp.ones(3))
        dense_attend(qkv, None, layer=0, rotary=rotary(0, 3), scale=0.3, variant=variant)
