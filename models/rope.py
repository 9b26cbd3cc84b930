"""Rotary positions: what a checkpoint says about them, and the frequencies that follow."""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from pjengine.models.json_values import FLAG, NUMBER, NUMBERS, OBJECT, SIZE, TEXT, check_values

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions: the base frequencies and how they are stretched beyond the trained length.

    `linear` and `dynamic` read `factor`; `dynamic` also `original_max_position_embeddings`, the length up to
    which it does not scale at all; `llama3` also the two `_freq_factor`s; `yarn` all but those. `longrope`
    divides each plane's frequency by its `short_factor`, and in sequences that are longer than
    `original_max_position_embeddings` by its `long_factor`.
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
    # Multiplies cos and sin; `parse_rope` has derived it from mscale where yarn asks.
    attention_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    truncate: bool = True  # yarn: round the ramp's ends outwards to whole dimensions

    def __post_init__(self) -> None:
        if self.rotary_dim <= 0 or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim must be positive and even, got {self.rotary_dim}: change head_dim")
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            if not getattr(self, name) > 0:
                raise ValueError(f"rope {name} must be > 0, got {getattr(self, name)}")
        for factors in (self.short_factor, self.long_factor) if self.kind == "longrope" else ():
            if len(factors) != self.rotary_dim // 2 or not all(factor > 0 for factor in factors):
                raise ValueError(
                    f"rope longrope wants {self.rotary_dim // 2} positive numbers in short_factor and in "
                    f"long_factor, got {reprlib.repr(factors)}"
                )
        if (
            self.kind in ("dynamic", "llama3", "yarn", "longrope")
            and self.original_max_position_embeddings <= 0
        ):
            raise ValueError(
                f"rope {self.kind} needs original_max_position_embeddings > 0, "
                f"got {self.original_max_position_embeddings}"
            )

    def excess(self, prompt_len: int) -> int:
        """A number that prompts of different lengths share only if their tokens are rotated alike."""
        excess = max(0, prompt_len - self.original_max_position_embeddings)
        return {"dynamic": excess, "longrope": min(excess, 1)}.get(self.kind, 0)


