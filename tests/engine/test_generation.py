"""Tokens in, text out: what is shown when, what ends it, and what n continuations look like together."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pjengine.generation import Completion, Generation, _likeliest
from pjengine.outputs import CompletionOutput, RequestMetrics, merge_metrics
from pjengine.request import Request
from pjengine.sampling_params import RequestOutputKind, SamplingParams
from pjengine.token_logprobs import FlatLogprobs, Logprob, LogprobArrays, position_logprobs
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
    _, at, found = min((TEXT.find(each) + len(each), TEXT.find(each), each) for each in stops if each in TEXT)
    wanted = TEXT[: at + len(found) if is_included else at]
    assert "".join(pieces) == completion.output().text == wanted
    assert (completion.request.finish_reason, completion.request.stop_reason) == ("stop", found)


@pytest.mark.parametrize(
    ("stop", "wanted"),
    [
        (["print", "rin"], "rin"),  # both within one token: the one that is complete first
        (["int", "print", "nt"], "int"),  # that end together: the first of the list
        (["print", "int", "nt"], "print"),
        (["items:\n", "item"], "item"),
    ],
)
def test_of_several_stop_strings_the_one_that_is_complete_first_ends_the_text(
    tokenizer: Tokenizer, stop: list[str], wanted: str
) -> None:
    completion = make(tokenizer, stop=stop)
    stream(completion, tokenizer.encode(TEXT, add_special_tokens=False))
    assert completion.request.stop_reason == wanted
    assert completion.output().text == TEXT[: TEXT.find(wanted)]


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


class LateLock:
    """Of a consumer that gets it only when the engine's last token is there."""

    def __init__(self, completion: Completion, last_token: int) -> None:
        self.completion, self.last_token = completion, last_token

    def __enter__(self) -> bool:
        if not self.completion.request.is_finished:
            self.completion._push(self.last_token, None)
        return True

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("kind", list(RequestOutputKind))
@pytest.mark.parametrize("late", [(0,), (1,), (0, 1)])
def test_an_output_with_the_last_tokens_is_finished(kind: RequestOutputKind, late: tuple[int, ...]) -> None:
    completions = [make(None, max_tokens=2, output_kind=kind) for _ in range(2)]
    generation = Generation(completions)
    for index, completion in enumerate(completions):
        completion.index = index
        completion.push(5)
        if index in late:
            completion._lock = LateLock(completion, 6)
        else:
            completion.push(6)
    first = generation.output()
    assert first.finished and [own.token_ids for own in first.outputs] == [[5, 6]] * 2
    assert [own.finish_reason for own in first.outputs] == ["length"] * 2


def test_a_delta_is_finished_once_the_ends_of_all_continuations_are_taken() -> None:
    first, second = [make(None, max_tokens=2, output_kind=RequestOutputKind.DELTA) for _ in range(2)]
    second.index = 1
    generation = Generation([first, second])
    for completion in (first, second):
        completion.push(5)
    # The first ends after it was looked at, the second before: its end is alone in the next output.
    second._lock = LateLock(second, 6)
    outputs = [generation.output()]
    first.push(6)
    outputs.append(generation.output())
    assert [output.finished for output in outputs] == [False, True]
    assert [[(own.index, own.token_ids) for own in output.outputs] for output in outputs] == [
        [(0, [5]), (1, [5, 6])],
        [(0, [6])],
    ]


def test_a_token_that_is_none_ends_with_an_error(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT, add_special_tokens=False)[:3]
    for mark, reason in ((-1, "NaN"), (-2, "no token is left")):
        completion = make(tokenizer)
        stream(completion, [*ids, mark])
        output = completion.output()
        assert (output.finish_reason, output.token_ids, output.text) == ("error", ids, tokenizer.decode(ids))
        assert reason in str(output.stop_reason)


def test_metrics_of_continuations_are_put_together() -> None:
    parts = [
        RequestMetrics(arrival_s=1, scheduled_s=2, first_token_s=4, last_token_s=9, finished_s=9),
        RequestMetrics(arrival_s=1, scheduled_s=3, first_token_s=3, last_token_s=7, num_preemptions=1),
    ]
    merged = merge_metrics(parts)
    assert (merged.first_token_s, merged.last_token_s, merged.finished_s) == (3, 9, None)
    assert (merged.scheduled_s, merged.num_preemptions) == (2, 1)
    assert merge_metrics(parts[:1]) is parts[0]
    assert merged.tpot_s is None, "none has a second token"


def test_metrics_of_continuations_admitted_at_different_times_follow_each_other() -> None:
    parts = [
        RequestMetrics(
            arrival_s=1,
            scheduled_s=8,
            first_token_s=9,
            last_token_s=13,
            finished_s=14,
            num_generation_tokens=3,
        ),
        RequestMetrics(
            arrival_s=1.5,
            scheduled_s=2,
            first_token_s=3,
            last_token_s=9,
            finished_s=9,
            num_generation_tokens=7,
        ),
        RequestMetrics(arrival_s=1, finished_s=12),  # aborted before it ran
    ]
    merged = merge_metrics(parts)
    times = (
        merged.arrival_s,
        merged.scheduled_s,
        merged.first_token_s,
        merged.last_token_s,
        merged.finished_s,
    )
    assert times == (1, 2, 3, 13, 14)
    assert (merged.queue_s, merged.prefill_s, merged.num_generation_tokens) == (1, 1, 10)
    assert merged.tpot_s == (4 + 6) / (2 + 6)


def test_a_position_with_fewer_of_the_likeliest_than_were_asked_for_has_those() -> None:
    one = np.array([-0.5, -1.5])
    arrays = LogprobArrays(one[:1], np.array([2]), one[None], np.array([[7, 4]]), np.zeros((1, 0)))
    assert position_logprobs(arrays, 0, 4, 5, (), None) == {4: Logprob(-0.5, 2), 7: Logprob(-0.5, 1)}


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
    for start in range(-4, 5):
        for stop in range(-4, 5):
            assert list(flat[start:stop]) == positions[start:stop]
            assert list(flat[1:][start:stop]) == positions[1:][start:stop]
    flat[1:].append(positions[1])
    assert len(flat) == 3, "a slice is a copy"
    assert flat.token_ids.tolist() == [3, 1, 7]
    with pytest.raises(IndexError):
        flat[3]


def test_a_continuation_that_failed_is_not_the_likeliest() -> None:
    """It has fewer tokens, whose logprobs add up to more."""
    failed, whole = (
        CompletionOutput(
            index=i, text="", token_ids=[1] * i, cumulative_logprob=-1.0 * i, finish_reason=reason
        )
        for i, reason in enumerate(("error", "length"))
    )
    assert _likeliest([failed, whole], SamplingParams(best_of=2)) == [whole]
