"""What parse_config reads and the RoPE frequencies, against what transformers writes and computes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.golden import golden


def rope_of(config: dict[str, Any]) -> Any:
    from pjengine.models.registry import parse_config

    return parse_config(config).rope


# Real config.json files, as published.
LLAMA_1: dict[str, Any] = {
    "architectures": ["LLaMAForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "initializer_range": 0.02,
    "max_sequence_length": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": -1,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "float16",
    "transformers_version": "4.27.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_3_1: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
SMOLLM: dict[str, Any] = {
    **{key: value for key, value in LLAMA_3_1.items() if key != "rope_scaling"},
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_size": 576,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
}


def changed(**fields: Any) -> dict[str, Any]:
    return {**golden.load("gqa").config, **fields}


@pytest.mark.parametrize("name", golden.LLAMA_CASES)
def test_both_forms_of_config_json_mean_the_same(name: str) -> None:
    from pjengine.models.registry import parse_config

    case = golden.load(name)
    config = parse_config(case.config)
    assert config == parse_config(case.config_v4)
    assert config.architecture == "LlamaForCausalLM"
    assert (
        config.head_dim == case.config["head_dim"] and config.num_layers == case.config["num_hidden_layers"]
    )
    assert config.dtype == "float32" and (config.bos_token_id, config.eos_token_ids) == (1, (2,))


def test_transformers_own_defaults_are_read() -> None:
    from transformers import LlamaConfig

    from pjengine.models.registry import parse_config

    config = LlamaConfig(architectures=["LlamaForCausalLM"])
    assert parse_config(config.to_dict()) == parse_config(json.loads(config.to_json_string()))
    assert parse_config(config.to_dict()).dtype == "float32"


def test_published_configs_are_read() -> None:
    from pjengine.models.registry import parse_config

    first = parse_config(LLAMA_1)
    assert first.max_model_len == 2048 and first.num_kv_heads == 32 and rope_of(LLAMA_1).theta == 10000
    assert first.dtype == "float16" and first.eos_token_ids == (1,)
    third = parse_config(LLAMA_3_1)
    assert third.max_model_len == 131072 and rope_of(LLAMA_3_1).kind == "llama3" and third.dtype == "bfloat16"
    assert third.eos_token_ids == (128001, 128008, 128009) and third.num_kv_heads == 8
    small = parse_config(SMOLLM)
    assert small.tie_word_embeddings and rope_of(SMOLLM).kind == "default" and rope_of(SMOLLM).theta == 100000


@pytest.mark.parametrize(
    "scaling, expected",
    [
        ({"type": "linear", "factor": 4.0}, 1024),
        ({"type": "dynamic", "factor": 2.0}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"type": "yarn", "factor": 2.0, "finetuned": True}, 512),
        ({"rope_type": "default"}, 256),
        (None, 256),
    ],
)
def test_max_model_len_is_what_the_positions_support(scaling: dict[str, Any] | None, expected: int) -> None:
    from pjengine.models.registry import parse_config

    config = {**golden.load("gqa").config_v4, "rope_scaling": scaling}
    assert parse_config(config).max_model_len == expected


def test_absent_and_null_token_ids_differ_as_in_transformers() -> None:
    from pjengine.models.registry import parse_config

    config = changed(eos_token_id=None, bos_token_id=None)
    assert parse_config(config).eos_token_ids == ()
    assert parse_config(config).bos_token_id is None
    del config["eos_token_id"], config["bos_token_id"]
    assert parse_config(config).eos_token_ids == (2,)
    assert parse_config(config).bos_token_id == 1


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_act": "xielu"}, "hidden_act must be one of silu.*got 'xielu'"),
        ({"pretraining_tp": 2}, "pretraining_tp must be None or 0 or 1, got 2"),
        ({"sliding_window": 4096}, "sliding_window must be None, got 4096"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config .*awq"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor .* got 0.5"),
        ({"rope_parameters": {"rope_type": "mrope"}}, "rope_type .* got 'mrope'"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"dtype": "float8_e4m3fn"}, "dtype .* got 'float8_e4m3fn'"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder .* got True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_engine_does_not_do_is_refused(fields: dict[str, Any], message: str) -> None:
    from pjengine.models.registry import parse_config

    with pytest.raises(NotImplementedError, match=message):
        parse_config(changed(**fields))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"logit_scale": 0.5}, "logit_scale=0.5"),
        ({"architectures": ["MambaForCausalLM"]}, r"LlamaForCausalLM, .*MambaForCausalLM"),
        ({"architectures": None}, r"architectures=\[\]"),
        ({"vocab_size": None}, "vocab_size as an integer > 0, got None"),
        ({"hidden_size": "64"}, "hidden_size as an integer > 0, got '64'"),
        ({"num_key_value_heads": 3}, "multiple of num_kv_heads, got 8 and 3"),
        ({"head_dim": None, "hidden_size": 65}, "add head_dim"),
        ({"head_dim": 7}, "even, got 7"),
        ({"attention_bias": "yes"}, "attention_bias as true or false, got 'yes'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "'linear' needs factor"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' needs low_freq_factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "slope": 1}}, "slope=1"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "longrope wants 4 positive numbers",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}},
            "'longrope' needs long_factor",
        ),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.0}}, "factor must be > 0, got 0.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_wrong_or_unknown_is_named(fields: dict[str, Any], message: str) -> None:
    from pjengine.models.registry import parse_config

    with pytest.raises(ValueError, match=message):
        parse_config(changed(**fields))


def test_rope_frequencies_equal_those_of_transformers() -> None:
    from pjengine.models.rope import rope_frequencies

    with np.load(golden.FOLDER / "rope_frequencies.npz") as file:
        for name, about in json.loads(str(file["about"])).items():
            rope = rope_of(about["config"])
            inv_freq, attention_factor = rope_frequencies(rope)
            assert inv_freq.dtype == np.float32
            np.testing.assert_allclose(inv_freq, file[name], rtol=1.2e-7, err_msg=name)  # one bit
            assert attention_factor == pytest.approx(about["attention_factor"], rel=1e-12), name
    for name in golden.LLAMA_CASES:
        case = golden.load(name)
        inv_freq, attention_factor = rope_frequencies(rope_of(case.config))
        np.testing.assert_allclose(inv_freq, case.inv_freq, rtol=1.2e-7, err_msg=name)
        assert attention_factor == pytest.approx(case.attention_factor, rel=1e-12)


def test_dynamic_base_grows_as_in_transformers() -> None:
    from pjengine.models.rope import dynamic_rope_theta

    with np.load(golden.FOLDER / "rope_frequencies.npz") as file:
        rope = rope_of(json.loads(str(file["about"]))["dynamic"]["config"])
        lengths = [int(name.removeprefix("dynamic_")) for name in file.files if name.startswith("dynamic_")]
        assert len(lengths) == 6
        for length in lengths:
            theta = dynamic_rope_theta(rope, max(float(length), rope.original_max_position_embeddings))
            exponent = np.arange(0, rope.rotary_dim, 2) / rope.rotary_dim
            np.testing.assert_allclose(1 / theta**exponent, file[f"dynamic_{length}"], rtol=1e-6)


def test_long_sequences_have_frequencies_of_their_own() -> None:
    """As Phi-3 does it, whose factors are by plane: the formula, and which of the tokens take which."""
    import jax.numpy as jnp

    from pjengine.models.layers import rotary_table

    short, long = [1.0, 1.5, 2.0, 2.5], [2.0, 4.0, 8.0, 16.0]
    scaling = {"type": "su", "short_factor": short, "long_factor": long}
    config = {**golden.load("gqa").config_v4, "rope_scaling": scaling, "original_max_position_embeddings": 32}
    rope = rope_of({**config, "head_dim": 8})
    assert rope == rope_of({**config, "head_dim": 8, "rope_scaling": {**scaling, "type": "longrope"}})
    assert [rope.excess(length) for length in (1, 32, 33, 99)] == [0, 0, 1, 1]
    amplitude = np.sqrt(1 + np.log(256 / 32) / np.log(32))
    positions = np.array([3, 3, 31, 40], np.int32)
    lens = np.array([32, 33, 32, 41], np.int32)
    cos, sin = rotary_table(rope, jnp.asarray(positions), jnp.asarray(lens))
    for i, factors in enumerate((short, long, short, long)):
        angle = positions[i] / (np.array(factors) * 10000.0 ** (np.arange(0, 8, 2) / 8))
        np.testing.assert_allclose(cos[i], amplitude * np.cos(angle), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(sin[i], amplitude * np.sin(angle), rtol=1e-5, atol=1e-6)


def test_named_shapes_have_the_size_that_their_names_say() -> None:
    from pjengine.models.shapes import SHAPES

    def num_params(name: str) -> float:
        c = SHAPES[name]
        attention = 2 * c.hidden_size * c.head_dim * (c.num_heads + c.num_kv_heads)
        layer = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
        return c.num_layers * layer + 2 * c.vocab_size * c.hidden_size + c.hidden_size

    assert num_params("llama-8b") == pytest.approx(8.03e9, rel=1e-3)
    assert num_params("llama-70b") == pytest.approx(70.554e9, rel=1e-3)
    assert num_params("llama2-13b") == pytest.approx(13.016e9, rel=1e-3)
    # 125M and an output layer that is not tied.
    assert num_params("opt-125m-llama") == pytest.approx(162e6, rel=1e-2)


@pytest.mark.parametrize("config", [[], "abc", None, 3], ids=repr)
def test_config_of_another_kind_is_refused(config: Any) -> None:
    from pjengine.models.registry import parse_config

    with pytest.raises(ValueError, match=r"config\.json must hold a JSON object, got"):
        parse_config(config)


@pytest.mark.parametrize("value", ["abc", [], [1], {"a": 1}, True, 1.5, float("nan"), 10**400], ids=repr)
@pytest.mark.parametrize(
    "key",
    """architectures attention_bias dtype torch_dtype eos_token_id head_dim hidden_act hidden_size
    intermediate_size max_position_embeddings max_sequence_length mlp_bias num_attention_heads
    num_hidden_layers num_key_value_heads original_max_position_embeddings rms_norm_eps rope_scaling
    rope_theta rope_parameters tie_word_embeddings vocab_size""".split(),
)
def test_value_of_another_type_never_escapes_as_another_error(key: str, value: Any) -> None:
    from pjengine.models.config import ModelConfig
    from pjengine.models.registry import parse_config

    config = {**golden.load("gqa").config_v4, key: value}
    try:
        assert isinstance(parse_config(config), ModelConfig)  # some are right, such as a bool for a flag
    except (ValueError, NotImplementedError) as error:
        named = "scaling" if key.startswith("rope_") else "dtype" if "dtype" in key else key
        assert named in str(error) or key in str(error)
        assert len(str(error)) < 1000


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rope_scaling": "abc"}, "rope_scaling as a JSON object, got 'abc'"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps as a finite number >= 0, got 'x'"),
        ({"attention_bias": 1}, "attention_bias as true or false, got 1"),
        ({"eos_token_id": ["</s>"]}, r"eos_token_id as a token id or a list of them, got \['</s>'\]"),
        ({"hidden_act": []}, r"hidden_act as a text, got \[\]"),
        ({"architectures": "LlamaForCausalLM"}, "architectures as a list of texts, got 'LlamaForCausalLM'"),
        ({"architectures": [{}]}, "architectures as a list of texts"),
        ({"rope_scaling": {"type": [], "factor": 2.0}}, r"rope scaling .* type as a text, got \[\]"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor as a finite number, got '2'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": "no"}}, "truncate as true or false"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 0}}, "beta_fast must be > 0, got 0"),
    ],
    ids=str,
)
def test_value_of_another_type_is_named_with_what_is_wanted(fields: dict[str, Any], message: str) -> None:
    from pjengine.models.registry import parse_config

    config = {key: value for key, value in golden.load("gqa").config_v4.items() if key != "rope_parameters"}
    with pytest.raises(ValueError, match=message):
        parse_config({**config, **fields})


def test_null_is_the_default() -> None:
    from pjengine.models.registry import parse_config

    assert parse_config(changed(rms_norm_eps=None, hidden_act=None)).norm_eps == 1e-6


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff", b"[" * 10**5, b"1" * 5000], ids=lambda text: text[:2])
def test_file_that_is_no_json_object_is_named(tmp_path: Path, text: bytes) -> None:
    from pjengine.models.json_values import read_json_object

    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"config\.json: wanted (JSON|a JSON object), got"):
        read_json_object(path)
    path.write_text('{"a": 1}')
    assert read_json_object(path) == {"a": 1}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "one value for rope_type, got 'default', None, None, 'linear'",
        ),
        (
            {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "one value for rope_theta, got 500000.0, 10000.0",
        ),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, "one value for rope_type"),
    ],
    ids=["kinds", "bases", "spellings"],
)
def test_rotary_positions_that_are_said_twice_must_agree(keys: dict[str, Any], message: str) -> None:
    from pjengine.models.registry import parse_config

    config = {key: value for key, value in golden.load("gqa").config_v4.items() if "rope" not in key}
    with pytest.raises(ValueError, match=message):
        parse_config({**config, **keys})
