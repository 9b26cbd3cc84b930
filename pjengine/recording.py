"""A file of all that an engine is asked and all that it answers, so that `replay.py` can run it again.

Each line is a JSON object. The first describes the engine; then "submit", "abort", "reset" and "failure" say
what was done to it after so many steps, in their order, and "output" what a request came to. The prompts are
in the file: only its owner may read it.

A schedule follows from what was asked before which step, once no step depends on the clock: so a recording
engine waits for the programs of each step, where another would run a larger one meanwhile.
"""

import enum
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import jax
import jaxlib.version
import numpy as np

import pjengine
from pjengine.compile_cache import SOURCES
from pjengine.config import EngineConfig
from pjengine.generation import Completion, Generation
from pjengine.hidden_states import HiddenStatesParams
from pjengine.loading import LoadedModel
from pjengine.sampling_params import MAX_BIAS, SamplingParams
from pjengine.structured_outputs import StructuredOutputsParams
from pjengine.token_logprobs import PositionLogprobs

FORMAT = 1
# Of the engine's settings: what is another's business than the replay's.
UNRECORDED = ("record", "hf_token", "use_tqdm_on_load", "warm_up", "download_dir", "compile_cache_dir")
_PARTS: dict[str, type[Any]] = {
    "structured_outputs": StructuredOutputsParams,
    "hidden_states": HiddenStatesParams,
}
_DEFAULTS = SamplingParams()


