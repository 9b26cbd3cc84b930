"""Encoding, chat templates, and text that comes token by token yet equals the text decoded at once."""

import json
from collections.abc import Callable
from itertools import accumulate, chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from pjengine.tokenizer import Tokenizer

CORPUS = [
    *(f"The quick brown fox jumps over {i} lazy dogs; 12 + {i} = {i + 12}.\n" for i in range(200)),
    *(f"def f{i}(x):\n    return x  # naïve café\n" for i in range(50)),
    *("日本語 and emoji 😀 are rare\n" for _ in range(3)),
]
LLAMA_CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
KINDS = ("byte_level", "sentencepiece", "metaspace", "crossing", "demo")
DEMO = Path(__file__).parents[2] / "models" / "demo"


def write_byte_level(folder: Path) -> None:
    """A tokenizer.json as of Llama 3: byte-level BPE, no byte tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    bpe.add_tokens(["<tool>"])  # added, and not special
    bpe.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {"bos_token": "<s>", "eos_token": "</s>"}
    # Llama 3 asks for this; it must not reach the text.
    config["clean_up_tokenization_spaces"] = True
    config["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_sentencepiece(folder: Path) -> None:
    """A tokenizer.model alone, as of Llama 1 and 2: BPE with byte fallback."""
    import sentencepiece

    text = folder / "corpus.txt"
    text.write_text("".join(CORPUS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.999,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))


def write_metaspace(folder: Path) -> None:
    """Unigram pieces whose decoder drops the spaces of the first token, whichever that is."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<unk>", "</s>", "▁", "▁the", "▁a", "the", "a", "b", "1", "é", "▁😀", "\ufffd", "▁▁▁"]
    unigram = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    unigram.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_crossing(folder: Path) -> None:
    """Byte-level, and no token but the letters ends where a character does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    emoji = [chr_of_byte(byte) for byte in "😀".encode()]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet())]
    for shift in (1, 2, 3):
        pieces.append("".join(emoji[shift:] + emoji[:shift]))
    pieces += ["a" + emoji[0], emoji[3] + "a", emoji[2] + emoji[3] + "é", chr_of_byte(255) + emoji[0]]
    bpe = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def chr_of_byte(byte: int) -> str:
    """How byte-level vocabularies write one byte above 127."""
    if 0xA1 <= byte <= 0xAC or byte >= 0xAE:
        return chr(byte)
    return chr(256 + 33 + byte - 0x7F if byte < 0xA1 else 256 + 33 + 34)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, "Tokenizer"]:
    from pjengine.tokenizer import load_tokenizer

    writers: dict[str, Callable[[Path], None]] = {
        "byte_level": write_byte_level,
        "sentencepiece": write_sentencepiece,
        "metaspace": write_metaspace,
        "crossing": write_crossing,
    }
    loaded = {"demo": load_tokenizer(DEMO)}
    for name, write in writers.items():
        folder = tmp_path_factory.mktemp(name)
        write(folder)
        loaded[name] = load_tokenizer(folder)
    return loaded


def stream(tokenizer: "Tokenizer", ids: list[int], steps: list[int], **options: Any) -> list[str]:
    """Pushes the ids in groups of the given sizes (then one by one); returns the pieces of text."""
    from pjengine.tokenizer import IncrementalDetokenizer

    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    pieces, start = [], 0
    sizes = iter(steps)
    while start < len(ids):
        size = next(sizes, 1)
        pieces.append(detokenizer.push(ids[start : start + size]))
        start += size
    return [*pieces, detokenizer.finish()]


property_test = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
group_sizes = st.lists(st.integers(1, 5), max_size=20)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
def test_streamed_random_ids_equal_decoding_at_once(
    tokenizers: dict[str, "Tokenizer"], kind: str, skip: bool
) -> None:
    tokenizer = tokenizers[kind]

    # A few ids beyond the vocabulary too: models pad their embeddings.
    @property_test
    @given(ids=st.lists(st.integers(0, len(tokenizer) + 3), max_size=60), steps=group_sizes)
    def check(ids: list[int], steps: list[int]) -> None:
        pieces = stream(tokenizer, ids, steps, skip_special_tokens=skip)
        known = [token for token in ids if token < len(tokenizer)]
        expected = tokenizer.hf.decode(known, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert "".join(pieces) == expected == tokenizer.decode(ids, skip_special_tokens=skip)

    check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
def test_what_is_shown_does_not_depend_on_the_split(
    tokenizers: dict[str, "Tokenizer"], kind: str, skip: bool
) -> None:
    tokenizer = tokenizers[kind]
    size = len(tokenizer)
    parts = [i for i in range(size) if "\ufffd" in tokenizer.decode([i]) or tokenizer.kind(i).name == "BYTE"]
    tokens = st.one_of(st.integers(0, size + 3), st.sampled_from(parts))
    runs = st.tuples(tokens, st.integers(1, 12)).map(lambda run: [run[0]] * run[1])

    @property_test
    @given(
        ids=st.one_of(
            st.lists(tokens, max_size=60), st.lists(runs, max_size=12).map(lambda found: [*chain(*found)])
        ),
        steps=st.lists(st.integers(1, 40), max_size=20),
    )
    def check(ids: list[int], steps: list[int]) -> None:
        shown = list(accumulate(stream(tokenizer, ids, [], skip_special_tokens=skip)))
        end = 0
        pieces = stream(tokenizer, ids, steps, skip_special_tokens=skip)
        so_far = list(accumulate(pieces))
        for text, step in zip(so_far[:-1], chain(steps, repeat(1)), strict=False):
            end = min(end + step, len(ids))
            assert text == shown[end - 1]
            if not tokenizer.has_byte_tokens:  # all but what may be an incomplete character
                assert text == tokenizer.decode(ids[:end], skip_special_tokens=skip).removesuffix("\ufffd")
        assert so_far[-1] == shown[-1] == tokenizer.decode(ids, skip_special_tokens=skip)

    check()


@pytest.mark.parametrize("kind", ["byte_level", "demo"])
def test_good_text_before_bytes_that_are_none_is_shown_at_once(
    tokenizers: dict[str, "Tokenizer"], kind: str
) -> None:
    tokenizer = tokenizers[kind]
    text = "def fibonacci(n):\n    return n\n" * 8
    bad = next(i for i in range(len(tokenizer)) if tokenizer.decode([i]) == "\ufffd")
    ids = tokenizer.encode(text, add_special_tokens=False) + [bad] * 4
    assert stream(tokenizer, ids, [len(ids)])[0].startswith(text)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_streamed_text_equals_the_text_and_shows_no_half_character(
    tokenizers: dict[str, "Tokenizer"], kind: str
) -> None:
    tokenizer = tokenizers[kind]
    words = st.sampled_from(
        ["😀", "👩‍👩‍👧", "日本", "naïve", " ", "  ", "\n", "the quick", "don't .", "é", "\ufffd"]
    )
    text_strategy = st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
        st.lists(words, max_size=15).map("".join),
    )

    @property_test
    @given(text=text_strategy, steps=group_sizes)
    def check(text: str, steps: list[int]) -> None:
        ids = tokenizer.encode("x" + text, add_special_tokens=False)
        pieces = stream(tokenizer, ids, steps, skip_special_tokens=False)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=False)
        if "<" not in text and "▁" not in text:  # neither a special token nor SentencePiece's own space
            assert "".join(pieces) == "x" + text
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_text_after_a_prompt_continues_it(tokenizers: dict[str, "Tokenizer"], kind: str) -> None:
    tokenizer = tokenizers[kind]
    prompt = tokenizer.encode("the a")
    text_ids = st.integers(0, len(tokenizer) - 1).filter(
        lambda i: tokenizer.kind(i).name in ("TEXT", "SPECIAL")
    )

    @property_test
    @given(ids=st.lists(text_ids, max_size=30))
    def check(ids: list[int]) -> None:
        pieces = stream(tokenizer, ids, [], prompt_ids=prompt)
        assert tokenizer.decode(prompt) + "".join(pieces) == tokenizer.decode(prompt + ids)

    check()


def test_letters_are_shown_at_once_and_an_emoji_when_whole(tokenizers: dict[str, "Tokenizer"]) -> None:
    byte_level = tokenizers["byte_level"]
    ids = [byte_level.hf.convert_tokens_to_ids(token) for token in ["a", "b", *"ðŁ§ª", "c"]]
    assert stream(byte_level, ids, []) == ["a", "b", "", "", "", "\U0001f9ea", "c", ""]
    pieces = tokenizers["sentencepiece"]
    ids = pieces.encode("ab" + "\U0001f9ea" + "c", add_special_tokens=False)
    # The run of byte tokens may still grow, and become invalid, until another token ends it.
    assert [piece for piece in stream(pieces, ids, []) if piece][-1] == "\U0001f9eac"


def test_bytes_that_are_no_text_cost_linear_work(tokenizers: dict[str, "Tokenizer"]) -> None:
    class Counting:
        """The tokenizer's backend, counting the tokens that it decodes."""

        decoded = 0

        def __init__(self, backend: Any) -> None:
            self.backend = backend

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            self.decoded += len(ids)
            return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    from pjengine.tokenizer import IncrementalDetokenizer, Tokenizer

    bad = chr_of_byte(0x9F) + chr_of_byte(0x98) + chr_of_byte(0x80) + chr_of_byte(0xF0)
    for kind, token_text, step in (
        ("byte_level", "ÿ", 1),
        ("byte_level", "ÿ", 5),
        ("byte_level", "ÿ", 2000),
        ("crossing", bad, 1),
        ("crossing", bad, 2000),
        ("sentencepiece", "<0xFF>", 1),
        ("byte_level", "a", 1),
    ):
        original = tokenizers[kind]
        counting = Counting(original.hf.backend_tokenizer)

        class Facade:
            backend_tokenizer = counting

            def __init__(self, hf: Any) -> None:
                self.hf = hf

            def __getattr__(self, name: str) -> Any:
                return getattr(self.hf, name)

            def __len__(self) -> int:
                return len(self.hf)

        tokenizer = Tokenizer(hf=Facade(original.hf), has_byte_tokens=original.has_byte_tokens)
        token = original.hf.convert_tokens_to_ids(token_text)
        detokenizer = IncrementalDetokenizer(tokenizer)
        counting.decoded = 0
        text = "".join(detokenizer.push([token] * step) for _ in range(4000 // step)) + detokenizer.finish()
        num_decoded = counting.decoded
        assert text == tokenizer.decode([token] * 4000) and len(text) >= 4000
        assert num_decoded < (2.5 if token_text == "a" else 12) * 4000, (kind, step)


def test_encoding_adds_the_tokenizers_own_special_tokens(tokenizers: dict[str, "Tokenizer"]) -> None:
    pieces = tokenizers["sentencepiece"]
    assert pieces.encode("the fox")[0] == pieces.hf.bos_token_id == 1
    assert pieces.encode("the fox")[1:] == pieces.encode("the fox", add_special_tokens=False)
    assert pieces.eos_token_id == 2
    assert tokenizers["byte_level"].encode("the fox") == tokenizers["byte_level"].encode(
        "the fox", add_special_tokens=False
    )


def test_decoding_does_not_tidy_spaces_up(tokenizers: dict[str, "Tokenizer"]) -> None:
    text = "a = f (x) , y . z !"
    for kind in ("byte_level", "sentencepiece"):
        tokenizer = tokenizers[kind]
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "settings",
    [
        None,
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True},
        {"tokenizer_class": "LLaMATokenizer", "bos_token": "", "eos_token": "", "unk_token": ""},
    ],
    ids=["no_config", "vicuna", "first_conversions"],
)
def test_sentencepiece_model_alone_encodes_as_sentencepiece_does(
    tmp_path: Path, settings: dict[str, Any] | None
) -> None:
    import sentencepiece

    from pjengine.tokenizer import load_tokenizer

    write_sentencepiece(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in (
        "The quick",
        " leading",
        "  two",
        "日本語 naïve 😀",
        "def f1(x):\n    return x",
        "a  b   c\n\n",
        "",
    ):
        assert tokenizer.encode(text) == [reference.bos_id(), *reference.encode(text)]
    assert (tokenizer.hf.bos_token_id, tokenizer.eos_token_id) == (reference.bos_id(), reference.eos_id())


def test_chat_template_writes_the_special_tokens_itself(tokenizers: dict[str, "Tokenizer"]) -> None:
    tokenizer = tokenizers["byte_level"]
    messages = [{"role": "user", "content": "Hi </s>"}]
    assert tokenizer.render_chat(messages) == "<|user|>Hi </s></s><|assistant|>"
    assert tokenizer.render_chat(messages, add_generation_prompt=False) == "<|user|>Hi </s></s>"
    ids = tokenizer.encode_chat(messages)
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|user|>Hi </s></s><|assistant|>"
    assert tokenizer.render_chat(messages, chat_template="{{ messages[0].content }}") == "Hi </s>"
    assert tokenizer.render_chat(messages, chat_template="{{ mood }}", mood="calm") == "calm"


def test_chat_that_the_template_refuses_is_a_value_error(tokenizers: dict[str, "Tokenizer"]) -> None:
    with pytest.raises(ValueError, match="no system here"):
        tokenizers["byte_level"].render_chat([{"role": "system", "content": "Be brief."}])
    with pytest.raises(ValueError, match="pass chat_template"):
        tokenizers["sentencepiece"].render_chat([{"role": "user", "content": "Hi"}])


def test_folder_without_a_tokenizer_is_an_os_error(tmp_path: Path) -> None:
    from pjengine.tokenizer import load_tokenizer

    (tmp_path / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    with pytest.raises(OSError, match=r"found none of tokenizer\.json"):
        load_tokenizer(tmp_path)
