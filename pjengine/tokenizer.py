"""Text to token ids and back: encoding, chat templates, and decoding one token at a time."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from pjengine.models.json_values import read_json_object
from pjengine.sentencepiece_model import read_sentencepiece

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
_JSON_FILES = (*_FILES, "added_tokens.json", "config.json", "special_tokens_map.json")
_REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no UTF-8, incomplete characters among them
_CONTEXT = 4  # tokens, which hold more bytes than the three that an incomplete character may have


class _Kind(Enum):
    """How a token id takes part in decoding."""

    TEXT = 0
    BYTE = 1  # one byte of a character that the vocabulary lacks: <0x00> ... <0xFF>
    SPECIAL = 2
    UNKNOWN = 3  # beyond the vocabulary, as in models whose embedding is padded: decodes to nothing


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A Hugging Face tokenizer; decoding never tidies spaces up, which would damage code."""

    hf: Any
    chat_template: str | None = None  # Jinja text; None: the tokenizer's own
    # SentencePiece vocabularies spell rare characters as byte tokens and judge a whole run of them at once:
    # valid UTF-8 or all replaced. Byte-level ones, without such tokens, judge byte by byte.
    has_byte_tokens: bool
    _kinds: dict[int, _Kind] = field(default_factory=dict, repr=False)

    @property
    def eos_token_id(self) -> int | None:
        return self.hf.eos_token_id

    def __len__(self) -> int:
        return len(self.hf)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that `skip_special_tokens` hides."""
        if not hasattr(self.hf, "backend_tokenizer"):
            return frozenset(self.hf.all_special_ids)
        return frozenset(i for i, token in self.hf.added_tokens_decoder.items() if token.special)

    @cached_property
    def special_texts(self) -> frozenset[str]:
        return frozenset(self.hf.convert_ids_to_tokens(sorted(self.special_ids)))

    @cached_property
    def anchor(self) -> tuple[int | None, str]:
        """A token that decodes to plain letters wherever it stands, and these letters.

        Decoders treat the first token of a text differently (a leading space goes). Behind an anchor none is
        first, so that a few tokens can be decoded without those before them.
        """
        for token in range(len(self)):
            if self.kind(token) is _Kind.TEXT:
                text = self.decode_all([token])
                if text.isascii() and text.isalnum() and self.decode_all([token, token]) == text * 2:
                    return token, text
        return None, ""

    @cached_property
    def longest_token(self) -> int | None:
        """Characters of a text that a token stands for, at most; None: there is no bound.

        There is none where whatever is unknown becomes one token, or where spaces vanish.
        """
        backend = getattr(self.hf, "backend_tokenizer", None)
        if backend is None or not (self.has_byte_tokens or _is_byte_level(backend)):
            return None
        if any(token.lstrip or token.rstrip for token in self.hf.added_tokens_decoder.values()):
            return None
        longest = max(map(len, self.hf.get_vocab()))
        are_spaces_kept = len(self.encode("a" + " " * 8 * longest + "a", add_special_tokens=False)) >= 8
        return longest if are_spaces_kept else None

    def check_length(self, text: str, max_tokens: int) -> None:
        """Raises ValueError for a text that must have more tokens: at once, where to encode it takes long."""
        longest = self.longest_token
        if longest is not None and len(text) > max_tokens * longest:
            raise ValueError(
                f"the prompt has {len(text)} characters; with max_model_len={max_tokens + 1} at most "
                f"{max_tokens} tokens of at most {longest} characters fit. Shorten it or raise max_model_len"
            )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the token ids, with the special tokens (such as BOS) that the tokenizer itself adds.

        Raises:
          ValueError: the text is no Unicode, but holds half of a surrogate pair.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text holds a lone surrogate at character {error.start}") from error
        return list(self.hf.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        hidden = (_Kind.SPECIAL, _Kind.UNKNOWN) if skip_special_tokens else (_Kind.UNKNOWN,)
        return self.decode_all([token for token in token_ids if self.kind(token) not in hidden])

    def decode_all(self, token_ids: list[int]) -> str:
        """Decodes ids of the vocabulary, special tokens included."""
        backend = getattr(self.hf, "backend_tokenizer", None)
        if backend is not None:  # a tenth of the cost of the method of `hf`, which does the same
            return backend.decode(token_ids, skip_special_tokens=False)
        return self.hf.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **template_kwargs: Any,
    ) -> str:
        """Returns the prompt that a chat template makes of a conversation.

        Raises:
          ValueError: there is no template, or it does not take these messages.
        """
        import jinja2

        template = chat_template or self.chat_template
        if template is None and not self.hf.chat_template:
            raise ValueError("chat needs a chat template, and this tokenizer has none: pass chat_template")
        try:
            return self.hf.apply_chat_template(
                [dict(message) for message in messages],
                tools=None if tools is None else [dict(tool) for tool in tools],
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **template_kwargs,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template does not take these messages: {error}") from error

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Returns the ids of `render_chat`'s text, to which the template has added the special tokens."""
        return self.encode(self.render_chat(messages, **options), add_special_tokens=False)

    def kind(self, token_id: int) -> _Kind:
        known = self._kinds.get(token_id)
        if known is None:
            known = self._kinds[token_id] = self._classify(token_id)
        return known

    def _classify(self, token_id: int) -> _Kind:
        if token_id in self.special_ids:
            return _Kind.SPECIAL
        text = self.hf.convert_ids_to_tokens(token_id) if 0 <= token_id < len(self) else None
        if text is None:
            return _Kind.UNKNOWN
        is_byte = self.has_byte_tokens and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        return _Kind.BYTE if is_byte else _Kind.TEXT


