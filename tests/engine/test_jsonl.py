"""Outputs in a file, which is the same however often the run that writes it is cut off."""

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pjengine.line_file import open_line_file

NUM_PROMPTS = 24


def prompts() -> Iterator[str]:
    """Some of them more than once: their samples differ."""
    return itertools.islice(itertools.cycle(["def add(", "import os", "class Stack:", "x = "]), NUM_PROMPTS)


def hot(**fields: Any) -> Any:
    from pjengine import SamplingParams

    return SamplingParams(**{"temperature": 1.0, "max_tokens": 6, **fields})


def double(token_ids: Any, logits: Any) -> Any:
    return 2 * logits


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[1:-1]]


@pytest.fixture(scope="module")
def whole(demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a run that nothing disturbed."""
    from pjengine import generate_to_jsonl

    path = tmp_path_factory.mktemp("whole") / "outputs.jsonl"
    assert generate_to_jsonl(demo, prompts(), path, hot(), use_tqdm=False) == NUM_PROMPTS
    return path


def test_each_output_is_a_line_in_the_order_of_the_prompts(demo: Any, whole: Path) -> None:
    found = lines(whole)
    assert [line["index"] for line in found] == list(range(NUM_PROMPTS))
    for line, prompt in zip(found, prompts(), strict=True):
        [output] = line["outputs"]
        assert output["text"] == demo.engine.tokenizer.decode(output["token_ids"])
        assert output["finish_reason"] in ("length", "stop") and output["stop_reason"] is None
        assert line["num_prompt_tokens"] == len(demo.engine.tokenizer.encode(prompt))
    samples = {line["outputs"][0]["text"] for line in found[::4]}
    assert len(samples) > 1  # of one prompt


KILLED = """
import os, signal, sys
from pjengine import LLM, SamplingParams, generate_to_jsonl
from tests.engine.test_jsonl import hot, prompts

def cut_off():
    for number, prompt in enumerate(prompts()):
        if number == 18:
            os.kill(os.getpid(), signal.SIGKILL)
        yield prompt

llm = LLM("demo", dtype="float32", max_num_seqs=4, max_num_batched_tokens=64, warm_up=False)
generate_to_jsonl(llm, cut_off(), sys.argv[1], hot(), use_tqdm=False)
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_file(demo: Any, whole: Path, tmp_path: Path) -> None:
    from pjengine import generate_to_jsonl

    path = tmp_path / "outputs.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    argv = [sys.executable, "-c", KILLED, str(path)]
    killed = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=200)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    num_done = len(lines(path))
    assert 18 - 8 <= num_done < 18  # all but those that were with the engine
    with open(path, "ab") as file:  # as if it had been killed in the middle of a line
        file.write(whole.read_bytes().splitlines()[-1][:40])
    found = generate_to_jsonl(demo, prompts(), path, hot(), use_tqdm=False)
    assert found == NUM_PROMPTS - num_done
    assert path.read_bytes() == whole.read_bytes()
    assert generate_to_jsonl(demo, list(prompts()), path, hot(), use_tqdm=False) == 0
    assert [own.name for own in tmp_path.iterdir()] == [path.name]


def test_a_run_that_its_caller_ends_goes_on(demo: Any, whole: Path, tmp_path: Path) -> None:
    from pjengine import generate_to_jsonl

    path, stops = tmp_path / "outputs.jsonl", iter([0, 1, 9, 20])

    def interrupted(stop: int) -> Iterator[str]:
        yield from itertools.islice(prompts(), stop)
        raise KeyboardInterrupt

    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            generate_to_jsonl(demo, interrupted(stop), path, hot(), use_tqdm=False)
        assert not demo.engine.has_unfinished_requests()
    text = path.read_bytes()
    for num_bytes in (0, 10, text.index(b"\n"), len(text)):  # in the first line, too
        path.write_bytes(text[:num_bytes])
        generate_to_jsonl(demo, prompts(), path, hot(), use_tqdm=False)
        assert path.read_bytes() == whole.read_bytes()


