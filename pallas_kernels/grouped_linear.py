"""Gated MLPs of experts: each token's rows times the weights of the experts that it was routed to.

A *pair* is a token and one of its choices. The pairs are sorted by expert and cut into blocks of one expert
each, so that a block's rows share its weights, which are read where they lie in the stack of all layers; no
weight of an expert that nobody chose is read. Two kernels: gate and up with the activation, a row for each
pair; then down, times the router's weight. XLA adds up each token's pairs.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pjengine.pallas_kernels.dispatch import dispatch
from pjengine.pallas_kernels.precision import wide_dtype

MAX_PLANNED = 2048  # pairs that one kernel plans


class Routing(NamedTuple):
    """Where a router sends its tokens."""

    # An id that no expert has stands for nothing, as those of padding do, and costs nothing.
    experts: Int[Array, "t c"]
    weights: Float[Array, "t c"]


class ExpertWeights(NamedTuple):
    """Of the gated MLPs of all layers and experts; of `gate_up`, the first half are the gates."""

    gate_up: Float[Array, "layers experts e 2 i"]
    down: Float[Array, "layers experts i e"]
    gate_up_bias: Float[Array, "layers experts 2 i"] | None = None
    down_bias: Float[Array, "layers experts e"] | None = None


@dataclass(frozen=True, kw_only=True)
class Gate:
    """`(up + up_offset) * gate * sigmoid(alpha * gate)`: by default `silu(gate) * up`."""

    alpha: float = 1.0
    limit: float | None = None  # gates are cut off above it, ups above it and below -limit
    up_offset: float = 0.0

    def __call__(self, gate: Array, up: Array) -> Array:
        if self.limit is not None:
            gate, up = jnp.minimum(gate, self.limit), jnp.maximum(jnp.minimum(up, self.limit), -self.limit)
        return (up + self.up_offset) * gate * jax.nn.sigmoid(self.alpha * gate)


SILU = Gate()


def routed_mlp(
    x: Float[Array, "t e"],
    routing: Routing,
    weights: ExpertWeights,
    layer: int | Int[Array, ""],
    *,
    num_routed: int | None = None,
    gate: Gate = SILU,
    backend: str | None = None,
) -> Float[Array, "t e"]:
    """The sum over each token's experts of the router's weight times the expert's gated MLP of the token.

    An expert computes `gate(x @ gate_up + gate_up_bias) @ down + down_bias`. Sums are float32, but for the
    rounding of what `gate` gives to x's dtype. A token without experts gives zeros. Equivalent to
    `reference`, which has a derivative; the kernels have none. Aliases nothing.

    Args:
      routing: of each token the ids of its experts and their weights.
      weights: of all layers; no other layer than `layer` is read, and no expert that nobody chose.
      num_routed: experts that the router chooses from, where `weights` has some of them only. Ids count from
        the first that is there.
      gate: what an expert does to its gates and ups.
      backend: None to let `dispatch` choose.

    Raises:
      ValueError: shapes that do not belong together, or no such backend.
      NotImplementedError: `backend` is named and cannot do these shapes or dtypes.
    Source: Gale et al. 2022 (MegaBlocks), with blocks of pairs in place of a sparse matrix.
    """
    check_shapes(x, routing, weights)
    args = (x, routing, weights, jnp.asarray(layer, jnp.int32))
    run = functools.partial(routed_triton, num_routed=num_routed, gate=gate)
    return dispatch(
        "routed_mlp",
        {
            "triton": functools.partial(run, *args),
            "reference": functools.partial(reference, x, routing, weights, layer, gate=gate),
            "triton_interpret": functools.partial(run, *args, interpret=True),
        },
        backend,
    )


def check_shapes(x: Array, routing: Routing, weights: ExpertWeights) -> None:
    """Refuses shapes that do not belong together.

    Raises:
      ValueError: they do not.
    """
    num_tokens, hidden = x.shape
    layers, experts, inner = weights.down.shape[:3]
    wanted = {
        "gate_up": (weights.gate_up, (layers, experts, hidden, 2, inner)),
        "down": (weights.down, (layers, experts, inner, hidden)),
        "gate_up_bias": (weights.gate_up_bias, (layers, experts, 2, inner)),
        "down_bias": (weights.down_bias, (layers, experts, hidden)),
        "the experts' ids": (routing.experts, (num_tokens, routing.experts.shape[1])),
        "the router's weights": (routing.weights, (num_tokens, routing.experts.shape[1])),
    }
    for name, (array, shape) in wanted.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} must have the shape {shape} with x {x.shape}; got {array.shape}")


def reference(
    x: Float[Array, "t e"],
    routing: Routing,
    weights: ExpertWeights,
    layer: int | Int[Array, ""],
    *,
    gate: Gate = SILU,
) -> Float[Array, "t e"]:
    """The spec: expert after expert, each with all tokens; those that nobody chose are passed over."""
    dtype = wide_dtype(x.dtype)

    def dot(rows: Array, matrix: Array, bias: Array | None) -> Array:
        out = jnp.dot(rows, matrix, precision=lax.Precision.HIGHEST, preferred_element_type=dtype)
        return out if bias is None else out + bias.astype(dtype)[None]

    def add_expert(total: Array, expert: tuple[Array, ExpertWeights]) -> tuple[Array, None]:
        number, own = expert
        is_choice = routing.experts == number

        def add(total: Array) -> Array:
            bias = None if own.gate_up_bias is None else own.gate_up_bias.reshape(-1)
            gates, ups = jnp.split(dot(x, own.gate_up.reshape(x.shape[1], -1), bias), 2, axis=1)
            out = dot(gate(gates, ups).astype(x.dtype), own.down, own.down_bias)
            share = jnp.where(is_choice, routing.weights.astype(dtype), 0.0).sum(axis=1)
            # Not a product with 0: a row that means nothing may hold anything.
            return total + jnp.where(is_choice.any(axis=1)[:, None], share[:, None] * out, 0.0)

        return lax.cond(is_choice.any(), add, lambda total: total, total), None

    of_layer = jax.tree.map(lambda stack: stack[layer], weights)
    numbers = jnp.arange(weights.down.shape[1], dtype=jnp.int32)
    total, _ = lax.scan(add_expert, jnp.zeros(x.shape, dtype), (numbers, of_layer))
    return total.astype(x.dtype)


class Plan(NamedTuple):
    """Which rows are multiplied with which expert."""

    pairs: Int[Array, " p"]  # token * choices + choice, sorted by expert
    # Of each block its expert, where in `pairs` it begins, and how many there are its own: 0 if it is unused.
    blocks: Int[Array, "3 b"]


def plan_blocks(experts: Int[Array, "t c"], *, num_experts: int, block_m: int) -> Plan:
    """Sorts the pairs by expert, and cuts each expert's into blocks of at most `block_m`.

    There are as many blocks as the worst routing takes. `plan_triton` does the same for few pairs.
    """
    ids, num_pairs = experts.reshape(-1).astype(jnp.int32), experts.size
    is_pair = (ids >= 0) & (ids < num_experts)
    pair = jnp.arange(num_pairs, dtype=jnp.int32)
    # One number for both keeps the order within an expert, and is sorted faster than two.
    keys = jnp.sort(jnp.where(is_pair, ids, num_experts) * num_pairs + pair)
    number = jnp.arange(num_experts, dtype=jnp.int32)
    edges = jnp.arange(num_experts + 1, dtype=jnp.int32) * num_pairs
    begins = jnp.searchsorted(keys, edges, method="scan_unrolled").astype(jnp.int32)
    counts = jnp.diff(begins)
    heights = (counts + block_m - 1) // block_m
    ends = jnp.where(number[None, :] <= number[:, None], heights[None, :], 0).sum(axis=1)  # one kernel
    block = jnp.arange(max_blocks(num_pairs, num_experts, block_m), dtype=jnp.int32)
    expert = (ends[None, :] <= block[:, None]).sum(axis=1, dtype=jnp.int32)
    is_used, expert = expert < num_experts, jnp.minimum(expert, num_experts - 1)
    before = (block - ends[expert] + heights[expert]) * block_m
    rows = jnp.where(is_used, jnp.minimum(counts[expert] - before, block_m), 0)
    return Plan(keys % num_pairs, jnp.stack([expert, begins[expert] + before, rows]))


@functools.partial(jax.jit, static_argnames=("num_experts", "block_m", "interpret"))
def plan_triton(
    experts: Int[Array, "t c"], *, num_experts: int, block_m: int, interpret: bool = False
) -> Plan:
    """As `plan_blocks`, in one kernel and not in ten: in a decode step that counts.

    Each program counts all pairs, which is too slow for many. Of `pairs`, what no block has is left as it is.
    """
    num_pairs, width = experts.size, pl.next_power_of_2(num_experts)
    num_rows = min(128, max(16, pl.next_power_of_2(num_pairs)), max(16, (1 << 15) // width))
    num_programs = pl.cdiv(num_pairs, num_rows)
    num_blocks = max_blocks(num_pairs, num_experts, block_m)
    kernel = functools.partial(
        _plan_kernel, num_rows=num_rows, width=width, num_experts=num_experts, block_m=block_m
    )
    shapes = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((num_pairs,), (3, num_blocks))]
    plan = pl.pallas_call(
        kernel,
        grid=(num_programs,),
        out_shape=shapes,
        compiler_params=plt.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name="plan_experts",
    )(experts.reshape(-1).astype(jnp.int32))
    return Plan(*plan)


def _plan_kernel(
    experts_ref: Any,  # [p]
    pairs_ref: Any,  # [p]
    blocks_ref: Any,  # [3, b]
    *,
    num_rows: int,  # pairs that a program puts in their places
    width: int,  # experts, up to a power of 2
    num_experts: int,
    block_m: int,
) -> None:
    num_pairs, num_blocks = experts_ref.shape[0], blocks_ref.shape[1]
    num_programs = pl.cdiv(num_pairs, num_rows)
    program, row, number = pl.program_id(0), jnp.arange(num_rows), jnp.arange(width)

    def load(part: Any) -> Any:
        """Ids of some pairs, -1 for nothing."""
        pair = part * num_rows + row
        ids = plt.load(experts_ref.at[pair], mask=pair < num_pairs, other=-1)
        return jnp.where((ids >= 0) & (ids < num_experts), ids, -1)

    def count(part: Any, sums: tuple[Any, Any]) -> tuple[Any, Any]:
        counts = (load(part)[:, None] == number[None, :]).astype(jnp.int32).sum(axis=0)
        return sums[0] + counts, sums[1] + jnp.where(part < program, counts, 0)

    def pick(is_it: Any, of_experts: Any) -> Any:
        """Of [width], that of each row's expert."""
        return jnp.where(is_it, of_experts[None, :], 0).sum(axis=1)

    zeros = jnp.zeros((width,), jnp.int32)
    counts, before = lax.fori_loop(0, num_programs, count, (zeros, zeros))
    begins = jnp.cumsum(counts) - counts

    ids = load(program)
    is_earlier = (ids[:, None] == ids[None, :]) & (row[None, :] < row[:, None])
    place = pick(ids[:, None] == number[None, :], begins + before) + is_earlier.astype(jnp.int32).sum(axis=1)
    place = jnp.where(ids >= 0, place, num_pairs)
    plt.store(pairs_ref.at[place], program * num_rows + row, mask=ids >= 0)

    heights = lax.div(counts + (block_m - 1), block_m)
    ends = jnp.cumsum(heights)
    share = pl.next_power_of_2(pl.cdiv(num_blocks, num_programs))
    block = program * share + jnp.arange(share)
    expert = (ends[None, :] <= block[:, None]).astype(jnp.int32).sum(axis=1)
    is_it = expert[:, None] == number[None, :]
    done = (block - pick(is_it, ends - heights)) * block_m
    rows = jnp.where(expert < num_experts, jnp.minimum(pick(is_it, counts) - done, block_m), 0)
    fields = (jnp.minimum(expert, num_experts - 1), pick(is_it, begins) + done, rows)
    for i, values in enumerate(fields):
        plt.store(blocks_ref.at[i, block], values, mask=block < num_blocks)