def load_tokenizer(folder: str | Path, *, chat_template: str | None = None) -> Tokenizer:
    """Loads the tokenizer of a model's folder: tokenizer.json, or a SentencePiece model. Runs no remote code.

    Raises:
      OSError: the folder holds no tokenizer.
      ValueError: a file of the tokenizer is broken.
      NotImplementedError: the tokenizer is nothing but code of the checkpoint's own, or a kind of
        SentencePiece model that is not supported.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in _FILES):
        raise OSError(f"{folder}: wanted a tokenizer, found none of {', '.join(_FILES)}: pass tokenizer=...")
    # It advises to install PyTorch, whenever it is imported without.
    logging.getLogger("transformers").addFilter(_is_no_advice)
    try:
        hf = _load(folder)
    except Exception as error:  # the Rust library raises Exception itself, transformers many kinds
        raise _explain(folder, error) from error
    hf.model_max_length = 2**62  # the engine has its own limit, and refuses; this one only warns
    backend = getattr(hf, "backend_tokenizer", None)
    # Without a backend it is SentencePiece's own decoder, which has byte tokens too.
    decoder = None if backend is None else backend.decoder  # which a tokenizer.json may do without
    has_byte_tokens = backend is None or (decoder is not None and b'"ByteFallback"' in decoder.__getstate__())
    return Tokenizer(hf=hf, chat_template=chat_template, has_byte_tokens=has_byte_tokens)


def _explain(folder: Path, error: Exception) -> Exception:
    """Returns what to raise for a tokenizer that does not load, by the file that is to blame."""
    for path in sorted(folder.glob("*.json")):
        if path.name in _JSON_FILES:
            try:
                read_json_object(path)
            except ValueError as broken:
                return broken
    if isinstance(error, ImportError | OSError | NotImplementedError):
        return error
    files = ", ".join(name for name in _FILES if (folder / name).is_file())
    reason = f"{type(error).__name__}: {str(error)[:500]}"
    return ValueError(
        f"{folder}: wanted a tokenizer that loads, got {files}, of which one is broken: {reason}"
    )


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = folder / "tokenizer_config.json"
    settings = read_json_object(path) if path.is_file() else {}
    if (folder / "tokenizer.json").is_file():
        if "auto_map" in settings:  # code of the checkpoint's own, which tokenizer.json makes needless
            return PreTrainedTokenizerFast.from_pretrained(str(folder))
    elif (folder / "tokenizer.model").is_file():
        return _load_sentencepiece(folder, settings)
    elif "auto_map" in settings:
        raise NotImplementedError(
            f"{folder}: the tokenizer is code of the checkpoint's own, which is not run: add a "
            "tokenizer.json or a SentencePiece tokenizer.model, or pass tokenizer=... that has one"
        )
    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)


def _load_sentencepiece(folder: Path, settings: Mapping[str, Any]) -> Any:
    """Loads a tokenizer.model, whatever class is named to read it: a slow one, or the checkpoint's own."""
    from transformers import PreTrainedTokenizerFast

    path = folder / "special_tokens_map.json"
    settings = {**(read_json_object(path) if path.is_file() else {}), **settings}
    backend, names = read_sentencepiece(folder, settings)
    path = folder / "chat_template.jinja"
    template = path.read_text(encoding="utf-8") if path.is_file() else settings.get("chat_template")
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **names)


