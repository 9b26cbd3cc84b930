"""StableLM 3B and 2: Llama's form with LayerNorm, partial rotary positions and, in 12B, a parallel MLP.

Source: Bellagente et al. 2024; parameter names of Hugging Face's `StableLmForCausalLM`.
"""

from jaxtyping import Array, Float

from pjengine.models import layouts
from pjengine.models.block import Block
from pjengine.models.config import ModelConfig
from pjengine.models.config_reader import ConfigReader
from pjengine.models.decoder import Decoder
from pjengine.models.layers import normalize
from pjengine.models.weight_table import Leaf, Source, WeightTable


class StableLMBlock(Block):
    def qk_norm(self, name: str, heads: Float[Array, "*t hk g d"]) -> Float[Array, "*t hk g d"]:
        """Of each head with its own weight, which checkpoints have in a tensor for each."""
        *_, kv_heads, group, dim = heads.shape
        weight = self.weight(name, kv_heads * group, dim).reshape(kv_heads, group, dim)
        return normalize(self.config, heads, weight)


class StableLM(Decoder):
    block = StableLMBlock

    @staticmethod
    def read_config(reader: ConfigReader) -> ModelConfig:
        hidden_size, num_heads = reader.size("hidden_size"), reader.size("num_attention_heads")
        head_dim = reader.head_dim(hidden_size, num_heads)
        max_position = reader.size("max_position_embeddings", default=4096)
        reader.only("rotary_scaling_factor", 1.0)
        reader.ignore("num_heads")  # again
        is_parallel = reader.flag("use_parallel_residual", default=False)
        return ModelConfig(
            **reader.base(bos=0, eos=0, tie=False),
            vocab_size=reader.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=reader.size("intermediate_size"),
            num_layers=reader.size("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=reader.size("num_key_value_heads", default=32),
            head_dim=head_dim,
            max_position_embeddings=max_position,
            rope=reader.rope(head_dim=head_dim, max_position_embeddings=max_position, partial=0.25),
            norm="layer",
            norm_eps=reader.number("layer_norm_eps", default=1e-5),
            has_norm_bias=True,
            is_parallel=is_parallel,
            has_mlp_norm=not is_parallel,
            qkv_bias=reader.flag("use_qkv_bias", default=False),
            qk_norm="own" if reader.flag("qk_layernorm", default=False) else None,
            activation=reader.activation("hidden_act", default="silu"),
        )

    def weight_table(self) -> WeightTable:
        c, layer = self.config, "model.layers.{layer}"
        norms = {"layers/attn_norm": f"{layer}.input_layernorm", "final_norm": "model.norm"}
        if c.has_mlp_norm:
            norms["layers/mlp_norm"] = f"{layer}.post_attention_layernorm"
        leaves = {
            "embed": layouts.plain("model.embed_tokens.weight"),
            **layouts.norms(c, norms),
            **layouts.separate_qkv(c, f"{layer}.self_attn"),
            **layouts.out_proj(c, f"{layer}.self_attn.o_proj"),
            **layouts.gated_mlp(c, f"{layer}.mlp"),
            **layouts.head(c),
        }
        for kind, num_norms in (("q", c.num_heads), ("k", c.num_kv_heads)) if c.qk_norm else ():
            names = (f"{layer}.self_attn.{kind}_layernorm.norms.{head}.weight" for head in range(num_norms))
            sources = tuple(Source(name=name, shape=(c.head_dim,), reshape=(1, c.head_dim)) for name in names)
            leaves[f"layers/{kind}_norm"] = Leaf(sources=sources)
        return WeightTable(
            leaves=leaves,
            ignored=("*.rotary_emb.inv_freq", *layouts.tied_copies(c)),
            prefixes=("model.",),
        )
