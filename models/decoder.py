"""A decoder-only model as pure functions over a parameter tree: what the engine runs.

An architecture is a subclass of `Decoder`: its `read_config`, its `weight_table`, and where its layers differ
its `block`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pjengine.models.attention import Attend, PagedAttend, Rotary, dense_attend
from pjengine.models.block import Block, Layer, normal
from pjengine.models.config import ModelConfig
from pjengine.models.config_reader import ConfigReader
from pjengine.models.fused_decode import fused_layers, is_fused
from pjengine.models.kept_states import KeptStates
from pjengine.models.layers import normalize, rotary_table, soft_cap, unembed
from pjengine.models.likelihood import chosen_logprobs
from pjengine.models.rope import RopeConfig
from pjengine.models.share import embedded, gathered, is_even, padded, share_of
from pjengine.models.state import KVCache
from pjengine.models.summed_layers import is_summed, summed_layers
from pjengine.models.weight_table import WeightTable

type Params = dict[str, Any]
# What is done to the states on their way: the number of the place, as `KeptStates` counts, and all states.
type StateEdit = Callable[[int, Array], Array]


@dataclass(frozen=True)
class Decoder:
    """Pure functions over a parameter tree whose layers are stacked on a leading axis."""

    config: ModelConfig
    dtype: jnp.dtype
    # That compute it together; then all but `init` runs under `shard_map`.
    num_devices: int = field(default=1, kw_only=True)
    # A token's results have the same bits whatever else is in its step, where kernels can make the products.
    is_batch_invariant: bool = field(default=False, kw_only=True)
    block: ClassVar[type[Block]] = Block

    @staticmethod
    def read_config(reader: ConfigReader) -> ModelConfig:
        """What a checkpoint's config.json says; every key that the architecture has is read.

        Raises:
          ValueError: a key is missing, or holds a value of the wrong type.
          NotImplementedError: the config asks for something this engine does not do.
        """
        raise NotImplementedError

    def weight_table(self) -> WeightTable:
        """Where each parameter comes from in a Hugging Face checkpoint."""
        raise NotImplementedError

    def unpacked(self) -> "Decoder":
        """The same model as of a checkpoint that packs no weights: so they are written."""
        return self

    @cached_property
    def own(self) -> ModelConfig:
        """With the sizes that they have on one device."""
        return share_of(self.config, self.num_devices)

    @property
    def stacks(self) -> Mapping[str, tuple[int, ...]]:
        """The numbers of the layers whose parameters lie in each stack: those of one shape."""
        dense = tuple(n for n in range(self.config.num_layers) if n in self.config.dense_layers)
        others = tuple(n for n in range(self.config.num_layers) if n not in self.config.dense_layers)
        return {"layers": others, "dense_layers": dense} if dense else {"layers": others}

    def init(self, key: Array) -> Params:
        """Random parameters, of all devices together; under `jax.eval_shape`, their shapes."""
        c = padded(self.config, self.num_devices)
        embed_key, head_key, layer_key = jax.random.split(key, 3)
        x = jnp.zeros((1, c.hidden_size), self.dtype)
        position = jnp.zeros((1,), jnp.int32)
        rotary = self._rotary_tables(position, position)
        block, keys = self.block(c, self.dtype), jax.random.split(layer_key, c.num_layers)
        params: Params = {"embed": normal(embed_key, (c.vocab_size, c.hidden_size), self.dtype)}
        for name, numbers in self.stacks.items():
            layer = Layer(numbers[0], dense_attend, rotary[numbers[0]])

            def init_layer(layer_key: Array, layer: Layer = layer) -> Params:
                return block.init(layer_key, x, layer)["params"]

            params[name] = jax.vmap(init_layer)(keys[jnp.asarray(numbers)])
        names = ("embed_norm",) * c.has_embedding_norm + ("final_norm",) * c.has_final_norm
        for name in names:
            if c.has_norm_weight:
                params[name] = jnp.full((c.hidden_size,), 1 - c.norm_offset, self.dtype)
            if c.has_norm_bias:
                params[f"{name}_bias"] = jnp.zeros((c.hidden_size,), self.dtype)
        if c.has_learned_positions:
            shape = (c.max_position_embeddings + c.position_offset, c.hidden_size)
            params["positions"] = normal(jax.random.fold_in(embed_key, 1), shape, self.dtype)
        if not c.tie_word_embeddings:
            params["head"] = normal(head_key, (c.vocab_size, c.hidden_size), self.dtype)
        if c.head_bias:
            params["head_bias"] = jnp.zeros((c.vocab_size,), self.dtype)
        return params

    def run(
        self,
        params: Params,
        tokens: Int[Array, "*t"],
        positions: Int[Array, "*t"],
        rope_lens: Int[Array, "*t"],
        cache: KVCache | None,
        attend: Attend,
    ) -> tuple[Float[Array, "*t e"], KVCache | None]:
        """Token ids to final hidden states, before the last norm."""
        hidden, cache, _ = self.run_keeping(params, tokens, positions, rope_lens, cache, attend, None)
        return hidden, cache

    def run_keeping(
        self,
        params: Params,
        tokens: Int[Array, "*t"],
        positions: Int[Array, "*t"],
        rope_lens: Int[Array, "*t"],
        cache: KVCache | None,
        attend: Attend,
        kept: KeptStates | None,
        edit: StateEdit | None = None,
        *,
        remat: bool = False,
    ) -> tuple[Float[Array, "*t e"], KVCache | None, KeptStates | None]:
        """The same; puts what goes into each layer, and what the last norm makes of the end, into `kept`.

        `edit` changes them before: what goes into each layer, and the end before the last norm.
        With `remat`, a derivative computes each layer anew from what goes into it, and keeps nothing else.
        Layers are unrolled and take static slices of the stacked weights: a scan would make XLA
        copy every layer's weights each step.
        """
        c = self.own
        x = self.embed(params, tokens, positions, cache)
        rotary = self._rotary_tables(positions, rope_lens)
        if isinstance(attend, PagedAttend) and cache is not None and self.block is Block and edit is None:
            table = rotary[0]
            if kept is None and table is not None and is_fused(c, x, attend):
                return *fused_layers(params, c, x, table, cache, attend), None
            if is_summed(params, c, x, cache, attend):
                x, cache, kept = summed_layers(params, c, x, rotary, cache, attend, kept)
                return x, cache, self._kept_last(params, kept, x)
        # A backend that is named for all ops keeps to the reference here; `jax_triton` is of attention only.
        is_free = isinstance(attend, PagedAttend) and attend.backend in (None, "jax_triton")
        block = self.block(c, self.dtype)
        of_layer = {n: (name, place) for name, ns in self.stacks.items() for place, n in enumerate(ns)}
        for number in range(c.num_layers):
            x = x if edit is None else edit(number, x)
            kept = None if kept is None else kept.put(number, x)
            name, place = of_layer[number]
            stack = params[name]
            own_stack = stack if is_free else None
            layer = Layer(number, attend, rotary[number], cache, own_stack, place, self.is_batch_invariant)
            with jax.named_scope(f"layer_{number}"):
                x, cache = _compute(block, stack, x, layer, remat)
        x = x if edit is None else edit(c.num_layers, x)
        return x, cache, self._kept_last(params, kept, x)

    def _kept_last(
        self, params: Params, kept: KeptStates | None, x: Float[Array, "*t e"]
    ) -> KeptStates | None:
        """With what the last norm makes of the end."""
        c = self.config
        if kept is None:
            return None
        return kept.put(c.num_layers, self.normalize(params, "final_norm", x) if c.has_final_norm else x)

    def embed(
        self,
        params: Params,
        tokens: Int[Array, "*t"],
        positions: Int[Array, "*t"],
        cache: KVCache | None = None,
    ) -> Float[Array, "*t e"]:
        """What goes into the first layer. The cache is for sums over devices, as `total` takes it."""
        c = self.own
        x = embedded(c, params["embed"], tokens, cache)
        if c.embedding_scale != 1:
            x = x * jnp.asarray(c.embedding_scale, x.dtype)
        if c.has_learned_positions:
            x = x + params["positions"][positions + c.position_offset]
        return self.normalize(params, "embed_norm", x) if c.has_embedding_norm else x

    def logits(self, params: Params, hidden: Float[Array, "*t e"]) -> Float[Array, "*t v"]:
        """Final hidden states to float32 logits."""
        return gathered(self.own, self.own_logits(params, hidden))

    def own_logits(self, params: Params, hidden: Float[Array, "*t e"]) -> Float[Array, "*t own"]:
        """Those of this device's part of the vocabulary, which may end in padding; of one device, all."""
        c = self.own
        h = self.normalize(params, "final_norm", hidden) if c.has_final_norm else hidden
        table = params["embed" if c.tie_word_embeddings else "head"]
        logits = unembed(h, table, params.get("head_bias"), is_batch_invariant=self.is_batch_invariant)
        if c.logit_scale != 1:
            logits = logits * c.logit_scale
        return logits if c.logit_softcap is None else soft_cap(logits, c.logit_softcap)

    def forward(
        self,
        params: Params,
        tokens: Int[Array, "b t"],
        *,
        prompt_lens: Int[Array, " b"] | None = None,
        remat: bool = False,
    ) -> Float[Array, "b t v"]:
        """Float32 logits of whole sequences without a cache: for training and scoring, differentiable.

        A reference: attention has the scores of all pairs of a row's tokens, b * num_heads * t * t numbers.
        Shorter rows end in any tokens: no token sees what follows it. What they count in a loss is the
        caller's to say.

        Args:
          prompt_lens: of each row the tokens that were its prompt, as the rotary positions of the kinds
            "dynamic" and "longrope" need it for the logits that generation has had; others do not read it.
            None: all of them, padding included.
          remat: keep only what goes into each layer, and compute the rest anew for the derivative: memory for
            a third more time.

        Raises:
          ValueError: more tokens in a row than the model has learned positions.
          NotImplementedError: as of `whole`.
        """
        model = self.whole
        hidden = model._dense(params, tokens, _rope_lens(tokens, prompt_lens), remat)
        return model.logits(params, hidden)

    def logprobs(
        self,
        params: Params,
        tokens: Int[Array, "b t"],
        *,
        temperature: float = 1.0,
        prompt_lens: Int[Array, " b"] | None = None,
        remat: bool = False,
    ) -> Float[Array, "b t-1"]:
        """The float32 logprob of each token but the first, given those before it; differentiable.

        Of `forward`, whose arguments these are, without the logits of all positions at once: 1,024 at a time.

        Args:
          temperature: divides the logits. Logprobs that a request brings back are of 1.

        Raises:
          ValueError: fewer than two tokens in a row, a temperature that is not positive, or as of `forward`.
          NotImplementedError: as of `whole`.
        """
        if tokens.shape[1] < 2:
            raise ValueError(f"logprobs wants at least two tokens in a row, got the shape {tokens.shape}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}: greedy has no logprobs")
        model = self.whole
        hidden = model._dense(params, tokens[:, :-1], _rope_lens(tokens, prompt_lens)[:, :-1], remat)
        # Of what is not of a layer; `logits` reads no more.
        own = {name: leaf for name, leaf in params.items() if name not in model.stacks}
        return chosen_logprobs(model.logits, own, hidden, tokens[:, 1:], temperature=temperature)

    @cached_property
    def whole(self) -> "Decoder":
        """The model as one program over parameters that may be divided: XLA finds the sums.

        Raises:
          NotImplementedError: sizes do not divide by `num_devices`, and parameters are padded or repeated:
            their derivatives would be those of another model.
        """
        if not is_even(self.config, self.num_devices):
            raise NotImplementedError(
                f"forward wants heads, KV heads, vocabulary and inner sizes that {self.num_devices} divides; "
                "this model has others, and padded or repeated parameters: choose another "
                "tensor_parallel_size"
            )
        # Kernels whose sums do not depend on the number of rows have no derivative.
        return replace(self, num_devices=1, is_batch_invariant=False)

    def _dense(
        self, params: Params, tokens: Int[Array, "b t"], rope_lens: Int[Array, "b t"], remat: bool
    ) -> Float[Array, "b t e"]:
        check_length(self.config, tokens.shape[1])
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
        inputs = tokens, positions, rope_lens
        return self.run_keeping(params, *inputs, None, dense_attend, None, remat=remat)[0]

    def normalize(self, params: Params, name: str, x: Float[Array, "*t e"]) -> Float[Array, "*t e"]:
        """The norm called `name`, which is of no layer."""
        return normalize(self.config, x, params.get(name), params.get(f"{name}_bias"))

    def _rotary_tables(self, positions: Int[Array, "*t"], rope_lens: Int[Array, "*t"]) -> list[Rotary | None]:
        """The tokens' rotations, layer by layer; each kind is computed once."""
        ropes = [self.config.rope_of(number) for number in range(self.config.num_layers)]
        tables: dict[RopeConfig | None, Rotary | None] = {None: None}
        for rope in ropes:
            if rope is not None and rope not in tables:
                tables[rope] = rotary_table(rope, positions, rope_lens)
        return [tables[rope] for rope in ropes]


