"""`generate` over an iterator: in order, with few prompts anywhere at any time."""

import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

NUM_ROWS = 4  # of the shared engine


def greedy(max_tokens: int = 4) -> Any:
    from pjengine import SamplingParams

    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def prompts() -> Iterator[list[int]]:
    """Without an end."""
    return ([5 + number % 7] * (1 + number % 5) for number in itertools.count())


def test_an_iterator_gives_the_outputs_of_the_list_in_its_order(demo: Any) -> None:
    # They end out of order, and the first of them last of many.
    params = [greedy(60 if number == 0 else 1 + number % 6) for number in range(40)]
    own = list(itertools.islice(prompts(), 40))
    wanted = demo.generate(own, params, use_tqdm=False)
    found = demo.generate(iter(own), iter(params), use_tqdm=False)
    assert not isinstance(found, list)
    assert [output.outputs[0].token_ids for output in found] == [own.outputs[0].token_ids for own in wanted]


@pytest.mark.parametrize("longest", [4, 120])
def test_a_bounded_number_of_prompts_is_taken_and_kept(demo: Any, longest: int) -> None:
    from pjengine.iterating import IN_FLIGHT, UNTAKEN

    num_taken, most_taken, most_running = 0, 0, 0

    def counted() -> Iterator[list[int]]:
        nonlocal num_taken, most_running
        for prompt in prompts():
            num_taken += 1
            most_running = max(most_running, len(demo.engine._generations))
            yield prompt

    lengths = (greedy(longest if number == 0 else 1) for number in itertools.count())
    outputs = demo.generate(counted(), lengths, use_tqdm=False)
    assert num_taken == 0  # nothing happens before something is asked for
    kept: list[weakref.ref[Any]] = []
    for number in range(60):
        output = next(outputs)
        kept.append(weakref.ref(output))
        del output
        most_taken = max(most_taken, num_taken - number)
        assert not any(own() is not None for own in kept[:-1])  # nobody but the caller has them
    outputs.close()
    assert most_running < IN_FLIGHT * NUM_ROWS
    assert most_taken <= UNTAKEN * NUM_ROWS
    # Behind a long one others go on, until too many wait to be taken.
    assert (most_taken == UNTAKEN * NUM_ROWS) == (longest > UNTAKEN)


def test_leaving_the_loop_aborts_what_runs(demo: Any) -> None:
    outputs = demo.generate(prompts(), greedy(100), use_tqdm=False)
    for output in outputs:
        assert output.finished and demo.engine.has_unfinished_requests()
        break
    outputs.close()
    assert not demo.engine.has_unfinished_requests()


def test_an_error_of_the_callers_iterator_comes_through_once_all_is_aborted(demo: Any) -> None:
    def failing() -> Iterator[list[int]]:
        yield from itertools.islice(prompts(), 11)
        assert demo.engine.has_unfinished_requests()
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        list(demo.generate(failing(), greedy(), use_tqdm=False))
    assert not demo.engine.has_unfinished_requests()


@pytest.mark.parametrize(("bad", "kind"), [([], ValueError), ([10**9], ValueError), (b"bytes", TypeError)])
def test_a_bad_prompt_is_named_once_all_before_it_are_answered(demo: Any, bad: Any, kind: type) -> None:
    first = list(itertools.islice(prompts(), 6))
    found = []
    with pytest.raises(kind, match="prompt 6: "):
        for output in demo.generate(iter([*first, bad, *first]), greedy(), use_tqdm=False):
            found.append(output.prompt_token_ids)
    assert found == first
    assert not demo.engine.has_unfinished_requests()


def test_other_requests_may_run_between_two_outputs(demo: Any) -> None:
    own = list(itertools.islice(prompts(), 12))
    wanted = [output.outputs[0].token_ids for output in demo.generate(own, greedy(), use_tqdm=False)]
    found = []
    for output in demo.generate(iter(own), greedy(), use_tqdm=False):
        found.append(output.outputs[0].token_ids)
        [other] = demo.generate([own[1]], greedy(), use_tqdm=False)  # the steps of which end some of ours
        assert other.outputs[0].token_ids == wanted[1]
    assert found == wanted


def test_parameters_go_in_step_with_the_prompts(demo: Any) -> None:
    own = list(itertools.islice(prompts(), 3))
    outputs = demo.generate(iter(own), (greedy(number) for number in itertools.count(1)), use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 2, 3]
    with pytest.raises(ValueError, match="sampling_params ended before prompt 2"):
        list(demo.generate(iter(own), iter([greedy()] * 2), use_tqdm=False))
    with pytest.raises(TypeError, match="an iterator of them in step with the prompts; got list"):
        demo.generate(iter(own), [greedy()] * 3, use_tqdm=False)
    with pytest.raises(ValueError, match="prompt 0: priority=1 needs scheduling_policy='priority'"):
        list(demo.generate(iter(own), priority=1, use_tqdm=False))
    assert list(demo.generate(iter([]), greedy(), use_tqdm=False)) == []


def test_the_bar_counts_outputs_and_is_closed(demo: Any) -> None:
    from tqdm import tqdm

    bars: list[Any] = []

    def make(**settings: Any) -> Any:
        bars.append(tqdm(**{**settings, "disable": True}))
        bars[-1].update = lambda count: counts.append(count)
        return bars[-1]

    counts: list[int] = []
    outputs = demo.generate(itertools.islice(prompts(), 5), greedy(), use_tqdm=make)
    assert bars == []
    assert len(list(outputs)) == len(counts) == 5 and len(bars) == 1
