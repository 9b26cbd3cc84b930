"""gpt-oss: experts with biases and a clamped gate, attention with sinks, windows in every other layer.

Source: OpenAI 2025; parameter names of Hugging Face's `GptOssForCausalLM`.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from pjengine.models import layouts
from pjengine.models.config import ExpertConfig, ModelConfig
from pjengine.models.config_reader import ConfigReader
from pjengine.models.json_values import OBJECT, POSITIVE, SIZE
from pjengine.models.llama import Llama
from pjengine.models.mxfp4 import BLOCK, mxfp4_leaf
from pjengine.models.weight_table import WeightTable

# Where config.json says nothing of rotary positions.
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


@dataclass(frozen=True, kw_only=True)
class GptOssConfig(ModelConfig):
    is_mxfp4: bool  # the checkpoint's experts


class GptOss(Llama):
    config: GptOssConfig

    def unpacked(self) -> "GptOss":
        return dataclasses.replace(self, config=dataclasses.replace(self.config, is_mxfp4=False))

    @staticmethod
    def read_config(reader: ConfigReader) -> GptOssConfig:
        num_layers, num_heads = reader.size("num_hidden_layers"), reader.size("num_attention_heads")
        hidden_size, inner_size = reader.size("hidden_size"), reader.size("intermediate_size", default=2880)
        head_dim = reader.size("head_dim", default=64)
        max_position = reader.size("max_position_embeddings", default=131072)
        window = reader.nullable("sliding_window", wanted=SIZE, default=128)
        types = reader.layer_types(num_layers, ("sliding_attention", "full_attention"))
        has_bias = reader.flag("attention_bias", default=True)
        is_mxfp4 = _read_quantization(reader)
        base = reader.base(bos=None, eos=None, tie=False)
        if is_mxfp4:
            if hidden_size % BLOCK or inner_size % BLOCK:
                raise ValueError(
                    f"mxfp4 needs a hidden_size and an intermediate_size that are multiples of {BLOCK}, "
                    f"got {hidden_size} and {inner_size}"
                )
            if not reader.config.get("dtype") and not reader.config.get("torch_dtype"):
                base["dtype"] = "bfloat16"  # what is not packed
        reader.only("hidden_act", "silu", "swish")
        # Of training alone; and a second spelling of what the rotary positions say.
        reader.ignore("output_router_logits", "router_aux_loss_coef", "initial_context_length")
        theta = reader.number("rope_theta", default=150000.0)
        says_rope = any(reader.config.get(key) for key in ("rope_parameters", "rope_scaling"))
        return GptOssConfig(
            **base,
            vocab_size=reader.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=inner_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=reader.size("num_key_value_heads", default=num_heads),
            head_dim=head_dim,
            max_position_embeddings=max_position,
            norm_eps=reader.number("rms_norm_eps", default=1e-5),
            rope=reader.rope(
                head_dim=head_dim,
                max_position_embeddings=max_position,
                theta=theta,
                parameters=None if says_rope else {**_ROPE, "rope_theta": theta},
            ),
            layer_windows=tuple(window if kind == "sliding_attention" else None for kind in types),
            has_sinks=True,
            qkv_bias=has_bias,
            out_bias=has_bias,
            experts=ExpertConfig(
                num_experts=reader.size("num_local_experts", "num_experts", default=128),
                num_choices=reader.size("num_experts_per_tok", "experts_per_token", default=4),
                inner_size=inner_size,
                has_router_bias=True,
                has_bias=True,
                gate_alpha=1.702,
                gate_limit=reader.number("swiglu_limit", default=7.0, wanted=POSITIVE),
                up_offset=1.0,
            ),
            is_mxfp4=is_mxfp4,
        )

    def weight_table(self) -> WeightTable:
        c, layer, table = self.config, "model.layers.{layer}", super().weight_table()
        assert c.experts is not None
        num, e, i = c.experts.num_experts, c.hidden_size, c.experts.inner_size
        router, gate_up, down = (
            f"{layer}.mlp.{n}" for n in ("router", "experts.gate_up_proj", "experts.down_proj")
        )
        # Gates and ups alternate.
        if c.is_mxfp4:
            both = mxfp4_leaf(gate_up, (num, i, 2, e), (0, 3, 2, 1)), mxfp4_leaf(down, (num, e, i), (0, 2, 1))
        else:
            axes = (num, e, i, 2)
            both = (
                layouts.plain(gate_up, shape=(num, e, 2 * i), reshape=axes, transpose=(0, 1, 3, 2)),
                layouts.plain(down),
            )
        own = {
            "layers/sinks": layouts.plain(f"{layer}.self_attn.sinks"),
            "layers/router": layouts.plain(f"{router}.weight", transpose=(1, 0)),
            "layers/router_bias": layouts.plain(f"{router}.bias"),
            "layers/expert_gate_up": both[0],
            "layers/expert_down": both[1],
            "layers/expert_gate_up_bias": layouts.plain(
                f"{gate_up}_bias", shape=(num, 2 * i), reshape=(num, i, 2), transpose=(0, 2, 1)
            ),
            "layers/expert_down_bias": layouts.plain(f"{down}_bias"),
        }
        return dataclasses.replace(table, leaves=layouts.with_experts(c, dict(table.leaves), own))


def _read_quantization(reader: ConfigReader) -> bool:
    """Whether the experts are packed. What `modules_to_not_convert` names is not: the tensors show it."""
    given: dict[str, Any] = dict(reader.get("quantization_config", wanted=OBJECT, default={}))
    if not given:
        return False
    method = given.pop("quant_method", None)
    if method != "mxfp4":
        raise NotImplementedError(f"quant_method must be 'mxfp4', got {method!r}: not supported")
    unknown = sorted(set(given) - {"modules_to_not_convert", "dequantize"})
    if unknown:
        raise ValueError(
            f"quantization_config of mxfp4 knows modules_to_not_convert, got {', '.join(unknown)}"
        )
    return True
