"""How to choose the tokens of one request, and how to give them back. Plain Python."""

import enum
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from types import NoneType
from typing import Any

from pjengine.activation_edits import MAX_ACTIVATION_EDITS, ActivationEdit
from pjengine.beam_search import MAX_BEAM_WIDTH
from pjengine.hidden_states import HiddenStatesParams
from pjengine.structured_outputs import StructuredOutputsParams

logger = logging.getLogger(__name__)

MIN_TEMPERATURE = 0.01  # smaller ones overflow the scaled logits
FLOAT32 = (2.0**-126, 2.0**127)  # numbers that the device keeps as they are
MAX_BIAS = 100.0
MAX_PROCESSORS = 8  # logits processors of one request
MAX_N = 16384  # so that a slip of the keyboard does not fill the host's memory


class RequestOutputKind(enum.Enum):
    """What each output of a request holds, of those that come while it runs."""

    CUMULATIVE = 0  # all there is so far
    DELTA = 1  # what is new since the last
    FINAL_ONLY = 2  # there is only one, at the end


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose the tokens of one request, and how to give them back.

    Raises:
      ValueError: a field has the wrong type or is out of its range; the text names field, value and range.
      TypeError: `top_k` is no whole number.
    """

    n: int = 1  # continuations of the same prompt; the seed of the i-th (from 0) is seed + i
    best_of: int | None = None  # so many are generated, and the n likeliest given back; None: n
    use_beam_search: bool = False  # best_of beams, of which the n best are given back
    length_penalty: float = 1.0  # beams are compared by the sum of logprobs / length ** length_penalty
    early_stopping: bool | str = False  # True: once best_of beams have ended; "never": only for certain
    presence_penalty: float = 0.0  # taken from the logits of tokens in the output
    frequency_penalty: float = 0.0  # the same, times their number
    repetition_penalty: float = 1.0  # divides the logits of tokens in prompt or output; above 1: rarer
    temperature: float = 1.0  # 0: greedy; above 0 and below 0.01 it is raised to 0.01
    top_p: float = 1.0  # keep the likeliest tokens that together reach this probability
    top_k: int = 0  # keep the k likeliest tokens; 0 or -1: all
    min_p: float = 0.0  # keep tokens at least this likely, relative to the likeliest
    seed: int | None = None  # None or -1: drawn from the engine's own seed
    stop: str | Sequence[str] | None = None  # generation ends at any of these, the one complete first
    stop_token_ids: Sequence[int] | None = None  # generation ends after any of these
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: up to max_model_len
    # So many before an EOS, a stop id, or a look for stop strings; where a form of the output allows them.
    min_tokens: int = 0
    logprobs: int | None = None  # of the k likeliest tokens and the chosen one; -1: of the vocabulary
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt
    logprob_token_ids: Sequence[int] | None = None  # logprobs of these and the chosen one instead
    flat_logprobs: bool = False  # in a `FlatLogprobs`, not in a list of dicts
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True  # where the tokenizer writes any; False: none
    include_stop_str_in_output: bool = False  # what stopped the text is part of it
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: Mapping[int, float] | None = None  # added to logits, within [-100, 100]
    allowed_token_ids: Sequence[int] | None = None  # all others are forbidden
    bad_words: Sequence[str] | None = None  # never in the output, at the start of a word or within one
    truncate_prompt_tokens: int | None = None  # keep so many, the last; -1: as many as fit
    skip_reading_prefix_cache: bool | None = None  # None: only if the whole prompt must be computed
    structured_outputs: StructuredOutputsParams | None = None  # the form that the output must have
    # Functions (token_ids, logits) -> logits, called one after the other: before temperature, after all else.
    logits_processors: Sequence[Callable[[Any, Any], Any]] | None = None
    hidden_states: HiddenStatesParams | None = None  # which of the prompt are wanted
    # Functions that change its hidden states, of prompt and output; those of one layer one after the other.
    activation_edits: Sequence[ActivationEdit] | None = None

    def __post_init__(self) -> None:
        given = self._given
        for name, value in given.items():
            if (types := _TYPES.get(name)) is not None:
                _check_type(name, value, types)
        for name, value in given.items():
            if (item_type := _ITEMS.get(name)) is not None:
                _check_items(name, self.stop_strings if name == "stop" else value or (), item_type)
        for name, is_valid, wanted in _RANGES:
            if (value := given.get(name)) is not None and not is_valid(value):
                raise ValueError(f"{name} must be {wanted}, got {shown(value)}")
        self._check_together()
        if 0 < self.temperature < MIN_TEMPERATURE:
            logger.warning("temperature=%s is raised to %s", self.temperature, MIN_TEMPERATURE)
            object.__setattr__(self, "temperature", MIN_TEMPERATURE)
        if self.is_chosen:
            object.__setattr__(self, "output_kind", RequestOutputKind.FINAL_ONLY)

    @property
    def _given(self) -> dict[str, Any]:
        """The fields that are not as they are by default, and so need to be looked at."""
        return {name: value for name, value in vars(self).items() if value is not _DEFAULTS.get(name)}

    def _check_together(self) -> None:
        """Raises ValueError where one field does not go with another."""
        if self.stop_strings and not self.detokenize:
            raise ValueError("stop strings are looked for in the text: they need detokenize=True")
        if self.num_sequences < self.n:
            raise ValueError(f"best_of must be at least n={self.n}, got {self.best_of}")
        if self.is_chosen and self.output_kind is RequestOutputKind.DELTA:
            raise ValueError("output_kind must not be DELTA: what is chosen is known at the end only")
        if self.use_beam_search:
            self._check_beams()
        elif self.is_greedy and self.num_sequences > 1:
            raise ValueError(
                f"{self.num_field}={self.num_sequences} greedy continuations are all the same: raise "
                f"temperature, got {self.temperature}"
            )
        for name in ("length_penalty", "early_stopping"):
            if not self.use_beam_search and getattr(self, name) != _DEFAULTS[name]:
                raise ValueError(f"{name}={getattr(self, name)} is for beams: it needs use_beam_search=True")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={shown(self.min_tokens)} must not exceed max_tokens={self.max_tokens}"
            )
        if (reader := self._reads_prompt) is not None and self.is_cache_read:
            raise ValueError(
                f"{reader} needs the whole prompt computed: leave skip_reading_prefix_cache out, "
                f"got {self.skip_reading_prefix_cache}"
            )
        if self.logprob_token_ids is not None and self.logprobs not in (None, len(self.logprob_token_ids)):
            raise ValueError(
                f"logprob_token_ids takes the place of the likeliest tokens: logprobs must be None or "
                f"{len(self.logprob_token_ids)}, got {shown(self.logprobs)}"
            )

    def _check_beams(self) -> None:
        """Raises ValueError for what a beam search has no use for, or does not do."""
        if self.num_sequences > MAX_BEAM_WIDTH:
            raise ValueError(
                f"{self.num_field} must be at most {MAX_BEAM_WIDTH} beams, got {self.num_sequences}"
            )
        for name, neutral in _WITH_BEAMS.items():
            if (value := getattr(self, name)) not in neutral:
                remedy = "set temperature=0" if name == "temperature" else "leave it out"
                got = value.kind if isinstance(value, StructuredOutputsParams) else shown(value)
                raise ValueError(
                    f"{name} must be {neutral[0]!r} with use_beam_search, whose beams are chosen by their "
                    f"logprobs alone: {remedy}; got {got}"
                )

    @property
    def num_sequences(self) -> int:
        """How many are generated; `n` of them are given back."""
        return self.n if self.best_of is None else self.best_of

    @property
    def num_field(self) -> str:
        """The field that says so."""
        return "n" if self.best_of is None else "best_of"

    @property
    def is_chosen(self) -> bool:
        """What is given back is known at the end only."""
        return self.use_beam_search or self.num_sequences > self.n

    @property
    def has_filters(self) -> bool:
        """Whether tokens are drawn from a part of the vocabulary only."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def has_logprobs(self) -> bool:
        """They are asked for."""
        return self.logprobs is not None or self.logprob_token_ids is not None

    @cached_property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        return frozenset(self.stop_token_ids or ())

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def _reads_prompt(self) -> str | None:
        """A field that wants something of every token of the prompt."""
        if self.prompt_logprobs is not None:
            return "prompt_logprobs"
        states = self.hidden_states
        return None if states is None or states.pooling == "last" else "hidden_states"

    @property
    def is_cache_read(self) -> bool:
        """Cached pages are taken: their tokens are not computed, so nothing is known of them."""
        if self.skip_reading_prefix_cache is None:
            return self._reads_prompt is None
        return not self.skip_reading_prefix_cache


