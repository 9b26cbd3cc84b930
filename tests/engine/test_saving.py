"""Checkpoints that the engine writes: read again they are the same, and none is left half written."""

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from pjengine.models.checkpoint import open_checkpoint
from pjengine.models.checkpoint_writer import write_checkpoint
from tests.golden import golden as goldens

SIZES: dict[str, Any] = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "decode_steps": 1, "warm_up": False}
SIZES |= {"kv_cache_memory_bytes": 2**21}


@pytest.fixture(scope="module")
def llm(gqa_folder: Path) -> Iterator[Any]:
    from pjengine import LLM

    with LLM(gqa_folder, dtype="float32", skip_tokenizer_init=True, **SIZES) as llm:
        yield llm


def greedy(llm: Any, prompt: Any) -> list[int]:
    from pjengine import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=6)
    return llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids


def test_the_packaged_model_comes_back_with_its_tokenizer_and_its_defaults(demo: Any, tmp_path: Path) -> None:
    from pjengine import LLM

    folder = tmp_path / "new" / "saved"
    demo.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
        "tokenizer_config.json",
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["saved"]
    with LLM(folder, max_num_seqs=4, max_num_batched_tokens=64, warm_up=False) as again:
        assert again.model.dtype == jnp.float32
        assert greedy(again, "def f(") == greedy(demo, "def f(")
        assert again.get_default_sampling_params() == demo.get_default_sampling_params()


@pytest.mark.parametrize("max_shard_bytes", [None, 40_000, 1])
def test_any_number_of_files_holds_the_same_tensors(
    llm: Any, tmp_path: Path, max_shard_bytes: int | None
) -> None:
    llm.save_pretrained(tmp_path, **({} if max_shard_bytes is None else {"max_shard_bytes": max_shard_bytes}))
    wanted, found = goldens.load("gqa").weights(), open_checkpoint(tmp_path).tensors
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor, wanted[name])
    files = sorted(tmp_path.glob("*.safetensors"))
    if max_shard_bytes is None:
        assert [file.name for file in files] == ["model.safetensors"]
    else:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in wanted.values())
        assert {file.name for file in files} == set(index["weight_map"].values())
        largest = max(tensor.nbytes for tensor in wanted.values())
        assert len(files) > 3
        assert all(file.stat().st_size < max(largest, max_shard_bytes) + 4096 for file in files)


def test_the_library_reads_what_is_written_bfloat16_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors: dict[str, Any] = {
        "odd": rng.standard_normal((3, 5)).astype(jnp.bfloat16),
        "wide": rng.standard_normal(7).astype(np.float32),
        "scalar": np.array(2.5, np.float16),
        "empty": np.zeros((0, 4), np.float32),
    }
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    write_checkpoint(tmp_path, shapes, lambda name: tensors[name].dtype, tensors.__getitem__)
    found = open_checkpoint(tmp_path).tensors
    with safe_open(tmp_path / "model.safetensors", framework="flax") as file:
        assert file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            for own in (found[name], file.get_tensor(name)):
                assert own.dtype == tensor.dtype
                np.testing.assert_array_equal(np.asarray(own), tensor)


def test_config_says_what_runs(tmp_path: Path) -> None:
    """The overrides and the dtype of this run, and no word of weights that are packed no more."""
    from pjengine import LLM
    from tests.models.test_mxfp4 import make_checkpoints

    _, config = make_checkpoints(tmp_path)
    config["auto_map"] = {"AutoConfig": "configuration_own.OwnConfig"}  # code of the model's own goes with it
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    (tmp_path / "packed" / "configuration_own.py").write_text("class OwnConfig: ...\n")
    overrides = {"max_position_embeddings": 64}
    with LLM(
        tmp_path / "packed", dtype="bfloat16", skip_tokenizer_init=True, hf_overrides=overrides, **SIZES
    ) as llm:
        wanted = llm.params
        llm.save_pretrained(tmp_path / "saved")
        about = json.loads((tmp_path / "saved" / "config.json").read_text())
        assert (tmp_path / "saved" / "configuration_own.py").read_text() == "class OwnConfig: ...\n"
        assert about == {
            **{key: value for key, value in config.items() if key != "quantization_config"},
            **overrides,
            "dtype": "bfloat16",
        }
        with LLM(tmp_path / "saved", skip_tokenizer_init=True, **SIZES) as again:
            assert again.model.dtype == jnp.bfloat16
            jax.tree.map(np.testing.assert_array_equal, again.params, wanted)


