"""Reads what `recording.py` writes, and refuses what it would not have written."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pjengine.config import is_whole
from pjengine.recording import FORMAT, params_from_json


def _is_count(value: Any) -> bool:
    return is_whole(value) and value >= 0


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _is_scored(value: Any) -> bool:
    is_whole_one = isinstance(value, dict) and value.keys() == {"last", "first", "fork"}
    return is_whole_one and _is_count(value["last"]) and is_whole(value["first"])


def _are_completions(value: Any) -> bool:
    names = {"finish_reason", "token_ids", "logprobs", "cumulative_logprob"}
    return isinstance(value, list) and all(
        isinstance(own, dict) and names <= own.keys() and _are_ids(own["token_ids"]) for own in value
    )


# Of a value: whether it is one, and its name in errors.
_Kind = tuple[Callable[[Any], bool], str]
_COUNT: _Kind = (_is_count, "a whole number of at least 0")
_WHOLE: _Kind = (is_whole, "a whole number")
_OBJECT: _Kind = (lambda value: isinstance(value, dict), "an object")
_TEXT: _Kind = (lambda value: isinstance(value, str), "a text")


def _or_null(kind: _Kind) -> _Kind:
    return (lambda value: value is None or kind[0](value), f"{kind[1]}, or null")


_ENGINE: dict[str, _Kind] = {
    "settings": _OBJECT,
    "facts": _OBJECT,
    "num_pages": _COUNT,
    "num_window_pages": _or_null(_COUNT),
}
_EVENTS: dict[str, dict[str, _Kind]] = {
    "submit": {
        "step": _COUNT,
        "request": _COUNT,
        "prompt_token_ids": (_are_ids, "a list of token ids"),
        "cache_salt": _TEXT,
        "params": _OBJECT,
        "seed": _or_null(_WHOLE),
        "priority": _WHOLE,
        "scored": _or_null((_is_scored, "an object of last, first and fork")),
    },
    "abort": {"step": _COUNT, "request": _COUNT},
    "reset": {"step": _COUNT},
    "failure": {"step": _COUNT},
    "output": {
        "request": _COUNT,
        "completions": (_are_completions, "a list of continuations, each whole"),
        "prompt_logprobs": _or_null((lambda value: isinstance(value, list), "a list")),
        "hidden_states": _or_null(_TEXT),
    },
}


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What a file holds."""

    engine: Mapping[str, Any]
    events: list[Mapping[str, Any]]  # what was done to the engine, in order
    outputs: Mapping[int, Mapping[str, Any]]  # by the request's number


def read_recording(path: str | Path) -> Recording:
    """Reads what `Recorder` wrote.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is no recording, or one of another format, or damaged; the text names the line.
    """
    lines = Path(path).read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()  # the process ended while it wrote
    parsed = [_parsed(f"{path}, line {number}", line) for number, line in enumerate(lines, 1)]
    if not parsed or parsed[0].get("event") != "engine" or parsed[0].get("format") != FORMAT:
        raise ValueError(f"{path} is no recording of format {FORMAT}: wanted a file that --record wrote")
    _check_fields(f"{path}, line 1", parsed[0], _ENGINE)
    events: list[Mapping[str, Any]] = []
    outputs: dict[int, Mapping[str, Any]] = {}
    num_continuations: dict[int, int | None] = {}  # of the requests so far; None: of beams
    for number, line in enumerate(parsed[1:], 2):
        place, event = f"{path}, line {number}", line.get("event")
        if not isinstance(event, str) or event not in _EVENTS:
            raise ValueError(f"{place}: wanted one of {', '.join(_EVENTS)}, got {event!r:.80}")
        _check_fields(place, line, _EVENTS[event])
        if event == "submit":
            if line["request"] in num_continuations:
                raise ValueError(
                    f"{place}: request {line['request']} has come before: lines are out of order"
                )
            num_continuations[line["request"]] = _num_continuations(place, line)
        elif line.get("request", None) is not None:
            _check_answers(place, line, num_continuations, outputs)
        if event == "output":
            outputs[line["request"]] = line
            continue
        if events and line["step"] < events[-1]["step"]:
            raise ValueError(f"{place}: step {line['step']} comes after {events[-1]['step']}: out of order")
        events.append(line)
    return Recording(engine=parsed[0], events=events, outputs=outputs)


def _parsed(place: str, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or deeper than any that was written
        raise ValueError(f"{place}: no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{place}: wanted a JSON object, got {line!r:.80}")
    return value


def _check_fields(place: str, line: Mapping[str, Any], kinds: Mapping[str, _Kind]) -> None:
    for name, (is_valid, wanted) in kinds.items():
        if name not in line:
            raise ValueError(f"{place}: the {line['event']} has no {name}: wanted {wanted}")
        if not is_valid(line[name]):
            raise ValueError(
                f"{place}: {name} of the {line['event']} must be {wanted}, got {line[name]!r:.80}"
            )


def _num_continuations(place: str, line: Mapping[str, Any]) -> int | None:
    try:
        params = params_from_json(line["params"], line["seed"])
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{place}: params are none of a request: {error}") from error
    return None if params.use_beam_search else params.num_sequences


def _check_answers(
    place: str,
    line: Mapping[str, Any],
    num_continuations: Mapping[int, int | None],
    outputs: Mapping[int, Mapping[str, Any]],
) -> None:
    """Raises ValueError where a line is of a request that there is not, or not any more."""
    event, request = line["event"], line["request"]
    if request not in num_continuations:
        raise ValueError(f"{place}: the {event} is of request {request}, whose submit is not before it")
    if request in outputs:
        raise ValueError(f"{place}: the {event} is of request {request}, whose output is before it")
    wanted = num_continuations[request]
    if event == "output" and wanted is not None and len(line["completions"]) != wanted:
        raise ValueError(
            f"{place}: request {request} has {wanted} continuations, and {len(line['completions'])} are here"
        )
