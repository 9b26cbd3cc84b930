"""Logits processors of requests: tried before a request is queued, and called within a step."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pjengine.caller_functions import Role, why_refused
from pjengine.logits import History
from pjengine.processors import Chain, HostProcessor, Processor, processor_name
from pjengine.schedule import EMPTIED, FAILED

_ROLE = Role(
    changes="logits",
    form="It must take (token_ids, logits) and return logits, all in jax.numpy; pjengine.host_processor "
    "wraps one that cannot",
    instead="pjengine.host_processor makes a processor of what runs there",
)
MAX_ROWS = 64  # sequences that are processed at once: what functions make of them has to fit into memory


def check_processors(processors: Sequence[Processor], vocab_size: int, history_len: int) -> None:
    """Makes sure that processors can be part of a program: traces each on shapes alone.

    Args:
      history_len: the number of token ids that they get, padding included.

    Raises:
      TypeError: one cannot be told from others by its hash.
      ValueError: it cannot be traced, calls the host, or returns another shape or dtype than it gets.
    """
    for index, processor in enumerate(processors):
        name = f"logits_processors[{index}] ({processor_name(processor)})"
        try:
            hash(processor)
        except TypeError as error:
            raise TypeError(
                f"{name} must be hashable, since equal ones share a program: {error}. Take a function, or a "
                "frozen dataclass with __call__"
            ) from error
        if error_text := _error_of(processor, vocab_size, history_len):
            raise ValueError(f"{name} {error_text}")


@lru_cache(maxsize=128)  # so that it is done once for a thousand requests
def _error_of(processor: Processor, vocab_size: int, history_len: int) -> str:
    """Why a processor cannot be part of a program, behind its name; empty: it can."""
    if isinstance(processor, HostProcessor):
        return ""  # it is not traced
    token_ids = jax.ShapeDtypeStruct((history_len,), jnp.int32)
    logits = jax.ShapeDtypeStruct((vocab_size,), jnp.float32)
    return why_refused(processor, (token_ids, logits), logits, _ROLE)


def apply_processors(
    logits: Float[Array, "s v"],
    processed: Int[Array, "2 rows"],
    chains: Sequence[Chain],
    history: History,
) -> tuple[Float[Array, "s v"], Int[Array, " s"]]:
    """Calls chains of processors for those sequences that ask; the others' logits are not touched.

    What is -inf before a processor stays so, whatever it returns.

    Args:
      processed: a sequence, out of range where it stands for nothing, and which of the chains it has.

    Returns:
      The logits, and for each sequence 0 or why no token can be sampled: FAILED - i or EMPTIED - i for
      the i-th processor of its chain.
    """

    def process(entries: Int[Array, "2 block"]) -> tuple[Float[Array, "block v"], Int[Array, " block"]]:
        seq, which = entries
        owner = jnp.minimum(seq, len(logits) - 1)
        known = _known_tokens(owner, history)
        rows, failures = logits[owner], jnp.zeros(len(owner), jnp.int32)
        for index, chain in enumerate(chains):
            is_asked = (which == index) & (seq < len(logits))
            rows, failures = _call(chain, known, rows, failures, is_asked)
        return rows, failures

    seq, num_rows = processed[0], processed.shape[1]
    if num_rows <= MAX_ROWS:
        rows, failures = process(processed)
    else:  # powers of two: they divide evenly
        blocks = processed.reshape(2, -1, MAX_ROWS).swapaxes(0, 1)
        rows, failures = lax.map(process, blocks)
        rows, failures = rows.reshape(num_rows, -1), failures.reshape(-1)
    no_failures = jnp.zeros(len(logits), jnp.int32)
    return logits.at[seq].set(rows, mode="drop"), no_failures.at[seq].set(failures, mode="drop")


def _known_tokens(owner: Int[Array, " rows"], history: History) -> Int[Array, "rows known"]:
    """All tokens of each sequence before the one to be sampled, then -1."""
    tokens = history.token_ids[history.page_table[owner]].reshape(len(owner), -1)
    position = lax.broadcasted_iota(jnp.int32, tokens.shape, 1)
    return jnp.where(position < history.lens[owner, None], tokens, -1)


def _call(
    chain: Chain,
    known: Int[Array, "rows known"],
    rows: Float[Array, "rows v"],
    failures: Int[Array, " rows"],
    is_asked: Bool[Array, " rows"],
) -> tuple[Float[Array, "rows v"], Int[Array, " rows"]]:
    for index, processor in enumerate(chain):
        if isinstance(processor, HostProcessor):
            result = _call_host(processor, known, rows, is_asked)
        else:
            result = jax.vmap(processor)(known, rows)
        result = jnp.where(rows == -jnp.inf, -jnp.inf, result)
        is_broken = ~(result < jnp.inf).all(axis=-1)  # NaN is less than nothing
        is_emptied = (result == -jnp.inf).all(axis=-1) & ~(rows == -jnp.inf).all(axis=-1)
        failure = jnp.where(is_broken, FAILED - index, jnp.where(is_emptied, EMPTIED - index, 0))
        failures = jnp.where(is_asked & (failures == 0), failure.astype(jnp.int32), failures)
        rows = jnp.where(is_asked[:, None], result, rows)
    return rows, failures


def _call_host(
    processor: HostProcessor,
    known: Int[Array, "rows known"],
    rows: Float[Array, "rows v"],
    is_asked: Bool[Array, " rows"],
) -> Float[Array, "rows v"]:
    """One call of the host for all rows."""

    def on_host(known: Any, rows: Any, is_asked: Any) -> np.ndarray:
        tokens, result = np.asarray(known), np.array(rows)
        for row in np.flatnonzero(np.asarray(is_asked)).tolist():
            if not (tokens[row] < -1).any():  # else it has failed, and the host does not know yet
                result[row] = processor(tokens[row], result[row])
        return result

    return jax.pure_callback(on_host, jax.ShapeDtypeStruct(rows.shape, rows.dtype), known, rows, is_asked)
