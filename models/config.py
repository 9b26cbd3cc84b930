"""The shape of a decoder-only model: what the engine and the pieces that architectures share must know."""

import math
from dataclasses import dataclass
from typing import Literal

from pjengine.models.rope import RopeConfig

type Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu"]
# How queries and keys are normalized before they are rotated: each head with one weight for all heads, each
# head with a weight of its own, or all heads of a token together.
type QKNorm = Literal["head", "own", "full"]


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """What the layers of a mixture of experts share; an expert is a gated MLP."""

    num_experts: int
    num_choices: int  # experts of a token
    inner_size: int  # of one expert
    # Whether a token's weights are the softmax over its choices, which is that over all experts divided by
    # its sum over the choices; else they are the softmax over all experts, and add up to less than one.
    is_normalized: bool = True
    has_router_bias: bool = False
    has_bias: bool = False  # of both products of an expert
    # (up + up_offset) * gate * sigmoid(gate_alpha * gate): by default silu(gate) * up.
    gate_alpha: float = 1.0
    gate_limit: float | None = None  # gates are cut off above it, ups above it and below -gate_limit
    up_offset: float = 0.0
    # Among devices that compute a layer together: whether each has some of the experts, and these whole; else
    # it has a part of every one.
    is_whole: bool = False
    num_held: int | None = None  # whole experts that are stored, with those of padding; None: num_experts

    def __post_init__(self) -> None:
        if not 1 <= self.num_choices <= self.num_experts:
            raise ValueError(
                f"num_choices must be in 1..num_experts, {self.num_experts}; got {self.num_choices}"
            )


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one of several devices that compute a model together must know of the whole."""

    num_devices: int
    vocab_size: int
    num_heads: int  # on all devices together, without padding
    num_kv_heads: int  # the same, repeated ones as often as they are there


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder-only model. Sizes are in elements, lengths in tokens.

    The defaults are Llama's form. What a single architecture needs beside these fields belongs into a
    subclass in its own file.
    """

    architecture: str  # its name in the registry
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int

    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # added to a norm's weight: 1 where checkpoints hold the weight less 1
    has_norm_weight: bool = True
    has_norm_bias: bool = False
    has_embedding_norm: bool = False
    has_final_norm: bool = True
    has_pre_norms: bool = True  # of what goes into attention and MLP
    has_post_norms: bool = False  # of what comes out, before it is added
    is_parallel: bool = False  # attention and MLP read the same hidden states
    has_mlp_norm: bool = True  # where parallel: the MLP has a norm of its own, and not attention's

    rope: RopeConfig | None = None  # None: queries and keys are not rotated
    layer_ropes: tuple[RopeConfig | None, ...] = ()  # by layer, repeated; empty: `rope` in all
    has_learned_positions: bool = False  # then sequences can be no longer than max_position_embeddings
    position_offset: int = 0  # the row of the table of learned positions that the first token takes
    alibi_slopes: tuple[float, ...] | None = None  # by head

    attention_scale: float | None = None  # None: 1 / sqrt(head_dim)
    attention_softcap: float | None = None
    # How many tokens each token sees, itself included; None: all before it. By layer, repeated.
    layer_windows: tuple[int | None, ...] = (None,)
    has_sinks: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    clip_qkv: float | None = None
    qk_norm: QKNorm | None = None
    has_qk_norm_bias: bool = False

    activation: Activation = "silu"
    is_gated: bool = True  # activation(gate) * up; else activation(up)
    mlp_bias: bool = False
    experts: ExpertConfig | None = None  # instead of one MLP
    dense_layers: tuple[int, ...] = ()  # that have one MLP all the same, by number; not all

    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and MLP add
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    tie_word_embeddings: bool = False
    head_bias: bool = False

    # Not None: heads, the inner sizes of MLPs or the experts, and the vocabulary are those of one device (see
    # `share`).
    share: Share | None = None

    dtype: str = "float32"  # of the checkpoint's weights
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads head_dim "
            "max_position_embeddings"
        ).split():
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.dense_layers and (
            self.experts is None or set(self.dense_layers) >= set(range(self.num_layers))
        ):
            raise ValueError(
                f"dense_layers must leave layers to the experts, got {self.dense_layers} of {self.num_layers}"
            )
        for rope in (self.rope, *self.layer_ropes):
            if rope is not None and rope.rotary_dim > self.head_dim:
                raise ValueError(
                    f"rotary_dim must be at most head_dim, got {rope.rotary_dim} and {self.head_dim}"
                )

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def is_like_llama(self) -> bool:
        """Whether layers are put together as Llama's are. Biases, and how they attend else, may differ."""
        return (
            (self.norm, self.norm_offset, self.has_norm_weight) == ("rms", 0.0, True)
            and (self.has_pre_norms and not self.has_post_norms and not self.is_parallel)
            and (self.qk_norm is None and self.clip_qkv is None and self.residual_scale == 1)
            and (self.experts is None and self.is_gated and self.activation == "silu")
        )

    @property
    def scale(self) -> float:
        """What the products of queries and keys are multiplied with."""
        return 1 / math.sqrt(self.head_dim) if self.attention_scale is None else self.attention_scale

    @property
    def max_model_len(self) -> int:
        """The longest sequence the position scheme supports, in tokens; derived as vLLM does."""
        if self.rope is not None and self.rope.kind == "yarn":
            return int(self.rope.original_max_position_embeddings * self.rope.factor)
        if self.rope is not None and self.rope.kind in ("linear", "dynamic"):
            return int(self.max_position_embeddings * self.rope.factor)
        return self.max_position_embeddings

    def rope_of(self, layer: int) -> RopeConfig | None:
        return self.layer_ropes[layer % len(self.layer_ropes)] if self.layer_ropes else self.rope

    def window_of(self, layer: int) -> int | None:
        return self.layer_windows[layer % len(self.layer_windows)]

    def windowed_layers(self, max_len: int) -> dict[int, int]:
        """The layers where a token of a sequence of `max_len` may not see them all, and how many it sees."""
        windows = {layer: self.window_of(layer) for layer in range(self.num_layers)}
        return {layer: window for layer, window in windows.items() if window is not None and window < max_len}

    @property
    def has_whole_experts(self) -> bool:
        return self.experts is not None and self.experts.is_whole

    def experts_of(self, layer: int) -> ExpertConfig | None:
        return None if layer in self.dense_layers else self.experts

    def rope_excess(self, prompt_len: int) -> int:
        """A number that prompts of different lengths share only if their tokens are rotated alike."""
        ropes = (self.rope, *self.layer_ropes)
        return max(0 if rope is None else rope.excess(prompt_len) for rope in ropes)
