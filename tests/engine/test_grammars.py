"""Masks against the definition of a language, and grammars that do harm."""

import itertools
import json
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.test_tokenizer import (
    DEMO,
    chr_of_byte,
    write_byte_level,
    write_crossing,
    write_metaspace,
    write_sentencepiece,
)

WRITERS = {"byte_level": write_byte_level, "sentencepiece": write_sentencepiece, "crossing": write_crossing}
CHOICE = ["yes", "yes, but", "no", "{x}\\", "a.b|c"]
EXTRA_TOKENS = 45  # of the model's vocabulary, beyond the tokenizer's
UNICODE = {"naïve café", "naïve", "日本語", "日本", "日曜", "😀 1", "😀😀", "\U0001f601"}


def words_of(*parts: str) -> set[str]:
    """Each way to take a letter of each part."""
    return {"".join(letters) for letters in itertools.product(*parts)}


# What is asked for, and all texts of the language.
LANGUAGES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "choice": ({"choice": CHOICE}, {*CHOICE}),
    "unicode": ({"choice": sorted(UNICODE)}, UNICODE),
    "regex": ({"regex": "[ab]{1,3}(c|dog)?"}, {
        word + end for n in (1, 2, 3) for word in words_of(*["ab"] * n) for end in ("", "c", "dog")
    }),
    "grammar": ({"grammar": 'start: "f" body\nbody: "(" body? ")" | /x[0-3]/'}, {
        f"f{'(' * n}{middle}{')' * n}" for n in range(1, 40) for middle in ("", "x0", "x1", "x2", "x3")
    } | {f"fx{i}" for i in range(4)}),
    "attributes": ({"grammar": 'start: x "."\nx[capture="temperature=1"]: /[ab]{2}/'}, {
        f"{a}{b}." for a in "ab" for b in "ab"
    }),
    "ebnf": ({"grammar": 'root ::= "f" body # as llama.cpp has it\nbody ::= "(" body ")" | "x" [0-3]?\n'}, {
        f"f{'(' * n}x{digit}{')' * n}" for n in range(40) for digit in ("", *"0123")
    }),
    "escapes": ({"grammar": r'root ::= "\u0022\U0001f600\\u0041" [\u00e9\u005d-\u005f]' + "\n"}, {
        f'"😀\\u0041{char}' for char in "é]^_"
    }),
    "json": (
        {
            "json": {
                "type": "object",
                "properties": {"a": {"enum": [1, "two", None]}, "b": {"type": "boolean"}},
                "required": ["a"],
                "additionalProperties": False,
            },
            "disable_any_whitespace": True,
        },
        {f'{{"a":{a}{b}}}' for a in ("1", '"two"', "null") for b in ("", ',"b":true', ',"b":false')},
    ),
    "spaces": (
        {"json": {"const": [1]}, "whitespace_pattern": " {0,2}"},
        {f"[{a}1{b}]" for a in ("", " ", "  ") for b in ("", " ", "  ")},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from pjengine.tokenizer import load_tokenizer

    loaded = {"demo": load_tokenizer(DEMO)}
    for name, write in WRITERS.items():
        folder = tmp_path_factory.mktemp(name)
        write(folder)
        loaded[name] = load_tokenizer(folder)
    return loaded


@pytest.fixture(scope="module")
def open_grammars(tokenizers: dict[str, Any]) -> Iterator[Callable[[str], Any]]:
    """The grammars of an engine with a tokenizer; one for each is enough."""
    from pjengine.grammars import Grammars

    opened: dict[str, Any] = {}

    def open_(name: str) -> Any:
        if name not in opened:
            tokenizer = tokenizers[name]
            ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            opened[name] = Grammars(tokenizer, ends, len(tokenizer) + EXTRA_TOKENS)
        return opened[name]

    yield open_
    for grammars in opened.values():
        grammars.close()


@pytest.fixture(scope="module")
def grammars(open_grammars: Callable[[str], Any]) -> Any:
    return open_grammars("demo")


def make(**fields: Any) -> Any:
    from pjengine import StructuredOutputsParams

    return StructuredOutputsParams(**fields)


def token_bytes(tokenizer: Any, name: str) -> list[bytes | None]:
    """What each token adds to a text; None: it is special."""
    by_char = {chr(byte): byte for byte in [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]}
    others = [byte for byte in range(256) if byte not in by_char.values()]
    by_char |= {chr(256 + i): byte for i, byte in enumerate(others)}
    assert all(by_char[chr_of_byte(byte)] == byte for byte in range(128, 256))
    added: dict[str, int] = tokenizer.hf.get_added_vocab()
    found: list[bytes | None] = []
    for token in range(len(tokenizer)):
        piece = tokenizer.hf.convert_ids_to_tokens(token)
        if token in tokenizer.special_ids:
            found.append(None)
        elif piece in added:
            found.append(piece.encode())
        elif name == "sentencepiece":
            is_byte = piece.startswith("<0x") and len(piece) == 6
            found.append(bytes([int(piece[3:5], 16)]) if is_byte else piece.replace("▁", " ").encode())
        else:
            found.append(bytes(by_char[char] for char in piece))
    return found


def allowed(grammars: Any, *matchers: Any) -> list[set[int]]:
    """The tokens that the mask of each matcher has."""
    masks = grammars.masks(matchers)
    bits = (masks[:, :, None] >> range(32)) & 1
    return [set(row.reshape(-1).nonzero()[0].tolist()) for row in bits]


def is_forced(output: bytes, starts: set[bytes], whole: set[bytes]) -> bool:
    """Whether there is but one way to go on."""
    nexts = {start for start in starts if len(start) == len(output) + 1 and start.startswith(output)}
    return len(nexts) == 1 and output not in whole


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", ["demo", *WRITERS])
def test_a_mask_holds_the_tokens_that_keep_the_output_a_beginning_of_a_text(
    open_grammars: Callable[[str], Any], tokenizers: dict[str, Any], name: str, language: str
) -> None:
    fields, texts = LANGUAGES[language]
    grammars, tokenizer, rng = open_grammars(name), tokenizers[name], random.Random(1)
    spellings = token_bytes(tokenizer, name)
    whole = {text.encode() for text in texts}
    starts = {text[:length] for text in whole for length in range(len(text) + 1)}
    ends = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    num_complete = 0
    for _ in range(20):
        matcher, output = grammars.matcher(make(**fields)), b""
        for _ in range(12):
            wanted = {
                token for token, spelling in enumerate(spellings) if spelling and output + spelling in starts
            }
            [found] = allowed(grammars, matcher)
            assert found & ends == (ends if output in whole else set())
            assert found - ends <= wanted
            # Of tokens that read alike one is enough, and of several ways to spell what must come.
            is_all = {spellings[token] for token in found - ends} == {spellings[token] for token in wanted}
            assert is_all or (found and is_forced(output, starts, whole))
            token = rng.choice(sorted(found - ends))
            matcher.consume(token)
            output += spellings[token] or b""
            assert not matcher.error
            is_end = output in whole and not any(
                start != output and start.startswith(output) for start in starts
            )
            assert matcher.is_complete == is_end
            if is_end:
                num_complete += 1
                break
    assert num_complete > 3


def test_masks_of_several_matchers_are_those_of_each(grammars: Any) -> None:
    matchers = [grammars.matcher(make(choice=["ab", "ac"])), grammars.matcher(make(regex="[x-z]+"))]
    matchers.append(matchers[1].fork())
    matchers[2].consume(allowed(grammars, matchers[1])[0].pop())
    together = allowed(grammars, *matchers)
    assert together == [allowed(grammars, matcher)[0] for matcher in matchers]
    assert len({frozenset(tokens) for tokens in together}) == 3  # the last may end


def test_a_fork_goes_its_own_way(grammars: Any, tokenizers: dict[str, Any]) -> None:
    [a], [b] = (tokenizers["demo"].encode(letter) for letter in "ab")
    matcher = grammars.matcher(make(choice=["ax", "by"]))
    fork = matcher.fork()
    matcher.consume(a)
    fork.consume(b)
    assert not matcher.error and not fork.error
    assert allowed(grammars, matcher) == [set(tokenizers["demo"].encode("x"))]
    assert allowed(grammars, fork) == [set(tokenizers["demo"].encode("y"))]


def test_a_matcher_that_got_a_wrong_token_says_so_and_allows_nothing(grammars: Any) -> None:
    matcher = grammars.matcher(make(regex="ab"))
    matcher.consume(2)
    assert "doesn't satisfy the grammar" in matcher.error and not matcher.is_complete
    assert allowed(grammars, matcher) == [set()]


def chain(length: int) -> dict[str, Any]:
    """A schema whose definitions refer to each other, one after the other."""
    named = {
        f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(length)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**named, f"d{length}": {"type": "null"}}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def ring(length: int) -> str:
    """A grammar whose rules all go on with the next one, and may all come first."""
    first = " | ".join(f'"{i}" r{i}' for i in range(length))
    rules = (f'r{i} ::= [a-z]{{1,9}} "{i}" | r{(i + 1) % length}' for i in range(length))
    return "\n".join([f"root ::= {first}", *rules])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no type": ({"json": {"type": "strin"}}, r"outputs.json='{\"type\": \"strin\"}' .*Invalid type"),
    "unsupported": ({"json": {"not": {}}}, r"Unimplemented keys: \[\"not\"\]"),
    "no such definition": ({"json": {"$ref": "#/$defs/x"}}, "does not exist"),
    "not here": ({"json": {"$ref": "http://localhost/x"}}, "not present"),
    "format": ({"json": {"type": "string", "format": "zip"}}, "Unknown format"),
    "impossible": ({"json": {"enum": []}}, "Unsatisfiable"),
    "impossible property": (
        {"json": {"type": "object", "properties": {"a": False}, "required": ["a"]}},
        "unsatisfiable",
    ),
    "no Unicode": ({"json": r'{"const": "\ud800"}'}, "structured_outputs.json=.* hex escape"),
    "deep": ({"json": nested(300)}, "recursion limit"),
    "many definitions": ({"json": chain(10_000)}, "structured_outputs.json="),
    "regex": ({"regex": "(a"}, r"structured_outputs.regex='\(a' .*(\n.*)*unclosed group"),
    "look ahead": ({"regex": "(?=a)b"}, "look-around"),
    "nothing": ({"regex": r"[^\x{0}-\x{10ffff}]"}, "no output satisfies it"),
    "nothing in common": ({"grammar": "start: A\nA: /a/ & /b/"}, "no output satisfies it"),
    "whitespace": ({"json": {}, "whitespace_pattern": "("}, r"whitespace_pattern='\(' .*(\n.*)*unclosed"),
    "schema and whitespace": ({"json": {"not": {}}, "whitespace_pattern": " ?"}, r"outputs.json=.*\"not\""),
    "repetitions": ({"regex": "a{1000000000}"}, "too many expressions"),
    "repeated repetitions": ({"regex": "(((a{1000}){1000}){1000})"}, "cannot be followed"),
    "lark": ({"grammar": "start: foo"}, "structured_outputs.grammar='start: foo' .*unknown name"),
    "temperature": (
        {"grammar": 'start: x\nx[capture="]", temperature=2.0]: /[a-z]+/'},
        "followed: rule x has a temperature, .*: leave it out",
    ),
    "ebnf": ({"grammar": 'root ::= "a"\nb ::= ("c"'}, r"grammar=.* followed: Expected '\)' at line 2"),
    "no character": ({"grammar": r'root ::= "\ud800"'}, r"followed: \\ud800 is no character"),
    "no root": ({"grammar": 'foo ::= "a"'}, "No 'root' rule"),
    "no such rule": ({"grammar": "root ::= foo"}, "'foo' not found"),
    "many items": ({"grammar": ring(300)}, "Too many items"),
    "no start": ({"grammar": 'foo: "a"'}, "start"),
    "memory": ({"json": {"type": "integer", "multipleOf": 999_983}}, "make it smaller"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_followed_is_refused_with_the_reason(grammars: Any, case: str) -> None:
    fields, message = BAD[case]
    with pytest.raises(ValueError, match=message) as caught:
        grammars.matcher(make(**fields))
    assert len(str(caught.value)) < 700 and "backtrace" not in str(caught.value)
    grammars.matcher(make(choice=["it goes on"]))


EMPTY = {"type": "integer", "minimum": 5, "maximum": 3}


def required(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties]}


BAD_PARTS: dict[str, dict[str, Any]] = {
    "at #: Invalid type: strin": {"type": "strin"},
    "at #/properties/a~1b/items/anyOf/1: Invalid type: strin": {
        "properties": {
            "c": {"type": "null"},
            "a/b": {"items": {"anyOf": [{"type": "null"}, {"type": "strin"}]}},
        }
    },
    'at #/$defs/x/prefixItems/0: Unimplemented keys: ["not"]': {
        "$defs": {"x": {"prefixItems": [{"not": {}}]}},
        "allOf": [{"$ref": "#/$defs/x"}],
    },
    "at #/properties/a~1b/items/prefixItems/1/properties/a: Unsatisfiable schema: minimum (5) is": {
        "properties": {
            "c": required(a=EMPTY),
            "a/b": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "array",
                    "minItems": 2,
                    "prefixItems": [{}, required(a=EMPTY)],
                },
            },
        },
        "required": ["a/b"],
        "type": "object",
    },
    "at #/additionalProperties: regex parse error": {"additionalProperties": {"pattern": "(a"}},
}