_DEFAULTS = {own.name: own.default for own in fields(SamplingParams)}
# What a beam search leaves as it is.
_WITH_BEAMS: dict[str, tuple[Any, ...]] = {
    "temperature": (0,),
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "seed": (None, -1),
    **dict.fromkeys(("stop", "logprobs", "prompt_logprobs", "logprob_token_ids"), (None,)),
    **dict.fromkeys(("structured_outputs", "logits_processors", "hidden_states"), (None,)),
    "activation_edits": (None,),
}

_NUMBER = (int, float)
_FLAG = (bool,)
_COUNT = (int, NoneType)
_IDS = (list, tuple, set, frozenset, NoneType)

_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("n", "top_k", "min_tokens"), (int,)),
    "best_of": _COUNT,
    "use_beam_search": _FLAG,
    "length_penalty": _NUMBER,
    "early_stopping": (bool, str),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "repetition_penalty"), _NUMBER),
    **dict.fromkeys(("temperature", "top_p", "min_p"), _NUMBER),
    **dict.fromkeys(("seed", "max_tokens", "logprobs", "prompt_logprobs", "truncate_prompt_tokens"), _COUNT),
    **dict.fromkeys(("ignore_eos", "flat_logprobs", "detokenize", "skip_special_tokens"), _FLAG),
    **dict.fromkeys(("spaces_between_special_tokens", "include_stop_str_in_output"), _FLAG),
    "skip_reading_prefix_cache": (bool, NoneType),
    "stop": (str, list, tuple, NoneType),
    "stop_token_ids": _IDS,
    "logprob_token_ids": (list, tuple, NoneType),
    "allowed_token_ids": _IDS,
    "logit_bias": (Mapping, NoneType),
    "bad_words": (list, tuple, NoneType),
    **dict.fromkeys(("logits_processors", "activation_edits"), (list, tuple, NoneType)),
    "output_kind": (RequestOutputKind,),
    "structured_outputs": (StructuredOutputsParams, NoneType),
    "hidden_states": (HiddenStatesParams, NoneType),
}

