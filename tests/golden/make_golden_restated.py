"""Published models that transformers does not ship, or not whole, stated again in plain torch and float32.

Baichuan came with code of its own, as did MPT before transformers took a part of it (no qk_ln, no kv_n_heads,
and alibi_bias_max is read but not used).
"""

import math
from collections.abc import Callable
from typing import Any

import torch  # noqa: TID251
from torch import Tensor  # noqa: TID251
from torch.nn import functional  # noqa: TID251

Weights = dict[str, Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, slopes: Tensor | None = None) -> Tensor:
    """Causal attention of one sequence, [tokens, heads, head_dim], with ALiBi where slopes are given."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    positions = torch.arange(len(q))
    distance = positions[None, :] - positions[:, None]  # 0 and below for what a query sees
    if slopes is not None:
        scores = scores + slopes[:, None, None] * distance
    scores = scores.masked_fill(distance > 0, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor) -> Tensor:
    """RoPE of all channels, the first half with the second, θ = 10,000."""
    half = x.shape[-1] // 2
    frequencies = 1.0 / 10000.0 ** (torch.arange(half).float() / half)
    angles = torch.arange(len(x)).float()[:, None, None] * frequencies
    first, second = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def alibi_slopes(num_heads: int) -> Tensor:
    """Those of the ALiBi paper, as in BLOOM: of a power of two, then every second one of twice as many."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4 * (i + 1) / power) for i in range(0, 2 * (num_heads - power), 2)]
    return torch.tensor(slopes)


def mpt_slopes(num_heads: int, bias_max: float) -> Tensor:
    """MPT's: of the next power of two, those at odd places before those at even ones."""
    power = 2 ** math.ceil(math.log2(num_heads))
    slopes = 2.0 ** (-bias_max / power * torch.arange(1, power + 1))
    return slopes if power == num_heads else torch.cat([slopes[1::2], slopes[::2]])[:num_heads]


