"""The text side of one request: tokens in, text out, stop strings found, nothing shown too early."""

import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from pjengine.beam_search import Hypothesis
from pjengine.grammars import Matcher
from pjengine.hidden_states import PromptStates
from pjengine.outputs import CompletionOutput, RequestMetrics, RequestOutput, merge_metrics
from pjengine.processors import why_no_token
from pjengine.request import Request
from pjengine.sampling_params import RequestOutputKind, SamplingParams
from pjengine.schedule import BROKEN, FORBIDDEN
from pjengine.token_logprobs import LogprobArrays, OutputLogprobs, PromptLogprobs
from pjengine.tokenizer import IncrementalDetokenizer

logger = logging.getLogger(__name__)

NO_TOKEN = {
    BROKEN: "the model's logits are not a number (NaN): check its weights, and its dtype for overflow",
    FORBIDDEN: "no token is left: allowed_token_ids, bad_words, min_tokens, stop ids and structured_outputs "
    "forbid them all",
}


@dataclass(eq=False)
class Completion:
    """One continuation of a prompt, so far; its consumer takes what is new whenever it likes.

    The consumer may be another thread than the engine's: each call sees whole tokens. The engine may also
    append to the request's tokens itself, all but the last. Tokens become text when the consumer asks,
    but for those in which stop strings are looked for.
    """

    request: Request
    detokenizer: IncrementalDetokenizer | None = None  # None: token ids only
    index: int = 0
    logprobs: OutputLogprobs | None = None  # None: not asked for
    matcher: Matcher | None = None  # None: no grammar
    cumulative_logprob: float | None = None  # of a beam that has ended; of others `logprobs` have it
    is_end_taken: bool = False  # by an output that holds what is new
    _text: str = ""
    _num_read: int = 0  # tokens that are in `_text`
    _is_text_complete: bool = False
    _num_taken_chars: int = 0
    _num_taken_tokens: int = 0
    _hold_back: int = field(init=False)
    _lock: AbstractContextManager[bool] = field(default_factory=Lock, repr=False)

    def __post_init__(self) -> None:
        # The end of the text may be the start of a stop string; it is shown once it is clear that it is not.
        self._hold_back = max((len(stop) for stop in self.request.params.stop_strings), default=1) - 1

    def push(
        self, token: int, now: float | None = None, arrays: LogprobArrays | None = None, row: int = 0
    ) -> None:
        """Takes a token sampled `now` (see `Request.append`); may finish the request.

        `arrays` hold its logprobs at `row`, where they are asked for. A token below 0 says why there is
        none: the request ends with that error.
        """
        with self._lock:
            if token < 0:
                request = self.request
                known = request.known_tokens(0, request.num_known)
                reason = why_no_token(token, request.edits.processors, known)
                reason = reason or ("" if self.matcher is None else self.matcher.error)
                if token == BROKEN and request.edits.activations is not None:
                    reason = request.edits.activations.why_no_number
                request.finish("error", reason or NO_TOKEN[token])
                return
            if self.logprobs is not None and arrays is not None:
                self.logprobs.add(arrays, row, token)
            self._push(token, now)

    def _push(self, token: int, now: float | None) -> None:
        request = self.request
        request.append(token, now)
        if self.matcher is not None:
            self.matcher.consume(token)
            if self.matcher.error:
                request.finish("error", self.matcher.error)
            elif self.matcher.is_complete and request.finish_reason != "stop":
                request.finish("stop")
        if request.params.stop_strings:
            searched = len(self._text)
            try:
                self._read_text(len(request.output_token_ids))
            except RuntimeError as error:  # here it would end the step, and all who are in it
                logger.exception("request %s ends", request.request_id)
                self._is_text_complete = True
                request.finish("error", str(error))
                return
            if len(request.output_token_ids) > request.params.min_tokens:
                self._find_stop_string(searched)

    def _read_text(self, num_tokens: int) -> None:
        """Makes text of the first `num_tokens`; all of it once the request is finished."""
        request = self.request
        if self.detokenizer is None or self._is_text_complete:
            return
        # The text ends before the token that stopped it; the last one of a grammar is a part of it.
        if request.finish_reason == "stop" and not request.params.include_stop_str_in_output:
            num_tokens -= request.output_token_ids[-1] in request.end_ids
        try:
            self._text += self.detokenizer.push(request.output_token_ids[self._num_read : num_tokens])
            if request.is_finished:
                self._text += self.detokenizer.finish()
        except Exception as error:  # of another kind than the caller's mistakes
            raise RuntimeError(
                f"the tokenizer makes no text of the answer: {type(error).__name__}"
            ) from error
        self._num_read = num_tokens
        self._is_text_complete = request.is_finished

    def _find_stop_string(self, searched: int) -> None:
        """Cuts the text at the stop string that ends first after its first `searched` characters.

        Of several that end together it is the first of the list: however tokens divide the text, the
        same one is found.
        """
        params, found = self.request.params, list[tuple[int, int]]()
        for order, stop in enumerate(params.stop_strings):
            index = self._text.find(stop, max(0, searched - len(stop) + 1))
            if index >= 0:
                found.append((index + len(stop), order))
        if found:
            end, order = min(found)
            stop = params.stop_strings[order]
            self._text = self._text[: end if params.include_stop_str_in_output else end - len(stop)]
            self._is_text_complete = True
            self.request.finish("stop", stop)

    def fill(self, beam: Hypothesis, metrics: RequestMetrics) -> None:
        """Takes all of its tokens, as a beam search found them, with the times of the search."""
        with self._lock:
            request, own = self.request, self.request.metrics
            request.output_token_ids += beam.token_ids
            self.cumulative_logprob = beam.cumulative_logprob
            own.num_generation_tokens = len(request.output_token_ids)
            for name in ("scheduled_s", "first_token_s", "last_token_s"):
                setattr(own, name, getattr(metrics, name))
            if beam.is_stopped:
                request.stop_after(beam.end.token)
            else:
                request.finish("length")

    def abort(self, reason: str = "abort", stop_reason: str | None = None) -> None:
        """Ends it where it stands, if it has not ended by itself."""
        with self._lock:
            if not self.request.is_finished:
                self.request.finish(reason, stop_reason)

    def _num_shown_chars(self, num_tokens: int) -> int:
        """The text of the first `num_tokens` that no stop string can cut any more."""
        self._read_text(num_tokens)
        return len(self._text) if self.request.is_finished else max(len(self._text) - self._hold_back, 0)

    def take(self) -> tuple[str, list[int]]:
        """The text since the last call that may be shown, and the tokens it came with.

        Tokens whose text is still held back stay, too.
        """
        with self._lock:
            is_finished = self.request.is_finished
            if self.detokenizer is not None and not is_finished:
                num_tokens = len(self.request.output_token_ids)
                if self._num_shown_chars(num_tokens) == self._num_taken_chars:
                    return "", []
            new = self._take()
            return new.text, new.token_ids

    def _take(self) -> CompletionOutput:
        new = self._output(self._num_taken_chars, self._num_taken_tokens)
        self._num_taken_chars += len(new.text)
        self._num_taken_tokens += len(new.token_ids)
        self.is_end_taken = self.request.is_finished
        return new

    def take_output(self) -> CompletionOutput | None:
        """What is new since the last call, every token at once; None if nothing is."""
        with self._lock:
            request = self.request
            has_news = len(request.output_token_ids) > self._num_taken_tokens
            has_ended = request.is_finished and not self.is_end_taken
            return self._take() if has_news or has_ended else None

    def output(self) -> CompletionOutput:
        """All that there is so far, but for text that may be the start of a stop string."""
        with self._lock:
            return self._output()

    def _output(self, first_char: int = 0, first_token: int = 0) -> CompletionOutput:
        request, logprobs = self.request, self.logprobs
        num_tokens = len(request.output_token_ids)
        num_chars = self._num_shown_chars(num_tokens)
        return CompletionOutput(
            index=self.index,
            text=self._text[first_char:num_chars],
            token_ids=request.output_token_ids[first_token:num_tokens],
            cumulative_logprob=self.cumulative_logprob if logprobs is None else logprobs.cumulative,
            logprobs=logprobs.positions[first_token:] if logprobs and request.params.has_logprobs else None,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
        )


