"""How to choose the tokens of one request. Plain Python."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

GREEDY_EPSILON = 1e-5  # temperatures below it mean: take the likeliest token
MIN_TEMPERATURE = 0.01  # smaller ones overflow the scaled logits


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose the tokens of one request.

    Raises:
      ValueError: a field is out of its range; the text names field, value and range.
      TypeError: a field has the wrong type.
    """

    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # keep the likeliest tokens that together reach this probability
    top_k: int = 0  # keep the k likeliest tokens; 0 or -1: all
    min_p: float = 0.0  # keep tokens at least this likely, relative to the likeliest
    seed: int | None = None  # None: drawn from the engine's own seed
    max_tokens: int | None = 16  # None: up to max_model_len
    stop: str | Sequence[str] | None = None  # generation ends before any of these; not part of the text
    stop_token_ids: Sequence[int] | None = None  # generation ends after any of these
    ignore_eos: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self._check_types()
        in_range = {
            "temperature": (0 <= self.temperature <= 2, "in [0, 2]"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "top_k": (self.top_k >= -1, "at least 1, or 0 or -1 to keep all tokens"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
            "seed": (self.seed is None or -1 <= self.seed < 2**63, "in [0, 2**63), or -1 or None for any"),
            "max_tokens": (self.max_tokens is None or self.max_tokens >= 1, "at least 1, or None"),
            "stop": ("" not in self.stop_strings, "free of empty strings"),
        }
        for name, (is_valid, wanted) in in_range.items():
            if not is_valid:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")
        if self.stop_strings and not self.detokenize:
            raise ValueError("stop strings are looked for in the text: they need detokenize=True")

    def _check_types(self) -> None:
        wanted: dict[str, tuple[type, ...]] = {
            **dict.fromkeys(("temperature", "top_p", "min_p"), (int, float)),
            "top_k": (int,),
            **dict.fromkeys(("seed", "max_tokens"), (int, type(None))),
            **dict.fromkeys(("ignore_eos", "detokenize", "skip_special_tokens"), (bool,)),
            "stop": (str, list, tuple, type(None)),
            "stop_token_ids": (list, tuple, set, frozenset, type(None)),
        }
        for name, types in wanted.items():
            value = getattr(self, name)
            is_flag = isinstance(value, bool) and bool not in types  # True is an int to Python, not to us
            if not isinstance(value, types) or is_flag:
                names = " or ".join("None" if t is type(None) else t.__name__ for t in types)
                raise TypeError(f"{name} must be {names}, got {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value!r}")
        for name, items, item_type in (
            ("stop", self.stop_strings, str),
            ("stop_token_ids", self.stop_ids, int),
        ):
            for item in items:
                if not isinstance(item, item_type) or isinstance(item, bool):
                    raise TypeError(f"{name} must hold {item_type.__name__}, got {item!r}")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset(self.stop_token_ids or ())

    @property
    def effective_temperature(self) -> float:
        """0 when greedy; never so small that scaled logits overflow."""
        return 0.0 if self.temperature < GREEDY_EPSILON else max(self.temperature, MIN_TEMPERATURE)
