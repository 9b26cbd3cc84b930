"""Products of few rows, against a float32 product."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.pallas_kernels.skinny_linear import (
    Normed,
    Residual,
    SkinnyTiles,
    reference,
    skinny_linear,
    skinny_residual,
    skinny_triton,
    start_norm,
)
from tests.kernels.cases import INTERPRET

EPS = 1e-5
LAYERS = 3


def draw(seed: int, *shape: int, dtype: str = "bfloat16", scale: float = 1.0) -> jax.Array:
    return (scale * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)


def weights_of(k: int, n: int, *, layer: int, dtype: str = "bfloat16") -> jax.Array:
    """A stack in which only one layer may be read: the others are NaN."""
    stack = jnp.full((LAYERS, k, n), jnp.nan, dtype)
    return stack.at[layer].set(draw(0, k, n, dtype=dtype, scale=k**-0.5))


def wide(x: Any) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32))


TILES = [
    SkinnyTiles(block_n=16, block_k=64),
    SkinnyTiles(block_n=32, block_k=32, num_splits=2),
    SkinnyTiles(block_n=64, block_k=16, num_splits=4),
]


@INTERPRET
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize(
    ("num_rows", "dtype"), [*((num_rows, "bfloat16") for num_rows in (1, 5, 16, 32)), (5, "float16")]
)
def test_product_is_that_of_the_layer_asked_for(
    num_rows: int, tiles: SkinnyTiles, dtype: str, interpret: bool
) -> None:
    x, weights = draw(1, num_rows, 128, dtype=dtype), weights_of(128, 192, layer=1, dtype=dtype)
    biases = draw(2, LAYERS, 192, dtype=dtype)
    (out,) = skinny_triton(
        x, weights, jnp.int32(1), biases, None, eps=0.0, is_gated=False, tiles=tiles, interpret=interpret
    )
    expected = wide(x) @ wide(weights[1]) + wide(biases[1])
    np.testing.assert_allclose(wide(out), expected, rtol=1e-2, atol=1e-2)


@INTERPRET
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("num_rows", [1, 3, 17])
def test_norm_finished_by_the_product_is_rms_norm(num_rows: int, tiles: SkinnyTiles, interpret: bool) -> None:
    x, norm, weights = draw(1, num_rows, 128, scale=7.0), draw(2, 128), weights_of(128, 192, layer=2)
    parts = jnp.split(start_norm(x, norm).squares / 3, 1) * 3  # as three programs would have left them
    normed = Normed(start_norm(x, norm).scaled, jnp.concatenate(parts))
    (out,) = skinny_triton(
        normed, weights, jnp.int32(2), None, None, eps=EPS, is_gated=False, tiles=tiles, interpret=interpret
    )
    rows = wide(x) / np.sqrt(np.mean(wide(x) ** 2, axis=1, keepdims=True) + EPS) * wide(norm)
    np.testing.assert_allclose(wide(out), rows @ wide(weights[2]), rtol=2e-2, atol=2e-2)


@INTERPRET
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("num_rows", [1, 20])
def test_gates_multiply_the_other_half(
    num_rows: int, tiles: SkinnyTiles, with_bias: bool, interpret: bool
) -> None:
    x, weights = draw(1, num_rows, 128), weights_of(128, 2 * 192, layer=0)
    biases = draw(2, LAYERS, 2 * 192) if with_bias else None
    (out,) = skinny_triton(
        x, weights, jnp.int32(0), biases, None, eps=0.0, is_gated=True, tiles=tiles, interpret=interpret
    )
    both = wide(x) @ wide(weights[0]) + (0 if biases is None else wide(biases[0]))
    gates, others = np.split(both, 2, axis=1)
    np.testing.assert_allclose(wide(out), gates / (1 + np.exp(-gates)) * others, rtol=2e-2, atol=2e-2)


@INTERPRET
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("num_rows", [1, 20])
def test_residual_is_added_and_its_norm_started(num_rows: int, tiles: SkinnyTiles, interpret: bool) -> None:
    x, weights = draw(1, num_rows, 128), weights_of(128, 192, layer=1)
    rows, norms = draw(2, num_rows, 192), draw(3, 2, 192)
    out, scaled, squares = skinny_triton(
        x, weights, jnp.int32(1), None, Residual(rows, norms, 1),
        eps=0.0, is_gated=False, tiles=tiles, interpret=interpret,
    )  # fmt: skip
    expected = wide(x) @ wide(weights[1]) + wide(rows)
    np.testing.assert_allclose(wide(out), expected, rtol=1e-2, atol=1e-2)
    # The norm is that of the rows as they were stored.
    np.testing.assert_allclose(wide(scaled), wide(out) * wide(norms[1]), rtol=1e-2)
    np.testing.assert_allclose(squares.sum(axis=0), (wide(out) ** 2).sum(axis=1), rtol=1e-5)


@INTERPRET
def test_reference_agrees_with_the_kernel_on_everything_at_once(interpret: bool) -> None:
    normed = start_norm(draw(1, 4, 128), draw(2, 128))
    weights, biases = weights_of(128, 192, layer=1), draw(3, LAYERS, 192)
    residual = Residual(draw(4, 4, 192), draw(5, 2, 192), 0)
    args = (normed, weights, jnp.int32(1), biases, residual)
    options: dict[str, Any] = {"eps": EPS, "is_gated": False}
    expected = reference(*args, **options)
    found = skinny_triton(*args, **options, tiles=TILES[0], interpret=interpret)
    for a, b in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_allclose(wide(a), wide(b), rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(found[2].sum(axis=0), expected[2].sum(axis=0), rtol=1e-2)


@pytest.mark.parametrize(
    "backend", ["reference", "triton_interpret", pytest.param("triton", marks=pytest.mark.gpu)]
)
def test_public_functions_choose_tiles_and_take_a_backend(backend: str) -> None:
    x, weights = draw(1, 2, 512), weights_of(512, 256, layer=1)
    out = skinny_linear(x, weights, 1, backend=backend)
    np.testing.assert_allclose(wide(out), wide(x) @ wide(weights[1]), rtol=1e-2, atol=1e-2)
    rows, normed = skinny_residual(
        x, weights, 1, Residual(draw(2, 2, 256), draw(3, 1, 256), 0), backend=backend
    )
    assert rows.shape == normed.scaled.shape == (2, 256)


def call(x: Any, weights: jax.Array, residual: Residual | None = None) -> Any:
    options: dict[str, Any] = {"eps": 0.0, "is_gated": False, "tiles": TILES[0], "interpret": True}
    return skinny_triton(x, weights, jnp.int32(0), None, residual, **options)


def test_what_the_kernel_cannot_do_is_refused() -> None:
    half = draw(1, 2, 128, dtype="float16")
    half_weights = jnp.zeros((1, 128, 192), jnp.float16)
    with pytest.raises(NotImplementedError, match="dtypes"):
        call(draw(1, 2, 128, dtype="float32"), jnp.zeros((1, 128, 192)))
    with pytest.raises(NotImplementedError, match="dtypes"):
        call(half, jnp.zeros((1, 128, 192), jnp.bfloat16))
    with pytest.raises(NotImplementedError, match="33 rows"):
        call(draw(1, 33, 128), jnp.zeros((1, 128, 192), jnp.bfloat16))
    with pytest.raises(NotImplementedError, match="wanted multiples"):
        call(draw(1, 2, 100), jnp.zeros((1, 100, 192), jnp.bfloat16))
    with pytest.raises(NotImplementedError, match="float16 with a norm"):
        call(start_norm(half, half[0]), half_weights)
    with pytest.raises(NotImplementedError, match="float16 with a norm"):
        call(half, half_weights, Residual(half[:, :1], half[:1, :1], 0))
    with pytest.raises(ValueError, match="must be equal"):
        skinny_linear(start_norm(half, half[0]), jnp.zeros((1, 64, 192), jnp.float16), 0)
