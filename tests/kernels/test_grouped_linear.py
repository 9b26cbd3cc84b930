"""Gated MLPs of experts, against one product after the other in numpy."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pjengine.pallas_kernels.dispatch import chosen_backends
from pjengine.pallas_kernels.grouped_linear import (
    SILU,
    ExpertTiles,
    ExpertWeights,
    Gate,
    Plan,
    ProductTiles,
    Routing,
    max_blocks,
    plan_blocks,
    plan_triton,
    reference,
    routed_mlp,
    routed_triton,
)
from pjengine.pallas_kernels.shapes import EXPERTS
from tests.kernels.cases import INTERPRET, cuda_target

HIDDEN, INNER, LAYER = 64, 32, 1
CLAMPED = Gate(alpha=1.702, limit=0.5, up_offset=1.0)
TILES = ExpertTiles(
    block_m=16,
    gate_up=ProductTiles(block_n=16, block_k=32, num_stages=2),
    down=ProductTiles(block_n=32, block_k=16, num_stages=2, group_m=3),
)
NOWHERE = [-1, 8]
# Of each token and choice the expert; all of 40 tokens, so that most share one trace.
ROUTINGS: dict[str, list[list[int]]] = {
    name: [*routes, *[NOWHERE] * (40 - len(routes))]
    for name, routes in {
        "experts without tokens": [[1, 4]] * 5,
        "all to one expert": [[2, -1]] * 37,
        "a full block": [[0, 4]] * 16,
        "one more than a block": [[4, 1]] * 17,
        "twice to an expert": [[3, 3]] * 4,
        "no padding": [[i % 7, (i + 1) % 7] for i in range(40)],
        "far ids": [[1, 3], [0, 1], [3, 4], [2**30, -(2**30)]],
        "padding between": [[-1, -1], [1, 3], [-1, 2], [0, -1]],
        "only padding": [],
    }.items()
} | {
    "a token": [[3, 0]],
    "a token of one choice": [[2]],
    "a token that goes nowhere": [[-1, 9]],
}


def draw(seed: int, *shape: int, dtype: str = "bfloat16", scale: float = 1.0) -> jax.Array:
    return (scale * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)


def make_case(
    routes: Any, *, dtype: str = "bfloat16", has_biases: bool = False
) -> tuple[jax.Array, Routing, ExpertWeights]:
    """Whatever must not be read, or must not matter, is NaN: other layers, experts that nobody chose, tokens
    that go nowhere, and their router's weights."""
    ids, num_experts = np.asarray(routes, np.int32), 8
    is_pair = (ids >= 0) & (ids < num_experts)
    is_read = np.isin(np.arange(num_experts), ids)

    def stack(seed: int, *shape: int) -> jax.Array:
        drawn = draw(seed, num_experts, *shape, dtype=dtype, scale=shape[0] ** -0.5)
        poisoned = jnp.where(is_read.reshape(-1, *[1] * len(shape)), drawn, jnp.nan)
        return jnp.full((3, *drawn.shape), jnp.nan, dtype).at[LAYER].set(poisoned)

    x = jnp.where(is_pair.any(axis=1)[:, None], draw(0, len(ids), HIDDEN, dtype=dtype), jnp.nan)
    weights = jax.random.uniform(jax.random.key(1), ids.shape, minval=0.1)
    return (
        x,
        Routing(jnp.asarray(ids), jnp.where(is_pair, weights, jnp.nan)),
        ExpertWeights(
            stack(2, HIDDEN, 2, INNER),
            stack(3, INNER, HIDDEN),
            stack(4, 2, INNER) if has_biases else None,
            stack(5, HIDDEN) if has_biases else None,
        ),
    )


def wide(x: Any) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32), np.float64)


def expected(x: jax.Array, routing: Routing, weights: ExpertWeights, gate: Gate) -> np.ndarray:
    """Pair by pair."""
    out = np.zeros(x.shape)
    gate_up, down, *biases = (None if each is None else wide(each[LAYER]) for each in weights)
    assert gate_up is not None and down is not None
    for token, choice in np.ndindex(routing.experts.shape):
        expert = int(routing.experts[token, choice])
        if 0 <= expert < len(down):
            gates, ups = np.einsum("e,ehi->hi", wide(x[token]), gate_up[expert]) + (
                0 if biases[0] is None else biases[0][expert]
            )
            if gate.limit is not None:
                gates, ups = np.minimum(gates, gate.limit), np.clip(ups, -gate.limit, gate.limit)
            rows = (ups + gate.up_offset) * gates / (1 + np.exp(-gate.alpha * gates))
            rows = rows @ down[expert] + (0 if biases[1] is None else biases[1][expert])
            out[token] += float(routing.weights[token, choice]) * rows
    return out