def max_blocks(num_pairs: int, num_experts: int, block_m: int) -> int:
    """How many blocks any routing of so many pairs fits in: one pair of each expert may be left over."""
    return (num_pairs + min(num_pairs, num_experts) * (block_m - 1)) // block_m


@dataclass(frozen=True, kw_only=True)
class ProductTiles:
    """How one of the two products is cut: every field is a static choice, one compiled kernel each."""

    block_n: int  # columns of a program; of gate and up, of each half
    block_k: int  # rows of the weights in one step of the loop
    num_warps: int = 4
    num_stages: int = 4  # steps of the loop that are in flight, and one
    group_m: int = 1  # blocks of rows that are made before the next columns

    def check(self, *, k: int, n: int) -> None:
        """Refuses sizes that these tiles do not divide.

        Raises:
          NotImplementedError: they do not.
        """
        if k % self.block_k or n % self.block_n:
            raise NotImplementedError(f"{k} x {n} weights of experts: wanted multiples of {self}")


def _dividing(size: int, largest: int) -> int:
    """The largest power of 2 that divides `size`, up to `largest`; 16, which may not divide it, at least."""
    return max(16, min(size & -size, largest))


@dataclass(frozen=True, kw_only=True)
class ExpertTiles:
    """How both products are cut."""

    block_m: int  # rows of a block, of one expert
    gate_up: ProductTiles = field(default_factory=lambda: ProductTiles(block_n=64, block_k=64))
    down: ProductTiles = field(default_factory=lambda: ProductTiles(block_n=64, block_k=64))

    @classmethod
    def choose(
        cls,
        *,
        num_pairs: int,
        num_experts: int,
        hidden: int,
        inner: int,
        itemsize: int,
        has_biases: bool = False,
    ) -> "ExpertTiles":
        """Picks tiles for so many pairs, each of a row of `hidden` that becomes one of `inner`, and back.

        By what fits in registers and shared memory of an H200, and not by measurement.

        Raises:
          NotImplementedError: hidden or inner is no multiple of a block.
        """
        rows = num_pairs / num_experts
        if itemsize == 4:  # float32 has no tensor cores: for comparisons
            block_m = 16 if rows <= 16 else 32
            up = {"block_n": 32, "block_k": 32, "num_stages": 3}
            down = {**up, "block_n": 64}
        elif rows <= 24:  # the weights' bytes are what counts
            block_m = 16 if rows <= 10 else 32
            up = {"block_n": 64, "block_k": 64, "num_stages": 5}
            down = {"block_n": 64, "block_k": 128, "num_stages": 4}
        elif rows <= 192:
            block_m = 64
            up = {"block_n": 64, "block_k": 64, "num_stages": 4, "group_m": 8}
            down = {"block_n": 128, "block_k": 64, "num_stages": 4, "group_m": 8}
        else:
            block_m = 128
            down = {"block_n": 256, "block_k": 64, "num_warps": 8, "num_stages": 4, "group_m": 8}
            up = {**down, "block_n": 64 if has_biases else 128}  # else a few registers would spill

        def fitted(k: int, n: int, tiles: dict[str, int]) -> ProductTiles:
            divided = {"block_n": _dividing(n, tiles["block_n"]), "block_k": _dividing(k, tiles["block_k"])}
            return ProductTiles(**{**tiles, **divided})

        chosen = cls(block_m=block_m, gate_up=fitted(hidden, inner, up), down=fitted(inner, hidden, down))
        chosen.check(hidden=hidden, inner=inner)
        return chosen

    def check(self, *, hidden: int, inner: int) -> None:
        """As `ProductTiles.check`, of both products."""
        self.gate_up.check(k=hidden, n=inner)
        self.down.check(k=inner, n=hidden)


