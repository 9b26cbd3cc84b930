"""Attention in Triton's own language against a dense softmax: on a GPU, and on a CPU in Triton's interpreter.

On a GPU the tests of the two ops run these kernels too.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.pallas_kernels.paged_attention import DecodeTiles
from pjengine.pallas_kernels.ragged_prefill import PrefillTiles
from pjengine.pallas_kernels.shapes import SHAPES, HeadShape
from tests.kernels.cases import NEEDS_JAX_TRITON, Case, assert_close, make_case
from tests.kernels.triton_interpreter import interpreted

pytestmark = NEEDS_JAX_TRITON

SMALL = HeadShape(num_heads=4, num_kv_heads=2, head_dim=32)
SLOPES, SINKS = 2.0 ** -np.arange(1, 5, dtype=np.float32), np.array([-3, 0, 1, 5], np.float32)
VARIANTS: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "alibi": {"alibi_slopes": SLOPES},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": SINKS},
    "window of 1": {"window": 1},
    "window of 37": {"window": 37},
    "window of all": {"window": 1000},
    "all": {"alibi_slopes": SLOPES, "softcap": 2.0, "sinks": SINKS, "window": 37},
}


@pytest.fixture(params=["interpreted", pytest.param("compiled", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest) -> Iterator[Any]:
    from pjengine.pallas_kernels import jax_triton_attention as module

    if request.param == "compiled":
        yield module
    elif jax.default_backend() != "cpu":
        pytest.skip("runs on a CPU alone: Triton interprets or compiles, as chosen before it is imported")
    else:
        with interpreted(module):
            yield module


def dense(case: Case, variant: Mapping[str, Any]) -> np.ndarray:
    """Token by token, as `cases.expected`, with what `variant` says."""
    out = np.zeros(case.q.shape, np.float32)
    page_size, group = case.k_pages.shape[2], case.q.shape[1] // case.k_pages.shape[1]
    for seq, kv_len in enumerate(case.kv_lens):
        first, end = case.cu_q_lens[seq : seq + 2]
        for token in range(first, end):
            position = kv_len - (end - token)
            slot = np.arange(max(0, position + 1 - variant.get("window", 10**6)), position + 1)
            if not slot.size:
                continue
            pages = case.page_table[seq, slot // page_size] + case.page_offset
            k = np.repeat(case.k_pages[pages, :, slot % page_size].astype(np.float32), group, axis=1)
            v = np.repeat(case.v_pages[pages, :, slot % page_size].astype(np.float32), group, axis=1)
            scores = np.einsum("hd,shd->hs", case.q[token].astype(np.float32), k) * case.scale
            if "softcap" in variant:
                scores = variant["softcap"] * np.tanh(scores / variant["softcap"])
            if "alibi_slopes" in variant:
                scores = scores + variant["alibi_slopes"][:, None] * (slot - position)
            sinks = variant.get("sinks", np.full(len(scores), -np.inf, np.float32))[:, None]
            top = np.maximum(scores.max(axis=1, keepdims=True), sinks)
            p = np.exp(scores - top)
            total = p.sum(axis=1, keepdims=True) + np.exp(sinks - top)
            out[token] = np.einsum("hs,shd->hd", p / total, v)
    return out


def forget(case: Case, window: int) -> Case:
    """Takes away the pages that end before the window of their sequence's first token."""
    table, page_size = case.page_table.copy(), case.k_pages.shape[2]
    positions = case.kv_lens - np.diff(case.cu_q_lens)
    for row, position in zip(table, positions, strict=True):
        row[: max(0, position + 1 - window) // page_size] = 0  # the null page, which is NaN
    return dataclasses.replace(case, page_table=table)


def check(kernel: Callable[..., Any], args: tuple[Any, ...], case: Case, tiles: Any, variant: Any) -> None:
    options = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in variant.items()}
    out = kernel(*args, jnp.int32(case.page_offset), scale=case.scale, tiles=tiles, **options)
    assert_close(out, dense(case, variant), length=300)


def case_for(variant: Mapping[str, Any], **sizes: Any) -> tuple[Case, Case]:
    """The case, and the same with the pages that no token sees taken away."""
    case = make_case(**sizes)
    return case, forget(case, variant.get("window", 10**6))


