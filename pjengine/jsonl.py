"""Prompts into a file of JSON lines, which a later call goes on with after a crash.

The first line says what the outputs were made by; each other one is an output, written when it has ended, and
once there are all they are put in the order of the prompts. A line is known by its prompt's number, and by a
digest of the prompt and its parameters, so that no file is continued with other ones. Of a prompt, 16 bytes
stay in memory.
"""

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pjengine.compile_cache import fingerprint
from pjengine.iterating import Task, complete_each, in_step
from pjengine.line_file import LineFile, open_line_file
from pjengine.llm import LLM
from pjengine.outputs import RequestOutput
from pjengine.progress import prompts_bar
from pjengine.prompts import Prompt, as_prompts, one_each
from pjengine.sampling_params import SamplingParams
from pjengine.weights import params_digest

_FORMAT = 1
_KEY = "pjengine_outputs"  # the first of the first line
_NOT_WRITTEN = ("logprobs", "prompt_logprobs", "logprob_token_ids", "hidden_states")
_NOWHERE = -1


def generate_to_jsonl(
    llm: LLM,
    prompts: Prompt | Sequence[Prompt] | Iterator[Prompt],
    path: str | os.PathLike[str],
    sampling_params: Any = None,
    *,
    use_tqdm: bool | Callable[..., Any] = True,
) -> int:
    """Completes what of `prompts` has no output in the file at `path` yet; returns how many that were.

    However often it is interrupted, the file becomes the same: a request that brings no seed gets one that
    follows from the engine's seed and the prompt's number. Prompts come as `LLM.generate` takes them; an
    iterator is taken from the beginning each time, and those that have an output are skipped.

    `sampling_params` are as of `LLM.generate`. A model is known by its name, configuration and dtype, and by
    a sample of its weights, so that no file goes on with others after `update_params`.

    Each line is an object: "index" of the prompt, "digest", "num_prompt_tokens", and "outputs", a list of
    "text", "token_ids", "finish_reason", "stop_reason" and, with beams or `best_of`, "cumulative_logprob".

    Raises:
      ValueError: the file holds something else, or outputs of other prompts, parameters or another model;
        another process is writing it; or a prompt or parameter is not possible, whose number the text names.
        All outputs that there were until then are in the file.
      RuntimeError: a request was aborted by somebody else. The same call tries it again.
      OSError: the file cannot be written.
    """
    total, given = None, sampling_params
    if not isinstance(prompts, Iterator):
        each = as_prompts(prompts)
        prompts, total = iter(each), len(each)
        if given is not None and not isinstance(given, SamplingParams):
            given = iter(one_each("sampling_params", given, total))
    common = llm.get_default_sampling_params() if given is None else given
    tasks = in_step(prompts, common)
    with open_line_file(Path(path)) as file:
        outputs = _Outputs(file, _header(llm, common if isinstance(common, SamplingParams) else None))
        bar = prompts_bar(use_tqdm, total)
        try:
            num_new = _complete(llm, tasks, outputs, bar.update)
        finally:
            bar.close()
        outputs.put_in_order()
    return num_new


def _complete(llm: LLM, tasks: Iterator[Task], outputs: "_Outputs", show: Callable[[int], Any]) -> int:
    """Completes what has no output yet, and writes it."""
    num_prompts = num_new = num_aborted = 0

    def left() -> Iterator[Task]:
        nonlocal num_prompts
        for number, prompt, given in tasks:
            num_prompts += 1
            params = llm.get_default_sampling_params() if given is None else given
            if outputs.is_new(number, _digest(number, prompt, params)):
                yield number, prompt, _seeded(llm, number, params)
            else:
                show(1)

    for number, output in complete_each(llm.engine, left(), is_ordered=False):
        if any(own.finish_reason == "abort" for own in output.outputs):
            num_aborted += 1
            continue
        outputs.write(number, output)
        num_new += 1
        show(1)
    if outputs.num_known > num_prompts:
        raise ValueError(
            f"{outputs.file.path} has an output of prompt {outputs.num_known - 1}, and there are "
            f"{num_prompts} prompts: give another file, or the prompts that this one was begun with"
        )
    if num_aborted:
        raise RuntimeError(f"{num_aborted} requests were aborted and have no output: call again")
    return num_new


