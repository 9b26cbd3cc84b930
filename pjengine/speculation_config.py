"""What `speculative_config` may ask for, by vLLM's keys. No JAX."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# By method, what there is beside "method" and "num_speculative_tokens".
METHODS = {"ngram": ("prompt_lookup_max", "prompt_lookup_min"), "draft_model": ("model",)}
KEYS = ("method", "num_speculative_tokens", *(key for keys in METHODS.values() for key in keys))
MAX_LOOKUP = 32  # tokens; each costs a pass over the sequence
MAX_VERIFIED = 256  # tokens of a step that speculates: beyond, products cost what their rows cost


@dataclass(frozen=True, kw_only=True)
class SpeculationConfig:
    """What `speculative_config` asks for."""

    num_drafts: int  # tokens drafted for a row in one step
    # Of n-grams: of a sequence's last tokens, so many must have come before; and of these the most.
    lookup_min: int = 0
    lookup_max: int = 0
    model: str | None = None  # that drafts: a folder, a Hub id, or a shape; None: n-grams do

    @property
    def max_num_seqs(self) -> int:
        """Rows of the largest step that speculates."""
        return max(1, MAX_VERIFIED // (self.num_drafts + 1))

    def num_verified(self, max_num_seqs: int) -> int:
        """Tokens of the largest step that speculates, of an engine with so many rows."""
        return min(max_num_seqs, self.max_num_seqs) * (self.num_drafts + 1)

    def lookup_bytes(self, max_num_seqs: int, max_len: int) -> int:
        """What the search for drafts takes on the device, at most: tokens, and how far each matches."""
        if self.model is not None:
            return 0
        return 8 * min(max_num_seqs, self.max_num_seqs) * max_len

    @classmethod
    def read(cls, wanted: Any, page_size: int) -> "SpeculationConfig":
        """From vLLM's keys.

        Raises:
          ValueError: it is no dict, a key is unknown or missing, or a value is out of its range.
        """
        if not isinstance(wanted, Mapping):
            raise ValueError(f"speculative_config must be a dict, got {wanted!r:.80}")
        for key in wanted:
            if key not in KEYS:
                raise ValueError(f"speculative_config has no key {key!r:.80}; there are {', '.join(KEYS)}")
        model = wanted.get("model")
        method = wanted.get("method") or (None if model is None else "draft_model")
        if method not in tuple(METHODS):
            raise ValueError(
                f"speculative_config needs a method, one of {', '.join(METHODS)}, got {method!r:.80}"
            )
        for key in wanted:
            if key not in ("method", "num_speculative_tokens", *METHODS[method]):
                raise ValueError(
                    f"speculative_config's {key} does not go with method={method!r}: leave it out"
                )
        if isinstance(model, os.PathLike):
            model = os.fspath(model)
        if method == "draft_model" and not (isinstance(model, str) and model):
            raise ValueError(
                f"speculative_config's model must be a draft model's folder or Hub id, got {model!r:.80}"
            )

        def number(key: str, most: int) -> int | None:
            value = wanted.get(key)
            if value is None:
                return None
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(
                    f"speculative_config's {key} must be a whole number from 1 to {most}, got {value!r:.80}"
                )
            return value

        # A row that speculates takes one new page at most.
        num_drafts = number("num_speculative_tokens", page_size - 1)
        if num_drafts is None:
            raise ValueError("speculative_config needs num_speculative_tokens: how many are drafted at once")
        if method == "draft_model":
            return cls(num_drafts=num_drafts, model=model)
        most, least = number("prompt_lookup_max", MAX_LOOKUP), number("prompt_lookup_min", MAX_LOOKUP)
        if most is None:
            most = 5 if least is None else max(5, least)
        if least is None:
            least = min(2, most)
        if least > most:
            raise ValueError(
                f"speculative_config's prompt_lookup_min={least} must be at most prompt_lookup_max={most}"
            )
        return cls(num_drafts=num_drafts, lookup_min=least, lookup_max=most)
