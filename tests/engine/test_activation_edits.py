"""Functions of the caller's change the hidden states of their own requests, and fail for themselves."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

from tests.engine.rescheduling import reschedule, settle
from tests.engine.test_sampling_features import LONG, PROMPT, params

WIDTH, NUM_LAYERS, NUM_TOKENS, LENGTH = 64, 3, 8, 96
RNG = np.random.default_rng(3)
ONE, OTHER = RNG.normal(size=(2, WIDTH)).astype(np.float32)


def add(state: Any, token: Any, vector: Any, strength: Any) -> Any:
    return state + strength * vector


def add_to_output(state: Any, token: Any, by: Any) -> Any:
    return state + jnp.where(token.position >= token.prompt_len, by["strength"], 0.0) * by["vector"]


def double_where(state: Any, token: Any, token_id: Any, is_on: Any) -> Any:
    return jnp.where(is_on & (token.token_id == token_id), 2 * state, state)


def edit(layer: int, function: Any, *args: Any) -> Any:
    from pjengine import ActivationEdit

    return ActivationEdit(layer, function, args)


def both(first: Any, second: Any) -> list[Any]:
    return [edit(1, *first), edit(1, *second)]


ADDED, DOUBLED = (add, ONE, 3.0), (double_where, PROMPT[3], True)
CASES: dict[str, list[Any]] = {
    "none": [],
    "added": [edit(2, add, ONE, 2.5)],
    "added at the end": [edit(-1, add, OTHER, 4.0)],
    "output": [edit(2, add_to_output, {"vector": OTHER, "strength": 4.0})],
    "added, doubled": both(ADDED, DOUBLED),
    "doubled, added": both(DOUBLED, ADDED),
}


@pytest.fixture(scope="module")
def llm(gqa_folder: Path) -> Iterator[Any]:
    from pjengine import LLM

    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": LENGTH}
    with LLM(gqa_folder, dtype="float32", warm_up=False, skip_tokenizer_init=True, **sizes) as llm:
        yield llm
        assert not llm.engine.has_unfinished_requests()
        llm.engine.scheduler.check_integrity()


def generate(llm: Any, edits: list[list[Any]], prompt: list[int] = PROMPT, **fields: Any) -> list[Any]:
    own = [params(**{"max_tokens": NUM_TOKENS, "activation_edits": each, **fields}) for each in edits]
    return llm.generate([prompt] * len(own), own, use_tqdm=False)


def tokens_of(outputs: list[Any]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def dense(llm: Any) -> Any:
    """Greedy tokens by the forward pass without pages, its states edited by numpy's own sums."""
    from pjengine.models.attention import dense_attend

    model, positions = llm.model, jnp.arange(LENGTH, dtype=jnp.int32)

    @jax.jit
    def logits(params: Any, tokens: Any, factors: Any, terms: Any) -> Any:
        def change(number: int, x: Any) -> Any:
            return x * factors[number][:, None] + terms[number]

        inputs = (tokens, positions, positions + 1, None, dense_attend, None)
        hidden, _, _ = model.run_keeping(params, *inputs, change)
        return model.logits(params, hidden)

    def tokens(name: str, prompt: list[int], num_tokens: int = NUM_TOKENS) -> list[int]:
        known = list(prompt)
        for _ in range(num_tokens):
            factors = np.ones((NUM_LAYERS + 1, LENGTH), np.float32)
            terms = np.zeros((NUM_LAYERS + 1, LENGTH, WIDTH), np.float32)
            is_met = np.array([token == PROMPT[3] for token in known] + [False] * (LENGTH - len(known)))
            if name == "added":
                terms[2] = 2.5 * ONE
            elif name == "added at the end":
                terms[NUM_LAYERS] = 4 * OTHER
            elif name == "output":
                terms[2, len(prompt) :] = 4 * OTHER
            elif name != "none":
                factors[1][is_met] = 2
                terms[1] = 3 * ONE
                terms[1][is_met] *= 2 if name == "added, doubled" else 1
            padded = jnp.asarray(known + [0] * (LENGTH - len(known)), jnp.int32)
            found = logits(llm.params, padded, jnp.asarray(factors), jnp.asarray(terms))
            known.append(int(np.argmax(found[len(known) - 1])))
        return known[len(prompt) :]

    return tokens