class _Outputs:
    """The file, and where in it each prompt's output is."""

    def __init__(self, file: LineFile, header: dict[str, Any]) -> None:
        """Reads what is there; begins the file where nothing is.

        Raises:
          ValueError: it is no such file, or of another model or parameters. It is left as it is then.
        """
        self.file = file
        self._digests = array("Q")  # of each prompt that was seen
        self._places = array("q")  # of its line
        lines = file.lines()
        _, first = next(lines, (0, b""))
        wanted = _line(header)
        if first:
            self._check_header(first, header)
        elif not wanted.startswith(file.path.read_bytes()[: len(wanted) + 1]):
            raise ValueError(f"{file.path} holds something else than outputs: give another file")
        for number, (place, line) in enumerate(lines, start=2):
            try:
                output = json.loads(line)
                index, digest = output["index"], int(output["digest"], 16)
                is_known = index < len(self._places) and self._places[index] != _NOWHERE
                if is_known or index < 0 or "outputs" not in output:
                    raise ValueError(f"prompt {index} is not expected here")
                self._put(index, digest, place)
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError, MemoryError) as error:
                raise ValueError(f"{file.path}: line {number} is no output: give another file") from error
        file.drop_torn_line()
        if not first:
            file.append(wanted)

    def _check_header(self, line: bytes, wanted: dict[str, Any]) -> None:
        path = self.file.path
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or found.get(_KEY) != _FORMAT:
            raise ValueError(f"{path} holds something else than outputs: give another file")
        for name, value in wanted.items():
            if found.get(name) != value:
                raise ValueError(
                    f"{path} was begun with {name}={json.dumps(found.get(name)):.300}, and this is "
                    f"{name}={json.dumps(value):.300}: give another file, or what it was begun with"
                )

    def _put(self, index: int, digest: int, place: int) -> None:
        if (missing := index + 1 - len(self._places)) > 0:
            self._digests.extend([0] * missing)
            self._places.extend([_NOWHERE] * missing)
        self._digests[index], self._places[index] = digest, place

    @property
    def num_known(self) -> int:
        """One more than the number of the last prompt that was seen."""
        return len(self._places)

    def is_new(self, index: int, digest: int) -> bool:
        """Whether a prompt has no output yet.

        Raises:
          ValueError: it has one, and was another prompt, or had other parameters.
        """
        if index >= len(self._places) or self._places[index] == _NOWHERE:
            self._put(index, digest, _NOWHERE)
            return True
        if self._digests[index] != digest:
            raise ValueError(
                f"{self.file.path}: the output of prompt {index} is of another prompt or of other "
                "sampling_params: give another file, or what this one was begun with"
            )
        return False

    def write(self, index: int, output: RequestOutput) -> None:
        line = {
            "index": index,
            "digest": f"{self._digests[index]:016x}",
            "num_prompt_tokens": len(output.prompt_token_ids),
            "outputs": [_fields_of(own) for own in output.outputs],
        }
        self._places[index] = self.file.append(_line(line))

    def put_in_order(self) -> None:
        """Replaces the file by one in the order of the prompts, in one piece; unless it is so already."""
        if bool(np.all(np.diff(np.asarray(self._places)) > 0)):
            return
        path = self.file.path
        ordered = path.with_name(f"{path.name}.ordered")
        with open(path, "rb") as old, open(ordered, "wb") as new:
            new.write(old.readline())
            for place in self._places:
                old.seek(place)
                new.write(old.readline())
            new.flush()
            os.fsync(new.fileno())
        shutil.copymode(path, ordered)
        os.replace(ordered, path)


def _fields_of(output: Any) -> dict[str, Any]:
    names = ("text", "token_ids", "finish_reason", "stop_reason")
    made = {name: getattr(output, name) for name in names}
    if output.cumulative_logprob is not None:
        made["cumulative_logprob"] = output.cumulative_logprob
    return made


def _header(llm: LLM, common: SamplingParams | None) -> dict[str, Any]:
    """What all outputs have in common."""
    config, model = llm.engine.config, llm.model
    name = Path(config.model)
    return {
        _KEY: _FORMAT,
        "model": str(name.resolve()) if name.is_dir() else config.model,
        "config_digest": fingerprint(model)[:16],
        "dtype": str(model.dtype),
        "weights": None if config.nnodes > 1 else params_digest(llm.params),
        "seed": config.seed,
        "sampling_params": None if common is None else _described(common),
    }


def _described(params: SamplingParams) -> str:
    """The fields that are not as they are by default."""
    given = {own.name: getattr(params, own.name) for own in fields(params)}
    return ", ".join(
        f"{own.name}={_shown(given[own.name])}" for own in fields(params) if given[own.name] != own.default
    )


def _shown(value: Any) -> str:
    """As `repr`, but the same in every process: functions by their names."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {_shown(own)}' for key, own in value.items())}}}"
    if is_dataclass(value) and not isinstance(value, type):
        inner = ", ".join(f"{own.name}={_shown(getattr(value, own.name))}" for own in fields(value))
        return f"{type(value).__name__}({inner})"
    if isinstance(value, set | frozenset):
        return _shown(sorted(value))
    if callable(value):
        return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return repr(value)


def _digest(number: int, prompt: Prompt, params: Any) -> int:
    """64 bits of a prompt and its parameters.

    Raises:
      ValueError, TypeError: they are none, or ask for what is not written.
    """
    if not isinstance(params, SamplingParams):
        raise TypeError(f"prompt {number}: sampling_params must be SamplingParams, got {params!r:.80}")
    for name in _NOT_WRITTEN:
        if getattr(params, name) is not None:
            raise ValueError(f"prompt {number}: {name} are not written: leave them out, or use LLM.generate")
    try:
        text = json.dumps(prompt, sort_keys=True, default=_plain)
    except (ValueError, TypeError) as error:
        raise TypeError(f"prompt {number} is a str, a list of token ids or a dict: {error}") from error
    return int(hashlib.sha256(f"{text}\n{_described(params)}".encode()).hexdigest()[:16], 16)


def _plain(value: Any) -> Any:
    """What JSON has of numpy's numbers and arrays."""
    if isinstance(value, np.ndarray | np.integer):
        return value.tolist()
    raise TypeError(f"got {type(value).__name__}")


def _seeded(llm: LLM, number: int, params: SamplingParams) -> SamplingParams:
    """With a seed of the prompt's own, where it draws and has none."""
    if params.is_greedy or (params.seed is not None and params.seed >= 0):
        return params
    words = hashlib.sha256(f"{llm.engine.config.seed}/{number}".encode()).digest()
    return replace(params, seed=int.from_bytes(words[:8], "little") >> 2)  # continuations count on from it


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"
