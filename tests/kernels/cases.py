"""Attention cases over a poisoned cache, and what they should give: a dense softmax in numpy."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.pallas_kernels.attention_variant import PLAIN, AttentionVariant
from pjengine.pallas_kernels.shapes import SHAPES, HeadShape

NEEDS_JAX_TRITON = pytest.mark.skipif(
    not all(map(find_spec, ("jax_triton", "triton"))), reason="needs pip install 'pjengine[triton]'"
)
BACKENDS = [
    "reference",
    "triton_interpret",
    pytest.param("triton", marks=pytest.mark.gpu),
    pytest.param("jax_triton", marks=[pytest.mark.gpu, NEEDS_JAX_TRITON]),
]
INTERPRET = pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=pytest.mark.gpu)])
# Pallas's Triton kernels, where nothing else is to be run.
TRITON = pytest.mark.parametrize(
    "backend", ["triton_interpret", pytest.param("triton", marks=pytest.mark.gpu)]
)
# Every shape in one dtype, and one of each width class in the others: interpreted, a dtype's path is the same
# for all shapes. Compiled, the tiles of float32 are others for each.
WIDTH_CLASSES = ("llama-8b", "open-llama-3b", "demo")
SHAPES_AND_DTYPES = [
    *((name, "bfloat16") for name in SHAPES),
    *((name, dtype) for name in WIDTH_CLASSES for dtype in ("float32", "float16")),
    *(pytest.param(name, "float32", marks=pytest.mark.gpu) for name in SHAPES if name not in WIDTH_CLASSES),
]
WINDOW = 20
# What layers of real models do: Gemma 2, Mistral, BLOOM, gpt-oss; and all at once.
FEATURES = [("softcap",), ("window",), ("alibi",), ("sinks",), ("softcap", "window", "alibi", "sinks")]
# Every ratio of query to KV heads, and head sizes that are and are not powers of 2.
FEATURED_SHAPES = [
    HeadShape(num_heads=2, num_kv_heads=2, head_dim=64),
    HeadShape(num_heads=8, num_kv_heads=2, head_dim=80),
    HeadShape(num_heads=16, num_kv_heads=2, head_dim=128),
    HeadShape(num_heads=5, num_kv_heads=1, head_dim=64),
]


@contextmanager
def cuda_target() -> Iterator[None]:
    """Code traced under this is lowered for an H200, on a machine without one too."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        yield


def cuda_mesh(device_kind: str) -> jax.sharding.AbstractMesh:
    device = jax.sharding.AbstractDevice(device_kind=device_kind, num_cores=132, platform="gpu")
    auto = (jax.sharding.AxisType.Auto,)
    return jax.sharding.AbstractMesh((1,), ("x",), axis_types=auto, abstract_device=device)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments of an attention op for layer 1 of 2; all of layer 0, the null pages and every slot past a
    sequence's end or before its window are NaN."""

    q: np.ndarray  # [t, h, d]
    k_pages: np.ndarray  # [2 * pages, hk, p, d]
    v_pages: np.ndarray
    page_table: (
        np.ndarray
    )  # [s, w]; 0, the null page, past a sequence's end; no page's number before its window
    kv_lens: np.ndarray  # [s]
    cu_q_lens: np.ndarray  # [s + 1]
    page_offset: int
    scale: float

    def decode_args(self) -> tuple[jnp.ndarray, ...]:
        return tuple(map(jnp.asarray, (self.q, self.k_pages, self.v_pages, self.page_table, self.kv_lens)))

    def ragged_args(self) -> tuple[jnp.ndarray, ...]:
        return (*self.decode_args(), jnp.asarray(self.cu_q_lens))


