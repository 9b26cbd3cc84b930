"""A model divided among devices: heads, the inner columns of MLPs or whole experts, and the vocabulary.

Each device computes with its own part of these, and what a part adds to the residual stream is summed over
the devices. Where a number does not divide, it is padded with parameters that are zero, and so add nothing;
where there are fewer KV heads than devices, they are repeated, each for its part of the queries.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pjengine.models.config import ExpertConfig, ModelConfig, Share
from pjengine.models.state import KVCache
from pjengine.pallas_kernels.peer_sum import peer_sum
from pjengine.sharding.mesh import TENSOR

NOBODY = -1  # in place of a head's number: padding


class Heads(NamedTuple):
    """Which of a model's heads stand where once they are divided."""

    queries: Int[np.ndarray, "kv_heads group"]
    keys: Int[np.ndarray, " kv_heads"]


def divide_heads(num_heads: int, num_kv_heads: int, num_devices: int) -> Heads:
    """Heads in an order of which each device takes an equal part, KV heads with their queries."""
    group = num_heads // num_kv_heads
    repeats = num_devices // num_kv_heads if num_devices % num_kv_heads == 0 else 1
    width = -(-group // repeats)
    num_keys = -(-num_kv_heads * repeats // num_devices) * num_devices
    keys = np.full(num_keys, NOBODY)
    queries = np.full((num_keys, width), NOBODY)
    for place in range(num_kv_heads * repeats):
        keys[place], part = divmod(place, repeats)
        own = np.arange(part * width, min((part + 1) * width, group))
        queries[place, : len(own)] = keys[place] * group + own
    return Heads(queries, keys)


def padded(config: ModelConfig, num_devices: int) -> ModelConfig:
    """The same model with sizes that divide: of the parameters of all devices together."""
    if num_devices == 1:
        return config
    heads, experts = divide_heads(config.num_heads, config.num_kv_heads, num_devices), config.experts

    def rounded(size: int) -> int:
        return -(-size // num_devices) * num_devices

    if experts is not None and experts.is_whole:
        experts = dataclasses.replace(experts, num_held=rounded(experts.num_experts))
    elif experts is not None:
        experts = dataclasses.replace(experts, inner_size=rounded(experts.inner_size))
    slopes = config.alibi_slopes
    if slopes is not None:
        slopes = tuple(0.0 if head == NOBODY else slopes[head] for head in heads.queries.flat)
    return dataclasses.replace(
        config,
        num_heads=heads.queries.size,
        num_kv_heads=heads.keys.size,
        intermediate_size=rounded(config.intermediate_size),
        vocab_size=rounded(config.vocab_size),
        experts=experts,
        alibi_slopes=slopes,
    )


def is_even(config: ModelConfig, num_devices: int) -> bool:
    """Whether all sizes divide, so that the parameters of all devices together are those of one."""

    def sizes(c: ModelConfig) -> tuple[int, ...]:
        own = (c.num_heads, c.num_kv_heads, c.intermediate_size, c.vocab_size)
        return (
            own
            if c.experts is None
            else (*own, c.experts.num_held or c.experts.num_experts, c.experts.inner_size)
        )

    return sizes(padded(config, num_devices)) == sizes(config)


def share_of(config: ModelConfig, num_devices: int) -> ModelConfig:
    """The model as one device computes it. `alibi_slopes` stay those of all."""
    if num_devices == 1:
        return config
    whole = padded(config, num_devices)
    heads, experts = divide_heads(config.num_heads, config.num_kv_heads, num_devices), whole.experts
    if experts is not None and experts.num_held is not None:
        experts = dataclasses.replace(experts, num_held=experts.num_held // num_devices)
    elif experts is not None:
        experts = dataclasses.replace(experts, inner_size=experts.inner_size // num_devices)
    return dataclasses.replace(
        whole,
        num_heads=whole.num_heads // num_devices,
        num_kv_heads=whole.num_kv_heads // num_devices,
        intermediate_size=whole.intermediate_size // num_devices,
        vocab_size=whole.vocab_size // num_devices,
        experts=experts,
        share=Share(
            num_devices=num_devices,
            vocab_size=config.vocab_size,
            num_heads=config.num_heads,
            num_kv_heads=int((heads.keys != NOBODY).sum()),
        ),
    )


def total(config: ModelConfig, x: Float[Array, "..."], cache: KVCache | None = None) -> Float[Array, "..."]:
    """The sum of what the devices have; `x` itself where one has all.

    With a cache that has inboxes the devices sum through these. Only sums of which each depends on the one
    before may be given it.
    """
    if config.share is None:
        return x
    return peer_sum(x, None if cache is None else cache.own_inboxes, axis=TENSOR)


def own_part(config: ModelConfig, values: Float[Array, " all"]) -> Float[Array, " own"]:
    """This device's part of what belongs to the heads of all."""
    if config.share is None:
        return values
    return values.reshape(config.share.num_devices, -1)[lax.axis_index(TENSOR)]


def of_one_device(config: ModelConfig, x: Float[Array, "..."] | None) -> Float[Array, "..."] | None:
    """What is to be added once where the devices' results are summed: zeros on all devices but the first."""
    if x is None or config.share is None:
        return x
    return jnp.where(lax.axis_index(TENSOR) == 0, x, jnp.zeros_like(x))


def first_expert(config: ModelConfig, experts: ExpertConfig) -> int | Int[Array, ""]:
    """The number of the first expert that this device has."""
    if config.share is None or experts.num_held is None:
        return 0
    return lax.axis_index(TENSOR) * experts.num_held


def normalize_all_heads(
    config: ModelConfig,
    heads: Float[Array, "*t hk g d"],
    weight: Float[Array, "hk g d"],
    bias: Float[Array, "hk g d"] | None,
    num_heads: int,
) -> Float[Array, "*t hk g d"]:
    """The model's norm over all heads of a token, `num_heads` on all devices; those of padding are zero."""
    wide, axes = heads.astype(jnp.float32), (-3, -2, -1)
    count = num_heads * heads.shape[-1]

    def mean(x: Array) -> Array:
        return total(config, jnp.sum(x, axis=axes, keepdims=True)) / count

    if config.norm == "layer":
        centre = mean(wide)
        variance = jnp.maximum(mean(wide * wide) - centre * centre, 0)
        wide = (wide - centre) * lax.rsqrt(variance + config.norm_eps)
        wide = wide * _over(config.norm_offset + weight.astype(jnp.float32), wide)
        return (wide if bias is None else wide + _over(bias.astype(jnp.float32), wide)).astype(heads.dtype)
    assert bias is None, "an RMS norm has no bias"
    wide = wide * lax.rsqrt(mean(wide * wide) + config.norm_eps)
    if config.norm_offset:
        return (wide * _over(config.norm_offset + weight.astype(jnp.float32), wide)).astype(heads.dtype)
    return wide.astype(heads.dtype) * _over(weight, heads)


def _over(array: Array, like: Array) -> Array:
    return jnp.broadcast_to(array, like.shape)


def embedded(
    config: ModelConfig, table: Float[Array, "v e"], tokens: Int[Array, "*t"], cache: KVCache | None = None
) -> Float[Array, "*t e"]:
    """The tokens' rows of a table of which each device has a part. `cache` as in `total`."""
    if config.share is None:
        return table[tokens]
    place = tokens - lax.axis_index(TENSOR) * len(table)
    is_own = (place >= 0) & (place < len(table))
    rows = table[jnp.clip(place, 0, len(table) - 1)]
    return total(config, jnp.where(is_own[..., None], rows, jnp.zeros_like(rows)), cache)


def gathered(config: ModelConfig, logits: Float[Array, "*t own"]) -> Float[Array, "*t v"]:
    """Logits of the whole vocabulary, on every device, from those that each has."""
    if config.share is None:
        return logits
    whole = lax.all_gather(logits, TENSOR, axis=logits.ndim - 1, tiled=True)
    return whole[..., : config.share.vocab_size]


def narrow(name: str, weights: np.ndarray, config: ModelConfig, num_devices: int) -> np.ndarray:
    """The inverse of `widen`, on the host: without the padding, heads in the model's own order."""
    heads, group = divide_heads(config.num_heads, config.num_kv_heads, num_devices), config.group
    num_keys, head_dim, width = config.num_kv_heads, config.head_dim, heads.queries.shape[1]
    places = {
        order: _first_places(own) for order, own in (("q", heads.queries.reshape(-1)), ("k", heads.keys))
    }

    def queries(x: np.ndarray, axis: int) -> np.ndarray:
        flat = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :]).take(places["q"], axis)
        return flat.reshape(*x.shape[:axis], num_keys, group, *x.shape[axis + 2 :])

    if name in ("qkv", "qkv_bias"):
        axis = weights.ndim - 3
        parts = (queries(weights[..., :width, :], axis), weights[..., width:, :].take(places["k"], axis))
        return np.concatenate(parts, axis=-2)
    if name == "out":
        return queries(weights, 0)
    if name.removesuffix("_bias") in ("q_norm", "k_norm") and weights.ndim > 1:
        flat = weights.reshape(-1, head_dim).take(places[name[0]], 0)
        return flat if weights.ndim == 2 else flat.reshape(num_keys, -1, head_dim)
    if name == "sinks":
        return weights.take(places["q"], 0)
    if name in ("embed", "head", "head_bias"):
        return weights[: config.vocab_size]
    if name in ("gate_up", "gate_up_bias", "up", "up_bias"):
        return weights[..., : config.intermediate_size]
    if name == "down":
        return weights[: config.intermediate_size]
    assert config.experts is not None, name
    if config.experts.is_whole:
        return weights[: config.experts.num_experts]
    inner = config.experts.inner_size
    return weights[..., :inner, :] if name == "expert_down" else weights[..., :inner]


def _first_places(order: Int[np.ndarray, " places"]) -> Int[np.ndarray, " heads"]:
    """Where each head stands first."""
    heads, places = np.unique(order, return_index=True)
    return places[heads != NOBODY]


def widen(name: str, weights: Float[Array, "..."], config: ModelConfig, num_devices: int) -> Array:
    """A parameter of one layer, or of none, with the padding and in the order that `padded` means.

    `name` is the parameter's own, without its stack; `config` is the model's, undivided.
    """
    heads, group = divide_heads(config.num_heads, config.num_kv_heads, num_devices), config.group
    whole = padded(config, num_devices)

    def grown(x: Array, axis: int, size: int) -> Array:
        return jnp.pad(x, [(0, size - x.shape[axis] if i == axis % x.ndim else 0) for i in range(x.ndim)])

    def ordered(x: Array, order: np.ndarray, axis: int) -> Array:
        """Heads along `axis`; zeros for those that are none."""
        x = grown(x, axis, x.shape[axis] + 1)
        return jnp.take(x, jnp.asarray(np.where(order == NOBODY, x.shape[axis] - 1, order)), axis=axis)

    def queries(x: Array, axis: int) -> Array:
        """Axes for KV heads and for the queries of each, from `axis` on."""
        flat = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
        out = ordered(flat, heads.queries.reshape(-1), axis)
        return out.reshape(*x.shape[:axis], *heads.queries.shape, *x.shape[axis + 2 :])

    if name in ("qkv", "qkv_bias"):
        axis = weights.ndim - 3
        parts = (queries(weights[..., :group, :], axis), ordered(weights[..., group:, :], heads.keys, axis))
        return jnp.concatenate(parts, axis=-2)
    if name == "out":
        return queries(weights, 0)
    if name.removesuffix("_bias") in ("q_norm", "k_norm") and weights.ndim > 1:
        num = config.num_heads if name.startswith("q") else config.num_kv_heads
        order = heads.queries.reshape(-1) if name.startswith("q") else heads.keys
        flat = ordered(weights.reshape(num, weights.shape[-1]), order, 0)
        return flat if weights.ndim == 2 else flat.reshape(len(heads.keys), -1, weights.shape[-1])
    if name == "sinks":
        return ordered(weights, heads.queries.reshape(-1), 0)
    if name in ("embed", "head", "head_bias"):
        return grown(weights, 0, whole.vocab_size)
    if name in ("gate_up", "gate_up_bias", "up", "up_bias"):
        return grown(weights, -1, whole.intermediate_size)
    if name == "down":
        return grown(weights, 0, whole.intermediate_size)
    assert whole.experts is not None, name
    if whole.experts.num_held is not None:
        return grown(weights, 0, whole.experts.num_held)
    return grown(weights, -2 if name == "expert_down" else -1, whole.experts.inner_size)
