"""suffix: what stands between two texts, asked for as each family of models knows it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.client import Client, make_client
from tests.serving.conftest import TINY

DEMO = Path(__file__).parents[2] / "models" / "demo"
PATH = "/v1/completions"
QWEN = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
BEFORE, AFTER = "def f(x):\n    ", "\n    return x\n"


def write_tokenizer(folder: Path, names: tuple[str, ...]) -> Path:
    """The packaged tokenizer; its last tokens become `names`, added and not special, as Qwen has them."""
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    ids = {name: len(vocab) - 1 - i for i, name in enumerate(names)}
    kept = {piece: token for piece, token in vocab.items() if token not in ids.values()}
    tokenizer["model"]["vocab"] = kept
    tokenizer["model"]["merges"] = [
        pair
        for pair in tokenizer["model"]["merges"]
        if {*(parts := pair.split(" ") if isinstance(pair, str) else pair), "".join(parts)} <= kept.keys()
    ]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"] += [
        {"id": token, "content": name, **flags}
        for name, token in sorted(ids.items(), key=lambda item: item[1])
    ]
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text((DEMO / "tokenizer_config.json").read_text())
    return folder


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A tokenizer with these markers."""
    from pjengine.tokenizer import load_tokenizer

    def load(*names: str) -> Any:
        return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), names))

    return load


def ids_of(tokenizer: Any, *names: str) -> list[int]:
    return tokenizer.hf.convert_tokens_to_ids(list(names))


def read(tokenizer: Any, before: str = BEFORE, after: str = AFTER, **options: Any) -> list[int]:
    from pjengine.serving.infill import find_infill

    options = {"add_special_tokens": True, **options}
    return find_infill(tokenizer).read(before, after, **options)["prompt_token_ids"]


@pytest.mark.parametrize(
    "names",
    [
        QWEN,
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
        ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
        ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # noqa: RUF001
    ],
)
def test_prefix_suffix_and_middle_are_marked(load: Callable[..., Any], names: tuple[str, ...]) -> None:
    tokenizer = load(*names)
    first, second, third = ids_of(tokenizer, *names)
    before, after = tokenizer.encode(BEFORE), tokenizer.encode(AFTER)
    assert read(tokenizer) == [first, *before, second, *after, third]
    assert read(tokenizer, "", "") == [first, second, third]


def test_codestral_has_the_suffix_first(load: Callable[..., Any]) -> None:
    tokenizer = load("[PREFIX]", "[SUFFIX]")
    prefix, suffix = ids_of(tokenizer, "[PREFIX]", "[SUFFIX]")
    assert read(tokenizer) == [suffix, *tokenizer.encode(AFTER), prefix, *tokenizer.encode(BEFORE)]


