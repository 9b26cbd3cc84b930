"""The architectures of 2023 beside Llama, in every variant that was published.

Where transformers does not ship the published model, `make_golden_restated.py` states it.
"""

from families import Config, Family, renamed, rope, v4

SUMMARY: Config = {  # keys of GPT-2's ancestry that say nothing about generation
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
}

BAICHUAN: Config = dict(
    model_type="baichuan",
    vocab_size=160,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
    hidden_act="silu",
    initializer_range=0.02,
    rms_norm_eps=1e-6,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=False,
    torch_dtype="float32",
    transformers_version="4.29.1",
    use_cache=True,
    auto_map={"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"},
)
BAICHUAN_7B = Family(
    architecture="BaiChuanForCausalLM",
    base=BAICHUAN,
    cases={"baichuan_7b": {}},
    old=dict,
)
_ALIBI = {key: BAICHUAN[key] for key in BAICHUAN if key != "max_position_embeddings"} | {
    "num_attention_heads": 5,  # 13B has 40: not a power of two either
    "hidden_size": 40,
    "model_max_length": 128,
}
BAICHUAN_13B = Family(
    architecture="BaichuanForCausalLM",
    base=_ALIBI,
    cases={
        "baichuan_13b": {"num_hidden_layers": 3},
        # The vocabulary is how Baichuan 2 is known: only this one has the normalised head.
        "baichuan2_13b": {"vocab_size": 125696, "z_loss_weight": 0},
    },
    old=dict,
)
BAICHUAN2_7B = Family(
    architecture="BaichuanForCausalLM",
    base=BAICHUAN,
    cases={
        "baichuan2_7b": {
            "vocab_size": 125696,
            "hidden_size": 32,
            "tokenizer_class": "BaichuanTokenizer",
            "model_max_length": 128,
            "z_loss_weight": 0,
        }
    },
    old=dict,
)


def _old_bloom(config: Config) -> Config:
    old = renamed(v4(config), {"hidden_size": "n_embed", "n_head": "num_attention_heads"})
    return old | dict(
        attention_softmax_in_fp32=True,
        bias_dropout_fusion=True,
        masked_softmax_fusion=True,
        n_inner=None,
        offset_alibi=100,
        seq_length=2048,
        skip_bias_add=True,
        skip_bias_add_qkv=False,
        unk_token_id=0,
    )


# ALiBi multiplies the key's position, not the distance: softmax cannot tell. GELU is the tanh form.
BLOOM = Family(
    architecture="BloomForCausalLM",
    base=dict(
        vocab_size=150,
        hidden_size=64,
        n_layer=3,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    ),
    cases={
        "bloom": {},
        "bloom_6_heads": {"hidden_size": 48, "n_head": 6},
        "bloom_12_heads": {"hidden_size": 96, "n_head": 12},  # slopes that are no powers of two
        "bloom_residual_post_layernorm": {"apply_residual_connection_post_layernorm": True, "n_head": 8},
    },
    old=_old_bloom,
    draws={"embedding_scale": 0.2},
)


