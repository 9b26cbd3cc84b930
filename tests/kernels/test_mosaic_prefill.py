"""The Hopper prefill kernel: interpreted on a CPU, lowered for an H200 without one, run on one."""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pjengine.pallas_kernels.attention_variant import PLAIN, AttentionVariant
from pjengine.pallas_kernels.dispatch import check_hopper, chosen_backends
from pjengine.pallas_kernels.mosaic_prefill import MosaicTiles, plan_aligned_blocks, ragged_mosaic
from pjengine.pallas_kernels.ragged_prefill import ragged_paged_attention
from pjengine.pallas_kernels.shapes import SHAPES, HeadShape
from tests.kernels.cases import (
    FEATURES,
    WINDOW,
    Case,
    assert_close,
    cuda_mesh,
    expected,
    make_case,
    make_variant,
)

SMALL = HeadShape(num_heads=4, num_kv_heads=1, head_dim=64)
TILES = MosaicTiles(block_kv=64, num_programs=3)
FITTING = [
    name
    for name, shape in SHAPES.items()
    if shape.head_dim in (64, 128) and shape.num_heads <= 16 * shape.num_kv_heads
]
# The interpreter multiplies what is not yet written and what no one reads: NaN.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
BACKENDS = ["mosaic_interpret", pytest.param("mosaic", marks=pytest.mark.gpu)]


def run(
    case: Case, backend: str, tiles: MosaicTiles | None = TILES, variant: AttentionVariant = PLAIN
) -> jax.Array:
    interpret = plgpu.InterpretGPUParams() if backend == "mosaic_interpret" else None
    args = (*case.ragged_args(), jnp.int32(case.page_offset), variant)
    return ragged_mosaic(*args, scale=case.scale, tiles=tiles, interpret=interpret)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("heads", "dtype"),
    [
        (SMALL, "bfloat16"),
        (HeadShape(num_heads=3, num_kv_heads=1, head_dim=128), "float16"),  # a row of heads too many
        (
            HeadShape(num_heads=2, num_kv_heads=2, head_dim=64, page_size=32),
            "bfloat16",
        ),  # blocks of 128 tokens
    ],
)
def test_chunks_decodes_and_empty_rows_share_a_batch(heads: HeadShape, dtype: str, backend: str) -> None:
    q_lens, kv_lens = [1, 37, 0, 1, 66], [1, 37, 0, 70, 99]
    case = make_case(heads, q_lens=q_lens, kv_lens=kv_lens, num_padding_tokens=7, dtype=dtype)
    out = run(case, backend)
    assert out.dtype == dtype
    assert not out[105:].any()
    assert_close(out, expected(case), length=99)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_in_many_blocks_gives_zeros(backend: str) -> None:
    case = make_case(SMALL, q_lens=[33], kv_lens=[70], num_padding_tokens=127, dtype="bfloat16")
    out = run(case, backend, replace(TILES, num_programs=1))
    assert not out[33:].any()
    assert_close(out, expected(case), length=70)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("features", FEATURES, ids="+".join)
def test_features_equal_a_dense_softmax(features: tuple[str, ...], backend: str) -> None:
    variant = make_variant(SMALL.num_heads, features)
    q_lens, kv_lens = [1, 37, 1], [1, 100, WINDOW + 1]
    case = make_case(
        SMALL, q_lens=q_lens, kv_lens=kv_lens, num_padding_tokens=9, dtype="bfloat16", window=variant.window
    )
    out = run(case, backend, variant=variant)
    assert not out[sum(q_lens) :].any()
    assert_close(out, expected(case, variant), length=100)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("window", "num_heads"), [(1, 1), (1, 8), (70, 3), (200, 1), (200, 8)])
def test_windows_of_any_number_of_tiles(window: int, num_heads: int, backend: str) -> None:
    heads = HeadShape(num_heads=num_heads, num_kv_heads=1, head_dim=64, page_size=32)
    variant = make_variant(heads.num_heads, FEATURES[-1], window=window)
    case = make_case(heads, q_lens=[32], kv_lens=[290], dtype="bfloat16", window=window)
    out = run(case, backend, variant=variant, tiles=replace(TILES, num_programs=1))
    assert_close(out, expected(case, variant), length=290)


