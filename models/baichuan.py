"""Baichuan: Llama's form with one matrix for queries, keys and values; of 13B, ALiBi for rotary positions.

Source: Baichuan-inc 2023 and the code beside its checkpoints; parameter names of `BaichuanForCausalLM`.
"""

from pjengine.models import layouts
from pjengine.models.alibi import alibi_slopes
from pjengine.models.config import ModelConfig
from pjengine.models.config_reader import ConfigReader
from pjengine.models.llama import Llama
from pjengine.models.rope import RopeConfig
from pjengine.models.weight_table import WeightTable

_WIDTH_7B, _WIDTH_13B = 4096, 5120
_VOCAB_SIZE_2 = 125696  # how one knows Baichuan 2


class Baichuan(Llama):
    @staticmethod
    def read_config(reader: ConfigReader) -> ModelConfig:
        hidden_size, num_heads = reader.size("hidden_size"), reader.size("num_attention_heads")
        head_dim = reader.head_dim(hidden_size, num_heads)
        # 7B and 13B came with the same name and each with its own code: nothing else says which it is.
        has_rope = reader.config.get("max_position_embeddings") is not None or hidden_size == _WIDTH_7B
        if has_rope and hidden_size == _WIDTH_13B:
            raise ValueError(
                f"a Baichuan of hidden_size {_WIDTH_13B} has ALiBi, but max_position_embeddings is of rotary "
                "positions: remove it and give model_max_length"
            )
        length = reader.size("model_max_length", default=4096)
        reader.ignore("z_loss_weight")
        return ModelConfig(
            **reader.base(bos=1, eos=2, tie=False),
            vocab_size=reader.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=reader.size("intermediate_size"),
            num_layers=reader.size("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            max_position_embeddings=reader.size("max_position_embeddings", default=length),
            norm_eps=reader.number("rms_norm_eps", default=1e-6),
            rope=RopeConfig(kind="default", theta=10000.0, rotary_dim=head_dim) if has_rope else None,
            alibi_slopes=None if has_rope else alibi_slopes(num_heads),
            activation=reader.activation("hidden_act", default="silu"),
        )

    def weight_table(self) -> WeightTable:
        c, llama = self.config, super().weight_table()
        leaves = {
            **llama.leaves,
            **layouts.fused_qkv(c, "model.layers.{layer}.self_attn.W_pack", "blocks"),
            **layouts.head(c, has_unit_rows=c.vocab_size == _VOCAB_SIZE_2),
        }
        return WeightTable(leaves=leaves, ignored=llama.ignored, prefixes=llama.prefixes)