@pytest.mark.parametrize("message", BAD_PARTS)
def test_a_refusal_names_the_part_of_the_schema(grammars: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"cannot be followed: {re.escape(message)}"):
        grammars.matcher(make(json=BAD_PARTS[message]))


def test_definitions_may_refer_to_each_other_a_thousand_times(grammars: Any) -> None:
    matcher = grammars.matcher(make(json=chain(1000)))
    assert allowed(grammars, matcher)[0]


def endless() -> str:
    """A short schema that takes minutes to compile."""
    patterns = [f"^(.|\\n)*a.{{{i}}}b(.|\\n)*$" for i in range(7)]
    return json.dumps({"allOf": [{"type": "string", "pattern": pattern} for pattern in patterns]})


def test_a_grammar_is_given_up_when_it_takes_too_long(tokenizers: dict[str, Any]) -> None:
    from pjengine.grammar_check import GrammarCheck
    from pjengine.grammars import Grammars, _source

    grammars = Grammars(tokenizers["demo"], [0], 4096)
    check = GrammarCheck(*grammars._setup)
    try:
        harmless = _source(make(choice=["a"]))
        assert check.error(harmless) == ""
        assert check._process is not None
        check._process.send_signal(signal.SIGSTOP)  # it cannot be done before the time is up
        assert "more than 0 s" in check.error(_source(make(json=endless())), timeout_s=0)
        assert check.error(harmless) == ""  # another process
    finally:
        check.close()


