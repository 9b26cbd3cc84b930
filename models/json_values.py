"""JSON that others wrote: read from a file, its values checked against a table of what each key must hold."""

import json
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Wanted(NamedTuple):
    """What a key must hold, in words, and the check of it."""

    text: str
    holds: Callable[[Any], bool]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    # By comparison, because float() overflows on what json takes for an integer; false for NaN.
    return isinstance(value, float | int) and not isinstance(value, bool) and -1e300 < value < 1e300


SIZE = Wanted("an integer > 0", lambda value: _is_int(value) and 0 < value < 2**63)
INDEXES = Wanted(
    "a list of integers >= 0",
    lambda value: isinstance(value, list | tuple) and all(_is_int(i) and i >= 0 for i in value),
)
NUMBER = Wanted("a finite number", _is_number)
NUMBERS = Wanted(
    "a list of finite numbers", lambda value: isinstance(value, list | tuple) and all(map(_is_number, value))
)
POSITIVE = Wanted("a finite number > 0", lambda value: _is_number(value) and value > 0)
NON_NEGATIVE = Wanted("a finite number >= 0", lambda value: _is_number(value) and value >= 0)
FLAG = Wanted("true or false", lambda value: isinstance(value, bool))
TEXT = Wanted("a text", lambda value: isinstance(value, str))
TEXTS = Wanted(
    "a list of texts",
    lambda value: isinstance(value, list | tuple) and all(isinstance(i, str) for i in value),
)
OBJECT = Wanted("a JSON object", lambda value: isinstance(value, Mapping))
TOKEN_ID = Wanted("a token id", _is_int)
TOKEN_IDS = Wanted(
    "a token id or a list of them",
    lambda value: _is_int(value) or (isinstance(value, list | tuple) and all(map(_is_int, value))),
)


def check_values(values: Mapping[str, Any], table: Mapping[str, Wanted], where: str = "config.json") -> None:
    """Raises ValueError for the first key that does not hold what the table wants; null and absence pass."""
    for key, wanted in table.items():
        value = values.get(key)
        if value is not None and not wanted.holds(value):
            raise ValueError(f"{where} must hold {key} as {wanted.text}, got {reprlib.repr(value)}")


def read_json_object(path: Path) -> dict[str, Any]:
    """Returns what a file such as config.json holds.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is no JSON, or JSON of another kind than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError too
        raise ValueError(f"{path}: wanted JSON, got something else: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: wanted a JSON object, got {reprlib.repr(value)}")
    return value