def make_case(
    heads: HeadShape,
    *,
    kv_lens: Sequence[int],
    q_lens: Sequence[int] | None = None,
    num_padding_tokens: int = 0,
    dtype: str = "float32",
    window: int | None = None,
) -> Case:
    """Makes a case; q_lens None is decode: one token per sequence, also for those of length 0.

    With a window, pages that no token of a sequence sees any more are given away.
    """
    rng = np.random.default_rng(0)
    page_size, head_dim = heads.page_size, heads.head_dim
    num_seqs, width = len(kv_lens), -(-max(*kv_lens, 1) // page_size) + 1
    q_lens = [1] * num_seqs if q_lens is None else q_lens
    num_pages = num_seqs * width + 1
    ids = rng.permutation(np.arange(1, num_pages)).reshape(num_seqs, width)
    shape = (2 * num_pages, heads.num_kv_heads, page_size, head_dim)
    k_pages, v_pages = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
    for row, length, q_len in zip(ids, kv_lens, q_lens, strict=True):
        first = 0 if window is None else max(0, length - max(q_len, 1) - window + 1)
        slot = np.arange(first, length)
        at = (row[slot // page_size] + num_pages, slice(None), slot % page_size)
        k_pages[at] = rng.standard_normal((len(slot), heads.num_kv_heads, head_dim))
        v_pages[at] = rng.standard_normal((len(slot), heads.num_kv_heads, head_dim))
        row[-(-length // page_size) :] = 0
        row[: first // page_size] = rng.choice([-9, 2**30], first // page_size)
    q = rng.standard_normal((sum(q_lens) + num_padding_tokens, heads.num_heads, head_dim))
    return Case(
        q=q.astype(dtype),
        k_pages=k_pages.astype(dtype),
        v_pages=v_pages.astype(dtype),
        page_table=ids.astype(np.int32),
        kv_lens=np.asarray(kv_lens, np.int32),
        cu_q_lens=np.cumsum([0, *q_lens]).astype(np.int32),
        page_offset=num_pages,
        scale=head_dim**-0.5,
    )


def make_variant(num_heads: int, features: Sequence[str], *, window: int = WINDOW) -> AttentionVariant:
    rng = np.random.default_rng(2)
    return AttentionVariant(
        softcap=1.5 if "softcap" in features else None,  # most scores are below 3
        window=window if "window" in features else None,
        alibi_slopes=jnp.asarray(2.0 ** -np.arange(1, num_heads + 1), jnp.float32)
        if "alibi" in features
        else None,
        # Gone, as large as the largest score, far larger than any, and between.
        sinks=jnp.asarray(np.resize([-1e9, 2.0, 50.0, *rng.standard_normal(3)], num_heads), jnp.float32)
        if "sinks" in features
        else None,
    )


def expected(case: Case, variant: AttentionVariant = PLAIN) -> np.ndarray:
    """Token by token: softmax over the slots it sees, in float32; zeros where it sees none."""
    out = np.zeros(case.q.shape, np.float32)
    page_size = case.k_pages.shape[2]
    group = case.q.shape[1] // case.k_pages.shape[1]
    for seq, kv_len in enumerate(case.kv_lens):
        first, end = case.cu_q_lens[seq], case.cu_q_lens[seq + 1]
        for token in range(first, end):
            position = kv_len - (end - token)
            start = 0 if variant.window is None else max(0, position - variant.window + 1)
            slot = np.arange(start, position + 1)
            if len(slot):
                pages = case.page_table[seq, slot // page_size] + case.page_offset
                k = np.repeat(case.k_pages[pages, :, slot % page_size].astype(np.float32), group, axis=1)
                v = np.repeat(case.v_pages[pages, :, slot % page_size].astype(np.float32), group, axis=1)
                scores = np.einsum("hd,shd->hs", case.q[token].astype(np.float32), k) * case.scale
                out[token] = np.einsum("hs,shd->hd", weights(scores, slot - position, variant), v)
    return out


def weights(scores: np.ndarray, distance: np.ndarray, variant: AttentionVariant) -> np.ndarray:
    """Of each head and slot."""
    if variant.softcap is not None:
        scores = variant.softcap * np.tanh(scores / variant.softcap)
    if variant.alibi_slopes is not None:
        scores = scores + np.asarray(variant.alibi_slopes)[:, None] * distance
    if variant.sinks is not None:
        scores = np.concatenate([scores, np.asarray(variant.sinks)[:, None]], axis=1)
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    return (p / p.sum(axis=1, keepdims=True))[:, : len(distance)]


def assert_close(actual: jnp.ndarray, wanted: np.ndarray, *, length: int) -> None:
    """Holds `actual` to its dtype's precision; float32 sums over `length` slots lose the square root of it.

    The two narrow dtypes round twice: the probabilities and the result.
    """
    eps = float(jnp.finfo(actual.dtype).eps)
    tolerance = 4 * eps * max(length, 16) ** 0.5 if actual.dtype == jnp.float32 else 1.5 * eps
    np.testing.assert_allclose(np.asarray(actual.astype(jnp.float32)), wanted, rtol=tolerance, atol=tolerance)
