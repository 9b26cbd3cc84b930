"""Which logits min_p, top_k and top_p let a row keep, as a threshold that is found without a sort."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int

from pjengine.pallas_kernels.attention_variant import LOG2_E
from pjengine.pallas_kernels.dispatch import dispatch

LOWEST_FINITE = -3.4028235e38  # of float32
SIGN = 0x7FFFFFFF
BLOCK = (4, 1024)  # logits that a program holds at a time; the first axis is summed within a thread


def keep_threshold(
    logits: Float[Array, "s v"],
    temperature: Float[Array, " s"],
    top_k: Int[Array, " s"],
    top_p: Float[Array, " s"],
    min_p: Float[Array, " s"],
    *,
    backend: str | None = None,
) -> Float[Array, " s"]:
    """What each row's logits must not be below to be kept: by min_p, then top_k, then top_p of what is left.

    Which of the floats between two logits it is, depends on the backend. Ties with the last logit kept are
    kept. A row that filters nothing, or is greedy (temperature 0), gets -inf and costs nothing: the choice is
    the device's, row by row. Bisects the floats between the lowest and the largest logit. Aliases nothing.
    The kernel has no derivative.

    Args:
      temperature: divides the logits before probabilities are taken of them; at least 0.
      top_k: how many tokens to keep, at least 1; v or more for all.
      top_p: the share of what is left to keep, above 0; 1 for all.
      min_p: least probability, as a share of the likeliest token's; 0 for all.
      backend: None to let `dispatch` choose.

    Raises:
      ValueError: no such backend.
      NotImplementedError: `backend` is named and cannot do these dtypes.
    Source: Fan et al. 2018 (top_k), Holtzman et al. 2020 (top_p), Nguyen et al. 2024 (min_p).
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

        keep = jnp.maximum(best + heat * jnp.log(min_p), LOWEST_FINITE)
        low = jnp.full_like(best, LOWEST_FINITE)
        keep = jnp.maximum(keep, bisect(low, best, lambda t: sums(t)[0] >= top_k.astype(jnp.float32)))
        target = top_p * sums(keep)[1]
        mass = bisect(keep, best, lambda t: sums(t)[1] >= target)
        return jnp.where(wanted, jnp.where(top_p < 1, mass, keep), -jnp.inf)

    wanted = is_filtered(logits.shape[-1], temperature, top_k, top_p, min_p)
    return lax.cond(jnp.any(wanted), search, lambda wanted: jnp.full(wanted.shape, -jnp.inf), wanted)


def bisect(low: Any, high: Any, reaches: Any) -> Any:
    """The largest float in [low, high] that `reaches`, which holds at `low` and falls off upwards.

    Halves the interval in the order of the floats' bits, so 32 steps leave a single float.
    """

    def step(_: Any, bounds: tuple[Any, Any]) -> tuple[Any, Any]:
        low, high = bounds
        middle = _middle(low, high)
        is_reached = reaches(_to_float(middle))
        return jnp.where(is_reached, middle, low), jnp.where(is_reached, high, middle - 1)

    low, _ = lax.fori_loop(0, 32, step, (_to_order(low), _to_order(high)))
    return _to_float(low)


def _middle(low: Any, high: Any) -> Any:
    return (low | high) - ((low ^ high) >> 1)  # rounded up, without overflow


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

    @pl.when(wanted)
    def _() -> None:
        scale = LOG2_E / heat
        bests, leasts, sums = _scan(
            logits_ref,
            row,
            vocab_size,
            functools.partial(_summary, scale=scale),
            (LOWEST_FINITE, jnp.inf, 0.0),
        )
        best, least = jnp.max(bests), jnp.min(leasts)
        everything = jnp.sum(sums * jnp.exp2((bests - best) * scale))

        def counts(x: Any, probes: list[Any]) -> list[Any]:
            return [jnp.where(x >= probe, 1.0, 0.0) for probe in probes]

        def masses(x: Any, probes: list[Any]) -> list[Any]:
            mass = jnp.exp2((x - best) * scale)
            return [jnp.where(x >= probe, mass, 0.0) for probe in probes]

        def totals(terms: Any, probes: list[Any], num_blocks: Any = None) -> list[Any]:
            def add(x: Any, sums: tuple[Any, ...]) -> tuple[Any, ...]:
                return tuple(
                    n + jnp.sum(term, axis=0) for n, term in zip(sums, terms(x, probes), strict=True)
                )

            length = len(terms(jnp.zeros(()), probes))
            lanes = _scan(logits_ref, row, vocab_size, add, (0.0,) * length, num_blocks)
            return [jnp.sum(lane) for lane in lanes]

        def reach_k(probes: list[Any]) -> tuple[list[Any], list[Any]]:
            num_kept = totals(counts, probes)
            return [count >= top_k.astype(jnp.float32) for count in num_kept], num_kept

        keep = jnp.maximum(best + heat * jnp.log(min_p), LOWEST_FINITE)
        start = jnp.where(top_k < vocab_size, jnp.maximum(least, LOWEST_FINITE), best)
        keep = jnp.maximum(keep, jnp.where(top_k < vocab_size, _narrow(start, best, reach_k), keep))

        @pl.when(top_p >= 1)
        def _() -> None:
            out_ref[row] = keep

        @pl.when(top_p < 1)
        def _() -> None:
            is_cut = keep > least
            num_blocks = pl.cdiv(vocab_size, BLOCK[0] * BLOCK[1]) * is_cut.astype(jnp.int32)
            (left,) = totals(masses, [keep], num_blocks)
            whole = jnp.where(is_cut, left, everything)

            def reach_p(probes: list[Any]) -> tuple[list[Any], list[Any]]:
                both = totals(lambda x, probes: masses(x, probes) + counts(x, probes), probes)
                return [mass >= top_p * whole for mass in both[: len(probes)]], both[len(probes) :]

            out_ref[row] = _narrow(jnp.maximum(keep, least), best, reach_p)


