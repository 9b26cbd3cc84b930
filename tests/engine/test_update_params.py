"""Weights of a running engine: swapped without a copy or a compilation, or refused and left as they were."""

import asyncio
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.golden import golden as goldens

SIZES: dict[str, Any] = {
    "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
    "decode_steps": 1,
    "dtype": "float32",
}
SIZES |= {"skip_tokenizer_init": True, "kv_cache_memory_bytes": 2**21, "warm_up": False}
GOLDEN = goldens.load("gqa")
PROMPT = GOLDEN.prompt


@pytest.fixture(scope="module")
def llm(gqa_folder: Path) -> Iterator[Any]:
    from pjengine import LLM

    with LLM(gqa_folder, **SIZES) as llm:
        yield llm


@pytest.fixture
def loaded(llm: Any) -> Iterator[Any]:
    """The weights of the checkpoint, in force before and after."""
    llm.update_params(weights(llm, GOLDEN.seed))
    yield llm.params
    llm.update_params(weights(llm, GOLDEN.seed))


@cache
def on_host(seed: int) -> Any:
    from pjengine import from_hf
    from pjengine.models.registry import build_model, parse_config

    model = build_model(parse_config(GOLDEN.config), jnp.dtype("float32"))
    return jax.device_get(from_hf(model, goldens.make_weights(GOLDEN.shapes, seed)))


def weights(llm: Any, seed: int = 99) -> Any:
    """New arrays, on the devices of `llm`; the checkpoint's, or such that give other tokens."""
    return jax.device_put(on_host(seed), jax.tree.map(lambda leaf: leaf.sharding, llm.params))


def greedy(llm: Any, prompt: list[int], max_tokens: int = 8) -> list[int]:
    from pjengine import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids


def likeliest(model: Any, params: Any, tokens: list[int], start: int) -> list[int]:
    """After each position from `start` on, by the dense forward pass: greedy tokens, where `tokens` are."""
    logits = jax.jit(model.forward)(params, jnp.asarray([tokens], jnp.int32))[0]
    return np.asarray(logits.argmax(-1))[start - 1 : -1].tolist()


def live_bytes() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


def make_trainer(model: Any) -> tuple[Any, Any]:
    optimizer = optax.sgd(0.02)

    @partial(jax.jit, donate_argnums=(0, 1))
    def train(params: Any, state: Any, tokens: Any) -> tuple[Any, Any]:
        def loss(params: Any) -> Any:
            logprobs = jax.nn.log_softmax(model.forward(params, tokens)[:, :-1])
            return -jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return train, optimizer.init


def test_a_hundred_rounds_of_training_grow_nothing_and_compile_nothing(
    gqa_folder: Path, tmp_path: Path
) -> None:
    """One set of weights in memory: the trainer donates what the engine holds, and hands back its own."""
    from pjengine import LLM

    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    tokens = jnp.asarray([PROMPT[:16]], jnp.int32)
    found: dict[int, list[int]] = {}
    try:
        with LLM(gqa_folder, **SIZES) as llm:
            train, init = make_trainer(llm.model)
            params, runner = llm.params, llm.engine.runner
            runner.wait_until_warm()
            state = init(params)
            for number in range(100):
                params, state = train(params, state, tokens)
                llm.update_params(params)
                assert llm.params["layers"]["qkv"] is params["layers"]["qkv"]
                answer = greedy(llm, PROMPT[:20], 6)
                if number in (3, 99):
                    found[number] = answer
                    llm.save_pretrained(tmp_path / str(number))
                if number == 3:
                    before, num_compiled, programs = live_bytes(), len(compiled), set(runner.programs)
            assert live_bytes() == before
            assert len(compiled) == num_compiled > 0
            assert set(runner.programs) == programs and runner.recompiles_after_warmup == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert found[3] != found[99]
    for number, answer in found.items():
        with LLM(tmp_path / str(number), **SIZES) as fresh:
            assert greedy(fresh, PROMPT[:20], 6) == answer


def test_new_weights_are_in_force_and_the_prefix_cache_is_forgotten(llm: Any, loaded: Any) -> None:
    assert greedy(llm, PROMPT) == GOLDEN.tokens[:8]
    new = weights(llm)
    llm.update_params(new)
    found = greedy(llm, PROMPT)
    assert found != GOLDEN.tokens[:8]
    assert found == likeliest(llm.model, new, PROMPT + found, len(PROMPT))


