"""How likely a model finds texts that are given: completions of a prompt, and whole texts. Plain Python.

A completion is a request of its own, of its prompt and itself without the last token, which tells logprobs of
the completion alone. So the pages of the prompt are shared, with or without a prefix cache, and a completion
costs its own tokens and the prompt's last page. The engine samples one token at the end, which nobody sees.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pjengine.config import is_whole
from pjengine.generation import NO_TOKEN, Generation
from pjengine.prompts import EncodedPrompt, Prompt, encode_prompt
from pjengine.replicas import Engine
from pjengine.request import request_id_for
from pjengine.sampling_params import SamplingParams
from pjengine.schedule import BROKEN
from pjengine.token_logprobs import PromptLogprobs

ANY_NUMBER = 2**31  # of tokens
_PARAMS = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)


@dataclass(frozen=True, kw_only=True)
class CompletionScore:
    """How likely one completion is, after its prompt."""

    token_ids: list[int]
    logprobs: list[float]  # of each of them, after all those before
    logprob: float  # of all together: their sum
    is_greedy: bool  # each is the likeliest token where it stands
    num_cached_tokens: int  # of those before, whose pages others had computed


@dataclass(frozen=True, kw_only=True)
class ScoreOutput:
    """A prompt and its completions, in the order in which they were given."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionScore]


@dataclass(frozen=True, kw_only=True)
class PerplexityOutput:
    """How likely a text is: `perplexity` is exp(-logprob / num_tokens).

    That of several texts together is the same of the sums.
    """

    perplexity: float
    logprob: float  # of all tokens but the first, which has nothing before it
    num_tokens: int  # without the first


@dataclass(frozen=True, kw_only=True)
class PreparedScores:
    """A prompt's completions, ready to be queued."""

    prompt: EncodedPrompt
    generations: list[Generation]

    def output(self, scores: Mapping[Generation, CompletionScore]) -> ScoreOutput:
        return ScoreOutput(
            prompt=self.prompt.text,
            prompt_token_ids=self.prompt.token_ids,
            outputs=[scores[generation] for generation in self.generations],
        )


def prepare_scores(engine: Engine, prompt: Prompt, completions: Sequence[Any]) -> PreparedScores:
    """Checks a prompt and its completions; nothing is run.

    A completion that is text is encoded together with its prompt, and begins with the first token that the
    prompt alone has not: `"in "` and `"Paris"` are scored as `"in"` and `" Paris"`. One that is token ids
    follows the prompt's as they are.

    Raises:
      ValueError: there are no completions, one has no tokens, prompt and completion are too long together, or
        a text follows token ids.
      TypeError: they are no list.
    """
    if isinstance(completions, str | Mapping) or not isinstance(completions, Sequence):
        raise TypeError(f"completions must be a list of texts or of token ids, got {completions!r:.80}")
    if len(completions) == 0:
        raise ValueError("completions is empty: at least one is needed")
    encoded = _encode(engine, prompt)
    fork = request_id_for(None) if len(completions) > 1 else ""
    generations = []
    for completion in completions:
        before, tokens = _divide(engine, encoded, prompt, completion)
        if not tokens:
            raise ValueError(f"a completion is empty: at least one token is needed, got {completion!r:.80}")
        generations.append(_prepare(engine, before, tokens, encoded.cache_salt, fork))
    return PreparedScores(prompt=encoded, generations=generations)


def _encode(engine: Engine, prompt: Prompt) -> EncodedPrompt:
    return encode_prompt(
        prompt,
        engine.tokenizer,
        vocab_size=engine.model_config.vocab_size,
        max_tokens=ANY_NUMBER,  # `_prepare` knows how many there are together
    )


def _divide(
    engine: Engine, encoded: EncodedPrompt, prompt: Prompt, completion: Any
) -> tuple[list[int], list[int]]:
    """The tokens before a completion, and its own."""
    if not isinstance(completion, str):
        if not isinstance(completion, Sequence | np.ndarray):
            raise TypeError(
                f"completions must be a list of texts or of token ids, got {completion!r:.80} in it"
            )
        tokens = [] if len(completion) == 0 else _encode(engine, completion).token_ids
        return encoded.token_ids, tokens
    is_text = isinstance(prompt, str) or (isinstance(prompt, Mapping) and not prompt.get("prompt_token_ids"))
    if not is_text:
        raise ValueError(
            "a completion that is text follows a prompt that is text, whose token ids may change with it; "
            f"got token ids as the prompt of {completion!r:.80}: give the completion as token ids, too"
        )
    if not completion:
        return encoded.token_ids, []
    assert encoded.text is not None
    whole = _encode(engine, encoded.text + completion).token_ids
    pairs = zip(encoded.token_ids, whole, strict=False)
    num_shared = next((i for i, (own, other) in enumerate(pairs) if own != other), len(encoded.token_ids))
    if num_shared == 0:
        raise ValueError(
            f"{completion!r:.80} joins its prompt {encoded.text!r:.80} in one token, and nothing is left "
            "before it: make the prompt longer"
        )
    return whole[:num_shared], whole[num_shared:]


