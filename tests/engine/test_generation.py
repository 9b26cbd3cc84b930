"""Tokens in, text out: what is shown when, what ends it, and what n continuations look like together."""

from pathlib import Path
from typing import Any

import pytest

from pjengine.generation import Completion, Generation
from pjengine.outputs import RequestMetrics, merge_metrics
from pjengine.request import Request
from pjengine.sampling_params import RequestOutputKind, SamplingParams
from pjengine.token_logprobs import FlatLogprobs, Logprob
from pjengine.tokenizer import IncrementalDetokenizer, Tokenizer, load_tokenizer

TEXT = "for item in items:\n    print(item)\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(Path(__file__).parents[2] / "models" / "demo")


def make(tokenizer: Tokenizer | None, **fields: Any) -> Completion:
    params = SamplingParams(**{"max_tokens": 100, **fields})
    request = Request(
        request_id="r",
        prompt_token_ids=[1, 2, 3],
        params=params,
        max_total_tokens=3 + (params.max_tokens or 100),
        eos_token_ids=frozenset({0}),
        seed=0,
    )
    detokenizer = None
    if tokenizer is not None:
        detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens)
    return Completion(request, detokenizer)


def stream(completion: Completion, token_ids: list[int]) -> list[str]:
    """Pushes until it ends; what each token lets out."""
    pieces = []
    for token in token_ids:
        completion.push(token)
        pieces.append(completion.take()[0])
        if completion.request.is_finished:
            break
    return pieces


@pytest.mark.parametrize("is_included", [False, True])
@pytest.mark.parametrize("stop", ["item", " in", ["zebra", ":\n "], "(item", ["t(i", "em)\n"]])
def test_a_stream_ends_at_the_first_stop_string_and_shows_none_of_it_early(
    tokenizer: Tokenizer, stop: Any, is_included: bool
) -> None:
    completion = make(tokenizer, stop=stop, include_stop_str_in_output=is_included)
    pieces = stream(completion, tokenizer.encode(TEXT, add_special_tokens=False))
    stops = [stop] if isinstance(stop, str) else stop
    at, found = min((TEXT.find(each), each) for each in stops if each in TEXT)
    wanted = TEXT[: at + len(found) if is_included else at]
    assert "".join(pieces) == completion.output().text == wanted
    assert (completion.request.finish_reason, completion.request.stop_reason) == ("stop", found)


@pytest.mark.parametrize("is_included", [False, True])
def test_the_text_of_a_stop_token_is_shown_only_where_asked_for(
    tokenizer: Tokenizer, is_included: bool
) -> None:
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    cut = next(i for i in range(3, len(ids)) if ids[i] not in ids[:i])
    completion = make(tokenizer, stop_token_ids=[ids[cut]], include_stop_str_in_output=is_included)
    stream(completion, ids)
    assert completion.output().text == tokenizer.decode(ids[: cut + is_included])
    assert completion.output().token_ids == ids[: cut + 1]


def test_stop_strings_are_looked_for_only_after_min_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    skipped = next(i for i in range(len(ids)) if "item" in tokenizer.decode(ids[:i]))
    # The longer one keeps the end of the text in view; the short one in it must not be found late.
    completion = make(tokenizer, stop=["item", "x" * 30], min_tokens=skipped)
    stream(completion, ids)
    second = TEXT.find("item", TEXT.find("item") + 1)
    assert completion.output().text == TEXT[:second]


def test_outputs_of_a_delta_put_together_are_the_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    completion = make(
        tokenizer, output_kind=RequestOutputKind.DELTA, stop="nothing like this", max_tokens=len(ids)
    )
    generation = Generation([completion])
    seen = []
    for token in ids:
        completion.push(token)
        seen.append(generation.output())
    assert [output.outputs[0].token_ids for output in seen] == [[token] for token in ids]
    assert "".join(output.outputs[0].text for output in seen) == TEXT
    assert [output.finished for output in seen] == [False] * (len(ids) - 1) + [True]
    assert generation.output().outputs == [], "nothing is new"


def test_a_request_is_finished_when_all_its_continuations_are() -> None:
    first, second = make(None, max_tokens=1), make(None, max_tokens=2)
    second.index = 1
    generation = Generation([first, second])
    first.push(5)
    second.push(6)
    output = generation.output()
    assert not output.finished and [o.finish_reason for o in output.outputs] == ["length", None]
    generation.abort()
    assert generation.is_finished and generation.num_output_tokens == 2
    assert [o.finish_reason for o in generation.output().outputs] == ["length", "abort"]


def test_a_token_that_is_none_ends_with_an_error(tokenizer: Tokenizer) -> None:
    completion = make(tokenizer)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)[:3]
    stream(completion, [*ids, -1])
    output = completion.output()
    assert (output.finish_reason, output.token_ids, output.text) == ("error", ids, tokenizer.decode(ids))
    assert "NaN" in str(output.stop_reason)


def test_metrics_of_continuations_are_put_together() -> None:
    parts = [
        RequestMetrics(arrival_s=1, scheduled_s=2, first_token_s=4, last_token_s=9, finished_s=9),
        RequestMetrics(arrival_s=1, scheduled_s=3, first_token_s=3, last_token_s=7, num_preemptions=1),
    ]
    merged = merge_metrics(parts)
    assert (merged.first_token_s, merged.last_token_s, merged.finished_s) == (3, 9, None)
    assert (merged.scheduled_s, merged.num_preemptions) == (2, 1)
    assert merge_metrics(parts[:1]) is parts[0]


def test_flat_logprobs_are_indexed_like_a_list() -> None:
    positions = [
        None,
        {3: Logprob(-1.0, 2, "c"), 1: Logprob(-0.5, 1, "a")},
        {7: Logprob(-2.0, None, None)},
    ]
    flat = FlatLogprobs()
    for position in positions:
        flat.append(position)
    assert list(flat) == positions and len(flat) == 3
    assert [flat[-1], flat[1]] == [positions[2], positions[1]]
    assert list(flat[1:]) == positions[1:] and list(flat[::-1]) == positions[::-1]
    assert flat[:] == flat and flat != positions
    assert flat.token_ids.tolist() == [3, 1, 7]
    with pytest.raises(IndexError):
        flat[3]
