"""Speculative decoding gives the tokens of plain decoding, whatever it drafts, and runs where it pays."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.edits import NO_EDITS
from tests.engine.rescheduling import settle

CONFIG = {"method": "ngram", "num_speculative_tokens": 4}
NO_NEEDS = np.array(NO_EDITS.needs)
CODE = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n\n\n"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 48}
WARM: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": 5, "max_tokens": 48}


def speculation(**changes: int) -> Any:
    from pjengine.speculation_config import SpeculationConfig

    wanted: dict[str, Any] = {"num_drafts": 4, "lookup_min": 2, "lookup_max": 5, **changes}
    return SpeculationConfig(**wanted)


@pytest.fixture(scope="module")
def eager() -> Iterator[Any]:
    """The demo model with one row, which drafts in every step once it has the program."""
    from pjengine import LLM

    sizes = {"dtype": "float32", "max_num_seqs": 1, "max_num_batched_tokens": 64, "warm_up": False}
    with LLM("demo", **sizes, speculative_config=CONFIG) as llm:
        speculation: Any = llm.engine.scheduler.speculation
        speculation._pays = lambda *_: True
        while not llm.engine.runner.can_draft(1, NO_NEEDS):
            llm.engine.runner.wait_for_programs()
        yield llm
        settle(llm.engine)


CASES: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "sampled": WARM,
    "several continuations": {**WARM, "n": 2, "top_p": 1.0, "min_p": 0.05, "top_k": 30},
    "stop string": {**GREEDY, "stop": ["return"]},
    "11 tokens": {**GREEDY, "max_tokens": 11},
    "one token": {**GREEDY, "max_tokens": 1},
    "to the end of the text": {"temperature": 0.7, "seed": 5, "max_tokens": 250},
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_plain_decoding(demo: Any, eager: Any, name: str) -> None:
    from pjengine import SamplingParams

    params = SamplingParams(**CASES[name])
    plain, drafted = (llm.generate([CODE, CODE], params, use_tqdm=False) for llm in (demo, eager))
    for ours, theirs in zip(drafted, plain, strict=True):
        assert ours.outputs == theirs.outputs
        assert ours.metrics.num_generation_tokens == theirs.metrics.num_generation_tokens
    assert ours.num_cached_tokens > 0
    eager.engine.scheduler.check_integrity()


def test_a_text_that_repeats_itself_takes_few_steps_and_is_counted(eager: Any) -> None:
    from pjengine import SamplingParams
    from pjengine.stats import read_stats

    before = read_stats(eager.engine)
    eager.engine.add_request(CODE * 3, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    num_steps = 0
    while eager.engine.has_unfinished_requests():
        eager.engine.step()
        num_steps += 1
    after = read_stats(eager.engine)
    kept = after.num_accepted_tokens - before.num_accepted_tokens
    # A step for each token but those kept, some for the prompt, and at the end some that wait for the last.
    assert 10 < kept <= 59 and 60 - kept < num_steps < 60 - kept + 10
    num_drafts, drafted = (
        getattr(after, name) - getattr(before, name) for name in ("num_drafts", "num_draft_tokens")
    )
    assert kept <= drafted <= 4 * num_drafts
    assert sum(after.accepted_by_position) == after.num_accepted_tokens
    assert list(after.accepted_by_position) == sorted(after.accepted_by_position, reverse=True)


def test_metrics_count_drafts_and_the_places_that_held(eager: Any) -> None:
    from pjengine.serving.metrics import Metrics
    from pjengine.stats import read_stats

    stats, text = read_stats(eager.engine), Metrics(eager.engine, model_name="m", prefix="p").exposition()
    assert stats.num_accepted_tokens > 0
    for name, value in (("draft", stats.num_draft_tokens), ("accepted", stats.num_accepted_tokens)):
        line = f'p:spec_decode_num_{name}_tokens_total{{engine="0",model_name="m"}} {float(value)}'
        assert line.encode() in text
    place = 'p:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="3"}'
    assert f"{place} {float(stats.accepted_by_position[3])}".encode() in text


def test_a_benchmark_of_what_repeats_itself_says_how_many_drafts_held(eager: Any) -> None:
    from pjengine.bench import latency

    result = latency(eager, 1, prompt_len=64, output_len=32, repeats=1, is_copying=True)
    assert result["is_copying"] and 0 < result["num_accepted_tokens"] <= result["num_draft_tokens"]
    assert result["acceptance_rate"] == result["num_accepted_tokens"] / result["num_draft_tokens"]


def look_up_plainly(tokens: list[int], num_drafts: int, least: int, most: int) -> list[int] | None:
    """The specification of `look_up`."""
    best = (0, -1)
    for end in range(len(tokens) - 1):
        length = 0
        while length < min(most, end + 1) and tokens[end - length] == tokens[-1 - length]:
            length += 1
        if length >= least:
            best = max(best, (length, end))
    if best[1] < 0:
        return None
    follows = tokens[best[1] + 1 :]
    return [follows[i % len(follows)] for i in range(num_drafts)]


@pytest.mark.parametrize(("least", "most"), [(1, 1), (1, 4), (2, 5), (3, 3)])
def test_drafts_follow_the_last_of_the_longest_equal_runs(least: int, most: int) -> None:
    from pjengine.speculative_step import look_up

    rng, length = np.random.default_rng(0), 40
    known = rng.integers(0, 3, (300, length)).astype(np.int32)
    position = rng.integers(0, length, 300).astype(np.int32)
    last = rng.integers(0, 4, 300).astype(np.int32)  # token 3 has never come before
    config = speculation(num_drafts=3, lookup_min=least, lookup_max=most)
    drafts, is_found = look_up(jnp.asarray(known), jnp.asarray(last), jnp.asarray(position), config)
    wanted = [
        look_up_plainly([*row[:end].tolist(), int(own)], 3, least, most)
        for row, end, own in zip(known, position, last, strict=True)
    ]
    assert np.asarray(is_found).tolist() == [own is not None for own in wanted]
    for got, own in zip(np.asarray(drafts).tolist(), wanted, strict=True):
        assert own is None or got == own
    assert 50 < sum(own is not None for own in wanted) < 290


def test_tokens_hold_as_far_as_drafts_are_what_was_sampled() -> None:
    from pjengine.speculative_step import Drafted, verify

    tokens = jnp.array([[9, 1, 2, 3], [9, 1, 2, 3], [9, 1, 2, 3], [9, 1, 2, 3], [9, 1, 2, 3]])
    is_real = jnp.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    sampled = jnp.array([[1, 2, 3, 4], [1, 7, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    assert verify(Drafted(tokens, is_real, jnp.zeros(5, jnp.int32)), sampled).tolist() == [4, 2, 2, 1, 0]


@pytest.mark.parametrize("filters", [{}, {"temperature": 0.6, "top_p": 0.8}, {"top_k": 3}, {"min_p": 0.2}])
def test_20000_draws_with_drafts_have_the_distribution_of_the_model(filters: dict[str, float]) -> None:
    """Of two tokens, the second of which depends on the first; a step drafts the first."""
    from pjengine.sampler import sample
    from pjengine.speculative_step import Drafted, verify

    num, size = 20_000, 5
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=size), rng.normal(size=(size, size))
    drafted = int(np.argmax(first))
    chosen = {"temperature": 1.0, "top_k": size, "top_p": 1.0, "min_p": 0.0} | filters
    own: dict[str, Any] = {
        name: jnp.full(num, value, jnp.int32 if name == "top_k" else jnp.float32)
        for name, value in chosen.items()
    }
    seeds: dict[str, Any] = {
        "seed_high": jnp.zeros(num, jnp.int32),
        "seed_low": jnp.arange(num, dtype=jnp.int32),
    }

    def draw(logits: np.ndarray, position: int) -> np.ndarray:
        table = jnp.asarray(np.broadcast_to(logits, (num, size)), jnp.float32)
        return np.asarray(sample(table, jnp.full(num, position, jnp.int32), **seeds, **own))

    sampled = np.stack([draw(first, 7), draw(second[drafted], 8)], axis=1)
    tokens = jnp.broadcast_to(jnp.array([0, drafted], jnp.int32), (num, 2))
    step = Drafted(tokens, jnp.ones((num, 2), bool), jnp.zeros(num, jnp.int32))
    taken = np.asarray(verify(step, jnp.asarray(sampled)))
    later = draw(second[sampled[:, 0]], 8)  # by the next step, where the draft was wrong
    pairs = np.stack([sampled[:, 0], np.where(taken == 2, sampled[:, 1], later)])
    counts = np.zeros((size, size))
    np.add.at(counts, tuple(pairs), 1)
    expected = num * distribution(first, **chosen)[:, None] * [distribution(row, **chosen) for row in second]
    assert (counts[expected == 0] == 0).all()
    is_likely = expected > 0
    statistic = ((counts - expected)[is_likely] ** 2 / expected[is_likely]).sum()
    freedom = is_likely.sum() - 1
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)  # four standard deviations
    assert np.mean(taken == 2) == pytest.approx(distribution(first, **chosen)[drafted], abs=0.015)


def distribution(
    logits: np.ndarray, temperature: float, top_k: float, top_p: float, min_p: float
) -> np.ndarray:
    """Probabilities of tokens, after the filters in the sampler's order."""
    probabilities = np.exp(logits / temperature)
    probabilities = np.where(probabilities >= min_p * probabilities.max(), probabilities, 0)
    probabilities = np.where(probabilities >= np.sort(probabilities)[-int(top_k)], probabilities, 0)
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities)
    before = np.cumsum(probabilities[order]) - probabilities[order]
    probabilities[order[before >= top_p]] = 0
    return probabilities / probabilities.sum()


