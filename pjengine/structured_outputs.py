"""What form the output of a request must have. Plain Python."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pjengine.schema_position import inexact_number

MAX_SOURCE_CHARS = 1_000_000  # of a schema, a grammar, an expression or all choices together
KINDS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """The form that the output of a request must have: exactly one of the first five.

    Raises:
      ValueError: none of them is given, or several, or one has the wrong type or is empty; the text names
        field and value. Whether a schema, an expression or a grammar makes sense is found out when the
        request is prepared.
    """

    json: str | Mapping[str, Any] | None = None  # a JSON schema; its properties come in its order
    regex: str | None = None  # the whole output matches it, as Rust's regex reads it
    choice: Sequence[str] | None = None  # the output is one of these
    grammar: str | None = (
        None  # in Lark's language, as llguidance reads it, or EBNF with a rule `root ::= ...`
    )
    json_object: bool = False  # any JSON object
    disable_any_whitespace: bool = False  # between the tokens of JSON
    whitespace_pattern: str | None = (
        None  # the expression for it instead; None: up to 64 characters at a time
    )

    def __post_init__(self) -> None:
        if not isinstance(self.json_object, bool):
            raise ValueError(f"json_object must be bool, got {self.json_object!r:.80}")
        given = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            shown = ", ".join(f"{name}={getattr(self, name)!r:.40}" for name in given) or "none"
            raise ValueError(f"structured outputs take exactly one of {', '.join(KINDS)}, got {shown}")
        self._check_source()
        self._check_whitespace()

    @property
    def kind(self) -> str:
        """Which of KINDS is given."""
        return next(name for name in KINDS if getattr(self, name) not in (None, False))

    @cached_property
    def json_text(self) -> str:
        """The schema of `json` or `json_object` as it is written."""
        if self.json is None:
            return '{"type": "object"}'
        return (
            self.json
            if isinstance(self.json, str)
            else json.dumps(self.json, allow_nan=False, ensure_ascii=False)
        )

    def _check_source(self) -> None:
        if self.choice is not None:
            if not isinstance(self.choice, list | tuple) or not self.choice:
                raise ValueError(f"choice must be a list of at least one text, got {self.choice!r:.80}")
            for text in self.choice:
                if not isinstance(text, str) or not text:
                    raise ValueError(f"choice must hold texts that are not empty, got {text!r:.80}")
        for name in ("regex", "grammar", "whitespace_pattern"):
            text = getattr(self, name)
            if text is not None and (not isinstance(text, str) or not text):
                raise ValueError(f"{name} must be a text that is not empty, got {text!r:.80}")
        if self.json is not None:
            self._check_schema()
        texts = (
            *(self.choice or ()),
            self.regex or "",
            self.grammar or "",
            "" if self.json is None else self.json_text,
        )
        if (size := sum(map(len, texts))) > MAX_SOURCE_CHARS:
            raise ValueError(f"{self.kind} must have at most {MAX_SOURCE_CHARS} characters, got {size}")
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"{self.kind} holds a lone surrogate at character {error.start} of {text!r:.40}"
                ) from error

    def _check_schema(self) -> None:
        if not isinstance(self.json, str | Mapping):
            raise ValueError(f"json must be a JSON schema, as a dict or a text, got {self.json!r:.80}")
        try:
            schema = json.loads(self.json_text)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"json must be a JSON schema, got {self.json!r:.80}: {error}") from error
        if not isinstance(schema, dict):
            raise ValueError(f"json must be a JSON schema that is an object, got {self.json!r:.80}")
        if (found := inexact_number(schema)) is not None:
            pointer, number = found
            raise ValueError(
                "json must hold whole numbers that a float64 keeps exactly, below 2**63: leave out or round "
                f"the one at {pointer}; got {number!r:.80}"
            )

    def _check_whitespace(self) -> None:
        if not isinstance(self.disable_any_whitespace, bool):
            raise ValueError(f"disable_any_whitespace must be bool, got {self.disable_any_whitespace!r:.80}")
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise ValueError(
                "disable_any_whitespace leaves no room for "
                f"whitespace_pattern={self.whitespace_pattern!r:.80}: give one of them"
            )
        is_changed = self.disable_any_whitespace or self.whitespace_pattern is not None
        if is_changed and self.kind not in ("json", "json_object"):
            field = "disable_any_whitespace" if self.disable_any_whitespace else "whitespace_pattern"
            raise ValueError(f"{field} goes with json or json_object, got {self.kind}")
