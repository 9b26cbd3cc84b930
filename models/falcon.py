"""Falcon: attention beside the MLP, few KV heads, rotary positions; of the RW models, BLOOM's form and ALiBi.

Source: Almazrouei et al. 2023; parameter names of Hugging Face's `FalconForCausalLM`.
"""

from pjengine.models import layouts
from pjengine.models.alibi import alibi_slopes
from pjengine.models.config import ModelConfig
from pjengine.models.config_reader import ConfigReader
from pjengine.models.decoder import Decoder
from pjengine.models.json_values import SIZE, TEXT
from pjengine.models.weight_table import WeightTable


class Falcon(Decoder):
    @staticmethod
    def read_config(reader: ConfigReader) -> ModelConfig:
        hidden_size = reader.size("hidden_size", "n_embed")
        num_heads = reader.size("num_attention_heads", "n_head")
        head_dim = reader.head_dim(hidden_size, num_heads)
        max_position = reader.size("max_position_embeddings", default=2048)
        rope = reader.rope(head_dim=head_dim, max_position_embeddings=max_position)
        has_alibi, has_bias = reader.flag("alibi", default=False), reader.flag("bias", default=False)
        # 40B and larger; their first checkpoints said so by their model_type alone.
        is_new = reader.flag(
            "new_decoder_architecture", default=reader.get("model_type", wanted=TEXT) == "RefinedWeb"
        )
        is_parallel = reader.flag("parallel_attn", default=True)
        num_norms = reader.size("num_ln_in_parallel_attn", default=2 if is_new else 1)
        is_multi_query = reader.flag("multi_query", default=True)
        num_kv_heads = reader.get("num_kv_heads", "n_head_kv", wanted=SIZE, default=num_heads)
        if is_new:
            reader.only("parallel_attn", True)
            reader.only("num_ln_in_parallel_attn", 1, 2)
        else:  # whatever num_kv_heads says
            reader.only("num_ln_in_parallel_attn", 1)
            num_kv_heads = 1 if is_multi_query else num_heads
        reader.only("apply_residual_connection_post_layernorm", False)
        reader.ignore("ff_factor")  # ffn_hidden_size is what counts
        return ModelConfig(
            **reader.base(bos=11, eos=11, tie=True),
            vocab_size=reader.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=reader.size("ffn_hidden_size", default=4 * hidden_size),
            num_layers=reader.size("num_hidden_layers", "n_layer"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_position,
            norm="layer",
            norm_eps=reader.number("layer_norm_epsilon", default=1e-5),
            has_norm_bias=True,
            is_parallel=is_parallel,
            has_mlp_norm=num_norms == 2 or not is_parallel,
            rope=None if has_alibi else rope,
            # Scores and ALiBi together are divided by the root of head_dim.
            alibi_slopes=tuple(s / head_dim**0.5 for s in alibi_slopes(num_heads)) if has_alibi else None,
            qkv_bias=has_bias,
            out_bias=has_bias,
            activation=reader.activation("activation", default="gelu"),
            is_gated=False,
            mlp_bias=has_bias,
        )

    def weight_table(self) -> WeightTable:
        c, layer = self.config, "transformer.h.{layer}"
        norms = {"layers/attn_norm": f"{layer}.input_layernorm", "final_norm": "transformer.ln_f"}
        if c.has_mlp_norm and c.is_parallel:
            norms |= {"layers/attn_norm": f"{layer}.ln_attn", "layers/mlp_norm": f"{layer}.ln_mlp"}
        elif c.has_mlp_norm:
            norms["layers/mlp_norm"] = f"{layer}.post_attention_layernorm"
        return WeightTable(
            leaves={
                "embed": layouts.plain("transformer.word_embeddings.weight"),
                **layouts.norms(c, norms),
                **layouts.fused_qkv(c, f"{layer}.self_attention.query_key_value", "groups"),
                **layouts.out_proj(c, f"{layer}.self_attention.dense"),
                **layouts.plain_mlp(c, f"{layer}.mlp.dense_h_to_4h", f"{layer}.mlp.dense_4h_to_h"),
                **layouts.head(c),
            },
            ignored=("*.self_attention.*.inv_freq", *layouts.tied_copies(c)),
            prefixes=("transformer.",),
        )