def rope_frequencies(rope: RopeConfig, *, is_long: bool = False) -> tuple[Float[np.ndarray, " half"], float]:
    """Returns the inverse frequencies of the rotary_dim / 2 planes and the factor on cos and sin.

    For `dynamic` these are the unscaled frequencies, right up to `original_max_position_embeddings` tokens;
    beyond, the base grows with the length: see `dynamic_rope_theta`. For `longrope` they are those of short
    sequences; `is_long` gives the others.

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
        case "longrope":
            factors = rope.long_factor if is_long else rope.short_factor
            inv_freq = np.float32(1.0) / (np.asarray(factors, np.float32) * wavelength)
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


# The keys of config.json that `parse_rope` reads, and what each must hold.
ROPE_KEYS = {
    "original_max_position_embeddings": SIZE,
    "rope_parameters": OBJECT,
    "rope_scaling": OBJECT,
    "rope_theta": NUMBER,
}
_SCALING_VALUES = {
    "type": TEXT,
    "rope_type": TEXT,
    "original_max_position_embeddings": SIZE,
    **dict.fromkeys(("truncate", "finetuned"), FLAG),
    **dict.fromkeys(("short_factor", "long_factor"), NUMBERS),
    **dict.fromkeys(
        "rope_theta partial_rotary_factor factor low_freq_factor high_freq_factor attention_factor beta_fast "
        "beta_slow mscale mscale_all_dim".split(),
        NUMBER,
    ),
}
# What each kind of scaling may hold beside its name and rope_theta. `finetuned` is a remark in the configs of
# YaRN's authors.
_SCALING_KEYS: Mapping[RopeKind, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": tuple(
        "factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim "
        "truncate finetuned".split()
    ),
    "longrope": tuple(
        "short_factor long_factor factor original_max_position_embeddings attention_factor".split()
    ),
}


def parse_rope(
    config: Mapping[str, Any],
    *,
    head_dim: int,
    max_position_embeddings: int,
    theta: float = 10000.0,
    partial: float | None = None,
) -> RopeConfig:
    """Reads rope_parameters (transformers 5) or rope_theta and rope_scaling (transformers 4).

    Args:
      theta: the base where the config says none.
      partial: the rotated share of a head where the config says none; None: it must be all.

    Raises:
      ValueError: a key is unknown, missing, or holds a value of the wrong type.
      NotImplementedError: it is a kind of scaling that the engine does not do.
    """
    check_values(config, {**ROPE_KEYS, "partial_rotary_factor": NUMBER})
    given = _given_scaling(config)
    scaling = {key: value for key, value in given.items() if value is not None}
    old_kind = scaling.pop("type", "default")
    kind: Any = scaling.pop("rope_type", old_kind)
    if kind == "su":  # its name in the first checkpoints
        kind = "longrope"
    base = float(scaling.pop("rope_theta", config.get("rope_theta") or theta))
    if kind not in get_args(RopeKind):
        raise NotImplementedError(
            f"rope_type must be one of {get_args(RopeKind)}, got {kind!r}: not supported"
        )
    share = scaling.pop("partial_rotary_factor", 1.0 if partial is None else _partial(config, partial))
    if partial is None and share != 1.0:
        raise NotImplementedError(f"partial_rotary_factor must be 1 for this architecture, got {share}")
    _check_scaling(kind, scaling)
    inner = scaling.pop("original_max_position_embeddings", None)
    original = config.get("original_max_position_embeddings") or inner or max_position_embeddings
    if kind == "dynamic":  # transformers measures against max_position_embeddings whatever else is written
        original = max_position_embeddings
    scaling.pop("finetuned", None)
    mscale, mscale_all_dim = scaling.pop("mscale", None), scaling.pop("mscale_all_dim", None)
    if kind == "yarn" and "attention_factor" not in scaling:
        scaling["attention_factor"] = _yarn_attention_factor(scaling["factor"], mscale, mscale_all_dim)
    if kind == "longrope" and "attention_factor" not in scaling:
        stretch = scaling.get("factor", max_position_embeddings / original)
        scaling["attention_factor"] = math.sqrt(1 + math.log(max(stretch, 1)) / math.log(max(original, 2)))
    truncate = bool(scaling.pop("truncate", True))
    lists = {key: scaling.pop(key, ()) for key in ("short_factor", "long_factor")}
    fields: dict[str, Any] = {key: float(value) for key, value in scaling.items()}
    fields |= {key: tuple(map(float, factors)) for key, factors in lists.items()}
    return RopeConfig(
        kind=kind,
        theta=base,
        rotary_dim=int(head_dim * share),
        original_max_position_embeddings=int(original),
        truncate=truncate,
        **fields,
    )


def _given_scaling(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json holds of scaling, in whichever place."""
    places = [own for name in ("rope_parameters", "rope_scaling") if (own := config.get(name))]
    for own in places:
        check_values(own, _SCALING_VALUES, "the rope scaling of config.json")
    _check_agree("rope_type", *(own.get(key) for own in places for key in ("rope_type", "type")))
    _check_agree("rope_theta", config.get("rope_theta"), *(own.get("rope_theta") for own in places))
    return places[0] if places else {}


def _check_agree(name: str, *values: Any) -> None:
    """Refuses one thing that is said twice, in two ways."""
    said = {"longrope" if value == "su" else value for value in values if value is not None}
    if len(said) > 1:
        raise ValueError(f"config.json must hold one value for {name}, got {', '.join(map(repr, values))}")


def _check_scaling(kind: RopeKind, scaling: Mapping[str, Any]) -> None:
    for key, value in scaling.items():
        if key not in _SCALING_KEYS[kind]:
            raise ValueError(
                f"rope scaling {kind!r} knows {_SCALING_KEYS[kind]}, got {key}={reprlib.repr(value)}"
            )
    required = {"llama3": 3, "default": 0, "longrope": 2}.get(kind, 1)
    for key in _SCALING_KEYS[kind][:required]:
        if key not in scaling:
            raise ValueError(
                f"rope scaling {kind!r} needs {key}, got {reprlib.repr(dict(scaling))}: add it to config.json"
            )


def _partial(config: Mapping[str, Any], default: float) -> float:
    value = config.get("partial_rotary_factor")
    return default if value is None else float(value)


def _yarn_attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if mscale and mscale_all_dim:
        return magnitude(mscale) / magnitude(mscale_all_dim)
    return magnitude(1.0)