def test_closing_does_not_wait_for_a_grammar_under_way(tokenizers: dict[str, Any]) -> None:
    from pjengine.grammars import Grammars

    grammars = Grammars(tokenizers["demo"], [0], 4096)
    grammars.matcher(make(choice=["a"]))
    errors: list[BaseException] = []

    def compile_() -> None:
        try:
            grammars.matcher(make(json={"type": "integer", "multipleOf": 999_983}))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=compile_)
    thread.start()
    while not grammars._compiling.locked():
        time.sleep(0.001)
    grammars.close()
    thread.join(30)
    assert [str(error) for error in errors] == ["this engine is closed; create another"]
    with pytest.raises(RuntimeError, match="closed"):
        grammars.matcher(make(choice=["a"]))


def test_what_is_compiled_does_not_wait_for_what_is_not(grammars: Any) -> None:
    grammars.matcher(make(choice=["a"]))
    slow = threading.Thread(target=lambda: grammars.matcher(make(choice=["not there yet"])))
    with grammars._compiling:
        slow.start()
        found = list[Any]()
        quick = threading.Thread(target=lambda: found.append(grammars.matcher(make(choice=["a"]))))
        quick.start()
        quick.join(30)
        assert slow.is_alive() and len(found) == 1
    slow.join()
    quick.join()


def test_compiled_grammars_are_kept_up_to_a_number(tokenizers: dict[str, Any], monkeypatch: Any) -> None:
    from pjengine import grammars as module

    monkeypatch.setattr(module, "MAX_CACHED", 2)
    grammars = module.Grammars(tokenizers["demo"], [0], 4096)
    asked: list[str] = []
    error = grammars._check.error

    def count(grammar: str) -> str:
        asked.append(grammar)
        return error(grammar)

    monkeypatch.setattr(grammars._check, "error", count)
    for text in "abacab":
        grammars.matcher(make(choice=[text]))
    grammars.close()
    assert len(asked) == 4  # a, b, c and, since c has taken its place, b


def test_a_tokenizer_that_llguidance_cannot_read_is_refused(tmp_path: Path) -> None:
    from pjengine.grammars import Grammars
    from pjengine.tokenizer import load_tokenizer

    write_metaspace(tmp_path)
    grammars = Grammars(load_tokenizer(tmp_path), [1], 13)
    with pytest.raises(ValueError, match="not possible with this tokenizer: can't determine decoder type"):
        grammars.matcher(make(choice=["a"]))
    with pytest.raises(ValueError, match="need a tokenizer"):
        Grammars(None, [1], 13).matcher(make(choice=["a"]))
