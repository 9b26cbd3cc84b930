"""What is known of each architecture beside its golden files, by its name in the registry."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

type Config = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Published:
    """Example checkpoints, oddities of old ones, and what is refused."""

    # config.json as published, without what has no effect, and the number of parameters.
    sizes: Mapping[str, tuple[Config, int]]
    # Names of tensors that old versions stored beside the weights, without their prefix.
    buffers: tuple[str, ...] = ()
    # What is changed in the first golden case's config.json, and what NotImplementedError then says.
    unsupported: tuple[tuple[Config, str], ...] = ()
    # The same for ValueError.
    wrong: tuple[tuple[Config, str], ...] = field(default=())


_GPT2 = dict(vocab_size=50257, n_embd=768, n_layer=12, n_head=12, n_positions=1024)
_PYTHIA = dict(
    vocab_size=50688, hidden_size=5120, intermediate_size=20480, num_hidden_layers=36,
    num_attention_heads=40, rotary_pct=0.25, use_parallel_residual=True,
)  # fmt: skip
_NEOX_20B = dict(
    vocab_size=50432, hidden_size=6144, intermediate_size=24576, num_hidden_layers=44,
    num_attention_heads=64, rotary_pct=0.25, hidden_act="gelu_fast",
)  # fmt: skip
_GEMMA2_9B = dict(
    vocab_size=256000, hidden_size=3584, intermediate_size=14336, num_hidden_layers=42,
    num_attention_heads=16, num_key_value_heads=8, head_dim=256, sliding_window=4096,
)  # fmt: skip
_LLAMA_3_8B = dict(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8,
)  # fmt: skip
_QWEN25_7B = dict(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
    num_attention_heads=28, num_key_value_heads=4,
)  # fmt: skip
_QWEN25_HALF_B = dict(
    vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
    num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
_QWEN3_8B = dict(
    vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
    num_attention_heads=32, num_key_value_heads=8, head_dim=128,
)  # fmt: skip
_QWEN3_0_6B = dict(
    vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
    num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
)  # fmt: skip
_QWEN3_30B_A3B = dict(
    vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
    num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128,
    num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True,
)  # fmt: skip
_QWEN3_235B_A22B = dict(
    vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=94,
    num_attention_heads=64, num_key_value_heads=4, head_dim=128, num_experts=128,
    num_experts_per_tok=8, moe_intermediate_size=1536, norm_topk_prob=True,
)  # fmt: skip
_MISTRAL_7B = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8,
)  # fmt: skip
_MIXTRAL_8X7B = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
)  # fmt: skip
_MIXTRAL_8X22B = dict(
    vocab_size=32000, hidden_size=6144, intermediate_size=16384, num_hidden_layers=56,
    num_attention_heads=48, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
)  # fmt: skip
_GPT_OSS_20B = dict(
    vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=24,
    num_attention_heads=64, num_key_value_heads=8, head_dim=64, num_local_experts=32,
    num_experts_per_tok=4, quantization_config=dict(
        quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn"]
    ),
)  # fmt: skip
_GPT_OSS_120B = dict(num_hidden_layers=36, num_local_experts=128)
_MISTRAL_NEMO = dict(
    vocab_size=131072, hidden_size=5120, intermediate_size=14336, num_hidden_layers=40,
    num_attention_heads=32, num_key_value_heads=8, head_dim=128, sliding_window=None,
)  # fmt: skip
_PHI_1_5 = dict(
    vocab_size=51200, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24,
    num_attention_heads=32,
)  # fmt: skip
_PHI_2 = dict(
    vocab_size=51200, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32,
    num_attention_heads=32, partial_rotary_factor=0.4,
)  # fmt: skip
_PHI_3_MINI = dict(
    vocab_size=32064, hidden_size=3072, intermediate_size=8192, num_hidden_layers=32,
    num_attention_heads=32, sliding_window=2047,
)  # fmt: skip
_PHI_4 = dict(
    vocab_size=100352, hidden_size=5120, intermediate_size=17920, num_hidden_layers=40,
    num_attention_heads=40, num_key_value_heads=10, rope_theta=250000,
)  # fmt: skip
_PHI_4_MINI = dict(
    vocab_size=200064, hidden_size=3072, intermediate_size=8192, num_hidden_layers=32,
    num_attention_heads=24, num_key_value_heads=8, partial_rotary_factor=0.75,
    tie_word_embeddings=True, sliding_window=262144, max_position_embeddings=131072,
    original_max_position_embeddings=4096,
    rope_scaling=dict(type="longrope", short_factor=[1.0] * 48, long_factor=[2.0] * 48),
)  # fmt: skip
_GEMMA_2B = dict(
    vocab_size=256000, hidden_size=2048, intermediate_size=16384, num_hidden_layers=18,
    num_attention_heads=8, num_key_value_heads=1,
)  # fmt: skip
_GEMMA_7B = dict(
    vocab_size=256000, hidden_size=3072, intermediate_size=24576, num_hidden_layers=28,
    num_attention_heads=16, num_key_value_heads=16,
)  # fmt: skip
_GEMMA3_1B = dict(
    vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26,
    num_attention_heads=4, num_key_value_heads=1, head_dim=256, sliding_window=512,
)  # fmt: skip
_STABLELM_3B = dict(
    vocab_size=50304, hidden_size=2560, intermediate_size=6912, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=32,
)  # fmt: skip
_STABLELM_2_1_6B = dict(
    vocab_size=100352, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24,
    num_attention_heads=32, num_key_value_heads=32, use_qkv_bias=True,
)  # fmt: skip
_STABLELM_2_12B = dict(
    vocab_size=100352, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
    num_attention_heads=32, num_key_value_heads=8, use_parallel_residual=True,
    qk_layernorm=True,
)  # fmt: skip
_STARCODER2_3B = dict(
    vocab_size=49152, hidden_size=3072, intermediate_size=12288, num_hidden_layers=30,
    num_attention_heads=24, num_key_value_heads=2, sliding_window=4096,
)  # fmt: skip
_STARCODER2_15B = dict(
    vocab_size=49152, hidden_size=6144, intermediate_size=24576, num_hidden_layers=40,
    num_attention_heads=48, num_key_value_heads=4, sliding_window=4096, tie_word_embeddings=False,
)  # fmt: skip
_OLMO2_7B = dict(
    vocab_size=100352, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32,
)  # fmt: skip
_OLMO2_32B = dict(
    vocab_size=100352, hidden_size=5120, intermediate_size=27648, num_hidden_layers=64,
    num_attention_heads=40, num_key_value_heads=8,
)  # fmt: skip
_GRANITE_8B = dict(
    vocab_size=49155, hidden_size=4096, intermediate_size=12800, num_hidden_layers=40,
    num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True,
    attention_multiplier=0.0078125, embedding_multiplier=12.0, logits_scaling=16.0,
    residual_multiplier=0.22,
)  # fmt: skip
_SMOLLM3_3B = dict(
    vocab_size=128256, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
    num_attention_heads=16, num_key_value_heads=4, max_window_layers=28, pretraining_tp=2,
)  # fmt: skip
_COMMAND_R = dict(
    vocab_size=256000, hidden_size=8192, intermediate_size=22528, num_hidden_layers=40,
    num_attention_heads=64, max_position_embeddings=8192, model_max_length=131072,
)  # fmt: skip
_COMMAND_R_PLUS = dict(
    vocab_size=256000, hidden_size=12288, intermediate_size=33792, num_hidden_layers=64,
    num_attention_heads=96, num_key_value_heads=8, use_qk_norm=True,
)  # fmt: skip
_COMMAND_R7B = dict(
    vocab_size=256000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, head_dim=128,
)  # fmt: skip
_COMMAND_A = dict(
    vocab_size=256000, hidden_size=12288, intermediate_size=36864, num_hidden_layers=64,
    num_attention_heads=96, num_key_value_heads=8,
)  # fmt: skip
_GLM4_9B = dict(
    vocab_size=151552, hidden_size=4096, intermediate_size=13696, num_hidden_layers=40,
    num_attention_heads=32, num_key_value_heads=2,
)  # fmt: skip
_GLM4_32B = dict(
    vocab_size=151552, hidden_size=6144, intermediate_size=23040, num_hidden_layers=61,
    num_attention_heads=48, num_key_value_heads=2, attention_bias=False,
)  # fmt: skip
# Baichuan-7B has no `model_max_length`, and 13B no `max_position_embeddings`.
_BAICHUAN_7B = dict(
    vocab_size=64000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, max_position_embeddings=4096,
)  # fmt: skip
_BAICHUAN_13B = dict(
    vocab_size=64000, hidden_size=5120, intermediate_size=13696, num_hidden_layers=40,
    num_attention_heads=40, model_max_length=4096,
)  # fmt: skip
_BLOOM_7B = dict(vocab_size=250880, n_embed=4096, n_layer=30, num_attention_heads=32, pretraining_tp=4)
_FALCON_7B = dict(vocab_size=65024, hidden_size=4544, num_hidden_layers=32, num_attention_heads=71)
_FALCON_40B = dict(
    vocab_size=65024, hidden_size=8192, num_hidden_layers=60, num_attention_heads=128, num_kv_heads=8,
    new_decoder_architecture=True,
)  # fmt: skip
_FALCON_11B = dict(
    num_attention_heads=32, hidden_size=4096, num_ln_in_parallel_attn=1, tie_word_embeddings=False,
    ffn_hidden_size=16384, ff_factor=4, max_position_embeddings=8192, rope_theta=500042.0,
)  # fmt: skip
_FALCON_RW = dict(
    vocab_size=50304, hidden_size=2048, num_hidden_layers=24, num_attention_heads=32, alibi=True,
    multi_query=False, parallel_attn=False, bias=True,
)  # fmt: skip
_STARCODER = dict(
    vocab_size=49152, n_embd=6144, n_layer=40, n_head=48, n_inner=24576, n_positions=8192,
    activation_function="gelu", multi_query=True,
)  # fmt: skip
_GPTJ_6B = dict(vocab_size=50400, n_embd=4096, n_layer=28, n_head=16, n_positions=2048, rotary_dim=64)
_MPT_7B = dict(vocab_size=50432, d_model=4096, n_layers=32, n_heads=32, attn_config={"alibi": True})
_MPT_30B = {**_MPT_7B, "d_model": 7168, "n_layers": 48, "n_heads": 64, "max_seq_len": 8192}
_OPT_125M = dict(
    vocab_size=50272, hidden_size=768, ffn_dim=3072, num_hidden_layers=12, num_attention_heads=12,
    word_embed_proj_dim=768,
)  # fmt: skip
_OPT_350M = dict(
    vocab_size=50272, hidden_size=1024, ffn_dim=4096, num_hidden_layers=24, num_attention_heads=16,
    word_embed_proj_dim=512, do_layer_norm_before=False,
)  # fmt: skip
_GALACTICA_7B = dict(
    vocab_size=50000, hidden_size=4096, ffn_dim=16384, num_hidden_layers=32, num_attention_heads=32,
    word_embed_proj_dim=4096, activation_function="gelu", learned_embeddings=True, scale_embeddings=False,
)  # fmt: skip
_BLOOM_3B = dict(vocab_size=250880, n_embed=2560, n_layer=30, num_attention_heads=32)
_LLAMA_32_1B = dict(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
    num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip
_LLAMA_32_3B = dict(
    vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
    num_attention_heads=24, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
)  # fmt: skip
_OPEN_LLAMA_3B = dict(
    vocab_size=32000, hidden_size=3200, intermediate_size=8640, num_hidden_layers=26,
    num_attention_heads=32,
)  # fmt: skip
_QWEN3_4B = dict(
    vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
    num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
)  # fmt: skip
_OPT_27B = dict(
    vocab_size=50272, hidden_size=2560, ffn_dim=10240, num_hidden_layers=32,
    num_attention_heads=32, max_position_embeddings=2048, word_embed_proj_dim=2560,
)  # fmt: skip
_DOLLY_3B = dict(
    vocab_size=50280, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32,
    num_attention_heads=32, rotary_pct=0.25,
)  # fmt: skip
# In the order of the alphabet.
PUBLISHED: Mapping[str, Published] = {
    "BaiChuanForCausalLM": Published(
        sizes={"Baichuan-7B": (_BAICHUAN_7B, 7_000_559_616)},
        buffers=("layers.0.self_attn.rotary_emb.inv_freq",),
        wrong=(
            ({"hidden_size": 5120}, "a Baichuan of hidden_size 5120 has ALiBi"),
            ({"rope_theta": 1e6}, "rope_theta=1000000.0, which .* not know for BaiChuanForCausalLM"),
        ),
    ),
    "BaichuanForCausalLM": Published(
        sizes={
            "Baichuan-13B": (_BAICHUAN_13B, 13_264_901_120),
            "Baichuan2-7B": ({**_BAICHUAN_7B, "vocab_size": 125696}, 7_505_973_248),
            "Baichuan2-13B": ({**_BAICHUAN_13B, "vocab_size": 125696}, 13_896_668_160),
        },
        buffers=("layers.0.self_attn.rotary_emb.inv_freq",),
    ),
    "BloomForCausalLM": Published(
        sizes={
            "BLOOM-3B": (_BLOOM_3B, 3_002_557_440),
            "BLOOM-7B1": (_BLOOM_7B, 7_069_016_064),
            "BLOOM": (
                {**_BLOOM_7B, "n_embed": 14336, "n_layer": 70, "num_attention_heads": 112},
                176_247_271_424,
            ),
        },
        unsupported=(({"n_inner": 100}, "n_inner must be None or 256, got 100"),),
        wrong=(({"n_embed": 128}, "one value for hidden_size and n_embed, got .*64.*128"),),
    ),
    "Cohere2ForCausalLM": Published(
        sizes={"Command R7B": (_COMMAND_R7B, 8_028_033_024), "Command A": (_COMMAND_A, 111_057_580_032)},
        buffers=("layers.0.self_attn.rotary_emb.inv_freq",),
        unsupported=(
            ({"order_of_interleaved_layers": "global_attn_first"}, "must be None or 'local_attn_first'"),
            ({"position_embedding_type": "alibi"}, "position_embedding_type must be None or 'rope_gptj'"),
            ({"rotary_pct": 0.5}, "rotary_pct must be None or 1.0, got 0.5"),
            ({"use_embedding_sharing": False}, "use_embedding_sharing must be None or True"),
            ({"use_gated_activation": False}, "use_gated_activation must be None or True"),
            ({"use_parallel_block": False}, "use_parallel_block must be None or True"),
            ({"use_parallel_embedding": True}, "use_parallel_embedding must be None or False"),
            ({"use_qk_norm": True}, "use_qk_norm must be None or False"),
        ),
        wrong=(
            (
                {"sliding_window_pattern": 4, "layer_switch": 2},
                "one value for sliding_window_pattern and layer_switch",
            ),
        ),
    ),
    "CohereForCausalLM": Published(
        sizes={"Command R": (_COMMAND_R, 34_980_831_232), "Command R+": (_COMMAND_R_PLUS, 103_810_674_688)},
        buffers=("layers.0.self_attn.rotary_emb.inv_freq",),
        unsupported=(({"sliding_window": 4096}, "sliding_window must be None, got 4096"),),
        wrong=(({"use_parallel_block": True}, "use_parallel_block=True, which .* for CohereForCausalLM"),),
    ),
    "FalconForCausalLM": Published(
        sizes={
            "Falcon-7B": (_FALCON_7B, 6_921_720_704),
            "Falcon-40B": (_FALCON_40B, 41_303_293_952),
            "Falcon-180B": (
                {**_FALCON_40B, "hidden_size": 14848, "num_hidden_layers": 80, "num_attention_heads": 232},
                178_557_088_768,
            ),
            "Falcon-11B": ({**_FALCON_40B, **_FALCON_11B}, 11_102_822_400),
            "Falcon-RW-1B": (_FALCON_RW, 1_311_625_216),
        },
        buffers=("h.0.self_attention.rotary_emb.inv_freq",),
        unsupported=(
            ({"apply_residual_connection_post_layernorm": True}, "apply_residual_.* must be None or False"),
            ({"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn must be None or 1, got 2"),
            ({"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn must be .* True"),
        ),
        wrong=(({"n_head": 8}, "one value for num_attention_heads and n_head, got .*7.*8"),),
    ),
    "GPT2LMHeadModel": Published(
        sizes={
            "GPT-2": (_GPT2, 124_439_808),
            "GPT-2 XL": ({**_GPT2, "n_embd": 1600, "n_layer": 48, "n_head": 25}, 1_557_611_200),
        },
        buffers=("h.0.attn.bias", "h.0.attn.masked_bias"),
        unsupported=(
            ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx .*False, got True"),
            ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn must be None or False, got True"),
            ({"add_cross_attention": True}, "add_cross_attention must be None or False, got True"),
            ({"activation_function": "mish"}, "activation_function must be one of silu.* got 'mish'"),
        ),
        wrong=(({"hidden_size": 64}, "one value for n_embd and hidden_size, got .*60.*64"),),
    ),
    "GPTBigCodeForCausalLM": Published(
        sizes={
            "StarCoder": (_STARCODER, 15_517_456_384),
            "SantaCoder": (
                dict(vocab_size=49280, n_embd=2048, n_layer=24, n_head=16, n_inner=8192, n_positions=2048),
                1_124_886_528,
            ),
        },
        buffers=("h.0.attn.bias", "h.0.attn.masked_bias"),
        unsupported=(
            ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx .*False, got True"),
            ({"num_key_value_heads": 5}, "num_key_value_heads must be None or 1, got 5"),
        ),
    ),
    "GPTJForCausalLM": Published(
        sizes={"GPT-J-6B": (_GPTJ_6B, 6_050_882_784)},
        buffers=("h.0.attn.bias", "h.0.attn.masked_bias"),
        unsupported=(
            ({"rotary": False}, "rotary must be None or True, got False"),
            ({"scale_attn_weights": False}, "scale_attn_weights must be None or True, got False"),
        ),
        wrong=(({"rotary_dim": 32}, "rotary_dim must be at most head_dim, got 32 and 16"),),
    ),
    "GPTNeoXForCausalLM": Published(
        sizes={
            "Dolly-v2-3B": (_DOLLY_3B, 2_775_086_080),
            "Pythia-12B": (_PYTHIA, 11_846_072_320),
            "GPT-NeoX-20B": (_NEOX_20B, 20_554_567_680),
        },
        buffers=(
            "layers.0.attention.bias",
            "layers.0.attention.masked_bias",
            "layers.0.attention.rotary_emb.inv_freq",
        ),
        wrong=(
            ({"rope_ratio": 2}, "rope_ratio=2, which .* not know for GPTNeoXForCausalLM"),
            ({"rotary_pct": 3.0, "rope_parameters": None}, "rotary_dim must be at most head_dim"),
        ),
    ),
    "Gemma2ForCausalLM": Published(
        sizes={"Gemma-2-9B": (_GEMMA2_9B, 9_241_705_984)},
        buffers=("layers.0.self_attn.rotary_emb.inv_freq",),
        unsupported=(
            ({"use_bidirectional_attention": True}, "use_bidirectional_attention must be None or False"),
            ({"layer_types": ["linear_attention"] * 4}, "sliding_attention, got 'linear_attention'"),
        ),
        wrong=(({"layer_types": ["full_attention"]}, "layer_types must name 4 layers, got 1"),),
    ),
    "Gemma3ForCausalLM": Published(
        sizes={"Gemma-3-1B": (_GEMMA3_1B, 999_885_952)},
        buffers=("layers.0.self_attn.rotary_emb.inv_freq",),
        unsupported=(
            ({"use_bidirectional_attention": True}, "use_bidirectional_attention must be None or False"),
            ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping must be None, got 50.0"),
            ({"layer_types": ["linear_attention"] * 4}, "sliding_attention, got 'linear_attention'"),
        ),
        wrong=(
            (
                {"rope_parameters": {"rope_theta": 1e6}},
                "sliding_attention and full_attention, got rope_theta",
            ),
            ({"rope_parameters": {"full_attention": 1}}, "must hold full_attention as a JSON object, got 1"),
        ),
    ),
    "GemmaForCausalLM": Published(
        sizes={"Gemma-2B": (_GEMMA_2B, 2_506_172_416), "Gemma-7B": (_GEMMA_7B, 8_537_680_896)},
        buffers=("layers.0.self_attn.rotary_emb.inv_freq",),
        unsupported=(
            ({"use_bidirectional_attention": True}, "use_bidirectional_attention must be None or False"),
            ({"hidden_activation": "mish"}, "hidden_activation must be one of silu.* got 'mish'"),
        ),
    ),
    "Glm4ForCausalLM": Published(
        sizes={"GLM-4-9B-0414": (_GLM4_9B, 9_400_279_040), "GLM-4-32B-0414": (_GLM4_32B, 32_566_081_536)},
        buffers=("layers.0.self_attn.rotary_emb.inv_freq",),
        unsupported=(({"hidden_act": "mish"}, "hidden_act must be one of silu.* got 'mish'"),),
    ),
    "GlmForCausalLM": Published(
        sizes={"GLM-4-9B": (_GLM4_9B, 9_399_951_360)},
        buffers=("layers.0.self_attn.rotary_emb.inv_freq",),
        unsupported=(({"sliding_window": 4096}, "sliding_window must be None, got 4096"),),
        wrong=(({"rope_ratio": 500}, "rope_ratio=500, which .* not know for GlmForCausalLM"),),
    ),
    "GptOssForCausalLM": Published(
        sizes={
            "gpt-oss-20b": (_GPT_OSS_20B, 20_914_757_184),
            "gpt-oss-120b": ({**_GPT_OSS_20B, **_GPT_OSS_120B}, 116_829_156_672),
        },
        buffers=("layers.0.self_attn.rotary_emb.inv_freq",),
        unsupported=(
            ({"hidden_act": "gelu"}, "hidden_act must be None or 'silu' or 'swish', got 'gelu'"),
            ({"quantization_config": {"quant_method": "gptq"}}, "quant_method must be 'mxfp4', got 'gptq'"),
            ({"layer_types": ["chunked_attention"] * 4}, "sliding_attention, got 'chunked_attention'"),
        ),
        wrong=(
            ({"experts_per_token": 3}, "one value for num_experts_per_tok and experts_per_token"),
            ({"swiglu_limit": 0}, "swiglu_limit as a finite number > 0, got 0"),
            (
                {"quantization_config": {"quant_method": "mxfp4", "bits": 3}},
                "mxfp4 knows modules_to_not_convert, got bits",
            ),
            (
                {"quantization_config": {"quant_method": "mxfp4"}},
                "intermediate_size that are multiples of 32, got 96 and 20",
            ),
        ),
    ),
    "GraniteForCausalLM": Published(
        sizes={"Granite-3.0-8B": (_GRANITE_8B, 8_170_848_256)},
        buffers=("layers.0.self_attn.rotary_emb.inv_freq",),
        unsupported=(({"sliding_window": 4096}, "sliding_window must be None, got 4096"),),
        wrong=(({"logits_scaling": 0}, "logits_scaling as a finite number > 0, got 0"),),
    ),
    "LlamaForCausalLM": Published(
        sizes={
            "OpenLLaMA-3B": (_OPEN_LLAMA_3B, 3_426_473_600),
            "Llama-3.2-3B": (_LLAMA_32_3B, 3_212_749_824),
            "Llama-3.2-1B": (_LLAMA_32_1B, 1_235_814_400),
            "Llama-3-8B": (_LLAMA_3_8B, 8_030_261_248),
        },
        buffers=("layers.0.self_attn.rotary_emb.inv_freq",),
        unsupported=(({"sliding_window": 4096}, "sliding_window must be None, got 4096"),),
    ),
    "MistralForCausalLM": Published(
        sizes={
            "Mistral-7B": (_MISTRAL_7B, 7_241_732_096),
            "Mistral-Nemo": (_MISTRAL_NEMO, 12_247_782_400),
        },
        buffers=("layers.0.self_attn.rotary_emb.inv_freq",),
        wrong=(
            ({"sliding_window": 0}, "sliding_window as an integer > 0, got 0"),
            ({"attention_bias": True}, "attention_bias=True, which .* not know for MistralForCausalLM"),
        ),
    ),
    "MixtralForCausalLM": Published(
        sizes={
            "Mixtral-8x7B": (_MIXTRAL_8X7B, 46_702_792_704),
            "Mixtral-8x22B": (_MIXTRAL_8X22B, 140_620_634_112),
        },
        buffers=("layers.0.self_attn.rotary_emb.inv_freq",),
        unsupported=(({"hidden_act": "gelu"}, "hidden_act must be None or 'silu' or 'swish', got 'gelu'"),),
        wrong=(
            ({"num_experts_per_tok": 7}, "num_choices must be in 1..num_experts, 6; got 7"),
            ({"attention_bias": True}, "attention_bias=True, which .* not know for MixtralForCausalLM"),
        ),
    ),
    "MptForCausalLM": Published(
        sizes={"MPT-7B": (_MPT_7B, 6_649_286_656), "MPT-30B": (_MPT_30B, 29_957_200_896)},
        unsupported=(
            ({"norm_type": "rmsnorm"}, "norm_type must be .*'low_precision_layernorm', got 'rmsnorm'"),
            ({"attn_config": {"prefix_lm": True}}, "prefix_lm must be None or False, got True"),
            ({"attn_config": {"attn_uses_sequence_id": True}}, "attn_uses_sequence_id must be None or False"),
            ({"attn_config": {"attn_type": "other"}}, "attn_type must be .* got 'other'"),
        ),
        wrong=(
            ({"attn_config": {"rope": True}}, "rope=True, which .* not know for attn_config of MptFor"),
            ({"logit_scale": "other"}, "logit_scale as a finite number, got 'other'"),
        ),
    ),
    "OPTForCausalLM": Published(
        sizes={
            "OPT-2.7B": (_OPT_27B, 2_651_596_800),
            "OPT-125M": (_OPT_125M, 125_239_296),
            "OPT-350M": (_OPT_350M, 331_196_416),
            "Galactica-6.7B": (_GALACTICA_7B, 6_657_359_872),
        },
        buffers=("decoder.version",),
        unsupported=(
            ({"learned_embeddings": False}, "learned_embeddings must be None or True, got False"),
            ({"scale_embeddings": True}, "scale_embeddings must be None or False, got True"),
        ),
    ),
    "Olmo2ForCausalLM": Published(
        sizes={"OLMo-2-7B": (_OLMO2_7B, 7_298_617_344), "OLMo-2-32B": (_OLMO2_32B, 32_234_279_936)},
        buffers=("layers.0.self_attn.rotary_emb.inv_freq",),
        unsupported=(({"sliding_window": 4096}, "sliding_window must be None, got 4096"),),
        wrong=(({"clip_qkv": 8.0}, "clip_qkv=8.0, which .* not know for Olmo2ForCausalLM"),),
    ),
    "Phi3ForCausalLM": Published(
        sizes={
            "Phi-3-mini": (_PHI_3_MINI, 3_821_079_552),
            "Phi-4": (_PHI_4, 14_659_507_200),
            "Phi-4-mini": (_PHI_4_MINI, 3_836_021_760),
        },
        buffers=("layers.0.self_attn.rotary_emb.inv_freq",),
        unsupported=(
            ({"lm_head_bias": True}, "lm_head_bias must be None or False, got True"),
            ({"mlp_bias": True}, "mlp_bias must be None or False, got True"),
            ({"attention_bias": True}, "attention_bias must be None or False, got True"),
            ({"full_attn_mod": 2}, "full_attn_mod must be None or 1, got 2"),
            ({"interpolate_factor": 4}, "interpolate_factor must be None or 1, got 4"),
        ),
        wrong=(
            (
                {
                    "rope_parameters": {
                        "rope_type": "longrope",
                        "short_factor": [1.0] * 8,
                        "long_factor": [1.0] * 8,
                    },
                    "original_max_position_embeddings": None,
                },
                "must hold original_max_position_embeddings as an integer > 0, got None",
            ),
        ),
    ),
    "PhiForCausalLM": Published(
        sizes={"Phi-1.5": (_PHI_1_5, 1_418_270_720), "Phi-2": (_PHI_2, 2_779_683_840)},
        buffers=("layers.0.self_attn.rotary_emb.inv_freq",),
        unsupported=(({"hidden_act": "mish"}, "hidden_act must be one of silu.* got 'mish'"),),
        wrong=(
            ({"sliding_window_size": 16}, "sliding_window_size=16, which .* not know for PhiForCausalLM"),
        ),
    ),
    "Qwen2ForCausalLM": Published(
        sizes={
            "Qwen2.5-7B": (_QWEN25_7B, 7_615_616_512),
            "Qwen2.5-0.5B": (_QWEN25_HALF_B, 494_032_768),
        },
        buffers=("layers.0.self_attn.rotary_emb.inv_freq",),
        unsupported=(
            ({"use_mrope": True}, "use_mrope must be None or False, got True"),
            (
                {"dual_chunk_attention_config": {"chunk_size": 8192}},
                "dual_chunk_attention_config must be None",
            ),
            ({"layer_types": ["chunked_attention"] * 3}, "sliding_attention, got 'chunked_attention'"),
        ),
        wrong=(
            (
                {"layer_types": ["sliding_attention"] * 3, "sliding_window": 16},
                "needs use_sliding_window=true .* got use_sliding_window=False and sliding_window=16",
            ),
        ),
    ),
    "Qwen3ForCausalLM": Published(
        sizes={
            "Qwen3-4B": (_QWEN3_4B, 4_022_468_096),
            "Qwen3-8B": (_QWEN3_8B, 8_190_735_360),
            "Qwen3-0.6B": (_QWEN3_0_6B, 596_049_920),
        },
        buffers=("layers.0.self_attn.rotary_emb.inv_freq",),
        unsupported=(({"use_mrope": True}, "use_mrope must be None or False, got True"),),
        wrong=(({"mlp_bias": True}, "mlp_bias=True, which .* not know for Qwen3ForCausalLM"),),
    ),
    "Qwen3MoeForCausalLM": Published(
        sizes={
            "Qwen3-30B-A3B": (_QWEN3_30B_A3B, 30_532_122_624),
            "Qwen3-235B-A22B": (_QWEN3_235B_A22B, 235_093_634_560),
        },
        buffers=("layers.0.self_attn.rotary_emb.inv_freq",),
        unsupported=(
            ({"hidden_act": "gelu"}, "hidden_act must be None or 'silu' or 'swish', got 'gelu'"),
            ({"layer_types": ["full_attention"] * 3}, "layer_types must be None"),
        ),
        wrong=(
            ({"mlp_only_layers": [-1]}, r"mlp_only_layers as a list of integers >= 0, got \[-1\]"),
            ({"num_experts_per_tok": 13}, "num_choices must be in 1..num_experts, 12; got 13"),
            ({"n_shared_experts": 1}, "n_shared_experts=1, which .* not know for Qwen3MoeForCausalLM"),
        ),
    ),
    "SmolLM3ForCausalLM": Published(
        sizes={"SmolLM3-3B": (_SMOLLM3_3B, 3_075_098_624)},
        buffers=("layers.0.self_attn.rotary_emb.inv_freq",),
        unsupported=(
            ({"layer_types": ["linear_attention"] * 4}, "full_attention or sliding_attention, got 'linear"),
        ),
        wrong=(({"no_rope_layers": [1, 0, 1]}, "no_rope_layers must name 4 layers, got 3"),),
    ),
    "StableLmForCausalLM": Published(
        sizes={
            "StableLM-3B": (_STABLELM_3B, 2_795_443_200),
            "StableLM-2-1.6B": (_STABLELM_2_1_6B, 1_644_515_328),
            # As transformers counts them: 419,840 less than its card says.
            "StableLM-2-12B": (_STABLELM_2_12B, 12_143_185_920),
        },
        buffers=("layers.0.self_attn.rotary_emb.inv_freq",),
        unsupported=(({"sliding_window": 16}, "sliding_window must be None, got 16"),),
        wrong=(({"attention_bias": True}, "attention_bias=True, which .* not know for StableLmForCausalLM"),),
    ),
    "Starcoder2ForCausalLM": Published(
        sizes={
            "StarCoder2-3B": (_STARCODER2_3B, 3_030_371_328),
            "StarCoder2-15B": (_STARCODER2_15B, 15_957_889_024),
        },
        buffers=("layers.0.self_attn.rotary_emb.inv_freq",),
        unsupported=(
            ({"mlp_type": "gated"}, "mlp_type must be None or 'default', got 'gated'"),
            ({"norm_type": "rms_norm"}, "norm_type must be None or 'layer_norm', got 'rms_norm'"),
            ({"scale_attn_weights": False}, "scale_attn_weights must be None or True, got False"),
        ),
    ),
}
