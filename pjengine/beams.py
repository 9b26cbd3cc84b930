"""What `LLM.beam_search` takes and gives back, under vLLM's names. Plain Python."""

import math
from dataclasses import dataclass, field

from pjengine.beam_search import MAX_BEAM_WIDTH
from pjengine.outputs import CompletionOutput, RequestOutput
from pjengine.sampling_params import SamplingParams, shown
from pjengine.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """How to search, and how long.

    Sequences are compared by the sum of their logprobs / number of generated tokens ** `length_penalty`,
    as in Hugging Face's `generate(num_beams=beam_width)`.

    Raises:
      ValueError: a field is out of its range, or asks for what there is not; the text names it.
    """

    beam_width: int  # sequences that go on at once, and that are given back
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0  # nothing is drawn: it must be 0
    length_penalty: float = 1.0  # above 0 longer sequences are better
    early_stopping: bool | str = False  # True: once `beam_width` have ended; "never": only for certain
    include_stop_str_in_output: bool = False  # the token that ends a sequence is among its tokens
    sampling_params: SamplingParams = field(init=False, repr=False)  # the same, for `generate`

    def __post_init__(self) -> None:
        width = self.beam_width
        if not isinstance(width, int) or isinstance(width, bool) or not 1 <= width <= MAX_BEAM_WIDTH:
            raise ValueError(f"beam_width must be in [1, {MAX_BEAM_WIDTH}], got {shown(width)}")
        if self.max_tokens is None:
            raise ValueError("max_tokens must be a whole number of at least 1, got None")
        params = SamplingParams(
            use_beam_search=True,
            n=self.beam_width,
            best_of=self.beam_width,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            temperature=self.temperature,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            include_stop_str_in_output=self.include_stop_str_in_output,
            detokenize=False,
        )
        object.__setattr__(self, "sampling_params", params)


@dataclass(kw_only=True)
class BeamSearchSequence:
    """One sequence that a search has found."""

    tokens: list[int]  # of the prompt and of what was generated
    cum_logprob: float  # summed over the generated tokens, with the one that ended it; after an error -inf
    text: str | None = None  # of all tokens, special ones too; None: there is no tokenizer
    finish_reason: str | None = None  # "stop", "length" or "error"
    stop_reason: int | str | None = None


@dataclass(kw_only=True)
class BeamSearchOutput:
    """What was found after one prompt, best first; fewer than `beam_width` where there are no more."""

    sequences: list[BeamSearchSequence]


def beam_search_output(
    output: RequestOutput, params: BeamSearchParams, tokenizer: Tokenizer | None
) -> BeamSearchOutput:
    def sequence(found: CompletionOutput) -> BeamSearchSequence:
        is_cut = found.finish_reason == "stop" and not params.include_stop_str_in_output
        tokens = output.prompt_token_ids + (found.token_ids[:-1] if is_cut else found.token_ids)
        return BeamSearchSequence(
            tokens=tokens,
            cum_logprob=-math.inf if found.cumulative_logprob is None else found.cumulative_logprob,
            text=None if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=False),
            finish_reason=found.finish_reason,
            stop_reason=found.stop_reason,
        )

    return BeamSearchOutput(sequences=[sequence(found) for found in output.outputs])
