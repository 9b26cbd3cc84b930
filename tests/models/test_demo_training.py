"""The demo model's training, in miniature: same functions, a model of 60 thousand parameters."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

SOURCES = ("json", "logging", "unittest")  # packages of the standard library, some 60 files


def tiny_config(vocab_size: int, context: int) -> Any:
    from pjengine.models.demo.train import demo_config
    from pjengine.models.rope import RopeConfig

    shape = demo_config(vocab_size, context)
    return replace(
        shape,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rope=RopeConfig(kind="default", theta=10000.0, rotary_dim=16),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder that holds `data` and `model`, and the training log."""
    from pjengine.models.demo.corpus import prepare, stdlib_folder
    from pjengine.models.demo.train import TrainConfig, run_training

    folder = tmp_path_factory.mktemp("demo")
    prepare([stdlib_folder() / name for name in SOURCES], folder / "data", vocab_size=512)
    config = TrainConfig(
        steps=40,
        batch_size=8,
        context=64,
        peak_lr=1e-2,
        warmup_steps=10,
        weight_decays=(0.1,),
        steps_per_call=10,
    )
    return folder, run_training(folder / "data", folder / "model", config, tiny_config)


def test_training_lowers_the_held_out_loss(trained: tuple[Path, dict[str, Any]]) -> None:
    _, log = trained
    assert log["result"]["steps"] == 40
    assert log["result"]["held_out_loss"] < math.log(512) - 1.0
    assert log["result"]["perplexity"] == pytest.approx(math.exp(log["result"]["held_out_loss"]))


def test_checkpoint_is_a_hugging_face_llama(trained: tuple[Path, dict[str, Any]]) -> None:
    from pjengine.models.registry import parse_config

    folder, _ = trained
    config = parse_config(json.loads((folder / "model/config.json").read_text()))
    weights = load_file(folder / "model/model.safetensors")
    expected = {"model.embed_tokens.weight": (512, 64), "model.norm.weight": (64,)}
    for layer in range(2):
        name = f"model.layers.{layer}"
        expected |= {
            f"{name}.input_layernorm.weight": (64,),
            f"{name}.post_attention_layernorm.weight": (64,),
            f"{name}.self_attn.q_proj.weight": (64, 64),
            f"{name}.self_attn.k_proj.weight": (32, 64),
            f"{name}.self_attn.v_proj.weight": (32, 64),
            f"{name}.self_attn.o_proj.weight": (64, 64),
            f"{name}.mlp.gate_proj.weight": (96, 64),
            f"{name}.mlp.up_proj.weight": (96, 64),
            f"{name}.mlp.down_proj.weight": (64, 96),
        }
    assert {name: tensor.shape for name, tensor in weights.items()} == expected
    assert {str(tensor.dtype) for tensor in weights.values()} == {"bfloat16"}
    assert (config.num_layers, config.head_dim, config.eos_token_ids) == (2, 16, (0,))


def test_export_inverts_the_weight_table() -> None:
    import jax
    import jax.numpy as jnp

    from pjengine.models.demo.checkpoint import hf_weights
    from pjengine.models.llama import Llama

    model = Llama(tiny_config(256, 64), jnp.dtype(jnp.bfloat16))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype), shapes)
    weights = hf_weights(params, model.config)
    for path, leaf in model.weight_table().leaves.items():
        layers = range(model.config.num_layers) if path.startswith("layers/") else (0,)
        stack = []
        for layer in layers:
            parts = []
            for source in leaf.sources:
                tensor = weights.pop(source.name.format(layer=layer))
                tensor = tensor if source.reshape is None else tensor.reshape(source.reshape)
                parts.append(tensor if source.transpose is None else tensor.transpose(source.transpose))
            stack.append(np.concatenate(parts, axis=leaf.concat_axis))
        got = np.stack(stack) if path.startswith("layers/") else stack[0]
        wanted = (
            params["layers"][path.removeprefix("layers/")] if path.startswith("layers/") else params[path]
        )
        np.testing.assert_array_equal(got.astype(np.float32), np.asarray(wanted).astype(np.float32), path)
    assert not weights


def test_tokenizer_gives_python_back_exactly(trained: tuple[Path, dict[str, Any]]) -> None:
    from transformers import AutoTokenizer

    folder, _ = trained
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer.is_fast and tokenizer.eos_token_id == 0
    for text in (
        "def f(x):\n    return x\n",
        "\tif a :\n\t\tb , c = 'é漢🙂' # don ' t\r\n\n\n  ",
        " leading",
        Path(json.__file__).read_text(),
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_model_card_holds_the_numbers(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, log = trained
    card = (folder / "model/README.md").read_text()
    assert f"{log['result']['perplexity']:.3f}" in card
    assert "Python Software Foundation" in card
    assert len(list((folder / "model").iterdir())) == 7