def test_the_cache_is_updated_in_place_and_never_copied() -> None:
    from tests.engine.test_runner import make_runner

    runner = make_runner(speculation=speculation(), max_num_seqs=1)
    plain, layout = runner.layouts()[0], runner.layouts()[-1]
    assert layout.num_drafts == 4 and not plain.num_drafts and not layout.covers(plain)
    memory = runner.compiler.lower(layout).compile().memory_analysis()
    kv_bytes = runner.cache.k.nbytes + runner.cache.v.nbytes
    assert memory.alias_size_in_bytes >= kv_bytes
    assert memory.temp_size_in_bytes < kv_bytes / 4
    runner.close()


def simulate(
    num_rows: int,
    cost: float,
    accepted: Callable[[int], int],
    *,
    num_steps: int = 2000,
    depth: int = 1,
    num_slow: int = 0,
) -> float:
    """Tokens a second of a device on which a step with drafts takes `cost` plain ones; plain ones give 1.

    `accepted`: how many drafts hold in a step, by the number of tokens before it. The first `num_slow` steps
    seem to take a hundred times as long.
    """
    from pjengine.page_groups import PageUpdates
    from pjengine.row_table import RowTable
    from pjengine.schedule import Decodes, Schedule
    from pjengine.speculation import Speculation

    table, rows = RowTable(num_rows), np.arange(num_rows)
    table.admissions[:] = rows + 1
    rule = Speculation(speculation(), num_rows)
    now, clock, num_tokens, disturbances = 0.0, 0.0, 0, itertools.cycle([1.0, 1.02, 1.0, 1.1, 1.0, 4.0, 1.0])
    for index in range(num_steps):
        num_drafts = rule.choose(table, rows, NO_NEEDS, depth)
        lengths = np.full(num_rows, num_drafts + 1 if num_drafts else depth)
        nobody: list[Any] = [None] * num_rows
        decodes = Decodes(nobody, rows, table.admissions[rows], rows, lengths)
        step = Schedule(decodes, [], PageUpdates([], []), NO_NEEDS, [], [], [], [], num_drafts=num_drafts)
        step_s = (cost if num_drafts else float(depth)) * next(disturbances)
        now += step_s
        clock += step_s * (100 if index < num_slow else 1)
        rule.see(step, clock)
        if num_drafts:
            taken = np.full(num_rows, 1 + accepted(num_tokens))
            rule.settle(table, step, taken, lengths - 1)
        num_tokens += int(taken[0]) if num_drafts else depth
    return num_tokens / now * 1.4457  # the mean of what disturbs the steps


