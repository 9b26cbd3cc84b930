"""Writes the golden files beside it: tiny Hugging Face models and what they answer.

Needs torch and transformers, in an environment of its own, from the root of the repository:

    python3.11 -m venv /tmp/torchenv
    /tmp/torchenv/bin/pip install torch==2.13.0 transformers==5.17.0 safetensors
    /tmp/torchenv/bin/python tests/golden/make_golden.py
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: TID251
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))
from golden import LLAMA_CASES, checksum, make_weights  # noqa: E402

BASE: dict[str, Any] = dict(
    vocab_size=160,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    bos_token_id=1,
    eos_token_id=2,
)


def rope(kind: str, *, theta: float = 10000.0, **fields: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **fields}


LLAMA3: dict[str, Any] = {"theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 3},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True, "vocab_size": 128},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True, "vocab_size": 193},
    "head_dim": {"head_dim": 32},
    "linear": {"max_position_embeddings": 80, "rope_parameters": rope("linear", factor=2.5)},
    "dynamic": {"max_position_embeddings": 80, "rope_parameters": rope("dynamic", factor=2.0)},
    "dynamic_growing": {"max_position_embeddings": 80, "rope_parameters": rope("dynamic", factor=2.0)},
    "llama3": {"rope_parameters": rope("llama3", factor=8.0, original_max_position_embeddings=32, **LLAMA3)},
    "yarn": {"rope_parameters": rope("yarn", factor=4.0, original_max_position_embeddings=64)},
}
PROMPT_LENGTHS = {"dynamic": 90, "dynamic_growing": 60}
NEW_TOKENS = 64

# Frequencies alone, at real sizes: (head_dim, max_position_embeddings, parameters).
YARN = rope("yarn", factor=32.0, original_max_position_embeddings=4096)
ROPES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "llama2": (128, 4096, rope("default")),
    "llama3": (128, 8192, rope("default", theta=500000.0)),
    "llama3_1": (128, 131072, rope("llama3", factor=8.0, original_max_position_embeddings=8192, **LLAMA3)),
    "llama3_2": (64, 131072, rope("llama3", factor=32.0, original_max_position_embeddings=8192, **LLAMA3)),
    "vicuna_16k": (128, 4096, rope("linear", factor=4.0)),
    "deepseek_coder": (128, 16384, rope("linear", theta=100000.0, factor=4.0)),
    "dynamic": (128, 4096, rope("dynamic", factor=2.0)),
    "yarn": (128, 131072, YARN),
    "yarn_mscale": (
        64,
        163840,
        YARN | {"factor": 40.0, "beta_fast": 24.0, "mscale": 1.0, "mscale_all_dim": 0.8},
    ),
    "yarn_untruncated": (64, 131072, YARN | {"rope_theta": 150000.0, "truncate": False}),
    "yarn_attention_factor": (80, 131072, YARN | {"rope_theta": 1000000.0, "attention_factor": 0.75}),
}
DYNAMIC_LENGTHS = (1, 4096, 4097, 6000, 8192, 20000)


def as_v4(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json that transformers 4 wrote for the same model."""
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
    scaling = dict(config["rope_parameters"])
    old["rope_theta"] = scaling.pop("rope_theta")
    kind = scaling.pop("rope_type")
    spelling = "rope_type" if kind in ("llama3", "yarn") else "type"  # `type` until 4.43
    old["rope_scaling"] = None if kind == "default" else {spelling: kind, **scaling}
    old["torch_dtype"] = config["dtype"]
    old["transformers_version"] = "4.44.2"
    return old


def build(config: LlamaConfig, seed: int) -> tuple[LlamaForCausalLM, dict[str, list[int]], float]:
    model = LlamaForCausalLM(config).eval()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    own = {name: value for name, value in model.state_dict().items() if name not in tied}
    shapes = {name: list(own[name].shape) for name in sorted(own)}
    weights = make_weights(shapes, seed)
    for name, array in weights.items():
        own[name].copy_(torch.from_numpy(array))
    return model, shapes, checksum(weights)


