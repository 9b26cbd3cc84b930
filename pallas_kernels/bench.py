"""Times the kernels, each beside the limit of the card that was measured in the same run.

`pjengine bench kernels` is the way in. A timed program is many calls in a row, one per layer, each fed the
result of the one before; what the layers read is together larger than the L2 cache.
"""

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pjengine.pallas_kernels.dispatch import check_hopper
from pjengine.pallas_kernels.gated_linear import GatedTiles, gated_mosaic
from pjengine.pallas_kernels.gated_linear import reference as gated_reference
from pjengine.pallas_kernels.keep_threshold import threshold_triton
from pjengine.pallas_kernels.mosaic_prefill import MosaicTiles, check_mosaic_can, ragged_mosaic
from pjengine.pallas_kernels.paged_attention import DecodeTiles, decode_triton
from pjengine.pallas_kernels.ragged_prefill import PrefillTiles, ragged_triton
from pjengine.pallas_kernels.rope_kv_write import rope_kv_write_triton
from pjengine.pallas_kernels.shapes import PRODUCTS, SHAPES, HeadShape
from pjengine.pallas_kernels.skinny_linear import SkinnyTiles, skinny_triton
from pjengine.pallas_kernels.triton_extra import import_jax_triton

type Row = dict[str, object]

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
    x = jax.random.normal(jax.random.key(0), (num_bytes // 4,), jnp.float32)
    return 2 * num_bytes / seconds(jax.jit(lambda x: x + 1), x) / 1e9


def product_tflop_per_s(size: int) -> float:
    """Of one square bfloat16 product by the library that XLA calls."""
    left, right = jax.random.normal(jax.random.key(0), (2, size, size), jnp.bfloat16)
    return 2 * size**3 / seconds(jax.jit(jnp.dot), left, right) / 1e12


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the card can do at most, and how a kernel's figure reads beside it."""

    copy_gb_per_s: float
    product_tflop_per_s: float

    @classmethod
    def measure(cls, *, is_tiny: bool) -> "Limits":
        return cls(copy_gb_per_s(1 << (20 if is_tiny else 30)), product_tflop_per_s(256 if is_tiny else 8192))

    def row(self, case: Row, took: Callable[[], float], *, gb: float = 0.0, tflop: float = 0.0) -> Row:
        """One result: `took` seconds for `gb` through the memory, or for `tflop` of products."""
        try:
            took_s = took()
        except jax.errors.JaxRuntimeError as error:  # tiles that need more shared memory than there is
            return {**case, "error": str(error).partition("\n")[0][:200]}
        unit, amount, limit = (
            ("gb_per_s", gb, self.copy_gb_per_s) if gb else ("tflop_per_s", tflop, self.product_tflop_per_s)
        )
        rate = amount / took_s
        return {**case, "us": took_s * 1e6, unit: rate, f"limit_{unit}": limit, "share": rate / limit}


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
        for block_kv, num_splits, warps, stages in itertools.product(
            (32, 64, 128), splits, (4, 8), (3, 5, 7)
        ):
            yield DecodeTiles(block_kv=block_kv, num_splits=num_splits, num_warps=warps, num_stages=stages)


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


def jax_triton_kernel(name: str, *, interpret: bool) -> dict[str, Callable[..., Array]]:
    """Empty where the extra is not installed, and where kernels are to be interpreted."""
    try:
        return {} if interpret else {"jax_triton": getattr(import_jax_triton(), name)}
    except NotImplementedError:
        return {}


def decode_rows(name: str, limits: Limits, *, is_tuning: bool, interpret: bool) -> Iterator[Row]:
    """Decode attention; its bytes are those of K and V."""
    heads = SHAPES[name]
    for batch, context in ((1, 40),) if interpret else DECODE_CASES:
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
        gb = 4 * batch * context * heads.num_kv_heads * heads.head_dim / 1e9
        kernels: dict[str, Callable[..., Array]] = {
            "triton": functools.partial(decode, interpret=interpret),
            **jax_triton_kernel("decode_jax_triton", interpret=interpret),
        }
        tried = decode_tiles(chosen, is_tuning=is_tuning)
        for tiles, (backend, kernel) in itertools.product(tried, kernels.items()):
            attend = functools.partial(kernel, scale=0.1, tiles=tiles)
            case = {"op": "decode", "batch": batch, "context": context, **described(backend, tiles)}
            yield limits.row(case, functools.partial(time_calls, attend, cache, q), gb=gb)


def decode(*args: Array, **options: Any) -> Array:
    out, _ = decode_triton(*args, **options)
    return out


def prefill_rows(name: str, limits: Limits, *, is_tuning: bool, interpret: bool) -> Iterator[Row]:
    """Prefill attention; of its products, those under the causal mask count."""
    heads = SHAPES[name]
    tiny: Mapping[str, tuple[list[int], list[int]]] = {"tiny": ([20, 1], [20, 30])}
    for case, (q_lens, kv_lens) in (tiny if interpret else PREFILL_CASES).items():
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
        attends: list[tuple[Row, Callable[..., Array]]] = []
        for tiles in mosaic_tiles(q, cache, is_tuning=is_tuning):
            mosaic = functools.partial(ragged_mosaic, scale=0.1, tiles=tiles)
            attends.append((described("mosaic", tiles), mosaic))
        kernels: dict[str, Callable[..., Array]] = {
            "triton": functools.partial(ragged_triton, interpret=interpret),
            **jax_triton_kernel("ragged_jax_triton", interpret=interpret),
        }
        tried = prefill_tiles(chosen, is_tuning=is_tuning)
        for narrow, (backend, kernel) in itertools.product(tried, kernels.items()):
            attends.append((described(backend, narrow), functools.partial(kernel, scale=0.1, tiles=narrow)))
        for choice, attend in attends:
            took = functools.partial(time_calls, attend, cache, q, cu_q_lens)
            yield limits.row({"op": "prefill", "case": case, **choice}, took, tflop=tflop)


def product_rows(name: str, limits: Limits, *, is_tuning: bool, interpret: bool) -> Iterator[Row]:
    """Products of a few rows, by `skinny_linear` and by the library; their bytes are those of the weights."""
    num_layers, counts = (2, (1,)) if interpret else (4, (1, 8, 32))
    for (product, (k, n)), num_rows in itertools.product(PRODUCTS.get(name, {}).items(), counts):
        is_gated = product == "gate_up"
        weights = jax.random.normal(jax.random.key(0), (num_layers, k, n), jnp.bfloat16)
        x = jax.random.normal(jax.random.key(1), (num_rows, k), jnp.bfloat16)
        tiles = SkinnyTiles.choose(num_rows=num_rows, k=k, n=n // (1 + is_gated), is_gated=is_gated)
        skinny = functools.partial(
            skinny_triton, biases=None, residual=None, eps=0.0, is_gated=is_gated, interpret=interpret
        )
        case: Row = {"op": "product", "product": product, "rows": num_rows}
        for choice, multiply in (
            (described("triton", tiles), skinny),
            (described("library"), lambda x, weights, layer: (x @ weights[layer],)),
        ):
            took = functools.partial(time_products, multiply, x, weights, num_calls=2 if interpret else CALLS)
            yield limits.row({**case, **choice}, took, gb=2 * k * n / 1e9)


def gated_rows(name: str, limits: Limits, *, is_tuning: bool, interpret: bool) -> Iterator[Row]:
    """Gated products of many rows, by `gated_linear` and by the library, with XLA's kernel for the gates."""
    if "gate_up" not in PRODUCTS.get(name, {}):
        return
    try:
        if not interpret:
            check_hopper()
    except NotImplementedError:
        return
    k, n = (64, 256) if interpret else PRODUCTS[name]["gate_up"]
    weights = jax.random.normal(jax.random.key(0), (2 if interpret else 4, k, 2, n // 2), jnp.bfloat16)
    for num_rows in (64,) if interpret else (64, 256, 1024, 8192):
        x = jax.random.normal(jax.random.key(1), (num_rows, k), jnp.bfloat16)
        tiles = GatedTiles() if interpret else GatedTiles.choose(num_rows=num_rows, n=n // 2)
        interpreter = plgpu.InterpretGPUParams() if interpret else None
        mosaic = functools.partial(gated_mosaic, tiles=tiles, interpret=interpreter)
        for choice, multiply in (
            (described("mosaic", tiles), mosaic),
            (described("library"), gated_reference),
        ):
            took = functools.partial(time_products, multiply, x, weights, num_calls=2 if interpret else CALLS)
            yield limits.row(
                {"op": "gated", "rows": num_rows, **choice}, took, tflop=2 * num_rows * k * n / 1e12
            )


def time_products(multiply: Callable[..., Any], x: Array, weights: Array, *, num_calls: int) -> float:
    """Seconds of one call of `multiply(x, weights, layer)`."""

    @functools.partial(jax.jit, compiler_options=library_only())
    def program(x: Array, weights: Array) -> Array:
        for call in range(num_calls):
            out = jax.tree.leaves(multiply(x, weights, jnp.int32(call % len(weights))))[0]
            x = x + 0 * out[:1, :1]  # so that one follows the other
        return x

    return seconds(program, x, weights) / num_calls


def small_rows(name: str, limits: Limits, *, is_tuning: bool, interpret: bool) -> Iterator[Row]:
    """RoPE with the KV write, by its bytes, and the filters of the sampler, by one reading of the logits."""
    heads = SHAPES[name]
    half, group = heads.head_dim // 2, heads.num_heads // heads.num_kv_heads
    for num_tokens in (2,) if interpret else (1, 32, 256, 2048, 8192):
        cache = Cache.make(heads, [heads.page_size] * num_tokens, num_calls=2 if interpret else CALLS)
        qkv_shape = (num_tokens, heads.num_kv_heads, group + 2, heads.head_dim)
        qkv = jax.random.normal(jax.random.key(1), qkv_shape, jnp.bfloat16)
        angle = jax.random.uniform(jax.random.key(2), (num_tokens, half), jnp.float32)
        slots = cache.page_table[:, 0] * heads.page_size
        took = functools.partial(time_writes, cache, qkv, angle, slots, interpret=interpret)
        gb = (2 * qkv.nbytes + 2 * angle.nbytes) / 1e9
        yield limits.row({"op": "rope_kv_write", "tokens": num_tokens, **described("triton")}, took, gb=gb)
    vocab_size = 300 if interpret else 128256
    for num_rows in (2,) if interpret else (32, 256, 1024):
        logits = jax.random.normal(jax.random.key(3), (num_rows, vocab_size), jnp.float32)
        full = functools.partial(jnp.full, num_rows)
        filters = {"top_k": (50, 1.0), "top_p": (vocab_size, 0.9)}
        for kind, (top_k, top_p) in filters.items():
            keep = jax.jit(functools.partial(threshold_triton, interpret=interpret))
            arguments = (logits, full(1.0), full(top_k), full(top_p), full(0.0))
            case = {"op": "keep_threshold", "rows": num_rows, "filter": kind, **described("triton")}
            yield limits.row(case, functools.partial(seconds, keep, *arguments), gb=logits.nbytes / 1e9)


def time_writes(cache: Cache, qkv: Array, angle: Array, slots: Array, *, interpret: bool) -> float:
    """Seconds of one `rope_kv_write`."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def program(k_pages: Array, v_pages: Array, qkv: Array) -> tuple[Array, Array, Array]:
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        for offset in cache.offsets:
            q, k_pages, v_pages = rope_kv_write_triton(
                qkv, cos, sin, k_pages, v_pages, slots, jnp.int32(offset), interpret=interpret
            )
            qkv = qkv + 0 * q[:1, :1, None]
        return k_pages, v_pages, qkv

    pages = [cache.k_pages, cache.v_pages]

    def again(qkv: Array) -> Array:
        pages[0], pages[1], out = program(*pages, qkv)
        return out

    return seconds(again, qkv) / len(cache.offsets)


def library_only() -> dict[str, bool]:
    """Compiler options under which XLA's products are those of the library, as in the engine."""
    return {"xla_gpu_enable_triton_gemm": False} if jax.default_backend() == "gpu" else {}


def described(backend: str, tiles: Any = None) -> Row:
    return {"backend": backend, "tiles": None if tiles is None else dataclasses.asdict(tiles)}


OPS: Mapping[str, Callable[..., Iterator[Row]]] = {
    "decode": decode_rows,
    "prefill": prefill_rows,
    "product": product_rows,
    "gated": gated_rows,
    "small": small_rows,
}


def kernel_rows(
    name: str, ops: Sequence[str] = tuple(OPS), *, is_tuning: bool = False, interpret: bool = False
) -> Iterator[Row]:
    """Times the kernels at the sizes of the shape `name`, one result after the other.

    Args:
      ops: names in `OPS`.
      is_tuning: other tiles of the attention kernels too, not only the chosen ones.
      interpret: tiny cases in Pallas's interpreter, to try this on a CPU.

    Raises:
      NotImplementedError: this machine has no GPU, and it is not to interpret.
    """
    if not interpret and jax.default_backend() != "gpu":
        raise NotImplementedError(
            "the kernels run on NVIDIA GPUs, and JAX sees none; --interpret tries tiny cases on a CPU"
        )
    limits = Limits.measure(is_tiny=interpret)
    for op in ops:
        for row in OPS[op](name, limits, is_tuning=is_tuning, interpret=interpret):
            yield {"shape": name, **row}
