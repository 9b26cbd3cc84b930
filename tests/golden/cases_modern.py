"""The dense architectures that people run today."""

from families import Config, Family, rope, v4


def _old_gemma2(config: Config) -> Config:
    # transformers 4 knew the layers' kinds without being told: even layers have the window.
    return v4(
        config,
        layer_types=None,
        rope_scaling=None,
        use_bidirectional_attention=None,
        hidden_act="gelu_pytorch_tanh",
        cache_implementation="hybrid",
        sliding_window_size=config["sliding_window"],
    )


# Caps are much lower than 50 and 30, so that they bend the scores and logits of a small model.
GEMMA2 = Family(
    architecture="Gemma2ForCausalLM",
    base=dict(
        vocab_size=136,
        hidden_size=48,
        intermediate_size=88,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=16,
        attn_logit_softcapping=4.0,
        final_logit_softcapping=1.5,
        max_position_embeddings=128,
        rope_parameters=rope(),
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    ),
    cases={
        "gemma2": {},
        "gemma2_no_softcap": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    },
    old=_old_gemma2,
    draws={"norm_mean": 0.0, "embedding_scale": 0.08},  # the model multiplies embeddings by √hidden_size
)

FAMILIES = (GEMMA2,)