def test_a_file_is_not_continued_with_something_else(demo: Any, whole: Path, tmp_path: Path) -> None:
    from pjengine import generate_to_jsonl

    def check(match: str, own: Any, params: Any, path: Path = whole) -> None:
        before = path.read_bytes()
        with pytest.raises(ValueError, match=match):
            generate_to_jsonl(demo, own, path, params, use_tqdm=False)
        assert path.read_bytes() == before
        assert not demo.engine.has_unfinished_requests()

    check("was begun with sampling_params=", prompts(), hot(top_p=0.9))
    check("was begun with sampling_params=", prompts(), iter([hot()] * NUM_PROMPTS))
    check("the output of prompt 3 is of another prompt", iter([*list(prompts())[:3], "else"]), hot())
    check("an output of prompt 23, and there are 5 prompts", itertools.islice(prompts(), 5), hot())
    other = tmp_path / "other.jsonl"
    first, *rest = whole.read_text().splitlines(keepends=True)
    for text, match in (
        (
            first.replace("float32", "bfloat16"),
            'was begun with dtype="bfloat16", and this is dtype="float32"',
        ),
        (first + rest[0] + rest[0], "line 3 is no output"),
        (first + '{"index": 0}\n', "line 2 is no output"),
        (first + rest[0].replace('"index": 0', '"index": 99999999999999'), "line 2 is no output"),
        ("a note", "holds something else"),
        ('{"custom_id": "a"}\n', "holds something else"),
    ):
        other.write_text(text)
        check(match, prompts(), hot(), other)
    with open_line_file(whole):
        check("is being written by another run", prompts(), hot())
    weights = demo.params
    try:
        layers = weights["layers"]
        inner = layers["down"].at[3, 5, 7].multiply(1.5)  # one number in the middle
        demo.update_params({**weights, "layers": {**layers, "down": inner}})
        check("was begun with weights=", prompts(), hot())
    finally:
        demo.update_params(weights)


def test_each_prompt_may_have_parameters_of_its_own(demo: Any, tmp_path: Path) -> None:
    from pjengine import generate_to_jsonl

    path = tmp_path / "outputs.jsonl"
    params = [hot(n=2), hot(temperature=0, seed=None), hot()]
    own: list[Any] = [[5, 6], {"prompt": "import os"}, np.array([7, 8])]
    assert generate_to_jsonl(demo, own, path, params, use_tqdm=False) == 3
    found = [line["outputs"] for line in lines(path)]
    assert [len(outputs) for outputs in found] == [2, 1, 1]
    [greedy] = demo.generate("import os", params[1], use_tqdm=False)
    assert found[1][0]["token_ids"] == greedy.outputs[0].token_ids
    assert generate_to_jsonl(demo, iter(own), path, iter(params), use_tqdm=False) == 0
    params[1] = hot(temperature=0.5)
    with pytest.raises(
        ValueError, match="the output of prompt 1 is of another prompt or of other sampling_params"
    ):
        generate_to_jsonl(demo, own, path, params, use_tqdm=False)


@pytest.mark.slow  # compiles programs with logprobs, and with beams
def test_what_is_chosen_has_its_logprob(demo: Any, tmp_path: Path) -> None:
    from pjengine import generate_to_jsonl

    params = [hot(), hot(best_of=3, n=1), hot(temperature=0, use_beam_search=True, best_of=2)]
    generate_to_jsonl(demo, [[5]] * 3, tmp_path / "outputs.jsonl", params, use_tqdm=False)
    found = [line["outputs"][0] for line in lines(tmp_path / "outputs.jsonl")]
    assert ["cumulative_logprob" in output for output in found] == [False, True, True]


def test_parameters_are_told_apart_by_what_is_the_same_in_every_process() -> None:
    from pjengine import StructuredOutputsParams, host_processor
    from pjengine.jsonl import _described

    form = StructuredOutputsParams(choice=["a", "b"])
    text = _described(hot(logits_processors=[double, host_processor(double)], structured_outputs=form))
    assert text.count(".double") == 2 and " at 0x" not in text
    assert "choice=['a', 'b']" in text
    told = {
        _described(own) for own in (hot(), hot(seed=1), hot(stop_token_ids=[3, 9]), hot(logit_bias={3: 1.0}))
    }
    assert len(told) == 4


def test_what_would_not_be_written_is_refused_and_a_bad_prompt_named(demo: Any, tmp_path: Path) -> None:
    from pjengine import generate_to_jsonl

    path = tmp_path / "outputs.jsonl"
    with pytest.raises(ValueError, match="prompt 0: logprobs are not written"):
        generate_to_jsonl(demo, ["a"], path, hot(logprobs=1), use_tqdm=False)
    path.unlink()
    with pytest.raises(ValueError, match="prompt 2: the prompt is empty"):
        generate_to_jsonl(demo, [[5], [6], [], [7]], path, hot(), use_tqdm=False)
    assert sorted(line["index"] for line in lines(path)) == [0, 1]
    with pytest.raises(TypeError, match="prompt 2 is a str, a list of token ids or a dict: got bytes"):
        generate_to_jsonl(demo, [[5], [6], b"c"], path, hot(), use_tqdm=False)
    with pytest.raises(
        ValueError, match="sampling_params must be one, or one for each of the 2 prompts, got 1"
    ):
        generate_to_jsonl(demo, [[5], [6]], path, [hot()], use_tqdm=False)