@dataclass(eq=False)
class Generation:
    """What a caller has asked for with one request: a prompt and its `n` continuations."""

    completions: list[Completion]
    prompt_logprobs: PromptLogprobs | None = None
    prompt_states: PromptStates | None = None
    _taken: set[str] = field(default_factory=set)  # of the prompt, by an output that holds what is new alone

    @property
    def request(self) -> Request:
        """The first continuation's, whose id is that of the whole."""
        return self.completions[0].request

    @property
    def is_finished(self) -> bool:
        for completion in self.completions:  # a generator would cost more than it looks through
            if not completion.request.is_finished:
                return False
        return True

    @property
    def num_output_tokens(self) -> int:
        return sum(len(completion.request.output_token_ids) for completion in self.completions)

    def abort(self, reason: str = "abort", stop_reason: str | None = None) -> None:
        """Ends what has not ended by itself."""
        for completion in self.completions:
            completion.abort(reason, stop_reason)

    def take_beams(self, found: list[Hypothesis]) -> None:
        """Ends a beam search with what it has found, best first. There may be less than is asked for."""
        del self.completions[max(1, len(found)) :]
        for completion, beam in zip(self.completions, found, strict=False):
            completion.fill(beam, self.request.metrics)
        if not found:
            self.abort("error", NO_TOKEN[FORBIDDEN])

    def output(self) -> RequestOutput:
        """All that there is so far; with `output_kind` DELTA, what is new since the last call.

        It is `finished` if the ends of all continuations are in it, or in those before it.
        """
        if self.request.params.output_kind is RequestOutputKind.DELTA:
            new = [completion.take_output() for completion in self.completions]
            outputs = [output for output in new if output is not None]
            is_finished = all(completion.is_end_taken for completion in self.completions)
        else:
            outputs = _likeliest(
                [completion.output() for completion in self.completions], self.request.params
            )
            is_finished = all(output.finished() for output in outputs)
        request = self.request
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            prompt_logprobs=self._of_prompt("logprobs", self.prompt_logprobs),
            hidden_states=self._of_prompt("states", self.prompt_states),
            outputs=outputs,
            finished=is_finished,
            num_cached_tokens=request.num_cached_tokens,
            metrics=merge_metrics([completion.request.metrics for completion in self.completions]),
        )

    def _of_prompt(self, name: str, part: PromptLogprobs | PromptStates | None) -> Any:
        """What there is of it; with `output_kind` DELTA, once."""
        if part is None or name in self._taken:
            return None
        result = part.result()
        if result is not None and self.request.params.output_kind is RequestOutputKind.DELTA:
            self._taken.add(name)
        return result


def _likeliest(outputs: list[CompletionOutput], params: SamplingParams) -> list[CompletionOutput]:
    """Those `n` with the highest cumulative logprob, best first, where `best_of` asks for more.

    What ended in an error comes last, whose sum is short.
    """
    if params.use_beam_search or params.num_sequences == params.n:  # beams are in order
        return outputs
    chosen = sorted(
        outputs, key=lambda output: (output.finish_reason == "error", -(output.cumulative_logprob or 0.0))
    )[: params.n]
    for index, output in enumerate(chosen):
        output.index = index
    return chosen
