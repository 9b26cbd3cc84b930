"""Activation edits of requests: checked before a request is queued, and called between the layers."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pjengine.activation_edits import (
    MAX_EDIT_WORDS,
    MAX_WORDS,
    ActivationEdit,
    ActivationEdits,
    EditChain,
    EditedToken,
    EditForm,
    EditRoom,
)
from pjengine.batching import Rows
from pjengine.caller_functions import Role, why_refused
from pjengine.models.config import ModelConfig
from pjengine.models.decoder import StateEdit
from pjengine.models.state import Batch

_ROLE = Role(
    changes="state",
    form="It must take (state, token, *args) and return a state, all in jax.numpy",
    instead="Compute it in jax.numpy, or before the call and pass it in args",
)
MAX_TOKENS = 1024  # that a function is called for at once: what it makes of them has to fit into memory


def check_edits(edits: Sequence[ActivationEdit], config: ModelConfig) -> ActivationEdits | None:
    """Makes sure that edits can be part of a program: traces each on shapes alone. None: there are none.

    Raises:
      TypeError: a function cannot be told from others by its hash, or its args hold no numbers.
      ValueError: there is no such layer; args are too large; or a function cannot be traced, calls the
        host, or returns another shape or dtype than it gets.
    """
    if not edits:
        return None
    forms: list[EditForm] = []
    words: list[np.ndarray] = []
    for index, edit in enumerate(edits):
        name = f"activation_edits[{index}]"
        leaves, tree = jax.tree.flatten(tuple(edit.args))
        arrays = [_plain(leaf, name) for leaf in leaves]
        shapes = tuple((array.shape, str(array.dtype)) for array in arrays)
        form = EditForm(_number(edit.layer, name, config.num_layers), edit.function, tree, shapes)
        if form.num_words > MAX_EDIT_WORDS:
            raise ValueError(_too_many(f"the args of {name}", MAX_EDIT_WORDS, form.num_words))
        try:
            hash(form)
        except TypeError as error:
            raise TypeError(
                f"{name} must have a hashable function, since equal ones share a program: {error}. Take a "
                "function, or a frozen dataclass with __call__"
            ) from error
        if error_text := _error_of(form, config.hidden_size):
            raise ValueError(f"{name} ({form.name}) {error_text}")
        forms.append(form)
        words += [array.astype(np.int32) if array.dtype == np.bool_ else array for array in arrays]
    flat = [array.reshape(-1).view(np.int32) for array in words]
    joined = np.concatenate(flat) if flat else np.zeros(0, np.int32)
    if len(joined) > MAX_WORDS:
        raise ValueError(_too_many("the args of all activation_edits together", MAX_WORDS, len(joined)))
    return ActivationEdits(EditChain(tuple(forms)), joined)


def _too_many(what: str, most: int, count: int) -> str:
    return (
        f"{what} must hold at most {most} numbers, got {count}: make what all requests share a constant of "
        "the function"
    )


def _number(layer: int, name: str, num_layers: int) -> int:
    if not -num_layers - 1 <= layer <= num_layers:
        raise ValueError(
            f"the layer of {name} must be within [{-num_layers - 1}, {num_layers}] with this model, got "
            f"{layer!r:.80}"
        )
    return layer % (num_layers + 1)


def _plain(leaf: Any, name: str) -> np.ndarray:
    """A number or an array as it travels: float32, int32 or bool."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"the args of {name} must hold numbers and arrays of them, got a key of jax.random: pass its "
            "seed, and make the key in the function, jax.random.key(seed)"
        )
    array = np.asarray(leaf)
    if array.dtype == np.bool_:
        return array
    if jnp.issubdtype(array.dtype, jnp.floating):
        return np.ascontiguousarray(array, np.float32).reshape(array.shape)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"the args of {name} must hold numbers and arrays of them, got {leaf!r:.80}")
    if array.size and not (-(2**31) <= int(array.min()) and int(array.max()) < 2**31):
        raise ValueError(f"whole numbers in the args of {name} must fit into int32, got {leaf!r:.80}")
    return np.ascontiguousarray(array, np.int32).reshape(array.shape)


@lru_cache(maxsize=128)  # so that it is done once for a thousand requests
def _error_of(form: EditForm, width: int) -> str:
    """Why an edit cannot be part of a program, behind its name; empty: it can."""
    scalar, state = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((width,), jnp.float32)
    args = jax.tree.unflatten(form.tree, [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in form.leaves])
    inputs = (state, EditedToken(scalar, scalar, scalar), *args)
    return why_refused(form.function, inputs, state, _ROLE)


def state_edit(
    room: EditRoom,
    edited: Int[Array, "2 seqs"],
    words: Int[Array, "slots words"],
    rows: Rows,
    row: Int[Array, " seqs"],
    batch: Batch,
) -> StateEdit:
    """What is done to the hidden states of a batch between its layers: sequences that do not ask keep theirs.

    Args:
      edited: as `pack_edited` writes it; `words`: as `words_by_slot` does.
    """
    if batch.cu_q_lens is None:
        seq = jnp.arange(len(row), dtype=jnp.int32)
    else:
        token = jnp.arange(len(batch.tokens), dtype=jnp.int32)
        seq = jnp.searchsorted(batch.cu_q_lens[1:], token, side="right", method="compare_all")
        seq = jnp.minimum(seq.astype(jnp.int32), len(row) - 1)
    chain_of = jnp.where(batch.slots < 0, -1, edited[0, seq])  # padding has none
    slot_of = jnp.maximum(edited[1, seq], 0)
    prompt_lens = rows.field("prompt_len").at[row].get(mode="clip")[seq]
    tokens = EditedToken(batch.tokens, batch.positions, prompt_lens)

    def edit(number: int, x: Float[Array, "t e"]) -> Float[Array, "t e"]:
        for index, chain in enumerate(room.chains):
            for form, start in chain.at(number):
                x = _call(form, words[:, start:], x, tokens, slot_of, chain_of == index)
        return x

    return edit


def _call(
    form: EditForm,
    words: Int[Array, "slots words"],
    x: Float[Array, "t e"],
    tokens: EditedToken,
    slot_of: Int[Array, " t"],
    is_asked: Bool[Array, " t"],
) -> Float[Array, "t e"]:
    """One edit, of those tokens that ask. What is no number becomes NaN as a whole: it ends its request."""

    def of_token(inputs: tuple[Float[Array, " e"], EditedToken, Int[Array, ""]]) -> Float[Array, " e"]:
        state, token, slot = inputs
        result = form.function(state.astype(jnp.float32), token, *_args(form, words, slot)).astype(x.dtype)
        return jnp.where(jnp.all(jnp.isfinite(result)), result, jnp.full_like(result, jnp.nan))

    inputs = (x, tokens, slot_of)
    result = (
        jax.vmap(of_token)(inputs)
        if len(x) <= MAX_TOKENS
        else lax.map(of_token, inputs, batch_size=MAX_TOKENS)
    )
    return jnp.where(is_asked[:, None], result, x)


def _args(form: EditForm, words: Int[Array, "slots words"], slot: Int[Array, ""]) -> tuple[Any, ...]:
    """What a function gets beside state and token."""
    leaves, start = [], 0
    for shape, dtype in form.leaves:
        size = int(np.prod(shape))
        own = lax.dynamic_slice(words, (slot, jnp.int32(start)), (1, size)).reshape(shape)
        if dtype == "float32":
            own = lax.bitcast_convert_type(own, jnp.float32)
        leaves.append(own != 0 if dtype == "bool" else own)
        start += size
    args: tuple[Any, ...] = jax.tree.unflatten(form.tree, leaves)
    return args
