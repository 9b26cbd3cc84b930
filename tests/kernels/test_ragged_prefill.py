"""Prefill and decode mixed: the reference against a dense softmax, the kernel against both."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.pallas_kernels.attention_variant import AttentionVariant
from pjengine.pallas_kernels.ragged_prefill import (
    PrefillTiles,
    plan_blocks,
    ragged_paged_attention,
    ragged_triton,
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
    case = make_case(SHAPES[name], q_lens=[1, 18, 0], kv_lens=[40, 18, 0], num_padding_tokens=5, dtype=dtype)
    out = ragged_paged_attention(
        *case.ragged_args(), page_offset=case.page_offset, scale=case.scale, backend=backend
    )
    assert out.dtype == dtype
    assert not out[19:].any()
    assert_close(out, expected(case), length=40)


@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_decodes_and_empty_rows_share_a_batch(backend: str, page_size: int) -> None:
    case = make_case(
        replace(SMALL, page_size=page_size),
        q_lens=[1, 37, 0, 1, 130, 5, 64, 0],
        kv_lens=[1, 37, 0, 300, 163, page_size, page_size + 64, 20],
        num_padding_tokens=50,
    )
    out = ragged_paged_attention(
        *case.ragged_args(), page_offset=case.page_offset, scale=case.scale, backend=backend
    )
    assert_close(out, expected(case), length=300)


@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("block_m", "block_kv"), [(16, 64), (64, 16), (128, 128)])
def test_tiles_do_not_change_the_result(block_m: int, block_kv: int, interpret: bool) -> None:
    case = make_case(SMALL, q_lens=[70, 3], kv_lens=[200, 3])
    out = ragged_triton(
        *case.ragged_args(),
        jnp.int32(case.page_offset),
        scale=case.scale,
        tiles=PrefillTiles(block_m=block_m, block_kv=block_kv, num_warps=4),
        interpret=interpret,
    )
    assert_close(out, expected(case), length=200)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("features", FEATURES, ids="+".join)
def test_features_equal_a_dense_softmax(features: tuple[str, ...], backend: str) -> None:
    variant = make_variant(SMALL.num_heads, features)
    q_lens, kv_lens = [1, 37, 0, 1, 33, 5, 0], [1, 37, 0, 100, 90, WINDOW + 1, 20]
    case = make_case(SMALL, q_lens=q_lens, kv_lens=kv_lens, num_padding_tokens=20, window=variant.window)
    out = ragged_paged_attention(
        *case.ragged_args(), page_offset=case.page_offset, scale=case.scale, variant=variant, backend=backend
    )
    assert not out[sum(q_lens) :].any()
    assert_close(out, expected(case, variant), length=100)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "heads", FEATURED_SHAPES, ids=lambda s: f"{s.num_heads}/{s.num_kv_heads}x{s.head_dim}"
)
def test_features_in_every_head_shape(heads: HeadShape, backend: str) -> None:
    variant = make_variant(heads.num_heads, FEATURES[-1])
    case = make_case(heads, q_lens=[1, 18], kv_lens=[40, 50], dtype="bfloat16", window=variant.window)
    out = ragged_paged_attention(
        *case.ragged_args(), page_offset=case.page_offset, scale=case.scale, variant=variant, backend=backend
    )
    assert_close(out, expected(case, variant), length=50)


@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("window", [1, 33, 80, 150])
@pytest.mark.parametrize(("block_m", "block_kv"), [(16, 16), (64, 16), (32, 64)])
def test_windows_of_any_number_of_tiles(block_m: int, block_kv: int, window: int, interpret: bool) -> None:
    variant = make_variant(SMALL.num_heads, FEATURES[-1], window=window)
    case = make_case(SMALL, q_lens=[50, 3, 1], kv_lens=[200, 3, 140], window=window)
    out = ragged_triton(
        *case.ragged_args(),
        jnp.int32(case.page_offset),
        variant,
        scale=case.scale,
        tiles=PrefillTiles(block_m=block_m, block_kv=block_kv, num_warps=4),
        interpret=interpret,
    )
    assert_close(out, expected(case, variant), length=200)


def test_a_variant_without_meaning_raises() -> None:
    case = make_case(SMALL, kv_lens=[1])
    with pytest.raises(ValueError, match="window must be at least 1"):
        variant = AttentionVariant(window=-1)
        ragged_paged_attention(*case.ragged_args(), page_offset=0, scale=1.0, variant=variant)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_padding_alone_gives_zeros(backend: str) -> None:
    case = make_case(SMALL, q_lens=[0, 0], kv_lens=[0, 0], num_padding_tokens=20)
    out = ragged_paged_attention(
        *case.ragged_args(), page_offset=case.page_offset, scale=case.scale, backend=backend
    )
    assert not out.any()


def test_the_plan_covers_every_token_once() -> None:
    q_lens, kv_lens = [0, 5, 1, 0, 33, 16, 0], [0, 9, 1, 0, 33, 20, 7]
    num_tokens = sum(q_lens) + 13
    cu_q_lens = jnp.cumsum(jnp.array([0, *q_lens]))
    plan = plan_blocks(jnp.array(kv_lens), cu_q_lens, num_tokens=num_tokens, tokens_per_block=8)
    seqs = np.repeat(np.arange(len(q_lens)), q_lens)
    tokens = []
    for row, first, position, valid in np.asarray(plan).T:
        for token in range(first, first + valid):
            tokens.append(token)
            if token < len(seqs):
                assert seqs[token] == row
                assert position + token - first == kv_lens[row] - int(cu_q_lens[row + 1]) + token
            else:
                assert position + valid <= 0
    assert tokens == list(range(num_tokens))


def test_heads_that_do_not_divide_raise() -> None:
    case = make_case(replace(SMALL, num_heads=6, num_kv_heads=4), kv_lens=[1])
    with pytest.raises(ValueError, match="multiple of KV heads"):
        ragged_paged_attention(*case.ragged_args(), page_offset=0, scale=1.0)


def test_a_scale_that_is_not_positive_raises() -> None:
    case = make_case(SMALL, kv_lens=[1])
    with pytest.raises(ValueError, match="scale must be positive"):
        ragged_paged_attention(*case.ragged_args(), page_offset=0, scale=-1.0)


def test_an_unknown_backend_raises() -> None:
    case = make_case(SMALL, kv_lens=[1])
    with pytest.raises(ValueError, match="backend must be one of triton, reference, triton_interpret"):
        ragged_paged_attention(*case.ragged_args(), page_offset=0, scale=1.0, backend="cuda")


def test_the_kernel_refuses_what_it_cannot_do() -> None:
    case = make_case(replace(SMALL, page_size=8), kv_lens=[1])
    with pytest.raises(NotImplementedError, match="page_size 8"):
        ragged_paged_attention(*case.ragged_args(), page_offset=0, scale=1.0, backend="triton_interpret")


@pytest.mark.parametrize("name", SHAPES)
def test_every_named_shape_lowers_for_cuda_once_for_all_layers(name: str) -> None:
    shape = SHAPES[name]
    pages = jax.ShapeDtypeStruct((256, shape.num_kv_heads, shape.page_size, shape.head_dim), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((512, shape.num_heads, shape.head_dim), jnp.bfloat16)
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)

    def two_layers(*args: jax.Array) -> jax.Array:
        attend = functools.partial(ragged_paged_attention, *args, scale=1.0, backend="triton")
        return attend(page_offset=jnp.int32(0)) + attend(page_offset=jnp.int32(128))

    with cuda_target():
        traced = jax.jit(two_layers).trace(q, pages, pages, ints((4, 64)), ints((4,)), ints((5,)))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__gpu$xla.gpu.triton(") == 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "bfloat16") for name in SHAPES), ("llama-8b", "float32")]
)
def test_large_batches_equal_the_reference(name: str, dtype: str) -> None:
    q_lens, kv_lens = [700, 1, 1, 0, 260, 1, 33], [700, 1, 900, 0, 1300, 1500, 500]
    case = make_case(SHAPES[name], q_lens=q_lens, kv_lens=kv_lens, num_padding_tokens=30, dtype=dtype)
    attend = functools.partial(
        ragged_paged_attention, *case.ragged_args(), page_offset=case.page_offset, scale=case.scale
    )
    wanted = attend(backend="reference")
    assert_close(attend(backend="triton"), np.asarray(wanted.astype(jnp.float32)), length=1500)
