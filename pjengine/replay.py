"""Runs a recording again, step by step, and compares what comes out with what came out then."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pjengine.comparison import Difference, first_difference
from pjengine.config import EngineConfig
from pjengine.engine import LLMEngine
from pjengine.generation import Generation
from pjengine.loading import LoadedModel, load_model
from pjengine.recording import FORMAT, header, output_of, params_from_json
from pjengine.scoring import ask_scores

KEYS = {
    "submit": {"step", "request", "prompt_token_ids", "cache_salt", "params", "seed", "priority", "scored"},
    "abort": {"step", "request"},
    "reset": {"step"},
    "failure": {"step"},
    "output": {"request", "completions"},
}


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
                f"the recording is of another {name}: wanted {wanted}, got {own.get(name)}. Replay it "
                "with what it was recorded with"
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
                f"the recording has {recording.engine[name]} KV pages ({name}), and {fitting} fit here: "
                "free the device's memory"
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
        # As it would have been written.
        number: first_difference(number, wanted, json.loads(json.dumps(output_of(generations[number]))))
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
    if event["scored"] is not None:
        ask_scores(generation, **event["scored"])
    engine.submit(generation)
    return generation
