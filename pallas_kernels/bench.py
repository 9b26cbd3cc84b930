"""Times the attention kernels: `python -m pjengine.pallas_kernels.bench [--tune] [--interpret]`.

Prints one JSON object a line: the card's copy bandwidth, then each case with its tiles, microseconds a call
and GB/s of K and V (decode) or TFLOP/s (prefill). A timed program is many calls in a row, one per layer, each
fed the result of the one before; the layers' caches together are larger than the L2 cache.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pjengine.pallas_kernels.dispatch import check_hopper
from pjengine.pallas_kernels.mosaic_prefill import MosaicTiles, check_mosaic_can, ragged_mosaic
from pjengine.pallas_kernels.paged_attention import DecodeTiles, decode_triton
from pjengine.pallas_kernels.ragged_prefill import PrefillTiles, ragged_triton
from pjengine.pallas_kernels.shapes import SHAPES, HeadShape

# (batch, context)
DECODE_CASES: Sequence[tuple[int, int]] = (
    (64, 4096),
    (256, 1024),
    (8, 16384),
    (1, 576),
    (32, 576),
    (128, 576),
)
# name: lengths of the chunks, and the slots that each of them ends at
PREFILL_CASES: Mapping[str, tuple[list[int], list[int]]] = {
    "prefill 2048": ([2048], [2048]),
    "prefill 8192": ([8192], [8192]),
    "prefill 32 of 512": ([512] * 32, [512] * 32),
    "chunk of 2048 after 6144": ([2048], [8192]),
    "mixed: 1920 after 0, 128 decodes at 1024": ([1920] + [1] * 128, [1920] + [1024] * 128),
}
CALLS = 32  # in one program, as in a model of 32 layers
COLD_BYTES = 512 << 20  # several times an L2 cache


def seconds(program: Callable[..., Array], *args: Array) -> float:
    """Median time of one run of a compiled program, over 5 measurements of 3 runs queued together."""
    program(*args).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(3):
            out = program(*args)
        out.block_until_ready()
        times.append((time.perf_counter() - start) / 3)
    return statistics.median(times)


def copy_gb_per_s(num_bytes: int) -> float:
    """Bytes read plus bytes written a second by adding 1 to an array."""
    x = jnp.zeros(num_bytes // 4, jnp.float32)
    return 2 * num_bytes / seconds(jax.jit(lambda x: x + 1), x) / 1e9


@dataclasses.dataclass(frozen=True)
class Cache:
    """Random K and V of some layers, and the page table of equally filled sequences."""

    k_pages: Array
    v_pages: Array
    page_table: Array
    kv_lens: Array
    offsets: tuple[int, ...]  # first page of the layer that each call reads

    @classmethod
    def make(cls, heads: HeadShape, kv_lens: Sequence[int], *, num_calls: int) -> "Cache":
        rng = np.random.default_rng(0)
        width = -(-max(kv_lens) // heads.page_size)
        num_pages = len(kv_lens) * width
        shape = (heads.num_kv_heads, heads.page_size, heads.head_dim)
        layer_bytes = 4 * num_pages * int(np.prod(shape))
        num_layers = min(num_calls, max(1, COLD_BYTES // layer_bytes))
        k_key, v_key = jax.random.split(jax.random.key(0))
        return cls(
            k_pages=jax.random.normal(k_key, (num_layers * num_pages, *shape), jnp.bfloat16),
            v_pages=jax.random.normal(v_key, (num_layers * num_pages, *shape), jnp.bfloat16),
            page_table=jnp.asarray(rng.permutation(num_pages).reshape(-1, width), jnp.int32),
            kv_lens=jnp.asarray(kv_lens, jnp.int32),
            offsets=tuple(i % num_layers * num_pages for i in range(num_calls)),
        )


def time_calls(attend: Callable[..., Array], cache: Cache, q: Array, *args: Array) -> float:
    """Seconds of one call of `attend(q, k_pages, v_pages, page_table, kv_lens, *args, page_offset)`."""

    @jax.jit
    def program(q: Array, *args: Array) -> Array:
        for offset in cache.offsets:
            q = attend(q, *args, jnp.int32(offset))
        return q

    args = (cache.k_pages, cache.v_pages, cache.page_table, cache.kv_lens, *args)
    return seconds(program, q, *args) / len(cache.offsets)


def decode_tiles(chosen: DecodeTiles, *, is_tuning: bool) -> Iterator[DecodeTiles]:
    yield chosen
    if is_tuning:
        splits = sorted({max(1, chosen.num_splits // 2), chosen.num_splits, chosen.num_splits * 2})
        for block_kv, num_splits, stages in itertools.product((32, 64, 128), splits, (3, 5, 7)):
            yield DecodeTiles(block_kv=block_kv, num_splits=num_splits, num_stages=stages)


def prefill_tiles(chosen: PrefillTiles, *, is_tuning: bool) -> Iterator[PrefillTiles]:
    yield chosen
    if is_tuning:
        for block_m, block_kv, stages in itertools.product((64, 128), (32, 64, 128), (3, 5)):
            yield PrefillTiles(block_m=block_m, block_kv=block_kv, num_warps=block_m // 16, num_stages=stages)


def mosaic_tiles(q: Array, cache: Cache, *, is_tuning: bool) -> Iterator[MosaicTiles]:
    """None where the kernel cannot run."""
    try:
        check_hopper()
        check_mosaic_can(q, cache.k_pages, cache.v_pages)
    except NotImplementedError:
        return
    yield MosaicTiles()
    if is_tuning:
        for block_kv, stages in ((64, 2), (64, 3), (64, 4)):
            yield MosaicTiles(block_kv=block_kv, num_stages=stages)


def bench_decode(name: str, batch: int, context: int, *, is_tuning: bool, interpret: bool) -> None:
    heads = SHAPES[name]
    cache = Cache.make(heads, [context] * batch, num_calls=2 if interpret else CALLS)
    q = jax.random.normal(jax.random.key(1), (batch, heads.num_heads, heads.head_dim), jnp.bfloat16)
    chosen = DecodeTiles.choose(
        batch=batch,
        num_kv_heads=heads.num_kv_heads,
        group=heads.num_heads // heads.num_kv_heads,
        head_dim=heads.head_dim,
        max_slots=cache.page_table.shape[1] * heads.page_size,
        itemsize=2,
    )
    num_bytes = 4 * batch * context * heads.num_kv_heads * heads.head_dim
    for tiles in decode_tiles(chosen, is_tuning=is_tuning):
        attend = functools.partial(decode_triton, scale=0.1, tiles=tiles, interpret=interpret)
        row = {"op": "decode", "shape": name, "batch": batch, "context": context}
        measure = functools.partial(time_calls, attend, cache, q)
        report(row, tiles, measure, unit="gb_per_s", amount=num_bytes / 1e9)


def bench_prefill(
    name: str, case: str, q_lens: list[int], kv_lens: list[int], *, is_tuning: bool, interpret: bool
) -> None:
    heads = SHAPES[name]
    cache = Cache.make(heads, kv_lens, num_calls=2 if interpret else CALLS)
    q_shape = (sum(q_lens), heads.num_heads, heads.head_dim)
    q = jax.random.normal(jax.random.key(1), q_shape, jnp.bfloat16)
    cu_q_lens = jnp.asarray(np.cumsum([0, *q_lens]), jnp.int32)
    chosen = PrefillTiles.choose(
        num_tokens=sum(q_lens),
        group=heads.num_heads // heads.num_kv_heads,
        head_dim=heads.head_dim,
        itemsize=2,
    )
    pairs = sum(q * kv - q * (q - 1) // 2 for q, kv in zip(q_lens, kv_lens, strict=True))
    tflop = 4 * pairs * heads.num_heads * heads.head_dim / 1e12
    row = {"op": "prefill", "shape": name, "case": case}
    for mosaic in mosaic_tiles(q, cache, is_tuning=is_tuning):
        attend = functools.partial(ragged_mosaic, scale=0.1, tiles=mosaic)
        measure = functools.partial(time_calls, attend, cache, q, cu_q_lens)
        report({**row, "backend": "mosaic"}, mosaic, measure, unit="tflop_per_s", amount=tflop)
    for tiles in prefill_tiles(chosen, is_tuning=is_tuning):
        attend = functools.partial(ragged_triton, scale=0.1, tiles=tiles, interpret=interpret)
        measure = functools.partial(time_calls, attend, cache, q, cu_q_lens)
        report({**row, "backend": "triton"}, tiles, measure, unit="tflop_per_s", amount=tflop)


def report(
    case: Mapping[str, object],
    tiles: DecodeTiles | PrefillTiles | MosaicTiles,
    measure: Callable[[], float],
    *,
    unit: str,
    amount: float,
) -> None:
    """Prints one line; `amount` is what one call does, printed per second as `unit`."""
    row: dict[str, object] = {**case, "tiles": dataclasses.asdict(tiles)}
    try:
        took_s = measure()
    except jax.errors.JaxRuntimeError as error:  # tiles that need more shared memory than there is
        row["error"] = str(error).partition("\n")[0][:200]
    else:
        row["us"] = round(took_s * 1e6, 2)
        row[unit] = round(amount / took_s, 1)
    print(json.dumps(row), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0] if __doc__ else None)
    parser.add_argument("--op", choices=("decode", "prefill"), help="only this one")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-8b")
    parser.add_argument("--tune", action="store_true", help="time other tiles too, not only the chosen ones")
    parser.add_argument("--interpret", action="store_true", help="tiny cases in interpret mode, to try this")
    args = parser.parse_args(argv)
    decode_cases, prefill_cases = DECODE_CASES, PREFILL_CASES
    if args.interpret:
        decode_cases, prefill_cases = ((1, 40),), {"tiny": ([20, 1], [20, 30])}
    device = jax.devices()[0].device_kind
    copied = copy_gb_per_s(1 << (20 if args.interpret else 30))
    print(
        json.dumps({"device": device, "jax": jax.__version__, "copy_gb_per_s": round(copied, 1)}), flush=True
    )
    options = {"is_tuning": args.tune, "interpret": args.interpret}
    if args.op != "prefill":
        for batch, context in decode_cases:
            bench_decode(args.shape, batch, context, **options)
    if args.op != "decode":
        for case, (q_lens, kv_lens) in prefill_cases.items():
            bench_prefill(args.shape, case, q_lens, kv_lens, **options)


if __name__ == "__main__":
    main()
