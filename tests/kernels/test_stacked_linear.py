"""Products by weights in a stack of layers: interpreted, lowered for an H200, run on one."""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pjengine.pallas_kernels.dispatch import chosen_backends
from pjengine.pallas_kernels.shapes import HEADS, PRODUCTS
from pjengine.pallas_kernels.stacked_linear import (
    StackedTiles,
    choose_splits,
    reference,
    stacked_linear,
    stacked_mosaic,
)
from tests.kernels.cases import cuda_mesh, cuda_target

LAYERS = 3
# A program makes all parts of a block, or one of them.
WHOLE = StackedTiles(num_splits=2, num_stages=2, num_programs=2)
SPLIT = replace(WHOLE, is_split=True, num_programs=3)
LOW = StackedTiles(num_splits=2, block_m=64, num_stages=3, num_programs=3)
LOW_SPLIT = replace(LOW, is_split=True)
WIDE = StackedTiles(num_splits=2, block_n=256, num_stages=2, num_programs=2)
# The interpreter multiplies what is not yet written and what no one reads: NaN.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")


def draw(seed: int, *shape: int, dtype: str = "bfloat16", scale: float = 1.0) -> jax.Array:
    return (scale * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)


def weights_of(
    k: int, n: int, *, layer: int, is_transposed: bool = False, dtype: str = "bfloat16"
) -> jax.Array:
    """A stack in which only one layer may be read: the others are NaN."""
    stack = jnp.full((LAYERS, k, n), jnp.nan, dtype)
    stack = stack.at[layer].set(draw(0, k, n, dtype=dtype, scale=k**-0.5))
    return stack.swapaxes(1, 2) if is_transposed else stack


def interpreted(
    x: jax.Array,
    weights: jax.Array,
    layer: int,
    tiles: StackedTiles,
    *,
    dtype: str | None = None,
    is_transposed: bool = False,
    detect_races: bool = False,
) -> jax.Array:
    return stacked_mosaic(
        x, weights, jnp.int32(layer), dtype=jnp.dtype(dtype or x.dtype), is_transposed=is_transposed,
        tiles=tiles, interpret=plgpu.InterpretGPUParams(detect_races=detect_races),
    )  # fmt: skip


def assert_close(out: jax.Array, x: jax.Array, layer_weights: jax.Array) -> None:
    """To the product in float32, of which only the result is rounded."""
    expected = np.asarray(x, np.float32) @ np.asarray(layer_weights, np.float32)
    eps = float(jnp.finfo(out.dtype).eps)
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, rtol=eps, atol=max(eps / 8, 1e-5))


def bits(out: jax.Array) -> list[bytes]:
    """Of each row."""
    return [row.tobytes() for row in np.asarray(out)]


@pytest.mark.parametrize(
    ("num_rows", "k", "n", "tiles", "dtype", "out_dtype", "is_transposed"),
    [
        (136, 256, 256, WHOLE, "bfloat16", None, False),  # rows of one warpgroup only in the last blocks
        (8, 256, 128, replace(WHOLE, num_splits=4), "bfloat16", "float32", True),  # parts of a single step
        (136, 256, 256, SPLIT, "float16", None, True),
        (72, 192, 128, replace(LOW, num_splits=3), "float16", "float32", False),
        (72, 256, 256, replace(LOW_SPLIT, block_n=256), "bfloat16", "float32", False),
        (136, 128, 384, replace(WHOLE, block_n=192), "bfloat16", None, False),  # three pieces to write
        (8, 128, 256, replace(WIDE, num_splits=1), "bfloat16", "float32", True),
    ],
)
def test_it_is_the_product_of_the_layer_asked_for(
    num_rows: int,
    k: int,
    n: int,
    tiles: StackedTiles,
    dtype: str,
    out_dtype: str | None,
    is_transposed: bool,
) -> None:
    x = draw(1, num_rows, k, dtype=dtype)
    weights = weights_of(k, n, layer=1, is_transposed=is_transposed, dtype=dtype)
    out = interpreted(x, weights, 1, tiles, dtype=out_dtype, is_transposed=is_transposed)
    assert out.dtype == (out_dtype or dtype) and out.shape == (num_rows, n)
    assert_close(out, x, weights[1].T if is_transposed else weights[1])


@pytest.mark.parametrize("tiles", [WHOLE, LOW_SPLIT])
def test_warpgroups_do_not_race(tiles: StackedTiles) -> None:
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

    x, weights = draw(1, 136, 256), weights_of(256, 128, layer=2)
    out = interpreted(x, weights, 2, tiles, detect_races=True)
    assert_close(out, x, weights[2])
    assert not interpreter.get_races().races_found


