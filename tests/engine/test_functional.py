"""Prefill and decode as pure functions: they are what the engine computes, in any of JAX's transformations."""

import doctest
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.golden import golden as goldens

ROOM = 64
LENGTHS = (1, 7)  # of the rows behind the golden one


def load(name: str, folder: Path, **settings: Any) -> tuple[Any, Any]:
    from pjengine import functional

    return functional.load(goldens.write_checkpoint(goldens.load(name), folder), **settings)


@pytest.fixture(scope="module")
def gqa(gqa_folder: Path) -> tuple[Any, Any]:
    from pjengine import functional

    return functional.load(gqa_folder, dtype="float32")


def ragged(prompt: list[int]) -> tuple[Any, Any]:
    """The prompt and beginnings of it, padded with what would show if it were read."""
    lengths = [len(prompt), *LENGTHS]
    tokens = np.full((len(lengths), len(prompt)), 9, np.int32)
    for row, length in enumerate(lengths):
        tokens[row, :length] = prompt[:length]
    return jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32)


def greedy(model: Any, num_tokens: int, **settings: Any) -> Callable[..., Any]:
    """A whole program: prompts to their likeliest continuations."""
    from pjengine import functional

    def generate(params: Any, tokens: Any, lengths: Any) -> Any:
        cache = functional.init_cache(model, len(tokens), ROOM)
        logits, cache = functional.prefill(model, params, cache, tokens, lengths, **settings)

        def step(carry: Any, _: None) -> Any:
            logits, cache = carry
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            return functional.decode_step(model, params, cache, token, **settings), token

        return lax.scan(step, (logits, cache), length=num_tokens)[1].T

    return generate


@pytest.mark.parametrize("name", ["gqa", "dynamic_growing", "gpt2", "gemma2", "mixtral_window"])
def test_a_scan_over_ragged_prompts_gives_the_tokens_of_the_dense_model(name: str, tmp_path: Path) -> None:
    golden = goldens.load(name)
    model, params = load(name, tmp_path, dtype="float32")
    tokens, lengths = ragged(golden.prompt)
    num_tokens = min(len(golden.tokens), ROOM - len(golden.prompt))
    found = np.asarray(jax.jit(greedy(model, num_tokens))(params, tokens, lengths))
    assert found[0].tolist() == golden.tokens[:num_tokens]
    if name == "dynamic_growing":  # the dense model rotates by the length of the whole
        return
    forward = jax.jit(model.forward)
    for row, length in enumerate(lengths.tolist()):
        whole = np.concatenate([tokens[row, :length], found[row]])
        whole = np.pad(whole, (0, ROOM - len(whole)))[None]
        likeliest = np.asarray(forward(params, jnp.asarray(whole)))[0].argmax(-1)
        np.testing.assert_array_equal(likeliest[length - 1 : length - 1 + num_tokens], found[row])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_are_those_of_the_engine_whose_parameters_they_share(gqa_folder: Path, dtype: str) -> None:
    from pjengine import LLM, SamplingParams

    golden = goldens.load("gqa")
    tokens, lengths = ragged(golden.prompt)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": ROOM, "warm_up": False}
    with LLM(gqa_folder, dtype=dtype, skip_tokenizer_init=True, decode_steps=1, **sizes) as llm:
        prompts = [golden.prompt[:length] for length in lengths.tolist()]
        wanted = [own.outputs[0].token_ids for own in llm.generate(prompts, params, use_tqdm=False)]
        found = jax.jit(greedy(llm.model, 12))(llm.params, tokens, lengths)
    assert found.tolist() == wanted


