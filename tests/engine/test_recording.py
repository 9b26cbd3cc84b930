"""What an engine writes down, and that it comes out the same when it is run again."""

import json
import math
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SETTINGS: dict[str, Any] = {
    "load_format": "dummy",
    "hf_overrides": {"num_hidden_layers": 1},
    "max_num_seqs": 2,
    "max_num_batched_tokens": 32,
    "max_model_len": 64,
    "kv_cache_memory_bytes": 6 * 16 * 512,  # few pages: requests are preempted
}


@pytest.fixture(scope="module")
def recorded(unchecked_types: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Requests that come at different steps, one aborted, on an engine that is not deterministic."""
    from pjengine import LLM, SamplingParams, StructuredOutputsParams

    path = tmp_path_factory.mktemp("recording") / "requests.jsonl"
    with LLM("demo", record=str(path), warm_up=False, **SETTINGS) as llm:
        engine = llm.engine

        def ask(prompt: list[int], **params: Any) -> Any:
            own = {"max_tokens": 24, "ignore_eos": True, **params}
            return engine.add_request({"prompt_token_ids": prompt}, SamplingParams(**own))

        engine.advance()  # with nothing to do, which is no step
        every = [ask([9] * 40, temperature=0.9), ask([*range(5, 25)], n=2, logprobs=1, seed=3)]
        every += [ask([token] * 4, max_tokens=48) for token in (7, 8)]  # both begin, and both grow
        for _ in range(5):
            engine.advance()
        aborted = ask([9] * 20)
        every.append(ask([9] * 20, temperature=0, prompt_logprobs=0))
        for _ in range(9):
            engine.advance()
        engine.abort_request(aborted.request.request_id)
        form = StructuredOutputsParams(choice=["red", "green"])
        every.append(
            ask([4, 5, 6], structured_outputs=form, ignore_eos=False, logit_bias={7: 1.0, 8: -math.inf})
        )
        engine.reset_prefix_cache()
        llm.score([[5, 6, 7]], [[[8, 9], [9]]], use_tqdm=False)
        while engine.has_unfinished_requests():
            engine.advance()
        assert engine.scheduler.num_preemptions > 0
        assert all(generation.is_finished for generation in every)
        with pytest.raises(ValueError, match="logits_processors cannot be recorded"):
            ask([5], logits_processors=[lambda ids, logits: logits])
    yield path


def changed(recorded: Path, folder: Path, **changes: Any) -> Any:
    """The recording, with other values in its first line."""
    from pjengine.recording_reader import read_recording

    first, *rest = recorded.read_text().splitlines()
    line = json.loads(first)
    for name, value in changes.items():
        line["facts" if name in line["facts"] else "settings"][name] = value
    path = folder / "changed.jsonl"
    path.write_text("\n".join([json.dumps(line), *rest]) + "\n")
    return read_recording(path)


def test_a_recording_comes_out_the_same_again(recorded: Path) -> None:
    from pjengine.recording_reader import read_recording
    from pjengine.replay import replay

    report = replay(read_recording(recorded))
    assert report.num_differences == 0, report.first
    assert (report.num_requests, report.num_unended, report.is_cut_short) == (9, 0, False)
    assert report.num_tokens > 3 * 24


def test_prompts_are_readable_by_their_owner_only(recorded: Path) -> None:
    assert stat.S_IMODE(recorded.stat().st_mode) == 0o600


def test_a_difference_ends_a_replay_with_status_1(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pjengine.serving.cli import main

    lines = [json.loads(line) for line in recorded.read_text().splitlines()]
    output = next(line for line in lines if line["event"] == "output" and line["request"] == 0)
    output["completions"][0]["token_ids"][3] += 1
    path, result = tmp_path / "other.jsonl", tmp_path / "result.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["replay", str(path), "--output", str(result)]) == 1
    assert "request 0, continuation 0: token_ids at position 3: wanted" in capsys.readouterr().err
    assert json.loads(result.read_text())["num_differences"] == 1


@pytest.mark.parametrize("name", ["pjengine", "source", "jax", "jaxlib", "device", "weights"])
def test_a_replay_with_another_version_or_model_is_refused(recorded: Path, tmp_path: Path, name: str) -> None:
    from pjengine.replay import replay

    with pytest.raises(ValueError, match=f"the recording is of another {name}: wanted other, got "):
        replay(changed(recorded, tmp_path, **{name: "other"}))


def test_a_replay_with_other_weights_is_refused(recorded: Path, tmp_path: Path) -> None:
    from pjengine.replay import replay

    with pytest.raises(ValueError, match="of another weights: wanted dummy of seed 0, got dummy of seed 1"):
        replay(changed(recorded, tmp_path, seed=1))


def test_a_replay_with_fewer_pages_is_refused(recorded: Path, tmp_path: Path) -> None:
    from pjengine.replay import replay

    with pytest.raises(ValueError, match=r"KV pages \(num_pages\), and \d+ fit here"):
        replay(changed(recorded, tmp_path, kv_cache_memory_bytes=5 * 16 * 512))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "is no recording of format 1"),
        ('{"event": "engine", "format": 2}\n', "is no recording of format 1"),
        ("prompt\n", "line 1: no JSON"),
        ('{"event": "engine", "format": 1}\n', "line 1: the engine has no settings: wanted an object"),
        ("\N{DEGREE SIGN}\n" + "[" * 9, "line 1: no JSON"),
        ("[]\n", r"line 1: wanted a JSON object, got b'\[\]"),
        (
            '{"event": "engine", "format": 1, "settings": [], "facts": {}}\n',
            "settings of the engine must be an",
        ),
    ],
)
def test_a_file_that_is_no_recording_is_refused(tmp_path: Path, text: str, wanted: str) -> None:
    from pjengine.recording_reader import read_recording

    path = tmp_path / "file.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=wanted):
        read_recording(path)


HEADER: dict[str, Any] = {"event": "engine", "format": 1, "settings": {}, "facts": {}}
HEADER |= {"num_pages": 3, "num_window_pages": None}
SUBMIT: dict[str, Any] = {"event": "submit", "step": 1, "request": 0, "prompt_token_ids": [1], "seed": 0}
SUBMIT |= {"cache_salt": "", "params": {"n": 2}, "priority": 0, "scored": None}
ONE = {"finish_reason": "length", "token_ids": [1], "logprobs": [], "cumulative_logprob": -0.5}
OUTPUT: dict[str, Any] = {"event": "output", "request": 0, "completions": [ONE, ONE]}
OUTPUT |= {"prompt_logprobs": None, "hidden_states": None}


def written(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ([OUTPUT], "line 2: the output is of request 0, whose submit is not before it"),
        ([{"event": "abort", "step": 1, "request": 0}], "line 2: the abort is of request 0, whose submit"),
        ([{"event": "pause", "step": 1}], "line 2: wanted one of submit, .*, got 'pause'"),
        ([{"event": ["submit"]}], r"line 2: wanted one of submit, .*, got \['submit'\]"),
        ([{"event": "reset"}], "line 2: the reset has no step: wanted a whole number"),
        ([SUBMIT, SUBMIT], "line 3: request 0 has come before"),
        ([SUBMIT, OUTPUT, OUTPUT], "line 4: the output is of request 0, whose output is before it"),
        ([SUBMIT, {**OUTPUT, "completions": [ONE]}], "line 3: request 0 has 2 continuations, and 1 are here"),
        ([SUBMIT, {**OUTPUT, "completions": [{}, ONE]}], "line 3: completions of the output must be a list"),
        ([SUBMIT, {"event": "reset", "step": 0}], "line 3: step 0 comes after 1: out of order"),
        ([{**SUBMIT, "prompt_token_ids": "text"}], "line 2: prompt_token_ids of the submit must be a list"),
        ([{**SUBMIT, "scored": {}}], "line 2: scored of the submit must be an object of last, first and"),
        ([{**SUBMIT, "params": {"colour": 1}}], "line 2: params are none of a request: .*'colour'"),
        ([{**SUBMIT, "params": {"n": 0}}], "line 2: params are none of a request: n must be in"),
        ([{**SUBMIT, "params": {"logit_bias": [1]}}], "line 2: params are none of a request"),
    ],
)
def test_a_damaged_recording_is_refused_with_the_line(tmp_path: Path, lines: list[Any], wanted: str) -> None:
    from pjengine.recording_reader import read_recording

    whole = read_recording(written(tmp_path / "whole.jsonl", HEADER, SUBMIT, OUTPUT))
    assert len(whole.events) == len(whole.outputs) == 1
    with pytest.raises(ValueError, match=wanted):
        read_recording(written(tmp_path / "damaged.jsonl", HEADER, *lines))


def test_a_damaged_first_line_ends_a_replay_with_status_2(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pjengine.serving.cli import main

    first, *rest = [json.loads(line) for line in recorded.read_text().splitlines()]
    facts, settings = first["facts"], first["settings"]
    for changes, wanted in (
        ({"facts": {}}, "the recording does not say its pjengine"),
        ({"facts": {**facts, "moon": "full"}}, "of another moon: wanted full, got None"),
        ({"facts": {name: facts[name] for name in facts if name != "weights"}}, "does not say its weights"),
        ({"settings": {**settings, "colour": 1}}, "has settings that there are not: colour"),
        ({"settings": {"model": "demo"}}, "has lost the settings: chat_template, "),
        ({"settings": {**settings, "model": 5}}, "model of the recording's settings must be a text, got 5"),
    ):
        assert main(["replay", str(written(tmp_path / "damaged.jsonl", {**first, **changes}, *rest))]) == 2
        assert wanted in capsys.readouterr().err


def test_a_bias_is_recorded_as_it_counts_and_functions_are_refused() -> None:
    from pjengine import SamplingParams
    from pjengine.recording import params_from_json, params_to_json

    found = params_to_json(SamplingParams(logit_bias={5: -math.inf, 6: 2}))
    assert found == {"logit_bias": {"5": -100.0, "6": 2.0}}
    assert params_from_json(found, 3) == SamplingParams(logit_bias={5: -100.0, 6: 2.0}, seed=3)
    with pytest.raises(ValueError, match="logits_processors cannot be recorded: functions are of this"):
        params_to_json(SamplingParams(logits_processors=[lambda ids, logits: logits]))


def test_a_line_that_was_cut_off_is_left_out(recorded: Path, tmp_path: Path) -> None:
    from pjengine.recording_reader import read_recording

    path = tmp_path / "cut.jsonl"
    path.write_text(recorded.read_text()[:-10])
    whole, cut = read_recording(recorded), read_recording(path)
    assert len(cut.events) + len(cut.outputs) == len(whole.events) + len(whole.outputs) - 1


def test_a_file_that_exists_is_not_written_over(recorded: Path) -> None:
    from pjengine import LLM

    before = recorded.read_bytes()
    with pytest.raises(OSError, match="exists: name a new file"):
        LLM("demo", record=str(recorded), warm_up=False, **SETTINGS)
    assert recorded.read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"data_parallel_size": 2}, "record is of one engine"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative_config"),
        ({"record": ""}, "record must be the name of a file"),
    ],
)
def test_what_cannot_be_recorded_is_refused(settings: dict[str, Any], wanted: str) -> None:
    from pjengine import EngineConfig

    with pytest.raises(ValueError, match=wanted):
        EngineConfig(**{"model": "demo", "record": "file", **settings})