def check_length(config: ModelConfig, num_tokens: int) -> None:
    """Raises ValueError if a row of so many tokens ends past the learned positions."""
    if config.has_learned_positions and num_tokens > config.max_position_embeddings:
        raise ValueError(
            f"the model has {config.max_position_embeddings} positions, got {num_tokens} tokens in a row"
        )


def _rope_lens(tokens: Int[Array, "b t"], prompt_lens: Int[Array, " b"] | None) -> Int[Array, "b t"]:
    """The sequence length that `rotary_table` sees at each token."""
    num_rows, length = tokens.shape
    if prompt_lens is None:
        return jnp.full(tokens.shape, length, jnp.int32)
    if prompt_lens.shape != (num_rows,):
        raise ValueError(f"prompt_lens must have the shape ({num_rows},), got {prompt_lens.shape}")
    so_far = jnp.arange(1, length + 1, dtype=jnp.int32)
    return jnp.maximum(prompt_lens.astype(jnp.int32)[:, None], so_far[None])


def _compute(
    block: Block, stack: Params, x: Float[Array, "*t e"], layer: Layer, remat: bool
) -> tuple[Float[Array, "*t e"], KVCache | None]:
    """One layer, whose parameters are `stack` at `layer.place`."""

    # The slice is taken inside, so that a derivative keeps no copies of it.
    def compute(stack: Params, x: Array) -> Any:
        weights = jax.tree.map(lambda stacked: stacked[layer.place], stack)
        return block.apply({"params": weights}, x, layer)

    out, cache = (jax.checkpoint(compute) if remat else compute)(stack, x)
    return out, cache
