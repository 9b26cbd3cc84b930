"""From logits of which each device has a part to tokens that every device knows.

They are those that `sampler.sample` draws from the logits of the whole vocabulary, bit for bit: noise is a
column's own whoever makes it, a largest score is the largest of the parts' largest, and what filters looks at
whole rows.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pjengine.models.config import ModelConfig, Share
from pjengine.models.share import gathered
from pjengine.sampler import has_nan, noisy
from pjengine.schedule import BROKEN
from pjengine.sharding.mesh import TENSOR

# Fewer rows are gathered. On two NVIDIA H200s, gathering 1 row of 128,000 logits takes 8 us, as any message
# does, and each further row about 1 us; to draw by rows takes two messages.
MANY = 16

type DrawWhole = Callable[[Array, dict[str, Array]], Array]  # [s, v] logits, and what their rows sample by


def draw_divided(
    config: ModelConfig, logits: Float[Array, "s own"], rows: dict[str, Array], whole: DrawWhole | None
) -> Int[Array, " s"]:
    """A token for each row, or BROKEN where its logits hold NaN, from this device's part of the logits.

    Under `shard_map`. Which way it goes is settled when it is traced, so that no device has to wait for its
    host in the middle of a step.

    Args:
      config: as of one device.
      rows: what `sample` goes by.
      whole: draws from whole rows; None: no row has top_k, top_p or min_p, and two numbers of each are all
        that devices tell each other.
    """
    assert config.share is not None
    if whole is None:
        return _draw_from_parts(config.share, logits, rows)
    if len(logits) < MANY:
        return whole(gathered(config, logits), rows)
    return _draw_by_rows(config.share, logits, rows, whole)


def _draw_from_parts(share: Share, logits: Float[Array, "s own"], rows: dict[str, Array]) -> Int[Array, " s"]:
    """The best of each part, then the best of these; of equal ones the first, as in the whole."""
    size = logits.shape[1]
    first = lax.axis_index(TENSOR) * size
    noise_of = {name: rows[name] for name in ("positions", "seed_high", "seed_low", "temperature")}
    scores = noisy(logits, first=first, **noise_of)
    if size * share.num_devices > share.vocab_size:
        token = first + lax.broadcasted_iota(jnp.int32, (1, size), 1)
        scores = jnp.where(token < share.vocab_size, scores, -jnp.inf)
    best = jnp.where(has_nan(scores), jnp.nan, jnp.max(scores, axis=-1))
    best = lax.bitcast_convert_type(best, jnp.int32)
    token = first + jnp.argmax(scores, axis=-1).astype(jnp.int32)
    bests, tokens = lax.all_gather(jnp.stack([best, token]), TENSOR, axis=1)
    scores = lax.bitcast_convert_type(bests, jnp.float32)
    winner = jnp.argmax(scores, axis=0)[None]
    drawn = jnp.take_along_axis(tokens, winner, axis=0)[0]
    return jnp.where(has_nan(scores.T), BROKEN, drawn)


def _draw_by_rows(
    share: Share, logits: Float[Array, "s own"], rows: dict[str, Array], whole: DrawWhole
) -> Int[Array, " s"]:
    """Each device samples its part of the rows, whose logits the others send it: a part of all, not all."""
    num_rows, num_devices = len(logits), share.num_devices
    size = -(-num_rows // num_devices)  # rows of a device; the last ones may be padding

    def grown(x: Array) -> Array:
        return jnp.pad(x, ((0, size * num_devices - num_rows), *((0, 0),) * (x.ndim - 1)))

    own_rows = lax.all_to_all(grown(logits), TENSOR, split_axis=0, concat_axis=1, tiled=True)
    at = lax.axis_index(TENSOR) * size
    own = {name: lax.dynamic_slice_in_dim(grown(x), at, size) for name, x in rows.items()}
    tokens = whole(own_rows[:, : share.vocab_size], own)
    return lax.all_gather(tokens, TENSOR, tiled=True)[:num_rows]
