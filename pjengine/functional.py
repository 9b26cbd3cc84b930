"""Prefill and decode as pure functions: to jit, vmap, scan, shard and export in a program of your own.

There is no engine, no hidden state and no call back to the host: parameters and KV pages go in, logits and KV
pages come out. Layers and kernels are those that serve. A whole program that continues two prompts of
different lengths:

>>> import jax, jax.numpy as jnp
>>> from pjengine import functional
>>> model, params = functional.load("demo")
>>> @jax.jit
... def generate(params, tokens, lengths, key, temperature):
...     cache = functional.init_cache(model, len(tokens), tokens.shape[1] + 8)
...     logits, cache = functional.prefill(model, params, cache, tokens, lengths)
...
...     def step(carry, key):
...         logits, cache = carry
...         noise = temperature * jax.random.gumbel(key, logits.shape)
...         token = jnp.argmax(logits + noise, axis=-1)
...         return functional.decode_step(model, params, cache, token), token
...
...     _, drawn = jax.lax.scan(step, (logits, cache), jax.random.split(key, 8))
...     return drawn.T
>>> tokens = jnp.array([[316, 426, 0], [316, 301, 198]])  # padded on the right
>>> generate(params, tokens, jnp.array([2, 3]), jax.random.key(0), 0.0).shape
(2, 8)

`jax.vmap` of a function of one prompt makes one batch of all: kernels run once, and weights are read once
(`_folded`). A cache that is a carry of `scan`, or donated to `jit`, is updated in place. On a GPU, `jax.jit`
wants the `compiler_options()`.

Over several devices use `jax.shard_map` with `check_vma=False`: every array of a cache has its rows or pages
on the first axis, and each device keeps its own. Under `jax.jit` with sharded inputs the result is the same,
but XLA knows nothing of which page is whose, and sends them around.

`jax.export` takes all of it. What it writes holds the kernels of the platform that it was traced on; Pallas's
Triton kernels want `disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]`,
since their format may change with JAX.
"""

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Int

from pjengine.config import EngineConfig, is_whole, known_settings
from pjengine.loading import load_alone
from pjengine.models.attention import PagedAttend
from pjengine.models.decoder import Decoder, Params
from pjengine.models.pair import Pair
from pjengine.models.state import Batch, KVCache, kv_shape
from pjengine.pallas_kernels.dispatch import platform
from pjengine.step_compiler import COMPILER_OPTIONS

# Plain arrays by name, so that an exported program is loaded where pjengine is not.
#   k, v: [layers * pages, kv_heads, page_size, head_dim], layer after layer; page 0 of each holds nothing
#   page_table: [rows, pages_per_row], the pages of each row in order; rows may be made to share some
#   lengths: [rows], tokens of each row that the pages hold; 0 begins a row anew
#   prompt_lengths: [rows], of these by `prefill`: dynamic RoPE scaling goes by them
type Cache = dict[str, Array]

# What says which model is loaded, and how. Other settings are of an engine.
_LOAD_SETTINGS = (
    *("dtype", "load_format", "seed", "revision", "download_dir", "hf_token", "hf_overrides"),
    "use_tqdm_on_load",
)


def load(model: str | os.PathLike[str], **settings: Any) -> tuple[Decoder, Params]:
    """A model and its parameters, on the first device, without an engine.

    Where there is an `LLM`, its `model` and `params` are the same, and take no further memory.

    Args:
      model: as of `LLM`: a folder, a Hub id, or "demo".
      **settings: dtype, load_format, seed, revision, download_dir, hf_token, hf_overrides and
        use_tqdm_on_load, as of `LLM`.

    Raises:
      TypeError: another setting.
      ValueError, OSError: the model or a setting is not possible; the text says what to change.
    """
    if strange := [name for name in settings if name not in _LOAD_SETTINGS]:
        raise TypeError(f"load takes {', '.join(_LOAD_SETTINGS)}; got {strange[0]!r}, which is of an LLM")
    return load_alone(EngineConfig(model=os.fspath(model), **known_settings(settings)))


