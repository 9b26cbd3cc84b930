"""Reads a checkpoint's config.json key by key, so that no key goes unnoticed."""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from pjengine.models.config import Activation
from pjengine.models.json_values import (
    FLAG,
    NUMBER,
    SIZE,
    TEXT,
    TEXTS,
    TOKEN_ID,
    TOKEN_IDS,
    Wanted,
    check_values,
)
from pjengine.models.rope import ROPE_KEYS, RopeConfig, parse_rope

# Keys that say nothing about the forward pass: bookkeeping, training, and the generation defaults that
# transformers 4 copied into every config.json, though their place is generation_config.json.
IGNORED_KEYS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled _from_model_config _name_or_path
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
    # Above 1 it asks for matrix products split as in training, to match its rounding.
    "pretraining_tp": (0, 1),
    "quantization_config": ({},),
    "rope_interleaved": (False,),
    "sliding_window": (),
    "use_sliding_window": (False,),
}
# The spellings of torch and transformers for what `ModelConfig.activation` names.
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}
_DTYPES = ("float32", "bfloat16", "float16")


class ConfigReader:
    """A config.json that remembers which keys an architecture has read.

    Several keys for one value are its spellings, newest first. A key that is absent or null has the default.
    What nobody has read, `refuse_unread` refuses in the end, unless it is known to say nothing.
    """

    def __init__(self, config: Mapping[str, Any], architecture: str) -> None:
        self.config = config
        self.architecture = architecture
        self.read: set[str] = set()

    def get(self, *keys: str, wanted: Wanted, default: Any = None) -> Any:
        """Returns what the keys hold, all of them the same.

        Raises:
          ValueError: it is not what is wanted, or two spellings contradict each other.
        """
        check_values(self.config, dict.fromkeys(keys, wanted))
        self.read.update(keys)
        given = {key: self.config[key] for key in keys if self.config.get(key) is not None}
        values = list(given.values())
        if any(value != values[0] for value in values):
            raise ValueError(f"config.json must hold one value for {' and '.join(given)}, got {given}")
        return values[0] if values else default

    def nullable(self, key: str, *, wanted: Wanted, default: Any) -> Any:
        """Returns the default where the key is absent, but None where it is null."""
        value = self.get(key, wanted=wanted)
        return default if key not in self.config else value

    def size(self, *keys: str, default: int | None = None) -> int:
        value = self.get(*keys, wanted=SIZE, default=default)
        if value is None:
            raise ValueError(f"config.json must hold {keys[0]} as {SIZE.text}, got None")
        return int(value)

    def number(self, *keys: str, default: float, wanted: Wanted = NUMBER) -> float:
        return float(self.get(*keys, wanted=wanted, default=default))

    def flag(self, *keys: str, default: bool) -> bool:
        return bool(self.get(*keys, wanted=FLAG, default=default))

    def activation(self, *keys: str, default: str) -> Activation:
        """Raises NotImplementedError for one that the engine does not have."""
        name = self.get(*keys, wanted=TEXT, default=default)
        if name not in ACTIVATIONS:
            raise NotImplementedError(
                f"{keys[0]} must be one of {', '.join(ACTIVATIONS)}, got {name!r}: not supported"
            )
        return ACTIVATIONS[name]

    def only(self, key: str, *values: Any) -> None:
        """Refuses any other value but null: NotImplementedError."""
        self.read.add(key)
        value = self.config.get(key)
        if value is not None and value not in values:
            wanted = " or ".join(map(repr, (None, *values)))
            raise NotImplementedError(f"{key} must be {wanted}, got {reprlib.repr(value)}: not supported")

    def ignore(self, *keys: str) -> None:
        """Takes note of keys that say nothing about the forward pass."""
        self.read.update(keys)

    def head_dim(self, hidden_size: int, num_heads: int, *keys: str) -> int:
        """The size of a head: what `keys` say, or a head's part of the hidden size."""
        given = self.get(*keys, wanted=SIZE)
        if given is None and hidden_size % num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads where head_dim is not given, "
                f"got {hidden_size} and {num_heads}: add head_dim to config.json"
            )
        return int(given or hidden_size // num_heads)

    def rope(
        self,
        *,
        head_dim: int,
        max_position_embeddings: int,
        theta: float = 10000.0,
        partial: float | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> RopeConfig:
        """Rotary positions, as transformers 4 or 5 writes them.

        Args:
          theta: the base where config.json says none.
          partial: the rotated share of a head where config.json says none; None: it must be all.
          parameters: instead of config.json's own `rope_parameters`.
        """
        self.read.update(ROPE_KEYS)
        config = self.config
        if parameters is not None:
            config = {**{key: value for key, value in config.items() if key not in ROPE_KEYS},
                      "rope_parameters": parameters}  # fmt: skip
        if partial is not None:
            self.read.add("partial_rotary_factor")
        return parse_rope(
            config,
            head_dim=head_dim,
            max_position_embeddings=max_position_embeddings,
            theta=theta,
            partial=partial,
        )

    def layer_types(self, num_layers: int, default: Sequence[str]) -> tuple[str, ...]:
        """`layer_types`: "full_attention" or "sliding_attention" for each layer.

        Args:
          default: repeated over the layers where config.json does not say.
        """
        given = self.get("layer_types", wanted=TEXTS)
        types = tuple(given or (default[i % len(default)] for i in range(num_layers)))
        if len(types) != num_layers:
            raise ValueError(f"layer_types must name {num_layers} layers, got {len(types)}")
        unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
        if unknown:
            raise NotImplementedError(
                f"layer_types must be full_attention or sliding_attention, got {unknown[0]!r}: not supported"
            )
        return types

    def base(self, *, bos: int | None, eos: int | Sequence[int] | None, tie: bool) -> dict[str, Any]:
        """The fields that every architecture has: its name, token ids, whether embeddings are tied, dtype.

        Args:
          bos, eos, tie: the defaults of the architecture's config in transformers.
        """
        old_dtype = self.get("torch_dtype", wanted=TEXT, default="float32")
        name = str(self.get("dtype", wanted=TEXT, default=old_dtype)).removeprefix("torch.")
        if name not in _DTYPES:
            raise NotImplementedError(f"dtype must be one of {_DTYPES}, got {name!r}: convert the checkpoint")
        return {
            "architecture": self.architecture,
            "bos_token_id": self.nullable("bos_token_id", wanted=TOKEN_ID, default=bos),
            "eos_token_ids": _token_ids(self.nullable("eos_token_id", wanted=TOKEN_IDS, default=eos)),
            "tie_word_embeddings": self.flag("tie_word_embeddings", default=tie),
            "dtype": name,
        }


def refuse_unread(reader: ConfigReader) -> None:
    """Refuses the keys that an architecture has not read.

    Raises:
      ValueError: the key is not known.
      NotImplementedError: its value asks for something that the architecture does not do here.
    """
    for key, value in reader.config.items():
        if key in reader.read or key in IGNORED_KEYS:
            continue
        if key not in NEUTRAL_VALUES:
            raise ValueError(
                f"config.json holds {key}={reprlib.repr(value)}, which this engine does not know for "
                f"{reader.architecture}: remove it if it changes nothing"
            )
        reader.only(key, *NEUTRAL_VALUES[key])


def _token_ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
