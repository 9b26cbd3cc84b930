"""What the tests of whole models share: random parameters, errors, and steps over KV pages."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjengine.models.attention import PagedAttend
from pjengine.models.decoder import Decoder
from pjengine.models.state import Batch, KVCache, kv_shape

PAGE_SIZE = 16


def random_params(model: Decoder, *, scale: float = 0.1) -> Any:
    """Norms and biases that are not all ones and zeros."""
    params = model.init(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 100))
    return jax.tree.map(lambda x: x + scale * jax.random.normal(next(keys), x.shape, x.dtype), params)


def widened(params: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), params)


def error(found: Any, wanted: Any) -> float:
    """Relative, of all elements together."""
    found, wanted = (np.asarray(x, np.float32) for x in (found, wanted))
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def logits_of(
    model: Decoder, params: Any, prompts: Sequence[np.ndarray], forced: np.ndarray, backend: str | None
) -> np.ndarray:
    """[steps + 1, seqs, vocab]: of the prompts, read in one step, and of decode steps with tokens `forced`.

    `forced` is [steps, seqs]. The first step ends with padding, as a program of more tokens would have it.
    """
    lens = np.array([len(prompt) for prompt in prompts], np.int32)
    width = -(-(int(lens.max()) + len(forced)) // PAGE_SIZE)
    num_pages = 1 + len(prompts) * width
    table = jnp.asarray(1 + np.random.default_rng(0).permutation(num_pages - 1).reshape(-1, width), jnp.int32)
    pages = jnp.zeros(kv_shape(model.config, num_pages, PAGE_SIZE), model.dtype)
    cache = KVCache(pages, jnp.zeros_like(pages), jnp.zeros((num_pages, PAGE_SIZE), jnp.int32))

    @jax.jit
    def step(params: Any, cache: Any, tokens: Any, seq: Any, positions: Any, kv_lens: Any, cu: Any) -> Any:
        at = jnp.maximum(positions, 0)
        slots = table[seq, at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE
        slots = jnp.where(positions >= 0, slots, -1)
        batch = Batch(tokens, at, at + 1, slots, table, kv_lens, cu)
        attend = PagedAttend(batch, num_pages, backend)
        hidden, cache = model.run(params, tokens, at, at + 1, cache, attend)
        last = hidden if cu is None else hidden[cu[1:] - 1]
        return model.logits(params, last), cache

    num_padding = -int(lens.sum()) % 64
    positions = np.concatenate([*map(np.arange, lens), np.full(num_padding, -1)]).astype(np.int32)
    seq = np.concatenate([np.repeat(np.arange(len(lens)), lens), np.zeros(num_padding)]).astype(np.int32)
    tokens = np.concatenate([*prompts, np.zeros(num_padding)]).astype(np.int32)
    cu = np.cumsum([0, *lens]).astype(np.int32)
    found, cache = step(params, cache, tokens, seq, positions, lens, cu)
    logits = [found]
    for i, row in enumerate(forced):
        arrays = (row, np.arange(len(lens), dtype=np.int32), lens + i, lens + i + 1)
        found, cache = step(params, cache, *arrays, None)
        logits.append(found)
    return np.asarray(jnp.stack(logits), np.float32)