class Recorder:
    """Writes down what happens to an engine; without `config.record`, nothing.

    Raises:
      OSError: the file exists, or cannot be made.
      ValueError: a setting of the engine cannot be written down.
    """

    def __init__(self, config: EngineConfig, loaded: LoadedModel) -> None:
        self.num_steps = 0  # that the engine has begun with anything to do
        self._file: TextIO | None = None
        self._numbers: dict[str, int] = {}  # of unfinished requests, by their ids
        self._num_requests = 0
        if config.record is not None:
            line = header(config, loaded)
            try:
                self._file = open(config.record, "x", opener=partial(os.open, mode=0o600))
            except FileExistsError as error:
                raise OSError(f"{config.record} exists: name a new file to record into") from error
            try:
                self._write(line)
            except BaseException:
                self.discard()
                raise

    def check(self, params: SamplingParams) -> None:
        """Raises ValueError where parameters cannot be written down."""
        if self._file is not None:
            params_to_json(params)

    def submit(self, generation: Generation) -> None:
        """Takes note of a request that has been queued."""
        if self._file is None:
            return
        request, scored = generation.request, None
        if request.next_token is not None and generation.prompt_logprobs is not None:
            first = generation.prompt_logprobs.first
            scored = {"last": request.next_token, "first": first, "fork": request.fork}
        self._numbers[request.request_id] = self._num_requests
        self._num_requests += 1
        self._note(
            "submit",
            generation,
            prompt_token_ids=request.prompt_token_ids,
            cache_salt=request.salt.rpartition("/")[0],  # after it comes what the model adds
            params=params_to_json(request.params),
            seed=request.seed,
            priority=request.priority,
            scored=scored,
        )

    def note(self, event: str, generation: Generation | None = None) -> None:
        """Takes note of something else that was done to the engine, or to a request."""
        if self._file is not None:
            self._note(event, generation)

    def end(self, generation: Generation) -> None:
        """Takes note of all that a request came to."""
        if self._file is not None:
            number = self._numbers.pop(generation.request.request_id)
            self._write({"event": "output", "request": number, **output_of(generation)})

    def close(self) -> None:
        """Closes the file. Safe to call twice."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def discard(self) -> None:
        """Removes the file of an engine that could not start: it says nothing of it."""
        if self._file is not None:
            path = Path(self._file.name)
            self.close()
            path.unlink(missing_ok=True)

    def _note(self, event: str, generation: Generation | None, **more: Any) -> None:
        own = {} if generation is None else {"request": self._numbers[generation.request.request_id]}
        self._write({"event": event, "step": self.num_steps, **own, **more})

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def header(config: EngineConfig, loaded: LoadedModel) -> dict[str, Any]:
    """What must be the same for a replay, and the settings that it starts an engine with."""
    settings = {own.name: getattr(config, own.name) for own in fields(config) if own.name not in UNRECORDED}
    settings["hf_overrides"] = dict(config.hf_overrides)
    sizes, group = loaded.runner_config, loaded.runner_config.window_group
    try:
        json.dumps(settings, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a setting of this engine cannot be recorded: {error}") from error
    device = loaded.sharding.mesh.devices.flat[0]
    return {
        "event": "engine",
        "format": FORMAT,
        "settings": settings,
        "num_pages": sizes.num_pages,
        "num_window_pages": None if group is None else group.num_pages,
        "facts": {
            "pjengine": pjengine.__version__,
            "source": SOURCES[:16],
            "jax": jax.__version__,
            "jaxlib": jaxlib.version.__version__,
            "device": device.device_kind,
            **loaded.facts,
        },
    }


def params_to_json(params: SamplingParams) -> dict[str, Any]:
    """The parameters that are not as they are by default.

    Raises:
      ValueError: one is a Python function or holds one, or is nothing that JSON has.
    """
    found: dict[str, Any] = {}
    for own in fields(params):
        value = getattr(params, own.name)
        if own.name == "output_kind" or value == getattr(_DEFAULTS, own.name):
            continue
        if own.name in _PARTS:
            found[own.name] = {part.name: _plain(getattr(value, part.name)) for part in fields(value)}
        elif own.name == "logit_bias":  # as much as counts: JSON has no infinity
            found[own.name] = {
                str(token): float(min(max(bias, -MAX_BIAS), MAX_BIAS)) for token, bias in value.items()
            }
        else:
            found[own.name] = _plain(value)
    for name, value in found.items():
        try:
            json.dumps(value, allow_nan=False)
        except ValueError as error:
            raise ValueError(f"{name} cannot be recorded: {error}") from error
        except TypeError as error:
            raise ValueError(
                f"{name} cannot be recorded: functions are of this process alone. Leave it out, or "
                "do without record"
            ) from error
    return found


def params_from_json(found: Mapping[str, Any], seed: int) -> SamplingParams:
    """The same from what was written, with the seed that the request was given."""
    given = {name: _PARTS[name](**value) if name in _PARTS else value for name, value in found.items()}
    if given.get("logit_bias"):
        given["logit_bias"] = {int(token): bias for token, bias in given["logit_bias"].items()}
    if not given.get("use_beam_search"):
        given["seed"] = seed
    return SamplingParams(**given)


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(own) for own in value]
    return value.value if isinstance(value, enum.Enum) else value


def output_of(generation: Generation) -> dict[str, Any]:
    """What a request came to: numbers as they are, and of hidden states a hash."""
    prompt, states = generation.prompt_logprobs, generation.prompt_states
    result = None if states is None else states.result()
    return {
        "completions": [_completion(own) for own in generation.completions],
        "prompt_logprobs": None if prompt is None else np.stack(prompt.chosen(), axis=1).tolist(),
        "hidden_states": None if result is None else hashlib.sha256(result.tobytes()).hexdigest(),
    }


def _completion(completion: Completion) -> dict[str, Any]:
    request, logprobs = completion.request, completion.logprobs
    positions: Iterable[PositionLogprobs | None] = () if logprobs is None else logprobs.positions
    return {
        "finish_reason": request.finish_reason,
        "token_ids": list(request.output_token_ids),
        "logprobs": [
            [[token, *own[:2]] for token, own in (position or {}).items()] for position in positions
        ],
        "cumulative_logprob": completion.cumulative_logprob if logprobs is None else logprobs.cumulative,
    }
