"""The dense architectures that people run today.

A window of 16 is much shorter than a prompt of 40. Query i sees key j where 0 <= i - j < 16, in all of them.
"""

from families import Config, Family, rope, v4

BASE: Config = dict(
    vocab_size=152,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rope_parameters=rope(),
    bos_token_id=1,
    eos_token_id=2,
)
TIED = {"embedding_scale": 0.2}


def _partial(factor: float) -> Config:
    return {"partial_rotary_factor": factor, "rope_parameters": rope(partial_rotary_factor=factor)}


def _old_qwen(config: Config) -> Config:
    # Only with use_sliding_window had layers from max_window_layers on a window; its size was given anyway.
    return v4(config, "layer_types", sliding_window=config["sliding_window"] or 4096)


WINDOW: Config = {
    "use_sliding_window": True,
    "sliding_window": 16,
    "max_window_layers": 2,
    "num_hidden_layers": 4,
}
QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    base=BASE,
    cases={
        "qwen2": {"rope_parameters": rope(theta=1000000.0)},
        "qwen2_tied": {"tie_word_embeddings": True},
        "qwen2_window": WINDOW,
    },
    old=_old_qwen,
    draws=TIED,
)
QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    base=BASE | {"head_dim": 24},
    cases={
        "qwen3": {"rope_parameters": rope(theta=1000000.0)},
        "qwen3_tied": {"tie_word_embeddings": True, "attention_bias": True},
        "qwen3_window": WINDOW,
    },
    old=_old_qwen,
    draws=TIED,
)
MISTRAL = Family(
    architecture="MistralForCausalLM",
    base=BASE,
    cases={
        "mistral": {"sliding_window": None, "head_dim": 24},
        "mistral_window": {"sliding_window": 16},  # in every layer
    },
    old=v4,
)

PHI = Family(
    architecture="PhiForCausalLM",
    base=BASE | _partial(0.5) | {"num_key_value_heads": None},
    cases={
        "phi": {},
        # Norms with biases over each head's channels, the same for all heads.
        "phi_qk_layernorm": {"qk_layernorm": True, "num_key_value_heads": 2, **_partial(0.375)},
    },
    old=v4,
)


def _longrope(channels: int, original: int, **fields: float) -> Config:
    return rope(
        "longrope",
        short_factor=[1.0 + 0.05 * i for i in range(channels)],
        long_factor=[1.5 + 1.25 * i for i in range(channels)],
        original_max_position_embeddings=original,
        **fields,
    )


# Short or long factors: as the sequence's length so far says. These cases do not cross the original length.
# cos and sin are multiplied by √(1 + ln(max / original) / ln(original)), whichever they are.
PHI3 = Family(
    architecture="Phi3ForCausalLM",
    base=BASE | {"pad_token_id": 0},
    cases={
        "phi3": {"num_key_value_heads": 4},
        "phi3_window": {"sliding_window": 16},
        "phi3_longrope_short": {
            "rope_parameters": _longrope(8, 80),
            "original_max_position_embeddings": 80,
            "max_position_embeddings": 640,
        },
        "phi3_longrope_long": {
            "rope_parameters": _longrope(8, 64),
            "original_max_position_embeddings": 64,
            "max_position_embeddings": 512,
        },
        "phi3_partial_rotary": {  # as Phi-4-mini
            "rope_parameters": _longrope(6, 64, partial_rotary_factor=0.75),
            "original_max_position_embeddings": 64,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
        },
    },
    old=v4,
    prompt_lengths={"phi3_longrope_long": 90, "phi3_partial_rotary": 70},
    draws=TIED,
)

GEMMA_BASE = BASE | dict(hidden_size=48, head_dim=24, bos_token_id=2, eos_token_id=1, pad_token_id=0)
# Norms multiply by 1 + weight; the model multiplies embeddings by √hidden_size.
GEMMA_DRAWS = {"norm_mean": 0.0, "embedding_scale": 0.08}
GEMMA = Family(
    architecture="GemmaForCausalLM",
    base=GEMMA_BASE,
    cases={"gemma": {"num_key_value_heads": 1}},
    # transformers 4 took the tanh form of GELU whatever hidden_act said, unless hidden_activation was given.
    old=lambda config: v4(
        config, "use_bidirectional_attention", "rope_scaling", hidden_act="gelu", hidden_activation=None
    ),
    draws=GEMMA_DRAWS,
)


def _old_gemma2(config: Config) -> Config:
    # transformers 4 knew the layers' kinds without being told: even layers have the window.
    return v4(
        config,
        "layer_types",
        "rope_scaling",
        "use_bidirectional_attention",
        hidden_act="gelu_pytorch_tanh",
        cache_implementation="hybrid",
        sliding_window_size=config["sliding_window"],
    )


# Caps are much lower than 50 and 30, so that they bend the scores and logits of a small model.
GEMMA2 = Family(
    architecture="Gemma2ForCausalLM",
    base=GEMMA_BASE
    | dict(
        vocab_size=136,
        intermediate_size=88,
        num_hidden_layers=4,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=16,
        attn_logit_softcapping=4.0,
        final_logit_softcapping=1.5,
        max_position_embeddings=128,
    ),
    cases={
        "gemma2": {},
        "gemma2_no_softcap": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    },
    old=_old_gemma2,
    draws=GEMMA_DRAWS,
)


