"""Golden files: tiny Hugging Face models, their weights remade from a seed, and what they answered.

numpy only. `make_golden.py`, which needs torch, wrote the files; it fills its models by `make_weights` too.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
# One file each. `make_golden.py NAME` makes one anew; what is in it is in the tables of cases_*.py.
BY_ARCHITECTURE: dict[str, list[str]] = {
    architecture: names.split()
    for architecture, names in {
        "LlamaForCausalLM": """mha gqa mqa tied attention_bias mlp_bias head_dim linear dynamic
            dynamic_growing llama3 yarn""",
        "BaiChuanForCausalLM": "baichuan_7b",
        "BaichuanForCausalLM": "baichuan_13b baichuan2_7b baichuan2_13b",
        "BloomForCausalLM": "bloom bloom_6_heads bloom_12_heads bloom_residual_post_layernorm",
        "FalconForCausalLM": """falcon_mqa falcon_gqa falcon_gqa_one_norm falcon_rw falcon_rw_6_heads
            falcon_mqa_alibi""",
        "GPT2LMHeadModel": "gpt2 gpt2_n_inner",
        "GPTBigCodeForCausalLM": "gpt_bigcode gpt_bigcode_mha gpt_bigcode_exact_gelu",
        "GPTJForCausalLM": "gptj gptj_n_inner",
        "GPTNeoXForCausalLM": "gpt_neox gpt_neox_sequential gpt_neox_full_rotary gpt_neox_head_dim_24",
        "MptForCausalLM": "mpt mpt_clip_qkv mpt_6_heads",
        "MPTForCausalLM": "mpt_qk_ln mpt_kv_n_heads mpt_learned_positions",
        "OPTForCausalLM": "opt opt_post_norm opt_no_bias opt_no_final_norm",
        "Qwen2ForCausalLM": "qwen2 qwen2_tied qwen2_window",
        "Qwen3ForCausalLM": "qwen3 qwen3_tied qwen3_window",
        "MistralForCausalLM": "mistral mistral_window",
        "PhiForCausalLM": "phi phi_qk_layernorm",
        "Phi3ForCausalLM": "phi3 phi3_window phi3_longrope_short phi3_longrope_long phi3_partial_rotary",
        "GemmaForCausalLM": "gemma",
        "Gemma2ForCausalLM": "gemma2 gemma2_no_softcap",
        "Gemma3ForCausalLM": "gemma3 gemma3_linear",
        "StableLmForCausalLM": "stablelm stablelm_qkv_bias stablelm_parallel_residual",
        "Starcoder2ForCausalLM": "starcoder2 starcoder2_window",
        "Olmo2ForCausalLM": "olmo2",
        "GraniteForCausalLM": "granite granite_bias",
        "SmolLM3ForCausalLM": "smollm3 smollm3_no_rope_layers smollm3_window",
        "CohereForCausalLM": "cohere cohere_qk_norm",
        "Cohere2ForCausalLM": "cohere2",
        "GlmForCausalLM": "glm",
        "Glm4ForCausalLM": "glm4 glm4_bias",
        "MixtralForCausalLM": "mixtral mixtral_window",
        "Qwen3MoeForCausalLM": "qwen3_moe qwen3_moe_unnormed qwen3_moe_dense_layers",
        "GptOssForCausalLM": "gpt_oss",
    }.items()
}
CASES = {name: architecture for architecture, names in BY_ARCHITECTURE.items() for name in names}
LLAMA_CASES = BY_ARCHITECTURE["LlamaForCausalLM"]
# Whose hidden states are in a file of their own: with embeddings scaled, with positions, or behind a norm;
# with a last norm or none.
STATES = {"gqa", "gpt2", "bloom", "gemma2", "opt_no_final_norm", "falcon_rw", "qwen3_moe", "granite"}
# Whose attention is in another: grouped heads, ALiBi, soft caps and windows, sinks.
ATTENTIONS = {"gqa", "bloom_6_heads", "gemma2", "gpt_oss"}
_NORM = re.compile(r"norm|\bln_|_ln\b")
_EMBEDDING = re.compile(r"embed|\bwte\b|\bwpe\b")


@dataclass(frozen=True, kw_only=True)
class Golden:
    """One case: the model and what Hugging Face computed from it, in float32 on a CPU."""

    name: str
    config: dict[str, Any]  # config.json as transformers 5 writes it
    config_v4: dict[str, Any]  # the same as transformers 4 wrote it
    shapes: dict[str, tuple[int, ...]]  # by checkpoint name, sorted
    seed: int
    prompt: list[int]
    last_logits: np.ndarray  # float32 [4, min(vocab, 256)]: at the prompt's last four positions
    tokens: list[int]  # greedy tokens after the prompt, end-of-sequence ignored: 32, of Llama 64
    margin: float  # least distance between the best and the second logit over those steps
    norm_mean: float = 1.0  # of the norms' weights: 0 where the norm multiplies by 1 + weight
    embedding_scale: float = 0.5
    projection_scale: float = 2.0
    # Of Llama alone; others have an empty array:
    inv_freq: np.ndarray  # float32 [head_dim / 2]: at the model's birth, unscaled for dynamic
    attention_factor: float = 1.0

    def weights(self) -> dict[str, np.ndarray]:
        """Returns every tensor of the checkpoint, float32."""
        return make_weights(
            self.shapes,
            self.seed,
            norm_mean=self.norm_mean,
            embedding_scale=self.embedding_scale,
            projection_scale=self.projection_scale,
        )


def load(name: str) -> Golden:
    with np.load(FOLDER / f"{name}.npz") as file:
        about = json.loads(str(file["about"]))
        weight_sum = about.pop("weight_sum")
        about["shapes"] = {key: tuple(shape) for key, shape in about["shapes"].items()}
        arrays = {key: file[key] for key in file if key != "about"}
    golden = Golden(name=name, **({"inv_freq": np.empty(0, np.float32)} | arrays), **about)
    remade = checksum(golden.weights())
    if not np.isclose(remade, weight_sum, rtol=1e-9):
        raise RuntimeError(
            f"{name}: weights made from the seed sum to {remade}, {weight_sum} when the file was made: "
            "numpy's generator has changed, run make_golden.py again"
        )
    return golden


def make_weights(
    shapes: Mapping[str, Sequence[int]],
    seed: int,
    *,
    norm_mean: float = 1.0,
    embedding_scale: float = 0.5,
    projection_scale: float = 2.0,
) -> dict[str, np.ndarray]:
    """Draws every tensor, in the order of `shapes`: projections have twice the neutral scale."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = rng.standard_normal(tuple(shape), dtype=np.float32)
        if name.endswith("bias"):
            weights[name] = np.float32(0.2) * noise
        elif _NORM.search(name):
            weights[name] = np.float32(norm_mean) + np.float32(0.1) * noise
        elif _EMBEDDING.search(name):
            weights[name] = np.float32(embedding_scale) * noise
        else:
            weights[name] = np.float32(projection_scale / np.sqrt(shape[-1])) * noise
    return weights


def checksum(weights: Mapping[str, np.ndarray]) -> float:
    """Weighted by position, so that a changed order shows too."""
    return float(sum((i + 1) * array.astype(np.float64).sum() for i, array in enumerate(weights.values())))


def write_checkpoint(
    golden: Golden,
    folder: Path,
    *,
    shards: int = 1,
    dtype: Any = np.float32,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Writes config.json and safetensors, in one file or in `shards` with an index; returns `folder`."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config or golden.config)))
    weights = {name: array.astype(dtype) for name, array in golden.weights().items()}
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    names = list(weights)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in names[i::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder
