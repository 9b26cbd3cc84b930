"""Several continuations of one prompt: they share its pages, and the likeliest are given back."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engine.stub_device import StubDevice, expected
from tests.engine.test_scheduler import make_request, make_scheduler


@pytest.mark.parametrize("is_caching", [True, False])
@pytest.mark.parametrize("num_prompt", [3, 10, 16, 43, 90])  # of pages of 4, and steps of at most 16 tokens
def test_eight_continuations_hold_one_prompt_and_a_tail_each(num_prompt: int, is_caching: bool) -> None:
    scheduler = make_scheduler(num_pages=64, is_caching=is_caching)
    device = StubDevice(scheduler)
    prompt = list(range(100, 100 + num_prompt))
    requests = [
        make_request(str(i), 0, 12, prompt_token_ids=prompt, fork="fork", is_cache_read=True)
        for i in range(8)
    ]
    for request in requests:
        scheduler.add(request)
    shared, most = (num_prompt - 1) // 4, 0  # each computes the prompt's last token itself
    while scheduler.has_requests:
        device.step()
        used = scheduler.pool.num_usable - scheduler.pool.num_free
        pages = [-(-int(scheduler.rows.computed[request.row]) // 4) for request in scheduler.running]
        tails = sum(max(count - shared, 0) for count in pages)
        assert used == min(max(pages, default=0), shared) + tails
        most = max(most, len(pages))
    assert most == 8
    assert all(request.output_token_ids == expected(request) for request in requests)


@pytest.fixture(scope="module")
def llm(gqa_folder: Path, unchecked_types: None) -> Iterator[Any]:
    from pjengine import LLM

    with LLM(
        gqa_folder, dtype="float32", skip_tokenizer_init=True, warm_up=False,
        max_num_seqs=8, max_num_batched_tokens=32, decode_steps=1,
    ) as llm:  # fmt: skip
        yield llm


def test_the_likeliest_continuations_come_first(llm: Any) -> None:
    from pjengine import SamplingParams

    params = SamplingParams(n=6, max_tokens=6, seed=3, ignore_eos=True, logprobs=0)
    prompt = list(range(3, 40))  # longer than a step
    every, best = llm.generate(
        [prompt, prompt], [params, replace(params, n=2, best_of=6, logprobs=None)], use_tqdm=False
    )
    assert [output.index for output in every.outputs] == list(range(6))
    single = llm.generate(prompt, replace(params, n=1, seed=3 + 4), use_tqdm=False)[0].outputs[0]
    assert single.token_ids == every.outputs[4].token_ids
    assert single.cumulative_logprob == pytest.approx(every.outputs[4].cumulative_logprob, abs=1e-4)
    for output in every.outputs:
        total = sum(p[t].logprob for p, t in zip(output.logprobs, output.token_ids, strict=True))
        assert output.cumulative_logprob == pytest.approx(total, abs=1e-4)
    ranked = sorted(every.outputs, key=lambda output: -output.cumulative_logprob)
    assert [output.token_ids for output in best.outputs] == [output.token_ids for output in ranked[:2]]
    assert [output.index for output in best.outputs] == [0, 1]
    for ours, theirs in zip(best.outputs, ranked, strict=False):
        assert ours.cumulative_logprob == pytest.approx(theirs.cumulative_logprob, abs=1e-4)
        assert ours.logprobs is None


def test_what_is_chosen_is_shown_at_the_end_only(llm: Any) -> None:
    from pjengine import SamplingParams

    llm.engine.add_request([5, 6, 7], SamplingParams(n=1, best_of=3, max_tokens=4, seed=0), request_id="best")
    outputs: list[Any] = []
    while llm.engine.has_unfinished_requests():
        outputs += llm.engine.step()
    [output] = outputs
    assert output.finished and len(output.outputs) == 1
    with pytest.raises(ValueError, match="cannot be streamed"):
        llm.stream([5, 6, 7], SamplingParams(n=1, best_of=3))