def test_vmap_over_prompts_of_one_shape_is_one_batch_of_them(gqa: tuple[Any, Any]) -> None:
    model, params = gqa
    tokens, lengths = ragged(goldens.load("gqa").prompt)
    wanted = jax.jit(greedy(model, 8))(params, tokens, lengths)

    def one(tokens: Any, length: Any) -> Any:
        return greedy(model, 8)(params, tokens[None], length[None])[0]

    mapped = jax.vmap(one)
    np.testing.assert_array_equal(jax.jit(mapped)(tokens, lengths), wanted)
    # Products have all rows at once, and no instance a page table of its own.
    text = str(jax.make_jaxpr(mapped)(tokens, lengths))
    plain = str(jax.make_jaxpr(greedy(model, 8))(params, tokens, lengths))
    assert text.count("dot_general") == plain.count("dot_general")
    twice = jax.jit(jax.vmap(mapped))(jnp.stack([tokens, tokens]), jnp.stack([lengths, lengths[::-1]]))
    np.testing.assert_array_equal(twice[0], wanted)
    np.testing.assert_array_equal(twice[1, 1], wanted[1])


def test_vmap_over_models_gives_each_its_own_tokens(gqa: tuple[Any, Any]) -> None:
    model, params = gqa
    tokens, lengths = ragged(goldens.load("gqa").prompt)
    other = {**params, "final_norm": -params["final_norm"]}
    run = jax.jit(greedy(model, 4))
    both = jax.tree.map(lambda *own: jnp.stack(own), params, other)
    found = jax.jit(jax.vmap(greedy(model, 4), in_axes=(0, None, None)))(both, tokens, lengths)
    assert not np.array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], run(params, tokens, lengths))
    np.testing.assert_array_equal(found[1], run(other, tokens, lengths))


def test_kernels_run_under_vmap(tmp_path: Path) -> None:
    """Those for a GPU, in Pallas's interpreter: a batch of mapped caches is one that they know."""
    model, params = load("gqa", tmp_path, dtype="float32")
    tokens, lengths = ragged(goldens.load("gqa").prompt)
    wanted = jax.jit(greedy(model, 3))(params, tokens, lengths)

    def one(tokens: Any, length: Any) -> Any:
        return greedy(model, 3, backend="triton_interpret")(params, tokens[None], length[None])[0]

    np.testing.assert_array_equal(jax.jit(jax.vmap(one))(tokens, lengths), wanted)


def test_a_prompt_read_in_parts_is_the_prompt_read_at_once(gqa: tuple[Any, Any]) -> None:
    from pjengine import functional

    model, params = gqa
    tokens, lengths = ragged(goldens.load("gqa").prompt)
    prefill = jax.jit(functools.partial(functional.prefill, model))
    wanted, whole = prefill(params, functional.init_cache(model, 3, ROOM), tokens, lengths)
    cache, first = functional.init_cache(model, 3, ROOM), 3
    _, cache = prefill(params, cache, tokens, jnp.minimum(lengths, first))
    rest = jnp.roll(tokens, -first, axis=1)
    logits, cache = prefill(params, cache, rest, jnp.maximum(lengths - first, 0))
    np.testing.assert_array_equal(cache["lengths"], whole["lengths"])
    is_longer = np.asarray(lengths) > first
    np.testing.assert_allclose(logits[is_longer], wanted[is_longer], rtol=1e-4, atol=1e-4)
    assert np.isnan(logits[~is_longer]).all()  # nothing was asked of them
    # A row that begins anew knows nothing of what it was.
    cache["lengths"] = cache["lengths"].at[0].set(0)
    logits, _ = prefill(params, cache, tokens, jnp.where(jnp.arange(3) == 0, lengths, 0))
    np.testing.assert_allclose(logits[0], wanted[0], rtol=1e-4, atol=1e-4)


