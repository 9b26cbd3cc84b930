"""Logprobs in the two forms of OpenAI's API, and vLLM's for prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pjengine.token_logprobs import Logprob, LogprobsList, PositionLogprobs
from pjengine.tokenizer import Tokenizer

_LOWEST = -9999.0  # stands for minus infinity, which JSON has no number for


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """How tokens are written in answers."""

    tokenizer: Tokenizer | None
    is_by_id: bool  # "token_id:17", as is every token where there is no tokenizer

    def text(self, token_id: int, decoded: str | None) -> str:
        return f"token_id:{token_id}" if self.is_by_id or decoded is None else decoded

    def decode(self, token_id: int) -> str | None:
        """A token that comes without its text, as the first of a prompt does."""
        if self.tokenizer is None:
            return None
        return self.tokenizer.decode([token_id], skip_special_tokens=False)

    def utf8(self, token_id: int, decoded: str | None) -> list[int] | None:
        """The bytes of a token, which may be part of a character; None: not known."""
        if decoded is None or "\ufffd" not in decoded:
            return None if decoded is None else list(decoded.encode())
        assert self.tokenizer is not None
        piece = self.tokenizer.hf.convert_ids_to_tokens(token_id)
        if self.tokenizer.has_byte_tokens:
            return [int(piece[3:5], 16)] if piece.startswith("<0x") else list(decoded.encode())
        if not self._is_byte_level or not all(letter in _BYTE_OF_LETTER for letter in piece):
            return None
        return [_BYTE_OF_LETTER[letter] for letter in piece]

    @cached_property
    def _is_byte_level(self) -> bool:
        backend = None if self.tokenizer is None else getattr(self.tokenizer.hf, "backend_tokenizer", None)
        return backend is not None and b'"ByteLevel"' in backend.decoder.__getstate__()


def _letters() -> dict[str, int]:
    """GPT-2's alphabet, in which byte-level vocabularies are written: each letter's byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF_LETTER = _letters()


@dataclass
class CompletionLogprobs:
    """Those of one choice of /v1/completions, chunk by chunk: parallel lists by position."""

    spelling: Spelling
    has_special: bool  # whether the text shows special tokens
    _offset: int = 0  # of the next token, in characters of the text

    def chunk(self, token_ids: Sequence[int], positions: LogprobsList) -> dict[str, list[Any]]:
        spelling = self.spelling
        lists: dict[str, list[Any]] = {
            name: [] for name in ("text_offset", "token_logprobs", "tokens", "top_logprobs")
        }
        for token_id, position in zip(token_ids, positions, strict=True):
            own = None if position is None else position[token_id]
            decoded = spelling.decode(token_id) if own is None else own.decoded_token
            lists["text_offset"].append(self._offset)
            lists["tokens"].append(spelling.text(token_id, decoded))
            lists["token_logprobs"].append(None if own is None else _number(own))
            lists["top_logprobs"].append(None if position is None else self._by_text(position))
            self._offset += self._length(token_id, decoded or "")
        return lists

    def _length(self, token_id: int, decoded: str) -> int:
        tokenizer = self.spelling.tokenizer
        is_hidden = not self.has_special and tokenizer is not None and token_id in tokenizer.special_ids
        return 0 if is_hidden else len(decoded)

    def _by_text(self, position: PositionLogprobs) -> dict[str, float]:
        """The chosen and the likeliest tokens; of those that are written alike, the first."""
        found: dict[str, float] = {}
        for token_id, logprob in position.items():
            found.setdefault(self.spelling.text(token_id, logprob.decoded_token), _number(logprob))
        return found


def chat_logprobs(
    spelling: Spelling, token_ids: Sequence[int], positions: LogprobsList, num_top: int
) -> dict[str, Any]:
    """Those of one choice of /v1/chat/completions, or of a chunk of it."""

    def entry(token_id: int, logprob: Logprob) -> dict[str, Any]:
        return {
            "token": spelling.text(token_id, logprob.decoded_token),
            "logprob": _number(logprob),
            "bytes": spelling.utf8(token_id, logprob.decoded_token),
        }

    def top(position: PositionLogprobs) -> list[dict[str, Any]]:
        likeliest = sorted(position.items(), key=lambda item: item[1].rank or 0)[:num_top]
        return [entry(token_id, logprob) for token_id, logprob in likeliest]

    return {
        "content": [
            {**entry(token_id, position[token_id]), "top_logprobs": top(position)}
            for token_id, position in zip(token_ids, positions, strict=True)
            if position is not None
        ],
        "refusal": None,
    }


def prompt_logprobs(positions: LogprobsList) -> list[Mapping[str, Any] | None]:
    """vLLM's form: by position, the first being null; there by token id."""
    return [
        None
        if position is None
        else {
            str(token_id): {
                "logprob": _number(own),
                "rank": own.rank,
                "decoded_token": own.decoded_token,
            }
            for token_id, own in position.items()
        }
        for position in positions
    ]


def _number(logprob: Logprob) -> float:
    return max(logprob.logprob, _LOWEST)
