"""Mixture of experts: a router sends each token to a few of a layer's many gated MLPs."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pjengine.models.config import ExpertConfig
from pjengine.pallas_kernels.grouped_linear import ExpertWeights, Gate, Routing, routed_mlp
from pjengine.pallas_kernels.precision import widened


def route(
    config: ExpertConfig, logits: Float[Array, "t experts"], is_token: Bool[Array, " t"] | None = None
) -> Routing:
    """The experts with a token's largest logits, of equal ones the first, and their weights in float32.

    Tokens that are none, the padding of a step, go nowhere, which -1 stands for.
    """
    top, experts = lax.top_k(widened(logits), config.num_choices)
    if config.is_normalized:
        weights = jax.nn.softmax(top, axis=-1)
    else:
        total = jax.nn.logsumexp(widened(logits), axis=-1, keepdims=True)
        weights = jnp.exp(top - total)
    if is_token is not None:
        experts = jnp.where(is_token[:, None], experts, -1)
    return Routing(experts, weights)


def experts_mlp(
    config: ExpertConfig,
    h: Float[Array, "*t e"],
    logits: Float[Array, "*t experts"],
    weights: ExpertWeights,
    layer: int | None = None,
    *,
    first: int | Int[Array, ""] = 0,
    is_token: Bool[Array, "*t"] | None = None,
    backend: str | None = None,
) -> Float[Array, "*t e"]:
    """Each token's sum over its experts; `logits` are what the layer's router makes of `h`.

    Args:
      weights: of all layers, of which `layer` is read in place; or, with `layer` None, of one layer, without
        the axis for layers: then the reference computes each expert with all tokens, and has a derivative,
        as training needs it.
      first: the number of the first expert that `weights` has. They may be fewer than the model has: a
        token's sum is over those of its experts that are there.
      is_token: what is false is padding, and costs nothing. None: all are tokens.
      backend: as in `routed_mlp`; with one layer only, None or "reference".

    Raises:
      ValueError: a backend with one layer only.
      NotImplementedError: `backend` is named and cannot do these shapes or dtypes.
    """
    if layer is None:
        if backend not in (None, "reference"):
            raise ValueError(f"backend {backend!r} needs the weights of all layers, and which layer to read")
        weights, layer, backend = jax.tree.map(lambda own: own[None], weights), 0, "reference"
    rows = h.reshape(-1, h.shape[-1])
    routing = route(
        config,
        logits.reshape(len(rows), config.num_experts),
        None if is_token is None else is_token.reshape(-1),
    )
    gate = Gate(alpha=config.gate_alpha, limit=config.gate_limit, up_offset=config.up_offset)
    routing = routing._replace(experts=routing.experts - first)
    out = routed_mlp(rows, routing, weights, layer, num_routed=config.num_experts, gate=gate, backend=backend)
    return out.reshape(h.shape)