@pytest.fixture(scope="module")
def batch(llm: Any) -> dict[str, list[int]]:
    """Tokens of requests that ran in one batch, each with its own edits."""
    return dict(zip(CASES, tokens_of(generate(llm, list(CASES.values()))), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_edits_change_the_states_of_their_own_request_alone(
    name: str, batch: dict[str, list[int]], dense: Any
) -> None:
    """In the prompt and in the output, in their order."""
    assert batch[name] == dense(name, PROMPT)


def test_every_edit_shows(batch: dict[str, list[int]]) -> None:
    assert len({tuple(tokens) for tokens in batch.values()}) == len(batch)


def test_requests_that_differ_in_args_alone_share_a_program(
    llm: Any, batch: dict[str, list[int]], dense: Any
) -> None:
    before = set(llm.engine.runner.programs)
    edits = [[edit(2, add, ONE, 0.0)], [edit(2, add, ONE, 2.5)], [edit(2, add, OTHER, 1e-9)]]
    outputs = tokens_of(generate(llm, edits))
    assert outputs == [batch["none"], batch["added"], batch["none"]]
    assert set(llm.engine.runner.programs) == before


def test_args_are_sent_once_for_steps_of_the_same_requests(
    llm: Any, batch: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pjengine import runner as module

    words_by_slot: Any = vars(module)["words_by_slot"]
    sent = []

    def noted(*args: Any) -> Any:
        sent.append(args)
        return words_by_slot(*args)

    monkeypatch.setattr(module, "words_by_slot", noted)
    assert tokens_of(generate(llm, [CASES["added"], CASES["output"]])) == [batch["added"], batch["output"]]
    assert len(sent) == 2  # for the prompts, and for all tokens behind them


def test_chunks_of_a_long_prompt_are_edited_and_no_page_is_shared(
    llm: Any, batch: dict[str, list[int]], dense: Any
) -> None:
    llm.reset_prefix_cache()
    plain = generate(llm, [[]], LONG)[0]
    for _ in range(2):
        edited = generate(llm, [CASES["added"]], LONG)[0]
        assert edited.num_cached_tokens == 0
        assert edited.outputs[0].token_ids == dense("added", LONG) != plain.outputs[0].token_ids
    again = generate(llm, [[]], LONG)[0]
    assert again.num_cached_tokens == 64 and tokens_of([again]) == tokens_of([plain])


def test_a_preempted_request_is_edited_again(llm: Any, batch: dict[str, list[int]], dense: Any) -> None:
    engine = llm.engine
    reschedule(engine, num_pages=7)
    both = [params(max_tokens=24, activation_edits=CASES[name]) for name in ("none", "added")]
    outputs = tokens_of(llm.generate([LONG[:30]] * 2, both, use_tqdm=False))
    assert engine.scheduler.num_preemptions > 0
    assert outputs == [dense(name, LONG[:30], 24) for name in ("none", "added")]
    settle(engine)
    reschedule(engine)


def test_continuations_share_the_edited_pages_of_their_prompt(llm: Any, batch: dict[str, list[int]]) -> None:
    fields: dict[str, Any] = {"temperature": 1.0, "seed": 5}
    [together] = generate(llm, [CASES["added"]], LONG, n=2, **fields)
    [first] = generate(llm, [CASES["added"]], LONG, **fields)
    [second] = generate(llm, [CASES["added"]], LONG, **{**fields, "seed": 6})
    assert [own.token_ids for own in together.outputs] == tokens_of([first, second])


def test_hidden_states_are_those_that_the_edits_have_made(llm: Any, batch: dict[str, list[int]]) -> None:
    from pjengine import HiddenStatesParams

    wanted = HiddenStatesParams(layers=(0, 1, 2))
    plain, edited = generate(llm, [[], CASES["added"]], max_tokens=1, hidden_states=wanted)
    before, after = plain.hidden_states, edited.hidden_states
    np.testing.assert_allclose(after[:2], before[:2], atol=1e-5)
    np.testing.assert_allclose(after[2], before[2] + 2.5 * ONE, atol=1e-4)


def nan_in_prompt(state: Any, token: Any) -> Any:
    return jnp.where(token.position == 1, jnp.nan, state)


def inf_in_output(state: Any, token: Any) -> Any:
    return jnp.where(token.position > token.prompt_len, jnp.inf, state)


def too_large(state: Any, token: Any) -> Any:
    return state * 1e38


def test_an_edit_that_yields_no_number_ends_its_own_request(llm: Any, batch: dict[str, list[int]]) -> None:
    functions = (nan_in_prompt, inf_in_output, too_large)
    edits = [[edit(1, function)] for function in functions]
    *failed, plain, added = generate(llm, [*edits, CASES["none"], CASES["added"]])
    for output, function, num_tokens in zip(failed, functions, (0, 2, 0), strict=True):
        [own] = output.outputs
        assert own.finish_reason == "error" and len(own.token_ids) == num_tokens
        assert f"NaN) behind activation_edits ({function.__name__} at layer 1)" in own.stop_reason
    assert tokens_of([plain, added]) == [batch["none"], batch["added"]]
    again = generate(llm, [CASES["none"]] * 8, LONG)  # in the pages that hold what is no number
    assert len(set(map(tuple, tokens_of(again)))) == 1 and again[0].outputs[0].finish_reason == "length"


def negate(state: Any, token: Any) -> Any:
    return -state


def test_programs_with_edits_are_few_and_not_kept_on_disk(
    llm: Any, batch: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pjengine import runner as module
    from pjengine.step_compiler import _is_kept

    def edited() -> list[Any]:
        return [own for own in llm.engine.runner.programs if getattr(own, "edit_room", None) is not None]

    assert edited() and not any(_is_kept(layout) for layout in edited())
    monkeypatch.setattr(module, "MAX_EDITING", 3)  # the model for prompts and for decodes, and what draws
    generate(llm, [[edit(0, negate)]], max_tokens=1)
    chains = {chain for own in edited() for chain in own.edit_room.chains}
    assert [form.function for chain in chains for form in chain.forms] == [negate]


def test_requests_without_edits_run_programs_that_know_nothing_of_them(llm: Any, batch: Any) -> None:
    asked, stages_for = [], llm.engine.runner.stages_for

    def noted(wanted: Any) -> Any:
        asked.append(wanted)
        return stages_for(wanted)

    llm.engine.runner.stages_for = noted
    try:
        assert tokens_of(generate(llm, [[]])) == [batch["none"]]
    finally:
        del llm.engine.runner.stages_for
    assert asked and all(own.model.edit_room is None and own.draw is None for own in asked)


def test_many_tokens_are_edited_in_blocks_each_by_the_args_of_its_sequence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pjengine import call_activation_edits as module
    from pjengine.activation_edits import pack_edited, room_for, words_by_slot
    from pjengine.batching import Rows
    from pjengine.models.shapes import SHAPES
    from pjengine.models.state import Batch

    monkeypatch.setattr(module, "MAX_TOKENS", 8)
    config, num_tokens = SHAPES["tiny"], 21
    vectors = RNG.normal(size=(3, config.hidden_size)).astype(np.float32)
    edits = [
        module.check_edits([edit(1, add, vectors[0], 2.0)], config),
        module.check_edits([edit(0, add, vectors[1], 1.0), edit(1, add, vectors[2], -1.0)], config),
    ]
    assert edits[0] is not None and edits[1] is not None
    room = room_for(2, {own.chain for own in edits if own is not None})
    assert room is not None
    part = np.empty((2, 4), np.int32)
    pack_edited(part, [(1, edits[0]), (2, edits[1])], room)
    cu_q_lens = jnp.asarray([0, 4, 10, 19, 19], jnp.int32)
    arange = jnp.arange(num_tokens, dtype=jnp.int32)
    slots = jnp.where(arange < 19, arange, -1)
    batch = Batch(arange, arange, arange, slots, jnp.zeros((4, 1), jnp.int32), arange[:4], cu_q_lens)
    words = jnp.asarray(words_by_slot([edits[0], edits[1]], room))
    change = module.state_edit(room, jnp.asarray(part), words, Rows.empty(4, 1), arange[:4], batch)
    x = RNG.normal(size=(num_tokens, config.hidden_size)).astype(np.float32)
    wanted = {number: x.copy() for number in (0, 1, 2)}
    wanted[0][10:19] += vectors[1]
    wanted[1][4:10] += 2 * vectors[0]
    wanted[1][10:19] -= vectors[2]
    for number, states in wanted.items():
        np.testing.assert_allclose(
            jax.jit(change, static_argnums=0)(number, jnp.asarray(x)), states, atol=1e-6
        )


def test_a_step_with_edits_drafts_nothing() -> None:
    from pjengine.call_activation_edits import check_edits
    from pjengine.edits import Edits
    from pjengine.models.shapes import SHAPES
    from pjengine.speculation import _UNSUPPORTED

    activations = check_edits([edit(1, nan_in_prompt)], SHAPES["tiny"])
    assert (np.array(Edits(activations=activations).needs) * _UNSUPPORTED).any()


def take_first(state: Any, token: Any, table: Any) -> Any:
    return state + table[0]


def on_host(state: Any, token: Any) -> Any:
    return jax.pure_callback(np.negative, state, state, vmap_method="sequential")


def on_host_within(state: Any, token: Any) -> Any:
    def body(_: Any, own: Any) -> Any:
        return io_callback(np.negative, own, own)

    return jax.jit(lambda own: jax.lax.fori_loop(0, 2, body, own))(state)


@jax.custom_batching.custom_vmap
def on_host_batched(state: Any, token: Any) -> Any:
    return state


@on_host_batched.def_vmap
def _(size: int, is_batched: Any, state: Any, token: Any) -> Any:
    return jax.pure_callback(np.negative, state, state), True


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "shape": ([edit(1, lambda state, token: state[:5])], ValueError, r"float32\[64\].*got float32\[5\]"),
    "dtype": ([edit(1, lambda state, token: state > 0)], ValueError, r"got bool\[64\]"),
    "nothing": ([edit(1, lambda state, token: None)], ValueError, "got None"),
    "arguments": ([edit(1, add, ONE)], ValueError, r"\[0\] \(add at layer 1\) cannot be traced.*TypeError"),
    "values": (
        [edit(1, add, ONE, 1.0), edit(2, lambda state, token: state if state[0] > 0 else -state)],
        ValueError, r"activation_edits\[1\].*TracerBoolConversionError",
    ),
    "host": (
        [edit(1, on_host)], ValueError,
        r"\(on_host at layer 1\) must not call the host, got pure_callback: .* pass it in args",
    ),
    "host in a loop": ([edit(1, on_host_within)], ValueError, "must not call the host, got io_callback"),
    "host if batched": ([edit(1, on_host_batched)], ValueError, "must not call the host, got pure_callback"),
    "key": ([edit(1, add, jax.random.key(0), 1.0)], TypeError, "got a key of jax.random: pass its seed"),
    "width": ([edit(1, add, ONE[:9], 1.0)], ValueError, "cannot be traced by JAX"),
    "layer": ([edit(4, nan_in_prompt)], ValueError, r"must be within \[-4, 3\] with this model, got 4"),
    "no number": ([edit(1, add, "left", 1.0)], TypeError, "must hold numbers and arrays of them, got 'left'"),
    "large number": ([edit(1, add, ONE, 2**40)], ValueError, "must fit into int32"),
    "large args": (
        [edit(1, take_first, np.zeros((2048, 64)))],
        ValueError, r"the args of activation_edits\[0\] must hold at most 65536 numbers, got 131072: make",
    ),
    "large args together": (
        [edit(1, take_first, np.zeros((1024, 64)))] * 5,
        ValueError, "all activation_edits together must hold at most 262144 numbers, got 327680",
    ),
    "too many": ([edit(1, nan_in_prompt)] * 65, ValueError, "activation_edits must be at most 64"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_edit_that_cannot_be_part_of_a_program_is_refused_at_the_call(llm: Any, name: str) -> None:
    edits, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        llm.engine.add_request(PROMPT, params(activation_edits=edits))
    assert not llm.engine.has_unfinished_requests()


def test_a_refused_edit_leaves_what_runs_as_it_is(llm: Any, batch: dict[str, list[int]]) -> None:
    edits, error, message = REFUSED["values"]
    engine = llm.engine
    running = engine.add_request(PROMPT, params(max_tokens=NUM_TOKENS, activation_edits=CASES["added"]))
    engine.step()
    with pytest.raises(error, match=message):
        engine.add_request(PROMPT, params(activation_edits=edits))
    while engine.has_unfinished_requests():
        engine.step()
    assert running.request.output_token_ids == batch["added"]


def test_what_makes_no_edit_is_refused(unchecked_types: None) -> None:
    from pjengine import ActivationEdit, SamplingParams

    for own, message in (
        ((1.0, add), "layer must be a whole number, got 1.0"),
        ((True, add), "layer must be a whole number, got True"),
        ((1, "add"), "function must take .* got 'add'"),
        ((1, add, ONE), "args must be a list or a tuple"),
    ):
        with pytest.raises(ValueError, match=message):
            ActivationEdit(*own)
    with pytest.raises(ValueError, match="activation_edits must hold ActivationEdit, got <function add"):
        params(activation_edits=[add])
    with pytest.raises(ValueError, match="activation_edits must be None with use_beam_search"):
        SamplingParams(
            use_beam_search=True, best_of=2, temperature=0, activation_edits=[edit(1, add, ONE, 1)]
        )


def test_a_function_without_a_hash_is_refused(llm: Any) -> None:
    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, state: Any, token: Any) -> Any:
            return state

    with pytest.raises(TypeError, match=r"activation_edits\[0\] must have a hashable function"):
        llm.engine.add_request(PROMPT, params(activation_edits=[edit(1, Unhashable())]))