def compiler_options() -> dict[str, Any]:
    """What the engine tells XLA on this platform, for the `compiler_options` of `jax.jit`.

    Without them, a GPU's program copies the weights of each product that it leaves to XLA, as most of 129 to
    1024 rows are.
    """
    return dict(COMPILER_OPTIONS.get(platform(), {}))


def init_cache(model: Decoder, batch_size: int, max_len: int, *, page_size: int = 16) -> Cache:
    """KV pages for `batch_size` rows of at most `max_len` tokens each, prompt and answer together.

    All layers keep all tokens, those that see a window too.

    Raises:
      ValueError: a size is not possible, or the model is divided among devices.
    """
    _check_model(model)
    most = model.config.max_model_len
    for name, value, limit in (("batch_size", batch_size, 2**31), ("max_len", max_len, most + 1)):
        if not is_whole(value) or not 1 <= value < limit:
            raise ValueError(
                f"{name} must be a whole number of at least 1 and less than {limit}, got {value!r}"
            )
    if not is_whole(page_size) or page_size < 16 or page_size & (page_size - 1):
        raise ValueError(f"page_size must be a power of two and at least 16, got {page_size!r}")
    width = -(-max_len // page_size)
    shape = kv_shape(model.config, 1 + batch_size * width, page_size)
    none = jnp.zeros(batch_size, jnp.int32)
    return {
        "k": jnp.zeros(shape, model.dtype),
        "v": jnp.zeros(shape, model.dtype),
        "page_table": 1 + jnp.arange(batch_size * width, dtype=jnp.int32).reshape(batch_size, width),
        "lengths": none,
        "prompt_lengths": none,
    }


def prefill(
    model: Decoder,
    params: Params,
    cache: Cache,
    tokens: Int[Array, "b t"],
    lengths: Int[Array, " b"] | None = None,
    *,
    backend: str | None = None,
) -> tuple[Float[Array, "b v"], Cache]:
    """Reads prompts, or more of them; returns the float32 logits after each row's last token.

    A row goes on behind the tokens that it has, so that a long prompt can be read in parts (all at once where
    the model has dynamic RoPE scaling, which goes by the whole prompt's length).

    Args:
      cache: consumed under donation.
      tokens: padded on the right, with whatever.
      lengths: how many of `tokens` are real; None: all. A row with 0 stays as it is, and its logits are NaN.
      backend: of the kernels; None: the best that this platform and these shapes allow.

    A row that has no room for its tokens (`init_cache`), a length that `tokens` do not have, or a token that
    the vocabulary does not have, is left as it is, too: its logits are NaN, since a program under way cannot
    raise.

    Raises:
      ValueError: shapes do not fit each other, or the model is divided among devices.
    """
    _check_rows(model, cache, tokens, ndim=2)
    num_rows, width = tokens.shape
    if lengths is None:
        lengths = jnp.full(num_rows, width, jnp.int32)
    if lengths.shape != (num_rows,):
        raise ValueError(f"lengths must be [{num_rows}], one for each row of tokens; got {lengths.shape}")
    wanted = lengths.astype(jnp.int32)
    is_known = _is_known(model, tokens) | (jnp.arange(width)[None] >= wanted[:, None])
    is_possible = (wanted >= 1) & (wanted <= width) & jnp.all(is_known, axis=1)
    is_possible &= cache["lengths"] + wanted <= _room(model, cache)
    counts = jnp.where(is_possible, wanted, 0)
    after = cache["lengths"] + counts
    prompt_lengths = jnp.where(is_possible, after, cache["prompt_lengths"])
    rows = _Rows(cache["page_table"], cache["lengths"], prompt_lengths, tokens.astype(jnp.int32), counts)
    return _advance(model, params, cache, rows, after, prompt_lengths, is_possible, backend)


def decode_step(
    model: Decoder,
    params: Params,
    cache: Cache,
    tokens: Int[Array, " b"],
    *,
    backend: str | None = None,
) -> tuple[Float[Array, "b v"], Cache]:
    """Appends one token to each row; returns the float32 logits after it.

    A row that is full, or whose token is not in the vocabulary, stays as it is, and its logits are NaN.

    Raises:
      ValueError: as `prefill`.
    """
    _check_rows(model, cache, tokens, ndim=1)
    is_possible = (cache["lengths"] < _room(model, cache)) & _is_known(model, tokens)
    counts = is_possible.astype(jnp.int32)
    after, prompt_lengths = cache["lengths"] + counts, cache["prompt_lengths"]
    rows = _Rows(cache["page_table"], cache["lengths"], prompt_lengths, tokens.astype(jnp.int32), counts)
    return _advance(model, params, cache, rows, after, prompt_lengths, is_possible, backend)


class _Rows(NamedTuple):
    """What is to be computed of each row."""

    page_table: Int[Array, "b w"]
    lengths: Int[Array, " b"]  # before
    prompt_lengths: Int[Array, " b"]
    tokens: Int[Array, "b t"] | Int[Array, " b"]  # of prompts, or the one of a decode
    counts: Int[Array, " b"]  # of `tokens`, from the first on


def _check_model(model: Decoder) -> None:
    if not isinstance(model, Decoder) or isinstance(model, Pair):
        raise TypeError(f"model must be what `load` returns, or `LLM.model`; got {type(model).__name__}")
    if model.num_devices > 1:
        raise ValueError(
            f"the model is divided among {model.num_devices} devices: take one of `functional.load`, or "
            "of an LLM with tensor_parallel_size=1"
        )


def _check_rows(model: Decoder, cache: Cache, tokens: Array, *, ndim: int) -> None:
    _check_model(model)
    num_rows = len(cache["page_table"])
    if tokens.ndim != ndim or len(tokens) != num_rows or tokens.size == 0:
        wanted = f"[{num_rows}]" if ndim == 1 else f"[{num_rows}, length]"
        raise ValueError(
            f"tokens must be {wanted}, for the {num_rows} rows of the cache; got {list(tokens.shape)}"
        )
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be whole numbers, got {tokens.dtype}")


def _is_known(model: Decoder, tokens: Int[Array, "*t"]) -> Bool[Array, "*t"]:
    return (tokens >= 0) & (tokens < model.config.vocab_size)


def _room(model: Decoder, cache: Cache) -> int:
    """Tokens that a row can have: whole pages, as far as the model has positions."""
    return min(cache["page_table"].shape[1] * cache["k"].shape[2], model.config.max_model_len)


def _advance(
    model: Decoder,
    params: Params,
    cache: Cache,
    rows: _Rows,
    after: Int[Array, " b"],
    prompt_lengths: Int[Array, " b"],
    is_possible: Array,
    backend: str | None,
) -> tuple[Float[Array, "b v"], Cache]:
    num_pages = cache["k"].shape[0] // model.config.num_layers
    logits, k, v = _folded(model, num_pages, backend)(params, cache["k"], cache["v"], rows)
    logits = jnp.where(is_possible[:, None], logits, jnp.nan)
    return logits, {**cache, "k": k, "v": v, "lengths": after, "prompt_lengths": prompt_lengths}


def _folded(model: Decoder, num_pages: int, backend: str | None) -> Any:
    """The model over the rows of a cache; under vmap, over the rows of all caches at once.

    Pages of the mapped caches lie one cache after the other, and page tables are moved to them. So the
    kernels see one batch, as if nobody had mapped, and nothing is copied.
    """

    def compute(params: Params, k: Array, v: Array, rows: _Rows) -> tuple[Array, Array, Array]:
        page_size = k.shape[2]
        batch = _decode_batch(rows, page_size) if rows.tokens.ndim == 1 else _prefill_batch(rows, page_size)
        cache = KVCache(
            k, v, token_ids=jnp.zeros((0, page_size), jnp.int32)
        )  # the engine's; nothing reads it
        attend = PagedAttend(batch, num_pages, backend)
        inputs = (batch.tokens, batch.positions, batch.rope_lens)
        hidden, written = model.run(params, *inputs, cache, attend)
        assert written is not None
        last = hidden if batch.cu_q_lens is None else hidden[jnp.maximum(batch.cu_q_lens[1:] - 1, 0)]
        return model.logits(params, last), written.k, written.v

    run = custom_vmap(compute)

    @run.def_vmap
    def over_all(
        axis_size: int, is_mapped: Any, params: Params, k: Array, v: Array, rows: _Rows
    ) -> tuple[tuple[Array, Array, Array], tuple[bool, bool, bool]]:
        if any(jax.tree.leaves(is_mapped[0])):  # several models: nothing to share
            axes = jax.tree.map(lambda own: 0 if own else None, is_mapped)
            return jax.vmap(compute, in_axes=axes)(params, k, v, rows), (True, True, True)

        def flat(array: Array, own: bool) -> Array:
            every = array if own else jnp.broadcast_to(array, (axis_size, *array.shape))
            return every.reshape(-1, *every.shape[2:])

        _, *is_own = is_mapped
        k, v, rows = jax.tree.map(flat, (k, v, rows), tuple(is_own))
        first = len(k) // axis_size * jnp.arange(axis_size, dtype=jnp.int32)
        moved = rows.page_table + jnp.repeat(first, len(rows.lengths) // axis_size)[:, None]
        out = _folded(model, num_pages, backend)(params, k, v, rows._replace(page_table=moved))
        return jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), out), (True, True, True)

    return run