def test_requests_under_way_go_on_and_share_nothing_of_both_weights(llm: Any, loaded: Any) -> None:
    from pjengine import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    generation = llm.engine.add_request(PROMPT, params)
    while generation.num_output_tokens < 5:
        llm.engine.advance()
    new = weights(llm)
    llm.update_params(new)
    while llm.engine.has_unfinished_requests():
        llm.engine.advance()
    mixed = generation.output().outputs[0].token_ids
    assert len(mixed) == 40 and mixed[:5] == GOLDEN.tokens[:5] and mixed != GOLDEN.tokens[:40]
    longer = PROMPT + mixed
    greedy(llm, longer[:50], 1)  # its pages are the new weights'; what follows them in `longer` is of both
    [output] = llm.generate([longer], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    assert output.num_cached_tokens == 48
    found = output.outputs[0].token_ids
    assert found == likeliest(llm.model, new, longer + found, len(longer))
    llm.engine.scheduler.check_integrity()


def changed(params: Any, **layers: Any) -> Any:
    return {**params, "layers": {**params["layers"], **layers}}


def elsewhere(x: Any) -> Any:
    return jax.device_put(x, jax.devices()[1])


def divided(x: Any) -> Any:
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("x",))
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec("x")))


def column_major(x: Any) -> Any:
    return jax.device_put(x, Format(Layout((1, 0)), x.sharding))


def deleted(x: Any) -> Any:
    x = x + 0
    x.delete()
    return x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: changed(p, extra=p["embed"]), r"wanted 9 arrays, got 10\n1 unexpected:\n  layers/extra$"),
        (lambda p: {k: v for k, v in p.items() if k != "head"}, r"1 missing:\n  head float32\[160, 64\]$"),
        (lambda p: {"params": p}, r"9 missing:.*\n9 unexpected:\n  params/embed"),
        (lambda p: changed(p, qkv=p["layers"]["qkv"][:2]), r"layers/qkv: wanted \(3, .*, got \(2, "),
        (lambda p: {**p, "head": p["head"].astype(jnp.bfloat16)}, "head: wanted float32, got bfloat16"),
        (lambda p: {**p, "head": np.asarray(p["head"])}, r"device_put makes one\):\n  head: got a ndarray"),
        (lambda p: {**p, "head": None}, r"1 missing:\n  head"),
        (lambda p: {**p, "layers/qkv": p["head"]}, "two leaves of the tree are called 'layers/qkv'"),
        (lambda p: {**p, "head": 3}, r"head: wanted \(160, 64\), got 3"),
        (lambda p: {**p, "head": elsewhere(p["head"])}, "head: wanted .* on cpu:0 .*, got on cpu:1 "),
        (
            lambda p: {**p, "head": divided(p["head"])},
            r"head: .* got P\('x',\) on cpu:0, cpu:1",
        ),
        (lambda p: {**p, "head": column_major(p["head"])}, r"1 not row-major .*\n  head: .*\(1, 0\)"),
        (lambda p: {**p, "head": deleted(p["head"])}, r"1 deleted:\n  head$"),
    ],
)
def test_another_tree_is_refused_with_the_differences(
    llm: Any, loaded: Any, change: Any, message: str
) -> None:
    before = jax.tree.leaves(loaded)
    with pytest.raises(ValueError, match="(?s)" + message):
        llm.update_params(change(loaded))
    assert all(one is other for one, other in zip(jax.tree.leaves(llm.params), before, strict=True))


def test_a_call_from_inside_a_traced_function_is_refused(llm: Any, loaded: Any) -> None:
    with pytest.raises(ValueError, match=r"9 no jax\.Array .*\n  embed: got a .*Tracer"):
        jax.jit(lambda params: llm.update_params(params))(loaded)


def test_the_old_weights_stay_in_force_after_a_refusal(llm: Any, loaded: Any) -> None:
    with pytest.raises(ValueError, match="unexpected"):
        llm.update_params({**weights(llm), "extra": jnp.zeros(2)})
    assert greedy(llm, PROMPT) == GOLDEN.tokens[:8]


def test_a_long_list_of_differences_is_cut(llm: Any) -> None:
    with pytest.raises(ValueError) as raised:
        llm.update_params({f"leaf_{number}": jnp.zeros(1) for number in range(1000)})
    assert "1000 unexpected" in str(raised.value) and "and 988 more" in str(raised.value)
    assert len(str(raised.value)) < 3000


def test_another_kind_of_container_with_the_same_paths_is_taken(llm: Any, loaded: Any) -> None:
    from flax.core import FrozenDict

    llm.update_params(FrozenDict(weights(llm)))
    assert type(llm.params) is dict
    assert greedy(llm, PROMPT) != GOLDEN.tokens[:8]


