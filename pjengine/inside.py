"""Looking into a model: who attends to whom, and what its hidden states already say of the next token.

Of `llm.model` and `llm.params`, over whole sequences without pages: the Block that serves, on one device.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pjengine.models.attention import Attend, dense_attend
from pjengine.models.decoder import Decoder, Params, check_length
from pjengine.models.kept_patterns import PatternAttend
from pjengine.models.kept_states import KeptStates


class Lens(NamedTuple):
    """The likeliest next tokens as each layer has them, best first; on the host."""

    layers: tuple[int, ...]  # counted from the first, as `HiddenStatesParams` counts
    token_ids: Int[np.ndarray, "layers *t top"]
    logprobs: Float[np.ndarray, "layers *t top"]


def attention_patterns(
    model: Decoder,
    params: Params,
    tokens: Sequence[int] | Int[np.ndarray, " t"] | Int[Array, " t"],
    *,
    layers: Sequence[int],
    heads: Sequence[int] | None = None,
) -> Float[np.ndarray, "layers heads t t"]:
    """How much each token (the rows) takes of each (the columns), in chosen layers and heads; float32.

    Exact for every architecture: grouped heads, ALiBi, windows, soft caps. Rows sum to 1, but in layers with
    sinks, which take the rest. For each layer and head t * t numbers come to the host.

    Args:
      layers: 0 is the first, -1 the last, as in Hugging Face's `attentions`; layer i reads the hidden states
        of number i and makes those of i + 1.
      heads: of queries, alike in all layers; None: all.

    Raises:
      ValueError: no such layer or head, no tokens, more of them than the model has learned positions, a
        token that is not in the vocabulary, or a model that several devices compute.
    """
    c, ids = model.config, _checked(model, tokens)
    numbers = _numbers("layers", layers, c.num_layers)
    chosen = _numbers("heads", range(c.num_heads) if heads is None else heads, c.num_heads)
    return np.asarray(_patterns(params, ids, model=model, layers=numbers, heads=chosen))


@partial(jax.jit, static_argnames=("model", "layers", "heads"))
def _patterns(
    params: Params,
    tokens: Int[Array, " t"],
    *,
    model: Decoder,
    layers: tuple[int, ...],
    heads: tuple[int, ...],
) -> Float[Array, "layers heads t t"]:
    attend = PatternAttend(layers)
    _run(model, params, tokens, attend)
    return jnp.stack([attend.patterns[layer][jnp.asarray(heads)] for layer in layers])


def logit_lens(
    model: Decoder,
    params: Params,
    tokens: Sequence[int] | Int[np.ndarray, " t"] | Int[Array, " t"],
    *,
    layers: Sequence[int] | None = None,
    top: int = 5,
) -> Lens:
    """What each layer would answer if it were the last: its states through the last norm and the head.

    Args:
      layers: as of `HiddenStatesParams`: 0 is what goes into the first layer, -1 what the model itself says;
        None: all.
      top: how many of the likeliest tokens, at each position of the tokens.

    Raises:
      ValueError: as of `attention_patterns`; or `top` is not within the vocabulary.
    """
    num_layers = model.config.num_layers
    numbers = _numbers("layers", range(num_layers + 1) if layers is None else layers, num_layers + 1)
    states = _states(params, _checked(model, tokens), jnp.asarray(numbers, jnp.int32), model=model)
    return logit_lens_of(model, params, states, layers=numbers, top=top)


def logit_lens_of(
    model: Decoder,
    params: Params,
    states: Float[np.ndarray, "layers *t e"] | Float[Array, "layers *t e"],
    *,
    layers: Sequence[int],
    top: int = 5,
) -> Lens:
    """The same of hidden states at hand, as a request with `HiddenStatesParams(layers=...)` brings them.

    Raises:
      ValueError: the states are not of so many layers or not of this model; or as of `logit_lens`.
    """
    c = model.config
    _check_whole(model)
    numbers = _numbers("layers", layers, c.num_layers + 1)
    if states.ndim < 2 or (len(states), states.shape[-1]) != (len(numbers), c.hidden_size):
        raise ValueError(
            f"states must be [{len(numbers)} layers, ..., {c.hidden_size}], got {list(states.shape)}: ask "
            "for the hidden_states of these layers of this model"
        )
    if not 1 <= top <= c.vocab_size:
        raise ValueError(f"top must be within [1, {c.vocab_size}], got {top}")
    # Those of the last number have been through the last norm.
    head = replace(model, config=replace(c, has_final_norm=False))
    each = [
        _likeliest(params, jnp.asarray(own), model=head if number == c.num_layers else model, top=top)
        for number, own in zip(numbers, states, strict=True)
    ]
    token_ids, logprobs = (np.stack(arrays) for arrays in zip(*each, strict=True))
    return Lens(numbers, token_ids, logprobs)


@partial(jax.jit, static_argnames=("model",))
def _states(
    params: Params, tokens: Int[Array, " t"], numbers: Int[Array, " k"], *, model: Decoder
) -> Float[Array, "k t e"]:
    room = KeptStates.empty(jnp.arange(model.config.num_layers + 1), model.config, len(tokens), model.dtype)
    kept = _run(model, params, tokens, dense_attend, room)
    assert kept is not None
    return kept.wanted[numbers]  # some of them perhaps twice


@partial(jax.jit, static_argnames=("model", "top"))
def _likeliest(
    params: Params, states: Float[Array, "*t e"], *, model: Decoder, top: int
) -> tuple[Int[Array, "*t top"], Float[Array, "*t top"]]:
    logits = model.logits(params, states.astype(model.dtype))
    logprobs, token_ids = jax.lax.top_k(jax.nn.log_softmax(logits, axis=-1), top)
    return token_ids, logprobs


def _run(
    model: Decoder, params: Params, tokens: Int[Array, " t"], attend: Attend, room: KeptStates | None = None
) -> KeptStates | None:
    positions = jnp.arange(len(tokens), dtype=jnp.int32)
    rope_lens = jnp.full_like(positions, len(tokens))
    return model.run_keeping(params, tokens, positions, rope_lens, None, attend, room)[2]


def _checked(
    model: Decoder, tokens: Sequence[int] | Int[np.ndarray, " t"] | Int[Array, " t"]
) -> Int[Array, " t"]:
    _check_whole(model)
    ids, vocab_size = np.asarray(tokens), model.config.vocab_size
    if ids.ndim != 1 or len(ids) == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"tokens must be the ids of one sequence, at least one, got {tokens!r:.80}")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"tokens must be within the vocabulary of {vocab_size}, got {tokens!r:.80}")
    check_length(model.config, len(ids))
    return jnp.asarray(ids, jnp.int32)


def _check_whole(model: Decoder) -> None:
    if model.num_devices > 1:
        raise ValueError(
            f"this looks into a model on one device, got one divided among {model.num_devices}: use "
            "tensor_parallel_size=1"
        )


def _numbers(name: str, wanted: Sequence[int], count: int) -> tuple[int, ...]:
    """Counted from the first."""
    numbers = tuple(int(number) for number in wanted)
    if not numbers or not all(-count <= number < count for number in numbers):
        raise ValueError(f"{name} must be at least one, within [{-count}, {count - 1}], got {wanted!r:.80}")
    return tuple(number % count for number in numbers)
