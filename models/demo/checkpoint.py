"""What a training run leaves behind: an ordinary Hugging Face Llama checkpoint and its model card."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from safetensors.numpy import save

from pjengine.models.config import ModelConfig
from pjengine.models.decoder import Params

MAX_SAMPLE_LINES = 20  # in the model card
GENERATION_CONFIG = {
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "do_sample": True,
    "temperature": 0.6,
}


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of `config`; `parse_config` reads it back."""
    assert config.rope is not None
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    }


def hf_weights(params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """The parameters under Hugging Face's names, as [out, in] matrices in bfloat16.

    The inverse of `Llama.weight_table` for a model without biases and with tied embeddings.
    """
    group = config.num_heads // config.num_kv_heads
    hidden = config.hidden_size
    tensors: dict[str, Array] = {
        "model.embed_tokens.weight": params["embed"],
        "model.norm.weight": params["final_norm"],
    }
    layers = params["layers"]
    for layer in range(config.num_layers):
        name = f"model.layers.{layer}"
        qkv = jnp.transpose(layers["qkv"][layer], (1, 2, 3, 0))  # [kv_heads, group + 2, head_dim, hidden]
        tensors |= {
            f"{name}.input_layernorm.weight": layers["attn_norm"][layer],
            f"{name}.post_attention_layernorm.weight": layers["mlp_norm"][layer],
            f"{name}.self_attn.q_proj.weight": qkv[:, :group].reshape(-1, hidden),
            f"{name}.self_attn.k_proj.weight": qkv[:, group].reshape(-1, hidden),
            f"{name}.self_attn.v_proj.weight": qkv[:, group + 1].reshape(-1, hidden),
            f"{name}.self_attn.o_proj.weight": layers["out"][layer].reshape(-1, hidden).T,
            f"{name}.mlp.gate_proj.weight": layers["gate_up"][layer][:, 0].T,
            f"{name}.mlp.up_proj.weight": layers["gate_up"][layer][:, 1].T,
            f"{name}.mlp.down_proj.weight": layers["down"][layer].T,
        }
    return {name: np.ascontiguousarray(tensor.astype(jnp.bfloat16)) for name, tensor in tensors.items()}


def save_checkpoint(
    out: Path, params: Params, config: ModelConfig, *, data: Path, log: Mapping[str, Any]
) -> None:
    """Writes the seven files of the model into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    weights = save(hf_weights(params, config), metadata={"format": "pt"})
    (out / "model.safetensors").write_bytes(weights)
    files = {
        "config.json": hf_config(config),
        "generation_config.json": GENERATION_CONFIG,
        "training_log.json": log,
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(data / name, out / name)
    (out / "README.md").write_text(model_card(config, log))


def model_card(config: ModelConfig, log: Mapping[str, Any]) -> str:
    """README.md: what the model is, what it learned from, how well it does, and what it is not for."""
    corpus, result, setup = log["corpus"], log["result"], log["setup"]
    versions = ", ".join(name.replace("python", "") for name in corpus["python_versions"])
    epochs = result["steps"] * setup["tokens_per_step"] / corpus["train"]["tokens"]
    choice, caveat = _choice(log["runs"])
    samples = "\n\n".join(_sample_text(sample) for sample in log["samples"])
    return _CARD.format(
        params_m=result["num_params"] / 1e6,
        config=config,
        versions=versions,
        train=corpus["train"],
        held_out=corpus["held_out"],
        epochs=epochs,
        arguments=_arguments(setup),
        stdlib=" ".join(f"LIB/{name}" for name in corpus["python_versions"]),
        choice=choice,
        caveat=caveat,
        samples=samples,
        result=result,
        setup=setup,
    )


def _arguments(setup: Mapping[str, Any]) -> str:
    """The arguments of the training command that are this model's own."""
    steps, minutes = setup["steps"], setup["minutes"]
    length = f"--minutes {minutes:g}" if steps is None else f"--steps {steps}"
    return f"{length} --weight-decay {' '.join(f'{decay:g}' for decay in setup['weight_decays'])}"


def _choice(runs: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """How the weight decay came about, and what that means for the quality that is measured."""
    if len(runs) == 1:
        return f"Weight decay {runs[0]['weight_decay']:g}; `training_log.json` has the curve.", ""
    losses = "; ".join(f"{run['weight_decay']:g}: {run['held_out_loss']:.4f}" for run in runs)
    choice = f"Held-out loss by weight decay: {losses}. The best is kept; `training_log.json` has its curve."
    return choice, "\nThe weight decay was picked on the same files, so these numbers are a little kind.\n"


def _sample_text(sample: Mapping[str, Any]) -> str:
    kind = "greedy" if sample["temperature"] == 0 else f"temperature {sample['temperature']:g}"
    text = f"{sample['prompt']}⟨prompt ends⟩{sample['completion']}"
    lines = text.split("\n")[:MAX_SAMPLE_LINES]
    return f"{kind}:\n\n" + "\n".join(f"    {line}".rstrip() for line in lines)


_CARD = """\
---
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
language: code
tags: [python, llama, pjengine]
---
# demo: a small Llama that completes Python

{params_m:.2f} M parameters in bfloat16, trained from scratch by pjengine's own model code
(`models/llama.py`, dense causal attention). It is for demos and tests: `LLM("demo")` runs without a
download. It is an ordinary Hugging Face checkpoint (`LlamaForCausalLM`).

| | |
|---|---|
| layers, hidden, MLP | {config.num_layers}, {config.hidden_size}, {config.intermediate_size} |
| heads, KV heads, head size | {config.num_heads}, {config.num_kv_heads}, {config.head_dim} |
| vocabulary | {config.vocab_size}, byte-level BPE; newlines, indentation and words are separate tokens |
| context | {config.max_position_embeddings} tokens, RoPE base {config.rope.theta:g} |
| embeddings | tied |
| end of text | id 0, between files; BOS, EOS and padding; never added to a prompt |

## Data and licence

The standard library of CPython {versions} (`Lib`, with its tests): {train[files]} files,
{train[bytes]:,} bytes, {train[tokens]:,} tokens to train on; {held_out[files]} more
({held_out[bytes]:,} bytes, {held_out[tokens]:,} tokens) held out as whole files, drawn by seed. Left out:
site-packages, tables of data, files that are no valid Python, near-copies of other files. `corpus.py`
holds the rules.

CPython is Copyright © 2001 Python Software Foundation; All Rights Reserved, and used under the
[PSF License Agreement](https://docs.python.org/3/license.html). Some of its files carry notices of their
own, listed there under "Licenses and Acknowledgements for Incorporated Software". The weights and the
tokenizer are made from that code by the pjengine project and are distributed under the same licence
terms (`LICENSE.md`), without warranty; the Python Software Foundation neither made nor endorses them.

## Training

    python -m pjengine.models.demo.train train {arguments} \\
        --stdlib {stdlib} --out build/demo/model

in a checkout, with `optax` and `tokenizers`; `LIB` is where these Pythons keep their standard libraries.
AdamW (b2 0.95, gradients clipped at 1), bfloat16 compute on float32 parameters, learning rate
{setup[peak_lr]:g} with {setup[warmup_steps]} steps of warm-up and linear decay to zero, random windows of
{setup[context]} tokens, {setup[tokens_per_step]:,} tokens a step, seed {setup[seed]}.
This checkpoint: {result[steps]:,} steps ({epochs:.1f} passes over the data) in {result[minutes]:.1f} minutes
on one {setup[device]}, {result[tokens_per_s]:,.0f} tokens/s.

{choice}

## Quality

On the held-out files, in windows of {setup[context]} tokens that do not overlap:

| | |
|---|---|
| perplexity per token | {result[perplexity]:.3f} |
| loss, nats per token | {result[held_out_loss]:.4f} |
| bits per byte | {result[bits_per_byte]:.4f} |
| training loss at the end | {result[train_loss]:.4f} |
{caveat}
## Use and limits

It knows the look of Python, not its meaning: names, signatures, docstrings and tests in the manner of the
standard library. Expect code that seldom runs, repetition under greedy decoding, and pieces of CPython
reproduced word for word. It follows no instructions; the chat template only turns messages into comments,
so that `LLM.chat` runs. A prompt should not end in a single blank, since a blank belongs to the word
after it. Not for production of any kind.

## Samples (drawn once, not picked)

{samples}
"""