def test_weights_that_were_donated_elsewhere_are_named_and_others_mend_it(llm: Any, loaded: Any) -> None:
    whole = jax.tree.map(jnp.copy, loaded)
    step = jax.jit(lambda params: jax.tree.map(lambda x: x * np.float32(2), params), donate_argnums=0)
    step(loaded)
    with pytest.raises(RuntimeError, match=r"parameters were deleted \(embed and 8 more\).* update_params"):
        greedy(llm, PROMPT)
    assert not llm.engine.has_unfinished_requests() and not llm.engine.is_broken
    llm.update_params(whole)
    assert greedy(llm, PROMPT) == GOLDEN.tokens[:8]


def test_the_engine_deletes_what_is_its_own_and_nothing_else(gqa_folder: Path) -> None:
    from pjengine import LLM

    llm = LLM(gqa_folder, **SIZES)
    first = llm.params
    given, donated = weights(llm, 1), weights(llm, 2)
    llm.update_params(donated, donate=True)
    assert not first["embed"].is_deleted()
    greedy(llm, PROMPT[:3], 1)
    last = {**given, "embed": donated["embed"]}  # one leaf stays
    llm.update_params(last)
    assert donated["head"].is_deleted() and not donated["embed"].is_deleted()
    again = weights(llm, 3)
    llm.update_params(again, donate=True)
    llm.close()
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(again))
    for tree in (first, given, last):
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
def test_beside_a_draft_model_the_models_own_weights_are_swapped(gqa_folder: Path) -> None:
    from pjengine import LLM

    wanted = {"method": "draft_model", "model": str(gqa_folder), "num_speculative_tokens": 2}
    with LLM(gqa_folder, speculative_config=wanted, **SIZES) as llm:
        draft, new = llm.engine.runner.params["draft"], weights(llm)
        llm.update_params(new)
        found = greedy(llm, PROMPT)
        assert found == likeliest(llm.model, new, PROMPT + found, len(PROMPT))
        assert llm.engine.runner.params["draft"] is draft
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(draft))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def test_devices_that_compute_together_take_a_tree_of_their_mesh(gqa_folder: Path) -> None:
    from pjengine import LLM, from_hf, to_hf

    tensors = goldens.make_weights(GOLDEN.shapes, 99)
    with LLM(gqa_folder, tensor_parallel_size=4, **SIZES) as llm:
        mesh = llm.params["embed"].sharding.mesh
        new = from_hf(llm.model, tensors, mesh=mesh)
        llm.update_params(jax.jit(lambda tree: jax.tree.map(lambda x: x + np.float32(0), tree))(new))
        found = greedy(llm, PROMPT)
        for name, tensor in to_hf(llm.model, llm.params).items():
            np.testing.assert_array_equal(tensor, tensors[name])
        whole = jax.device_put(new["layers"]["qkv"], NamedSharding(mesh, PartitionSpec()))
        with pytest.raises(ValueError, match="1 of another sharding:\n  layers/qkv: wanted P"):
            llm.update_params(changed(new, qkv=whole))
    assert found != GOLDEN.tokens[:8]


def test_engines_beside_each_other_all_get_them(gqa_folder: Path) -> None:
    from pjengine import LLM

    with LLM(gqa_folder, data_parallel_size=2, **SIZES) as llm:
        new = weights(llm)
        for tree in (weights(llm, 5), new):
            llm.update_params(tree)
        outputs = [greedy(llm, PROMPT) for _ in range(2)]
        first, second = (own.runner.params["embed"] for own in llm.engine.engines)
        assert first is new["embed"] and second.devices() == {jax.devices()[1]}
        np.testing.assert_array_equal(first, second)
        assert outputs[0] == outputs[1] == likeliest(llm.model, new, PROMPT + outputs[0], len(PROMPT))
        with pytest.raises(ValueError, match="unexpected"):
            llm.update_params({**new, "extra": new["embed"]})
    assert second.is_deleted() and not first.is_deleted()


def test_asynchronous_requests_go_on_with_new_weights(gqa_folder: Path) -> None:
    from pjengine import AsyncLLM, SamplingParams

    async def run() -> tuple[list[int], list[int]]:
        async with AsyncLLM(gqa_folder, **SIZES) as llm:
            ends = []
            for seed in (None, 99):
                if seed is not None:
                    await llm.update_params(jax.tree.map(jnp.asarray, on_host(seed)))
                params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
                async for output in llm.generate(PROMPT, params):
                    last = output
                ends.append(last.outputs[0].token_ids)
            with pytest.raises(ValueError, match="missing"):
                await llm.update_params({})
        return ends[0], ends[1]

    before, after = asyncio.run(run())
    assert before == GOLDEN.tokens[:8] != after
