"""Programs that share a sum, interpreted one after the other; on a GPU, as they come."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pjengine.pallas_kernels.last_split import Counters, counters_for, finish_last
from pjengine.pallas_kernels.paged_attention import DecodeTiles, decode_triton
from pjengine.pallas_kernels.skinny_linear import Residual, SkinnyTiles, skinny_residual, skinny_triton

SUMS, PROGRAMS = 3, 4


def shared_sums(
    x: jax.Array, counters: jax.Array, num_programs: list[int]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums of rows of x [sums, programs], how often each was finished, and the counters."""

    def kernel(x_ref: Any, wanted_ref: Any, _: Any, out_ref: Any, times_ref: Any, counters_ref: Any) -> None:
        at, program = pl.program_id(0), pl.program_id(1)

        @pl.when(program == 0)
        def start() -> None:
            times_ref[at] = jnp.int32(0)

        def finish() -> None:
            out_ref[at] = x_ref[at].sum()
            times_ref[at] = times_ref[at] + 1

        @pl.when(program < wanted_ref[at])
        def count() -> None:
            finish_last(counters_ref, at, wanted_ref[at], finish, interpret=True)

    outs = pl.pallas_call(
        kernel,
        grid=x.shape,
        out_shape=[
            jax.ShapeDtypeStruct((len(x),), x.dtype),
            jax.ShapeDtypeStruct((len(x),), jnp.int32),
            jax.ShapeDtypeStruct(counters.shape, jnp.int32),
        ],
        input_output_aliases={2: 2},
        interpret=True,
    )(x, jnp.asarray(num_programs, jnp.int32), counters)
    return outs[0], outs[1], outs[2]


def test_each_sum_is_finished_once_and_leaves_a_zero() -> None:
    x = jax.random.normal(jax.random.key(0), (SUMS, PROGRAMS))
    lent = Counters(SUMS + 2)
    out, times, lent.array = shared_sums(x, lent.array, [PROGRAMS, 1, 2])
    np.testing.assert_allclose(out, x.sum(axis=1), rtol=1e-6)
    assert times.tolist() == [1, 1, 1]
    assert not lent.array.any()


def test_a_sum_that_is_not_complete_is_not_finished() -> None:
    counters = jnp.full((SUMS,), -1, jnp.int32)  # one program too few
    _, times, after = shared_sums(jnp.ones((SUMS, PROGRAMS)), counters, [PROGRAMS] * SUMS)
    assert times.tolist() == [0, 0, 0]
    assert after.tolist() == [PROGRAMS - 1] * SUMS


def test_kernels_make_their_own_counters_or_take_enough() -> None:
    assert counters_for(5, None).tolist() == [0] * 5
    assert len(counters_for(5, jnp.zeros((7,), jnp.int32))) == 7
    with pytest.raises(ValueError, match="4 counters: wanted one for each of 5 sums"):
        counters_for(5, jnp.zeros((4,), jnp.int32))


def test_kernels_of_a_step_pass_the_counters_on() -> None:
    x, weights = jnp.ones((3, 512), jnp.bfloat16), jnp.ones((1, 512, 256), jnp.bfloat16)
    residual, lent = Residual(x[:, :256], jnp.ones((1, 256), jnp.bfloat16), 0), Counters(256)

    def twice() -> jax.Array:
        for _ in range(2):
            before = lent.array
            rows, _ = skinny_residual(x, weights, 0, residual, counters=lent, backend="triton_interpret")
            assert lent.array is not before
            assert not lent.array.any()
        return rows

    assert (twice() == 513 - 1).all()  # 513 in bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [2, 4, 8])
def test_whichever_split_comes_last_the_bits_are_the_same(num_splits: int) -> None:
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (5, 4096), jnp.bfloat16)
    weights = jax.random.normal(keys[1], (1, 4096, 1024), jnp.bfloat16)
    tiles = SkinnyTiles(block_n=64, block_k=64, num_splits=num_splits)
    multiply = functools.partial(skinny_triton, eps=0.0, is_gated=False, tiles=tiles)
    q = jax.random.normal(keys[2], (5, 32, 128), jnp.bfloat16)
    pages = [jax.random.normal(key, (256, 8, 16, 128), jnp.bfloat16) for key in keys[3:]]
    table = jnp.arange(5 * 51, dtype=jnp.int32).reshape(5, 51)
    lens = jnp.asarray([0, 1, 64, 700, 816], jnp.int32)
    decode_tiles = DecodeTiles(block_kv=64, num_splits=num_splits)
    attend = functools.partial(decode_triton, scale=0.1, tiles=decode_tiles)
    first: list[np.ndarray] | None = None
    for _ in range(500):
        (product,) = multiply(x, weights, jnp.int32(0), None, None)
        out, counters = attend(q, *pages, table, lens, jnp.int32(0))
        assert not counters.any()
        bits = [np.asarray(array).view(np.uint16) for array in (product, out)]
        first = first or bits
        for found, wanted in zip(bits, first, strict=True):
            np.testing.assert_array_equal(found, wanted)
