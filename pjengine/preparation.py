"""From what a caller asks for to requests that can be queued: encoded, checked, resolved. Nothing is run."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from pjengine.beam_search import BeamSearch
from pjengine.call_activation_edits import check_edits
from pjengine.call_processors import check_processors
from pjengine.edits import NO_EDITS, Edits
from pjengine.generation import Completion, Generation
from pjengine.grammars import Grammars, Matcher
from pjengine.hidden_states import PromptStates
from pjengine.models.config import ModelConfig
from pjengine.outputs import RequestMetrics
from pjengine.prompts import EncodedPrompt, Prompt, encode_prompt
from pjengine.request import Request, request_id_for
from pjengine.resolution import Resolver, default_params
from pjengine.sampling_params import SamplingParams
from pjengine.token_logprobs import DecodeToken, OutputLogprobs, PromptLogprobs
from pjengine.tokenizer import IncrementalDetokenizer, Tokenizer


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """All that is known about a model and its engine before a request comes."""

    model_config: ModelConfig
    tokenizer: Tokenizer | None
    max_model_len: int
    max_logprobs: int
    history_len: int  # token ids that logits processors get: max_model_len, rounded up to whole pages
    generation_config: Mapping[str, Any]  # of the model; empty: neutral defaults
    draw_seed: Callable[[], int]  # for requests that bring none

    @cached_property
    def default_params(self) -> SamplingParams:
        return default_params(self.generation_config)

    @cached_property
    def _eos_token_ids(self) -> list[int]:
        """The tokenizer's, those of config.json and of generation_config.json; the first is the main one."""
        own = None if self.tokenizer is None else self.tokenizer.eos_token_id
        more = self.generation_config.get("eos_token_id")
        more_ids: Iterable[int] = [more] if isinstance(more, int) else more or ()
        ids = [*([] if own is None else [own]), *self.model_config.eos_token_ids, *more_ids]
        return list(dict.fromkeys(ids))

    @cached_property
    def _resolver(self) -> Resolver:
        return Resolver(
            tokenizer=self.tokenizer,
            vocab_size=self.model_config.vocab_size,
            num_layers=self.model_config.num_layers,
            eos_token_ids=frozenset(self._eos_token_ids),
            max_logprobs=self.max_logprobs,
        )

    @cached_property
    def grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self._eos_token_ids, self.model_config.vocab_size)

    @cached_property
    def _decode_token(self) -> DecodeToken | None:
        """One token as it reads in the middle of a text."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            return None
        anchor, anchor_text = tokenizer.anchor
        before = [] if anchor is None else [anchor]

        @lru_cache(maxsize=1 << 17)
        def decode(token: int) -> str:
            return tokenizer.decode([*before, token], skip_special_tokens=False)[len(anchor_text) :]

        return decode

    def generation(
        self, request_id: str, prompt: Prompt, params: SamplingParams, priority: int = 0
    ) -> Generation:
        """A prompt and its continuations, ready to be queued.

        Raises:
          ValueError: the prompt is empty, too long or out of the vocabulary, or the parameters do not
            suit the model or the engine, or their grammar cannot be followed.
        """
        if (params.truncate_prompt_tokens or 0) > self.max_model_len:
            raise ValueError(
                f"truncate_prompt_tokens={params.truncate_prompt_tokens} is more than "
                f"max_model_len={self.max_model_len}"
            )
        check_processors(params.logits_processors or (), self.model_config.vocab_size, self.history_len)
        edits = self._resolver.edits(params)
        if activations := check_edits(params.activation_edits or (), self.model_config):
            edits = dataclasses.replace(edits, activations=activations)
        encoded = encode_prompt(
            prompt,
            self.tokenizer,
            vocab_size=self.model_config.vocab_size,
            max_tokens=self.max_model_len - 1,
            keep_last=params.truncate_prompt_tokens,
        )
        seed = self.draw_seed() if params.seed is None or params.seed < 0 else params.seed
        num_sampled = 1 if params.use_beam_search else params.num_sequences
        fork = request_id_for(None) if num_sampled > 1 else ""
        matcher = None
        if params.structured_outputs is not None:
            matcher = self.grammars.matcher(params.structured_outputs)
        first = self._request(request_id, encoded, params, edits, seed, priority, fork)
        generation = Generation(
            [self._completion(first, matcher)], self._prompt_logprobs(first), self._prompt_states(first)
        )
        if edits is not NO_EDITS:  # one continuation is enough for what is asked of the prompt
            edits = dataclasses.replace(edits, num_prompt_logprobs=None, layers=(), pooling=None)
            edits = NO_EDITS if edits == NO_EDITS else edits
        for i in range(1, num_sampled):
            other = self._request(f"{i}_{request_id}", encoded, params, edits, seed + i, priority, fork)
            other.is_cache_read = True
            generation.completions.append(self._completion(other, matcher and matcher.fork(), i))
        if params.use_beam_search:
            add_beams(generation)
            for i in range(1, params.n):
                other = self._request(f"{i}_{request_id}", encoded, params, edits, seed, priority, fork)
                generation.completions.append(self._completion(other, None, i))
        return generation

    def _request(
        self,
        request_id: str,
        encoded: EncodedPrompt,
        params: SamplingParams,
        edits: Edits,
        seed: int,
        priority: int,
        fork: str,
    ) -> Request:
        num_prompt = len(encoded.token_ids)
        salt = f"{encoded.cache_salt}/{self.model_config.rope_excess(num_prompt)}"
        if edits.activations is not None:  # its K and V are like no other's
            salt = fork or request_id_for(None)
        limit = self.max_model_len
        if params.max_tokens is not None:
            limit = min(limit, num_prompt + params.max_tokens)
        return Request(
            request_id=request_id,
            prompt=encoded.text,
            prompt_token_ids=encoded.token_ids,
            params=params,
            max_total_tokens=limit,
            eos_token_ids=frozenset(self._eos_token_ids[:1]),
            more_eos_token_ids=frozenset(self._eos_token_ids[1:]),
            seed=seed,
            priority=priority,
            edits=edits,
            salt=fork if fork and params.skip_reading_prefix_cache else salt,
            fork=fork,
            is_cache_read=params.is_cache_read,
        )

    def _completion(self, request: Request, matcher: Matcher | None, index: int = 0) -> Completion:
        params, edits = request.params, request.edits
        detokenizer = logprobs = None
        if params.detokenize and self.tokenizer is not None:
            detokenizer = IncrementalDetokenizer(
                self.tokenizer,
                skip_special_tokens=params.skip_special_tokens,
                prompt_ids=request.prompt_token_ids[-16:],  # enough to tell whether the text starts here
            )
        if edits.num_logprobs is not None:
            decode = self._decode_token if params.detokenize and params.has_logprobs else None
            logprobs = OutputLogprobs(edits, params.flat_logprobs, decode)
        return Completion(request, detokenizer, index, logprobs, matcher)

    def _prompt_logprobs(self, request: Request) -> PromptLogprobs | None:
        params = request.params
        if params.prompt_logprobs is None:
            return None
        decode = self._decode_token if params.detokenize else None
        return PromptLogprobs(request.prompt_token_ids, params.prompt_logprobs, params.flat_logprobs, decode)

    def _prompt_states(self, request: Request) -> PromptStates | None:
        wanted, layers = request.params.hidden_states, request.edits.layers
        if wanted is None:
            return None
        places = [layers.index(number) for number in wanted.numbers(self.model_config.num_layers)]
        return PromptStates(len(request.prompt_token_ids), places, wanted.pooling)


def add_beams(generation: Generation) -> None:
    """Makes the first request lead a beam search, which is queued with it; the others get what it finds."""
    request = generation.request
    params, edits = request.params, dataclasses.replace(request.edits, leads_beams=False)
    request.beams = BeamSearch(
        width=params.num_sequences,
        max_tokens=request.max_total_tokens - len(request.prompt_token_ids),
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
    )
    # What they share grows in one place only: names of the prompt's pages.
    own: dict[str, Callable[[], Any]] = {
        "pages": list, "window_pages": list, "output_token_ids": list, "followers": list,
        "metrics": RequestMetrics,
    }  # fmt: skip
    request.followers = [
        dataclasses.replace(
            request,
            request_id=f"{request.request_id} beam {i}",
            edits=edits,
            **{name: make() for name, make in own.items()},
        )
        for i in range(1, params.num_sequences)
    ]


def seed_source(seed: int) -> Callable[[], int]:
    """Seeds for requests without one; the same for the same `seed`, in order of arrival."""
    generator = np.random.default_rng(seed)
    return lambda: int(generator.integers(2**63))
