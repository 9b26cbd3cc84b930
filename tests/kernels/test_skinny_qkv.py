"""The QKV product that rotates and writes, against product, rotation and write apart."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.pallas_kernels.last_split import Counters
from pjengine.pallas_kernels.skinny_linear import SkinnyTiles, start_norm
from pjengine.pallas_kernels.skinny_qkv import Destination, reference, skinny_qkv, skinny_qkv_triton
from tests.kernels.cases import INTERPRET, TRITON

EPS, NUM_PAGES, PAGE_SIZE, SLOTS = 1e-5, 5, 16, [3 * 16 + 7, -1, 31, 16]


def arguments(*, group: int = 2, kv_heads: int = 2, head_dim: int = 32, k: int = 128) -> tuple[Any, ...]:
    """Four rows, the second of them padding; only layer 1 of 2 and its pages may be read or written."""
    keys = jax.random.split(jax.random.key(0), 6)
    n = kv_heads * (group + 2) * head_dim
    x = (3 * jax.random.normal(keys[0], (4, k))).astype("bfloat16")
    weights = jnp.full((2, k, n), jnp.nan, jnp.bfloat16)
    weights = weights.at[1].set((k**-0.5 * jax.random.normal(keys[1], (k, n))).astype("bfloat16"))
    biases = jax.random.normal(keys[2], (2, n)).astype("bfloat16")
    cos, sin = (jax.random.normal(key, (4, head_dim // 2)) for key in keys[3:5])
    pages = jnp.full((2 * NUM_PAGES, kv_heads, PAGE_SIZE, head_dim), jnp.nan, jnp.bfloat16)
    where = Destination(cos, sin, pages, pages, jnp.asarray(SLOTS, jnp.int32), jnp.int32(NUM_PAGES))
    return start_norm(x, 1 + 0.1 * x[0]), weights, jnp.int32(1), where, biases


def assert_equal(found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=2e-2, atol=3e-2)


@INTERPRET
@pytest.mark.parametrize("has_biases", [False, True])
@pytest.mark.parametrize(
    ("heads", "tiles"),
    [
        ({}, SkinnyTiles(block_n=32, block_k=64)),
        ({}, SkinnyTiles(block_n=16, block_k=32, num_splits=2)),
        ({"group": 1, "kv_heads": 3, "head_dim": 16}, SkinnyTiles(block_n=16, block_k=16, num_splits=4)),
        ({"group": 5, "kv_heads": 1, "head_dim": 64}, SkinnyTiles(block_n=32, block_k=64, num_splits=2)),
    ],
)
def test_kernel_does_what_product_rotation_and_write_do(
    heads: dict[str, int], tiles: SkinnyTiles, has_biases: bool, interpret: bool
) -> None:
    *args, biases = arguments(**heads)
    args.append(biases if has_biases else None)
    expected = reference(*args, eps=EPS)
    *found, counters = skinny_qkv_triton(*args, eps=EPS, tiles=tiles, interpret=interpret)
    assert_equal(tuple(found), expected)
    assert not counters.any()


@TRITON
def test_all_but_the_slots_stay_as_they_are(backend: str) -> None:
    *args, _ = arguments()
    _, *written = skinny_qkv(*args, eps=EPS, backend=backend)
    for pages in written:
        rows = ~jnp.isnan(pages.astype(jnp.float32)).any(axis=(1, 3))
        assert {tuple(at) for at in np.argwhere(rows).tolist()} == {(8, 7), (6, 15), (6, 0)}


@INTERPRET
def test_values_are_copied_whatever_they_are(interpret: bool) -> None:
    *args, biases = arguments()
    is_value = jnp.arange(biases.shape[1]) // 32 % 4 == 3
    args = [*args, jnp.where(is_value[None], jnp.bfloat16(jnp.inf), biases)]
    q, k_pages, v_pages, _ = skinny_qkv_triton(*args, eps=EPS, interpret=interpret)
    assert jnp.isinf(v_pages[NUM_PAGES + 3, :, 7].astype(jnp.float32)).all()
    assert jnp.isfinite(k_pages[NUM_PAGES + 3, :, 7].astype(jnp.float32)).all()
    assert jnp.isfinite(q.astype(jnp.float32)).all()


@pytest.mark.parametrize("heads", [{"head_dim": 96}, {"group": 6}])
@pytest.mark.parametrize(
    "backend", ["reference", "triton_interpret", pytest.param("triton", marks=pytest.mark.gpu)]
)
def test_any_heads_will_do(heads: dict[str, int], backend: str) -> None:
    x, weights, layer, where, biases = arguments(**heads)
    lent = Counters(weights.shape[2])
    found = skinny_qkv(x, weights, layer, where, biases=biases, eps=EPS, counters=lent, backend=backend)
    assert_equal(found, reference(x, weights, layer, where, biases, eps=EPS))
    assert not lent.array.any()


def test_what_the_kernel_cannot_do_is_refused() -> None:
    x, weights, layer, where, _ = arguments()

    def call(where: Destination, **tiles: int) -> Any:
        options: dict[str, Any] = {"eps": EPS, "interpret": True}
        options["tiles"] = SkinnyTiles(**{"block_n": 32, "block_k": 64, **tiles})
        return skinny_qkv_triton(x, weights, layer, where, None, **options)

    with pytest.raises(NotImplementedError, match="dtypes bfloat16, float32"):
        call(where._replace(v_pages=where.v_pages.astype(jnp.float32)))
    with pytest.raises(NotImplementedError, match="16 of 32 dimensions rotated"):
        call(where._replace(cos=where.cos[:, :8], sin=where.sin[:, :8]))
    with pytest.raises(NotImplementedError, match="blocks of 64"):
        call(where, block_n=64)
    with pytest.raises(NotImplementedError, match="wanted multiples"):
        call(where, block_k=48)
    with pytest.raises(ValueError, match="3 counters"):
        few = jnp.zeros((3,), jnp.int32)
        skinny_qkv_triton(x, weights, layer, where, None, few, eps=EPS, interpret=True)
