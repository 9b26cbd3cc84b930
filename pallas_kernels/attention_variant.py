"""What an attention layer may do beside softmax(scale q k) v: the rules, and how the kernels compute them."""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

LOG2_E = math.log2(math.e)
# Stands for minus infinity in the attention kernels: its exponential is 0, and LOWEST - LOWEST and
# LOWEST * scale stay finite.
LOWEST = -1e30


@functools.partial(
    jax.tree_util.register_dataclass, meta_fields=["softcap", "window"], data_fields=["alibi_slopes", "sinks"]
)
@dataclass(frozen=True, kw_only=True)
class AttentionVariant:
    """How a layer departs from plain causal attention; None: not in that way. For the token at `position`

        score  = scale * q k
        score  = softcap * tanh(score / softcap)
        score += alibi_slopes[head] * (slot - position)
        weight = exp(score) / (exp(sinks[head]) + the sum of exp(score) over the slots it sees)

    and it sees slots max(0, position - window + 1) to position. Pages before the window are never read: the
    engine may have given them away.

    A pytree: `softcap` and `window` are static, so what a layer does not use costs its kernel nothing.
    """

    softcap: float | None = None
    window: int | None = None  # slots that a token sees, its own included
    alibi_slopes: Float[Array, " h"] | None = None
    sinks: Float[Array, " h"] | None = None

    def check(self, num_heads: int) -> None:
        """Refuses values that have no meaning.

        Raises:
          ValueError: softcap or window is not positive, or an array is not one number a head.
        """
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"softcap must be positive and finite, got {self.softcap}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        for name, array in (("alibi_slopes", self.alibi_slopes), ("sinks", self.sinks)):
            if array is not None and array.shape != (num_heads,):
                raise ValueError(f"{name} must have shape ({num_heads},), one a head; got {array.shape}")

    @property
    def static(self) -> dict[str, Any]:
        """What kernels are compiled for."""
        return {"softcap": self.softcap, "window": self.window}

    def sees(self, distance: Int[Array, "*b"]) -> Bool[Array, "*b"]:
        """Whether a token sees a slot at `distance`, slot - position."""
        is_seen = distance <= 0
        return is_seen if self.window is None else is_seen & (distance > -self.window)

    def bend(
        self, scores: Float[Array, "*b hk g r s"], distance: Int[Array, "*#b #hk #g r s"]
    ) -> Float[Array, "*b hk g r s"]:
        """Scaled products to scores: softcap, ALiBi, and -inf where a token does not see a slot."""
        if self.softcap is not None:
            scores = self.softcap * jnp.tanh(scores / self.softcap)
        if self.alibi_slopes is not None:
            scores = scores + by_head(self.alibi_slopes, scores) * distance.astype(scores.dtype)
        return jnp.where(self.sees(distance), scores, -jnp.inf)


PLAIN = AttentionVariant()


def by_head(
    values: Float[Array, " h"], scores: Float[Array, "*b hk g r s"]
) -> Float[Array, "*ones hk g 1 1"]:
    """One number a head, in the axes and the dtype of its scores."""
    lead = (1,) * (scores.ndim - 4)
    return values.astype(scores.dtype).reshape(*lead, *scores.shape[-4:-2], 1, 1)


class TileBounds(NamedTuple):
    """The tiles of slots that a block of tokens goes through; those from full to diagonal need no mask.

    begin ............. full .................. diagonal .............. end
      [ the window starts ][ every row sees all ][ the rows' own slots ]
    """

    begin: Any
    full: Any
    diagonal: Any
    end: Any


def window_start(position: Any, window: int | None) -> Any:
    """The first slot that the token at `position` sees."""
    return 0 if window is None else jnp.maximum(position - (window - 1), 0)


def tile_bounds(first: Any, end_slot: Any, *, window: int | None, block_kv: int) -> TileBounds:
    """The bounds of a block of tokens at positions `first` to end_slot - 1; end_slot 0: it has no tiles."""
    block = jnp.int32(block_kv)
    num_full = lax.div(jnp.maximum(jnp.minimum(first + 1, end_slot), 0), block)
    end = lax.div(end_slot + (block_kv - 1), block)
    if window is None:
        return TileBounds(0, 0, num_full, end)
    begin = jnp.minimum(lax.div(window_start(first, window), block), end)
    full = jnp.minimum(lax.div(window_start(end_slot - 1, window) + (block_kv - 1), block), end)
    return TileBounds(begin, full, jnp.maximum(full, num_full), end)


def bend_tile(scores: Any, alibi: Any, *, softcap: float | None, unit: float) -> Any:
    """`AttentionVariant.bend` in a kernel, without the mask; `alibi` is what ALiBi adds, or None.

    A score of 1 is `unit` here, as the kernels multiply with the scale only as they take exponentials.
    """
    if softcap is not None:
        # tanh x = 1 - 2 / (1 + exp 2x): the processor's own tanh is off by 5e-4 of a score, this by 1e-7 of
        # the cap. The reciprocal is a root squared, which takes less than a division. Overflow gives tanh 1.
        cap = softcap * unit
        root = lax.rsqrt(1.0 + jnp.exp2(scores * (2 * LOG2_E / cap)))
        scores = cap - (2 * cap) * (root * root)
    return scores if alibi is None else scores + alibi
