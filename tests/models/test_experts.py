"""Mixture of experts: who is chosen, with which weights, and the layer with and without kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.models.config import ExpertConfig
from pjengine.models.experts import experts_mlp, route
from pjengine.pallas_kernels.dispatch import chosen_backends
from pjengine.pallas_kernels.grouped_linear import ExpertWeights

CONFIG = ExpertConfig(num_experts=8, num_choices=3, inner_size=32)
HIDDEN = 64


def draw(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def make_weights() -> ExpertWeights:
    """Of two layers."""
    size = (2, CONFIG.num_experts)
    return ExpertWeights(
        draw(0, *size, HIDDEN, 2, CONFIG.inner_size) / 8, draw(1, *size, CONFIG.inner_size, HIDDEN) / 6
    )


def test_weights_of_the_chosen_are_a_softmax_over_them_or_over_all() -> None:
    logits = draw(0, 5, 8)
    everything = np.asarray(jax.nn.softmax(logits, axis=-1))
    wanted = -np.sort(-everything, axis=-1)[:, :3]
    chosen = route(ExpertConfig(num_experts=8, num_choices=3, inner_size=1, is_normalized=False), logits)
    np.testing.assert_array_equal(chosen.experts, np.argsort(-logits, axis=-1)[:, :3])
    np.testing.assert_allclose(chosen.weights, wanted, rtol=1e-5)
    normalized = route(CONFIG, logits)
    np.testing.assert_array_equal(normalized.experts, chosen.experts)
    np.testing.assert_allclose(normalized.weights, wanted / wanted.sum(axis=-1, keepdims=True), rtol=1e-5)


def test_of_equal_logits_the_first_are_chosen() -> None:
    routing = route(CONFIG, jnp.zeros((2, 8)))
    np.testing.assert_array_equal(routing.experts, [[0, 1, 2]] * 2)


def test_weights_are_float32_whatever_the_logits_are() -> None:
    assert route(CONFIG, draw(0, 2, 8).astype(jnp.bfloat16)).weights.dtype == jnp.float32


@pytest.mark.parametrize("backend", ["reference", "triton_interpret"])
def test_a_layer_of_all_is_the_layer_alone(backend: str) -> None:
    h, logits, weights = draw(2, 2, 5, HIDDEN), draw(3, 2, 5, 8), make_weights()
    out = experts_mlp(CONFIG, h, logits, weights, 1, backend=backend)
    assert chosen_backends()["routed_mlp"] == backend
    alone = experts_mlp(CONFIG, h, logits, jax.tree.map(lambda stack: stack[1], weights))
    assert chosen_backends()["routed_mlp"] == "reference"
    np.testing.assert_allclose(out, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "triton_interpret"])
def test_some_experts_add_what_they_add_to_the_whole(backend: str) -> None:
    """And read no token that was sent to others only."""
    h, logits, weights = draw(2, 6, HIDDEN), draw(3, 6, 8), make_weights()
    wanted = experts_mlp(CONFIG, h, logits, weights, 1, backend=backend)
    chosen, total, num_left_out = route(CONFIG, logits).experts, jnp.zeros_like(wanted), 0
    for first in (0, 2, 4, 6):
        own = jax.tree.map(lambda stack, first=first: stack[:, first : first + 2], weights)
        is_here = ((chosen >= first) & (chosen < first + 2)).any(axis=1, keepdims=True)
        num_left_out += int((~is_here).sum())
        rows = jnp.where(is_here, h, jnp.nan)
        out = experts_mlp(CONFIG, rows, logits, own, 1, first=first, backend=backend)
        assert not out[~is_here[:, 0]].any()
        total += out
    assert num_left_out > 3
    np.testing.assert_allclose(total, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "triton_interpret"])
def test_padding_gives_zeros_and_changes_nothing_else(backend: str) -> None:
    h, logits, weights = draw(2, 6, HIDDEN), draw(3, 6, 8), make_weights()
    is_token = jnp.arange(6) < 4
    padded = jnp.where(is_token[:, None], h, jnp.nan)
    out = experts_mlp(CONFIG, padded, logits, weights, 0, is_token=is_token, backend=backend)
    wanted = experts_mlp(CONFIG, h[:4], logits[:4], weights, 0, backend=backend)
    np.testing.assert_allclose(out[:4], wanted, rtol=1e-6, atol=1e-6)
    assert not out[4:].any()


def test_the_router_learns_and_so_do_the_experts_that_were_chosen() -> None:
    h, router = draw(2, 4, HIDDEN), draw(3, HIDDEN, 8) / 8
    own = jax.tree.map(lambda stack: stack[0], make_weights())

    def loss(router: jax.Array, own: ExpertWeights) -> jax.Array:
        return (experts_mlp(CONFIG, h, h @ router, own) ** 2).sum()

    of_router, of_experts = jax.grad(loss, argnums=(0, 1))(router, own)
    step = 1e-2 * of_router / jnp.linalg.norm(of_router)
    slope = (loss(router + step, own) - loss(router - step, own)) / 2
    np.testing.assert_allclose(slope, 1e-2 * jnp.linalg.norm(of_router), rtol=1e-2)
    chosen = np.isin(np.arange(8), route(CONFIG, h @ router).experts)
    np.testing.assert_array_equal(np.asarray(abs(of_experts.down).sum(axis=(1, 2)) > 0), chosen)


def test_a_kernel_without_the_weights_of_all_layers_is_refused() -> None:
    own = jax.tree.map(lambda stack: stack[0], make_weights())
    with pytest.raises(ValueError, match="'triton_interpret' needs the weights of all layers"):
        experts_mlp(CONFIG, draw(2, 4, HIDDEN), draw(3, 4, 8), own, backend="triton_interpret")


@pytest.mark.parametrize("num_choices", [0, 9])
def test_a_number_of_choices_that_cannot_be_is_refused(num_choices: int) -> None:
    with pytest.raises(ValueError, match=f"num_choices must be in 1..num_experts, 8; got {num_choices}"):
        ExpertConfig(num_experts=8, num_choices=num_choices, inner_size=1)