@pytest.mark.parametrize(
    ("is_transposed", "others"),
    [
        (False, [(8, LOW_SPLIT), (64, LOW), (136, replace(WIDE, is_split=True))]),
        (True, []),
    ],
)
def test_rows_have_the_same_bits_among_any_others_and_by_any_tiles(
    is_transposed: bool, others: list[tuple[int, StackedTiles]]
) -> None:
    x, weights = draw(1, 200, 256), weights_of(256, 256, layer=0, is_transposed=is_transposed)
    multiply = functools.partial(interpreted, dtype="float32", is_transposed=is_transposed)
    wanted = bits(multiply(x, weights, 0, WHOLE))
    assert len(set(wanted)) == 200
    for num_rows, tiles in others:
        assert bits(multiply(x[:num_rows], weights, 0, tiles)) == wanted[:num_rows], (num_rows, tiles)
    order = np.random.default_rng(0).permutation(200)[:72]
    assert bits(multiply(x[order], weights, 0, SPLIT)) == [wanted[row] for row in order]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_results_have_the_same_bits_in_both_ways(dtype: str) -> None:
    """Also where XLA makes one kernel of the parts' sum and of what follows, which wants float32."""
    x, weights = draw(1, 136, 256, dtype=dtype), weights_of(256, 128, layer=0, dtype=dtype)
    wanted = interpreted(x, weights, 0, WHOLE)[:64]
    widened = jax.jit(lambda x: interpreted(x, weights, 0, LOW_SPLIT).astype(jnp.float32))(x[:64])
    assert bits(widened) == bits(wanted.astype(jnp.float32))


@pytest.mark.parametrize("tiles", [WHOLE, SPLIT])
def test_parts_are_summed_in_their_order(tiles: StackedTiles) -> None:
    """2^24 takes up no 1. In pairs the sum would be 1, from the last part to the first 2."""
    x = (
        jnp.zeros((8, 256), jnp.bfloat16)
        .at[:, ::64]
        .set(jnp.asarray([2.0**24, 1, 1, -(2.0**24)], jnp.bfloat16)[None])
    )
    weights = jnp.ones((1, 256, 128), jnp.bfloat16)
    out = interpreted(x, weights, 0, replace(tiles, num_splits=4), dtype="float32")
    assert (out == 0).all()
    swapped = x.at[:, 128].set(x[:, 192]).at[:, 192].set(1)
    out = interpreted(swapped, weights, 0, replace(tiles, num_splits=4), dtype="float32")
    assert (out == 1).all()


def test_another_number_of_parts_gives_other_bits() -> None:
    """Else the tests of equal bits could not fail."""
    x, weights = draw(1, 8, 256), weights_of(256, 128, layer=0)
    one = interpreted(x, weights, 0, replace(WHOLE, num_splits=1), dtype="float32")
    two = interpreted(x, weights, 0, WHOLE, dtype="float32")
    assert all(left != right for left, right in zip(bits(one), bits(two), strict=True))


def test_parts_depend_on_the_weights_alone_where_bits_must_not_change() -> None:
    """Another number of parts is another product: an engine's recorded runs would not be replayed."""
    products = {**PRODUCTS["llama-8b"], "head": HEADS["llama-8b"]}
    splits = {name: choose_splits(*products[name]) for name in ("qkv", "out", "down", "head")}
    assert splits == {"qkv": 1, "out": 2, "down": 2, "head": 1}
    assert choose_splits(192, 128) == 1  # of whole steps


# What was the fastest on an H200, or within a twentieth of it.
@pytest.mark.parametrize(
    ("k", "n", "num_rows", "wanted"),
    [
        (4096, 6144, 128, (1, False, 64, 128)),
        (4096, 6144, 256, (1, False, 128, 128)),
        (4096, 6144, 512, (1, False, 128, 192)),
        (4096, 4096, 256, (2, True, 128, 128)),
        (4096, 4096, 1024, (1, False, 128, 256)),
        (14336, 4096, 128, (2, True, 64, 128)),
        (14336, 4096, 256, (2, True, 128, 128)),
        (14336, 4096, 512, (1, False, 128, 128)),
        (14336, 4096, 16384, (1, False, 128, 256)),
    ],
)
def test_tiles_are_those_that_were_fast(
    k: int, n: int, num_rows: int, wanted: tuple[int, bool, int, int]
) -> None:
    tiles = StackedTiles.choose(num_rows=num_rows, k=k, n=n)
    assert (tiles.num_splits, tiles.is_split, tiles.block_m, tiles.block_n) == wanted


def test_the_public_op_takes_a_backend_and_chooses_tiles() -> None:
    x, weights = draw(1, 72, 256), weights_of(256, 256, layer=1)
    out = stacked_linear(x, weights, 1, dtype=jnp.float32, backend="mosaic_interpret")
    assert_close(out, x, weights[1])
    transposed = weights.swapaxes(1, 2)
    expected = stacked_linear(x, transposed, 1, dtype=jnp.float32, is_transposed=True)
    assert chosen_backends()["stacked_linear"] == "reference"
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert stacked_linear(x, weights, 1).dtype == jnp.bfloat16


