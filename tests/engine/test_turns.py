"""One thread at a time, and nobody waits for ever."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pjengine.turns import Turns


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Threads that interrupt each other as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_what_is_left_in_the_middle_of_a_turn_is_done_right_after_it() -> None:
    turns, seen = Turns(), list[str]()
    with turns.take():
        turns.leave(lambda: seen.append("left"))  # as a garbage collector does, on the same thread
        seen.append("turn")
    turns.leave(lambda: seen.append("free"))
    assert seen == ["turn", "left", "free"]


def test_another_thread_waits_or_is_turned_away() -> None:
    turns, seen = Turns(), list[str]()

    def come(is_waiting: bool) -> None:
        try:
            with turns.take(is_waiting=is_waiting):
                seen.append("took")
        except RuntimeError as error:
            seen.append(str(error))

    with turns.take():
        threads = [threading.Thread(target=come, args=(is_waiting,)) for is_waiting in (False, True)]
        for thread in threads:
            thread.start()
        threads[0].join()
    threads[1].join()
    assert "another thread" in seen[0] and seen[1:] == ["took"]


@pytest.mark.usefixtures("hasty_threads")
def test_no_call_is_lost_and_none_is_made_beside_another() -> None:
    turns = Turns()
    count = inside = 0

    def call() -> None:
        nonlocal count, inside
        inside += 1
        assert inside == 1
        count += 1
        inside -= 1

    def work() -> None:
        for i in range(300):
            if i % 3:
                turns.leave(call)
            else:
                with turns.take():
                    call()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count == 4 * 300


@pytest.mark.usefixtures("hasty_threads", "unchecked_types")
def test_threads_on_one_llm_get_their_tokens_or_are_turned_away(gqa_folder: Path) -> None:
    from pjengine import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    seen: list[Any] = []

    with LLM(
        gqa_folder, dtype="float32", skip_tokenizer_init=True, warm_up=False,
        max_num_seqs=2, max_num_batched_tokens=32, max_model_len=64,
    ) as llm:  # fmt: skip
        [wanted] = llm.generate([[1, 2, 3]], params, use_tqdm=False)

        def work() -> None:
            for _ in range(25):
                try:
                    [output] = llm.generate([[1, 2, 3]], params, use_tqdm=False)
                    seen.append(output.outputs[0].token_ids)
                except Exception as error:  # looked at below
                    seen.append(error)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        errors = [item for item in seen if isinstance(item, Exception)]
        assert len(seen) == 75 and all("another thread" in str(error) for error in errors), errors
        assert all(item == wanted.outputs[0].token_ids for item in seen if isinstance(item, list))
        assert not llm.engine.has_unfinished_requests()
        llm.engine.step()
        scheduler = llm.engine.scheduler
        scheduler.check_integrity()
        assert not scheduler.has_requests and scheduler.pool.num_free == scheduler.pool.num_usable
