"""The architectures of 2023 beside Llama, in every variant that was published."""

from families import Config, Family, renamed, rope, v4

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
        config, n_ctx=96, torch_dtype=None, task_specific_params={"text-generation": {"do_sample": True}}
    ),
)


def _old_neox(config: Config) -> Config:
    old = renamed(v4(config), {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"})
    return {key: old[key] for key in old if key not in ("rope_scaling", "attention_bias")}


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

FAMILIES = (GPT2, GPT_NEOX)