def test_devices_that_compute_together_write_what_one_does(gqa_folder: Path, tmp_path: Path) -> None:
    from pjengine import LLM

    settings: dict[str, Any] = {"tensor_parallel_size": 4, "dtype": "float32", "skip_tokenizer_init": True}
    with LLM(gqa_folder, **settings, **SIZES) as llm:
        assert llm.params["layers"]["qkv"].shape[2] == 4  # two KV heads, each repeated
        llm.save_pretrained(tmp_path)
    for name, tensor in open_checkpoint(tmp_path).tensors.items():
        np.testing.assert_array_equal(tensor, goldens.load("gqa").weights()[name])


def test_nothing_is_overwritten(llm: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="wanted a new or an empty folder"):
        llm.save_pretrained(tmp_path)
    with pytest.raises(FileExistsError, match=r"notes\.txt: wanted a new or an empty folder"):
        llm.save_pretrained(tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match="max_shard_bytes must be at least 1, got 0"):
        llm.save_pretrained(tmp_path / "other", max_shard_bytes=0)


def test_weights_that_are_gone_are_named(llm: Any, tmp_path: Path) -> None:
    broken = {**llm.params, "head": llm.params["head"] + 0}
    broken["head"].delete()
    before = llm.params
    llm.engine.runner.params = broken
    try:
        with pytest.raises(ValueError, match=r"1 deleted:\s+head"):
            llm.save_pretrained(tmp_path / "saved")
    finally:
        llm.engine.runner.params = before
    assert not any(tmp_path.iterdir())


def test_a_failure_half_way_leaves_no_folder(
    llm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pjengine.models.hf_names import HFTensors

    read, names = HFTensors.read, []

    def read_two(self: HFTensors, name: str) -> np.ndarray:
        names.append(name)
        if len(names) == 3:
            assert [path.suffix for path in tmp_path.glob(".saved.partial-*/*")] == [".safetensors"]
            raise OSError("No space left on device")
        return read(self, name)

    monkeypatch.setattr(HFTensors, "read", read_two)
    with pytest.raises(OSError, match="No space left"):
        llm.save_pretrained(tmp_path / "saved")
    assert not any(tmp_path.iterdir())


def test_a_named_shape_and_a_changed_config_are_refused(gqa_folder: Path, tmp_path: Path) -> None:
    from pjengine import LLM

    settings: dict[str, Any] = {"skip_tokenizer_init": True, **SIZES}
    with LLM("tiny", load_format="dummy", **settings) as llm:
        with pytest.raises(ValueError, match=r"'tiny' is a named shape and has no config\.json"):
            llm.save_pretrained(tmp_path / "saved")
    golden = goldens.load("gqa")
    folder = goldens.write_checkpoint(golden, tmp_path / "source")
    with LLM(folder, **settings) as llm:
        (folder / "config.json").write_text(json.dumps({**golden.config, "rms_norm_eps": 0.5}))
        with pytest.raises(ValueError, match="has changed since the model was loaded"):
            llm.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_the_host_holds_a_part_of_the_checkpoint_at_a_time(tmp_path: Path) -> None:
    from pjengine.models.hf_names import HFTensors
    from pjengine.models.registry import build_model, parse_config

    config = {**goldens.load("gqa").config, "num_hidden_layers": 12, "hidden_size": 256}
    model = build_model(parse_config(config), jnp.dtype("float32"))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    tensors = HFTensors(model, params)
    tracemalloc.start()
    try:
        write_checkpoint(tmp_path, tensors.shapes, tensors.dtype, tensors.read)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < total / 4