def _prepare(engine: Engine, before: list[int], tokens: list[int], salt: str, fork: str) -> Generation:
    """A request that computes `before` and `tokens`, and tells the logprobs of `tokens`."""
    whole, most = before + tokens, engine.max_model_len
    if len(whole) > most:
        raise ValueError(
            f"prompt and completion have {len(before)} and {len(tokens)} tokens, {len(whole) - most} more "
            f"together than max_model_len={most}: shorten them or raise max_model_len"
        )
    generation = engine.prepare({"prompt_token_ids": whole[:-1], "cache_salt": salt}, _PARAMS)
    ask_scores(generation, whole[-1], len(before), fork and f"{fork}/{generation.request.salt}")
    return generation


def ask_scores(generation: Generation, last: int, first: int, fork: str) -> None:
    """Has a request tell the logprobs of its prompt's tokens from `first` on, and of `last` after them."""
    request = generation.request
    request.next_token, request.fork = last, fork
    # The last token before gives the logprob of the first: it has to be computed.
    request.is_cache_read, request.max_cached = True, first - 1
    whole = [*request.prompt_token_ids, last]
    generation.prompt_logprobs = PromptLogprobs(whole, 0, True, None, first=first)


def score_of(generation: Generation) -> CompletionScore:
    """What a prepared completion has come to.

    Raises:
      RuntimeError: it did not end by itself, or the model's logits are no numbers.
    """
    request, found = generation.request, generation.prompt_logprobs
    assert found is not None
    if request.finish_reason in ("error", "abort"):
        raise RuntimeError(f"a completion was not scored: {request.stop_reason or request.finish_reason}")
    logprobs, ranks = found.chosen()
    tokens = found.token_ids[found.first :]
    assert len(logprobs) == len(tokens)
    if np.isnan(logprobs).any():
        raise RuntimeError(f"a completion was not scored: {NO_TOKEN[BROKEN]}")
    return CompletionScore(
        token_ids=tokens,
        logprobs=logprobs.tolist(),
        logprob=float(logprobs.sum(dtype=np.float64)),
        is_greedy=bool((ranks == 1).all()),
        num_cached_tokens=request.num_cached_tokens,
    )


def prepare_windows(
    engine: Engine, prompt: Prompt, stride: int | None, max_window: int | None
) -> list[Generation]:
    """A text's windows, ready to be queued: together they tell the logprob of every token but the first.

    Raises:
      ValueError: the text has fewer than two tokens, or stride or window are out of range.
    """
    limit = engine.max_model_len
    window = limit if max_window is None else max_window
    if not is_whole(window) or not 2 <= window <= limit:
        raise ValueError(
            f"max_window must be in [2, {limit}], of which the last is max_model_len, got {window!r:.80}"
        )
    step = max(window // 2, 1) if stride is None else stride
    if not is_whole(step) or not 1 <= step < window:
        raise ValueError(
            f"stride must be in [1, {window - 1}], so that each token has one before it, got {step!r:.80}"
        )
    encoded = _encode(engine, prompt)
    tokens, salt = encoded.token_ids, encoded.cache_salt
    if len(tokens) < 2:
        raise ValueError(f"a text needs at least two tokens to have a perplexity, got {len(tokens)}")
    return [
        _prepare(engine, tokens[begin:first], tokens[first:end], salt, "")
        for begin, first, end in _windows(len(tokens), window, step)
    ]


def _windows(num_tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Begin, first scored token, and end of each."""
    first = 1
    for begin in range(0, num_tokens, stride):
        end = min(begin + window, num_tokens)
        yield begin, first, end
        first = end
        if end == num_tokens:
            return


def perplexity_of(scores: Sequence[CompletionScore]) -> PerplexityOutput:
    """From a text's windows."""
    logprob = math.fsum(score.logprob for score in scores)
    num_tokens = sum(len(score.token_ids) for score in scores)
    try:
        perplexity = math.exp(-logprob / num_tokens)
    except OverflowError:
        perplexity = math.inf
    return PerplexityOutput(perplexity=perplexity, logprob=logprob, num_tokens=num_tokens)
