"""Functions of the caller's change the logits of their own requests, and fail for themselves."""

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.engine.test_sampling_features import PROMPT, params, raw_logits, run

VOCAB_SIZE, NUM_TOKENS = 160, 10
LOOPING = [64, 4, 0, 19]  # the model goes on with 4 and 0 once more


def ban_low(token_ids: Any, logits: Any) -> Any:
    return logits.at[:100].set(-jnp.inf)


def no_repeated_pair(token_ids: Any, logits: Any) -> Any:
    """Whatever has followed the last token before must not follow it again."""
    last = token_ids[jnp.sum(token_ids >= 0) - 1]
    is_met = (token_ids[:-1] == last) & (token_ids[1:] >= 0)
    return logits.at[jnp.where(is_met, token_ids[1:], VOCAB_SIZE)].set(-jnp.inf, mode="drop")


def double(token_ids: Any, logits: Any) -> Any:
    return 2 * logits


def lift_low(token_ids: Any, logits: Any) -> Any:
    return logits.at[:100].add(1.5)


def no_repeated_pair_on_host(token_ids: list[int], logits: np.ndarray) -> np.ndarray:
    for first, second in itertools.pairwise(token_ids):
        if first == token_ids[-1]:
            logits[second] = -np.inf
    return logits


@pytest.fixture(scope="module")
def llm(gqa_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from pjengine import LLM

    with LLM(
        gqa_folder,
        dtype="float32",
        max_num_seqs=8,
        max_num_batched_tokens=96,
        max_model_len=60,  # no whole number of pages
        skip_tokenizer_init=True,
        warm_up=False,
        compile_cache_dir=str(tmp_path_factory.mktemp("programs")),
    ) as llm:
        run(llm)  # makes two programs without functions
        yield llm
        assert not llm.engine.has_unfinished_requests()
        llm.engine.scheduler.check_integrity()


def generate(llm: Any, all_params: list[Any], prompt: list[int] = LOOPING) -> list[Any]:
    outputs = llm.generate([prompt] * len(all_params), all_params, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def with_functions(llm: Any) -> list[Any]:
    """The programs that call functions of requests."""
    from pjengine.draw import DrawLayout

    programs = llm.engine.runner.programs
    return [layout for layout in programs if isinstance(layout, DrawLayout) and layout.edits.chains]


def greedy(llm: Any, edit: Callable[[list[int], np.ndarray], np.ndarray]) -> list[int]:
    """What the edited logits of the dense forward lead to."""
    known = list(LOOPING)
    for _ in range(NUM_TOKENS):
        row = raw_logits(llm, known)[-1].astype(np.float32)
        known.append(int(np.argmax(edit(known, row))))
    return known[len(LOOPING) :]


def undo(token_ids: Any, logits: Any) -> Any:
    """Prefers what is forbidden, or makes it NaN, and to that what has got a bias of 50."""
    forced = jnp.where(logits == -jnp.inf, 100.0, logits).at[9].set(jnp.nan)
    return jnp.where(logits > 40, 200.0, forced)


CASES: dict[str, dict[str, Any]] = {
    "none": {"logprobs": 1},
    "ban": {"logits_processors": [ban_low]},
    "pairs": {"logits_processors": [no_repeated_pair]},
    "double, lift": {"logits_processors": [double, lift_low]},
    "lift, double": {"logits_processors": [lift_low, double]},
    "undo": {"logits_processors": [undo], "allowed_token_ids": [4, 8, 15], "logit_bias": {8: 50.0}},
    "again": {"logits_processors": (ban_low,)},
}


@pytest.fixture(scope="module")
def batch(llm: Any) -> dict[str, list[int]]:
    """Tokens of requests that ran in one batch, each with its own functions."""
    from pjengine import host_processor

    cases = {**CASES, "host": {"logits_processors": [host_processor(no_repeated_pair_on_host)]}}
    outputs = generate(llm, [params(max_tokens=NUM_TOKENS, **fields) for fields in cases.values()])
    return {name: output.token_ids for name, output in zip(cases, outputs, strict=True)}


def test_a_function_changes_its_own_request_alone(llm: Any, batch: dict[str, list[int]]) -> None:
    assert batch["none"] == greedy(llm, lambda known, row: row)
    assert min(batch["none"]) < 100 <= min(batch["ban"])

    def ban(known: list[int], row: np.ndarray) -> np.ndarray:
        return np.where(np.arange(VOCAB_SIZE) < 100, -np.inf, row)

    assert batch["ban"] == batch["again"] == greedy(llm, ban)


def test_a_function_sees_all_tokens_so_far(llm: Any, batch: dict[str, list[int]]) -> None:
    def pairs(tokens: list[int]) -> list[tuple[int, int]]:
        return list(itertools.pairwise(tokens))

    assert batch["pairs"] == greedy(llm, no_repeated_pair_on_host) != batch["none"]
    repeated = pairs([*LOOPING, *batch["none"]])
    assert len(set(repeated)) < len(repeated), "alone, the model repeats one"
    assert not set(pairs([*LOOPING, *batch["pairs"]])[len(LOOPING) - 1 :]) & set(pairs(LOOPING))


def test_a_function_on_the_host_does_what_its_twin_on_the_device_does(batch: dict[str, list[int]]) -> None:
    assert batch["host"] == batch["pairs"]


def test_functions_are_called_in_their_order(llm: Any, batch: dict[str, list[int]]) -> None:
    lift = np.where(np.arange(VOCAB_SIZE) < 100, np.float32(1.5), np.float32(0))
    assert batch["double, lift"] == greedy(llm, lambda known, row: 2 * row + lift)
    assert batch["lift, double"] == greedy(llm, lambda known, row: 2 * (row + lift))
    assert batch["double, lift"] != batch["lift, double"]


def broken_on_host(token_ids: list[int], logits: np.ndarray) -> np.ndarray:
    if len(token_ids) > len(LOOPING) + 1:
        raise KeyError("no such state")
    return logits


CULPRITS: dict[str, tuple[list[Any], int, str]] = {
    "NaN": (
        [ban_low, lambda token_ids, logits: logits.at[105].set(jnp.nan)],
        0, r"logits_processors\[1\] \(<lambda>\) returned NaN or \+inf",
    ),
    "inf": (
        [lambda token_ids, logits: logits.at[5].set(jnp.inf)],
        0, r"logits_processors\[0\] \(<lambda>\) returned NaN or \+inf",
    ),
    "nothing left": (
        [lambda token_ids, logits: logits.at[100:].set(-jnp.inf), ban_low],
        0, r"logits_processors\[1\] \(ban_low\) leaves no token",
    ),
    "raises": ([broken_on_host], 2, r"\[0\] \(broken_on_host\) failed: KeyError: 'no such state'"),
    "shape": (
        [lambda token_ids, logits: logits[:5]],
        0, r"failed: ValueError: wanted numpy float32\[160\], got float32\[5\]",
    ),
    "dtype": ([lambda token_ids, logits: logits.astype(np.float64)], 0, r"got float64\[160\]"),
    "exits": ([lambda token_ids, logits: sys.exit(3)], 0, r"failed: SystemExit: 3"),
}  # fmt: skip


@pytest.fixture(scope="module")
def failed(llm: Any) -> dict[str, Any]:
    """What requests with bad functions, and one without any, end with, side by side."""
    from pjengine import host_processor

    chains = {name: functions for name, (functions, *_) in CULPRITS.items()}
    for name in ("raises", "shape", "dtype", "exits"):
        chains[name] = [host_processor(*chains[name])]
    all_params = [params(max_tokens=NUM_TOKENS, logits_processors=chain) for chain in chains.values()]
    outputs = generate(llm, [*all_params, params(max_tokens=NUM_TOKENS)])
    return dict(zip([*chains, "none"], outputs, strict=True))


@pytest.mark.parametrize("name", CULPRITS)
def test_a_function_that_goes_wrong_ends_its_own_request_by_name(name: str, failed: dict[str, Any]) -> None:
    import re

    _, num_tokens, message = CULPRITS[name]
    output = failed[name]
    assert output.finish_reason == "error" and len(output.token_ids) == num_tokens
    assert re.search(message, output.stop_reason), output.stop_reason


def test_requests_beside_one_that_fails_go_on(
    llm: Any, batch: dict[str, list[int]], failed: dict[str, Any]
) -> None:
    assert failed["none"].token_ids == batch["none"]


def test_functions_come_last_and_what_is_forbidden_stays_so(batch: dict[str, list[int]]) -> None:
    assert batch["undo"] == [8] * NUM_TOKENS


def test_a_hundred_requests_with_one_function_need_no_other_programs(
    llm: Any, batch: dict[str, list[int]]
) -> None:
    before = set(llm.engine.runner.programs)
    all_params = [params(max_tokens=2, logits_processors=(ban_low,)) for _ in range(100)]
    outputs = generate(llm, all_params)
    assert {tuple(output.token_ids) for output in outputs} == {tuple(batch["ban"][:2])}
    assert set(llm.engine.runner.programs) == before


def test_programs_with_functions_are_not_kept_on_disk(llm: Any, batch: dict[str, list[int]]) -> None:
    kept = list(Path(llm.engine.config.compile_cache_dir).glob("*.program"))
    num_kept = len(llm.engine.runner.programs) - len(with_functions(llm))
    assert 2 <= len(kept) == num_kept < len(llm.engine.runner.programs)


def test_continuations_streams_seeds_and_raw_logprobs_go_with_functions(llm: Any) -> None:
    fields: dict[str, Any] = {"temperature": 1.0, "max_tokens": 5, "logprobs": 1}
    processed = params(**fields, n=3, seed=11, logits_processors=[ban_low])
    together = llm.generate([PROMPT], processed, use_tqdm=False)[0].outputs
    for index, output in enumerate(together):
        alone = run(llm, **fields, seed=11 + index, logits_processors=[ban_low])
        assert alone.token_ids == output.token_ids and min(output.token_ids) >= 100
        row = raw_logits(llm, PROMPT)[-1]
        wanted = row[output.token_ids[0]] - np.log(np.exp(row - row.max()).sum()) - row.max()
        assert output.logprobs[0][output.token_ids[0]].logprob == pytest.approx(wanted, abs=1e-4)
    own = params(**fields, seed=11, logits_processors=[ban_low])
    assert [chunk.token_ids for chunk in llm.stream(PROMPT, own)] == [[t] for t in together[0].token_ids]


def told(logits: Any) -> Any:
    jax.debug.print("{}", logits[0])
    jax.debug.callback(lambda logits: None, logits)
    return logits


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "shape": (lambda token_ids, logits: logits[:5], ValueError, r"float32\[160\].*got float32\[5\]"),
    "dtype": (lambda token_ids, logits: logits.astype(jnp.bfloat16), ValueError, r"got bfloat16\[160\]"),
    "nothing": (lambda token_ids, logits: None, ValueError, "got None"),
    "arguments": (lambda logits: logits, ValueError, "cannot be traced by JAX: TypeError"),
    "values": (
        lambda token_ids, logits: logits if logits[0] > 0 else -logits,
        ValueError, "TracerBoolConversionError.*pjengine.host_processor",
    ),
    "no batches": (
        jax.custom_batching.custom_vmap(lambda token_ids, logits: logits), ValueError, "custom_vmap",
    ),
    "host": (
        lambda token_ids, logits: jax.pure_callback(np.asarray, logits, logits), ValueError,
        r"must not call the host, got pure_callback: .* pjengine.host_processor makes a processor",
    ),
    "host in a branch": (
        lambda token_ids, logits: jax.lax.cond(logits[0] > 0, jax.jit(told), jnp.negative, logits),
        ValueError, "must not call the host, got debug_callback, debug_print: an error there",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_function_that_cannot_be_part_of_a_program_is_refused_at_the_call(llm: Any, name: str) -> None:
    function, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        llm.engine.add_request(PROMPT, params(logits_processors=[ban_low, function]))
    assert not llm.engine.has_unfinished_requests()


def test_a_function_without_a_hash_is_refused(llm: Any) -> None:
    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, token_ids: Any, logits: Any) -> Any:
            return logits

    with pytest.raises(TypeError, match=r"logits_processors\[0\].*must be hashable"):
        llm.engine.add_request(PROMPT, params(logits_processors=[Unhashable()]))


def test_many_rows_are_processed_in_blocks_and_the_others_not_at_all() -> None:
    from pjengine.call_processors import MAX_ROWS, apply_processors
    from pjengine.logits import History

    num_seqs, page_size, vocab_size = 2 * MAX_ROWS, 4, 11
    rng = np.random.default_rng(1)
    lens = rng.integers(0, 13, num_seqs).astype(np.int32)
    table = rng.permutation(np.arange(3 * num_seqs)).reshape(num_seqs, 3).astype(np.int32)
    token_ids = rng.integers(0, vocab_size, (3 * num_seqs, page_size)).astype(np.int32)
    logits = rng.normal(size=(num_seqs, vocab_size)).astype(np.float32)

    def add_sum(token_ids: Any, logits: Any) -> Any:
        assert token_ids.shape == (3 * page_size,)
        return logits + jnp.sum(jnp.maximum(token_ids, 0)).astype(jnp.float32)

    asked = rng.permutation(num_seqs)[: MAX_ROWS + 5].astype(np.int32)
    which = rng.integers(0, 2, len(asked)).astype(np.int32)
    processed = np.full((2, 2 * MAX_ROWS), num_seqs, np.int32)
    processed[:, : len(asked)] = asked, which
    chains = [(add_sum,), (double, double)]
    history = History(*map(jnp.asarray, (token_ids, table, lens, 0 * lens)))
    got, failures = jax.jit(lambda logits, rows: apply_processors(logits, rows, chains, history))(
        jnp.asarray(logits), jnp.asarray(processed)
    )
    wanted = logits.copy()
    for seq, chain in zip(asked, which, strict=True):
        known = token_ids[table[seq]].reshape(-1)[: lens[seq]]
        wanted[seq] = 4 * wanted[seq] if chain else wanted[seq] + np.float32(known.sum())
    np.testing.assert_array_equal(got, wanted)
    assert not np.any(failures)


def test_notes_of_failures_on_the_host_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from pjengine import host_processor, processors

    monkeypatch.setattr(processors, "MAX_NOTES", 3)

    @host_processor
    def fail(token_ids: list[int], logits: np.ndarray) -> np.ndarray:
        raise ValueError(f"at {token_ids}")

    for token in range(5):
        assert np.isnan(fail(np.array([token, -1]), np.zeros(2, np.float32))).all()
    assert fail.error_at([4]) == "ValueError: at [4]"
    assert fail.error_at([4]) is None and fail.error_at([0]) is None


def test_ever_new_functions_leave_few_programs_behind(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pjengine import runner as module

    monkeypatch.setattr(module, "MAX_EDITING", 1)
    forced = jnp.full(VOCAB_SIZE, -jnp.inf).at[7].set(0.0)
    assert len(with_functions(llm)) >= 2
    output = run(llm, max_tokens=2, logits_processors=[lambda token_ids, logits: logits + forced])
    assert output.token_ids == [7, 7]
    assert len(with_functions(llm)) == 1


def test_host_processor_takes_a_function_alone(unchecked_types: None) -> None:
    from pjengine import host_processor

    nothing: Any = 3
    with pytest.raises(TypeError, match="host_processor takes a function, got 3"):
        host_processor(nothing)
