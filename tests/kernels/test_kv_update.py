"""Writing into the paged cache: values, dropped tokens, and no copy of the cache."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.pallas_kernels.kv_update import write_kv


@pytest.mark.parametrize("page_size", [16, 64])
def test_tokens_land_in_their_slots_of_their_layer_and_padding_nowhere(page_size: int) -> None:
    num_pages, rng = 5, np.random.default_rng(0)
    before = rng.standard_normal((2, 2 * num_pages, 3, page_size, 8)).astype(np.float32)
    new = rng.standard_normal((2, 6, 3, 8)).astype(np.float32)
    slots = np.array([-1, 4 * page_size + 3, 2 * page_size - 1, -1, page_size, 3 * page_size + 7], np.int32)
    out = write_kv(*map(jnp.asarray, (*before, *new, slots)), page_offset=num_pages)
    for pages, x, written in zip(before, new, out, strict=True):
        for token, slot in enumerate(slots):
            if slot >= 0:
                pages[num_pages + slot // page_size, :, slot % page_size] = x[token]
        np.testing.assert_array_equal(written, pages)


def test_tokens_are_cast_to_the_dtype_of_the_cache() -> None:
    pages, x = jnp.zeros((2, 1, 16, 8), jnp.bfloat16), jnp.full((1, 1, 8), 1 / 3)
    k_pages, _ = write_kv(pages, pages, x, x, jnp.array([17]), page_offset=0)
    assert k_pages.dtype == jnp.bfloat16
    np.testing.assert_array_equal(k_pages[1, :, 1], x[0].astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_donated_caches_are_written_in_place_by_every_layer(dtype: str) -> None:
    num_pages, num_layers = 256, 2
    pages = jax.ShapeDtypeStruct((num_layers * num_pages, 4, 16, 64), dtype)
    kv = jax.ShapeDtypeStruct((32, 4, 64), dtype)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(k_pages: jax.Array, v_pages: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array) -> Any:
        for layer in range(num_layers):
            k_pages, v_pages = write_kv(k_pages, v_pages, k, v, slots, page_offset=layer * num_pages)
            k = v = k_pages[:32, :, 0] + v_pages[:32, :, 0]  # a layer reads what it wrote
        return k_pages, v_pages

    compiled = step.lower(pages, pages, kv, kv, jax.ShapeDtypeStruct((32,), jnp.int32)).compile()
    memory = compiled.memory_analysis()
    cache_bytes = 2 * pages.size * jnp.dtype(dtype).itemsize
    assert memory is not None
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 8
