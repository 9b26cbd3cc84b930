"""Runs a recording again, step by step, and compares what comes out with what came out then."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pjengine.config import EngineConfig
from pjengine.engine import LLMEngine
from pjengine.generation import Generation
from pjengine.loading import LoadedModel, load_model
from pjengine.recording import FORMAT, header, output_of, params_from_json

KEYS = {
    "submit": {"step", "request", "prompt_token_ids", "params", "seed", "priority"},
    "abort": {"step", "request"},
    "reset": {"step"},
    "failure": {"step"},
    "output": {"request", "completions"},
}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Where two runs of a request part for the first time."""

    request: int  # by order of arrival, from 0
    continuation: int | None  # which of its `n`; None: it is about the prompt
    position: int | None  # of the output's tokens, or the prompt's; None: it is about the whole
    what: str
    wanted: Any
    got: Any

    def __str__(self) -> str:
        of = "" if self.continuation is None else f", continuation {self.continuation}"
        at = "" if self.position is None else f" at position {self.position}"
        return f"request {self.request}{of}: {self.what}{at}: wanted {self.wanted!r}, got {self.got!r}"


@dataclass(frozen=True, kw_only=True)
class ReplayReport:
    """What a replay found."""

    num_requests: int  # that were compared
    num_tokens: int  # of their outputs
    num_unended: int  # requests that the recording has no end of
    num_differences: int  # requests that came out differently
    first: Difference | None
    is_cut_short: bool  # by a step that failed when it was recorded

    @property
    def as_json(self) -> dict[str, Any]:
        return asdict(self)


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
      ValueError: it is no recording, or one of another format; the text names the line.
    """
    lines = Path(path).read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # the process ended while it wrote
    parsed = [_parsed(path, number, line) for number, line in enumerate(lines, 1)]
    if not parsed or parsed[0].get("event") != "engine" or parsed[0].get("format") != FORMAT:
        raise ValueError(f"{path} is no recording of format {FORMAT}: wanted a file that --record wrote")
    events: list[Mapping[str, Any]] = []
    outputs: dict[int, Mapping[str, Any]] = {}
    for number, line in enumerate(parsed[1:], 2):
        event = line.get("event")
        if event not in KEYS or not KEYS[event] <= line.keys():
            raise ValueError(f"{path}, line {number}: wanted one of {', '.join(KEYS)}, whole; got {event!r}")
        if event == "output":
            outputs[line["request"]] = line
        else:
            events.append(line)
    return Recording(engine=parsed[0], events=events, outputs=outputs)


def _parsed(path: str | Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}, line {number}: wanted a JSON object, got {line!r:.80}")
    return value


def replay(recording: Recording, *, model: str | None = None) -> ReplayReport:
    """Runs a recording again: each request comes before the same step as then, on as many pages.

    Args:
      model: where the model is now; None: where it was.

    Raises:
      ValueError: the model, a version, the device or a size is another one; the text says which.
    """
    engine = start_again(recording, model)
    try:
        return _run(engine, recording)
    finally:
        engine.close()


def start_again(recording: Recording, model: str | None = None) -> LLMEngine:
    """The engine of a recording, idle; raises as `replay`."""
    settings = {**recording.engine["settings"]} | ({} if model is None else {"model": model})
    # Named as if it recorded: then it waits for programs, and its weights are known by a digest.
    config = EngineConfig(**settings, record="replayed", warm_up=False)
    loaded = with_pages(load_model(config), recording)
    own = header(config, loaded)["facts"]
    for name, wanted in recording.engine["facts"].items():
        if own.get(name) != wanted:
            raise ValueError(
                f"the recording is of another {name}: wanted {wanted}, got {own.get(name)}. Replay it with what "
                "it was recorded with"
            )
    return LLMEngine(replace(config, record=None), loaded)


def with_pages(loaded: LoadedModel, recording: Recording) -> LoadedModel:
    """As many KV pages as there were: how many fit depends on what else takes memory.

    Raises:
      ValueError: fewer fit.
    """
    sizes, group = loaded.runner_config, loaded.runner_config.window_group
    counts = [("num_pages", sizes.num_pages)] + ([("num_window_pages", group.num_pages)] if group else [])
    for name, fitting in counts:
        if fitting < recording.engine[name]:
            raise ValueError(
                f"the recording has {recording.engine[name]} KV pages ({name}), and {fitting} fit here: free the "
                "device's memory"
            )
    if group is not None:
        group = replace(group, num_pages=recording.engine["num_window_pages"])
    sizes = replace(sizes, num_pages=recording.engine["num_pages"], window_group=group)
    return replace(loaded, runner_config=sizes)


def _run(engine: LLMEngine, recording: Recording) -> ReplayReport:
    generations: dict[int, Generation] = {}
    num_steps, is_cut_short = 0, False
    for event in recording.events:
        while num_steps < event["step"]:
            engine.advance()
            num_steps += 1
        if event["event"] == "submit":
            generations[event["request"]] = _submit(engine, event)
        elif event["event"] == "abort":
            engine.abort_request(generations[event["request"]].request.request_id)
        elif event["event"] == "reset":
            engine.reset_prefix_cache()
        else:
            is_cut_short = True
            break
    while engine.has_unfinished_requests() and not is_cut_short:
        engine.advance()
    found = {
        number: _first_difference(number, wanted, output_of(generations[number]))
        for number, wanted in recording.outputs.items()
    }
    differences = [difference for difference in found.values() if difference is not None]
    return ReplayReport(
        num_requests=len(found),
        num_tokens=sum(
            len(own["token_ids"]) for wanted in recording.outputs.values() for own in wanted["completions"]
        ),
        num_unended=len(generations) - len(found),
        num_differences=len(differences),
        first=min(differences, key=lambda difference: difference.request, default=None),
        is_cut_short=is_cut_short,
    )


def _submit(engine: LLMEngine, event: Mapping[str, Any]) -> Generation:
    prompt = {"prompt_token_ids": event["prompt_token_ids"], "cache_salt": event["cache_salt"]}
    params = params_from_json(event["params"], event["seed"])
    generation = engine.prepare(prompt, params, priority=event["priority"])
    request = generation.request
    request.max_cached, request.next_token = event["max_cached"], event["next_token"]
    request.is_cache_read = event["is_cache_read"]
    engine.submit(generation)
    return generation


def _first_difference(number: int, wanted: Mapping[str, Any], got: Mapping[str, Any]) -> Difference | None:
    got = json.loads(json.dumps(got))  # as it would have been written
    completions = zip(wanted["completions"], got["completions"], strict=True)
    for continuation, (own, other) in enumerate(completions):
        for what in ("token_ids", "logprobs", "cumulative_logprob", "finish_reason"):
            if own[what] != other[what]:
                return _difference(number, continuation, what, own[what], other[what])
    for what in ("prompt_logprobs", "hidden_states"):
        if wanted[what] != got[what]:
            return _difference(number, None, what, wanted[what], got[what])
    return None


def _difference(number: int, continuation: int | None, what: str, wanted: Any, got: Any) -> Difference:
    """Where two lists part; of what is no list, the whole."""
    if what == "prompt_logprobs" and wanted and got:
        wanted, got = wanted[0], got[0]
    position = None
    if isinstance(wanted, list) and isinstance(got, list):
        position = first_unequal(wanted, got)
        wanted, got = ((own[position] if position < len(own) else None) for own in (wanted, got))
    return Difference(
        request=number, continuation=continuation, position=position, what=what, wanted=wanted, got=got
    )


def first_unequal(one: Iterable[Any], other: Iterable[Any]) -> int:
    """The first place where two lists differ, one of which may be the beginning of the other."""
    position = 0
    for position, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return position
    return position + 1
