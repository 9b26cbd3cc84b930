"""The smallest logit that min_p, top_k and top_p let a row keep, found without a sort."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int

from pjengine.pallas_kernels.dispatch import dispatch

LOWEST = -3.4028235e38  # float32's own; below every finite logit, and above -inf
SIGN = 0x7FFFFFFF
BLOCK = 4096  # logits that a program holds at a time


def keep_threshold(
    logits: Float[Array, "s v"],
    temperature: Float[Array, " s"],
    top_k: Int[Array, " s"],
    top_p: Float[Array, " s"],
    min_p: Float[Array, " s"],
    *,
    backend: str | None = None,
) -> Float[Array, " s"]:
    """The smallest logit each row keeps: min_p first, then top_k, then top_p of what is left.

    Ties with the last logit kept are kept. A row that filters nothing, or is greedy (temperature 0),
    gets -inf and costs nothing: the choice is the device's, row by row.

    Raises:
      NotImplementedError: `backend` cannot do these shapes.
    """
    arguments = (logits, temperature, top_k, top_p, min_p)
    implementations = {
        "triton": lambda: threshold_triton(*arguments),
        "reference": lambda: reference(*arguments),
        "triton_interpret": lambda: threshold_triton(*arguments, interpret=True),
    }
    return dispatch("keep_threshold", implementations, backend)


def is_filtered(
    vocab_size: int,
    temperature: Float[Array, "*s"],
    top_k: Int[Array, "*s"],
    top_p: Float[Array, "*s"],
    min_p: Float[Array, "*s"],
) -> Bool[Array, "*s"]:
    return (temperature > 0) & ((top_k < vocab_size) | (top_p < 1) | (min_p > 0))


def reference(
    logits: Float[Array, "s v"],
    temperature: Float[Array, " s"],
    top_k: Int[Array, " s"],
    top_p: Float[Array, " s"],
    min_p: Float[Array, " s"],
) -> Float[Array, " s"]:
    """The spec, by the same bisection, all rows at once."""

    def search(wanted: Bool[Array, " s"]) -> Float[Array, " s"]:
        heat = jnp.where(wanted, temperature, 1.0)
        best = jnp.max(logits, axis=-1)

        def sums(threshold: Float[Array, " s"]) -> tuple[Float[Array, " s"], Float[Array, " s"]]:
            kept = logits >= threshold[:, None]
            mass = jnp.exp((logits - best[:, None]) / heat[:, None])
            return jnp.sum(kept, axis=-1, dtype=jnp.float32), jnp.sum(jnp.where(kept, mass, 0.0), axis=-1)

        keep = jnp.maximum(best + heat * jnp.log(min_p), LOWEST)
        low = jnp.full_like(best, LOWEST)
        keep = jnp.maximum(keep, bisect(low, best, lambda t: sums(t)[0] >= top_k.astype(jnp.float32)))
        target = top_p * sums(keep)[1]
        mass = bisect(keep, best, lambda t: sums(t)[1] >= target)
        return jnp.where(wanted, jnp.where(top_p < 1, mass, keep), -jnp.inf)

    wanted = is_filtered(logits.shape[-1], temperature, top_k, top_p, min_p)
    return lax.cond(jnp.any(wanted), search, lambda wanted: jnp.full(wanted.shape, -jnp.inf), wanted)


def bisect(low: Any, high: Any, reaches: Any, num_steps: Any = 32) -> Any:
    """The largest float in [low, high] that `reaches`, which holds at `low` and falls off upwards.

    Halves the interval in the order of the floats' bits, so 32 steps leave a single float.
    """

    def step(_: Any, bounds: tuple[Any, Any]) -> tuple[Any, Any]:
        low, high = bounds
        middle = (low | high) - ((low ^ high) >> 1)  # rounded up, without overflow
        is_reached = reaches(_to_float(middle))
        return jnp.where(is_reached, middle, low), jnp.where(is_reached, high, middle - 1)

    low, _ = lax.fori_loop(0, num_steps, step, (_to_order(low), _to_order(high)))
    return _to_float(low)


def _to_order(x: Any) -> Any:
    """Integers in the order of the floats."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits >= 0, bits, bits ^ SIGN)


def _to_float(order: Any) -> Any:
    return lax.bitcast_convert_type(jnp.where(order >= 0, order, order ^ SIGN), jnp.float32)


def threshold_triton(
    logits: Float[Array, "s v"],
    temperature: Float[Array, " s"],
    top_k: Int[Array, " s"],
    top_p: Float[Array, " s"],
    min_p: Float[Array, " s"],
    *,
    interpret: bool = False,
) -> Float[Array, " s"]:
    """`keep_threshold` as one program per row; a row without filters ends at once.

    Raises:
      NotImplementedError: logits that are not float32.
    """
    if logits.dtype != jnp.float32:
        raise NotImplementedError(f"logits are {logits.dtype}: wanted float32")
    num_rows, vocab_size = logits.shape
    return pl.pallas_call(
        functools.partial(_threshold_kernel, vocab_size=vocab_size),
        grid=(num_rows,),
        out_shape=jax.ShapeDtypeStruct((num_rows,), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=8, num_stages=2),
        interpret=interpret,
        name="keep_threshold",
    )(logits, temperature, top_k, top_p, min_p)


def _threshold_kernel(
    logits_ref: Any,  # [s, v]
    temperature_ref: Any,  # [s], as are all below
    top_k_ref: Any,
    top_p_ref: Any,
    min_p_ref: Any,
    out_ref: Any,
    *,
    vocab_size: int,
) -> None:
    row = pl.program_id(0)
    heat, top_k, top_p, min_p = temperature_ref[row], top_k_ref[row], top_p_ref[row], min_p_ref[row]
    wanted = is_filtered(vocab_size, heat, top_k, top_p, min_p)
    # The lowering takes a stored float constant for an integer: make it a value that depends on data.
    out_ref[row] = heat - jnp.inf

    def scan(update: Any, start: Any) -> Any:
        """Folds the row, a block at a time, into BLOCK lanes."""

        def body(i: Any, carry: Any) -> Any:
            at = i * BLOCK + jnp.arange(BLOCK)
            x = plt.load(logits_ref.at[row, at], mask=at < vocab_size, other=-jnp.inf)
            return update(x, carry)

        return lax.fori_loop(0, pl.cdiv(vocab_size, BLOCK), body, jnp.full((BLOCK,), start, jnp.float32))

    @pl.when(wanted)
    def _() -> None:
        best = jnp.max(scan(jnp.maximum, -jnp.inf))

        def count(threshold: Any) -> Any:
            return jnp.sum(scan(lambda x, n: n + jnp.where(x >= threshold, 1.0, 0.0), 0.0))

        def mass(threshold: Any) -> Any:
            return jnp.sum(
                scan(lambda x, n: n + jnp.where(x >= threshold, jnp.exp((x - best) / heat), 0.0), 0.0)
            )

        keep = jnp.maximum(best + heat * jnp.log(min_p), LOWEST)
        # No steps where a filter is off: `low` comes back as it went in.
        num_steps = 32 * (top_k < vocab_size).astype(jnp.int32)
        low = jnp.where(top_k < vocab_size, jnp.float32(LOWEST), keep)
        keep = jnp.maximum(
            keep, bisect(low, best, lambda t: count(t) >= top_k.astype(jnp.float32), num_steps)
        )
        target = top_p * mass(keep)
        out_ref[row] = bisect(keep, best, lambda t: mass(t) >= target, 32 * (top_p < 1).astype(jnp.int32))
