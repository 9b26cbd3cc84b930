"""Grammars that outputs must follow: compiled by llguidance, matched token by token, masks of what may come.

All of it runs on the host and beside the device. A mask is a bit for each token of the vocabulary.
"""

import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int

from pjengine.grammar_check import (
    OVER_LIMIT,
    GrammarCheck,
    compile_grammar,
    error_of,
    make_tokenizer,
    with_deep_stack,
)
from pjengine.schema_position import position_of
from pjengine.structured_outputs import StructuredOutputsParams
from pjengine.tokenizer import Tokenizer

MAX_CACHED = 64  # compiled grammars, of a few megabytes at most
MAX_PLACE_S = 2.0  # to find the part of a schema that is refused
_WHITESPACE = r"[ \t\r\n]{1,64}"  # bounded: some models would go on with it for ever
# The head of a rule in Lark's language: its name, its attributes, and texts and expressions among those.
_LARK_TEXT = r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])*/'
_LARK_HEAD = re.compile(
    rf'^[ \t]*[?!]?([\w:.-]+)[ \t]*\[((?:{_LARK_TEXT}|[^\]"/\n])*)\][ \t]*:', re.MULTILINE
)
_NO_TOKEN = "<|an end that no model has|>"


@dataclass(eq=False)
class Matcher:
    """How far an output is within its grammar. It follows the tokens that the host has read."""

    state: Any  # llguidance's
    name: str  # of the field that wants the grammar, and the beginning of what it wants

    @property
    def error(self) -> str:
        """Why it cannot go on, beginning with its name; empty: it can."""
        reason = error_of(self.state)
        return reason and f"{self.name} cannot be followed any further: {reason}"

    @property
    def is_complete(self) -> bool:
        """The output is what the grammar wants, and nothing can be added to it."""
        return self.state.is_stopped() and not self.state.is_error()

    @property
    def is_spent(self) -> bool:
        """Whether an output has gone beyond its limits, which those forked from the same start share."""
        ahead = self.state.deep_copy()
        ahead.compute_bitmask()
        return ahead.is_error()

    def consume(self, token: int) -> None:
        """Takes the next token of the output; `error` says so if it may not come here."""
        self.state.consume_token(token)

    def fork(self) -> "Matcher":
        """Another one at the same place, which goes its own way."""
        return Matcher(self.state.deep_copy(), self.name)


