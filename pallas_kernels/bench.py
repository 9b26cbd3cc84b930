"""Times the kernels, each beside the limit of the card that was measured in the same run, as `timing` does.

`pjengine bench kernels` is the way in.
"""

import dataclasses
import functools
import itertools
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
from pjengine.pallas_kernels.grouped_linear import (
    ExpertTiles,
    ExpertWeights,
    ProductTiles,
    Routing,
    routed_triton,
)
from pjengine.pallas_kernels.keep_threshold import threshold_triton
from pjengine.pallas_kernels.mosaic_prefill import MosaicTiles, check_mosaic_can, ragged_mosaic
from pjengine.pallas_kernels.paged_attention import DecodeTiles, decode_triton
from pjengine.pallas_kernels.ragged_prefill import PrefillTiles, ragged_triton
from pjengine.pallas_kernels.rope_kv_write import rope_kv_write_triton
from pjengine.pallas_kernels.shapes import EXPERTS, HEADS, PRODUCTS, SHAPES, ExpertShape, HeadShape
from pjengine.pallas_kernels.skinny_linear import Residual, SkinnyTiles, skinny_triton, start_norm
from pjengine.pallas_kernels.skinny_qkv import Destination, choose_tiles, skinny_qkv_triton
from pjengine.pallas_kernels.stacked_linear import StackedTiles, choose_splits, stacked_mosaic
from pjengine.pallas_kernels.stacked_linear import reference as stacked_reference
from pjengine.pallas_kernels.timing import (
    CALLS,
    Call,
    Case,
    Limits,
    Row,
    State,
    calls_for,
    described,
    layers_for,
    library_only,
)
from pjengine.pallas_kernels.triton_extra import import_jax_triton

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
EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Cache:
    """Random K and V of some layers, and the page table of equally filled sequences."""

    k_pages: Array
    v_pages: Array
    page_table: Array
    kv_lens: Array
    num_layers: int

    @classmethod
    def make(cls, heads: HeadShape, kv_lens: Sequence[int], *, num_layers: int | None = None) -> "Cache":
        """With as many layers as are more than stays in a cache, or `num_layers`."""
        rng = np.random.default_rng(0)
        width = -(-max(kv_lens) // heads.page_size)
        num_pages = len(kv_lens) * width
        shape = (heads.num_kv_heads, heads.page_size, heads.head_dim)
        if num_layers is None:
            num_layers = layers_for(4 * num_pages * int(np.prod(shape)), is_tiny=False)
        k_key, v_key = jax.random.split(jax.random.key(0))
        return cls(
            k_pages=jax.random.normal(k_key, (num_layers * num_pages, *shape), jnp.bfloat16),
            v_pages=jax.random.normal(v_key, (num_layers * num_pages, *shape), jnp.bfloat16),
            page_table=jnp.asarray(rng.permutation(num_pages).reshape(-1, width), jnp.int32),
            kv_lens=jnp.asarray(kv_lens, jnp.int32),
            num_layers=num_layers,
        )

    @property
    def arrays(self) -> tuple[Array, ...]:
        return self.k_pages, self.v_pages, self.page_table, self.kv_lens

    def offset(self, call: int) -> Array:
        """First page of the layer that a call reads."""
        return jnp.int32(call % self.num_layers * self.page_table.size)


def attention_call(kernel: Callable[..., Any], cache: Cache, **options: Any) -> Call:
    """Each call's queries are what the one before made. The state: queries and counters."""

    def call(state: State, index: int, *args: Array) -> tuple[State, None]:
        q, counters = state
        return (kernel(q, *args, cache.offset(index), scale=0.1, **options), counters), None

    return call


def decode_call(cache: Cache, **options: Any) -> Call:
    """The same for the decode kernel, which is lent the counters, as in a step."""

    def call(state: State, index: int, *args: Array) -> tuple[State, None]:
        q, counters = state
        return decode_triton(q, *args, cache.offset(index), counters, scale=0.1, **options), None

    return call


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


def jax_triton_module(*, is_tiny: bool) -> Any:
    """None where the extra is not installed, and where kernels are to be interpreted."""
    try:
        return None if is_tiny else import_jax_triton()
    except NotImplementedError:
        return None


def decode_cases(name: str, *, is_tiny: bool, is_tuning: bool, interpret: bool) -> Iterator[Case]:
    """Decode attention; its bytes are those of K and V."""
    heads = SHAPES[name]
    for batch, context in ((1, 40),) if is_tiny else DECODE_CASES:
        cache = Cache.make(heads, [context] * batch, num_layers=2 if is_tiny else None)
        q = jax.random.normal(jax.random.key(1), (batch, heads.num_heads, heads.head_dim), jnp.bfloat16)
        max_slots = cache.page_table.shape[1] * heads.page_size
        kinds = [("triton", DecodeTiles.choose_for(q, cache.k_pages, max_slots))]
        if (module := jax_triton_module(is_tiny=is_tiny)) is not None:
            kinds.append(("jax_triton", module.choose_decode_tiles(q, cache.k_pages, max_slots)))
        for backend, chosen in kinds:
            for tiles in decode_tiles(chosen, is_tuning=is_tuning):
                yield Case(
                    row={"op": "decode", "batch": batch, "context": context, **described(backend, tiles)},
                    call=decode_call(cache, tiles=tiles, interpret=interpret)
                    if backend == "triton"
                    else attention_call(module.decode_jax_triton, cache, tiles=tiles),
                    state=(q, jnp.zeros((batch * heads.num_kv_heads,), jnp.int32)),
                    args=cache.arrays,
                    num_calls=calls_for(cache.num_layers, is_tiny=is_tiny),
                    gb=4 * batch * context * heads.num_kv_heads * heads.head_dim / 1e9,
                )


def prefill_cases(name: str, *, is_tiny: bool, is_tuning: bool, interpret: bool) -> Iterator[Case]:
    """Prefill attention; of its products, those under the causal mask count."""
    heads = SHAPES[name]
    tiny: Mapping[str, tuple[list[int], list[int]]] = {"tiny": ([20, 1], [20, 30])}
    for case, (q_lens, kv_lens) in (tiny if is_tiny else PREFILL_CASES).items():
        cache = Cache.make(heads, kv_lens, num_layers=2 if is_tiny else None)
        q_shape = (sum(q_lens), heads.num_heads, heads.head_dim)
        q = jax.random.normal(jax.random.key(1), q_shape, jnp.bfloat16)
        chosen = PrefillTiles.choose(
            num_tokens=sum(q_lens),
            group=heads.num_heads // heads.num_kv_heads,
            head_dim=heads.head_dim,
            itemsize=2,
        )
        pairs = sum(q * kv - q * (q - 1) // 2 for q, kv in zip(q_lens, kv_lens, strict=True))
        kinds: list[tuple[Row, Call]] = []
        for tiles in () if is_tiny else mosaic_tiles(q, cache, is_tuning=is_tuning):
            kinds.append((described("mosaic", tiles), attention_call(ragged_mosaic, cache, tiles=tiles)))
        module = jax_triton_module(is_tiny=is_tiny)
        for narrow in prefill_tiles(chosen, is_tuning=is_tuning):
            triton = functools.partial(ragged_triton, tiles=narrow, interpret=interpret)
            kinds.append((described("triton", narrow), attention_call(triton, cache)))
            if module is not None:
                call = attention_call(module.ragged_jax_triton, cache, tiles=narrow)
                kinds.append((described("jax_triton", narrow), call))
        for choice, call in kinds:
            yield Case(
                row={"op": "prefill", "case": case, **choice},
                call=call,
                state=(q, None),
                args=(*cache.arrays, jnp.asarray(np.cumsum([0, *q_lens]), jnp.int32)),
                num_calls=calls_for(cache.num_layers, is_tiny=is_tiny),
                tflop=4 * pairs * heads.num_heads * heads.head_dim / 1e12,
            )


def product_cases(name: str, *, is_tiny: bool, is_tuning: bool, interpret: bool) -> Iterator[Case]:
    """Products of a few rows; their bytes are those of the weights.

    Each by the kernels as a step calls them (`form` says what belongs to the product then), by
    `skinny_linear` without that, and by the library.
    """
    counts = (1,) if is_tiny else (1, 8, 32)
    for (product, (k, n)), num_rows in itertools.product(PRODUCTS.get(name, {}).items(), counts):
        num_layers = layers_for(2 * k * n, is_tiny=is_tiny)
        weights = jax.random.normal(jax.random.key(0), (num_layers, k, n), jnp.bfloat16)
        x = jax.random.normal(jax.random.key(1), (num_rows, k), jnp.bfloat16)
        tiles = SkinnyTiles.choose(
            num_rows=num_rows, k=k, n=n // (1 + (product == "gate_up")), is_gated=product == "gate_up"
        )
        base = Case(
            row={"op": "product", "product": product, "rows": num_rows, "form": "product alone"},
            call=lambda state, index, weights: (state, state[0] @ weights[index % len(weights)]),
            state=(x, jnp.zeros((n,), jnp.int32)),
            args=(weights,),
            num_calls=calls_for(num_layers, is_tiny=is_tiny),
            gb=2 * k * n / 1e9,
        )
        if product == "qkv":
            yield qkv_case(base, SHAPES[name], interpret=interpret)
        else:
            yield step_case(base, product, tiles, interpret=interpret)
        plain = product_call(is_gated=product == "gate_up", tiles=tiles, interpret=interpret)
        form = "gates alone" if product == "gate_up" else "product alone"
        row = {**base.row, "form": form, **described("triton", tiles)}
        yield dataclasses.replace(base, call=plain, row=row)
        yield dataclasses.replace(base, row={**base.row, **described("library")})


def product_call(**options: Any) -> Call:
    """The state: the rows, normed or not, and the counters."""

    def call(state: State, index: int, weights: Array) -> tuple[State, Array]:
        x, counters = state
        layer = jnp.int32(index % len(weights))
        out, counters = skinny_triton(x, weights, layer, None, None, counters, eps=EPS, **options)
        return (x, counters), out

    return call


def step_case(base: Case, product: str, tiles: SkinnyTiles, *, interpret: bool) -> Case:
    """`base` with all that belongs to the product in a step: norm and gates, or residual and norm."""
    x, counters = base.state
    options: dict[str, Any] = {"tiles": tiles, "interpret": interpret}
    state: State
    if product == "gate_up":
        form, state = "norm and gates", (start_norm(x, jnp.ones(x.shape[1], x.dtype)), counters)
        call = product_call(is_gated=True, **options)
    else:
        form, n = "residual and norm", base.args[0].shape[2]
        state = (jnp.zeros((len(x), n), x.dtype), counters)
        norms = jnp.ones((1, n), x.dtype)

        def call(state: State, index: int, weights: Array, x: Array, norms: Array) -> tuple[State, None]:
            rows, counters = state
            layer, residual = jnp.int32(index % len(weights)), Residual(rows, norms, 0)
            rows, _, _, counters = skinny_triton(
                x, weights, layer, None, residual, counters, eps=0.0, is_gated=False, **options
            )
            return (rows, counters), None

        base = dataclasses.replace(base, args=(*base.args, x, norms))
    row = {**base.row, "form": form, **described("triton", tiles)}
    return dataclasses.replace(base, row=row, call=call, state=state)


def qkv_case(base: Case, heads: HeadShape, *, interpret: bool) -> Case:
    """The product for queries, keys and values in a step. The state: KV pages and counters."""
    (x, counters), [weights] = base.state, base.args
    tiles = choose_tiles(len(x), weights.shape[1], weights.shape[2], heads.head_dim)
    cache = Cache.make(heads, [heads.page_size] * len(x), num_layers=1)
    angle = jax.random.uniform(jax.random.key(2), (len(x), heads.head_dim // 2), jnp.float32)
    slots = cache.page_table[:, 0] * heads.page_size

    def call(state: State, index: int, weights: Array, x: Any, *where: Array) -> tuple[State, None]:
        k_pages, v_pages, counters = state
        layer, (cos, sin, slots) = jnp.int32(index % len(weights)), where
        to = Destination(cos, sin, k_pages, v_pages, slots, jnp.int32(0))
        _, *state = skinny_qkv_triton(
            x, weights, layer, to, None, counters, eps=EPS, tiles=tiles, interpret=interpret
        )
        return tuple(state), None

    return dataclasses.replace(
        base,
        row={**base.row, "form": "norm, RoPE and KV write", **described("triton", tiles)},
        call=call,
        state=(cache.k_pages, cache.v_pages, counters),
        args=(weights, start_norm(x, jnp.ones(x.shape[1], x.dtype)), jnp.cos(angle), jnp.sin(angle), slots),
    )


def gated_cases(name: str, *, is_tiny: bool, is_tuning: bool, interpret: bool) -> Iterator[Case]:
    """Gated products of many rows, by `gated_linear` and by the library, with XLA's kernel for the gates."""
    if "gate_up" not in PRODUCTS.get(name, {}) or not runs_mosaic(interpret=interpret):
        return
    k, n = PRODUCTS[name]["gate_up"]
    num_layers = layers_for(2 * k * n, is_tiny=is_tiny)
    weights = jax.random.normal(jax.random.key(0), (num_layers, k, 2, n // 2), jnp.bfloat16)
    for num_rows in (64,) if is_tiny else (64, 256, 1024, 8192):
        x = jax.random.normal(jax.random.key(1), (num_rows, k), jnp.bfloat16)
        tiles = GatedTiles() if is_tiny else GatedTiles.choose(num_rows=num_rows, n=n // 2)
        interpreter = plgpu.InterpretGPUParams() if interpret else None
        mosaic = functools.partial(gated_mosaic, tiles=tiles, interpret=interpreter)
        kinds: tuple[tuple[Row, Callable[..., Array]], ...] = (
            (described("mosaic", tiles), mosaic),
            (described("library"), gated_reference),
        )
        for choice, multiply in kinds:
            yield Case(
                row={"op": "gated", "rows": num_rows, **choice},
                call=layer_call(multiply),
                state=(x,),
                args=(weights,),
                # The results of a program are all there at once.
                num_calls=2 if is_tiny else min(CALLS, (1 << 31) // (num_rows * n)),
                tflop=2 * num_rows * k * n / 1e12,
            )


def runs_mosaic(*, interpret: bool) -> bool:
    try:
        if not interpret:
            check_hopper()
    except NotImplementedError:
        return False
    return True


def layer_call(multiply: Callable[..., Array]) -> Call:
    return lambda state, index, weights: (
        state,
        multiply(*state, weights, jnp.int32(index % len(weights))),
    )


def stacked_cases(name: str, *, is_tiny: bool, is_tuning: bool, interpret: bool) -> Iterator[Case]:
    """Products of a layer and the head by `stacked_linear`, in both of its ways, and by the library.

    `has_equal_bits`: the first rows have the same bits with every one of the numbers of rows up to 512.
    """
    if name not in HEADS or not runs_mosaic(interpret=interpret):
        return
    layered = {product: sizes for product, sizes in PRODUCTS[name].items() if product != "gate_up"}
    for product, (k, n) in {**layered, "head": HEADS[name]}.items():
        is_head = product == "head"
        counts = (8, 16) if is_tiny else (64, 128, 256, 512) if is_head else (64, 128, 256, 512, 1024, 4096)
        num_layers = layers_for(2 * k * n, is_tiny=is_tiny)
        shape = (num_layers, *((n, k) if is_head else (k, n)))
        weights = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
        x = jax.random.normal(jax.random.key(1), (counts[-1], k), jnp.bfloat16)
        options: dict[str, Any] = {
            "dtype": jnp.float32 if is_head else jnp.bfloat16,
            "is_transposed": is_head,
        }
        kinds = {
            is_fixed: functools.partial(
                stacked_mosaic,
                is_batch_invariant=is_fixed,
                interpret=plgpu.InterpretGPUParams() if interpret else None,
                **options,
            )
            for is_fixed in (False, True)
        }
        library = functools.partial(stacked_reference, **options)
        few = [count for count in counts if count <= 512]
        is_equal = [has_equal_bits(each, x, weights, few) for each in (*kinds.values(), library)]
        for num_rows in counts:
            sizes = {"num_rows": num_rows, "k": k, "n": n}
            tiles = {
                is_fixed: StackedTiles.choose(**sizes, num_splits=choose_splits(k, n) if is_fixed else None)
                for is_fixed in kinds
            }
            choices = [
                *(described("mosaic", tiles[own]) | {"is_batch_invariant": own} for own in kinds),
                described("library"),
            ]
            for choice, multiply, same in zip(choices, (*kinds.values(), library), is_equal, strict=True):
                yield Case(
                    row={
                        "op": "stacked",
                        "product": product,
                        "rows": num_rows,
                        **choice,
                        "has_equal_bits": same,
                    },
                    call=layer_call(multiply),
                    state=(x[:num_rows],),
                    args=(weights,),
                    num_calls=1 if is_tiny else min(CALLS, (1 << 31) // (4 * num_rows * n)),
                    tflop=2 * num_rows * k * n / 1e12,
                )


def has_equal_bits(multiply: Callable[..., Array], x: Array, weights: Array, counts: Sequence[int]) -> bool:
    """Whether the first rows are the same with each of so many, of which the first count is the least."""
    program = jax.jit(multiply, compiler_options=library_only())
    outs = (program(x[:count], weights, jnp.int32(0))[: counts[0]] for count in counts)
    return len({np.asarray(out).tobytes() for out in outs}) == 1


def expert_cases(name: str, *, is_tiny: bool, is_tuning: bool, interpret: bool) -> Iterator[Case]:
    """The experts of a layer: by the weights of those that are chosen, or for many tokens by the products.

    With a plan of blocks in each call, as in a model, and as if all calls had the same.
    """
    shape = EXPERTS[name]
    weight_bytes = 6 * shape.hidden * shape.inner  # of an expert
    for num_tokens in (3,) if is_tiny else (1, 32, 256, 2048, 8192):
        rng, num_pairs = np.random.default_rng(0), num_tokens * shape.num_choices
        experts = rng.permuted(np.tile(np.arange(shape.num_experts), (num_tokens, 1)), axis=1)
        experts = experts[:, : shape.num_choices].astype(np.int32)
        num_bytes = len(np.unique(experts)) * weight_bytes
        num_layers = layers_for(num_bytes, is_tiny=is_tiny)
        gate_up, down = (
            jax.random.normal(jax.random.key(seed), (num_layers, shape.num_experts, *each), jnp.bfloat16)
            for seed, each in enumerate([(shape.hidden, 2, shape.inner), (shape.inner, shape.hidden)])
        )
        x = jax.random.normal(jax.random.key(2), (num_tokens, shape.hidden), jnp.bfloat16)
        routing = Routing(jnp.asarray(experts), jnp.full(experts.shape, 1 / shape.num_choices))
        chosen = ExpertTiles.choose(
            num_pairs=num_pairs,
            num_experts=shape.num_experts,
            hidden=shape.hidden,
            inner=shape.inner,
            itemsize=2,
        )
        base = Case(
            row={"op": "experts", "tokens": num_tokens, "form": "plan and products"},
            call=expert_call(chosen, interpret=interpret),
            state=(x, routing),
            args=(ExpertWeights(gate_up, down),),
            num_calls=calls_for(num_layers, is_tiny=is_tiny),
            gb=num_bytes / 1e9 if num_tokens <= 256 else 0.0,
            tflop=num_pairs * weight_bytes / 1e12,  # as many products and sums as there are bytes
        )
        yield dataclasses.replace(base, row={**base.row, **described("triton", chosen)})
        for tiles in expert_tiles(chosen, shape, is_tuning=is_tuning):
            row = {**base.row, "form": "products alone", **described("triton", tiles)}
            call = expert_call(tiles, interpret=interpret)
            yield dataclasses.replace(base, row=row, call=call, state=(x,), args=(*base.args, routing))


def expert_tiles(chosen: ExpertTiles, shape: ExpertShape, *, is_tuning: bool) -> Iterator[ExpertTiles]:
    """Those chosen; to tune, others of one product at a time that divide the sizes."""
    yield chosen
    if not is_tuning:
        return
    group_m = chosen.gate_up.group_m
    heights: Sequence[int]
    if chosen.block_m <= 32:
        kinds = [
            ProductTiles(block_n=block_n, block_k=block_k, num_stages=stages, group_m=group_m)
            for block_n, (block_k, stages) in itertools.product(
                (32, 64, 128), ((64, 4), (64, 6), (128, 3), (128, 5))
            )
        ]
        heights = (16, 32)
    else:
        kinds = [
            ProductTiles(block_n=block_n, block_k=64, num_warps=warps, num_stages=stages, group_m=group_m)
            for block_n, warps, stages in itertools.product((64, 128, 256), (4, 8), (3, 4))
        ]
        heights = (32, 64, 128)
    for block_m in heights:
        if block_m != chosen.block_m:
            yield dataclasses.replace(chosen, block_m=block_m)
    for product, tiles in itertools.product(("gate_up", "down"), kinds):
        is_first = product == "gate_up"
        k, n = (shape.hidden, shape.inner) if is_first else (shape.inner, shape.hidden)
        if k % tiles.block_k == n % tiles.block_n == 0:
            yield (
                dataclasses.replace(chosen, gate_up=tiles)
                if is_first
                else dataclasses.replace(chosen, down=tiles)
            )


def expert_call(tiles: ExpertTiles, *, interpret: bool) -> Call:
    """The state: rows, and the routing where each call is to plan its own; else that is an argument."""

    def call(state: State, index: int, weights: ExpertWeights, *routing: Routing) -> tuple[State, Array]:
        x, *own = state
        layer = jnp.int32(index % len(weights.down))
        out = routed_triton(x, *own, *routing, weights, layer, tiles=tiles, interpret=interpret)
        return state, out

    return call


def small_cases(name: str, *, is_tiny: bool, is_tuning: bool, interpret: bool) -> Iterator[Case]:
    """RoPE with the KV write, by its bytes, and the filters of the sampler, by one reading of the logits."""
    heads = SHAPES[name]
    half, group = heads.head_dim // 2, heads.num_heads // heads.num_kv_heads
    for num_tokens in (2,) if is_tiny else (1, 32, 256, 2048, 8192):
        cache = Cache.make(heads, [heads.page_size] * num_tokens, num_layers=1)
        qkv_shape = (num_tokens, heads.num_kv_heads, group + 2, heads.head_dim)
        qkv = jax.random.normal(jax.random.key(1), qkv_shape, jnp.bfloat16)
        angle = jax.random.uniform(jax.random.key(2), (num_tokens, half), jnp.float32)
        slots = cache.page_table[:, 0] * heads.page_size

        def write(state: State, index: int, qkv: Array, cos: Array, sin: Array, slots: Array) -> Any:
            _, *state = rope_kv_write_triton(qkv, cos, sin, *state, slots, jnp.int32(0), interpret=interpret)
            return tuple(state), None

        yield Case(
            row={"op": "rope_kv_write", "tokens": num_tokens, **described("triton")},
            call=write,
            state=(cache.k_pages, cache.v_pages),
            args=(qkv, jnp.cos(angle), jnp.sin(angle), slots),
            num_calls=2 if is_tiny else CALLS,
            gb=(2 * qkv.nbytes + 2 * angle.nbytes) / 1e9,
            is_cold=False,  # as in a step, in which the kernel before made what it reads
        )
    vocab_size = 300 if is_tiny else 128256
    for num_rows in (2,) if is_tiny else (32, 256, 1024):
        num_arrays = layers_for(4 * num_rows * vocab_size, is_tiny=is_tiny)
        keys = jax.random.split(jax.random.key(3), num_arrays)
        logits = [jax.random.normal(key, (num_rows, vocab_size), jnp.float32) for key in keys]
        filters = {"top_k": (50, 1.0), "top_p": (vocab_size, 0.9)}
        for kind, (top_k, top_p) in filters.items():
            yield Case(
                row={"op": "keep_threshold", "rows": num_rows, "filter": kind, **described("triton")},
                call=threshold_call(interpret=interpret),
                state=tuple(jnp.full(num_rows, value) for value in (1.0, top_k, top_p, 0.0)),
                args=tuple(logits),
                num_calls=calls_for(num_arrays, is_tiny=is_tiny),
                gb=logits[0].nbytes / 1e9,
            )


def threshold_call(*, interpret: bool) -> Call:
    """The state: what the rows ask for."""
    return lambda state, index, *logits: (
        state,
        threshold_triton(logits[index % len(logits)], *state, interpret=interpret),
    )


OPS: Mapping[str, Callable[..., Iterator[Case]]] = {
    "decode": decode_cases,
    "prefill": prefill_cases,
    "product": product_cases,
    "gated": gated_cases,
    "stacked": stacked_cases,
    "experts": expert_cases,
    "small": small_cases,
}


def ops_of(name: str) -> tuple[str, ...]:
    """What there is to time at the sizes of the shape `name`."""
    return tuple(op for op in OPS if name in (EXPERTS if op == "experts" else SHAPES))


def kernel_rows(
    name: str, ops: Sequence[str] | None = None, *, is_tuning: bool = False, interpret: bool = False
) -> Iterator[Row]:
    """Times the kernels at the sizes of the shape `name`, one result after the other.

    Args:
      ops: names in `OPS`; None: those of the shape, `ops_of`.
      is_tuning: other tiles of the kernels of attention and of experts too, not only the chosen ones.
      interpret: tiny cases in Pallas's interpreter, to try this on a CPU.

    Raises:
      NotImplementedError: this machine has no GPU, and it is not to interpret.
    """
    if not interpret and jax.default_backend() != "gpu":
        raise NotImplementedError(
            "the kernels run on NVIDIA GPUs, and JAX sees none; --interpret tries tiny cases on a CPU"
        )
    limits = Limits.measure(is_tiny=interpret)
    for op in ops or ops_of(name):
        for case in OPS[op](name, is_tiny=interpret, is_tuning=is_tuning, interpret=interpret):
            row = {"shape": name, **case.row, "is_cold": case.is_cold and not interpret}
            yield limits.row(row, case.seconds, gb=case.gb, tflop=case.tflop)
