"""Runs a recording again, step by step, and compares what comes out with what came out then."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import pjengine
from pjengine.comparison import Difference, first_difference
from pjengine.config import EngineConfig
from pjengine.engine import LLMEngine
from pjengine.generation import Generation
from pjengine.loading import LoadedModel, load_model
from pjengine.recording import UNRECORDED, header, output_of, params_from_json
from pjengine.recording_reader import Recording
from pjengine.scoring import ask_scores


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
    facts = recording.engine["facts"]
    _check_same(facts, {"pjengine": pjengine.__version__})  # before settings, which a version may not have
    settings = {**recording.engine["settings"]} | ({} if model is None else {"model": model})
    _check_settings(settings)
    # Named as if it recorded: then it waits for programs, and its weights are known by a digest.
    config = EngineConfig(**settings, record="replayed", warm_up=False)
    loaded = with_pages(load_model(config), recording)
    own = header(config, loaded)["facts"]
    _check_same(facts, dict.fromkeys(facts) | own)
    return LLMEngine(replace(config, record=None), loaded)


def _check_same(facts: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    for name, got in own.items():
        if name not in facts:
            raise ValueError(f"the recording does not say its {name}: its first line has lost it")
        if facts[name] != got:
            raise ValueError(
                f"the recording is of another {name}: wanted {facts[name]}, got {got}. Replay it "
                "with what it was recorded with"
            )


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Raises ValueError where they are not those that a recording of this version has."""
    known = {own.name: own.type for own in fields(EngineConfig) if own.name not in UNRECORDED}
    for problem, names in (
        ("has settings that there are not", settings.keys() - known.keys()),
        ("has lost the settings", known.keys() - settings.keys()),
    ):
        if names:
            raise ValueError(f"the first line of the recording {problem}: {', '.join(sorted(names))}")
    for name, kind in known.items():
        value, may_lack = settings[name], kind == (str | None)
        if (kind is str or may_lack) and not (isinstance(value, str) or (may_lack and value is None)):
            raise ValueError(f"{name} of the recording's settings must be a text, got {value!r:.80}")


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
        num_idle = 0
        while num_steps < event["step"] and num_idle < 2:  # after two with nothing to do, all are so
            num_idle = 0 if engine.has_unfinished_requests() else num_idle + 1
            engine.advance()
            num_steps += 1
        num_steps = event["step"]
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
        if number in generations  # and not after a step that failed
    }
    differences = [difference for difference in found.values() if difference is not None]
    return ReplayReport(
        num_requests=len(found),
        num_tokens=sum(
            len(own["token_ids"]) for number in found for own in recording.outputs[number]["completions"]
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