@pytest.mark.parametrize(
    ("num_rows", "cost"), [(1, 1.03), (1, 1.6), (8, 1.2), (32, 1.9), (51, 2.4), (1, 5.0)]
)
@pytest.mark.parametrize("depth", [1, 4])
def test_what_nothing_can_be_drafted_of_runs_as_fast_as_without(
    num_rows: int, cost: float, depth: int
) -> None:
    assert simulate(num_rows, cost, lambda _: 0, depth=depth) > 0.95


@pytest.mark.parametrize(("num_rows", "cost"), [(1, 1.03), (8, 1.2), (32, 1.9)])
def test_what_is_drafted_well_runs_faster(num_rows: int, cost: float) -> None:
    assert simulate(num_rows, cost, lambda _: 4) > 0.95 * 5 / cost
    assert simulate(num_rows, 6.0, lambda _: 4) > 0.95  # however well, it may cost more


def test_a_wrong_time_of_plain_steps_does_not_stay() -> None:
    assert simulate(1, 1.6, lambda done: done % 4 == 0, num_steps=6000, num_slow=5) > 0.9


def test_a_part_that_can_be_drafted_is_found_within_a_pause() -> None:
    """Of every 1,000 tokens the last 300 are copied."""
    share = 700 + 300 / (5 / 1.05)
    assert simulate(1, 1.05, lambda done: 4 * (done % 1000 >= 700)) > 0.85 * 1000 / share


