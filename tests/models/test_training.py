"""The model that serves also trains: derivatives, recomputed layers, logprobs a few positions at a time."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from pjengine.models import likelihood
from pjengine.models.decoder import Decoder
from pjengine.models.registry import build_model, parse_config
from pjengine.models.share import is_even
from tests.golden import golden as goldens
from tests.models.test_share import sharded

FLOAT32, FLOAT64 = jnp.dtype("float32"), jnp.dtype("float64")
NUM_DIRECTIONS = 2


def golden_model(name: str, dtype: jnp.dtype) -> Decoder:
    """Of two layers, which are one of each kind."""
    config = parse_config(goldens.load(name).config)
    return build_model(replace(config, num_layers=2, layer_windows=config.layer_windows[:2]), dtype)


def some_params(model: Decoder) -> Any:
    """Random parameters, norms and biases too; drawn by numpy, which compiles nothing."""
    rng, one = np.random.default_rng(7), 1 - model.config.norm_offset

    def draw(path: Any, leaf: Any) -> Any:
        mean = one if jax.tree_util.keystr(path).endswith("norm']") else 0
        return jnp.asarray(mean + 0.1 * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0)))


def some_tokens(model: Decoder, shape: tuple[int, ...] = (2, 20)) -> Any:
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, shape)
    return jnp.asarray(tokens, jnp.int32)


def mean_log_likelihood(model: Decoder, params: Any, tokens: Any) -> Any:
    logprobs = jax.nn.log_softmax(model.forward(params, tokens[:, :-1]))
    return jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1).mean()


@pytest.mark.parametrize(
    "name",
    [
        *("gqa", "gpt2", "bloom", "gemma2", "mixtral"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt_oss", "qwen3_moe", "mpt_qk_ln")),
    ],
)
def test_the_gradient_of_the_mean_log_likelihood_equals_finite_differences(name: str) -> None:
    """In float64, along random directions of each parameter by itself."""
    with jax.enable_x64(True):
        model = golden_model(name, FLOAT64)
        params, tokens = some_params(model), some_tokens(model)
        value_and_grad = jax.jit(jax.value_and_grad(lambda own: mean_log_likelihood(model, own, tokens)))
        leaves, tree = jax.tree.flatten(params)
        value, gradient = value_and_grad(params)
        assert value.dtype == FLOAT64 and value < -1
        rng, step = np.random.default_rng(1), 1e-5
        for index, slope in enumerate(jax.tree.leaves(gradient)):
            assert slope.dtype == FLOAT64
            for _ in range(NUM_DIRECTIONS):
                direction = rng.standard_normal(slope.shape)
                direction /= np.linalg.norm(direction)

                def at(distance: float, index: int = index, direction: Any = direction) -> float:
                    moved = [
                        leaf + distance * direction if i == index else leaf for i, leaf in enumerate(leaves)
                    ]
                    return float(value_and_grad(jax.tree.unflatten(tree, moved))[0])

                wanted = (at(step) - at(-step)) / (2 * step)
                found = float((np.asarray(slope) * direction).sum())
                scale = float(np.linalg.norm(slope)) / np.sqrt(
                    slope.size
                )  # what such a direction has on average
                assert abs(found - wanted) < 1e-6 * scale + 1e-9, (index, found, wanted)


@pytest.mark.parametrize("name", ["gqa", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_logprobs_and_recomputed_layers_are_those_of_forward(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihood, "ROWS", 16)  # 8 positions of each row, the last ones padded
    with jax.enable_x64(True):
        model = golden_model(name, FLOAT64)
        params, tokens = some_params(model), some_tokens(model)

        def mean_logprob(params: Any) -> Any:
            return model.logprobs(params, tokens, remat=True).mean()

        def plain(params: Any) -> Any:
            return mean_log_likelihood(model, params, tokens)

        found, wanted = (jax.jit(jax.value_and_grad(of))(params) for of in (mean_logprob, plain))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, wanted)


def kept_bytes(loss: Callable[[Any], Any], params: Any) -> int:
    """What a derivative keeps of the way there, beside the parameters."""
    kept = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept) if leaf.shape not in shapes)


def test_recomputed_layers_keep_what_goes_into_them_and_no_more() -> None:
    model = golden_model("gqa", FLOAT32)
    params, tokens = jax.eval_shape(model.init, jax.random.key(0)), some_tokens(model, (4, 128))
    c = model.config
    with_all = kept_bytes(lambda own: model.logprobs(own, tokens).sum(), params)
    with_few = kept_bytes(lambda own: model.logprobs(own, tokens, remat=True).sum(), params)
    # The hidden states between the layers, before the last norm and behind it; cosines, sines, positions.
    hidden = 4 * 127 * c.hidden_size * 4
    assert hidden * c.num_layers < with_few < hidden * (c.num_layers + 4)
    assert with_all > 20 * with_few


def test_the_logits_of_few_positions_exist_at_once() -> None:
    model = golden_model("gqa", FLOAT32)
    params, tokens = jax.eval_shape(model.init, jax.random.key(0)), some_tokens(model, (32, 128))
    program = jax.make_jaxpr(jax.grad(lambda own: model.logprobs(own, tokens).sum()))(params)
    text = str(program)
    assert f"f32[32,32,{model.config.vocab_size}]" in text
    assert f"127,{model.config.vocab_size}]" not in text and f"128,{model.config.vocab_size}]" not in text


def test_what_many_positions_add_to_a_parameter_is_rounded_once() -> None:
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(
        1 + rng.standard_normal((1024, 96, 4)), jnp.bfloat16
    )  # one position of each row at a time
    chosen = jnp.asarray(rng.integers(0, 9, (1024, 96)), jnp.int32)
    table = jnp.asarray(rng.standard_normal((4, 9)), jnp.bfloat16)

    def loss(table: Any, hidden: Any) -> Any:
        def unembed(table: Any, hidden: Any) -> Any:
            return jnp.einsum("bte,ev->btv", hidden, table, preferred_element_type=jnp.float32)

        return likelihood.chosen_logprobs(unembed, table, hidden, chosen, temperature=1.0).sum()

    found = np.asarray(jax.jit(jax.grad(loss))(table, hidden), np.float32)
    wanted = np.asarray(jax.jit(jax.grad(loss))(table.astype(jnp.float32), hidden.astype(jnp.float32)))
    assert np.abs(found - wanted).max() < 2**-8 * np.abs(wanted).max()


def test_no_token_sees_the_padding_behind_it() -> None:
    model = golden_model("gemma2", FLOAT32)
    params, tokens = some_params(model), some_tokens(model)
    padded = tokens.at[0, 12:].set(model.config.vocab_size - 1)
    logprobs = jax.jit(model.logprobs)
    found, wanted = logprobs(params, padded), logprobs(params, tokens)
    np.testing.assert_array_equal(found[0, :11], wanted[0, :11])
    np.testing.assert_array_equal(found[1], wanted[1])
    assert np.abs(found[0, 11:] - wanted[0, 11:]).min() > 0


def test_a_temperature_divides_the_logits() -> None:
    model = golden_model("gqa", FLOAT32)
    params, tokens = some_params(model), some_tokens(model)
    hot = jax.nn.log_softmax(jax.jit(model.forward)(params, tokens)[:, :-1] / 2.5)
    wanted = jnp.take_along_axis(hot, tokens[:, 1:, None], axis=-1)[..., 0]
    found = jax.jit(partial(model.logprobs, temperature=2.5))(params, tokens)
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_what_is_not_possible_is_refused() -> None:
    model = golden_model("gpt2", FLOAT32)
    params = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(ValueError, match="has 96 positions, got 97 tokens"):
        model.forward(params, jnp.zeros((1, 97), jnp.int32))
    with pytest.raises(ValueError, match="at least two tokens in a row"):
        model.logprobs(params, jnp.zeros((3, 1), jnp.int32))
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        model.logprobs(params, jnp.zeros((1, 4), jnp.int32), temperature=0)
    jaxtyping.config.update("jaxtyping_disable", True)  # which users have not, and finds it first
    try:
        with pytest.raises(ValueError, match=r"prompt_lens must have the shape \(1,\), got \(2,\)"):
            model.forward(params, jnp.zeros((1, 4), jnp.int32), prompt_lens=jnp.zeros(2, jnp.int32))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("name", "has_whole_experts"), [("gqa", False), pytest.param("mixtral", True, marks=pytest.mark.slow)]
)
def test_divided_parameters_have_the_same_derivatives(
    name: str, has_whole_experts: bool, tmp_path: Path
) -> None:
    golden, found = goldens.load(name), []
    for num_devices in (1, 2):
        is_whole = has_whole_experts and num_devices > 1
        model, params, _ = sharded(golden, tmp_path, num_devices, has_whole_experts=is_whole)
        tokens = some_tokens(model)

        def loss(params: Any, model: Decoder = model, tokens: Any = tokens) -> Any:
            return model.logprobs(params, tokens, remat=True).mean()

        found.append(jax.jit(jax.value_and_grad(loss))(params))
    for one, two in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(two, one, atol=1e-5 * np.abs(one).max() + 1e-8)
    gradient = found[1][1]["layers"]["qkv"]
    assert {shard.data.shape[2] for shard in gradient.addressable_shards} == {model.config.num_kv_heads // 2}


def test_parameters_that_are_padded_or_repeated_do_not_train() -> None:
    config = parse_config(goldens.load("gqa").config)  # of 2 KV heads
    model = build_model(config, FLOAT32, 4)
    assert not is_even(config, 4) and is_even(config, 2)
    params = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(NotImplementedError, match=r"that 4 divides.*another tensor_parallel_size"):
        model.forward(params, jnp.zeros((1, 4), jnp.int32))
