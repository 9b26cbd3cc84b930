"""What a checkpoint's config.json says about its model, checked key by key."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions: the base frequencies and how they are stretched beyond the trained length.

    `linear` and `dynamic` read `factor`; `dynamic` also `original_max_position_embeddings`, the length up to
    which it does not scale at all; `llama3` also the two `_freq_factor`s; `yarn` all but those.
    """

    kind: RopeKind
    theta: float
    rotary_dim: int
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = (
        1.0  # multiplies cos and sin; `from_hf` has derived it from mscale where yarn asks
    )
    truncate: bool = True  # yarn: round the ramp's ends outwards to whole dimensions

    def __post_init__(self) -> None:
        if self.rotary_dim <= 0 or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim must be positive and even, got {self.rotary_dim}: change head_dim")
        for name in ("theta", "factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"rope {name} must be > 0, got {getattr(self, name)}")
        if self.kind in ("dynamic", "llama3", "yarn") and self.original_max_position_embeddings <= 0:
            raise ValueError(
                f"rope {self.kind} needs original_max_position_embeddings > 0, "
                f"got {self.original_max_position_embeddings}"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder-only model. Sizes are in elements, lengths in tokens."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    dtype: str = "float32"  # of the checkpoint's weights
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in ("head_dim", "max_position_embeddings"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
            )

    @property
    def max_model_len(self) -> int:
        """The longest sequence the position scheme supports, in tokens; derived as vLLM does."""
        if self.rope.kind == "yarn":
            return int(self.rope.original_max_position_embeddings * self.rope.factor)
        if self.rope.kind in ("linear", "dynamic"):
            return int(self.max_position_embeddings * self.rope.factor)
        return self.max_position_embeddings

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Reads a config.json, as transformers 4 wrote it or as transformers 5 writes it.

        Raises:
          ValueError: a key is missing, or neither handled nor known to be irrelevant; or the architecture
            is unknown.
          NotImplementedError: the config asks for something this engine does not do.
        """
        return _architecture_parser(config)(config)


def rope_frequencies(rope: RopeConfig) -> tuple[Float[np.ndarray, " half"], float]:
    """Returns the inverse frequencies of the rotary_dim / 2 planes and the factor on cos and sin.

    For `dynamic` these are the unscaled frequencies, right up to `original_max_position_embeddings` tokens;
    beyond, the base grows with the length: see `dynamic_rope_theta`.

    Source: transformers.modeling_rope_utils 5.17; agrees with it to the last float32 bit or one off.
    """
    exponent = np.arange(0, rope.rotary_dim, 2, dtype=np.float32) / np.float32(rope.rotary_dim)
    # The power in float64, then rounded: closer to the true value than a float32 power of unknown make.
    wavelength = np.power(np.float64(rope.theta), exponent.astype(np.float64)).astype(np.float32)
    inv_freq = np.float32(1.0) / wavelength
    match rope.kind:
        case "linear":
            inv_freq = inv_freq / np.float32(rope.factor)
        case "llama3":
            inv_freq = _llama3_frequencies(rope, inv_freq)
        case "yarn":
            inv_freq = _yarn_frequencies(rope, wavelength)
    return inv_freq, rope.attention_factor


def dynamic_rope_theta(rope: RopeConfig, length: Any) -> Any:
    """Returns the base for sequences of `length` tokens under dynamic NTK scaling.

    `length` is a float, or a float array of numpy or JAX; the result is of the same kind. inv_freq is then
    `1 / theta ** (arange(0, rotary_dim, 2) / rotary_dim)`. A token is rotated with the base of the longest of
    three: its own position + 1, its prompt, `original_max_position_embeddings`; the caller takes the maximum.
    """
    dim = rope.rotary_dim
    grown = rope.factor * length / rope.original_max_position_embeddings - (rope.factor - 1.0)
    return rope.theta * grown ** (dim / (dim - 2))


def _llama3_frequencies(rope: RopeConfig, inv_freq: Float[np.ndarray, " half"]) -> Float[np.ndarray, " half"]:
    """Divides the frequencies of long waves by `factor`, keeps those of short waves, and blends between."""
    length = rope.original_max_position_embeddings
    low, high = rope.low_freq_factor, rope.high_freq_factor
    wavelength = np.float32(2 * math.pi) / inv_freq
    smooth = (np.float32(length) / wavelength - np.float32(low)) / np.float32(high - low)
    blended = (1 - smooth) * inv_freq / np.float32(rope.factor) + smooth * inv_freq
    is_long, is_short = wavelength > length / low, wavelength < length / high
    return np.where(is_long, inv_freq / np.float32(rope.factor), np.where(is_short, inv_freq, blended))


def _yarn_frequencies(rope: RopeConfig, wavelength: Float[np.ndarray, " half"]) -> Float[np.ndarray, " half"]:
    """Interpolates the slow planes, keeps the fast ones, with a linear ramp between.

    Source: Peng et al. 2023 (YaRN), eq. 17 and 23.
    """

    def plane_of(rotations: float) -> float:
        """The (fractional) dimension that turns `rotations` times over the trained length."""
        length = rope.original_max_position_embeddings
        return rope.rotary_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = plane_of(rope.beta_fast), plane_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    span = high - low or 0.001  # a step instead of a ramp, without a division by zero
    ramp = (np.arange(rope.rotary_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(span)
    keep = np.float32(1) - np.clip(ramp, np.float32(0), np.float32(1))
    interpolated = np.float32(1) / (np.float32(rope.factor) * wavelength)
    return interpolated * (1 - keep) + np.float32(1) / wavelength * keep


# Keys that say nothing about the forward pass: bookkeeping, training, and the generation defaults that
# transformers 4 copied into every config.json (those in generation_config.json are the ones that count).
IGNORED_KEYS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled _name_or_path
    _pre_quantization_dtype architectures attention_dropout attn_implementation auto_map bad_words_ids
    begin_suppress_tokens chunk_size_feed_forward decoder_start_token_id diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing hidden_dropout id2label initializer_range
    is_decoder is_llama_config label2id length_penalty max_length min_length model_type neftune_noise_alpha
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id prefix problem_type pruned_heads remove_invalid_values
    repetition_penalty resid_pdrop return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
    torchscript transformers.js_config transformers_version typical_p unsloth_fixed unsloth_version
    use_bfloat16 use_cache
    """.split()
)
# Keys that would change the forward pass, with the only values that leave it as it is. None is always fine.
NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "is_encoder_decoder": (False,),
    "partial_rotary_factor": (1.0,),
    "pretraining_tp": (
        0,
        1,
    ),  # above 1 it asks for matrix products split as in training, to match its rounding
    "quantization_config": ({},),
    "rope_interleaved": (False,),
    "sliding_window": (),
    "use_sliding_window": (False,),
}
# Keys read by `_parse_llama`, apart from those about RoPE.
_LLAMA_KEYS = frozenset(
    """
    attention_bias bos_token_id dtype eos_token_id head_dim hidden_act hidden_size intermediate_size
    max_position_embeddings mlp_bias num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps
    tie_word_embeddings torch_dtype vocab_size
    """.split()
)
_ROPE_KEYS = frozenset({"original_max_position_embeddings", "rope_parameters", "rope_scaling", "rope_theta"})
# Other names under which old conversions recorded max_position_embeddings.
_LENGTH_KEYS = ("max_sequence_length", "max_seq_len", "max_seq_length", "model_max_length", "seq_length")
_DTYPES = ("float32", "bfloat16", "float16")