def _old_falcon(config: Config) -> Config:
    """As RWForCausalLM; that of 40B told its architecture by n_head_kv and model_type alone."""
    dropped = (
        "num_kv_heads rope_theta rope_scaling max_position_embeddings activation ffn_hidden_size".split()
    )
    dropped += ["num_ln_in_parallel_attn", "tie_word_embeddings", "new_decoder_architecture"]
    old = renamed(v4(config), {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer"})
    old = {key: old[key] for key in old if key not in dropped} | {
        "architectures": ["RWForCausalLM"],
        "model_type": "RefinedWebModel",
        "apply_residual_connection_post_layernorm": False,
    }
    if config["new_decoder_architecture"]:
        del old["multi_query"]
        old |= {"model_type": "RefinedWeb", "n_head_kv": config["num_kv_heads"]}
    return old


FALCON_BASE: Config = dict(
    vocab_size=140,
    hidden_size=56,
    num_hidden_layers=3,
    num_attention_heads=7,
    max_position_embeddings=2048,
    rope_parameters=rope(),
    bos_token_id=11,
    eos_token_id=11,
)
RW: Config = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
# transformers rounds to bfloat16 the slopes and then slope × position; it scales scores and ALiBi together
# by 1/√head_dim. Slopes of up to 8 heads are powers of two: here nothing is rounded. Its eager attention adds
# ALiBi twice, once with the mask; the published code and transformers' other kernels once.
FALCON = Family(
    architecture="FalconForCausalLM",
    base=FALCON_BASE,
    cases={
        "falcon_mqa": {},
        "falcon_mqa_alibi": {"alibi": True},
        "falcon_gqa": {
            "new_decoder_architecture": True,
            "hidden_size": 64,
            "num_attention_heads": 8,
            "num_kv_heads": 2,
        },
        "falcon_rw": RW | {"num_attention_heads": 4, "hidden_size": 64},
        "falcon_rw_6_heads": RW | {"num_attention_heads": 6, "hidden_size": 48},
    },
    old=_old_falcon,
    draws={"embedding_scale": 0.2},
    attention="sdpa",
)
FALCON_11B = Family(  # younger than RWForCausalLM
    architecture="FalconForCausalLM",
    base=FALCON_BASE,
    cases={
        "falcon_gqa_one_norm": {
            "new_decoder_architecture": True,
            "num_ln_in_parallel_attn": 1,
            "num_attention_heads": 8,
            "num_kv_heads": 4,
            "hidden_size": 64,
            "ffn_hidden_size": 200,
            "rope_parameters": rope(theta=500042.0),
            "tie_word_embeddings": False,
        }
    },
    old=lambda config: v4(config, ff_factor=4),
)

GPT2 = Family(
    architecture="GPT2LMHeadModel",
    base=dict(
        vocab_size=131,
        n_positions=96,
        n_embd=60,
        n_layer=3,
        n_head=5,
        bos_token_id=1,
        eos_token_id=1,
    ),
    cases={
        "gpt2": {},
        "gpt2_n_inner": {"n_inner": 100, "n_head": 4, "layer_norm_epsilon": 1e-3},
    },
    old=lambda config: v4(
        config,
        "torch_dtype",
        **SUMMARY,
        n_ctx=96,
        task_specific_params={"text-generation": {"do_sample": True}},
    ),
)


def _old_neox(config: Config) -> Config:
    old = v4(config, "rope_scaling", "attention_bias")
    return renamed(old, {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"})


GPT_NEOX = Family(
    architecture="GPTNeoXForCausalLM",
    base=dict(
        vocab_size=144,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        max_position_embeddings=128,
        rope_parameters=rope(partial_rotary_factor=0.25),
        bos_token_id=0,
        eos_token_id=0,
    ),
    cases={
        "gpt_neox": {},
        "gpt_neox_sequential": {"use_parallel_residual": False},
        "gpt_neox_full_rotary": {
            "rope_parameters": rope(theta=25000.0, partial_rotary_factor=1.0),
            "hidden_act": "gelu_fast",  # x/2 (1 + tanh(0.79788456 x (1 + 0.044715 x²))): of the 20B
        },
        # 20B's and many others' heads: 24 channels, of which 6 turn.
        "gpt_neox_head_dim_24": {
            "hidden_size": 96,
            "use_parallel_residual": False,
            "hidden_act": "gelu_fast",
        },
    },
    old=_old_neox,
)


def _old_bigcode(config: Config) -> Config:
    return v4(
        config,
        "num_key_value_heads",
        "add_cross_attention",
        **SUMMARY,
        attention_softmax_in_fp32=True,
        scale_attention_softmax_in_fp32=True,
        inference_runner=0,
        max_batch_size=None,
        max_sequence_length=None,
        pad_key_length=True,
        pre_allocate_kv_cache=False,
        validate_runner_input=True,
    )


GPT_BIGCODE = Family(
    architecture="GPTBigCodeForCausalLM",
    base=dict(
        vocab_size=133,
        n_positions=96,
        n_embd=60,
        n_layer=3,
        n_head=5,
        bos_token_id=0,
        eos_token_id=0,
    ),
    cases={
        "gpt_bigcode": {},  # SantaCoder's GELU, of tanh
        "gpt_bigcode_mha": {"multi_query": False},  # q, k and v by head: not GPT-2's three blocks
        "gpt_bigcode_exact_gelu": {"activation_function": "gelu", "n_inner": 100},  # StarCoder's GELU
    },
    old=_old_bigcode,
    draws={"embedding_scale": 0.2},
)

GPTJ = Family(
    architecture="GPTJForCausalLM",
    base=dict(
        vocab_size=137,
        n_positions=96,
        n_embd=64,
        n_layer=3,
        n_head=4,
        rotary_dim=8,
        bos_token_id=1,
        eos_token_id=1,
    ),
    cases={
        "gptj": {},
        "gptj_n_inner": {"n_inner": 100, "n_head": 2, "rotary_dim": 12},
    },
    old=lambda config: v4(
        config, "torch_dtype", **SUMMARY, gradient_checkpointing=False, rotary=True, scale_attn_weights=True
    ),
)


def _old_mpt(config: Config) -> Config:
    about = {key: config["attn_config"][key] for key in config["attn_config"] if key in MPT_ATTENTION}
    old = {key: config[key] for key in config if key not in ("dtype", "layer_norm_epsilon")}
    return old | dict(
        architectures=["MPTForCausalLM"],
        attn_config=MPT_ATTENTION | about,
        auto_map={"AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM"},
        init_config={"name": "kaiming_normal_", "fan_mode": "fan_in", "verbose": 0},
        tokenizer_name="EleutherAI/gpt-neox-20b",
        torch_dtype="float32",
        transformers_version="4.28.1",
        verbose=0,
    )


MPT_ATTENTION: Config = dict(
    alibi=True,
    alibi_bias_max=8,
    attn_impl="torch",
    attn_pdrop=0,
    attn_type="multihead_attention",
    attn_uses_sequence_id=False,
    clip_qkv=None,
    prefix_lm=False,
    qk_ln=False,
    softmax_scale=None,
)
MPT_BASE: Config = dict(
    vocab_size=141, d_model=64, n_heads=4, n_layers=3, max_seq_len=128, bos_token_id=1, eos_token_id=1
)
MPT = Family(
    architecture="MptForCausalLM",
    base=MPT_BASE,
    cases={
        "mpt": {},
        "mpt_clip_qkv": {"attn_config": {"clip_qkv": 1.5, "softmax_scale": 0.4}},
        "mpt_6_heads": {"d_model": 48, "n_heads": 6},
    },
    old=_old_mpt,
    draws={"embedding_scale": 0.2},
)
MPT_PUBLISHED = Family(
    architecture="MPTForCausalLM",
    base=_old_mpt(
        MPT_BASE
        | dict(model_type="mpt", expansion_ratio=4, no_bias=True, norm_type="low_precision_layernorm")
        | dict(learned_pos_emb=True, emb_pdrop=0, resid_pdrop=0, embedding_fraction=1.0, logit_scale=None)
        | dict(attn_config={}, init_device="cpu", use_cache=False, is_encoder_decoder=False)
    ),
    cases={
        "mpt_qk_ln": {"attn_config": MPT_ATTENTION | {"qk_ln": True, "clip_qkv": 2.0}},
        "mpt_kv_n_heads": {
            "n_heads": 6,
            "d_model": 48,
            "expansion_ratio": 3,
            "attn_config": MPT_ATTENTION
            | {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "alibi_bias_max": 16},
        },
        "mpt_learned_positions": {
            "no_bias": False,
            "logit_scale": "inv_sqrt_d_model",
            "attn_config": MPT_ATTENTION
            | {"attn_type": "multiquery_attention", "alibi": False, "qk_ln": True},
        },
    },
    old=dict,
    draws={"embedding_scale": 0.2},
)


def _old_opt(config: Config) -> Config:
    newer = ("enable_bias", "layer_norm_elementwise_affine")  # written by few: both are True where not
    old = {key: value for key, value in v4(config).items() if key not in newer or value is False}
    return old | {"activation_dropout": 0.0, "prefix": "</s>"}


OPT = Family(
    architecture="OPTForCausalLM",
    base=dict(
        vocab_size=139,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        ffn_dim=160,
        max_position_embeddings=94,
        word_embed_proj_dim=64,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    ),
    cases={
        "opt": {},
        # 350m: norms after the residual, none at the end, embeddings narrower than the model.
        "opt_post_norm": {"do_layer_norm_before": False, "word_embed_proj_dim": 40},
        # Galactica's flags: no biases, and norms without weights.
        "opt_no_bias": {
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "activation_function": "gelu",
        },
        "opt_no_final_norm": {"_remove_final_layer_norm": True},
    },
    old=_old_opt,
    draws={"embedding_scale": 0.2},
)

FAMILIES = (
    BAICHUAN_7B,
    BAICHUAN_13B,
    BAICHUAN2_7B,
    BLOOM,
    FALCON,
    FALCON_11B,
    GPT2,
    GPT_BIGCODE,
    GPTJ,
    GPT_NEOX,
    MPT,
    MPT_PUBLISHED,
    OPT,
)