def test_codellama_has_a_space_before_the_prefix_alone(tmp_path: Path) -> None:
    """As its reference implementation does it, with SentencePiece itself."""
    import sentencepiece

    from pjengine.serving.infill import find_infill
    from pjengine.tokenizer import load_tokenizer

    markers = ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(f"def f{i}(x):\n    return x  # text\n" for i in range(50)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=markers,
        minloglevel=2,
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    reference = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    tokenizer = load_tokenizer(tmp_path)
    pre, suf, mid, eot = (reference.piece_to_id(marker) for marker in markers)

    def continued(text: str) -> list[int]:
        return reference.encode("☺" + text)[len(reference.encode("☺")) :]

    for before, after in [("def f1(x):", "return x"), ("x", " y"), ("", ""), (" x", "\n    return x")]:
        wanted = [pre, *reference.encode(before), suf, *continued(after), mid]
        assert read(tokenizer, before, after) == [reference.bos_id(), *wanted]
        assert read(tokenizer, before, after, add_special_tokens=False) == wanted
    assert eot in find_infill(tokenizer).end_ids
    for text in ("a <SUF>b", "a▁<PRE>", "<MID>"):
        found = read(tokenizer, text, text)
        assert [token for token in found if token in (pre, suf, mid)] == [pre, suf, mid], text


@pytest.mark.parametrize("text", ["a<|fim_suffix|>b", "<|fim_middle|>", "<|fim_prefix|><|fim_prefix|>"])
def test_a_marker_in_a_text_is_text(load: Callable[..., Any], text: str) -> None:
    tokenizer = load(*QWEN)
    prefix, suffix, middle = ids_of(tokenizer, *QWEN)
    found = read(tokenizer, text, text)
    assert [token for token in found if token in (prefix, suffix, middle)] == [prefix, suffix, middle]
    assert tokenizer.decode(found, skip_special_tokens=False) == (f"{QWEN[0]}{text}{QWEN[1]}{text}{QWEN[2]}")


@pytest.fixture(scope="module")
def filling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    from pjengine import AsyncLLM

    folder = write_tokenizer(tmp_path_factory.mktemp("model"), QWEN)
    llm = AsyncLLM("demo", tokenizer=str(folder), **TINY)
    client = make_client(llm)
    yield client
    client.assert_idle()
    llm.close()


def test_the_answer_is_what_is_between(filling: Client) -> None:
    tokenizer = filling.service.prompts.tokenizer
    body: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "ignore_eos": True, "return_token_ids": True}
    [choice] = filling.answer(PATH, prompt=BEFORE, suffix=AFTER, **body)["choices"]
    assert choice["prompt_token_ids"] == read(tokenizer)
    [plain] = filling.answer(PATH, prompt=read(tokenizer), **body)["choices"]
    assert (choice["text"], choice["token_ids"]) == (plain["text"], plain["token_ids"])
    assert choice["text"] != filling.answer(PATH, prompt=BEFORE, **body)["choices"][0]["text"]
    events = filling.events(PATH, prompt=BEFORE, suffix=AFTER, **body)
    assert "".join(event["choices"][0]["text"] for event in events) == choice["text"]
    both = filling.answer(PATH, prompt=[BEFORE, "x = "], suffix=AFTER, **body)["choices"]
    assert [part["prompt_token_ids"] for part in both] == [read(tokenizer), read(tokenizer, "x = ")]


def test_a_marker_ends_the_middle_as_eos_does(filling: Client) -> None:
    [middle] = ids_of(filling.service.prompts.tokenizer, QWEN[2])
    body: dict[str, Any] = {
        "prompt": BEFORE,
        "temperature": 0,
        "max_tokens": 4,
        "logit_bias": {str(middle): 100},
        "return_token_ids": True,
    }
    [ended] = filling.answer(PATH, suffix=AFTER, **body)["choices"]
    assert (ended["text"], ended["finish_reason"], ended["stop_reason"]) == ("", "stop", middle)
    for more in ({"suffix": AFTER, "ignore_eos": True}, {}):
        assert filling.answer(PATH, **body, **more)["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt": [5, 6]}, "suffix"),
        ({"echo": True}, "echo"),
        ({"truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
        ({"suffix": "\ud800"}, "suffix"),
        ({"suffix": "a" * 1_000_000}, "suffix"),
        ({"prompt": "a" * 1_000_000}, "prompt"),
    ],
)
def test_what_does_not_go_with_a_suffix_is_refused(
    filling: Client, changes: dict[str, Any], param: str
) -> None:
    content = json.dumps({"prompt": BEFORE, "suffix": AFTER, **changes})
    response = filling.send("POST", PATH, content=content, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_without_markers_a_suffix_is_refused(client: Client) -> None:
    status, error = client.error(PATH, prompt=BEFORE, suffix=AFTER)
    assert (status, error["param"]) == (400, "suffix") and "<|fim_prefix|>" in error["message"]
    assert (
        client.error("/v1/chat/completions", messages=[{"role": "user", "content": "a"}], suffix="b")[0]
        == 400
    )