def _architecture_parser(config: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], ModelConfig]:
    names = config.get("architectures") or ()
    for name in names:
        if name in _PARSERS:
            return _PARSERS[name]
    raise ValueError(
        f"config.json must name one of the architectures {sorted(_PARSERS)}, got architectures={list(names)}"
    )


def _parse_llama(config: Mapping[str, Any]) -> ModelConfig:
    """`LlamaForCausalLM`; defaults are those of transformers' LlamaConfig."""
    _check_keys(config, _LLAMA_KEYS | _ROPE_KEYS | set(_LENGTH_KEYS))
    hidden_size, num_heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    head_dim = _size(config, "head_dim", default=hidden_size // num_heads)
    if config.get("head_dim") is None and hidden_size % num_heads:
        raise ValueError(
            f"hidden_size must be a multiple of num_attention_heads where head_dim is not given, "
            f"got {hidden_size} and {num_heads}: add head_dim to config.json"
        )
    hidden_act = config.get("hidden_act", "silu")
    if hidden_act not in ("silu", "swish"):
        raise NotImplementedError(f"hidden_act must be 'silu', got {hidden_act!r}: not supported for Llama")
    lengths = [_size(config, key) for key in _LENGTH_KEYS if config.get(key) is not None]
    max_position = _size(config, "max_position_embeddings", default=min(lengths, default=2048))
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=_size(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_size(config, "intermediate_size"),
        num_layers=_size(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_size(config, "num_key_value_heads", default=num_heads),
        head_dim=head_dim,
        max_position_embeddings=max_position,
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=_parse_rope(config, rotary_dim=head_dim, max_position_embeddings=max_position),
        attention_bias=_flag(config, "attention_bias"),
        mlp_bias=_flag(config, "mlp_bias"),
        tie_word_embeddings=_flag(config, "tie_word_embeddings"),
        dtype=_dtype(config),
        bos_token_id=config.get("bos_token_id", 1),
        eos_token_ids=_token_ids(config.get("eos_token_id", 2)),
    )


_PARSERS = {"LlamaForCausalLM": _parse_llama, "LLaMAForCausalLM": _parse_llama}

# What each kind of scaling may hold beside its name and rope_theta. `finetuned` is a remark in the configs of
# YaRN's authors.
_SCALING_KEYS: Mapping[RopeKind, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *(
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
        ),
        *("mscale_all_dim", "truncate", "finetuned"),
    ),
}


def _parse_rope(config: Mapping[str, Any], *, rotary_dim: int, max_position_embeddings: int) -> RopeConfig:
    """Reads rope_parameters (transformers 5) or rope_theta and rope_scaling (transformers 4)."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaling = {key: value for key, value in given.items() if value is not None}
    old_kind = scaling.pop("type", "default")
    kind = scaling.pop("rope_type", old_kind)
    theta = float(scaling.pop("rope_theta", config.get("rope_theta") or 10000.0))
    if kind not in get_args(RopeKind):
        raise NotImplementedError(
            f"rope_type must be one of {get_args(RopeKind)}, got {kind!r}: not supported"
        )
    if scaling.pop("partial_rotary_factor", 1.0) != 1.0:
        raise NotImplementedError(
            f"partial_rotary_factor must be 1 for Llama, got {given['partial_rotary_factor']}"
        )
    for key, value in scaling.items():
        if key not in _SCALING_KEYS[kind]:
            raise ValueError(f"rope scaling {kind!r} knows {_SCALING_KEYS[kind]}, got {key}={value!r}")
    required = {"llama3": 3, "default": 0}.get(kind, 1)
    for key in _SCALING_KEYS[kind][:required]:
        if key not in scaling:
            raise ValueError(f"rope scaling {kind!r} needs {key}, got {dict(given)}: add it to config.json")
    inner = scaling.pop("original_max_position_embeddings", None)
    original = config.get("original_max_position_embeddings") or inner or max_position_embeddings
    if kind == "dynamic":  # transformers measures against max_position_embeddings whatever else is written
        original = max_position_embeddings
    scaling.pop("finetuned", None)
    mscale, mscale_all_dim = scaling.pop("mscale", None), scaling.pop("mscale_all_dim", None)
    if kind == "yarn" and "attention_factor" not in scaling:
        scaling["attention_factor"] = _yarn_attention_factor(scaling["factor"], mscale, mscale_all_dim)
    truncate = bool(scaling.pop("truncate", True))
    numbers = {key: float(value) for key, value in scaling.items()}
    return RopeConfig(
        kind=kind,
        theta=theta,
        rotary_dim=rotary_dim,
        original_max_position_embeddings=int(original),
        truncate=truncate,
        **numbers,
    )


def _yarn_attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if mscale and mscale_all_dim:
        return magnitude(mscale) / magnitude(mscale_all_dim)
    return magnitude(1.0)


def _check_keys(config: Mapping[str, Any], handled: set[str] | frozenset[str]) -> None:
    for key, value in config.items():
        if key in handled or key in IGNORED_KEYS:
            continue
        if key not in NEUTRAL_VALUES:
            raise ValueError(
                f"config.json holds {key}={value!r}, which this engine does not know for "
                f"{config['architectures']}: remove it if it changes nothing"
            )
        if value is not None and value not in NEUTRAL_VALUES[key]:
            wanted = " or ".join(map(repr, (None, *NEUTRAL_VALUES[key])))
            raise NotImplementedError(f"{key} must be {wanted}, got {value!r}: not supported")


def _size(config: Mapping[str, Any], key: str, *, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"config.json must hold {key} as an integer > 0, got {value!r}")
    return value


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value not in (None, False, True):
        raise ValueError(f"config.json must hold {key} as true or false, got {value!r}")
    return bool(value)


def _dtype(config: Mapping[str, Any]) -> str:
    value = config.get("dtype") or config.get("torch_dtype") or "float32"
    name = str(value).removeprefix("torch.")
    if name not in _DTYPES:
        raise NotImplementedError(f"dtype must be one of {_DTYPES}, got {value!r}: convert the checkpoint")
    return name


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
