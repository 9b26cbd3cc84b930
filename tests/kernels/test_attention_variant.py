"""Which tiles a kernel goes through, and what it may leave out of the masks."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.pallas_kernels.attention_variant import tile_bounds, window_start


@pytest.mark.parametrize("window", [None, 1, 2, 7, 8, 9, 20, 100])
def test_tiles_are_skipped_masked_and_not_masked_where_they_may_be(window: int | None) -> None:
    block_kv = 8
    for first, num_tokens in itertools.product(range(45), (1, 3, 8, 11)):
        end_slot = first + num_tokens
        bounds = tile_bounds(jnp.int32(first), jnp.int32(end_slot), window=window, block_kv=block_kv)
        begin, full, diagonal, end = map(int, bounds)
        position, slot = np.arange(first, end_slot)[:, None], np.arange(64)[None, :]
        sees = (slot <= position) & (slot > position - (window or 64))
        tiles = sees.reshape(num_tokens, -1, block_kv)
        is_seen = np.flatnonzero(tiles.any(axis=(0, 2)))
        assert (begin, end) == (is_seen[0], is_seen[-1] + 1)
        assert begin <= full <= diagonal <= end
        assert (np.flatnonzero(tiles.all(axis=(0, 2))) == np.arange(full, diagonal)).all()
        assert int(window_start(jnp.int32(first), window)) == np.flatnonzero(sees[0])[0]


@pytest.mark.parametrize("window", [None, 5])
def test_a_block_that_sees_nothing_has_no_tiles(window: int | None) -> None:
    for first in (-20, -3, 0, 30):
        bounds = tile_bounds(jnp.int32(first), jnp.int32(0), window=window, block_kv=8)
        assert tuple(map(int, bounds)) == (0, 0, 0, 0)
