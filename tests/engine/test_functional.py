"""Prefill and decode as pure functions: what the engine computes, under any of JAX's transformations."""

import dataclasses
import doctest
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.golden import golden as goldens

ROOM = 64
LENGTHS = (1, 7, 4)  # of the rows behind the golden one
GOLDEN = goldens.load("gqa")


class Programs(NamedTuple):
    """What several tests run, compiled once for the rows of `ragged`."""

    model: Any
    params: Any
    prefill: Any
    decode_step: Any
    greedy: Any  # for 8 tokens


@pytest.fixture(scope="module")
def gqa(gqa_folder: Path) -> Programs:
    from pjengine import functional

    model, params = functional.load(gqa_folder, dtype="float32")
    prefill, decode_step = (
        jax.jit(functools.partial(own, model)) for own in (functional.prefill, functional.decode_step)
    )
    return Programs(model, params, prefill, decode_step, jax.jit(greedy(model, 8)))


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


@pytest.mark.parametrize(
    "name",
    [
        *("dynamic_growing", "gemma2"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gqa", "gpt2", "mixtral_window")),
    ],
)
def test_a_scan_over_ragged_prompts_gives_the_tokens_of_the_dense_model(name: str, tmp_path: Path) -> None:
    from pjengine import functional

    golden = goldens.load(name)
    model, params = functional.load(goldens.write_checkpoint(golden, tmp_path), dtype="float32")
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


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_tokens_are_those_of_the_engine_whose_parameters_they_share(
    gqa: Programs, gqa_folder: Path, dtype: str
) -> None:
    from pjengine import LLM, SamplingParams

    tokens, lengths = ragged(GOLDEN.prompt)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": ROOM, "warm_up": False}
    with LLM(gqa_folder, dtype=dtype, skip_tokenizer_init=True, decode_steps=1, **sizes) as llm:
        prompts = [GOLDEN.prompt[:length] for length in lengths.tolist()]
        wanted = [own.outputs[0].token_ids for own in llm.generate(prompts, params, use_tqdm=False)]
        run = gqa.greedy if llm.model == gqa.model else jax.jit(greedy(llm.model, 8))
        found = run(llm.params, tokens, lengths)
    assert found.tolist() == wanted
    assert dtype != "float32" or wanted[0] == GOLDEN.tokens[:8]


def test_vmap_over_prompts_of_one_shape_is_one_batch_of_them(gqa: Programs) -> None:
    tokens, lengths = ragged(GOLDEN.prompt)

    def one(tokens: Any, length: Any) -> Any:
        return greedy(gqa.model, 8)(gqa.params, tokens[None], length[None])[0]

    mapped = jax.vmap(one)
    # Each product once, for all rows.
    counts = [
        str(jaxpr).count("dot_general")
        for jaxpr in (
            jax.make_jaxpr(mapped)(tokens, lengths),
            jax.make_jaxpr(gqa.greedy)(gqa.params, tokens, lengths),
        )
    ]
    assert counts[0] == counts[1] > 0
    # Two maps, one in the other: the rows as they are, and turned round.
    found = jax.jit(jax.vmap(mapped))(*(jnp.stack([own, own[::-1]]) for own in (tokens, lengths)))
    wanted = gqa.greedy(gqa.params, tokens, lengths)
    np.testing.assert_array_equal(found, jnp.stack([wanted, wanted[::-1]]))


@pytest.mark.slow  # compiles a program of its own
def test_vmap_over_models_gives_each_its_own_tokens(gqa: Programs) -> None:
    inputs = ragged(GOLDEN.prompt)
    other = {**gqa.params, "final_norm": -gqa.params["final_norm"]}
    both = jax.tree.map(lambda *own: jnp.stack(own), gqa.params, other)
    found = jax.jit(jax.vmap(greedy(gqa.model, 8), in_axes=(0, None, None)))(both, *inputs)
    assert not np.array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], gqa.greedy(gqa.params, *inputs))
    np.testing.assert_array_equal(found[1], gqa.greedy(other, *inputs))


@pytest.mark.slow  # interpreted
def test_kernels_run_under_vmap(gqa: Programs) -> None:
    """Those for a GPU, in Pallas's interpreter: a batch of mapped caches is one that they know."""
    tokens, lengths = ragged(GOLDEN.prompt)

    def one(tokens: Any, length: Any) -> Any:
        return greedy(gqa.model, 3, backend="triton_interpret")(gqa.params, tokens[None], length[None])[0]

    found = jax.jit(jax.vmap(one))(tokens, lengths)
    np.testing.assert_array_equal(found, gqa.greedy(gqa.params, tokens, lengths)[:, :3])


