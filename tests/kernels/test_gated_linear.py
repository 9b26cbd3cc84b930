"""The gated product of many rows: interpreted on a CPU, lowered for an H200 without one, run on one."""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pjengine.pallas_kernels.dispatch import chosen_backends
from pjengine.pallas_kernels.gated_linear import GatedTiles, gated_linear, gated_mosaic, reference
from tests.kernels.cases import cuda_mesh, cuda_target

LAYERS = 3
SMALL = GatedTiles(num_stages=2, num_programs=2)
HALVED = GatedTiles(is_halved=True, num_stages=3, num_programs=3)
# The interpreter multiplies what is not yet written and what no one reads: NaN.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")


def draw(seed: int, *shape: int, dtype: str = "bfloat16", scale: float = 1.0) -> jax.Array:
    return (scale * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)


def weights_of(k: int, n: int, *, layer: int, dtype: str = "bfloat16") -> jax.Array:
    """A stack in which only one layer may be read: the others are NaN."""
    stack = jnp.full((LAYERS, k, 2, n), jnp.nan, dtype)
    return stack.at[layer].set(draw(0, k, 2, n, dtype=dtype, scale=k**-0.5))


def assert_close(out: jax.Array, x: jax.Array, weights: jax.Array, layer: int) -> None:
    """To the product in float32, of which only the result is rounded."""
    gate_up = np.asarray(x, np.float32) @ np.asarray(weights[layer].reshape(x.shape[1], -1), np.float32)
    gates, ups = np.split(gate_up, 2, axis=1)
    eps = float(jnp.finfo(x.dtype).eps)
    np.testing.assert_allclose(
        np.asarray(out, np.float32), gates / (1 + np.exp(-gates)) * ups, rtol=eps, atol=eps / 4
    )


@pytest.mark.parametrize(
    ("num_rows", "k", "n", "tiles", "dtype"),
    [
        (128, 128, 128, SMALL, "bfloat16"),
        (8, 192, 256, SMALL, "bfloat16"),  # rows of one warpgroup only
        (264, 128, 256, SMALL, "bfloat16"),  # six blocks for two programs
        # Of six blocks two in halves, one without rows.
        (136, 128, 384, replace(SMALL, num_programs=4), "bfloat16"),
        (136, 128, 384, replace(SMALL, num_programs=4), "float16"),
        (64, 64, 128, HALVED, "bfloat16"),  # fewer blocks than programs, a single step
        (136, 256, 256, HALVED, "bfloat16"),
        (136, 256, 256, HALVED, "float16"),
    ],
)
def test_it_is_the_gated_product_of_the_layer_asked_for(
    num_rows: int, k: int, n: int, tiles: GatedTiles, dtype: str
) -> None:
    x, weights = draw(1, num_rows, k, dtype=dtype), weights_of(k, n, layer=1, dtype=dtype)
    out = gated_mosaic(x, weights, jnp.int32(1), tiles=tiles, interpret=plgpu.InterpretGPUParams())
    assert out.dtype == dtype
    assert_close(out, x, weights, 1)


@pytest.mark.parametrize("tiles", [SMALL, HALVED])
def test_warpgroups_do_not_race(tiles: GatedTiles) -> None:
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

    x, weights = draw(1, 136, 256), weights_of(256, 128, layer=2)
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    out = gated_mosaic(x, weights, jnp.int32(2), tiles=tiles, interpret=interpret)
    assert_close(out, x, weights, 2)
    assert not interpreter.get_races().races_found


def test_blocks_of_a_last_round_are_halved_where_that_gives_more_programs_a_part() -> None:
    tiles = GatedTiles(num_programs=10)
    assert tiles.counts(20) == (20, 0)
    assert tiles.counts(25) == (20, 10)
    assert tiles.counts(26) == (26, 0)
    assert tiles.counts(3) == (0, 6)
    assert replace(tiles, is_halved=True).counts(25) == (0, 25)


def test_the_public_op_takes_a_backend_and_chooses_tiles() -> None:
    x, weights = draw(1, 32, 64), weights_of(64, 4096, layer=1)
    out = gated_linear(x, weights, 1, backend="mosaic_interpret")
    assert_close(out, x, weights, 1)
    expected = gated_linear(x, weights, 1)
    assert chosen_backends()["gated_linear"] == "reference"
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(expected, np.float32), rtol=0.03, atol=0.03
    )


