"""Outputs that must have a form, in batches with others and alone."""

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm() -> Iterator[Any]:
    """One layer of random weights, and programs with room for all that a test asks for: others take long."""
    from pjengine import LLM

    every = {
        **{"logprobs": 3, "frequency_penalty": 0.1, "min_tokens": 1, "allowed_token_ids": [*range(16)]},
        **{"logit_bias": dict.fromkeys(range(4), 0.1), "bad_words": ["a,", ",b"]},
    }
    with (
        pytest.MonkeyPatch.context() as patch,
        LLM(
            "demo",
            load_format="dummy",
            hf_overrides={"num_hidden_layers": 1},
            dtype="float32",
            max_num_seqs=4,
            max_num_batched_tokens=64,
            max_model_len=128,
            warm_up=False,
        ) as llm,
    ):
        patch.setattr("pjengine.runner.PATIENCE", 1_000_000)
        for wanted in (params(), params(form(regex="[!-~]{9}"), **every)):
            llm.generate(["x"] * 4, wanted, use_tqdm=False)
        yield llm
        assert not llm.engine.has_unfinished_requests()
        llm.engine.scheduler.check_integrity()


def form(**fields: Any) -> Any:
    from pjengine import StructuredOutputsParams

    return StructuredOutputsParams(**fields)


def params(wanted: Any = None, **fields: Any) -> Any:
    from pjengine import SamplingParams

    return SamplingParams(
        **{"temperature": 1.0, "seed": 0, "max_tokens": 100, **fields}, structured_outputs=wanted
    )


# A form, and what the output must match.
FORMS: list[tuple[dict[str, Any], str]] = [
    ({"choice": ["red", "green", "light blue"]}, "red|green|light blue"),
    ({"regex": r"\d{3}-[A-F]+x"}, r"\d{3}-[A-F]+x"),
    ({"grammar": 'start: "(" start ")" | WORD\nWORD: /[a-z]{1,3}/'}, r"\(*[a-z]{1,3}\)*"),
    ({"json": {"enum": ["a", 2]}}, '"a"|2'),
    ({"json": {"const": [1, 2]}, "disable_any_whitespace": True}, r"\[1,2\]"),
    ({"json": {"const": [1, 2]}, "whitespace_pattern": "_"}, r"\[_?1_?,_?2_?\]"),
    ({"regex": "(é|日本| ){5}"}, "(é|日本| ){5}"),
]


@pytest.mark.parametrize(("fields", "pattern"), FORMS, ids=str)
def test_an_output_has_the_form_that_is_asked_for(llm: Any, fields: dict[str, Any], pattern: str) -> None:
    wanted = [params(form(**fields), seed=seed, temperature=1.5) for seed in range(6)]
    for output in llm.generate(["x = "] * 6, wanted, use_tqdm=False):
        [completion] = output.outputs
        assert completion.finish_reason in ("stop", "length") and completion.stop_reason is None
        if completion.finish_reason == "stop":
            assert re.fullmatch(pattern, completion.text), completion.text
    assert output.outputs[0].finish_reason == "stop" or "+" in pattern or "*" in pattern


def test_any_json_object_may_come(llm: Any) -> None:
    wanted = params(form(json_object=True), max_tokens=40, temperature=1.5, n=4)
    [output] = llm.generate("A: ", wanted, use_tqdm=False)
    assert all(completion.text.startswith("{") for completion in output.outputs)
    whole = [c for c in output.outputs if c.finish_reason == "stop"]
    assert all(isinstance(json.loads(completion.text), dict) for completion in whole)


def test_every_step_gives_a_token_to_each_request_with_a_form_beside_those_without(llm: Any) -> None:
    engine, wanted = llm.engine, form(regex="[0-9]{30}")
    for i, own in enumerate((params(wanted, seed=1), params(wanted, seed=2), params(max_tokens=30))):
        engine.add_request("x", own, request_id=str(i))
    seen: dict[str, list[tuple[int, int]]] = {"0": [], "1": [], "2": []}
    for step in range(100):
        for output in engine.step():
            seen[output.request_id].append((step, len(output.outputs[0].token_ids)))
    for steps in seen.values():  # the first launches the prompts, each other one reads a token
        assert steps == [(i, i) for i in range(1, len(steps) + 1)] and len(steps) > 10