_ITEMS: dict[str, type] = {
    "stop": str,
    "bad_words": str,
    "logits_processors": Callable,  # type: ignore[dict-item]
    "activation_edits": ActivationEdit,
    **dict.fromkeys(("stop_token_ids", "logprob_token_ids", "allowed_token_ids", "logit_bias"), int),
}

# None stands for the default wherever it is allowed, and is not looked at.
_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("n", lambda n: 1 <= n <= MAX_N, f"in [1, {MAX_N}]"),
    ("best_of", lambda count: 1 <= count <= MAX_N, f"in [1, {MAX_N}]"),
    ("length_penalty", lambda penalty: -10 <= penalty <= 10, "in [-10, 10]"),
    ("early_stopping", lambda when: when in (True, False, "never"), "True, False or 'never'"),
    ("presence_penalty", lambda penalty: -2 <= penalty <= 2, "in [-2, 2]"),
    ("frequency_penalty", lambda penalty: -2 <= penalty <= 2, "in [-2, 2]"),
    ("repetition_penalty", lambda penalty: FLOAT32[0] <= penalty <= FLOAT32[1], "above 0, within float32"),
    ("temperature", lambda temperature: 0 <= temperature <= 2, "in [0, 2]"),
    ("top_p", lambda top_p: 0 < top_p <= 1, "in (0, 1]"),
    ("top_k", lambda top_k: top_k >= -1, "at least 1, or 0 or -1 to keep all tokens"),
    ("min_p", lambda min_p: 0 <= min_p <= 1, "in [0, 1]"),
    ("seed", lambda seed: -1 <= seed < 2**63, "in [0, 2**63), or -1 or None for any"),
    ("stop", lambda stop: "" not in ([stop] if isinstance(stop, str) else stop), "free of empty strings"),
    ("max_tokens", lambda count: count >= 1, "at least 1, or None"),
    ("min_tokens", lambda count: count >= 0, "at least 0"),
    ("logprobs", lambda count: count >= -1, "at least 0, or -1 for the whole vocabulary"),
    ("prompt_logprobs", lambda count: count >= -1, "at least 0, or -1 for the whole vocabulary"),
    ("logprob_token_ids", lambda ids: len(ids) > 0, "None or at least one id"),
    ("allowed_token_ids", lambda ids: len(ids) > 0, "None or at least one id"),
    ("bad_words", lambda words: "" not in words, "free of empty strings"),
    ("logits_processors", lambda own: len(own) <= MAX_PROCESSORS, f"at most {MAX_PROCESSORS}"),
    ("activation_edits", lambda own: len(own) <= MAX_ACTIVATION_EDITS, f"at most {MAX_ACTIVATION_EDITS}"),
    ("truncate_prompt_tokens", lambda count: count >= 1 or count == -1, "at least 1, or -1 for what fits"),
)


def _check_type(name: str, value: object, types: tuple[type, ...]) -> None:
    is_flag = isinstance(value, bool) and bool not in types  # True is an int to Python, not to us
    if not isinstance(value, types) or is_flag:
        names = " or ".join("None" if t is NoneType else t.__name__ for t in types)
        error = TypeError if name == "top_k" else ValueError
        raise error(f"{name} must be {names}, got {shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    if name == "logit_bias" and isinstance(value, Mapping):
        for token, bias in value.items():
            if not isinstance(bias, int | float) or isinstance(bias, bool) or bias != bias:
                raise ValueError(f"logit_bias must hold numbers, got {shown(token)}: {shown(bias)}")


def _check_items(name: str, items: Iterable[object], item_type: type) -> None:
    for item in items:
        if not isinstance(item, item_type) or isinstance(item, bool):
            raise ValueError(f"{name} must hold {item_type.__name__}, got {shown(item)}")


def shown(value: object) -> str:
    """A value as an error names it: not too long, and no more digits than Python prints."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    return f"{value!r:.80}"