def _is_byte_level(backend: Any) -> bool:
    """Whether each byte has a token, so that none is unknown."""
    from tokenizers import pre_tokenizers

    return all(backend.token_to_id(letter) is not None for letter in pre_tokenizers.ByteLevel.alphabet())


def _is_no_advice(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()


class IncrementalDetokenizer:
    """Turns one request's tokens into text as they come.

    What `push` and `finish` return, put together, is `tokenizer.decode` of all the tokens. Nothing is
    returned before it is settled: no half characters, and no run of byte tokens while it may still grow.
    What is, is returned at once, however the tokens are split into pushes; n tokens cost O(n).
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()
    ) -> None:
        """`prompt_ids`: what the text continues; without, a leading space goes, as in `decode`."""
        self._tokenizer = tokenizer
        self._hidden = (_Kind.SPECIAL, _Kind.UNKNOWN) if skip_special_tokens else (_Kind.UNKNOWN,)
        self._anchor, self._anchor_text = tokenizer.anchor
        self._is_at_start = not tokenizer.decode(prompt_ids, skip_special_tokens=skip_special_tokens)
        self._pending: list[int] = []  # tokens whose text has not been returned, or not all of it
        self._num_returned = 0  # characters of their text

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes the next tokens and returns the text that they settle, perhaps none."""
        kind = self._tokenizer.kind
        num_old, pending = len(self._pending), self._pending
        pending += [token for token in token_ids if kind(token) not in self._hidden]
        if self._tokenizer.has_byte_tokens:
            cut = len(pending)
            while cut > num_old and kind(pending[cut - 1]) is _Kind.BYTE:
                cut -= 1
            if cut == num_old:  # what was pending still is: a run of byte tokens, or what has no text
                return ""
            text = self._decode(cut)
            self._drop(cut, text)
            return text
        if len(pending) == num_old:
            return ""
        text = self._decode(len(pending))
        new_text = text[self._num_returned :]
        if not text.endswith(_REPLACEMENT):
            self._drop(len(pending), text)
            return new_text
        # The last character may be an incomplete one; decoders go from left to right, so no other may.
        self._num_returned = len(text) - 1
        if len(pending) > 2 * _CONTEXT:
            # What is left may begin in the middle of a character, but its end reads as it did.
            cut = len(pending) - _CONTEXT
            self._drop(cut, self._decode(cut))
            self._num_returned = len(self._decode(len(pending))) - 1
        return new_text[:-1]

    def finish(self) -> str:
        """Returns the rest of the text, whatever it is."""
        text = self._decode(len(self._pending))[self._num_returned :]
        self._pending, self._num_returned = [], 0
        return text

    def _decode(self, count: int) -> str:
        """Decodes the first pending tokens as a continuation of those before them."""
        if not count:
            return ""
        ids = self._pending[:count]
        if self._is_at_start or self._anchor is None:
            return self._tokenizer.decode_all(ids)
        return self._tokenizer.decode_all([self._anchor, *ids])[len(self._anchor_text) :]

    def _drop(self, count: int, text: str) -> None:
        """Forgets tokens whose text has been returned, or is being."""
        if text:
            self._is_at_start = False
        if text or not self._is_at_start:
            del self._pending[:count]
        self._num_returned = 0