class Grammars:
    """The compiled grammars of one engine. Requests are prepared with it by any thread."""

    def __init__(self, tokenizer: Tokenizer | None, eos_token_ids: Sequence[int], vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._compiled: OrderedDict[str, Matcher] = OrderedDict()  # those used last are at its end
        self._lock = threading.Lock()  # of what is compiled
        self._compiling = threading.Lock()  # held by the one who compiles, while others take what there is
        self._is_closed = False

    def matcher(self, wanted: StructuredOutputsParams) -> Matcher:
        """A matcher at the start of an output.

        Raises:
          ValueError: there is no tokenizer, or llguidance cannot read it; the grammar makes no sense, takes
            too much time or memory, or no output satisfies it.
          RuntimeError: closed.
        """
        try:
            grammar = _source(wanted)
        except ValueError as error:
            raise _refusal(wanted, str(error)) from error
        if (matcher := self._kept(grammar)) is not None:
            return matcher
        with self._compiling:
            if (matcher := self._kept(grammar)) is not None:  # compiled in the meantime
                return matcher
            found = self._compile(wanted, grammar)
            matcher = found.fork()
            with self._lock:
                self._compiled[grammar] = found
                if len(self._compiled) > MAX_CACHED:
                    self._compiled.popitem(last=False)
            return matcher

    def _kept(self, grammar: str) -> Matcher | None:
        """A matcher of a grammar that is compiled already; None: it is not. RuntimeError: closed."""
        with self._lock:
            self._check_open()
            found = self._compiled.pop(grammar, None)
            if found is None or found.is_spent:
                return None
            self._compiled[grammar] = found
            return found.fork()

    def _compile(self, wanted: StructuredOutputsParams, grammar: str) -> Matcher:
        tokenizer, error, state = self._own_tokenizer, "", None
        if is_ebnf(wanted.grammar):
            lark, error = self._check.lark(grammar)
            grammar = _lark(lark)
        error = error or self._check.error(grammar)
        self._check_open()
        if not error:
            state, error = with_deep_stack(lambda: compile_grammar(tokenizer, grammar))
        if error and (own := self._whitespace_error(wanted)):
            raise _refusal(wanted, own, "whitespace_pattern")
        if error:
            raise _refusal(wanted, self._placed(wanted, error))
        return Matcher(state, _name(wanted))

    def _whitespace_error(self, wanted: StructuredOutputsParams) -> str:
        """Why no grammar could have its expression for whitespace; empty: it is not to blame."""
        from llguidance import LLMatcher

        pattern = wanted.whitespace_pattern
        return "" if pattern is None else self._check.error(LLMatcher.grammar_from_regex(pattern))

    def _placed(self, wanted: StructuredOutputsParams, error: str) -> str:
        """An error, and where in a JSON schema it is. Of other grammars llguidance says it."""
        if wanted.json is None or error.startswith(OVER_LIMIT):
            return error

        end = time.monotonic() + MAX_PLACE_S

        def error_of(part: dict[str, Any]) -> str:
            left_s = end - time.monotonic()
            return self._check.error(_source(replace(wanted, json=part)), left_s) if left_s > 0 else ""

        pointer, error = position_of(json.loads(wanted.json_text), error, error_of)
        return f"at {pointer}: {error}"

    @cached_property
    def _setup(self) -> tuple[str, list[int]]:
        """The arguments of `make_tokenizer`."""
        if self._tokenizer is None:
            raise ValueError("structured_outputs need a tokenizer, and skip_tokenizer_init=True")
        backend = getattr(self._tokenizer.hf, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                "structured_outputs are not possible with a slow tokenizer: give the model a tokenizer.json"
            )
        backend = copy(backend)
        backend.no_padding()
        backend.no_truncation()
        end_ids = [token for token in self._eos_token_ids if token < len(self._tokenizer)]
        if not end_ids:  # it wants one: none that can be sampled
            backend.add_special_tokens([_NO_TOKEN])
            end_ids = [backend.token_to_id(_NO_TOKEN)]
        return backend.to_str(), end_ids

    @cached_property
    def _own_tokenizer(self) -> Any:
        try:
            return make_tokenizer(*self._setup)
        except ValueError as error:
            setup_error = f"structured_outputs are not possible with this tokenizer: {error}"
            raise ValueError(setup_error[:300]) from error

    @cached_property
    def _check(self) -> GrammarCheck:
        return GrammarCheck(*self._setup)

    @cached_property
    def _threads(self) -> Any:
        from llguidance import LLExecutor

        return LLExecutor()

    @cached_property
    def _real_tokens(self) -> Int[np.ndarray, " words"]:
        """The mask of all tokens that the tokenizer has and the model knows."""
        assert self._tokenizer is not None
        bits = np.zeros(num_words(self._vocab_size) * 32, np.uint8)
        bits[: min(len(self._tokenizer), self._vocab_size)] = 1
        return np.packbits(bits, bitorder="little").view("<i4")

    @cached_property
    def _num_full(self) -> int:
        """Words at the beginning that have a token for each bit: there is nothing to clear in them."""
        return int(np.argmin(np.append(self._real_tokens, 0) == -1))

    def masks(
        self, matchers: Sequence[Matcher], known: Mapping[int, int] | None = None
    ) -> Int[np.ndarray, "matchers words"]:
        """What may come next, as `Masks` has it; nothing, where a matcher cannot go on.

        `known` has, by place among the matchers, tokens that must come: these have been consumed already.
        """
        words = np.zeros((len(matchers), num_words(self._own_tokenizer.vocab_size)), np.int32)
        if len(matchers) == 1:
            matchers[0].state.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        else:
            jobs = [(matcher.state, index) for index, matcher in enumerate(matchers)]
            self._threads.unsafe_compute_mask_ptr(jobs, words.ctypes.data, words.strides[0], len(jobs))
        for index, matcher in enumerate(matchers):
            if matcher.state.is_error():
                words[index] = 0
        real = self._real_tokens
        words = words[:, : len(real)]
        if missing := len(real) - words.shape[1]:
            words = np.pad(words, ((0, 0), (0, missing)))
        words[:, self._num_full :] &= real[self._num_full :]
        for index, token in (known or {}).items():
            words[index] = 0
            words.view(np.uint32)[index, token // 32] = np.uint32(1 << token % 32)
        return words

    def close(self) -> None:
        """Ends the process that tries grammars, and with it what is compiled there."""
        self._is_closed = True
        if "_check" in self.__dict__:
            self._check.interrupt()
        with self._compiling, self._lock:
            if "_check" in self.__dict__:
                self._check.close()
            self._compiled.clear()

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("this engine is closed; create another")


def num_words(num_tokens: int) -> int:
    """Of 32 bits, one bit for each token."""
    return -(-num_tokens // 32)


def _refusal(wanted: StructuredOutputsParams, reason: str, field: str | None = None) -> ValueError:
    return ValueError(f"{_name(wanted, field)} cannot be followed: {reason}")


def _name(wanted: StructuredOutputsParams, field: str | None = None) -> str:
    """How an error names a field; None: the one that says what form is wanted."""
    field = field or wanted.kind
    source = wanted.json_text if field == "json" else getattr(wanted, field)
    return f"structured_outputs.{field}={source!r:.80}"


def _source(wanted: StructuredOutputsParams) -> str:
    """What llguidance compiles; EBNF as it is. ValueError: it is no JSON. If it makes sense shows later."""
    from llguidance import LLMatcher

    if wanted.kind in ("json", "json_object"):
        options: Any = {"whitespace_flexible": not wanted.disable_any_whitespace, "lenient": False}
        if not wanted.disable_any_whitespace:
            options["whitespace_pattern"] = wanted.whitespace_pattern or _WHITESPACE
        return LLMatcher.grammar_from_json_schema(wanted.json_text, overrides=options)
    if wanted.grammar is not None:
        return wanted.grammar if is_ebnf(wanted.grammar) else _lark(wanted.grammar)
    if wanted.regex is not None:
        return LLMatcher.grammar_from_regex(wanted.regex)
    texts = "|".join("".join(map(_escaped, text)) for text in wanted.choice or ())
    return LLMatcher.grammar_from_regex(f"(?:{texts})")


def is_ebnf(grammar: str | None) -> bool:
    """Whether a grammar has rules as in `root ::= "a"`, which Lark's language has not."""
    return grammar is not None and re.search(r"^\s*[\w-]+\s*::=", grammar, re.MULTILINE) is not None


def _lark(grammar: str) -> str:
    """ValueError: a rule has a temperature, which llguidance leaves to the sampler."""
    from llguidance import LLMatcher

    for name, attributes in _LARK_HEAD.findall(grammar):
        if re.search(r"\btemperature\s*=", re.sub(_LARK_TEXT, "", attributes)):
            raise ValueError(
                f"rule {name} has a temperature, and here an output has one throughout: "
                "leave it out, and set that of the request"
            )
    return LLMatcher.grammar_from_lark(grammar)


def _escaped(character: str) -> str:
    """A character that stands for itself in an expression."""
    return character if character.isalnum() else f"\\x{{{ord(character):x}}}"
