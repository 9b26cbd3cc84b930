"""One engine, one request: the same bits, whatever runs beside it."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.unchecked import run_unchecked
from tests.golden import golden as goldens

# Two hundred mixes take minutes.
pytestmark = pytest.mark.timeout(1800)
SETTINGS: dict[str, Any] = {
    "load_format": "dummy",
    "hf_overrides": {"num_hidden_layers": 1},
    "max_num_seqs": 6,
    "max_num_batched_tokens": 32,
    "max_model_len": 96,
    "warm_up": False,
}


@pytest.fixture(scope="module")
def llm(full_compile: None, unchecked_types: None) -> Iterator[Any]:
    """One layer of random weights in bfloat16, deterministic."""
    from pjengine import LLM

    with LLM("demo", deterministic=True, **SETTINGS) as llm:
        yield llm
        assert not llm.engine.has_unfinished_requests()
        llm.engine.scheduler.check_integrity()


@pytest.fixture(scope="module")
def report(llm: Any) -> Any:
    """Of eight mixes, the last with other weights."""
    from pjengine.determinism import verify_determinism

    params = llm.engine.runner.params
    kept = params["embed"]

    def change(num_done: int, _: int) -> None:
        params["embed"] = kept * 1.5 if num_done == 7 else kept

    return verify_determinism(llm.engine, num_mixes=8, show=change)


def check_variety(report: Any) -> None:
    assert report.num_compared >= 8 * report.num_mixes
    for name in ("num_beside", "num_preempted", "num_cached", "num_cut"):
        assert getattr(report, name) >= 3, (name, report)


@pytest.mark.slow
def test_requests_get_the_same_bits_in_random_mixes(report: Any) -> None:
    assert report.first_mix == 7, f"differs before the weights do: {report}"
    check_variety(report)


@pytest.mark.slow
def test_a_difference_is_reported_with_where_it_is(report: Any) -> None:
    from pjengine.determinism import KINDS

    first = report.first
    assert report.num_mixes == 8 and report.num_differences > 0 and report.first_limits is not None
    assert 0 <= first.request < len(KINDS) and first.wanted != first.got
    assert f"request {first.request}" in str(first) and f"wanted {first.wanted!r}" in str(first)


def test_the_command_says_what_was_tried_and_ends_with_status_0(
    llm: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pjengine.serving.cli import main

    result = tmp_path / "result.jsonl"
    options = ["--load-format", "dummy", "--hf-overrides", json.dumps(SETTINGS["hf_overrides"])]
    for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len"):
        options += [f"--{name.replace('_', '-')}", str(SETTINGS[name])]
    assert main(["verify-determinism", "demo", "--num-mixes", "1", "--output", str(result), *options]) == 0
    found = json.loads(result.read_text())
    assert (found["bench"], found["num_mixes"], found["num_differences"]) == ("verify-determinism", 1, 0)
    assert "1 mixes, " in capsys.readouterr().err


def test_several_engines_are_not_tried_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    from pjengine.serving.cli import main

    assert main(["verify-determinism", "demo", "--data-parallel-size", "2"]) == 2
    assert "leave --data-parallel-size out" in capsys.readouterr().err


def run_200_mixes() -> None:
    from pjengine import LLM
    from pjengine.determinism import verify_determinism

    with LLM("demo", deterministic=True, **SETTINGS) as llm:
        report = verify_determinism(llm.engine, num_mixes=200, seed=1)
    assert (report.num_mixes, report.num_differences) == (200, 0), report.first
    check_variety(report)


@pytest.mark.slow
def test_requests_get_the_same_bits_in_200_random_mixes() -> None:
    run_unchecked(run_200_mixes, timeout_s=1700, JAX_DISABLE_MOST_OPTIMIZATIONS="0")


def test_two_kinds_of_steps_are_two_programs_with_the_model_and_no_more(llm: Any) -> None:
    from pjengine import SamplingParams
    from pjengine.batching import Layout

    for num_prompts in (1, 6):
        llm.generate([[5] * 7] * num_prompts, SamplingParams(max_tokens=2), use_tqdm=False)
    plain = {
        (layout.num_tokens, layout.is_decode)
        for layout in llm.engine.runner.programs
        if isinstance(layout, Layout) and layout.ends_in_logits
    }
    assert plain == {(6, True), (32, False)}
    assert all(layout.ends_in_logits for layout in llm.engine.runner.layouts())


def test_a_preempted_answer_in_a_form_goes_on_as_it_was(llm: Any) -> None:
    from pjengine import SamplingParams, StructuredOutputsParams
    from tests.engine.rescheduling import reschedule, settle

    def asked(seed: int) -> Any:
        form = StructuredOutputsParams(regex="[a-z]{60}")
        return SamplingParams(temperature=1.5, seed=seed, max_tokens=60, structured_outputs=form, logprobs=0)

    prompts = [[7 + seed] * 20 for seed in range(3)]
    alone = [
        llm.generate([prompt], asked(seed), use_tqdm=False)[0].outputs[0]
        for seed, prompt in enumerate(prompts)
    ]
    reschedule(llm.engine, num_pages=6)
    together = llm.generate(prompts, [asked(seed) for seed in range(3)], use_tqdm=False)
    assert sum(output.metrics.num_preemptions for output in together) > 0
    for output, wanted in zip(together, alone, strict=True):
        assert output.outputs[0].token_ids == wanted.token_ids
        assert output.outputs[0].logprobs == wanted.logprobs
        assert output.outputs[0].text == wanted.text
    settle(llm.engine)
    reschedule(llm.engine)


def test_outputs_are_not_taken_from_the_cache_as_prompts(llm: Any) -> None:
    from pjengine import SamplingParams

    rng = random.Random(0)
    prompt = [rng.randrange(1, 1000) for _ in range(20)]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    [first] = llm.generate([prompt], params, use_tqdm=False)
    whole = prompt + first.outputs[0].token_ids
    [second] = llm.generate([whole], params, use_tqdm=False)
    assert second.num_cached_tokens == 16, "the one page that is full of the first prompt"


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative_config"),
        ({"decode_steps": 4}, "one token a launch, got decode_steps=4"),
        ({"tensor_parallel_size": 4}, "at most tensor_parallel_size=2"),
    ],
)
def test_what_does_not_go_with_deterministic_is_refused(settings: dict[str, Any], wanted: str) -> None:
    from pjengine import EngineConfig

    with pytest.raises(ValueError, match=wanted):
        EngineConfig(model="demo", deterministic=True, **settings)


def test_beam_search_is_refused(llm: Any) -> None:
    from pjengine import BeamSearchParams

    with pytest.raises(ValueError, match="use_beam_search does not go with deterministic=True"):
        llm.beam_search([[5, 6]], BeamSearchParams(beam_width=2, max_tokens=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "gemma2",
        *(pytest.param(name, marks=pytest.mark.sweep) for name in ("mixtral", "bloom")),
        "two devices",
    ],
)
def test_other_models_get_the_same_bits_in_random_mixes(tmp_path: Path, name: str) -> None:
    from pjengine import LLM
    from pjengine.determinism import verify_determinism

    if name == "two devices":
        model: Any = "demo"
        settings = {**SETTINGS, "tensor_parallel_size": 2}
    else:
        model = goldens.write_checkpoint(goldens.load(name), tmp_path)
        settings = {**SETTINGS, "load_format": "auto", "hf_overrides": {}, "max_model_len": 64}
    with LLM(model, deterministic=True, skip_tokenizer_init=True, **settings) as llm:
        report = verify_determinism(llm.engine, num_mixes=20)
    assert report.num_differences == 0, report.first
    check_variety(report)