def test_requests_without_a_form_get_what_they_get_alone(llm: Any) -> None:
    plain = [params(max_tokens=24, seed=i) for i in range(3)]
    alone = [llm.generate("def f(", own, use_tqdm=False)[0].outputs[0] for own in plain]
    formed = [params(form(json=PERSON), seed=i, n=2) for i in range(3)]
    mixed = [own for pair in zip(plain, formed, strict=True) for own in pair]
    outputs = llm.generate(["def f("] * 6, mixed, use_tqdm=False)
    for wanted, output in zip(alone, outputs[::2], strict=True):
        assert (output.outputs[0].token_ids, output.outputs[0].text) == (wanted.token_ids, wanted.text)
    for own, output in zip(formed, outputs[1::2], strict=True):
        [again] = llm.generate("def f(", own, use_tqdm=False)
        assert [c.token_ids for c in again.outputs] == [c.token_ids for c in output.outputs]


def test_each_continuation_has_its_own_place_in_the_grammar(llm: Any) -> None:
    choice = [f"number {i}" for i in range(10)]
    [output] = llm.generate("I choose ", params(form(choice=choice), n=6, temperature=2.0), use_tqdm=False)
    texts = [completion.text for completion in output.outputs]
    assert set(texts) <= set(choice) and len(set(texts)) > 1
    for index, completion in enumerate(output.outputs):  # the seed of the i-th is seed + i
        [alone] = llm.generate("I choose ", params(form(choice=choice), seed=index, temperature=2.0))
        assert alone.outputs[0].token_ids == completion.token_ids


def test_logprobs_are_those_without_the_mask(llm: Any) -> None:
    fields = {"temperature": 0, "max_tokens": 1, "logprobs": 3}
    [free] = llm.generate("import ", params(**fields), use_tqdm=False)[0].outputs
    [formed] = llm.generate("import ", params(form(regex="~[0-9]"), **fields), use_tqdm=False)[0].outputs
    [token], [first], [usual] = formed.token_ids, formed.logprobs, free.logprobs
    assert llm.engine.tokenizer.decode([token]) == "~" and token not in list(usual)[:3]
    assert first[token].rank > 3 and first[token].logprob < min(usual[i].logprob for i in usual)
    likeliest = {i: entry for i, entry in usual.items() if entry.rank <= 3}
    assert {i: first[i].rank for i in likeliest} == {i: entry.rank for i, entry in likeliest.items()}
    assert all(first[i].logprob == pytest.approx(likeliest[i].logprob, abs=1e-4) for i in likeliest)


def test_an_end_comes_only_where_the_grammar_allows_and_min_tokens_do(llm: Any) -> None:
    wanted = form(regex="(ab)*")
    eos = llm.engine.tokenizer.eos_token_id
    bias = {"logit_bias": {eos: 100.0}, "temperature": 0}
    [now] = llm.generate("x", params(wanted, **bias))
    assert (now.outputs[0].text, now.outputs[0].token_ids) == ("", [eos])
    [later] = llm.generate("x", params(wanted, **bias, min_tokens=3))
    assert re.fullmatch("(ab)+", later.outputs[0].text) and later.outputs[0].token_ids[-1] == eos
    assert len(later.outputs[0].token_ids) >= 4


def test_an_ignored_end_ends_the_form_all_the_same(llm: Any) -> None:
    eos = llm.engine.tokenizer.eos_token_id
    own = params(form(regex="a*"), ignore_eos=True, logit_bias={eos: 100.0}, temperature=0)
    [completion] = llm.generate("x", own)[0].outputs
    assert (completion.token_ids, completion.text, completion.finish_reason) == ([eos], "", "stop")


def test_a_stop_string_ends_a_form_early_and_max_tokens_cut_it(llm: Any) -> None:
    [stopped] = llm.generate("x", params(form(choice=["one two three"]), stop="two"), use_tqdm=False)[
        0
    ].outputs
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == ("one ", "stop", "two")
    [cut] = llm.generate("x", params(form(choice=["one two three"]), max_tokens=2), use_tqdm=False)[0].outputs
    assert "one two three".startswith(cut.text) and (cut.finish_reason, len(cut.token_ids)) == ("length", 2)
    num_tokens = len(
        llm.generate("x", params(form(choice=["one two three"])), use_tqdm=False)[0].outputs[0].token_ids
    )
    [whole] = llm.generate(
        "x", params(form(choice=["one two three"]), max_tokens=num_tokens), use_tqdm=False
    )[0].outputs
    assert (whole.text, whole.finish_reason) == ("one two three", "stop")


