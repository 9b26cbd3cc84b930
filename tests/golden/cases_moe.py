"""Mixtures of experts, unquantised."""

from families import Config, Family, renamed, rope, v4

BASE: Config = dict(
    vocab_size=152,
    hidden_size=64,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rope_parameters=rope(theta=1000000.0),
    bos_token_id=1,
    eos_token_id=2,
)


def _old_qwen3_moe(config: Config) -> Config:
    old = v4(config, sliding_window=config["sliding_window"] or 4096, max_window_layers=3)
    return renamed(old, {"num_local_experts": "num_experts"})


MIXTRAL = Family(
    architecture="MixtralForCausalLM",
    base=BASE | {"num_local_experts": 6, "num_experts_per_tok": 2},
    cases={"mixtral": {}, "mixtral_window": {"sliding_window": 16, "num_experts_per_tok": 3}},
    old=v4,
)

QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    base=BASE
    | dict(
        head_dim=24,
        num_experts=12,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        norm_topk_prob=True,
    ),
    cases={
        "qwen3_moe": {},
        "qwen3_moe_unnormed": {"norm_topk_prob": False},
        # Dense are those of mlp_only_layers, and each i where the step does not divide i + 1: here all but 1.
        "qwen3_moe_dense_layers": {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    },
    old=_old_qwen3_moe,
)


def _old_gpt_oss(config: Config) -> Config:
    return v4(config, swiglu_limit=7.0, experts_per_token=2, initial_context_length=64)


# The experts' matrices are [experts, in, out]; gate and up alternate in gate_up_proj's columns. The gate is
# clamped from above only. Experts are narrow so that values beyond the limit of 7 are common.
GPT_OSS = Family(
    architecture="GptOssForCausalLM",
    base=BASE
    | dict(
        hidden_size=96,
        intermediate_size=20,
        num_hidden_layers=4,
        num_attention_heads=8,
        head_dim=16,
        num_local_experts=6,
        num_experts_per_tok=2,
        sliding_window=16,
        rope_parameters=rope(
            "yarn",
            theta=150000.0,
            factor=4.0,
            beta_fast=32.0,
            beta_slow=1.0,
            truncate=False,
            original_max_position_embeddings=64,
        ),
        pad_token_id=0,
    ),
    cases={"gpt_oss": {}},
    old=_old_gpt_oss,
)

FAMILIES = (MIXTRAL, QWEN3_MOE, GPT_OSS)