def baichuan_shapes(config: dict[str, Any]) -> dict[str, list[int]]:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes = {"model.embed_tokens.weight": [vocab, hidden], "model.norm.weight": [hidden]}
    for i in range(config["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{i}.self_attn.W_pack.weight": [3 * hidden, hidden],
            f"model.layers.{i}.self_attn.o_proj.weight": [hidden, hidden],
            f"model.layers.{i}.mlp.gate_proj.weight": [inner, hidden],
            f"model.layers.{i}.mlp.up_proj.weight": [inner, hidden],
            f"model.layers.{i}.mlp.down_proj.weight": [hidden, inner],
            f"model.layers.{i}.input_layernorm.weight": [hidden],
            f"model.layers.{i}.post_attention_layernorm.weight": [hidden],
        }
    return shapes | {"lm_head.weight": [vocab, hidden]}


def baichuan(config: dict[str, Any], weights: Weights, tokens: Tensor) -> Tensor:
    """Of 7B with RoPE; of 13B, whose config.json has no max_position_embeddings, with ALiBi.

    Baichuan 2 is known by its vocabulary alone; its head's rows are normalised to length 1.
    """
    num_heads, eps = config["num_attention_heads"], config["rms_norm_eps"]
    head_dim = config["hidden_size"] // num_heads
    slopes = None if "max_position_embeddings" in config else alibi_slopes(num_heads)
    x = weights["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        own = {
            key.removeprefix(f"model.layers.{i}."): value
            for key, value in weights.items()
            if key.startswith(f"model.layers.{i}.")
        }
        normed = rms_norm(x, own["input_layernorm.weight"], eps)
        packed = normed @ own["self_attn.W_pack.weight"].T
        q, k, v = (part.unflatten(-1, (num_heads, head_dim)) for part in packed.chunk(3, dim=-1))
        if slopes is None:
            q, k = rotate(q), rotate(k)
        x = x + attend(q, k, v, scale=head_dim**-0.5, slopes=slopes) @ own["self_attn.o_proj.weight"].T
        normed = rms_norm(x, own["post_attention_layernorm.weight"], eps)
        gate = functional.silu(normed @ own["mlp.gate_proj.weight"].T)
        x = x + (gate * (normed @ own["mlp.up_proj.weight"].T)) @ own["mlp.down_proj.weight"].T
    head = weights["lm_head.weight"]
    if config["vocab_size"] == 125696:
        head = functional.normalize(head)
    return rms_norm(x, weights["model.norm.weight"], eps) @ head.T


def mpt_shapes(config: dict[str, Any]) -> dict[str, list[int]]:
    hidden, inner = config["d_model"], config["d_model"] * config["expansion_ratio"]
    kv = hidden // config["n_heads"] * mpt_kv_heads(config)
    shapes = {"transformer.wte.weight": [config["vocab_size"], hidden], "transformer.norm_f.weight": [hidden]}
    if not config["attn_config"]["alibi"]:
        shapes["transformer.wpe.weight"] = [config["max_seq_len"], hidden]
    for i in range(config["n_layers"]):
        shapes |= {
            f"transformer.blocks.{i}.norm_1.weight": [hidden],
            f"transformer.blocks.{i}.attn.Wqkv.weight": [hidden + 2 * kv, hidden],
            f"transformer.blocks.{i}.attn.out_proj.weight": [hidden, hidden],
            f"transformer.blocks.{i}.norm_2.weight": [hidden],
            f"transformer.blocks.{i}.ffn.up_proj.weight": [inner, hidden],
            f"transformer.blocks.{i}.ffn.down_proj.weight": [hidden, inner],
        }
        if config["attn_config"]["qk_ln"]:
            shapes[f"transformer.blocks.{i}.attn.q_ln.weight"] = [hidden]
            shapes[f"transformer.blocks.{i}.attn.k_ln.weight"] = [kv]
    if not config["no_bias"]:
        biases = {name.removesuffix("weight") + "bias": shape[:1] for name, shape in shapes.items()}
        shapes |= {
            name: shape for name, shape in biases.items() if ".wte." not in name and ".wpe." not in name
        }
    return shapes


def mpt_kv_heads(config: dict[str, Any]) -> int:
    about = config["attn_config"]
    default = 1 if about["attn_type"] == "multiquery_attention" else config["n_heads"]
    return about.get("kv_n_heads", default)


def mpt(config: dict[str, Any], weights: Weights, tokens: Tensor) -> Tensor:
    """qk_ln norms all heads' channels together, after the clamp of clip_qkv; no_bias is of norms as well."""
    about, num_heads = config["attn_config"], config["n_heads"]
    head_dim = config["d_model"] // num_heads
    num_kv_heads = mpt_kv_heads(config)
    slopes = mpt_slopes(num_heads, about["alibi_bias_max"]) if about["alibi"] else None

    def both(name: str) -> tuple[Tensor, Tensor | None]:
        return weights[f"transformer.{name}.weight"], weights.get(f"transformer.{name}.bias")

    def norm(x: Tensor, name: str) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], *both(name))

    x = weights["transformer.wte.weight"][tokens]
    if slopes is None:
        x = x + weights["transformer.wpe.weight"][: len(tokens)]
    for i in range(config["n_layers"]):
        block = f"blocks.{i}"
        qkv = functional.linear(norm(x, f"{block}.norm_1"), *both(f"{block}.attn.Wqkv"))
        if about["clip_qkv"] is not None:
            qkv = qkv.clamp(-about["clip_qkv"], about["clip_qkv"])
        sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
        q, k, v = qkv.split(sizes, dim=-1)
        if about["qk_ln"]:
            q, k = norm(q, f"{block}.attn.q_ln"), norm(k, f"{block}.attn.k_ln")
        q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in (q, k, v))
        scale = head_dim**-0.5 if about["softmax_scale"] is None else about["softmax_scale"]
        out = attend(q, k, v, scale=scale, slopes=slopes)
        x = x + functional.linear(out, *both(f"{block}.attn.out_proj"))
        inner = functional.gelu(functional.linear(norm(x, f"{block}.norm_2"), *both(f"{block}.ffn.up_proj")))
        x = x + functional.linear(inner, *both(f"{block}.ffn.down_proj"))
    logits = norm(x, "norm_f") @ weights["transformer.wte.weight"].T
    scale = config["logit_scale"]
    return logits * (config["d_model"] ** -0.5 if scale == "inv_sqrt_d_model" else scale or 1)


Shapes = Callable[[dict[str, Any]], dict[str, list[int]]]
Forward = Callable[[dict[str, Any], Weights, Tensor], Tensor]
RESTATED: dict[str, tuple[Shapes, Forward]] = {
    "BaiChuanForCausalLM": (baichuan_shapes, baichuan),
    "BaichuanForCausalLM": (baichuan_shapes, baichuan),
    "MPTForCausalLM": (mpt_shapes, mpt),
}