def test_steps_with_too_many_rows_or_edits_of_other_kinds_are_plain() -> None:
    from pjengine.edits import Edits
    from pjengine.row_table import RowTable
    from pjengine.speculation import Speculation

    table = RowTable(64)
    table.admissions[:] = 1

    def choose(num_rows: int, edits: Edits, can_run: bool = True) -> int:
        rule: Any = Speculation(speculation(), 64, lambda num_seqs, needs: can_run)
        rule._pays = lambda *_: True
        return rule.choose(table, np.arange(num_rows), np.array(edits.needs), 1)

    assert choose(51, Edits()) == 4 and choose(52, Edits()) == choose(0, Edits()) == 0
    assert choose(1, Edits(num_logprobs=3, repetition_penalty=1.2, logprob_ids=(1,))) == 4
    for edits in (Edits(bias={1: 1.0}), Edits(allowed=(1,)), Edits(bad_words=((1,),)), Edits(has_mask=True)):
        assert choose(1, edits) == 0
    assert choose(1, Edits(), can_run=False) == 0


BAD: dict[str, tuple[Any, str]] = {
    "no dict": ("ngram", "speculative_config must be a dict, got 'ngram'"),
    "no method": ({"num_speculative_tokens": 4}, "needs a method, one of ngram, draft_model, got None"),
    "unknown method": ({**CONFIG, "method": "eagle"}, "one of ngram, draft_model, got 'eagle'"),
    "unknown key": ({**CONFIG, "disable_by_batch_size": 8}, "has no key 'disable_by_batch_size'; there are"),
    "no number": ({"method": "ngram"}, "needs num_speculative_tokens"),
    "number of another type": (
        {**CONFIG, "num_speculative_tokens": 4.0},
        "whole number from 1 to 15, got 4.0",
    ),
    "a truth": ({**CONFIG, "num_speculative_tokens": True}, "whole number from 1 to 15, got True"),
    "none drafted": ({**CONFIG, "num_speculative_tokens": 0}, "whole number from 1 to 15, got 0"),
    "more than a page": ({**CONFIG, "num_speculative_tokens": 16}, "whole number from 1 to 15, got 16"),
    "long look-up": (
        {**CONFIG, "prompt_lookup_max": 33},
        "prompt_lookup_max must be a whole number from 1 to 32",
    ),
    "no look-up": (
        {**CONFIG, "prompt_lookup_min": 0},
        "prompt_lookup_min must be a whole number from 1 to 32",
    ),
    "crossed": (
        {**CONFIG, "prompt_lookup_max": 2, "prompt_lookup_min": 3},
        "prompt_lookup_min=3 must be at most prompt_lookup_max=2",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_config_that_cannot_be_is_refused(name: str) -> None:
    from pjengine import EngineConfig

    wanted, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        EngineConfig(model="demo", speculative_config=wanted)


def test_a_config_may_leave_the_look_up_open() -> None:
    from pjengine import EngineConfig

    def read(**more: int) -> tuple[int, int]:
        config = EngineConfig(model="demo", speculative_config={**CONFIG, **more}).speculation
        assert config is not None
        return config.lookup_min, config.lookup_max

    assert read() == (2, 5) and read(prompt_lookup_min=8) == (8, 8)
    assert read(prompt_lookup_max=1) == (1, 1) and read(prompt_lookup_min=1, prompt_lookup_max=3) == (1, 3)
    assert EngineConfig(model="demo").speculation is None
