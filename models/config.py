"""What a checkpoint's config.json says about its model, checked key by key."""

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pjengine.models.json_values import (
    FLAG,
    NON_NEGATIVE,
    SIZE,
    TEXT,
    TEXTS,
    TOKEN_ID,
    TOKEN_IDS,
    check_values,
)
from pjengine.models.rope import ROPE_KEYS, parse_rope
from pjengine.models.rope import RopeConfig as RopeConfig
from pjengine.models.rope import dynamic_rope_theta as dynamic_rope_theta
from pjengine.models.rope import rope_frequencies as rope_frequencies


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
    def from_hf(cls, config: object) -> "ModelConfig":
        """Reads a config.json, as transformers 4 wrote it or as transformers 5 writes it.

        Raises:
          ValueError: it is no mapping; a key is missing, holds a value of the wrong type, or is neither
            handled nor known to be irrelevant; or the architecture is unknown.
          NotImplementedError: the config asks for something this engine does not do.
        """
        if not isinstance(config, Mapping):
            raise ValueError(f"config.json must hold a JSON object, got {reprlib.repr(config)}")
        return _architecture_parser(config)(config)


# Keys that say nothing about the forward pass: bookkeeping, training, and the generation defaults that
# transformers 4 copied into every config.json, though their place is generation_config.json.
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
# Other names under which old conversions recorded max_position_embeddings.
_LENGTH_KEYS = ("max_sequence_length", "max_seq_len", "max_seq_length", "model_max_length", "seq_length")
# Keys read by `_parse_llama`, and what each must hold.
_LLAMA_KEYS = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "head_dim"), SIZE),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), SIZE),
    **dict.fromkeys(("max_position_embeddings", *_LENGTH_KEYS), SIZE),
    **dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings"), FLAG),
    **dict.fromkeys(("dtype", "torch_dtype", "hidden_act"), TEXT),
    "bos_token_id": TOKEN_ID,
    "eos_token_id": TOKEN_IDS,
    "rms_norm_eps": NON_NEGATIVE,
    **ROPE_KEYS,
}
_DTYPES = ("float32", "bfloat16", "float16")


def _architecture_parser(config: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], ModelConfig]:
    check_values(config, {"architectures": TEXTS})
    names = config.get("architectures") or ()
    for name in names:
        if name in _PARSERS:
            return _PARSERS[name]
    raise ValueError(
        f"config.json must name one of the architectures {sorted(_PARSERS)}, "
        f"got architectures={reprlib.repr(list(names))}"
    )


def _parse_llama(config: Mapping[str, Any]) -> ModelConfig:
    """`LlamaForCausalLM`; defaults are those of transformers' LlamaConfig."""
    _check_keys(config, _LLAMA_KEYS)
    check_values(config, _LLAMA_KEYS)
    hidden_size, num_heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    head_dim = _size(config, "head_dim", default=hidden_size // num_heads)
    if config.get("head_dim") is None and hidden_size % num_heads:
        raise ValueError(
            f"hidden_size must be a multiple of num_attention_heads where head_dim is not given, "
            f"got {hidden_size} and {num_heads}: add head_dim to config.json"
        )
    hidden_act = _value(config, "hidden_act", "silu")
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
        rms_norm_eps=float(_value(config, "rms_norm_eps", 1e-6)),
        rope=parse_rope(config, rotary_dim=head_dim, max_position_embeddings=max_position),
        attention_bias=_value(config, "attention_bias", False),
        mlp_bias=_value(config, "mlp_bias", False),
        tie_word_embeddings=_value(config, "tie_word_embeddings", False),
        dtype=_dtype(config),
        bos_token_id=config.get("bos_token_id", 1),
        eos_token_ids=_token_ids(config.get("eos_token_id", 2)),
    )


_PARSERS = {"LlamaForCausalLM": _parse_llama, "LLaMAForCausalLM": _parse_llama}


def _check_keys(config: Mapping[str, Any], handled: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if key in handled or key in IGNORED_KEYS:
            continue
        if key not in NEUTRAL_VALUES:
            raise ValueError(
                f"config.json holds {key}={reprlib.repr(value)}, which this engine does not know for "
                f"{config['architectures']}: remove it if it changes nothing"
            )
        if value is not None and value not in NEUTRAL_VALUES[key]:
            wanted = " or ".join(map(repr, (None, *NEUTRAL_VALUES[key])))
            raise NotImplementedError(f"{key} must be {wanted}, got {reprlib.repr(value)}: not supported")


def _size(config: Mapping[str, Any], key: str, *, default: int | None = None) -> int:
    value = _value(config, key, default)
    if value is None:
        raise ValueError(f"config.json must hold {key} as an integer > 0, got None")
    return value


def _value(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """Returns the default where the key is absent or null."""
    value = config.get(key)
    return default if value is None else value


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
