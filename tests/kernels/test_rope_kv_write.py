"""Rotation and KV write in one kernel, against the two apart."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.pallas_kernels.rope_kv_write import reference, rope_kv_write, rope_kv_write_triton
from tests.kernels.cases import INTERPRET, TRITON

NUM_PAGES = 5


def arguments(
    dtype: str, *, group: int = 4, kv_heads: int = 2, head_dim: int = 32, page_size: int = 16
) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 5)
    qkv = jax.random.normal(keys[0], (4, kv_heads, group + 2, head_dim)).astype(dtype)
    cos, sin = (jax.random.normal(key, (4, head_dim // 2)) for key in keys[1:3])
    pages = (2 * NUM_PAGES, kv_heads, page_size, head_dim)
    k_pages, v_pages = (jax.random.normal(key, pages).astype(dtype) for key in keys[3:])
    slots = jnp.array([3 * page_size + 7, -1, 2 * page_size - 1, page_size], jnp.int32)
    return qkv, cos, sin, k_pages, v_pages, slots, jnp.int32(NUM_PAGES)


@INTERPRET
@pytest.mark.parametrize(
    ("heads", "dtype"),
    [
        ({}, "float32"),
        ({}, "float16"),
        ({}, "bfloat16"),
        ({"group": 1, "kv_heads": 5, "page_size": 32}, "bfloat16"),
        ({"group": 3, "head_dim": 80}, "bfloat16"),
        ({"group": 3, "head_dim": 80}, "float32"),
        ({"group": 71, "kv_heads": 1, "head_dim": 64}, "bfloat16"),
        ({"head_dim": 256}, "bfloat16"),
    ],
)
def test_kernel_does_what_rotation_and_write_do(heads: dict[str, int], dtype: str, interpret: bool) -> None:
    args = arguments(dtype, **heads)
    expected, found = reference(*args), rope_kv_write_triton(*args, interpret=interpret)
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), tolerance, tolerance)


@TRITON
def test_all_but_the_slots_stay_as_they_are(backend: str) -> None:
    qkv, cos, sin, k_pages, v_pages, slots, offset = arguments("bfloat16")
    k_pages, v_pages = jnp.full_like(k_pages, jnp.nan), jnp.full_like(v_pages, jnp.nan)
    args = (qkv, cos, sin, k_pages, v_pages, slots)
    q, *written = rope_kv_write(*args, page_offset=offset, backend=backend)
    assert not jnp.isnan(q.astype(jnp.float32)).any()
    for pages in written:
        rows = ~jnp.isnan(pages.astype(jnp.float32)).any(axis=(1, 3))
        assert {tuple(at) for at in np.argwhere(rows).tolist()} == {(8, 7), (6, 15), (6, 0)}


@INTERPRET
def test_values_are_copied_whatever_they_are(interpret: bool) -> None:
    qkv, *rest = arguments("bfloat16")
    qkv = qkv.at[0, :, -1].set(jnp.inf)
    _, _, v_pages = rope_kv_write_triton(qkv, *rest, interpret=interpret)
    assert jnp.isinf(v_pages[NUM_PAGES + 3, :, 7].astype(jnp.float32)).all()


@pytest.mark.parametrize(
    "backend", ["reference", "triton_interpret", pytest.param("triton", marks=pytest.mark.gpu)]
)
def test_donated_caches_are_not_copied(backend: str) -> None:
    args = arguments("float32")

    @functools.partial(jax.jit, donate_argnums=(3, 4))
    def step(*args: Any) -> Any:
        return rope_kv_write(*args, page_offset=NUM_PAGES, backend=backend)

    memory = step.lower(*args[:-1]).compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= args[3].nbytes + args[4].nbytes


def test_what_the_kernel_cannot_do_is_refused() -> None:
    qkv, cos, sin, k_pages, v_pages, *rest = arguments("bfloat16")
    with pytest.raises(NotImplementedError, match="dtypes"):
        rope_kv_write_triton(qkv, cos, sin, k_pages.astype(jnp.float32), v_pages, *rest)
    with pytest.raises(NotImplementedError, match="dimensions rotated"):
        rope_kv_write_triton(qkv, cos[:, :4], sin[:, :4], k_pages, v_pages, *rest)
    with pytest.raises(NotImplementedError, match="query heads"):
        rope_kv_write_triton(*arguments("bfloat16", group=129))
    with pytest.raises(NotImplementedError, match="head_dim"):
        rope_kv_write_triton(*arguments("bfloat16", head_dim=320))