def check_kernel_can(x: Array, weights: ExpertWeights, tiles: ExpertTiles) -> None:
    """Refuses what the kernels do not do.

    Raises:
      NotImplementedError: mixed dtypes, dtypes other than bfloat16, float16 and float32, sizes that are no
        multiples of the tiles.
    """
    dtypes = (x.dtype, weights.gate_up.dtype, weights.down.dtype)
    if len(set(dtypes)) > 1 or x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        found = ", ".join(map(str, dtypes))
        raise NotImplementedError(f"dtypes {found}: wanted bfloat16, float16 or float32 for all")
    tiles.check(hidden=weights.down.shape[3], inner=weights.down.shape[2])


@functools.partial(jax.jit, static_argnames=("num_routed", "gate", "tiles", "interpret"))
def routed_triton(
    x: Float[Array, "t e"],
    routing: Routing,
    weights: ExpertWeights,
    layer: Int[Array, ""],
    *,
    num_routed: int | None = None,
    gate: Gate = SILU,
    tiles: ExpertTiles | None = None,
    interpret: bool = False,
) -> Float[Array, "t e"]:
    """One program per block of a plan and block of columns, of each product.

    The jit is there so that the layers of a model share one trace: the layer is an operand, so the compiled
    kernels are shared too.

    Args:
      num_routed: as of `routed_mlp`: tiles are chosen for as many pairs as an expert can expect.

    Raises:
      NotImplementedError: see `check_kernel_can`.
    """
    num_tokens, hidden = x.shape
    layers, num_experts, inner = weights.down.shape[:3]
    num_choices = routing.experts.shape[1]
    tiles = tiles or ExpertTiles.choose(
        num_pairs=num_tokens * num_choices,
        num_experts=num_routed or num_experts,
        hidden=hidden,
        inner=inner,
        itemsize=x.dtype.itemsize,
        has_biases=weights.gate_up_bias is not None,
    )
    check_kernel_can(x, weights, tiles)
    make_plan: Callable[..., Plan] = plan_blocks
    if routing.experts.size <= MAX_PLANNED:
        make_plan = functools.partial(plan_triton, interpret=interpret)
    plan = make_plan(routing.experts, num_experts=num_experts, block_m=tiles.block_m)
    multiply = functools.partial(
        _multiply, plan=plan, layer=layer, block_m=tiles.block_m, interpret=interpret
    )
    # The two halves side by side: the same bytes.
    both = weights.gate_up.reshape(layers, num_experts, hidden, 2 * inner)
    biases = weights.gate_up_bias
    if biases is not None:
        biases = biases.reshape(layers, num_experts, 2 * inner)
    rows = multiply(x, both, biases, tiles=tiles.gate_up, gate=gate, num_choices=num_choices)
    scales = routing.weights.astype(jnp.float32).reshape(-1)
    rows = multiply(rows, weights.down, weights.down_bias, scales, tiles=tiles.down)
    # What stands for nothing was not written.
    is_pair = (routing.experts >= 0) & (routing.experts < num_experts)
    pairs = rows.reshape(num_tokens, num_choices, hidden).astype(jnp.float32)
    return jnp.where(is_pair[:, :, None], pairs, 0.0).sum(axis=1).astype(x.dtype)