def assert_close(out: jax.Array, wanted: np.ndarray) -> None:
    """The narrow dtypes round three times: what the gate gives, each pair's row, and their sum."""
    eps = float(jnp.finfo(out.dtype).eps)
    tolerance = 16 * eps if out.dtype == jnp.float32 else 4 * eps  # sums in another order, another exp
    np.testing.assert_allclose(wide(out), wanted, rtol=tolerance, atol=2 * tolerance)


@INTERPRET
@pytest.mark.parametrize("name", ROUTINGS)
def test_a_token_is_the_sum_of_its_experts_and_nothing_else_is_read(name: str, interpret: bool) -> None:
    x, routing, weights = make_case(ROUTINGS[name])
    out = routed_triton(x, routing, weights, jnp.int32(LAYER), tiles=TILES, interpret=interpret)
    assert out.dtype == x.dtype
    assert_close(out, expected(x, routing, weights, SILU))


@pytest.mark.parametrize("name", ROUTINGS)
def test_the_reference_is_the_sum_of_a_tokens_experts(name: str) -> None:
    x, routing, weights = make_case(ROUTINGS[name])
    assert_close(reference(x, routing, weights, LAYER), expected(x, routing, weights, SILU))


@pytest.mark.parametrize(
    "backend", ["reference", "triton_interpret", pytest.param("triton", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("gate", [SILU, CLAMPED], ids=["silu", "clamped"])
@pytest.mark.parametrize("has_biases", [False, True])
def test_biases_gates_and_dtypes(backend: str, dtype: str, gate: Gate, has_biases: bool) -> None:
    x, routing, weights = make_case(ROUTINGS["far ids"], dtype=dtype, has_biases=has_biases)
    out = routed_mlp(x, routing, weights, LAYER, gate=gate, backend=backend)
    assert out.dtype == dtype
    assert_close(out, expected(x, routing, weights, gate))
    assert chosen_backends()["routed_mlp"] == backend


@pytest.mark.parametrize("num_choices", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("backend", ["triton_interpret", pytest.param("triton", marks=pytest.mark.gpu)])
def test_any_number_of_choices(num_choices: int, backend: str) -> None:
    rng = np.random.default_rng(num_choices)
    routes = np.stack([rng.permutation(8)[:num_choices] for _ in range(20)])
    x, routing, weights = make_case(routes)
    out = routed_mlp(x, routing, weights, LAYER, backend=backend)
    assert_close(out, expected(x, routing, weights, SILU))


@pytest.mark.parametrize(
    ("name", "num_tokens", "backend"),
    [
        *(("demo", num_tokens, "triton_interpret") for num_tokens in (1, 37, 100)),
        *(
            pytest.param(name, num_tokens, "triton", marks=pytest.mark.gpu)
            for name in EXPERTS
            for num_tokens in (1, 37, 300, 3000)
        ),
    ],
)
def test_real_sizes_equal_the_reference_on_every_run(name: str, num_tokens: int, backend: str) -> None:
    shape = EXPERTS[name]
    logits = jax.random.normal(jax.random.key(0), (num_tokens, shape.num_experts))
    shares, experts = jax.lax.top_k(logits, shape.num_choices)
    size, scale = (1, shape.num_experts), shape.hidden**-0.5
    weights = ExpertWeights(
        draw(1, *size, shape.hidden, 2, shape.inner, scale=scale),
        draw(2, *size, shape.inner, shape.hidden, scale=shape.inner**-0.5),
        draw(3, *size, 2, shape.inner) if name == "gpt-oss-20b" else None,
        draw(4, *size, shape.hidden) if name == "gpt-oss-20b" else None,
    )
    x, routing = draw(5, num_tokens, shape.hidden), Routing(experts, jax.nn.softmax(shares))
    out = routed_mlp(x, routing, weights, 0, backend=backend)
    assert_close(out, wide(jax.jit(reference)(x, routing, weights, 0)))
    for _ in range(3):  # a race would move the result
        assert (routed_mlp(x, routing, weights, 0, backend=backend) == out).all()


@INTERPRET
def test_the_order_of_tokens_changes_no_bit(interpret: bool) -> None:
    rng = np.random.default_rng(0)
    x, routing, weights = make_case(rng.integers(-1, 8, (40, 3)))
    order = rng.permutation(40)
    run = jax.jit(
        lambda x, routing: routed_triton(
            x, routing, weights, jnp.int32(LAYER), tiles=TILES, interpret=interpret
        )
    )
    shuffled = run(x[order], jax.tree.map(lambda each: each[order], routing))
    np.testing.assert_array_equal(wide(shuffled), wide(run(x, routing))[order])


@INTERPRET
@pytest.mark.parametrize(("block_m", "group_m"), [(16, 2), (32, 8), (64, 1), (128, 2)])
def test_blocks_of_any_height_and_order(block_m: int, group_m: int, interpret: bool) -> None:
    routes = np.random.default_rng(1).integers(0, 5, (70, 2)) ** 2 % 8  # uneven; several blocks to an expert
    x, routing, weights = make_case(routes)
    tiles = replace(
        TILES,
        block_m=block_m,
        gate_up=replace(TILES.gate_up, group_m=group_m),
        down=replace(TILES.down, group_m=group_m),
    )
    out = routed_triton(x, routing, weights, jnp.int32(LAYER), tiles=tiles, interpret=interpret)
    assert_close(out, expected(x, routing, weights, SILU))


PLANS = [(1, 4, 8, 16), (2, 2, 64, 16), (5, 3, 1, 16), (33, 4, 3, 32), (64, 2, 64, 16), (300, 1, 5, 64)]
PLANNERS: dict[str, Callable[..., Plan]] = {
    "xla": jax.jit(plan_blocks, static_argnames=("num_experts", "block_m")),
    "triton_interpret": partial(plan_triton, interpret=True),
    "triton": plan_triton,
}


@pytest.mark.parametrize(
    "planner", ["xla", "triton_interpret", pytest.param("triton", marks=pytest.mark.gpu)]
)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_every_pair_is_in_one_block_of_its_expert(planner: str, data: st.DataObject) -> None:
    num_tokens, num_choices, num_experts, block_m = data.draw(st.sampled_from(PLANS))
    ids = st.lists(
        st.integers(-2, num_experts + 1), min_size=num_tokens * num_choices, max_size=num_tokens * num_choices
    )
    experts = np.asarray(data.draw(ids), np.int32)
    plan = PLANNERS[planner](
        jnp.asarray(experts.reshape(num_tokens, -1)), num_experts=num_experts, block_m=block_m
    )
    pairs, found = np.asarray(plan.pairs), []
    for expert, begin, count in np.asarray(plan.blocks).T:
        assert 0 <= expert < num_experts and 0 <= count <= block_m
        own = pairs[begin : begin + count]
        assert len(own) == count and (experts[own] == expert).all()
        found += list(own)
    assert sorted(found) == list(np.flatnonzero((experts >= 0) & (experts < num_experts)))


def test_the_worst_routing_fills_the_plan() -> None:
    routes = np.repeat(np.arange(4), [17, 17, 33, 1])  # each expert has one pair in a block of its own
    plan = plan_blocks(jnp.asarray(routes[:, None], jnp.int32), num_experts=4, block_m=16)
    assert plan.blocks.shape[1] == max_blocks(68, 4, 16) == 8
    assert (plan.blocks[2] > 0).all()


def test_few_tokens_read_no_more_than_the_experts_they_chose() -> None:
    experts = jnp.asarray([[5, 2], [2, 7]], jnp.int32)
    plan = plan_blocks(experts, num_experts=64, block_m=16)
    used = np.asarray(plan.blocks)[:, np.asarray(plan.blocks[2]) > 0]
    assert set(used[0]) == {2, 5, 7}
    assert used.shape[1] <= experts.size


def test_the_reference_has_derivatives_and_those_of_experts_that_nobody_chose_are_zero() -> None:
    routes = jnp.asarray([[1, 3], [3, 0]], jnp.int32)
    x, routing, weights = make_case(routes, dtype="float32")
    weights = jax.tree.map(jnp.nan_to_num, weights)

    def loss(x: jax.Array, shares: jax.Array, weights: ExpertWeights) -> jax.Array:
        return (reference(x, Routing(routes, shares), weights, LAYER) ** 2).sum()

    def dense(x: jax.Array, shares: jax.Array, weights: ExpertWeights) -> jax.Array:
        gate_up = jnp.einsum("te,tcehi->tchi", x, weights.gate_up[LAYER][routes], precision="highest")
        rows = jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]
        out = jnp.einsum("tci,tcie,tc->te", rows, weights.down[LAYER][routes], shares, precision="highest")
        return (out**2).sum()

    found = jax.grad(loss, argnums=(0, 1, 2))(x, routing.weights, weights)
    wanted = jax.grad(dense, argnums=(0, 1, 2))(x, routing.weights, weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, wanted)
    assert not found[2].down[LAYER, 2].any() and found[2].down[LAYER, 3].any()


@pytest.mark.parametrize(("num_routed", "block_m"), [(None, 64), (8, 64), (32, 16)])
def test_blocks_are_as_high_as_the_tokens_of_an_expert_of_all(num_routed: int | None, block_m: int) -> None:
    """Of 256 pairs a device with 8 of 32 experts has some 64: 8 for each, and not 32."""
    x, routing, weights = make_case(np.zeros((128, 2), np.int32))
    run = partial(routed_triton, num_routed=num_routed)
    plan = f"i32[3,{max_blocks(256, 8, block_m)}]"
    assert plan in str(jax.make_jaxpr(run)(x, routing, weights, jnp.int32(0)))


@pytest.mark.parametrize("name", EXPERTS)
def test_tiles_divide_the_sizes_of_real_models(name: str) -> None:
    shape = EXPERTS[name]
    for num_tokens in (1, 32, 256, 2048, 8192):
        tiles = ExpertTiles.choose(
            num_pairs=num_tokens * shape.num_choices,
            num_experts=shape.num_experts,
            hidden=shape.hidden,
            inner=shape.inner,
            itemsize=2,
        )
        assert tiles.block_m in (16, 32, 64, 128)
        assert min(tiles.gate_up.block_n, tiles.down.block_n, tiles.gate_up.block_k, tiles.down.block_k) >= 64


def call(x: Any, weights: ExpertWeights) -> Any:
    routing = Routing(jnp.zeros((len(x), 2), jnp.int32), jnp.ones((len(x), 2)))
    return routed_mlp(x, routing, weights, 0, backend="triton_interpret")


def empty_weights(hidden: int, inner: int, dtype: str, down_dtype: str | None = None) -> ExpertWeights:
    down = jnp.zeros((1, 4, inner, hidden), down_dtype or dtype)
    return ExpertWeights(jnp.zeros((1, 4, hidden, 2, inner), dtype), down)


def test_what_the_kernels_cannot_do_is_refused() -> None:
    x = draw(1, 2, 64)
    with pytest.raises(NotImplementedError, match="dtypes bfloat16, float16, float16: wanted"):
        call(x, empty_weights(64, 32, "float16"))
    with pytest.raises(NotImplementedError, match="dtypes bfloat16, bfloat16, float32: wanted"):
        call(x, empty_weights(64, 32, "bfloat16", "float32"))
    with pytest.raises(NotImplementedError, match=r"dtypes float8_e4m3fn, .*: wanted"):
        call(x.astype(jnp.float8_e4m3fn), empty_weights(64, 32, "float8_e4m3fn"))
    with pytest.raises(NotImplementedError, match="72 x 32 weights of experts: wanted multiples"):
        call(draw(1, 2, 72), empty_weights(72, 32, "bfloat16"))
    with pytest.raises(NotImplementedError, match="64 x 40 weights of experts: wanted multiples"):
        call(x, empty_weights(64, 40, "bfloat16"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_up": (3, 8, HIDDEN, 2, 48)}, "gate_up must have the shape"),
        ({"down": (3, 8, INNER, 48)}, "down must have the shape"),
        ({"gate_up_bias": (3, 8, INNER)}, "gate_up_bias must have the shape"),
        ({"down_bias": (3, 7, HIDDEN)}, "down_bias must have the shape"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(
    change: dict[str, tuple[int, ...]], message: str
) -> None:
    x, routing, weights = make_case([[1, 2]])
    changed = {name: jnp.zeros(shape, jnp.bfloat16) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        routed_mlp(x, routing, weights._replace(**changed), 0)


def test_a_routing_of_other_tokens_is_refused() -> None:
    x, routing, weights = make_case([[1, 2], [3, 4]])
    with pytest.raises(ValueError, match="the experts' ids must have the shape"):
        routed_mlp(x[:1], routing, weights, 0)
    with pytest.raises(ValueError, match="the router's weights must have the shape"):
        routed_mlp(x, routing._replace(weights=routing.weights[:, :1]), weights, 0)


@pytest.mark.parametrize(("num_tokens", "num_plans"), [(64, 1), (2000, 0)])
def test_a_gpu_runs_the_same_kernels_for_all_layers(num_tokens: int, num_plans: int) -> None:
    x, routing, weights = make_case(np.zeros((num_tokens, 2), np.int32))

    def two_layers(x: jax.Array, routing: Routing, weights: ExpertWeights) -> jax.Array:
        return routed_mlp(x, routing, weights, 0) + routed_mlp(x, routing, weights, 1)

    with cuda_target():
        text = jax.jit(two_layers).trace(x, routing, weights).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count('name = "grouped_linear"') == 2
    assert text.count('name = "plan_experts"') == num_plans
    assert chosen_backends()["routed_mlp"] == "triton"
