"""Every kernel with all tile configurations that the shapes of real models lead to, and with wrong ones."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Compiled

from pjengine.config import buckets
from pjengine.models.shapes import SHAPES as MODELS
from pjengine.pallas_kernels.attention_variant import AttentionVariant
from pjengine.pallas_kernels.gated_linear import GatedTiles, gated_mosaic
from pjengine.pallas_kernels.grouped_linear import (
    MAX_PLANNED,
    ExpertTiles,
    ExpertWeights,
    Gate,
    ProductTiles,
    Routing,
    plan_triton,
    routed_triton,
)
from pjengine.pallas_kernels.keep_threshold import threshold_triton
from pjengine.pallas_kernels.mosaic_prefill import MosaicTiles, check_mosaic_can, ragged_mosaic
from pjengine.pallas_kernels.paged_attention import DecodeTiles, decode_triton
from pjengine.pallas_kernels.peer_sum import peer_sum, peer_sum_norm, peer_sum_residual
from pjengine.pallas_kernels.ragged_prefill import PrefillTiles, ragged_triton
from pjengine.pallas_kernels.rope_kv_write import rope_kv_write_triton
from pjengine.pallas_kernels.shapes import EXPERTS, HEADS, PRODUCTS, SHAPES, ExpertShape, HeadShape
from pjengine.pallas_kernels.skinny_linear import MAX_ROWS, Normed, Residual, SkinnyTiles, skinny_triton
from pjengine.pallas_kernels.skinny_qkv import Destination, skinny_qkv_triton
from pjengine.pallas_kernels.stacked_linear import StackedTiles, stacked_mosaic
from pjengine.sharding.mesh import TENSOR
from tests.compile.target import compile_for_h200, sharding, struct
from tests.kernels.cases import FEATURES, make_variant

MAX_LEN = 8192
# Float16 takes no other path than bfloat16.
DTYPES = ("bfloat16", "float32")
# Of an array of K or V. From 4 on Triton counts its elements in 64 bits: other registers, more or fewer.
# Float32 is for comparisons: the larger one stands for both.
CACHE_GIB = {"bfloat16": (1, 8), "float32": (8,)}


def pages(shape: HeadShape, dtype: str, cache_gib: int) -> Any:
    page_bytes = shape.num_kv_heads * shape.page_size * shape.head_dim * jnp.dtype(dtype).itemsize
    num_pages = cache_gib * 2**30 // page_bytes
    return struct((num_pages, shape.num_kv_heads, shape.page_size, shape.head_dim), dtype)


def compile_decode(
    shape: HeadShape,
    dtype: str,
    batch: int,
    *,
    cache_gib: int = 8,
    tiles: DecodeTiles | None = None,
    features: Sequence[str] = (),
) -> Compiled:
    kv, q = pages(shape, dtype, cache_gib), struct((batch, shape.num_heads, shape.head_dim), dtype)
    ints = [struct(size) for size in ((batch, MAX_LEN // shape.page_size), (batch,), ())]
    return compile_attention(decode_triton, shape, features, q, kv, kv, *ints, tiles=tiles)


def compile_prefill(
    kernel: Callable[..., Any],
    shape: HeadShape,
    dtype: str,
    num_tokens: int,
    *,
    cache_gib: int = 8,
    tiles: Any = None,
    features: Sequence[str] = (),
) -> Compiled:
    kv, q = pages(shape, dtype, cache_gib), struct((num_tokens, shape.num_heads, shape.head_dim), dtype)
    ints = [struct(size) for size in ((32, MAX_LEN // shape.page_size), (32,), (33,), ())]
    return compile_attention(kernel, shape, features, q, kv, kv, *ints, tiles=tiles)


def compile_attention(
    kernel: Callable[..., Any], shape: HeadShape, features: Sequence[str], *args: Any, tiles: Any
) -> Compiled:
    variant = make_variant(shape.num_heads, features, window=1024)
    structs = jax.tree.map(lambda leaf: struct(leaf.shape, leaf.dtype), variant)

    def attend(variant: AttentionVariant, *args: Any) -> Any:
        return kernel(*args, variant=variant, scale=0.1, tiles=tiles)

    return compile_for_h200(attend, structs, *args)


def compile_rope(shape: HeadShape, dtype: str) -> Compiled:
    num_tokens, group = 8, shape.num_heads // shape.num_kv_heads
    qkv = struct((num_tokens, shape.num_kv_heads, group + 2, shape.head_dim), dtype)
    angles, kv = struct((num_tokens, shape.head_dim // 2), jnp.float32), pages(shape, dtype, 8)
    args = (qkv, angles, angles, kv, kv, struct((num_tokens,)), struct(()))
    return compile_for_h200(rope_kv_write_triton, *args, donate=(3, 4))


def compile_threshold(vocab_size: int) -> Compiled:
    floats, ints = struct((256,), jnp.float32), struct((256,))
    return compile_for_h200(
        threshold_triton, struct((256, vocab_size), jnp.float32), floats, ints, floats, floats
    )


def compile_product(product: str, k: int, n: int, num_rows: int, *, has_biases: bool = False) -> Compiled:
    """One of a decode layer's four products, of 32 layers, with all that belongs to it."""
    layers, bf16 = 32, jnp.bfloat16
    rows, residual = struct((num_rows, k), bf16), None
    if product in ("qkv", "gate_up"):
        rows = Normed(rows, struct((k // 64, num_rows), jnp.float32))
    else:
        residual = Residual(struct((num_rows, n), bf16), struct((layers, n), bf16), struct(()))
    biases = struct((layers, n), bf16) if has_biases else None
    run = functools.partial(skinny_triton, eps=1e-5, is_gated=product == "gate_up")
    return compile_for_h200(run, rows, struct((layers, k, n), bf16), struct(()), biases, residual)


def compile_qkv(shape: HeadShape, k: int, n: int, num_rows: int, *, has_biases: bool = False) -> Compiled:
    """The product of queries, keys and values, with its rotation and the KV write."""
    layers, bf16, kv = 32, jnp.bfloat16, pages(shape, "bfloat16", 8)
    rows = Normed(struct((num_rows, k), bf16), struct((k // 64, num_rows), jnp.float32))
    angles = struct((num_rows, shape.head_dim // 2), jnp.float32)
    biases = struct((layers, n), bf16) if has_biases else None

    def run(rows: Any, weights: Any, layer: Any, biases: Any, *destination: Any) -> Any:
        return skinny_qkv_triton(rows, weights, layer, Destination(*destination), biases, eps=1e-5)

    weights, scalar, slots = struct((layers, k, n), bf16), struct(()), struct((num_rows,))
    args = (rows, weights, scalar, biases, angles, angles, kv, kv, slots, scalar)
    return compile_for_h200(run, *args, donate=(6, 7))


def compile_gated(k: int, n: int, num_rows: int, *, tiles: GatedTiles | None = None) -> Compiled:
    """Gate and up of many rows; n is one half."""
    x, weights = struct((num_rows, k), jnp.bfloat16), struct((32, k, 2, n), jnp.bfloat16)
    return compile_for_h200(functools.partial(gated_mosaic, tiles=tiles), x, weights, struct(()))


def compile_stacked(
    k: int, n: int, num_rows: int, *, is_head: bool = False, is_fixed: bool = True,
    tiles: StackedTiles | None = None,
) -> Compiled:  # fmt: skip
    """A product of many rows: of 32 layers, or the transposed one of a head in float32."""
    x, weights = (
        struct((num_rows, k), jnp.bfloat16),
        struct((1, n, k) if is_head else (32, k, n), jnp.bfloat16),
    )
    dtype = jnp.float32 if is_head else jnp.bfloat16
    run = functools.partial(
        stacked_mosaic, dtype=dtype, is_transposed=is_head, is_batch_invariant=is_fixed, tiles=tiles
    )
    return compile_for_h200(run, x, weights, struct(()))


def compile_experts(
    shape: ExpertShape,
    dtype: str,
    num_tokens: int,
    *,
    tiles: ExpertTiles | None = None,
    has_biases: bool = False,
) -> Compiled:
    """The experts of one layer of many: a stack of more than 4 GiB, as real models have."""
    layers, experts, hidden, inner = 32, shape.num_experts, shape.hidden, shape.inner
    routing = Routing(*(struct((num_tokens, shape.num_choices), each) for each in (jnp.int32, jnp.float32)))
    weights = ExpertWeights(
        struct((layers, experts, hidden, 2, inner), dtype),
        struct((layers, experts, inner, hidden), dtype),
        struct((layers, experts, 2, inner), dtype) if has_biases else None,
        struct((layers, experts, hidden), dtype) if has_biases else None,
    )
    gate = Gate(alpha=1.702, limit=7.0, up_offset=1.0) if has_biases else Gate()
    run = functools.partial(routed_triton, gate=gate, tiles=tiles)
    return compile_for_h200(run, struct((num_tokens, hidden), dtype), routing, weights, struct(()))


def compile_plan(num_experts: int, num_pairs: int) -> Compiled:
    run = functools.partial(plan_triton, num_experts=num_experts, block_m=16)
    return compile_for_h200(run, struct((num_pairs, 1)))


def compile_peer_sum(
    num_gpus: int, hidden: int, num_rows: int, *, dtype: str = "bfloat16", norm: str = ""
) -> Compiled:
    """What a layer does with the parts of a product that GPUs divide; a norm is "started" or "finished"."""
    whole = sharding(num_gpus)
    parts = NamedSharding(whole.mesh, PartitionSpec(TENSOR))
    place: Any = functools.partial(jax.ShapeDtypeStruct, sharding=whole)
    rows = place((num_rows, hidden), dtype)
    residual = Residual(rows, place((32, hidden), dtype), place((), jnp.int32)) if norm else None
    tables = jax.ShapeDtypeStruct((num_gpus, num_gpus + 2, 2), jnp.uint32, sharding=parts)

    def run(x: Any, tables: Any, residual: Residual | None) -> Any:
        if residual is None:
            return peer_sum(x, tables[0], axis=TENSOR)
        if norm == "finished":
            return peer_sum_norm(x, tables[0], residual, eps=1e-5, axis=TENSOR)
        return peer_sum_residual(x, tables[0], residual, axis=TENSOR)

    specs = PartitionSpec(), parts.spec, PartitionSpec()
    divided = jax.shard_map(run, mesh=whole.mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    return compile_for_h200(divided, rows, tables, residual)


def decode_batches(shape: HeadShape, dtype: str) -> Iterator[int]:
    """One of each tile configuration; any two numbers of splits, but for one, are the same kernel."""
    seen = set()
    for batch in buckets(1, 1024):
        tiles = DecodeTiles.choose(
            batch=batch,
            num_kv_heads=shape.num_kv_heads,
            group=shape.num_heads // shape.num_kv_heads,
            head_dim=shape.head_dim,
            max_slots=MAX_LEN,
            itemsize=jnp.dtype(dtype).itemsize,
        )
        kind = dataclasses.replace(tiles, num_splits=min(tiles.num_splits, 2))
        if kind not in seen:
            seen.add(kind)
            yield batch


def prefill_lengths(shape: HeadShape, dtype: str) -> Iterator[int]:
    """One of each tile configuration."""
    group, itemsize, seen = shape.num_heads // shape.num_kv_heads, jnp.dtype(dtype).itemsize, set()
    for num_tokens in buckets(32, 16384):
        tiles = PrefillTiles.choose(
            num_tokens=num_tokens, group=group, head_dim=shape.head_dim, itemsize=itemsize
        )
        if tiles not in seen:
            seen.add(tiles)
            yield num_tokens


def product_rows(product: str, k: int, n: int) -> Iterator[int]:
    """One of each tile configuration and height of a block."""
    is_gated, seen = product == "gate_up", set()
    for num_rows in buckets(1, MAX_ROWS):
        tiles = SkinnyTiles.choose(num_rows=num_rows, k=k, n=n // (1 + is_gated), is_gated=is_gated)
        kind = (tiles, max(16, num_rows))
        if kind not in seen:
            seen.add(kind)
            yield num_rows


def expert_tokens(shape: ExpertShape, dtype: str, *, has_biases: bool) -> Iterator[int]:
    """One of each tile configuration."""
    seen = set()
    for num_tokens in buckets(1, 16384):
        tiles = ExpertTiles.choose(
            num_pairs=num_tokens * shape.num_choices,
            num_experts=shape.num_experts,
            hidden=shape.hidden,
            inner=shape.inner,
            itemsize=jnp.dtype(dtype).itemsize,
            has_biases=has_biases,
        )
        if tiles not in seen:
            seen.add(tiles)
            yield num_tokens


def can_mosaic(shape: HeadShape) -> bool:
    q = jax.ShapeDtypeStruct((2048, shape.num_heads, shape.head_dim), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((2, shape.num_kv_heads, shape.page_size, shape.head_dim), jnp.bfloat16)
    try:
        jax.eval_shape(check_mosaic_can, q, kv, kv)
    except NotImplementedError:
        return False
    return True


def attention_programs(name: str, shape: HeadShape) -> Iterator[tuple[str, Callable[[], Compiled]]]:
    partial = functools.partial
    for dtype in DTYPES:
        for gib in CACHE_GIB[dtype]:
            for batch in decode_batches(shape, dtype):
                run = partial(compile_decode, shape, dtype, batch, cache_gib=gib)
                yield f"paged_attention {name} {dtype} {batch} of {gib} GiB", run
            for length in prefill_lengths(shape, dtype):
                run = partial(compile_prefill, ragged_triton, shape, dtype, length, cache_gib=gib)
                yield f"ragged_prefill {name} {dtype} {length} of {gib} GiB", run
        yield f"rope_kv_write {name} {dtype}", partial(compile_rope, shape, dtype)
    if can_mosaic(shape):
        yield f"mosaic_prefill {name}", partial(compile_prefill, ragged_mosaic, shape, "bfloat16", 2048)


def featured_programs(name: str) -> Iterator[tuple[str, Callable[[], Compiled]]]:
    """What layers may do beside plain attention, one at a time and all at once."""
    shape, partial = SHAPES[name], functools.partial
    for features in FEATURES:
        names = "+".join(features)
        run = partial(compile_decode, shape, "bfloat16", 16, features=features)
        yield f"paged_attention {name} with {names}", run
        run = partial(compile_prefill, ragged_triton, shape, "bfloat16", 2048, features=features)
        yield f"ragged_prefill {name} with {names}", run


def product_programs(name: str) -> Iterator[tuple[str, Callable[[], Compiled]]]:
    for product, (k, n) in PRODUCTS[name].items():
        for num_rows in product_rows(product, k, n):
            run = functools.partial(compile_product, product, k, n, num_rows)
            yield f"skinny_linear {name} {product} {num_rows}", run
        biased = functools.partial(compile_product, product, k, n, MAX_ROWS, has_biases=True)
        yield f"skinny_linear {name} {product} {MAX_ROWS} with biases", biased
    k, n = PRODUCTS[name]["qkv"]
    for num_rows in product_rows("qkv", k, n):
        yield f"skinny_qkv {name} {num_rows}", functools.partial(compile_qkv, SHAPES[name], k, n, num_rows)
    biased = functools.partial(compile_qkv, SHAPES[name], k, n, MAX_ROWS, has_biases=True)
    yield f"skinny_qkv {name} {MAX_ROWS} with biases", biased
    k, n = PRODUCTS[name]["gate_up"]
    for num_rows in (32, 256) if name != "demo" else ():  # one of each tile configuration
        yield f"gated_linear {name} {num_rows}", functools.partial(compile_gated, k, n // 2, num_rows)


def stacked_programs(name: str) -> Iterator[tuple[str, Callable[[], Compiled]]]:
    """Batch-invariant ones of a decode step, and those of a step of prompts."""
    products = {"qkv": PRODUCTS[name]["qkv"], "out": PRODUCTS[name]["out"], "down": PRODUCTS[name]["down"]}
    for (product, (k, n)), num_rows in itertools.product(
        {**products, "head": HEADS[name]}.items(), (64, 128, 256, 512)
    ):
        run = functools.partial(compile_stacked, k, n, num_rows, is_head=product == "head")
        yield f"stacked_linear {name} {product} {num_rows}", run
    for (product, (k, n)), num_rows in itertools.product(products.items(), (128, 4096)):
        run = functools.partial(compile_stacked, k, n, num_rows, is_fixed=False)
        yield f"stacked_linear {name} {product} {num_rows}, of any bits", run


def expert_programs(name: str, shape: ExpertShape) -> Iterator[tuple[str, Callable[[], Compiled]]]:
    kinds = [("bfloat16", False), ("float32", False), ("bfloat16", True)]
    for dtype, has_biases in kinds if name != "demo" else kinds[:1]:
        for num_tokens in expert_tokens(shape, dtype, has_biases=has_biases):
            run = functools.partial(compile_experts, shape, dtype, num_tokens, has_biases=has_biases)
            yield f"grouped_linear {name} {dtype} {num_tokens}{' with biases' * has_biases}", run


def peer_programs() -> Iterator[tuple[str, Callable[[], Compiled]]]:
    """Packets and rows; with a norm that is started, packets alone, the fewest and the most rows."""
    for num_gpus, (num_rows, dtype) in itertools.product(
        (2, 4), [(1, "bfloat16"), (32, "float16"), (128, "bfloat16"), (128, "float16")]
    ):
        run = functools.partial(compile_peer_sum, num_gpus, 4096, num_rows, dtype=dtype)
        yield f"peer_sum 4096 {dtype} {num_rows} on {num_gpus}", run
    for num_gpus, hidden, num_rows in itertools.product((2, 4), (4096, 8192), (1, MAX_ROWS)):
        run = functools.partial(compile_peer_sum, num_gpus, hidden, num_rows, norm="started")
        yield f"peer_sum_residual {hidden} {num_rows} on {num_gpus}", run
    for num_gpus, (hidden, num_rows) in itertools.product(
        (2, 4), ((1024, 8), (4096, 64), (4096, 128), (4096, 320), (8192, 16), (8192, 200))
    ):
        run = functools.partial(compile_peer_sum, num_gpus, hidden, num_rows, norm="finished")
        yield f"peer_sum_norm {hidden} {num_rows} on {num_gpus}", run


def _programs() -> Iterator[tuple[str, Callable[[], Compiled]]]:
    for name, shape in SHAPES.items():
        yield from attention_programs(name, shape)
    for name in ("llama-8b", "bloom-3b", "falcon-7b"):
        yield from featured_programs(name)
    for name in PRODUCTS:
        yield from product_programs(name)
    for name in ("llama-8b", "llama2-13b"):
        yield from stacked_programs(name)
    for name, experts in EXPERTS.items():
        yield from expert_programs(name, experts)
    for num_experts, num_pairs in itertools.product((8, 128, 512), (2, 64, MAX_PLANNED)):
        run = functools.partial(compile_plan, num_experts, num_pairs)
        yield f"plan of grouped_linear {num_experts} {num_pairs}", run
    for name, config in MODELS.items():
        yield f"keep_threshold {name}", functools.partial(compile_threshold, config.vocab_size)
    yield from peer_programs()


PROGRAMS: Mapping[str, Callable[[], Compiled]] = dict(_programs())

# Around its loops over tiles, and not in them, Mosaic's kernel keeps some numbers of a block in memory.
FEATURED_MOSAIC: Mapping[str, Callable[[], Compiled]] = {
    f"mosaic_prefill {name} with {'+'.join(features)}": functools.partial(
        compile_prefill, ragged_mosaic, SHAPES[name], "bfloat16", 2048, features=features
    )
    for name in ("llama-8b", "opt-125m")
    for features in FEATURES
}
_LLAMA = SHAPES["llama-8b"]
# What must not get through: more shared memory than a program may have, more registers than there are.
WRONG: Mapping[str, Callable[[], Compiled]] = {
    "paged_attention of 9 stages": functools.partial(
        compile_decode, _LLAMA, "bfloat16", 256,
        tiles=DecodeTiles(block_kv=256, num_splits=1, num_stages=9),
    ),
    "ragged_prefill of 4 warps": functools.partial(
        compile_prefill, ragged_triton, _LLAMA, "bfloat16", 2048,
        tiles=PrefillTiles(block_m=128, block_kv=128, num_warps=4),
    ),
    "mosaic_prefill of 4 stages": functools.partial(
        compile_prefill, ragged_mosaic, _LLAMA, "bfloat16", 2048, tiles=MosaicTiles(num_stages=4)
    ),
    "gated_linear of 8 stages": functools.partial(
        compile_gated, 4096, 14336, 256, tiles=GatedTiles(num_stages=8)
    ),
    "stacked_linear of 6 stages": functools.partial(
        compile_stacked, 4096, 4096, 512,
        tiles=StackedTiles(num_splits=4, is_split=True, block_n=256, num_stages=6),
    ),
    "grouped_linear of 4 warps": functools.partial(
        compile_experts, EXPERTS["mixtral-8x7b"], "bfloat16", 8192,
        tiles=ExpertTiles(block_m=128, gate_up=ProductTiles(block_n=128, block_k=64)),
    ),
    "mosaic_prefill of 256 slots": functools.partial(
        compile_prefill, ragged_mosaic, SHAPES["opt-125m"], "bfloat16", 2048, tiles=MosaicTiles(block_kv=256)
    ),
}  # fmt: skip