def test_a_prompt_read_in_parts_is_the_prompt_read_at_once(gqa: Programs) -> None:
    from pjengine import functional

    tokens, lengths = ragged(GOLDEN.prompt)
    prefill = functools.partial(gqa.prefill, gqa.params)
    cache, first = functional.init_cache(gqa.model, 4, ROOM), 4
    wanted, whole = prefill(cache, tokens, lengths)
    _, cache = prefill(cache, tokens, jnp.minimum(lengths, first))
    logits, cache = prefill(cache, jnp.roll(tokens, -first, axis=1), jnp.maximum(lengths - first, 0))
    np.testing.assert_array_equal(cache["lengths"], whole["lengths"])
    is_longer = np.asarray(lengths) > first
    assert is_longer.tolist() == [True, False, True, False]
    np.testing.assert_allclose(logits[is_longer], wanted[is_longer], rtol=1e-4, atol=1e-4)
    assert np.isnan(logits[~is_longer]).all()  # nothing was asked of them
    # A row that begins anew knows nothing of what it was.
    cache["lengths"] = cache["lengths"].at[0].set(0)
    logits, _ = prefill(cache, tokens, jnp.where(jnp.arange(4) == 0, lengths, 0))
    np.testing.assert_allclose(logits[0], wanted[0], rtol=1e-4, atol=1e-4)


def test_a_row_without_room_stays_as_it_is_and_says_nan(gqa: Programs) -> None:
    from pjengine import functional

    cache = functional.init_cache(gqa.model, 4, 64)
    tokens, _ = ragged(GOLDEN.prompt)
    width = tokens.shape[1]
    _, cache = gqa.prefill(gqa.params, cache, tokens, jnp.array([width, width - 1, 1, 1], jnp.int32))
    cache["lengths"] = cache["lengths"] + (64 - width)  # whatever may be in between
    logits, after = gqa.decode_step(gqa.params, cache, jnp.arange(4, dtype=jnp.int32))
    assert np.isnan(logits).any(axis=1).tolist() == [True, False, False, False]
    assert (after["lengths"] - cache["lengths"]).tolist() == [0, 1, 1, 1]
    num_pages = len(cache["k"]) // gqa.model.config.num_layers
    own = [page + layer * num_pages for page in cache["page_table"][0] for layer in range(3)]
    np.testing.assert_array_equal(after["k"][np.array(own)], cache["k"][np.array(own)])
    lengths = jnp.array([1, 2, width + 1, -1], jnp.int32)  # of rows that have 64, 63, 65 - width and as much
    logits, after = gqa.prefill(gqa.params, cache, tokens, lengths)
    assert np.isnan(logits).all()
    np.testing.assert_array_equal(after["k"], cache["k"])
    assert after["lengths"].tolist() == cache["lengths"].tolist()


def test_a_row_with_a_token_that_is_not_in_the_vocabulary_stays_as_it_is_and_says_nan(gqa: Programs) -> None:
    from pjengine import functional

    size = gqa.model.config.vocab_size
    cache = functional.init_cache(gqa.model, 4, 64)
    tokens, lengths = ragged(GOLDEN.prompt)
    bad = tokens.at[0, 0].set(size).at[1, 0].set(-1)
    logits, after = gqa.prefill(gqa.params, cache, bad, lengths)
    assert np.isnan(logits).all(axis=1).tolist() == [True, True, False, False]
    assert after["lengths"].tolist() == [0, 0, *lengths[2:].tolist()]
    step = jnp.array([1, size, 1, -1], jnp.int32)
    logits, after = gqa.decode_step(gqa.params, after, step)
    assert np.isnan(logits).all(axis=1).tolist() == [False, True, False, True]
    assert after["lengths"].tolist() == [1, 0, 8, 4]


def test_a_donated_cache_is_updated_in_place(gqa: Programs) -> None:
    from pjengine import functional

    model, params = gqa.model, gqa.params
    pool = jax.ShapeDtypeStruct((3 * 20000, 2, 16, 8), jnp.float32)  # more than any step needs beside it
    kv_bytes = 2 * pool.size * 4
    cache = {**jax.eval_shape(lambda: functional.init_cache(model, 4, ROOM)), "k": pool, "v": pool}

    def mapped(array: Any) -> Any:
        return jax.ShapeDtypeStruct((2, *array.shape), array.dtype)

    decode_step = functools.partial(functional.decode_step, model)
    token, tokens = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((4,), (4, 8)))
    of_all = jax.vmap(decode_step, in_axes=(None, 0, 0))
    for step, own, inputs, scale in (
        (functools.partial(functional.prefill, model), cache, tokens, 1),
        (decode_step, cache, token, 1),
        (of_all, jax.tree.map(mapped, cache), mapped(token), 2),
    ):
        memory = jax.jit(step, donate_argnums=1).lower(params, own, inputs).compile().memory_analysis()
        assert memory is not None and memory.alias_size_in_bytes >= scale * kv_bytes
        assert memory.temp_size_in_bytes < kv_bytes / 20