def _scan(
    logits_ref: Any, row: Any, vocab_size: int, update: Any, start: tuple[float, ...], num_blocks: Any = None
) -> tuple[Any, ...]:
    """Folds a row, or its first blocks, a block at a time into the lanes of a block's last axis."""
    height, width = BLOCK

    def body(i: Any, carry: Any) -> Any:
        at = i * (height * width) + jnp.arange(height)[:, None] * width + jnp.arange(width)[None, :]
        x = plt.load(logits_ref.at[row, at], mask=at < vocab_size, other=-jnp.inf)
        return update(x, carry)

    lanes = tuple(jnp.full((width,), value, jnp.float32) for value in start)
    end = pl.cdiv(vocab_size, height * width) if num_blocks is None else num_blocks
    result: tuple[Any, ...] = lax.fori_loop(0, end, body, lanes)
    return result


def _summary(x: Any, carry: tuple[Any, Any, Any], *, scale: Any) -> tuple[Any, Any, Any]:
    """The largest logit, the smallest that is not masked, and the mass relative to the largest."""
    old_best, least, mass = carry
    best = jnp.maximum(old_best, jnp.max(x, axis=0))
    least = jnp.minimum(least, jnp.min(jnp.where(x >= LOWEST_FINITE, x, jnp.inf), axis=0))
    added = jnp.sum(jnp.exp2((x - best[None, :]) * scale), axis=0)
    return best, least, mass * jnp.exp2((old_best - best) * scale) + added


def _narrow(start: Any, best: Any, reach: Any) -> Any:
    """A float in [start, best] that keeps as few logits as one that reaches does; `start` does.

    `reach` says of several floats whether they reach, and how many logits each keeps. Each round has three
    that quarter the interval in the order of the floats' bits, which ends in 16 rounds whatever the logits
    are, and four that cut it evenly, which leaves few logits in it after few rounds.
    """

    def is_open(state: tuple[Any, ...]) -> Any:
        low, high, num_low, num_high = state
        return (_middle(low, high) < high) & (num_low - num_high > 1)

    def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
        low, high, num_low, num_high = state
        middle = _middle(low, high)
        inner = [_middle(low, middle), middle, _middle(middle, high)]
        bottom, top = _to_float(low), _to_float(high)
        inner += [_to_order(bottom * (1 - i / 5) + top * (i / 5)) for i in range(1, 5)]
        inner = [jnp.minimum(jnp.maximum(probe, low + 1), high - 1) for probe in inner]
        is_reached, num_kept = reach([_to_float(probe) for probe in inner])
        for probe, is_low, count in zip(inner, is_reached, num_kept, strict=True):
            low = jnp.where(is_low, jnp.maximum(low, probe), low)
            high = jnp.where(is_low, high, jnp.minimum(high, probe))
            num_low = jnp.where(is_low, jnp.minimum(num_low, count), num_low)
            num_high = jnp.where(is_low, num_high, jnp.maximum(num_high, count))
        return low, high, num_low, num_high

    beyond = _to_order(best) + 1
    state = (_to_order(start), beyond, best * 0 + jnp.inf, best * 0)
    low, *_ = lax.while_loop(is_open, step, state)
    return _to_float(low)