def test_warpgroups_do_not_race() -> None:
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

    case = make_case(SMALL, q_lens=[40, 2], kv_lens=[150, 30], num_padding_tokens=6, dtype="bfloat16")
    out = ragged_mosaic(
        *case.ragged_args(),
        jnp.int32(case.page_offset),
        scale=case.scale,
        tiles=replace(TILES, num_programs=1),
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    assert_close(out, expected(case), length=150)
    assert not interpreter.get_races().races_found


def test_the_plan_covers_every_token_once_heaviest_block_first() -> None:
    q_lens, kv_lens = [0, 5, 1, 0, 33, 16, 0], [0, 9, 1, 0, 33, 20, 7]
    num_tokens = sum(q_lens) + 13
    cu_q_lens = np.cumsum([0, *q_lens])
    plan = np.asarray(
        plan_aligned_blocks(
            jnp.array(kv_lens), jnp.array(cu_q_lens), num_tokens=num_tokens, tokens_per_block=8
        )
    )
    seqs = np.repeat(np.arange(len(q_lens)), q_lens)
    tokens, weights = [], []
    for row, aligned, before, valid, position, kv_len in plan:
        for token in range(aligned * 8 + before, aligned * 8 + before + valid):
            tokens.append(token)
            if token < len(seqs):
                assert (seqs[token], kv_lens[row]) == (row, kv_len)
                assert position + token - aligned * 8 == kv_len - cu_q_lens[row + 1] + token
            else:
                assert position + before + valid <= 0
        assert before + valid <= 8
        weights.append(max(position + before + valid, 0) if valid else -1)
    assert sorted(tokens) == list(range(num_tokens))
    assert weights == sorted(weights, reverse=True)


@pytest.mark.parametrize(
    ("heads", "dtype", "num_tokens", "message"),
    [
        (SMALL, "float32", 8, "dtypes float32: wanted bfloat16 or float16"),
        (replace(SMALL, head_dim=96), "bfloat16", 8, "head_dim 96: wanted 64 or 128"),
        (replace(SMALL, num_heads=17), "bfloat16", 8, "17 query heads per KV head: at most 16"),
        (replace(SMALL, page_size=24), "bfloat16", 8, "page_size 24: wanted 8, 16, 32, 64 or 128"),
        (SMALL, "bfloat16", 9, "9 tokens: wanted a multiple of 8"),
    ],
)
def test_the_kernel_refuses_what_it_cannot_do(
    heads: HeadShape, dtype: str, num_tokens: int, message: str
) -> None:
    case = make_case(heads, q_lens=[num_tokens], kv_lens=[num_tokens], dtype=dtype)
    with pytest.raises(NotImplementedError, match=message):
        run(case, "mosaic_interpret")


def test_tiles_that_cut_a_page_raise() -> None:
    case = make_case(replace(SMALL, page_size=128), q_lens=[8], kv_lens=[8], dtype="bfloat16")
    with pytest.raises(ValueError, match="block_kv 64: wanted a multiple of 64 and of page_size 128"):
        run(case, "mosaic_interpret")


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA B200", "NVIDIA L40S"])
def test_other_gpus_are_refused(kind: str) -> None:
    with jax.sharding.use_abstract_mesh(cuda_mesh(kind)), pytest.raises(NotImplementedError, match=kind):
        check_hopper()


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB"])
def test_hopper_gpus_are_not_refused(kind: str) -> None:
    with jax.sharding.use_abstract_mesh(cuda_mesh(kind)):
        check_hopper()


def lowered(name: str) -> str:
    """Two layers of the op, lowered for an H200 with no backend asked for."""
    shape, ints = SHAPES[name], functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    pages = jax.ShapeDtypeStruct((256, shape.num_kv_heads, shape.page_size, shape.head_dim), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((512, shape.num_heads, shape.head_dim), jnp.bfloat16)

    def two_layers(*args: jax.Array) -> jax.Array:
        attend = functools.partial(ragged_paged_attention, *args, scale=1.0)
        return attend(page_offset=jnp.int32(0)) + attend(page_offset=jnp.int32(128))

    with jax.sharding.use_abstract_mesh(cuda_mesh("NVIDIA H200")):
        traced = jax.jit(two_layers).trace(q, pages, pages, ints((4, 64)), ints((4,)), ints((5,)))
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", ["llama-8b", "opt-125m"])
def test_hopper_runs_it_once_for_all_layers(name: str) -> None:
    text = lowered(name)
    assert len(re.findall(r"custom_call @mosaic_gpu", text)) == 1
    assert chosen_backends()["ragged_paged_attention"] == "mosaic"


@pytest.mark.parametrize("name", ["falcon-7b", "gpt-neox-20b"])
def test_what_it_refuses_runs_in_triton(name: str) -> None:
    assert "xla.gpu.triton" in lowered(name)
    assert chosen_backends()["ragged_paged_attention"] == "triton"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "bfloat16") for name in FITTING), ("llama-8b", "float16")]
)
def test_large_batches_equal_the_reference_on_every_run(name: str, dtype: str) -> None:
    q_lens, kv_lens = [700, 1, 1, 0, 260, 1, 33], [700, 1, 900, 0, 1300, 1500, 500]
    case = make_case(SHAPES[name], q_lens=q_lens, kv_lens=kv_lens, num_padding_tokens=4004, dtype=dtype)
    attend = functools.partial(
        ragged_paged_attention, *case.ragged_args(), page_offset=case.page_offset, scale=case.scale
    )
    out = attend(backend="mosaic")
    assert_close(out, np.asarray(attend(backend="reference").astype(jnp.float32)), length=1500)
    for _ in range(3):  # a race would move the result
        assert (attend(backend="mosaic") == out).all()