def test_no_program_calls_the_host(gqa: Programs) -> None:
    inputs = (gqa.params, *ragged(GOLDEN.prompt))
    jaxpr = jax.make_jaxpr(gqa.greedy)(*inputs)
    assert not jaxpr.effects
    for text in (str(jaxpr), gqa.greedy.lower(*inputs).as_text()):
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


def test_an_exported_program_runs_where_pjengine_is_not(gqa: Programs, tmp_path: Path) -> None:
    tokens, lengths = ragged(GOLDEN.prompt)
    exported = jax.export.export(gqa.greedy)(gqa.params, tokens, lengths)
    (tmp_path / "program").write_bytes(exported.serialize())
    leaves = {
        "/".join(key.key for key in path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(gqa.params)
    }
    np.savez(
        tmp_path / "data.npz",
        allow_pickle=False,
        **leaves,
        names=list(leaves),
        tokens=tokens,
        lengths=lengths,
    )
    argv = [sys.executable, "-c", RUN, str(tmp_path / "program"), str(tmp_path / "data.npz")]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str(gqa.greedy(gqa.params, tokens, lengths).tolist()), done.stderr


def test_a_step_alone_goes_through_export_with_its_cache(gqa: Programs) -> None:
    from pjengine import functional

    inputs = (gqa.params, functional.init_cache(gqa.model, 4, ROOM), jnp.arange(4, dtype=jnp.int32))
    back = jax.export.deserialize(jax.export.export(gqa.decode_step)(*inputs).serialize())
    jax.tree.map(np.testing.assert_array_equal, jax.jit(back.call)(*inputs), gqa.decode_step(*inputs))


def test_rows_divided_among_devices_give_the_same_tokens(gqa: Programs) -> None:
    """Under `shard_map` each device keeps its own pages; under `jit` XLA finds a way."""
    from pjengine import functional

    tokens, lengths = ragged(GOLDEN.prompt)
    wanted = gqa.greedy(gqa.params, tokens, lengths)
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    params = jax.device_put(gqa.params, NamedSharding(mesh, whole))
    specs: Any = {"mesh": mesh, "in_specs": (whole, rows, rows), "out_specs": rows, "check_vma": False}
    local = jax.jit(jax.shard_map(greedy(gqa.model, 8), **specs)).lower(params, tokens, lengths).compile()
    found = local(params, *jax.device_put((tokens, lengths), NamedSharding(mesh, rows)))
    np.testing.assert_array_equal(found, wanted)
    text = local.as_text()
    assert text and not any(word in text for word in ("all-gather", "all-reduce", "all-to-all", "permute("))

    # A step alone under jit: rows are divided, and every device has all pages.
    _, cache = gqa.prefill(gqa.params, functional.init_cache(gqa.model, 4, ROOM), tokens, lengths)
    logits, after = gqa.decode_step(gqa.params, cache, wanted[:, 0])
    by_row = NamedSharding(mesh, rows)
    placed = {
        name: jax.device_put(array, by_row if array.ndim < 3 else NamedSharding(mesh, whole))
        for name, array in cache.items()
    }
    found_logits, found = gqa.decode_step(params, placed, jax.device_put(wanted[:, 0], by_row))
    np.testing.assert_allclose(found_logits, logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found["lengths"], after["lengths"])
    np.testing.assert_allclose(found["k"], after["k"], rtol=1e-5, atol=1e-5)


def test_the_example_of_the_module_runs() -> None:
    from pjengine import functional

    result = doctest.testmod(functional)
    assert result.attempted >= 5 and result.failed == 0


def test_what_cannot_be_is_refused(gqa: Programs, unchecked_types: None) -> None:
    from pjengine import functional

    model, params = gqa.model, gqa.params
    cache, two = functional.init_cache(model, 2, 16), jnp.zeros(2, jnp.int32)
    for sizes in ((0, 16), (2, 0), (2, model.config.max_model_len + 1)):
        with pytest.raises(ValueError, match="must be a whole number of at least 1"):
            functional.init_cache(model, *sizes)
    with pytest.raises(ValueError, match="page_size must be a power of two"):
        functional.init_cache(model, 2, 16, page_size=24)
    with pytest.raises(ValueError, match=r"tokens must be \[2\], for the 2 rows of the cache; got \[3\]"):
        functional.decode_step(model, params, cache, jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match=r"tokens must be \[2, length\]"):
        functional.prefill(model, params, cache, jnp.zeros((2, 0), jnp.int32))
    with pytest.raises(ValueError, match="lengths must be"):
        functional.prefill(model, params, cache, two[:, None], two[:1])
    with pytest.raises(ValueError, match="divided among 2 devices"):
        functional.init_cache(dataclasses.replace(model, num_devices=2), 2, 16)
    with pytest.raises(TypeError, match=r"load takes dtype, .* got 'max_num_seqs', which is of an LLM"):
        functional.load("demo", max_num_seqs=4)
