"""What SamplingParams mean for one model: checked against its vocabulary, words as tokens. Plain Python."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pjengine.edits import NO_EDITS, Edits, max_asked, most_logprobs
from pjengine.sampling_params import MAX_BIAS, SamplingParams, shown
from pjengine.tokenizer import Tokenizer

MAX_BAD_WORD_CHARS = 65_536  # all are encoded, twice, while other requests wait for their turn
MAX_BAD_WORD_TOKENS = 64  # of one: a program has room for as many of each
# What a model's generation_config.json says about sampling, under our names.
_DEFAULTS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def default_params(generation_config: Mapping[str, Any]) -> SamplingParams:
    """What holds for requests without SamplingParams of their own.

    Raises:
      ValueError: generation_config.json wants what is not possible.
    """
    given = {
        ours: generation_config[theirs]
        for theirs, ours in _DEFAULTS.items()
        if generation_config.get(theirs) is not None
    }
    try:
        return SamplingParams(**given)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"generation_config.json: {error}. Pass generation_config='vllm' to do without the file"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Resolver:
    """Turns the SamplingParams of a request into Edits."""

    tokenizer: Tokenizer | None
    vocab_size: int
    num_layers: int
    eos_token_ids: frozenset[int]
    max_logprobs: int  # -1: the vocabulary

    def edits(self, params: SamplingParams) -> Edits:
        """The edits of one request; NO_EDITS itself where there are none.

        Raises:
          ValueError: a token is out of the vocabulary, a word has no tokens, more logprobs are asked
            for than the engine gives, or nothing at all may be sampled.
        """
        if params.stop_strings and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and skip_tokenizer_init=True")
        self._check_spaces(params)
        for name in ("stop_token_ids", "logprob_token_ids", "allowed_token_ids", "logit_bias"):
            self._check_ids(name, getattr(params, name) or ())
        self._check_num_logprobs("logprobs", params.logprobs)
        self._check_num_logprobs("prompt_logprobs", params.prompt_logprobs)
        asked = tuple(dict.fromkeys(params.logprob_token_ids or ()))
        if len(asked) > (limit := max_asked(self.max_logprobs, self.vocab_size)):
            raise ValueError(
                f"logprob_token_ids must hold at most {limit} ids, got {len(asked)}: create the engine with "
                "a higher max_logprobs"
            )
        states = params.hidden_states
        stops = self.eos_token_ids | params.stop_ids if params.min_tokens else ()
        ends = params.stop_ids | (frozenset() if params.ignore_eos else self.eos_token_ids)
        is_ranked = not params.use_beam_search and params.num_sequences > params.n
        edits = Edits(
            bias={
                token: float(min(max(bias, -MAX_BIAS), MAX_BIAS))
                for token, bias in (params.logit_bias or {}).items()
            },
            allowed=tuple(sorted(set(params.allowed_token_ids or ()))),
            bad_words=tuple(dict.fromkeys(self._bad_words(dict.fromkeys(params.bad_words or ())))),
            min_tokens=params.min_tokens,
            stops=self._known(stops),
            repetition_penalty=float(params.repetition_penalty),
            frequency_penalty=float(params.frequency_penalty),
            presence_penalty=float(params.presence_penalty),
            num_logprobs=0 if asked or (is_ranked and params.logprobs is None) else params.logprobs,
            logprob_ids=asked,
            num_prompt_logprobs=params.prompt_logprobs,
            layers=() if states is None else tuple(sorted(set(states.numbers(self.num_layers)))),
            pooling=None if states is None else states.pooling,
            has_mask=params.structured_outputs is not None,
            processors=tuple(params.logits_processors or ()),
            beam_width=params.num_sequences if params.use_beam_search else 0,
            beam_ends=self._known(ends) if params.use_beam_search else (),
        )
        self._check_any_left(edits)
        return NO_EDITS if edits == NO_EDITS else edits

    def _known(self, ids: Iterable[int]) -> tuple[int, ...]:
        """Those within the vocabulary, which a tokenizer's may not be."""
        return tuple(sorted(token for token in ids if token < self.vocab_size))

    def _check_ids(self, name: str, ids: Iterable[int]) -> None:
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"{name} must be within the vocabulary of {self.vocab_size} tokens, got {shown(token)}"
                )

    def _check_spaces(self, params: SamplingParams) -> None:
        """Tokenizers with a backend write no spaces between special tokens in any case."""
        is_asked = not params.spaces_between_special_tokens and not params.skip_special_tokens
        if is_asked and self.tokenizer is not None and not hasattr(self.tokenizer.hf, "backend_tokenizer"):
            raise ValueError(
                "spaces_between_special_tokens=False is not possible with a slow tokenizer: leave it out, or "
                "give the model a tokenizer.json"
            )

    def _check_num_logprobs(self, name: str, count: int | None) -> None:
        if count is None:
            return
        if count > self.vocab_size:
            raise ValueError(
                f"{name} must be at most {self.vocab_size}, the whole vocabulary, got {shown(count)}"
            )
        wanted = self.vocab_size if count == -1 else count
        if wanted > (limit := most_logprobs(self.max_logprobs, self.vocab_size)):
            raise ValueError(
                f"{name} must be at most max_logprobs={limit}, got {wanted}: ask for fewer, or create the "
                "engine with a higher max_logprobs (-1: no limit)"
            )

    def _bad_words(self, words: Iterable[str]) -> Iterable[tuple[int, ...]]:
        """Each word as it is spelled at the start of a text or within a word.

        And after a space, where that makes another first token of the same number, as vLLM has it.
        """
        words = list(words)
        if (num_chars := sum(map(len, words))) > MAX_BAD_WORD_CHARS:
            raise ValueError(
                f"bad_words must have at most {MAX_BAD_WORD_CHARS} characters together, got {num_chars}"
            )
        for word in words:
            if self.tokenizer is None:
                raise ValueError("bad_words need a tokenizer, and skip_tokenizer_init=True")
            bare = word.lstrip() or word
            tokens, spaced = (
                tuple(self.tokenizer.encode(text, add_special_tokens=False)) for text in (bare, f" {bare}")
            )
            if not tokens:
                raise ValueError(f"bad_words must hold words that have tokens, got {word!r}")
            if len(tokens) > MAX_BAD_WORD_TOKENS:
                raise ValueError(
                    f"bad_words must hold words of at most {MAX_BAD_WORD_TOKENS} tokens, got one of "
                    f"{len(tokens)}: {shown(word)}"
                )
            is_other = len(spaced) == len(tokens) and spaced[0] != tokens[0]
            for spelling in (tokens, spaced) if is_other else (tokens,):
                self._check_ids("bad_words", spelling)
                yield spelling

    def _check_any_left(self, edits: Edits) -> None:
        if not edits.allowed:
            return
        forbidden = {word[0] for word in edits.bad_words if len(word) == 1} | set(edits.stops)
        if forbidden.issuperset(edits.allowed):
            raise ValueError(
                "allowed_token_ids leave nothing to sample: bad_words or min_tokens forbid all of "
                f"{list(edits.allowed)}"
            )