def answer(name: str, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    config = LlamaConfig(**(BASE | CASES[name]), architectures=["LlamaForCausalLM"], dtype="float32")
    config._attn_implementation = "eager"
    model, shapes, weight_sum = build(config, seed)
    rng = np.random.default_rng(seed + 1)
    prompt = rng.integers(3, config.vocab_size, PROMPT_LENGTHS.get(name, 40)).tolist()
    inv_freq = model.model.rotary_emb.inv_freq.numpy().copy()
    attention_factor = float(model.model.rotary_emb.attention_scaling)
    last_logits = model(torch.tensor([prompt])).logits[0, -4:].float().numpy()
    model, _, _ = build(config, seed)  # dynamic scaling remembers the longest sequence it has seen
    model.generation_config.eos_token_id = None
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = out.sequences[0, len(prompt) :].tolist()
    top = torch.stack(out.logits)[:, 0].topk(2).values
    assert len(tokens) == NEW_TOKENS
    saved = json.loads(config.to_json_string(use_diff=True)) | {"architectures": ["LlamaForCausalLM"]}
    about = dict(
        config=saved,
        config_v4=as_v4(saved),
        shapes=shapes,
        seed=seed,
        prompt=prompt,
        tokens=tokens,
        margin=float((top[:, 0] - top[:, 1]).min()),
        attention_factor=attention_factor,
        weight_sum=weight_sum,
    )
    return about, {"last_logits": last_logits, "inv_freq": inv_freq}


def write_case(name: str) -> None:
    """Takes the first seed whose greedy tokens are far from any tie and not stuck in a short loop."""
    for seed in range(100, 400):
        about, arrays = answer(name, seed)
        if about["margin"] > 0.02 and len(set(about["tokens"])) >= 20:
            break
    else:
        raise RuntimeError(f"{name}: no seed gives well separated logits")
    np.savez_compressed(FOLDER / f"{name}.npz", about=json.dumps(about), **arrays)
    print(name, seed, about["margin"], about["tokens"], float(arrays["last_logits"].std()))


def write_ropes() -> None:
    about, arrays = {}, {}
    for name, (head_dim, length, parameters) in ROPES.items():
        config = LlamaConfig(
            **(BASE | {"head_dim": head_dim, "max_position_embeddings": length}),
            architectures=["LlamaForCausalLM"],
        )
        config.rope_parameters = dict(parameters)
        rotary = LlamaForCausalLM(config).model.rotary_emb
        arrays[name] = rotary.inv_freq.numpy()
        saved = json.loads(config.to_json_string(use_diff=True)) | {"architectures": ["LlamaForCausalLM"]}
        about[name] = {"config": saved, "attention_factor": float(rotary.attention_scaling)}
        if parameters["rope_type"] == "dynamic":
            for tokens in DYNAMIC_LENGTHS:
                scaled, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, seq_len=torch.tensor(tokens))
                arrays[f"{name}_{tokens}"] = scaled.numpy()
    np.savez_compressed(FOLDER / "rope_frequencies.npz", about=json.dumps(about), **arrays)


def write_state_dicts() -> None:
    """The same few tensors as torch.save writes them, in both its formats, and as safetensors."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    grid = torch.randn(6, 4)
    state = {
        "float32": grid,
        "float64": torch.randn(3, dtype=torch.float64),
        "float16": torch.randn(2, 3).half(),
        "bfloat16": torch.randn(5, 2).bfloat16(),
        "int64": torch.arange(-3, 4),
        "int32": torch.arange(4, dtype=torch.int32).reshape(2, 2),
        "int16": torch.tensor([-32768, 32767], dtype=torch.int16),
        "int8": torch.tensor([-128, 127], dtype=torch.int8),
        "uint8": torch.tensor([0, 255], dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "transposed": grid.T,  # a view of float32's storage with strides (1, 4)
        "offset_view": grid[2:4, 1:3],
        "parameter": torch.nn.Parameter(torch.randn(3, 2)),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
    }
    torch.save(state, FOLDER / "state_zip.bin")
    torch.save(state, FOLDER / "state_legacy.bin", _use_new_zipfile_serialization=False)
    # Newer dtypes have no storage class of their own and are pickled another way, in the zip format only.
    newer = {"float8_e4m3fn": torch.tensor([0.5, -448.0, 3.0]).to(torch.float8_e4m3fn)}
    torch.save(newer, FOLDER / "state_float8.bin")
    dense: dict[str, torch.Tensor] = {
        name: value.detach().contiguous().clone() for name, value in state.items()
    }
    save_file(dense, FOLDER / "state.safetensors")
    (FOLDER / "state.safetensors").chmod(0o644)
    numbers = {name: (v.float() if v.dtype == torch.bfloat16 else v).numpy() for name, v in dense.items()}
    np.savez_compressed(FOLDER / "state_expected.npz", **numbers)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    for case in LLAMA_CASES:
        write_case(case)
    write_ropes()
    write_state_dicts()