def test_the_last_token_of_a_form_is_a_part_of_the_text_and_a_stop_token_is_not(llm: Any) -> None:
    a, comma = (llm.engine.tokenizer.encode(text, add_special_tokens=False)[0] for text in "a,")
    fields = {"stop_token_ids": [comma], "logit_bias": {a: 100.0, comma: 100.0}}
    own = params(form(regex="a[,;]b"), temperature=0, **fields)
    [stopped] = llm.generate("x", own)[0].outputs
    assert (stopped.text, stopped.stop_reason) == ("a", comma)
    [whole] = llm.generate("x", params(form(regex="a,b")), use_tqdm=False)[0].outputs
    assert whole.text == "a,b"


def test_a_form_that_bans_leave_nothing_of_ends_as_an_error(llm: Any) -> None:
    own = params(form(regex="[a-z]"), allowed_token_ids=[*range(14, 24)])  # digits
    [completion] = llm.generate("x", own, use_tqdm=False)[0].outputs
    assert completion.finish_reason == "error"
    assert "no token is left: allowed_token_ids, bad_words" in str(completion.stop_reason)


def test_penalties_and_biases_hold_among_what_is_allowed(llm: Any) -> None:
    encode = llm.engine.tokenizer.encode
    [one], [two] = (encode(digit, add_special_tokens=False) for digit in "12")
    biased = params(form(regex="[0-9]{20}"), temperature=0, logit_bias={one: 60.0}, max_tokens=5)
    assert llm.generate("x", biased, use_tqdm=False)[0].outputs[0].token_ids == [one] * 5
    pair = {"allowed_token_ids": [one, two], "temperature": 0, "max_tokens": 20}
    pushed = params(form(regex="[12]{20}"), frequency_penalty=2.0, **pair)
    ids = llm.generate("x", pushed, use_tqdm=False)[0].outputs[0].token_ids
    assert 7 <= ids.count(one) <= 13 and len(ids) == 20


def test_a_grammar_that_becomes_too_large_fails_one_request(llm: Any, monkeypatch: Any) -> None:
    from pjengine import grammar_check

    monkeypatch.setitem(grammar_check.LIMITS, "step_lexer_fuel", 3000)
    wanted = form(regex="(.|\\n)*a(.|\\n){30}b(.|\\n){90}")
    requests = [params(wanted, max_tokens=90), params(max_tokens=90)]
    [hostile], [other] = (output.outputs for output in llm.generate(["x"] * 2, requests, use_tqdm=False))
    assert hostile.finish_reason == "error"
    assert hostile.stop_reason.startswith("structured_outputs.regex='(.|")
    assert hostile.stop_reason.endswith("lexer error: too many expressions constructed")
    assert other.finish_reason == "length"


def test_a_preempted_request_goes_on_where_its_grammar_stood(llm: Any) -> None:
    from tests.engine.rescheduling import reschedule

    wanted = [params(form(json=PERSON), seed=i, temperature=1.5, max_tokens=90) for i in range(4)]
    alone = [llm.generate("x" * 20, own, use_tqdm=False)[0].outputs[0] for own in wanted]
    reschedule(llm.engine, num_pages=10)
    outputs = llm.generate(["x" * 20] * 4, wanted, use_tqdm=False)
    reschedule(llm.engine)
    assert sum(output.metrics.num_preemptions for output in outputs) > 0
    for own, output in zip(alone, outputs, strict=True):
        assert (output.outputs[0].token_ids, output.outputs[0].text) == (own.token_ids, own.text)
        if output.outputs[0].finish_reason == "stop":
            jsonschema.validate(json.loads(output.outputs[0].text), PERSON)


def test_aborts_at_any_time_leave_nothing_behind(llm: Any) -> None:
    from tests.engine.rescheduling import settle

    for num_steps in range(8):
        for i in range(3):
            llm.engine.add_request("x", params(form(json=PERSON), n=i + 1), request_id=str(i))
        for _ in range(num_steps):
            llm.engine.step()
        for i in range(3):
            llm.engine.abort_request(str(i))
        settle(llm.engine)


def test_a_bad_schema_is_refused_and_nothing_is_queued(llm: Any) -> None:
    with pytest.raises(ValueError, match=r"structured_outputs.json='{\"type\": \"x\"}' cannot be followed"):
        llm.engine.add_request("x", params(form(json={"type": "x"})))
    assert not llm.engine.has_unfinished_requests()


def test_an_engine_without_a_tokenizer_says_that_it_needs_one(gqa_folder: Any) -> None:
    from pjengine import LLM

    with LLM(gqa_folder, skip_tokenizer_init=True, warm_up=False) as llm:
        with pytest.raises(ValueError, match="structured_outputs need a tokenizer"):
            llm.generate([[1, 2]], params(form(regex="a")))
