"""A tokenizer.model alone, and checkpoints that name code of their own, against SentencePiece itself."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.test_tokenizer import CHAT_TEMPLATE, CORPUS, write_byte_level, write_sentencepiece

FORMS: dict[str, dict[str, Any]] = {
    "llama": {},
    "no_prefix": {"add_dummy_prefix": False},  # as of Baichuan 2 and Gemma
    "no_bytes": {"byte_fallback": False, "vocab_size": 220},
    "unigram": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc", "vocab_size": 360},
    "extra_spaces": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
}
TEXTS = [
    "The quick",
    " leading",
    "  two",
    "日本語 naïve 😀",
    "def f1(x):\n    return x",
    "a  b   c\n\n",
    "",
    "\uff46\uff55\uff4c\uff4c \ufb01ne",
]
# As Baichuan's checkpoints have it: a slow tokenizer of their own.
BAICHUAN: dict[str, Any] = {
    "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]},
    "tokenizer_class": "BaichuanTokenizer",
    "add_bos_token": False,
    "add_eos_token": False,
    "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": True},
    "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": True},
    "unk_token": {"__type": "AddedToken", "content": "<unk>", "lstrip": False, "normalized": True},
    "sp_model_kwargs": {},
    "clean_up_tokenization_spaces": False,
}
FALCON_CONFIG = {
    "architectures": ["RWForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_RW.RWConfig", "AutoModelForCausalLM": "modelling_RW.RW"},
    "model_type": "RefinedWebModel",
}
MPT_CONFIG = {
    "architectures": ["MPTForCausalLM"],
    "attn_config": {"alibi": True, "attn_impl": "torch", "attn_type": "multihead_attention"},
    "auto_map": {"AutoConfig": "configuration_mpt.MPTConfig"},
    "model_type": "mpt",
}


def write_model(folder: Path, config: dict[str, Any] | None = None, **options: Any) -> Any:
    """A tokenizer.model; returns what SentencePiece makes of it."""
    import sentencepiece

    (folder / "corpus.txt").write_text("".join(CORPUS))
    given: dict[str, Any] = {
        "vocab_size": 400,
        "model_type": "bpe",
        "byte_fallback": True,
        "character_coverage": 0.999,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), **given | options
    )
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def load(folder: Path) -> Any:
    from pjengine.tokenizer import load_tokenizer

    return load_tokenizer(folder)


@pytest.mark.parametrize("form", FORMS)
def test_a_model_alone_encodes_and_decodes_as_sentencepiece(form: str, tmp_path: Path) -> None:
    reference = write_model(tmp_path, **FORMS[form])
    tokenizer = load(tmp_path)
    assert len(tokenizer) == reference.get_piece_size()
    for text in TEXTS:
        assert tokenizer.encode(text) == [reference.bos_id(), *reference.encode(text)], text

    words = st.sampled_from(["the quick", "fox", " ", "  ", "\n", "naïve", "日本", "12", "🧪", "f(x)", "é"])

    @settings(max_examples=100, deadline=None)
    @given(text=st.lists(words, max_size=12).map("".join))
    def check(text: str) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == reference.encode(text)
        if reference.unk_id() not in ids:  # SentencePiece writes ⁇ for it
            assert tokenizer.decode(ids) == reference.decode(ids)

    check()


def test_pieces_that_a_fine_tune_appended_are_taken_by_their_scores(tmp_path: Path) -> None:
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    write_model(tmp_path)
    path = tmp_path / "tokenizer.model"
    model: Any = vars(sentencepiece_model_pb2)["ModelProto"].FromString(path.read_bytes())
    # With a score of 0 a piece is the best of all, though it is the last.
    model.pieces.add(piece="rz", score=0.0)
    model.pieces.add(piece="rzr", score=-0.5)
    path.write_bytes(model.SerializeToString())
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = reference.encode("the razor rz rzr", add_bos=True)
    assert {reference.piece_to_id("rz"), reference.piece_to_id("rzr")} <= set(ids)
    assert load(tmp_path).encode("the razor rz rzr") == ids


def test_baichuans_own_tokenizer_needs_no_code(tmp_path: Path) -> None:
    symbols = ["<reserved_1>", "<reserved_2>"]
    config = {**BAICHUAN, "chat_template": CHAT_TEMPLATE}
    reference = write_model(tmp_path, config, add_dummy_prefix=False, user_defined_symbols=symbols)
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "baichuan", "auto_map": {"AutoConfig": "configuration_baichuan.BaichuanConfig"}}
        )
    )
    tokenizer = load(tmp_path)
    for text in [*TEXTS, "<reserved_1>the fox<reserved_2> jumps"]:
        assert tokenizer.encode(text) == reference.encode(text)
    assert (tokenizer.hf.bos_token_id, tokenizer.eos_token_id, tokenizer.hf.unk_token_id) == (1, 2, 0)
    assert tokenizer.decode([1, *reference.encode("the fox"), 2]) == "the fox"
    assert tokenizer.decode(reference.encode("<reserved_1>fox")) == "<reserved_1>fox"  # no special token
    assert tokenizer.render_chat([{"role": "user", "content": "Hi"}]) == "<|user|>Hi</s><|assistant|>"


@pytest.mark.parametrize("legacy", [True, False])
def test_parts_between_special_tokens_stand_alone_in_old_tokenizers(tmp_path: Path, legacy: bool) -> None:
    reference = write_model(tmp_path, {"tokenizer_class": "LlamaTokenizer", "legacy": legacy})
    tokenizer, first = load(tmp_path), reference.encode("the fox")
    ids = tokenizer.encode("the fox</s>dog")
    assert ids[: len(first) + 2] == [1, *first, 2]
    rest = tokenizer.hf.convert_ids_to_tokens(ids[len(first) + 2 :])
    assert "".join(rest) == ("▁dog" if legacy else "dog")


def test_added_tokens_have_the_ids_after_the_models(tmp_path: Path) -> None:
    reference = write_model(tmp_path, {"tokenizer_class": "LlamaTokenizer", "pad_token": "[PAD]"})
    size = reference.get_piece_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<tool>": size + 1, "[PAD]": size}))
    tokenizer = load(tmp_path)
    assert tokenizer.encode("[PAD]<tool>") == [1, size, size + 1]
    assert tokenizer.decode([size, size + 1]) == "<tool>"
    assert len(tokenizer) == size + 2
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<tool>": size + 1}))
    with pytest.raises(ValueError, match=rf"ids after the model's {size}, got '<tool>' as {size + 1}"):
        load(tmp_path)


def test_tokenizer_config_names_placeholders_of_the_model(tmp_path: Path) -> None:
    write_model(tmp_path, user_defined_symbols=["<unused0>"])
    token = {"content": "<|im_start|>", "normalized": False, "special": True}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "added_tokens_decoder": {"3": token},
        "add_eos_token": True,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load(tmp_path)
    assert tokenizer.encode("<|im_start|>") == [1, 3, 2]
    assert tokenizer.decode([3]) == ""


def test_special_tokens_map_counts_where_the_config_says_nothing(tmp_path: Path) -> None:
    write_model(tmp_path, {"bos_token": "<s>"}, control_symbols=["<|end|>"])
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "x", "eos_token": "<|end|>"}))
    tokenizer = load(tmp_path)
    assert (tokenizer.hf.bos_token_id, tokenizer.eos_token_id) == (1, 3)


@pytest.mark.parametrize("form", [{"AutoTokenizer": ["own.OwnTokenizer", None]}, ["own.OwnTokenizer", None]])
@pytest.mark.parametrize("config", [FALCON_CONFIG, MPT_CONFIG])
def test_a_tokenizer_json_needs_no_code(tmp_path: Path, config: dict[str, Any], form: Any) -> None:
    write_byte_level(tmp_path)
    expected = load(tmp_path).encode("The quick 😀")
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = tmp_path / "tokenizer_config.json"
    named = {**json.loads(path.read_text()), "tokenizer_class": "OwnTokenizer", "auto_map": form}
    path.write_text(json.dumps(named))
    tokenizer = load(tmp_path)
    assert tokenizer.encode("The quick 😀") == expected
    assert tokenizer.render_chat([{"role": "user", "content": "Hi"}]) == "<|user|>Hi</s><|assistant|>"


def test_a_tokenizer_that_is_only_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": ["own.OwnTokenizer", None]}))
    with pytest.raises(NotImplementedError, match=r"code of the checkpoint's own, .* add a tokenizer\.json"):
        load(tmp_path)


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, model_type="char", byte_fallback=False, vocab_size=60)
    with pytest.raises(NotImplementedError, match="wanted a SentencePiece model of BPE or Unigram"):
        load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # as tiktoken writes them
    with pytest.raises(ValueError, match="wanted a SentencePiece model, got a file without pieces"):
        load(tmp_path)


def test_chat_templates_come_from_the_checkpoint(tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": "{{ bos_token }}plain"},
        {"name": "tool_use", "template": "with {{ tools[0].name }}"},
    ]
    write_sentencepiece(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "chat_template": named}))
    tokenizer = load(tmp_path)
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.render_chat(messages) == "<s>plain"
    assert tokenizer.render_chat(messages, tools=[{"name": "clock"}]) == "with clock"
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}, of a file")
    assert load(tmp_path).render_chat(messages) == "Hi, of a file"


def test_opts_vocabulary_and_merges_start_with_their_bos(tmp_path: Path) -> None:
    write_byte_level(tmp_path)
    expected = load(tmp_path).encode("The quick")
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(merge) for merge in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    config = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}
    config |= {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load(tmp_path).encode("The quick") == [1, *expected]