def test_a_row_without_room_stays_as_it_is_and_says_nan(gqa: tuple[Any, Any]) -> None:
    from pjengine import functional

    model, params = gqa
    cache = functional.init_cache(model, 2, 16)
    prefill = jax.jit(functools.partial(functional.prefill, model))
    decode_step = jax.jit(functools.partial(functional.decode_step, model))
    tokens = jnp.tile(jnp.arange(16, dtype=jnp.int32), (2, 1))
    logits, cache = prefill(params, cache, tokens, jnp.array([16, 15], jnp.int32))
    assert not np.isnan(logits).any()
    before = jax.tree.map(np.asarray, cache)
    logits, cache = decode_step(params, cache, jnp.array([1, 2], jnp.int32))
    assert np.isnan(logits).all(axis=1).tolist() == [True, False]
    assert cache["lengths"].tolist() == [16, 16]
    own = before["page_table"][0] + np.arange(model.config.num_layers) * (
        len(before["k"]) // model.config.num_layers
    )
    np.testing.assert_array_equal(cache["k"][own], before["k"][own])
    for lengths in ([1, -1], [17, 1]):
        logits, after = prefill(params, cache, tokens, jnp.array(lengths, jnp.int32))
        assert np.isnan(logits).all()
        np.testing.assert_array_equal(after["k"], cache["k"])


def test_a_donated_cache_is_updated_in_place(gqa: tuple[Any, Any]) -> None:
    from pjengine import functional

    model, params = gqa
    cache = jax.eval_shape(lambda: functional.init_cache(model, 64, ROOM))
    kv_bytes = cache["k"].size * 4 * 2
    row, many = jax.ShapeDtypeStruct((64,), jnp.int32), jax.ShapeDtypeStruct((64, 1), jnp.int32)
    mapped = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), cache)
    decode_step = functools.partial(functional.decode_step, model)
    for step, cache, tokens, scale in (
        (functools.partial(functional.prefill, model), cache, many, 1),
        (decode_step, cache, row, 1),
        (jax.vmap(decode_step, in_axes=(None, 0, 0)), mapped, jax.ShapeDtypeStruct((2, 64), jnp.int32), 2),
    ):
        compiled = jax.jit(step, donate_argnums=1).lower(params, cache, tokens).compile()
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= scale * kv_bytes
        assert memory.temp_size_in_bytes < kv_bytes / 2


def test_no_program_calls_the_host(gqa: tuple[Any, Any]) -> None:
    model, params = gqa
    tokens, lengths = ragged(goldens.load("gqa").prompt)
    generate = jax.jit(greedy(model, 4))
    lowered = generate.lower(params, tokens, lengths)
    assert not lowered.compile()._executable.unsafe_call.has_host_callbacks  # type: ignore[union-attr]
    assert not jax.make_jaxpr(generate)(params, tokens, lengths).effects
    for text in (str(jax.make_jaxpr(generate)(params, tokens, lengths)), lowered.as_text()):
        assert "dot_general" in text and not any(word in text for word in ("callback", "infeed", "outfeed"))


RUN = """
import sys
import jax, numpy as np
from jax import export

data = np.load(sys.argv[2])
call = export.deserialize(bytearray(open(sys.argv[1], "rb").read())).call
params = {}
for name in data["names"]:
    at = params
    *folders, last = str(name).split("/")
    for folder in folders:
        at = at.setdefault(folder, {})
    at[last] = data[str(name)]
found = jax.jit(call)(params, data["tokens"], data["lengths"])
assert not [name for name in sys.modules if name.startswith("pjengine")]
print(np.asarray(found).tolist())
"""


