"""GPTBigCode (StarCoder, SantaCoder): GPT-2 with one KV head for all queries, its matrices as [out, in].

Source: Ben Allal et al. 2023, Li et al. 2023; parameter names of Hugging Face's `GPTBigCodeForCausalLM`.
"""

import dataclasses

from pjengine.models import layouts
from pjengine.models.config import ModelConfig
from pjengine.models.config_reader import ConfigReader
from pjengine.models.gpt2 import GPT2
from pjengine.models.weight_table import WeightTable


class GPTBigCode(GPT2):
    @staticmethod
    def read_config(reader: ConfigReader) -> ModelConfig:
        config = GPT2.read_config(reader)
        num_kv_heads = 1 if reader.flag("multi_query", default=True) else config.num_heads
        reader.only("num_key_value_heads", num_kv_heads)
        # How its softmax was computed and its cache kept: always in float32 and in pages here.
        reader.ignore("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "inference_runner")
        reader.ignore("max_batch_size", "max_sequence_length", "pad_key_length", "pre_allocate_kv_cache")
        reader.ignore("validate_runner_input")
        return dataclasses.replace(config, num_kv_heads=num_kv_heads)

    def weight_table(self) -> WeightTable:
        c, gpt2, layer = self.config, super().weight_table(), "transformer.h.{layer}"
        leaves = {
            **gpt2.leaves,
            # By head, where each has a key and a value of its own: not GPT-2's three blocks.
            **layouts.fused_qkv(c, f"{layer}.attn.c_attn", "groups"),
            **layouts.out_proj(c, f"{layer}.attn.c_proj"),
            **layouts.plain_mlp(c, f"{layer}.mlp.c_fc", f"{layer}.mlp.c_proj"),
        }
        return WeightTable(leaves=leaves, ignored=gpt2.ignored, prefixes=gpt2.prefixes)
