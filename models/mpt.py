"""MPT: ALiBi with slopes of its own, no biases; optionally clipped or normed queries and keys.

Source: MosaicML 2023 and the code beside its checkpoints; parameter names of `MPTForCausalLM`.
"""

import math

from pjengine.models import layouts
from pjengine.models.config import ModelConfig
from pjengine.models.config_reader import ConfigReader, refuse_unread
from pjengine.models.decoder import Decoder
from pjengine.models.json_values import NUMBER, OBJECT, TEXT
from pjengine.models.weight_table import WeightTable


def mpt_slopes(num_heads: int, bias_max: float) -> tuple[float, ...]:
    """Slopes of the next power of two, of which every other one comes first, from the second on."""
    power = 1 << (num_heads - 1).bit_length()
    slopes = [2.0 ** (-bias_max * (i + 1) / power) for i in range(power)]
    return tuple(slopes if power == num_heads else (slopes[1::2] + slopes[::2])[:num_heads])


class MPT(Decoder):
    @staticmethod
    def read_config(reader: ConfigReader) -> ModelConfig:
        hidden_size = reader.size("d_model", "hidden_size")
        num_heads = reader.size("n_heads", "num_attention_heads")
        head_dim = reader.head_dim(hidden_size, num_heads)
        has_bias = not reader.flag("no_bias", default=True)
        attention = ConfigReader(
            reader.get("attn_config", wanted=OBJECT, default={}), f"attn_config of {reader.architecture}"
        )
        has_alibi = attention.flag("alibi", default=True)
        slopes = mpt_slopes(num_heads, attention.number("alibi_bias_max", default=8))
        kind = attention.get("attn_type", wanted=TEXT, default="multihead_attention")
        attention.only("attn_type", "multihead_attention", "multiquery_attention", "grouped_query_attention")
        num_kv_heads = attention.size(
            "kv_n_heads", default=1 if kind == "multiquery_attention" else num_heads
        )
        scale = attention.get("softmax_scale", wanted=NUMBER)
        clip = attention.get("clip_qkv", wanted=NUMBER)
        has_qk_norm = attention.flag("qk_ln", default=False)
        attention.only("attn_uses_sequence_id", False)
        attention.only("prefix_lm", False)
        attention.ignore("attn_impl", "attn_pdrop")
        refuse_unread(attention)
        reader.only("norm_type", "layernorm", "low_precision_layernorm")
        # embedding_fraction is of gradients; learned_pos_emb is what ALiBi says, whatever is written.
        reader.ignore("emb_pdrop", "embedding_fraction", "init_config", "init_device", "learned_pos_emb")
        reader.ignore("tokenizer_name", "verbose")
        logit_scale = reader.config.get("logit_scale")
        if logit_scale == "inv_sqrt_d_model":
            reader.ignore("logit_scale")
            logit_scale = 1 / math.sqrt(hidden_size)
        else:
            logit_scale = reader.number("logit_scale", default=1.0)
        return ModelConfig(
            **reader.base(bos=None, eos=None, tie=True),
            vocab_size=reader.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=int(hidden_size * reader.number("expansion_ratio", default=4)),
            num_layers=reader.size("n_layers", "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=reader.size("max_seq_len", default=2048),
            norm="layer",
            norm_eps=reader.number("layer_norm_epsilon", default=1e-5),
            has_norm_bias=has_bias,
            has_learned_positions=not has_alibi,
            alibi_slopes=slopes if has_alibi else None,
            attention_scale=None if scale is None else float(scale),
            clip_qkv=None if not clip else float(clip),
            qk_norm="full" if has_qk_norm else None,
            has_qk_norm_bias=has_qk_norm and has_bias,
            qkv_bias=has_bias,
            out_bias=has_bias,
            activation="gelu",
            is_gated=False,
            mlp_bias=has_bias,
            logit_scale=logit_scale,
        )

    def weight_table(self) -> WeightTable:
        c, layer = self.config, "transformer.blocks.{layer}"
        norms = {
            "layers/attn_norm": f"{layer}.norm_1",
            "layers/mlp_norm": f"{layer}.norm_2",
            "final_norm": "transformer.norm_f",
        }
        leaves = {
            "embed": layouts.plain("transformer.wte.weight"),
            **layouts.norms(c, norms),
            **layouts.fused_qkv(c, f"{layer}.attn.Wqkv", "blocks"),
            **layouts.out_proj(c, f"{layer}.attn.out_proj"),
            **layouts.plain_mlp(c, f"{layer}.ffn.up_proj", f"{layer}.ffn.down_proj"),
            **layouts.head(c),
        }
        if c.qk_norm is not None:
            leaves |= layouts.qk_norms(c, f"{layer}.attn.q_ln", f"{layer}.attn.k_ln")
        if c.has_learned_positions:
            leaves["positions"] = layouts.plain("transformer.wpe.weight")
        return WeightTable(leaves=leaves, ignored=layouts.tied_copies(c), prefixes=("transformer.",))
