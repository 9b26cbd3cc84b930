"""Beam search on a real engine: what Hugging Face finds, whatever else runs beside it."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.rescheduling import reschedule, settle
from tests.golden import golden as goldens

VOCAB_SIZE, MAX_NUM_SEQS, MAX_TOKENS = 32, 16, 20
EOS = [2, 3, 4]
TOLERANCE = 1e-4  # of scores
FIELDS = ("best_of", "early_stopping", "length_penalty", "stop_token_ids", "ignore_eos", "min_tokens")


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    with np.load(goldens.FOLDER / "beams.npz") as file:
        about: dict[str, Any] = json.loads(str(file["about"]))
    assert about["max_tokens"] == MAX_TOKENS and about["config"]["eos_token_id"] == EOS
    return about


@pytest.fixture(scope="module")
def llm(
    golden: dict[str, Any], unchecked_types: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """Has two programs with room for every search here, which all steps run as."""
    from safetensors.numpy import save_file

    from pjengine import LLM

    folder = tmp_path_factory.mktemp("beams")
    weights = goldens.make_weights(golden["shapes"], golden["seed"])
    assert np.isclose(goldens.checksum(weights), golden["weight_sum"], rtol=1e-9)
    (folder / "config.json").write_text(json.dumps(golden["config"]))
    save_file(weights, folder / "model.safetensors")
    with (
        pytest.MonkeyPatch.context() as patch,
        LLM(
            folder, dtype="float32", skip_tokenizer_init=True, warm_up=False, max_model_len=64,
            max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=64, decode_steps=1,
        ) as llm,
    ):  # fmt: skip
        patch.setattr("pjengine.runner.PATIENCE", 1_000_000)
        make_programs(llm.engine.runner, num_beams=16, num_beam_searches=16, beam_width=16, num_beam_ends=8)
        yield llm


def make_programs(runner: Any, **room: Any) -> None:
    from pjengine.draw import DrawLayout
    from pjengine.edit_sizes import EditSizes
    from pjengine.edits import NEEDS

    config, sizes = runner.config, EditSizes(num_bias=64, num_allowed=16, **room)
    for buckets, is_decode in ((config.decode_buckets, True), (config.mixed_buckets, False)):
        needs = np.zeros(len(NEEDS), np.int64)
        model = runner._editing_stages(buckets[-1], is_decode, needs, chains=()).model
        layouts = [model, DrawLayout(model.num_seqs, sizes)]
        runner._make(layouts)
        runner._wait(layouts)


def beams(width: int, num: int | None = None, **fields: Any) -> Any:
    from pjengine import SamplingParams

    fields = {"max_tokens": MAX_TOKENS, "temperature": 0, "n": num or width, **fields}
    return SamplingParams(use_beam_search=True, best_of=width, **fields)


def found(output: Any) -> list[tuple[list[int], float | None]]:
    return [(one.token_ids, one.cumulative_logprob) for one in output.outputs]


def check_same(got: Any, wanted: Any) -> None:
    assert [tokens for tokens, _ in found(got)] == [tokens for tokens, _ in found(wanted)]
    for (_, ours), (_, theirs) in zip(found(got), found(wanted), strict=True):
        assert ours == theirs or ours == pytest.approx(theirs, abs=TOLERANCE)


def test_sequences_and_scores_are_hugging_faces(golden: dict[str, Any], llm: Any) -> None:
    cases = golden["cases"]
    params = [
        beams(case["best_of"], **{name: case[name] for name in FIELDS[1:] if name in case}) for case in cases
    ]
    prompts = [golden["prompts"][case["prompt"]] for case in cases]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for case, output in zip(cases, outputs, strict=True):
        shown = {name: case[name] for name in (*FIELDS, "prompt") if name in case}
        assert [one.token_ids for one in output.outputs] == case["sequences"], shown
        scores = [
            one.cumulative_logprob / len(one.token_ids) ** case["length_penalty"] for one in output.outputs
        ]
        assert np.allclose(scores, case["scores"], atol=TOLERANCE), shown
        assert [one.index for one in output.outputs] == list(range(case["best_of"]))
        ends = {*(() if case.get("ignore_eos") else EOS), *case.get("stop_token_ids", ())}
        for one in output.outputs:
            last = one.token_ids[-1]
            stopped = ("stop", None if last == EOS[0] else last)
            assert (one.finish_reason, one.stop_reason) == (stopped if last in ends else ("length", None))
    settle(llm.engine)
    assert llm.engine.runner.recompiles_after_warmup == 0


def test_the_best_n_of_a_wider_search_are_given_back(golden: dict[str, Any], llm: Any) -> None:
    prompt = golden["prompts"][0]
    every, some = llm.generate([prompt, prompt], [beams(8), beams(8, num=3)], use_tqdm=False)
    assert found(some) == found(every)[:3] and some.finished
    assert some.metrics.ttft_s is not None and some.outputs[0].logprobs is None


@pytest.mark.parametrize("is_whole", [True, False])
def test_what_beam_search_gives_begins_with_the_prompt(
    golden: dict[str, Any], llm: Any, is_whole: bool
) -> None:
    from pjengine import BeamSearchParams

    case = next(case for case in golden["cases"] if case["best_of"] == 8 and case["prompt"] == 1)
    fields = {name: case[name] for name in ("early_stopping", "length_penalty")}
    params = BeamSearchParams(
        beam_width=8, max_tokens=MAX_TOKENS, include_stop_str_in_output=is_whole, **fields
    )
    prompt = golden["prompts"][1]
    [output] = llm.beam_search([prompt], params)
    ends = [sequence.finish_reason == "stop" for sequence in output.sequences]
    assert any(ends)
    wanted = [
        prompt + (tokens[:-1] if has_end and not is_whole else tokens)
        for tokens, has_end in zip(case["sequences"], ends, strict=True)
    ]
    assert [sequence.tokens for sequence in output.sequences] == wanted
    scores = [
        sequence.cum_logprob / len(tokens) ** case["length_penalty"]
        for sequence, tokens in zip(output.sequences, case["sequences"], strict=True)
    ]
    assert np.allclose(scores, case["scores"], atol=TOLERANCE)
    assert output.sequences[0].text is None  # without a tokenizer


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beam_width": 0}, r"beam_width must be in \[1, 64\], got 0"),
        ({"beam_width": 65}, r"beam_width must be in \[1, 64\], got 65"),
        ({"beam_width": True}, "beam_width must be"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_tokens": None}, "max_tokens must be"),
        ({"temperature": 0.5}, "temperature must be 0"),
        ({"length_penalty": float("nan")}, "length_penalty must be finite"),
        ({"early_stopping": "soon"}, "early_stopping must be"),
    ],
)
def test_a_search_that_is_not_possible_is_refused(
    fields: dict[str, Any], message: str, unchecked_types: None
) -> None:
    from pjengine import BeamSearchParams

    with pytest.raises(ValueError, match=message):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 4, **fields})


def test_a_search_wider_than_the_engine_is_refused(llm: Any) -> None:
    from pjengine import BeamSearchParams, SamplingParams

    with pytest.raises(ValueError, match="beam_width must be at most max_num_seqs=16, got 17"):
        llm.beam_search([[3, 4]], BeamSearchParams(beam_width=17, max_tokens=2))
    with pytest.raises(TypeError, match="params must be BeamSearchParams"):
        llm.beam_search([[3, 4]], SamplingParams())
    assert not llm.engine.has_unfinished_requests()


def make_requests(rng: random.Random) -> list[tuple[list[int], Any]]:
    from pjengine import SamplingParams

    requests = []
    shared = [rng.randrange(3, VOCAB_SIZE) for _ in range(36)]
    for _ in range(rng.randint(4, 8)):
        prompt = shared[: rng.choice((0, 16, 30))] + [
            rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(1, 6))
        ]
        max_tokens, ignore_eos = rng.choice((rng.randint(1, 26), 26)), rng.random() < 0.8
        if rng.random() < 0.5:
            width = rng.choice((1, 2, 3, 4))
            more: dict[str, Any] = {
                "early_stopping": rng.choice((True, False, "never")),
                "length_penalty": rng.choice((0.6, 1.0, 2.0)),
                "stop_token_ids": rng.sample(range(VOCAB_SIZE), rng.choice((0, 0, 3))),
                "min_tokens": rng.choice((0, min(4, max_tokens))),
            }
            params = beams(width, max_tokens=max_tokens, ignore_eos=ignore_eos, **more)
        else:
            params = SamplingParams(
                max_tokens=max_tokens,
                ignore_eos=ignore_eos,
                seed=rng.randrange(100),
                temperature=rng.choice((0, 1.0)),
            )
        requests.append((prompt, params))
    return requests


def run(engine: Any, requests: list[tuple[list[int], Any]], rng: random.Random) -> dict[int, Any]:
    """The outputs of those that were not aborted, by number; the pages are recounted after every step."""
    outputs: dict[int, Any] = {}
    for number, (prompt, params) in enumerate(requests):
        engine.add_request(prompt, params, request_id=str(number))
    for _ in range(2000):
        if not engine.has_unfinished_requests():
            break
        if rng.random() < 0.01:
            engine.abort_request(str(rng.randrange(len(requests))))
        for output in engine.step():
            if output.finished:
                outputs[int(output.request_id)] = output
        engine.scheduler.check_integrity()
    settle(engine)
    return outputs


@pytest.mark.slow
def test_searches_among_others_find_what_they_find_alone(llm: Any) -> None:
    engine, num_preemptions, num_compared = llm.engine, 0, 0
    for seed in range(8):
        rng = random.Random(seed)
        requests = make_requests(rng)
        reschedule(
            engine, num_pages=rng.randint(11, 13), max_num_seqs=rng.randint(6, 12),
            max_num_batched_tokens=rng.choice((12, 24, 64)), is_caching=rng.random() < 0.7,
        )  # fmt: skip
        outputs = run(engine, requests, rng)
        reschedule(engine, is_caching=False, max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=64)
        for number, output in outputs.items():
            num_preemptions += output.metrics.num_preemptions if requests[number][1].use_beam_search else 0
            check_same(output, llm.generate(*requests[number], use_tqdm=False)[0])
            num_compared += 1
    assert num_preemptions > 2 and num_compared > 30


def test_an_aborted_search_returns_all_pages(golden: dict[str, Any], llm: Any) -> None:
    engine = llm.engine
    engine.add_request(golden["prompts"][2], beams(8, ignore_eos=True), request_id="search")
    for _ in range(6):
        engine.step()
    assert len(engine.scheduler.running) == 8
    engine.abort_request("search")
    engine.scheduler.check_integrity()
    settle(engine)


def test_a_search_with_few_tokens_to_choose_from_finds_the_sequences_that_there_are(llm: Any) -> None:
    from pjengine import SamplingParams

    params = beams(8, max_tokens=2, logit_bias={5: 1.0}, allowed_token_ids=[5, 9], ignore_eos=True)
    [output] = llm.generate([3, 4], params, use_tqdm=False)
    assert sorted(one.token_ids for one in output.outputs) == [[5, 5], [5, 9], [9, 5], [9, 9]]
    [output] = llm.generate([3, 4], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    assert output.finished


def test_nan_ends_a_search_and_nothing_else(llm: Any) -> None:
    import jax

    from pjengine import BeamSearchParams

    runner = llm.engine.runner
    params, broken = runner.params, jax.tree.map(lambda leaf: leaf * np.float32("nan"), runner.params)
    try:
        runner.params = broken
        [output] = llm.generate([3, 4, 5], beams(4), use_tqdm=False)
        [found] = llm.beam_search([[3, 4, 5]], BeamSearchParams(beam_width=4, max_tokens=MAX_TOKENS))
    finally:
        runner.params = params
    assert output.outputs[0].finish_reason == "error" and "NaN" in output.outputs[0].stop_reason
    assert found.sequences[0].finish_reason == "error" and found.sequences[0].cum_logprob == -np.inf
    settle(llm.engine)


def test_every_beam_has_the_penalties_of_its_search_and_not_of_those_before_it(llm: Any) -> None:
    from pjengine import SamplingParams

    before = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, repetition_penalty=0.01)
    llm.generate([[5, 6]] * MAX_NUM_SEQS, before, use_tqdm=False)  # every row has had it
    plain, penalized = llm.generate(
        [[3, 4]] * 2,
        [beams(4, max_tokens=12, ignore_eos=True, repetition_penalty=penalty) for penalty in (1.0, 1000.0)],
        use_tqdm=False,
    )
    assert all(len(set(one.token_ids)) == 12 and not {3, 4} & {*one.token_ids} for one in penalized.outputs)
    assert any(len(set(one.token_ids)) < 12 for one in plain.outputs)
    settle(llm.engine)


def test_layers_with_windows_fork_their_pages_too(unchecked_types: None, tmp_path: Path) -> None:
    """What a beam's logprobs add up to is what the model says of its tokens, read in one go."""
    from pjengine import LLM, SamplingParams

    folder = goldens.write_checkpoint(goldens.load("gemma2"), tmp_path)
    prompt = np.random.default_rng(0).integers(3, 136, 21).tolist()
    with LLM(
        folder, dtype="float32", skip_tokenizer_init=True, warm_up=False, enable_prefix_caching=False,
        max_num_seqs=4, max_num_batched_tokens=128, max_model_len=128,
    ) as llm:  # fmt: skip
        assert llm.engine.runner.config.window_group is not None
        read = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        llm.generate([prompt * 5], read, use_tqdm=False)  # its program serves all prompts here
        [output] = llm.generate([prompt], beams(4, max_tokens=40, ignore_eos=True), use_tqdm=False)
        again: Any = llm.generate([prompt + one.token_ids for one in output.outputs], read, use_tqdm=False)
    for one, taken in zip(output.outputs, again, strict=True):
        positions = taken.prompt_logprobs[len(prompt) :]
        total = sum(position[token].logprob for position, token in zip(positions, one.token_ids, strict=True))
        assert one.cumulative_logprob == pytest.approx(total, abs=10 * TOLERANCE)
