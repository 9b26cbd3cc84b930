"""In a batch of one shape, attention gives a token the same bits wherever it is, whatever else there is."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.pallas_kernels.paged_attention import paged_attention
from pjengine.pallas_kernels.ragged_prefill import ragged_paged_attention
from pjengine.pallas_kernels.shapes import HeadShape
from tests.kernels.cases import BACKENDS, Case, make_case, make_variant

HEADS = HeadShape(num_heads=8, num_kv_heads=2, head_dim=128)
VARIANTS = pytest.mark.parametrize(
    "features", [(), ("softcap", "window", "alibi", "sinks")], ids=["plain", "all"]
)
MOSAIC = pytest.param("mosaic", marks=pytest.mark.gpu)

type Part = tuple[int, int, int]  # a sequence, and which of its tokens: from, to


def attend(
    case: Case, parts: Sequence[Part], features: Sequence[str], backend: str
) -> dict[tuple[int, int], bytes]:
    """The bits of each token, by sequence and place in it, in a batch of these parts and padding."""
    first, num_seqs = case.cu_q_lens, len(case.kv_lens)
    rows = np.concatenate([np.arange(first[seq] + start, first[seq] + end) for seq, start, end in parts])
    q = np.concatenate([case.q[rows], np.zeros_like(case.q[len(rows) :])])
    unused = num_seqs - len(parts)
    page_table = np.concatenate([case.page_table[[seq for seq, *_ in parts]], case.page_table[:unused]])
    kv_lens = [case.kv_lens[seq] - (first[seq + 1] - first[seq] - end) for seq, _, end in parts]
    cu_q_lens = np.cumsum([0, *(end - start for _, start, end in parts), *[0] * unused])
    out = ragged_paged_attention(
        jnp.asarray(q), jnp.asarray(case.k_pages), jnp.asarray(case.v_pages), jnp.asarray(page_table),
        jnp.asarray([*kv_lens, *[0] * unused], jnp.int32), jnp.asarray(cu_q_lens, jnp.int32),
        page_offset=case.page_offset, scale=case.scale, variant=make_variant(HEADS.num_heads, features),
        backend=backend,
    )  # fmt: skip
    places = [(seq, place) for seq, start, end in parts for place in range(start, end)]
    return {place: np.asarray(out[i]).tobytes() for i, place in enumerate(places)}


@VARIANTS
@pytest.mark.parametrize("backend", [*BACKENDS, MOSAIC])
def test_prompts_do_not_depend_on_where_they_are_cut_or_lie(features: Sequence[str], backend: str) -> None:
    window = 20 if "window" in features else None
    case = make_case(HEADS, kv_lens=[160, 62], q_lens=[40, 32], dtype="bfloat16", window=window)
    wanted = attend(case, [(0, 0, 40), (1, 0, 32)], features, backend)
    assert len(wanted) == 72
    for parts in ([(1, 0, 32), (0, 0, 40)], [(0, 0, 13)], [(1, 0, 9), (0, 13, 40)], [(1, 9, 32)]):
        got = attend(case, parts, features, backend)
        assert got == {place: wanted[place] for place in got}, parts


@VARIANTS
@pytest.mark.parametrize("backend", BACKENDS)
def test_decodes_do_not_depend_on_the_other_rows(features: Sequence[str], backend: str) -> None:
    window = 20 if "window" in features else None
    case = make_case(HEADS, kv_lens=[100, 37, 0, 260], dtype="bfloat16", window=window)

    def decode(order: Sequence[int], kv_lens: Sequence[int]) -> list[bytes]:
        q, k_pages, v_pages, page_table, _ = case.decode_args()
        own = jnp.asarray(order)
        out = paged_attention(
            q[own], k_pages, v_pages, page_table[own], jnp.asarray(kv_lens, jnp.int32),
            page_offset=case.page_offset, scale=case.scale,
            variant=make_variant(HEADS.num_heads, features), backend=backend,
        )  # fmt: skip
        return [np.asarray(row).tobytes() for row in out]

    together = decode([0, 1, 2, 3], [100, 37, 0, 260])
    assert decode([3, 2, 1, 0], [260, 0, 37, 100]) == together[::-1]
    assert decode([2, 0, 2, 2], [0, 100, 0, 0])[1] == together[0], "alone"
