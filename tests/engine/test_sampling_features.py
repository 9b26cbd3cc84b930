"""What SamplingParams ask for is what comes out, in batches that mix requests with and without."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from tests.golden import golden as goldens

PROMPT = [7, 3, 11, 150, 45, 9, 9, 31]
LONG = np.random.default_rng(5).integers(0, 160, 75).tolist()


def open_llm(folder: Path, **settings: Any) -> Any:
    from pjengine import LLM

    # A mixed batch is admitted at once: each pair of sizes and edits is a program to compile.
    defaults = {"max_num_seqs": 9, "max_num_batched_tokens": 96, "max_model_len": 128, "max_logprobs": -1}
    return LLM(folder, dtype="float32", warm_up=False, skip_tokenizer_init=True, **{**defaults, **settings})


@pytest.fixture(scope="module")
def llm(gqa_folder: Path) -> Iterator[Any]:
    with open_llm(gqa_folder) as llm:
        yield llm
        assert not llm.engine.has_unfinished_requests()
        llm.engine.scheduler.check_integrity()


def params(**fields: Any) -> Any:
    from pjengine import SamplingParams

    return SamplingParams(**{"temperature": 0, "max_tokens": 6, "ignore_eos": True, **fields})


def run(llm: Any, prompt: list[int] = PROMPT, **fields: Any) -> Any:
    return llm.generate([prompt], params(**fields), use_tqdm=False)[0].outputs[0]


_DENSE: dict[int, Any] = {}  # jitted forwards, by the id of their model: bound methods are new each time


def raw_logits(llm: Any, token_ids: list[int]) -> np.ndarray:
    """Of every position, by the dense forward; padded, so that few lengths are compiled."""
    import jax
    import jax.numpy as jnp

    model = llm.engine.runner.model
    if id(model) not in _DENSE:
        _DENSE[id(model)] = jax.jit(model.forward)
    padded = jnp.asarray([token_ids + [0] * (128 - len(token_ids))], jnp.int32)
    return np.asarray(_DENSE[id(model)](llm.params, padded))[0, : len(token_ids)].astype(np.float64)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def edited(row: np.ndarray, fields: dict[str, Any], known: list[int], num_prompt: int) -> np.ndarray:
    """The edits of one row by their definitions."""
    row = row.copy()
    outputs = known[num_prompt:]
    if allowed := fields.get("allowed_token_ids"):
        row[[token for token in range(len(row)) if token not in allowed]] = -np.inf
    if len(outputs) < fields.get("min_tokens", 0):
        row[fields["stop_token_ids"]] = -np.inf
    for token, bias in fields.get("logit_bias", {}).items():
        row[token] += np.clip(bias, -100, 100)
    factor = fields.get("repetition_penalty", 1.0)
    for token in set(known):
        row[token] = row[token] / factor if row[token] > 0 else row[token] * factor
    for token in set(outputs):
        row[token] -= fields.get("frequency_penalty", 0) * outputs.count(token)
        row[token] -= fields.get("presence_penalty", 0)
    return row


def greedy_by_definition(llm: Any, fields: dict[str, Any], num_tokens: int = 6) -> list[int]:
    known = list(PROMPT)
    for _ in range(num_tokens):
        row = raw_logits(llm, known)[-1]
        known.append(int(np.argmax(edited(row, fields, known, len(PROMPT)))))
        if known[-1] in fields.get("stop_token_ids", ()):
            break
    return known[len(PROMPT) :]


def test_each_edit_in_a_mixed_batch_gives_what_its_definition_says(llm: Any) -> None:
    plain = run(llm).token_ids
    cases: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.8},
        {"frequency_penalty": 2.0, "presence_penalty": 1.0},
        {"frequency_penalty": -2.0},
        {"logit_bias": {plain[0]: -1000.0, 5: 3.0}},
        {"logit_bias": {17: 1000}},
        {"allowed_token_ids": [4, 8, 15, 16, 23, 42]},
        {"min_tokens": 4, "stop_token_ids": plain[:2]},
        {"presence_penalty": 2.0, "logit_bias": {plain[0]: 1.5}, "allowed_token_ids": [*plain, 1, 2]},
    ]
    outputs = llm.generate([PROMPT] * len(cases), [params(**case) for case in cases], use_tqdm=False)
    for case, output in zip(cases, outputs, strict=True):
        assert output.outputs[0].token_ids == greedy_by_definition(llm, case), case
    assert outputs[0].outputs[0].token_ids == plain
    assert outputs[5].outputs[0].token_ids == [17] * 6, "a bias is cut to 100, and still wins"
    late = outputs[7].outputs[0].token_ids
    assert len(late) >= 4 and not set(late[:4]) & set(plain[:2]), "no stop id before min_tokens"
    assert len(run(llm, stop_token_ids=plain[:2]).token_ids) == 1


def test_logprobs_equal_the_dense_forward_in_a_mixed_batch(llm: Any) -> None:
    fields: list[dict[str, Any]] = [
        {"logprobs": 3},
        {},
        {"logprobs": 0, "temperature": 1.5, "seed": 4},
        {"logprobs": -1},
        {"logprob_token_ids": [5, 0, 99], "temperature": 1.0, "seed": 1},
        {"logprobs": 2, "repetition_penalty": 1.5},
    ]
    outputs = llm.generate([PROMPT] * len(fields), [params(**own) for own in fields], use_tqdm=False)
    for own, output in zip(fields, (output.outputs[0] for output in outputs), strict=True):
        if not own:
            assert output.logprobs is None and output.cumulative_logprob is None
            continue
        wanted = log_softmax(raw_logits(llm, PROMPT + output.token_ids))[len(PROMPT) - 1 : -1]
        assert len(output.logprobs) == len(output.token_ids)
        chosen = wanted[np.arange(len(wanted)), output.token_ids]
        assert output.cumulative_logprob == pytest.approx(chosen.sum(), abs=1e-3)
        asked = own.get("logprob_token_ids", [])
        count = 0 if asked else own["logprobs"]
        for token, position, row in zip(output.token_ids, output.logprobs, wanted, strict=True):
            order = np.argsort(-row).tolist()
            top = order if count == -1 else order[:count]
            assert next(iter(position)) == token
            assert set(position) == {token, *top, *asked}
            for i, entry in position.items():
                assert entry.logprob == pytest.approx(row[i], abs=1e-4)
                assert entry.rank == (None if i in asked and i != token else order.index(i) + 1)


def check_prompt_logprobs(llm: Any, prompt: list[int], got: Any, num_top: int) -> None:
    assert len(got) == len(prompt) and got[0] is None
    wanted = log_softmax(raw_logits(llm, prompt))
    for i in range(1, len(prompt)):
        order = np.argsort(-wanted[i - 1]).tolist()
        assert set(got[i]) == {prompt[i], *order[:num_top]}
        assert got[i][prompt[i]].rank == order.index(prompt[i]) + 1
        for token, entry in got[i].items():
            assert entry.logprob == pytest.approx(wanted[i - 1][token], abs=1e-4)


def test_logprobs_and_ranks_of_the_whole_vocabulary_equal_those_of_hugging_face(llm: Any) -> None:
    golden = goldens.load("gqa")
    prompt, wanted = golden.prompt, log_softmax(golden.last_logits.astype(np.float64))
    own = params(max_tokens=1, logprobs=-1, prompt_logprobs=-1)
    [output] = llm.generate([prompt], own, use_tqdm=False)
    [token] = output.outputs[0].token_ids
    assert token == golden.tokens[0]
    # The last four positions of the prompt: what they make of its last three tokens, and of the next one.
    got = [*output.prompt_logprobs[-3:], *output.outputs[0].logprobs]
    for actual, position, row in zip([*prompt[-3:], token], got, wanted, strict=True):
        assert next(iter(position)) == actual
        ids = sorted(position)
        assert ids == list(range(len(row)))
        np.testing.assert_allclose([position[i].logprob for i in ids], row, rtol=0, atol=1e-4)
        assert [position[i].rank for i in ids] == (1 + np.argsort(np.argsort(-row))).tolist()


def test_prompt_logprobs_of_chunks_equal_the_dense_forward(llm: Any) -> None:
    prompts = [LONG, PROMPT, LONG[:40], [4]]
    fields: list[dict[str, Any]] = [
        {"prompt_logprobs": 2},
        {},
        {"prompt_logprobs": 0},
        {"prompt_logprobs": 1},
    ]
    fields[0]["logprobs"] = 2
    for _ in range(2):  # the second time the prefix cache has it all
        outputs = llm.generate(prompts, [params(max_tokens=2, **own) for own in fields], use_tqdm=False)
        for prompt, own, output in zip(prompts, fields, outputs, strict=True):
            if own:
                check_prompt_logprobs(llm, prompt, output.prompt_logprobs, own["prompt_logprobs"])
                assert output.num_cached_tokens == 0
            else:
                assert output.prompt_logprobs is None


def test_logprobs_outlive_a_preemption(llm: Any, gqa_folder: Path) -> None:
    room = 8 * llm.engine.memory_plan.page_bytes
    sizes = {"max_num_seqs": 2, "max_num_batched_tokens": 32, "max_model_len": 80}
    with open_llm(gqa_folder, kv_cache_memory_bytes=room, **sizes) as tight:
        prompts = [LONG[i : i + 34] for i in range(2)]
        own = params(max_tokens=30, logprobs=2, prompt_logprobs=2)
        outputs = tight.generate(prompts, own, use_tqdm=False)
    assert sum(output.metrics.num_preemptions for output in outputs) > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        token_ids = output.outputs[0].token_ids
        wanted = log_softmax(raw_logits(llm, prompt + token_ids))[33:-1]
        assert token_ids == wanted.argmax(axis=-1).tolist()
        for position, row in zip(output.outputs[0].logprobs, wanted, strict=True):
            for token, entry in position.items():
                assert entry.logprob == pytest.approx(row[token], abs=1e-4)
        check_prompt_logprobs(llm, prompt, output.prompt_logprobs, 2)


def test_flat_logprobs_hold_the_same(llm: Any) -> None:
    from pjengine.token_logprobs import FlatLogprobs

    own = {"logprobs": 2, "prompt_logprobs": 2}
    [plain] = llm.generate([PROMPT], params(**own), use_tqdm=False)
    [flat] = llm.generate([PROMPT], params(flat_logprobs=True, **own), use_tqdm=False)
    for ours, theirs in (
        (flat.prompt_logprobs, plain.prompt_logprobs),
        (flat.outputs[0].logprobs, plain.outputs[0].logprobs),
    ):
        assert isinstance(ours, FlatLogprobs)
        assert len(ours) == len(theirs)
        for i in range(-len(theirs), len(theirs)):
            assert (ours[i] is None) == (theirs[i] is None)
            assert set(ours[i] or ()) == set(theirs[i] or ())
        assert list(ours[1:3]) == [ours[1], ours[2]]
    with pytest.raises(IndexError):
        flat.prompt_logprobs[len(PROMPT)]


def test_continuations_are_those_of_their_seeds_and_share_the_prompt(llm: Any) -> None:
    from pjengine import SamplingParams

    own: dict[str, Any] = {"temperature": 1.3, "max_tokens": 8, "ignore_eos": True}
    llm.reset_prefix_cache()
    before = llm.engine.scheduler.num_cache_hits
    prompt = LONG[:70]
    [several] = llm.generate([prompt], SamplingParams(n=3, seed=40, **own), use_tqdm=False)
    hits = llm.engine.scheduler.num_cache_hits - before
    alone = llm.generate([prompt] * 3, [SamplingParams(seed=40 + i, **own) for i in range(3)], use_tqdm=False)
    assert [output.index for output in several.outputs] == list(range(3))
    assert [o.token_ids for o in several.outputs] == [o.outputs[0].token_ids for o in alone]
    assert len({tuple(o.token_ids) for o in several.outputs}) == 3
    assert several.finished and several.metrics.num_generation_tokens == 24
    assert hits == 2 * 64, "the others take the full pages of the first one's prompt"


def test_continuations_end_together_when_aborted_and_are_one_request(llm: Any) -> None:
    engine = llm.engine
    own = params(n=3, temperature=1.0, seed=2, max_tokens=20)
    generation = engine.add_request(PROMPT, own, request_id="three")
    with pytest.raises(ValueError, match="'three' is in use"):
        engine.add_request(PROMPT, request_id="three")
    seen = []
    for _ in range(5):
        seen += engine.step()
    assert {output.request_id for output in seen} == {"three"}
    assert all(len(output.outputs) == 3 and not output.finished for output in seen)
    engine.abort_request("three")
    assert not engine.has_unfinished_requests()
    output = generation.output()
    assert output.finished and [o.finish_reason for o in output.outputs] == ["abort"] * 3
    engine.step()  # reads what was in flight
    engine.scheduler.check_integrity()


def test_prompt_logprobs_come_once_for_all_continuations(llm: Any) -> None:
    own = params(n=2, temperature=1.0, seed=3, prompt_logprobs=2, logprobs=2)
    [output] = llm.generate([LONG], own, use_tqdm=False)
    assert [completion.index for completion in output.outputs] == [0, 1]
    check_prompt_logprobs(llm, LONG, output.prompt_logprobs, 2)
    assert all(len(completion.logprobs) == 6 for completion in output.outputs)


def test_a_seed_gives_the_same_tokens_alone_and_among_others(llm: Any) -> None:
    own = params(temperature=1.0, seed=77, logprobs=2, prompt_logprobs=2)
    [alone] = llm.generate([PROMPT], own, use_tqdm=False)
    among = llm.generate([PROMPT, LONG], [own, params(temperature=1.0)], use_tqdm=False)[0]
    assert among.outputs[0].token_ids == alone.outputs[0].token_ids


def test_each_output_kind_gives_what_it_says(llm: Any) -> None:
    from pjengine.sampling_params import RequestOutputKind

    engine = llm.engine
    kinds = list(RequestOutputKind)
    for kind in kinds:
        own = params(logprobs=2, prompt_logprobs=2, output_kind=kind)
        engine.add_request(PROMPT, own, request_id=kind.name)
    seen: dict[str, list[Any]] = {kind.name: [] for kind in kinds}
    while engine.has_unfinished_requests():
        for output in engine.step():
            seen[output.request_id].append(output)
    whole = run(llm).token_ids
    cumulative, delta, final = (seen[kind.name] for kind in kinds)
    assert [o.outputs[0].token_ids for o in cumulative] == [whole[: i + 1] for i in range(6)]
    assert [o.outputs[0].token_ids for o in delta] == [[token] for token in whole]
    assert [len(o.outputs[0].logprobs) for o in delta] == [1] * 6
    assert [o.prompt_logprobs is not None for o in delta] == [True] + [False] * 5
    assert [o.prompt_logprobs is not None for o in cumulative] == [True] * 6
    assert [o.outputs[0].token_ids for o in final] == [whole] and final[0].finished


def test_a_row_without_numbers_ends_with_an_error_and_the_others_go_on(llm: Any) -> None:
    engine = llm.engine
    broken = engine.add_request(PROMPT, params(), request_id="broken")
    sound = engine.add_request(PROMPT, params(), request_id="sound")
    engine.step()
    engine.step()
    broken.completions[0].push(-1)
    engine.scheduler.finish([broken.request])
    while not sound.is_finished:
        engine.step()
    engine.abort_request("broken")
    output = broken.output().outputs[0]
    assert output.finish_reason == "error" and "NaN" in output.stop_reason
    assert sound.output().outputs[0].token_ids == run(llm).token_ids


def test_truncation_keeps_the_last_tokens(llm: Any) -> None:
    [output] = llm.generate([LONG], params(truncate_prompt_tokens=5), use_tqdm=False)
    assert output.prompt_token_ids == LONG[-5:]
    [output] = llm.generate([LONG * 3], params(truncate_prompt_tokens=-1), use_tqdm=False)
    assert output.prompt_token_ids == (LONG * 3)[-127:]
    [output] = llm.generate([PROMPT], params(truncate_prompt_tokens=20), use_tqdm=False)
    assert output.prompt_token_ids == PROMPT


def test_prefix_cache_reads_can_be_refused(llm: Any) -> None:
    llm.generate([LONG], params(), use_tqdm=False)
    cached = [
        llm.generate([LONG], params(skip_reading_prefix_cache=skip), use_tqdm=False)[0].num_cached_tokens
        for skip in (None, False, True)
    ]
    assert cached == [64, 64, 0]


UNFIT = [
    ({"stop_token_ids": [100_000]}, "stop_token_ids.*100000"),
    ({"logprob_token_ids": [-1]}, "logprob_token_ids.*-1"),
    ({"allowed_token_ids": [3, 100_000]}, "allowed_token_ids.*100000"),
    ({"logit_bias": {100_000: 1.0}}, "logit_bias.*100000"),
    ({"bad_words": ["a"]}, "bad_words need a tokenizer"),
    ({"stop": ["a"]}, "stop strings need a tokenizer"),
    ({"allowed_token_ids": [3], "stop_token_ids": [3], "min_tokens": 1}, "nothing to sample"),
    ({"truncate_prompt_tokens": 129}, "truncate_prompt_tokens=129.*max_model_len=128"),
    ({"logprobs": 161}, "logprobs must be at most 160, the whole vocabulary, got 161"),
    ({"logprobs": 10**30}, "logprobs must be at most 160, the whole vocabulary, got 10000"),
    ({"prompt_logprobs": 5000}, "prompt_logprobs must be at most 160, the whole vocabulary, got 5000"),
]


@pytest.mark.parametrize(("fields", "message"), UNFIT, ids=lambda v: str(v)[:40])
def test_what_does_not_suit_the_model_is_refused(llm: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(llm, **fields)
    assert not llm.engine.has_unfinished_requests()


def greedy(**fields: Any) -> Any:
    return params(**{"max_tokens": 16, **fields})


def test_bad_words_are_not_written_and_logprobs_name_their_tokens(demo: Any) -> None:
    prompt = "def fibonacci(n):\n"
    tokenizer = demo.engine.tokenizer

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    [whole] = demo.generate(prompt, greedy(), use_tqdm=False)
    ids = whole.outputs[0].token_ids
    pairs = {tokenizer.decode(ids[i : i + 2]): ids[i : i + 2] for i in range(len(ids) - 1)}
    several = next(text for text, pair in pairs.items() if encode(text) == pair and text == text.lstrip())
    one = next(word for word in whole.outputs[0].text.split() if word.isidentifier())
    fields: list[dict[str, Any]] = [{"bad_words": [one]}, {"logprobs": 1}, {"bad_words": [several, one]}]
    outputs = demo.generate([prompt] * 3, [greedy(**own) for own in fields], use_tqdm=False)
    first, plain, last = (output.outputs[0] for output in outputs)
    assert plain.token_ids == ids
    spelled = [encode(one), encode(f" {one}")]
    assert len(spelled[0]) == len(spelled[1]) and spelled[0][0] != spelled[1][0]
    for output, words in ((first, spelled), (last, [*spelled, pairs[several]])):
        for word in words:
            written = [output.token_ids[i : i + len(word)] for i in range(len(output.token_ids))]
            assert word not in written
    assert first.text != plain.text
    names = [at[token].decoded_token for token, at in zip(plain.token_ids, plain.logprobs, strict=True)]
    assert "".join(names) == plain.text


def test_bad_words_are_spelled_with_a_space_as_vllm_does_it(demo: Any) -> None:
    tokenizer, resolver = demo.engine.tokenizer, demo.engine._preparation._resolver
    num_spellings = set()
    for word in ("import", " import", "zebra", "x", "def f", "print(", "é", "unittest", "qq", "  self"):
        bare, spaced = (
            tuple(tokenizer.encode(text, add_special_tokens=False))
            for text in (word.lstrip(), f" {word.lstrip()}")
        )
        is_other = len(bare) == len(spaced) and bare[0] != spaced[0]
        wanted = (bare, spaced) if is_other else (bare,)
        assert resolver.edits(greedy(bad_words=[word])).bad_words == wanted
        num_spellings.add(len(wanted))
    assert num_spellings == {1, 2}


def test_a_request_that_may_choose_nothing_ends_with_an_error_and_the_others_go_on(llm: Any) -> None:
    every: dict[str, Any] = {"min_tokens": 3, "stop_token_ids": [*range(160)]}
    wanted = [run(llm).token_ids, run(llm, logit_bias={5: 2.0}).token_ids]
    each = [params(), params(**every), params(logit_bias={5: 2.0}), params(temperature=1.0, **every)]
    outputs = [own.outputs[0] for own in llm.generate([PROMPT] * 4, each, use_tqdm=False)]
    for output in (outputs[1], outputs[3]):
        assert (output.finish_reason, output.token_ids) == ("error", [])
        assert "no token is left" in output.stop_reason
    assert [outputs[0].token_ids, outputs[2].token_ids] == wanted


def test_a_stop_string_is_part_of_the_text_where_asked_for(demo: Any) -> None:
    prompt = "import os\n"
    [whole] = demo.generate(prompt, greedy(), use_tqdm=False)
    text = whole.outputs[0].text
    stop = text[6:9]
    [output] = demo.generate(prompt, greedy(stop=stop, include_stop_str_in_output=True), use_tqdm=False)
    assert output.outputs[0].text == text[: text.find(stop) + 3]
    chunks = demo.stream(prompt, greedy(stop=stop, include_stop_str_in_output=True))
    assert "".join(chunk.text for chunk in chunks) == output.outputs[0].text


def test_streams_tell_continuations_apart(demo: Any) -> None:
    own = greedy(n=3, temperature=1.0, seed=5, stop=["zzz", "("])
    wanted = demo.generate(["import os\n", "class A"], own, use_tqdm=False)
    texts: dict[tuple[int, int], str] = {}
    for chunk in demo.stream(["import os\n", "class A"], own):
        key = chunk.index, chunk.completion
        texts[key] = texts.get(key, "") + chunk.text
    assert texts == {(i, o.index): o.text for i, output in enumerate(wanted) for o in output.outputs}


def test_as_many_logprobs_as_the_vocabulary_has_are_all_of_them(llm: Any) -> None:
    both = run(llm, logprobs=160, max_tokens=1), run(llm, logprobs=-1, max_tokens=1)
    assert both[0].logprobs == both[1].logprobs and len(both[0].logprobs[0]) == 160


def test_more_logprobs_than_the_engine_gives_are_refused(demo: Any) -> None:
    with pytest.raises(ValueError, match=r"logprob_token_ids must hold at most 128 ids, got 129"):
        demo.generate("x", greedy(logprob_token_ids=[*range(129)]))
    [output] = demo.generate("x", greedy(logprob_token_ids=[*range(128), 5], max_tokens=1), use_tqdm=False)
    assert set(output.outputs[0].logprobs[0]) >= set(range(128))
    for fields in ({"logprobs": 21}, {"prompt_logprobs": 21}, {"logprobs": -1}):
        with pytest.raises(ValueError, match=rf"{next(iter(fields))} must be at most max_logprobs=20"):
            demo.generate("x", greedy(**fields))
    with pytest.raises(ValueError, match=r"max_logprobs.*-2"):
        open_llm(Path("demo"), max_logprobs=-2)


def test_the_model_says_what_holds_without_params(demo: Any, gqa_folder: Path, tmp_path: Path) -> None:
    import json
    import shutil

    assert demo.get_default_sampling_params().temperature == 0.6
    shutil.copytree(gqa_folder, tmp_path, dirs_exist_ok=True)
    config = {"temperature": 0.0, "max_new_tokens": 9, "eos_token_id": [3, 150], "top_k": None, "flux": 1}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    with open_llm(tmp_path) as llm:
        from pjengine import SamplingParams

        assert llm.get_default_sampling_params() == SamplingParams(temperature=0.0, max_tokens=9)
        [output] = llm.generate([PROMPT], use_tqdm=False)
        assert output.outputs[0].token_ids == run(llm, max_tokens=9).token_ids
        assert {3, 150} < llm.engine.add_request(PROMPT, request_id="x").request.end_ids
        llm.engine.abort_request("x")
    with open_llm(tmp_path, generation_config="vllm") as llm:
        assert llm.get_default_sampling_params() == SamplingParams()
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"generation_config.json"):
        open_llm(tmp_path)


def test_equal_bad_words_are_encoded_once() -> None:
    from pjengine import SamplingParams
    from pjengine.resolution import Resolver
    from pjengine.tokenizer import Tokenizer

    class CountingEncoder:
        texts: ClassVar[list[str]] = []

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            self.texts.append(text)
            return [len(text)]

    tokenizer = Tokenizer(hf=CountingEncoder(), has_byte_tokens=False)
    resolver = Resolver(
        num_layers=2, tokenizer=tokenizer, vocab_size=9, eos_token_ids=frozenset(), max_logprobs=0
    )
    edits = resolver.edits(SamplingParams(bad_words=["ab"] * 1000))
    assert (edits.bad_words, CountingEncoder.texts) == (((2,), (3,)), ["ab", " ab"])
    with pytest.raises(ValueError, match="at most 65536 characters together, got 65540"):
        resolver.edits(SamplingParams(bad_words=[f"{i:04}" for i in range(10_000)] + ["a" * 25_540]))
    assert len(CountingEncoder.texts) == 2


def test_a_long_bad_word_is_refused_by_its_tokens(demo: Any) -> None:
    from pjengine import SamplingParams

    resolver = demo.engine._preparation._resolver
    with pytest.raises(ValueError, match="words of at most 64 tokens, got one of"):
        resolver.edits(SamplingParams(bad_words=["a b c d " * 25]))
