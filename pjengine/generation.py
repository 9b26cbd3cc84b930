"""The text side of one request: tokens in, text out, stop strings found, nothing shown too early."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from threading import Lock

from pjengine.outputs import CompletionOutput, RequestOutput
from pjengine.request import Request
from pjengine.tokenizer import IncrementalDetokenizer


@dataclass
class Generation:
    """What has been generated for a request so far; its consumer takes new text whenever it likes.

    The consumer may be another thread than the engine's: each call sees whole tokens.
    """

    request: Request
    detokenizer: IncrementalDetokenizer | None  # None: token ids only
    text: str = ""
    _num_taken_chars: int = 0
    _num_taken_tokens: int = 0
    _hold_back: int = field(init=False)
    _lock: AbstractContextManager[bool] = field(default_factory=Lock, repr=False, compare=False)

    def __post_init__(self) -> None:
        # The end of the text may be the start of a stop string; it is shown once it is clear that it is not.
        self._hold_back = max((len(stop) for stop in self.request.params.stop_strings), default=1) - 1

    def push(self, token: int, now: float | None = None) -> None:
        """Takes a token sampled `now` (see `Request.append`); may finish the request."""
        with self._lock:
            self._push(token, now)

    def _push(self, token: int, now: float | None) -> None:
        request = self.request
        request.append(token, now)
        if self.detokenizer is None:
            return
        # The text ends before the token that stopped it.
        is_shown = request.finish_reason != "stop"
        searched = len(self.text)
        self.text += self.detokenizer.push([token]) if is_shown else ""
        if request.is_finished:
            self.text += self.detokenizer.finish()
        self._find_stop_string(searched)

    def _find_stop_string(self, searched: int) -> None:
        """Cuts the text at the first stop string that ends after its first `searched` characters."""
        start = max(0, searched - self._hold_back)
        found = [(self.text.find(stop, start), stop) for stop in self.request.params.stop_strings]
        found = [(index, stop) for index, stop in found if index >= 0]
        if found:
            index, stop = min(found)
            self.text = self.text[:index]
            self.request.finish("stop", stop)

    def abort(self) -> None:
        """Ends the request where it stands."""
        with self._lock:
            self.request.finish("abort")
            if self.detokenizer is not None:
                self.text += self.detokenizer.finish()

    @property
    def is_finished(self) -> bool:
        return self.request.is_finished

    @property
    def _num_shown_chars(self) -> int:
        """The text so far that no stop string can cut any more."""
        return len(self.text) if self.is_finished else max(len(self.text) - self._hold_back, 0)

    def take(self) -> tuple[str, list[int]]:
        """The text since the last call that may be shown, and the tokens it came with.

        Tokens whose text is still held back stay, too.
        """
        with self._lock:
            return self._take()

    def _take(self) -> tuple[str, list[int]]:
        end = self._num_shown_chars
        text = self.text[self._num_taken_chars : end]
        if self.detokenizer is not None and not text and not self.is_finished:
            return "", []
        tokens = self.request.output_token_ids[self._num_taken_tokens :]
        self._num_taken_chars, self._num_taken_tokens = end, self._num_taken_tokens + len(tokens)
        return text, tokens

    def output(self) -> RequestOutput:
        """All that there is so far, but for text that may be the start of a stop string."""
        with self._lock:
            return self._output()

    def _output(self) -> RequestOutput:
        request = self.request
        completion = CompletionOutput(
            index=0,
            text=self.text[: self._num_shown_chars],
            token_ids=list(request.output_token_ids),
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
        )
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[completion],
            finished=request.is_finished,
            num_cached_tokens=request.num_cached_tokens,
            metrics=request.metrics,
        )