def _decode_batch(rows: _Rows, page_size: int) -> Batch:
    seq = jnp.arange(len(rows.tokens), dtype=jnp.int32)
    kv_lens = rows.lengths + rows.counts
    positions = jnp.maximum(kv_lens - 1, 0)  # of a row that is full, its last one
    slots = _slots(rows, seq, positions, page_size, rows.counts > 0)
    rope_lens = jnp.maximum(positions + 1, rows.prompt_lengths)
    return Batch(rows.tokens, positions, rope_lens, slots, rows.page_table, kv_lens, None)


def _prefill_batch(rows: _Rows, page_size: int) -> Batch:
    """Real tokens laid flat, row after row, and padding behind them all."""
    num_rows, width = rows.tokens.shape
    ends = jnp.cumsum(rows.counts, dtype=jnp.int32)
    cu_q_lens = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    token = jnp.arange(num_rows * width, dtype=jnp.int32)
    # Not the default method: its loop would be driven by the host.
    seq = jnp.searchsorted(ends, token, side="right", method="compare_all").astype(jnp.int32)
    seq, is_token = jnp.minimum(seq, num_rows - 1), token < ends[-1]
    within = jnp.where(is_token, token - cu_q_lens[seq], 0)
    positions = jnp.where(is_token, rows.lengths[seq] + within, 0)
    return Batch(
        tokens=jnp.where(is_token, rows.tokens[seq, within], 0),
        positions=positions,
        rope_lens=jnp.maximum(positions + 1, rows.prompt_lengths[seq]),
        slots=_slots(rows, seq, positions, page_size, is_token),
        page_table=rows.page_table,
        kv_lens=rows.lengths + rows.counts,
        cu_q_lens=cu_q_lens,
    )


def _slots(
    rows: _Rows, seq: Int[Array, " t"], positions: Int[Array, " t"], page_size: int, is_token: Array
) -> Int[Array, " t"]:
    page = rows.page_table[seq, positions // page_size]
    return jnp.where(is_token, page * page_size + positions % page_size, -1)
