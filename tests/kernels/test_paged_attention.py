"""Decode attention: the reference against a dense softmax, the kernel against both."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.pallas_kernels.attention_variant import AttentionVariant
from pjengine.pallas_kernels.paged_attention import (
    MERGED_GROUP,
    DecodeTiles,
    decode_triton,
    paged_attention,
    reference,
)
from pjengine.pallas_kernels.shapes import SHAPES, HeadShape
from tests.kernels.cases import (
    BACKENDS,
    FEATURED_SHAPES,
    FEATURES,
    SHAPES_AND_DTYPES,
    WINDOW,
    assert_close,
    cuda_target,
    expected,
    make_case,
    make_variant,
)

SMALL = HeadShape(num_heads=4, num_kv_heads=2, head_dim=32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "dtype"), SHAPES_AND_DTYPES)
def test_every_named_shape_equals_a_dense_softmax(name: str, dtype: str, backend: str) -> None:
    case = make_case(SHAPES[name], kv_lens=[70, 0, 5], dtype=dtype)
    out = paged_attention(
        *case.decode_args(), page_offset=case.page_offset, scale=case.scale, backend=backend
    )
    assert out.dtype == dtype
    assert not out[1].any()
    assert_close(out, expected(case), length=70)


@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("num_splits", [1, 3, 8])
@pytest.mark.parametrize(
    ("group", "page_size"),
    [(2, 16), (2, 32), (2, 64), (12, 16)],  # in a group of 12, a kernel that follows merges the splits
)
def test_lengths_around_pages_tiles_and_splits(
    group: int, page_size: int, num_splits: int, interpret: bool
) -> None:
    lens = [0, 1, page_size - 1, page_size, page_size + 1, 31, 32, 33, 127, 300]
    heads = replace(SMALL, num_heads=group * SMALL.num_kv_heads, page_size=page_size)
    case = make_case(heads, kv_lens=lens)
    args = (*case.decode_args(), jnp.int32(case.page_offset))
    tiles = DecodeTiles(block_kv=32, num_splits=num_splits)
    out, counters = decode_triton(*args, scale=case.scale, tiles=tiles, interpret=interpret)
    assert not counters.any()
    assert_close(out, expected(case), length=300)
    assert_close(reference(*args, scale=case.scale), expected(case), length=300)


@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_the_longest_go_first_and_each_gets_its_own(num_splits: int, interpret: bool) -> None:
    case = make_case(SMALL, kv_lens=[5, 70, 0, 300, 16, 129, 70])
    args = (*case.decode_args(), jnp.int32(case.page_offset))
    tiles = DecodeTiles(block_kv=32, num_splits=num_splits)
    in_order, _ = decode_triton(*args, scale=case.scale, tiles=tiles, interpret=interpret)
    tiles = replace(tiles, num_at_once=1)
    out, counters = decode_triton(*args, scale=case.scale, tiles=tiles, interpret=interpret)
    assert (out == in_order).all() and not counters.any()
    assert_close(out, expected(case), length=300)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("features", FEATURES, ids="+".join)
def test_features_equal_a_dense_softmax(features: tuple[str, ...], backend: str) -> None:
    variant = make_variant(SMALL.num_heads, features)
    lens = [0, 1, 15, 16, 17, WINDOW - 1, WINDOW, WINDOW + 1, 70, 100]
    case = make_case(SMALL, kv_lens=lens, window=variant.window)
    out = paged_attention(
        *case.decode_args(), page_offset=case.page_offset, scale=case.scale, variant=variant, backend=backend
    )
    assert not out[0].any()
    assert_close(out, expected(case, variant), length=100)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "heads", FEATURED_SHAPES, ids=lambda s: f"{s.num_heads}/{s.num_kv_heads}x{s.head_dim}"
)
def test_features_in_every_head_shape(heads: HeadShape, backend: str) -> None:
    variant = make_variant(heads.num_heads, FEATURES[-1])
    case = make_case(heads, kv_lens=[70, 0, 5], dtype="bfloat16", window=variant.window)
    out = paged_attention(
        *case.decode_args(), page_offset=case.page_offset, scale=case.scale, variant=variant, backend=backend
    )
    assert_close(out, expected(case, variant), length=70)


@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("num_splits", [3, 8])
@pytest.mark.parametrize(("group", "window"), [(2, 1), (2, 16), (2, 50), (2, 400), (12, 50)])
def test_splits_share_a_window_and_count_a_sink_once(
    group: int, window: int, num_splits: int, interpret: bool
) -> None:
    heads = replace(SMALL, num_heads=group * SMALL.num_kv_heads)
    variant = make_variant(heads.num_heads, FEATURES[-1], window=window)
    case = make_case(heads, kv_lens=[0, 1, 31, window, 127, 300], window=window)
    args = (*case.decode_args(), jnp.int32(case.page_offset))
    tiles = DecodeTiles(block_kv=16, num_splits=num_splits)
    out, counters = decode_triton(*args, variant=variant, scale=case.scale, tiles=tiles, interpret=interpret)
    assert not counters.any()
    assert_close(out, expected(case, variant), length=300)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_far_beyond_the_cap_are_the_cap(backend: str) -> None:
    case = make_case(SMALL, kv_lens=[40])
    case = replace(case, q=case.q * 1e6)  # exponentials over- and underflow
    variant = AttentionVariant(softcap=30.0)
    out = paged_attention(
        *case.decode_args(), page_offset=case.page_offset, scale=case.scale, variant=variant, backend=backend
    )
    np.testing.assert_allclose(out, expected(case, variant), atol=1e-4)


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (AttentionVariant(softcap=0.0), "softcap must be positive and finite, got 0.0"),
        (AttentionVariant(softcap=float("nan")), "softcap must be positive and finite, got nan"),
        (AttentionVariant(window=0), "window must be at least 1, got 0"),
        (AttentionVariant(alibi_slopes=jnp.ones(2)), r"alibi_slopes must have shape \(4,\), .* got \(2,\)"),
        (AttentionVariant(sinks=jnp.ones(5)), r"sinks must have shape \(4,\), .* got \(5,\)"),
    ],
)
def test_a_variant_without_meaning_raises(variant: AttentionVariant, message: str) -> None:
    case = make_case(SMALL, kv_lens=[1])
    with pytest.raises(ValueError, match=message):
        paged_attention(*case.decode_args(), page_offset=0, scale=1.0, variant=variant)


@pytest.mark.parametrize("backend", BACKENDS)
def test_offset_may_be_a_number_or_an_array(backend: str) -> None:
    case = make_case(SMALL, kv_lens=[20])
    attend = functools.partial(paged_attention, *case.decode_args(), scale=case.scale, backend=backend)
    number, array = (
        attend(page_offset=case.page_offset),
        jax.jit(lambda offset: attend(page_offset=offset))(jnp.int32(case.page_offset)),
    )
    np.testing.assert_array_equal(number, array)


def test_heads_that_do_not_divide_raise() -> None:
    case = make_case(replace(SMALL, num_heads=6, num_kv_heads=4), kv_lens=[1])
    with pytest.raises(ValueError, match="multiple of KV heads"):
        paged_attention(*case.decode_args(), page_offset=0, scale=1.0)


def test_a_scale_that_is_not_positive_raises() -> None:
    case = make_case(SMALL, kv_lens=[1])
    with pytest.raises(ValueError, match="scale must be positive"):
        paged_attention(*case.decode_args(), page_offset=0, scale=0.0)


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        ({"page_size": 8}, "float32", "page_size 8"),
        ({"head_dim": 512}, "float32", "head_dim 512"),
        ({"num_heads": 129, "num_kv_heads": 1}, "float32", "129 query heads"),
        ({}, "float8_e4m3fn", "dtypes float8_e4m3fn"),
    ],
)
def test_the_kernel_refuses_what_it_cannot_do(change: dict[str, int], dtype: str, message: str) -> None:
    case = make_case(replace(SMALL, **change), kv_lens=[1], dtype=dtype)
    with pytest.raises(NotImplementedError, match=message):
        paged_attention(*case.decode_args(), page_offset=0, scale=1.0, backend="triton_interpret")


def test_an_unknown_backend_raises() -> None:
    case = make_case(SMALL, kv_lens=[1])
    with pytest.raises(ValueError, match="backend must be one of triton, reference, triton_interpret"):
        paged_attention(*case.decode_args(), page_offset=0, scale=1.0, backend="cuda")


def test_the_kernel_refuses_mixed_dtypes() -> None:
    case = make_case(SMALL, kv_lens=[1])
    q, *rest = case.decode_args()
    with pytest.raises(NotImplementedError, match="dtypes bfloat16, float32"):
        paged_attention(q.astype(jnp.bfloat16), *rest, page_offset=0, scale=1.0, backend="triton_interpret")


def test_there_are_never_more_splits_than_tiles() -> None:
    choose = functools.partial(DecodeTiles.choose, num_kv_heads=8, group=4, head_dim=128, itemsize=2)
    assert choose(batch=1, max_slots=100).num_splits == 2
    assert choose(batch=1, max_slots=8192).num_splits == 16
    assert choose(batch=8, max_slots=8192).num_splits == 6
    assert choose(batch=256, max_slots=8192).num_splits == 1


def test_programs_of_many_heads_are_as_many_as_run_at_once() -> None:
    choose = functools.partial(DecodeTiles.choose, num_kv_heads=1, head_dim=128, max_slots=16384, itemsize=2)
    assert choose(batch=64, group=32).num_splits == 6
    assert choose(batch=64, group=48).num_splits == 4
    assert choose(batch=8, group=48).num_splits == 32


@pytest.mark.parametrize("name", SHAPES)
def test_every_named_shape_lowers_for_cuda_once_for_all_layers(name: str) -> None:
    shape = SHAPES[name]
    pages = jax.ShapeDtypeStruct((256, shape.num_kv_heads, shape.page_size, shape.head_dim), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((1, shape.num_heads, shape.head_dim), jnp.bfloat16)
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)

    def two_layers(*args: jax.Array) -> jax.Array:
        attend = functools.partial(paged_attention, *args, scale=1.0)
        return attend(page_offset=jnp.int32(0)) + attend(page_offset=jnp.int32(128))

    with cuda_target():
        traced = jax.jit(two_layers).trace(q, pages, pages, ints((1, 64)), ints((1,)))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    has_merge = shape.num_heads // shape.num_kv_heads > MERGED_GROUP
    assert text.count("@__gpu$xla.gpu.triton(") == 1 + has_merge


@pytest.mark.parametrize(("window", "num_splits"), [(None, 16), (1000, 16), (200, 4), (64, 1)])
def test_a_window_is_split_into_its_own_tiles(window: int | None, num_splits: int) -> None:
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    pages = jax.ShapeDtypeStruct((256, 8, 16, 128), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((1, 32, 128), jnp.bfloat16)
    variant = AttentionVariant(window=window)
    attend = functools.partial(paged_attention, page_offset=0, scale=1.0, variant=variant)
    with cuda_target():
        traced = jax.jit(attend).trace(q, pages, pages, ints((1, 64)), ints((1,)))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert (f"tensor<{num_splits}x1x32x128xf32>" in text) == (num_splits > 1)
    assert ("x1x32x128xf32>" in text) == (num_splits > 1)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "bfloat16") for name in SHAPES), ("llama-8b", "float32")]
)
def test_large_batches_equal_the_reference(name: str, dtype: str) -> None:
    lens = np.random.default_rng(1).integers(1, 2048, 32)
    case = make_case(SHAPES[name], kv_lens=[0, 2048, *lens], dtype=dtype)
    args, offset = case.decode_args(), case.page_offset
    out = paged_attention(*args, page_offset=offset, scale=case.scale, backend="triton")
    wanted = paged_attention(*args, page_offset=offset, scale=case.scale, backend="reference")
    assert_close(out, np.asarray(wanted.astype(jnp.float32)), length=2048)


@pytest.mark.gpu
def test_a_cache_of_more_than_2_to_the_31_elements_is_read_where_it_should_be() -> None:
    page, num_pages = (8, 16, 128), 2**17 + 64
    far = jax.random.normal(jax.random.key(0), (64, *page), jnp.bfloat16)
    pages = jnp.zeros((num_pages, *page), jnp.bfloat16).at[-64:].set(far)
    q = jax.random.normal(jax.random.key(1), (1, 32, 128), jnp.bfloat16)
    table, lens = jnp.arange(64, dtype=jnp.int32)[None], jnp.full((1,), 1000, jnp.int32)
    out = paged_attention(
        q, pages, pages, table, lens, page_offset=num_pages - 64, scale=0.1, backend="triton"
    )
    wanted = paged_attention(q, far, far, table, lens, page_offset=0, scale=0.1, backend="reference")
    assert_close(out, np.asarray(wanted.astype(jnp.float32)), length=1000)