@pytest.mark.parametrize(("page_size", "num_splits"), [(16, 1), (64, 3)])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_decode_equals_a_dense_softmax(
    kernels: Any, page_size: int, variant: dict[str, Any], num_splits: int
) -> None:
    lens = [0, 1, page_size - 1, page_size + 1, 33, 127, 300]
    case, given = case_for(variant, heads=dataclasses.replace(SMALL, page_size=page_size), kv_lens=lens)
    tiles = DecodeTiles(block_kv=32, num_splits=num_splits)
    check(kernels.decode_jax_triton, given.decode_args(), case, tiles, variant)


@pytest.mark.parametrize(("page_size", "block_m", "block_kv"), [(16, 16, 64), (64, 128, 16)])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_prefill_equals_a_dense_softmax(
    kernels: Any, page_size: int, variant: dict[str, Any], block_m: int, block_kv: int
) -> None:
    case, given = case_for(
        variant,
        heads=dataclasses.replace(SMALL, page_size=page_size),
        q_lens=[1, 37, 0, 1, 130, 5, 0],
        kv_lens=[1, 37, 0, 300, 163, page_size, 20],
        num_padding_tokens=20,
    )
    tiles = PrefillTiles(block_m=block_m, block_kv=block_kv, num_warps=4)
    check(kernels.ragged_jax_triton, given.ragged_args(), case, tiles, variant)


@pytest.mark.parametrize("dtype", ["float32", "float16"])  # the interpreter has no products of bfloat16
@pytest.mark.parametrize("name", SHAPES)
def test_one_kv_head_of_every_named_shape_equals_a_dense_softmax(kernels: Any, name: str, dtype: str) -> None:
    shape = SHAPES[name]
    shape = dataclasses.replace(shape, num_heads=shape.num_heads // shape.num_kv_heads, num_kv_heads=1)
    decode = make_case(shape, kv_lens=[70, 0, 5], dtype=dtype)
    check(kernels.decode_jax_triton, decode.decode_args(), decode, None, {})
    sizes: dict[str, Any] = {"q_lens": [1, 18, 0], "kv_lens": [40, 18, 0], "num_padding_tokens": 5}
    prefill = make_case(shape, dtype=dtype, **sizes)
    check(kernels.ragged_jax_triton, prefill.ragged_args(), prefill, None, {})


def test_a_sequence_has_no_more_splits_than_were_measured_to_pay() -> None:
    from pjengine.pallas_kernels import jax_triton_attention as module

    heads = SHAPES["starcoder"]
    q = jnp.zeros((8, heads.num_heads, heads.head_dim), jnp.bfloat16)
    pages = jnp.zeros((1, heads.num_kv_heads, heads.page_size, heads.head_dim), jnp.bfloat16)
    assert DecodeTiles.choose_for(q, pages, 16384).num_splits == 32
    assert module.choose_decode_tiles(q, pages, 16384).num_splits == module.MAX_SPLITS == 16
    assert module.choose_decode_tiles(q, pages, 64) == DecodeTiles.choose_for(q, pages, 64)


@pytest.mark.parametrize("option", [{"window": 0}, {"softcap": 0.0}, {"softcap": -1.0}])
def test_options_that_are_not_positive_raise(kernels: Any, option: dict[str, Any]) -> None:
    case = make_case(SMALL, kv_lens=[1])
    for kernel, args in (
        (kernels.decode_jax_triton, case.decode_args()),
        (kernels.ragged_jax_triton, case.ragged_args()),
    ):
        with pytest.raises(ValueError, match=f"{next(iter(option))} must be positive"):
            kernel(*args, jnp.int32(0), scale=1.0, **option)


def test_the_kernels_refuse_what_they_cannot_do(kernels: Any) -> None:
    case = make_case(dataclasses.replace(SMALL, page_size=8), kv_lens=[1])
    with pytest.raises(NotImplementedError, match="page_size 8"):
        kernels.decode_jax_triton(*case.decode_args(), jnp.int32(0), scale=1.0)
    with pytest.raises(NotImplementedError, match="page_size 8"):
        kernels.ragged_jax_triton(*case.ragged_args(), jnp.int32(0), scale=1.0)


def test_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from pjengine.pallas_kernels import jax_triton_attention as module

    monkeypatch.setattr(module, "platform", lambda: "cpu")
    case = make_case(SMALL, kv_lens=[1])
    with pytest.raises(NotImplementedError, match="platform cpu: wanted a GPU"):
        module.decode_jax_triton(*case.decode_args(), jnp.int32(0), scale=1.0)