@pytest.mark.parametrize(
    ("num_rows", "k", "n", "dtypes", "message"),
    [
        (64, 64, 128, ("float32", "float32"), "dtypes float32, float32: wanted bfloat16 or float16"),
        (64, 64, 128, ("bfloat16", "float16"), "dtypes bfloat16, float16: wanted bfloat16 or float16"),
        (64, 96, 128, ("bfloat16", "bfloat16"), "96 x 128 weights: wanted multiples of 64 and 128"),
        (64, 64, 192, ("bfloat16", "bfloat16"), "64 x 192 weights: wanted multiples of 64 and 128"),
        (68, 64, 128, ("bfloat16", "bfloat16"), "68 rows: wanted a multiple of 8"),
        (24, 64, 4096, ("bfloat16", "bfloat16"), "24 x 4096 results: wanted 32 rows"),
        (128, 64, 1920, ("bfloat16", "bfloat16"), "128 x 1920 results: .* 32 blocks of 64 x 128"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(
    num_rows: int, k: int, n: int, dtypes: tuple[str, str], message: str
) -> None:
    x, weights = draw(1, num_rows, k, dtype=dtypes[0]), jnp.zeros((1, k, 2, n), dtypes[1])
    with pytest.raises(NotImplementedError, match=message):
        gated_linear(x, weights, 0, backend="mosaic_interpret")


def test_other_gpus_are_refused() -> None:
    x, weights = draw(1, 64, 64), jnp.zeros((1, 64, 2, 128), jnp.bfloat16)
    with (
        jax.sharding.use_abstract_mesh(cuda_mesh("NVIDIA A100-SXM4-80GB")),
        pytest.raises(NotImplementedError, match="A100"),
    ):
        jax.eval_shape(functools.partial(gated_linear, layer=0, backend="mosaic"), x, weights)


def lowered(num_rows: int, *, dtype: str = "bfloat16") -> str:
    """Two layers of llama-8b, lowered for an H200 with no backend asked for."""
    x = jax.ShapeDtypeStruct((num_rows, 4096), dtype)
    weights = jax.ShapeDtypeStruct((2, 4096, 2, 14336), dtype)

    def two_layers(x: jax.Array, weights: jax.Array) -> jax.Array:
        return gated_linear(x, weights, 0) + gated_linear(x, weights, 1)

    with cuda_target():
        return jax.jit(two_layers).trace(x, weights).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("num_rows", [64, 128, 512])
def test_hopper_runs_one_kernel_for_all_layers(num_rows: int) -> None:
    assert len(re.findall(r"custom_call @mosaic_gpu", lowered(num_rows))) == 1
    assert chosen_backends()["gated_linear"] == "mosaic"


@pytest.mark.parametrize(("num_rows", "dtype"), [(100, "bfloat16"), (512, "float32")])
def test_hopper_leaves_the_rest_to_xla(num_rows: int, dtype: str) -> None:
    assert "mosaic_gpu" not in lowered(num_rows, dtype=dtype)
    assert chosen_backends()["gated_linear"] == "reference"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_rows", "dtype"),
    [
        (32, "bfloat16"),
        (72, "bfloat16"),
        (200, "bfloat16"),
        (200, "float16"),
        (520, "bfloat16"),
        (4104, "bfloat16"),
    ],
)
def test_large_products_equal_the_reference_on_every_run(num_rows: int, dtype: str) -> None:
    x = draw(1, num_rows, 1024, dtype=dtype)
    weights = weights_of(1024, 4096, layer=1, dtype=dtype)
    out = gated_linear(x, weights, 1, backend="mosaic")
    expected = reference(x.astype(jnp.float32), weights.astype(jnp.float32), 1)
    eps = float(jnp.finfo(x.dtype).eps)
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(expected), rtol=2 * eps, atol=eps)
    for _ in range(3):  # a race would move the result
        assert (gated_linear(x, weights, 1, backend="mosaic") == out).all()