def _old_gemma3(config: Config) -> Config:
    local, full = (config["rope_parameters"][kind] for kind in ("sliding_attention", "full_attention"))
    scaling = {key: full[key] for key in full if key != "rope_theta"}
    return v4(
        config | {"rope_parameters": full},
        "layer_types",
        "_sliding_window_pattern",
        "use_bidirectional_attention",
        rope_scaling=scaling if "factor" in scaling else None,
        sliding_window_pattern=3,
        rope_local_base_freq=local["rope_theta"],
        cache_implementation="hybrid",
    )


def _two_ropes(full: Config) -> Config:
    return {"sliding_attention": rope(), "full_attention": full}


GEMMA3 = Family(
    architecture="Gemma3ForCausalLM",
    base=GEMMA_BASE
    | dict(
        num_hidden_layers=4,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    ),
    cases={
        "gemma3": {"rope_parameters": _two_ropes(rope(theta=1000000.0))},
        "gemma3_linear": {"rope_parameters": _two_ropes(rope("linear", theta=1000000.0, factor=8.0))},
    },
    old=_old_gemma3,
    draws=GEMMA_DRAWS,
)

STABLELM = Family(
    architecture="StableLmForCausalLM",
    base=BASE | _partial(0.25),
    cases={
        "stablelm": {},
        "stablelm_qkv_bias": {"use_qkv_bias": True, "num_key_value_heads": 4},
        # As 12B: a norm for each head, without biases, and one norm for attention and MLP.
        "stablelm_parallel_residual": {
            "use_parallel_residual": True,
            "qk_layernorm": True,
            **_partial(0.5),
        },
    },
    old=v4,
)


def _old_starcoder2(config: Config) -> Config:
    return v4(
        config,
        activation_function="gelu",  # not read: hidden_act is
        attention_softmax_in_fp32=True,
        scale_attention_softmax_in_fp32=True,
        scale_attn_weights=True,
        mlp_type="default",
        norm_type="layer_norm",
    )


STARCODER2 = Family(
    architecture="Starcoder2ForCausalLM",
    base=BASE | {"rope_parameters": rope(theta=999999.4420358813)},
    cases={
        "starcoder2": {},
        "starcoder2_window": {"sliding_window": 16, "tie_word_embeddings": False, "use_bias": False},
    },
    old=_old_starcoder2,
    draws=TIED,
)

OLMO2 = Family(  # its q_norm and k_norm are over all heads' channels together, before they are split
    architecture="Olmo2ForCausalLM",
    base=BASE | {"rope_parameters": rope(theta=500000.0), "pad_token_id": 0},
    cases={"olmo2": {}},
    old=v4,
)

GRANITE = Family(
    architecture="GraniteForCausalLM",
    base=BASE
    | dict(
        embedding_multiplier=6.0,
        attention_multiplier=0.15,  # instead of 1/√head_dim
        residual_multiplier=0.4,
        logits_scaling=4.0,  # logits are divided by it
    ),
    cases={
        "granite": {"tie_word_embeddings": True},
        "granite_bias": {"attention_bias": True, "mlp_bias": True},
    },
    old=v4,
    draws={"embedding_scale": 0.25},
)

SMOLLM3 = Family(
    architecture="SmolLM3ForCausalLM",
    base=BASE
    | dict(
        num_hidden_layers=4,
        rope_parameters=rope(theta=2000000.0),
        no_rope_layer_interval=2,
        pad_token_id=0,
    ),
    # 1 in no_rope_layers is a layer that does turn its queries and keys.
    cases={
        "smollm3": {},
        "smollm3_no_rope_layers": {"no_rope_layers": [0, 1, 1, 0], "tie_word_embeddings": False},
        "smollm3_window": {"use_sliding_window": True, "sliding_window": 16},  # where nothing turns
    },
    old=lambda config: v4(config, max_window_layers=28, pretraining_tp=2),  # neither is read
    draws=TIED,
)

COHERE_BASE = BASE | {"logit_scale": 0.25, "pad_token_id": 0}
COHERE = Family(
    architecture="CohereForCausalLM",
    base=COHERE_BASE,
    cases={
        "cohere": {},
        "cohere_qk_norm": {"use_qk_norm": True, "attention_bias": True},  # of its own for each head
    },
    old=v4,
)


def _old_cohere2(config: Config) -> Config:
    return v4(
        config,
        "layer_types",
        "head_dim",
        sliding_window_pattern=4,
        cache_implementation="hybrid",
        layer_switch=4,
        order_of_interleaved_layers="local_attn_first",
        position_embedding_type="rope_gptj",
        rotary_pct=1.0,
        use_embedding_sharing=True,
        use_gated_activation=True,
        use_parallel_block=True,
        use_parallel_embedding=False,
        use_qk_norm=False,
    )


COHERE2 = Family(  # layers without a window have no RoPE either
    architecture="Cohere2ForCausalLM",
    base=COHERE_BASE,
    cases={"cohere2": {"num_hidden_layers": 4, "sliding_window": 16}},
    old=_old_cohere2,
)

GLM_BASE = BASE | _partial(0.5) | {"head_dim": 16, "pad_token_id": 0}
GLM = Family(
    architecture="GlmForCausalLM",
    base=GLM_BASE,
    cases={"glm": {}},
    old=v4,
)
GLM4 = Family(
    architecture="Glm4ForCausalLM",
    base=GLM_BASE,
    cases={"glm4": {"attention_bias": False}, "glm4_bias": {"head_dim": 24}},
    old=v4,
)

FAMILIES = (
    QWEN2,
    QWEN3,
    MISTRAL,
    PHI,
    PHI3,
    GEMMA,
    GEMMA2,
    GEMMA3,
    STABLELM,
    STARCODER2,
    OLMO2,
    GRANITE,
    SMOLLM3,
    COHERE,
    COHERE2,
    GLM,
    GLM4,
)