def test_an_exported_program_runs_where_pjengine_is_not(gqa: tuple[Any, Any], tmp_path: Path) -> None:
    model, params = gqa
    tokens, lengths = ragged(goldens.load("gqa").prompt)
    generate = jax.jit(greedy(model, 8))
    exported = jax.export.export(generate)(params, tokens, lengths)
    (tmp_path / "program").write_bytes(exported.serialize())
    leaves = {
        "/".join(key.key for key in path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(params)
    }
    np.savez(tmp_path / "data.npz", names=list(leaves), tokens=tokens, lengths=lengths, **leaves)
    argv = [sys.executable, "-c", RUN, tmp_path / "program", tmp_path / "data.npz"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str(generate(params, tokens, lengths).tolist()), done.stderr


def test_a_cache_alone_goes_through_export(gqa: tuple[Any, Any]) -> None:
    from pjengine import functional

    model, params = gqa
    cache = functional.init_cache(model, 2, 16)
    step = jax.jit(functools.partial(functional.decode_step, model))
    token = jnp.array([3, 4], jnp.int32)
    back = jax.export.deserialize(jax.export.export(step)(params, cache, token).serialize())
    wanted, found = step(params, cache, token), jax.jit(back.call)(params, cache, token)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_rows_divided_among_devices_give_the_same_tokens(gqa: tuple[Any, Any]) -> None:
    """Under `shard_map` each device keeps its own pages; under `jit` XLA finds a way."""
    from pjengine import functional

    model, params = gqa
    golden = goldens.load("gqa")
    tokens = jnp.asarray([golden.prompt, golden.prompt[::-1]] * 2, jnp.int32)
    lengths = jnp.asarray([len(golden.prompt), 5, 3, 8], jnp.int32)
    generate = greedy(model, 6)
    wanted = jax.jit(generate)(params, tokens, lengths)
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    params = jax.device_put(params, NamedSharding(mesh, whole))
    specs: Any = {"mesh": mesh, "in_specs": (whole, rows, rows), "out_specs": rows, "check_vma": False}
    local = jax.jit(jax.shard_map(generate, **specs)).lower(params, tokens, lengths).compile()
    np.testing.assert_array_equal(local(params, tokens, lengths), wanted)
    assert not any(word in local.as_text() for word in ("all-gather", "all-reduce", "all-to-all", "permute("))

    by_row = NamedSharding(mesh, rows)
    shardings = (NamedSharding(mesh, whole), by_row, by_row)
    found = jax.jit(generate, in_shardings=shardings, out_shardings=by_row)(params, tokens, lengths)
    np.testing.assert_array_equal(found, wanted)
    # A step alone, with a cache whose pages every device has and whose rows are divided.
    cache = functional.init_cache(model, 4, ROOM)
    _, cache = jax.jit(functools.partial(functional.prefill, model))(gqa[1], cache, tokens, lengths)
    placed = {
        name: jax.device_put(array, by_row if array.ndim < 3 else NamedSharding(mesh, whole))
        for name, array in cache.items()
    }
    step = jax.jit(functools.partial(functional.decode_step, model))
    token = jax.device_put(wanted[:, 0], by_row)
    logits, after = step(params, placed, token)
    np.testing.assert_array_equal(np.argmax(logits, axis=-1), wanted[:, 1])
    assert after["lengths"].tolist() == (lengths + 1).tolist()


def test_the_example_of_the_module_runs() -> None:
    from pjengine import functional

    result = doctest.testmod(functional)
    assert result.attempted >= 5 and result.failed == 0


def test_what_cannot_be_is_refused(gqa: tuple[Any, Any]) -> None:
    from pjengine import functional

    model, params = gqa
    cache, two = functional.init_cache(model, 2, 16), jnp.zeros(2, jnp.int32)
    for sizes in ((0, 16), (2, 0), (2, model.config.max_model_len + 1), (2, 16.0)):
        with pytest.raises(ValueError, match="must be a whole number of at least 1"):
            functional.init_cache(model, *sizes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="page_size must be a power of two"):
        functional.init_cache(model, 2, 16, page_size=24)
    with pytest.raises(ValueError, match=r"tokens must be \[2\], for the 2 rows of the cache; got \[3\]"):
        functional.decode_step(model, params, cache, jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match=r"tokens must be \[2, length\]"):
        functional.prefill(model, params, cache, jnp.zeros((2, 0), jnp.int32))
    with pytest.raises(ValueError, match="lengths must be"):
        functional.prefill(model, params, cache, two[:, None], two[:1])
    import dataclasses

    with pytest.raises(ValueError, match="divided among 2 devices"):
        functional.init_cache(dataclasses.replace(model, num_devices=2), 2, 16)
    with pytest.raises(TypeError, match="load takes dtype, .* got 'max_num_seqs', which is of an LLM"):
        functional.load("demo", max_num_seqs=4)