def test_sizes_that_do_not_belong_together_are_the_callers_mistake() -> None:
    x, weights = draw(1, 8, 64), jnp.zeros((1, 64, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"x has 64 columns: wanted 128, as weights \(1, 64, 128\)"):
        stacked_linear(x, weights, 0, is_transposed=True)


@pytest.mark.parametrize(
    ("num_rows", "k", "n", "dtypes", "message"),
    [
        (64, 64, 128, ("float32", "float32", None), "dtypes float32, float32: wanted bfloat16 or float16"),
        (64, 64, 128, ("bfloat16", "float16", None), "dtypes bfloat16, float16: wanted bfloat16 or float16"),
        (64, 64, 128, ("bfloat16", "bfloat16", "float16"), "results in float16: wanted bfloat16 or float32"),
        (64, 96, 128, ("bfloat16", "bfloat16", None), "96 x 128 weights: wanted multiples of 64 and 128"),
        (64, 64, 192, ("bfloat16", "bfloat16", None), "64 x 192 weights: wanted multiples of 64 and 128"),
        (68, 64, 128, ("bfloat16", "bfloat16", None), "68 rows: wanted a multiple of 8"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(
    num_rows: int, k: int, n: int, dtypes: tuple[str, str, str | None], message: str
) -> None:
    x, weights = draw(1, num_rows, k, dtype=dtypes[0]), jnp.zeros((1, k, n), dtypes[1])
    with pytest.raises(NotImplementedError, match=message):
        stacked_linear(x, weights, 0, dtype=dtypes[2], backend="mosaic_interpret")


def test_other_gpus_are_refused() -> None:
    x, weights = draw(1, 64, 64), jnp.zeros((1, 64, 128), jnp.bfloat16)
    with (
        jax.sharding.use_abstract_mesh(cuda_mesh("NVIDIA A100-SXM4-80GB")),
        pytest.raises(NotImplementedError, match="A100"),
    ):
        jax.eval_shape(functools.partial(stacked_linear, layer=0, backend="mosaic"), x, weights)


def lowered(num_rows: int, *, dtype: str = "bfloat16", is_batch_invariant: bool = False) -> str:
    """Two layers of llama-8b, lowered for an H200 with no backend asked for."""
    x = jax.ShapeDtypeStruct((num_rows, 4096), dtype)
    weights = jax.ShapeDtypeStruct((2, 4096, 4096), dtype)

    def two_layers(x: jax.Array, weights: jax.Array) -> jax.Array:
        one, two = (
            stacked_linear(x, weights, layer, is_batch_invariant=is_batch_invariant) for layer in (0, 1)
        )
        return one + two

    with cuda_target():
        return jax.jit(two_layers).trace(x, weights).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("num_rows", "is_batch_invariant"), [(64, True), (72, False), (512, True), (2048, False)]
)
def test_hopper_runs_one_kernel_for_all_layers(num_rows: int, is_batch_invariant: bool) -> None:
    text = lowered(num_rows, is_batch_invariant=is_batch_invariant)
    assert len(re.findall(r"custom_call @mosaic_gpu", text)) == 1
    assert chosen_backends()["stacked_linear"] == "mosaic"


@pytest.mark.parametrize(
    ("num_rows", "dtype", "is_batch_invariant"),
    [
        (100, "bfloat16", True),
        (512, "float32", True),
        *((num_rows, "bfloat16", False) for num_rows in (64, 136, 1024)),  # that do not pay
    ],
)
def test_hopper_leaves_the_rest_to_xla(num_rows: int, dtype: str, is_batch_invariant: bool) -> None:
    assert "mosaic_gpu" not in lowered(num_rows, dtype=dtype, is_batch_invariant=is_batch_invariant)
    assert chosen_backends()["stacked_linear"] == "reference"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("k", "n", "is_transposed"),
    [(4096, 6144, False), (4096, 4096, False), (14336, 4096, False), (4096, 16384, True)],
)
def test_rows_of_large_products_have_the_same_bits_among_any_others(
    k: int, n: int, is_transposed: bool, dtype: str
) -> None:
    x = draw(1, 1032, k, dtype=dtype)
    weights = weights_of(k, n, layer=1, is_transposed=is_transposed, dtype=dtype)
    multiply = functools.partial(
        stacked_linear, weights=weights, layer=1, is_transposed=is_transposed, is_batch_invariant=True,
        backend="mosaic",
    )  # fmt: skip
    for out_dtype in (dtype, "float32"):
        wanted = bits(multiply(x, dtype=out_dtype))
        expected = reference(
            x.astype(jnp.float32),
            weights.astype(jnp.float32),
            1,
            dtype="float32",
            is_transposed=is_transposed,
        )
        got = np.asarray(multiply(x, dtype=out_dtype), np.float32)
        eps = float(jnp.finfo(out_dtype).eps)
        np.testing.assert_allclose(got, np.asarray(expected), rtol=2 * eps, atol=max(eps, 1e-4))
        for num_rows in (8, 64, 72, 128, 200, 256, 512, 520):
            for _ in range(2):  # a race would move the result
                assert bits(multiply(x[:num_rows], dtype=out_dtype)) == wanted[:num_rows], num_rows
        order = np.random.default_rng(0).permutation(1032)[:256]
        assert bits(multiply(x[order], dtype=out_dtype)) == [wanted[row] for row in order]