def _multiply(
    x: Float[Array, "rows k"],
    weights: Float[Array, "layers experts k n"],
    biases: Float[Array, "layers experts n"] | None,
    scales: Float[Array, " p"] | None = None,
    *,
    plan: Plan,
    layer: Int[Array, ""],
    block_m: int,
    tiles: ProductTiles,
    interpret: bool,
    gate: Gate | None = None,
    num_choices: int = 1,
) -> Float[Array, "p columns"]:
    """Row `pair // num_choices` of x times its expert's weights, for each pair of the plan.

    With a gate there are half as many columns. Rows of pairs that are in no block are left as they are.
    """
    n = weights.shape[3] // (1 if gate is None else 2)
    return pl.pallas_call(
        functools.partial(
            _kernel,
            block_m=block_m,
            tiles=tiles,
            gate=gate,
            num_choices=num_choices,
            num_experts=weights.shape[1],
        ),
        grid=(plan.blocks.shape[1] * (n // tiles.block_n),),
        out_shape=jax.ShapeDtypeStruct((len(plan.pairs), n), x.dtype),
        compiler_params=plt.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        interpret=interpret,
        name="grouped_linear",
    )(
        layer[None],
        plan.pairs,
        plan.blocks,
        x,
        weights.reshape(-1, tiles.block_k, weights.shape[3]),
        biases,
        scales,
    )


def _kernel(
    layer_ref: Any,  # [1]
    pairs_ref: Any,  # [p]
    blocks_ref: Any,  # [3, b]
    x_ref: Any,  # [rows, k]
    weights_ref: Any,  # [all steps of all experts, block_k, n], or twice the columns with a gate
    biases_ref: Any,  # [layers, experts, n or 2 n] or None
    scales_ref: Any,  # [p] or None
    out_ref: Any,  # [p, n]
    *,
    block_m: int,
    tiles: ProductTiles,
    gate: Gate | None,
    num_choices: int,
    num_experts: int,
) -> None:
    num_blocks, k, n = blocks_ref.shape[1], x_ref.shape[1], out_ref.shape[1]
    block, columns = _block_of(pl.program_id(0), num_blocks, n // tiles.block_n, tiles.group_m)
    layer, (expert, begin, count) = layer_ref[0], (blocks_ref[i, block] for i in range(3))
    row, column = jnp.arange(block_m), columns * tiles.block_n + jnp.arange(tiles.block_n)
    is_row = row < count
    # Where there is none, a pair that does not exist: the interpreter writes back what it finds there.
    pair = plt.load(pairs_ref.at[begin + row], mask=is_row, other=out_ref.shape[0])
    x_row, mask = lax.div(pair, num_choices)[:, None], is_row[:, None]
    num_steps, step = k // tiles.block_k, jnp.arange(tiles.block_k)
    first = (layer * num_experts + expert) * num_steps
    halves = tuple(column + part * n for part in range(1 if gate is None else 2))

    def body(i: Any, sums: tuple[Any, ...]) -> tuple[Any, ...]:
        x = plt.load(x_ref.at[x_row, i * tiles.block_k + step[None, :]], mask=mask, other=0.0)

        def add(half: Any, sum_: Any) -> Any:
            w = plt.load(weights_ref.at[first + i, step[:, None], half[None, :]])
            precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
            return sum_ + jnp.dot(x, w, precision=precision, preferred_element_type=jnp.float32)

        return tuple(add(half, sum_) for half, sum_ in zip(halves, sums, strict=True))

    zeros = jnp.zeros((block_m, tiles.block_n), jnp.float32)
    sums = lax.fori_loop(0, jnp.minimum(count, 1) * num_steps, body, (zeros,) * len(halves))
    if biases_ref is not None:
        loads = [plt.load(biases_ref.at[layer, expert, half]) for half in halves]
        sums = tuple(sum_ + load.astype(jnp.float32)[None, :] for sum_, load in zip(sums, loads, strict=True))
    out = sums[0] if gate is None else gate(*sums)
    if scales_ref is not None:
        out = out * plt.load(scales_ref.at[pair], mask=is_row, other=0.0)[:, None]
    plt.store(out_ref.at[pair[:, None], column[None, :]], out.astype(out_ref.dtype), mask=mask)


def _block_of(program: Any, num_blocks: int, num_columns: int, group_m: int) -> tuple[Any, Any]:
    """Which block of rows and of columns a program makes.

    Programs that run together share rows of x and columns of the weights: those of `group_m` blocks go
    through all columns before the next group.
    """
    group = lax.div(program, group_m * num_columns)
    within = lax.rem(program, group_m * num_columns)
    height = jnp.minimum(num_blocks - group * group_m, group_m)
    return group * group_m + lax.rem(within, height), lax.div(within, height)
