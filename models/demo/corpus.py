"""CPython's standard library as training data: choosing files, the tokenizer, token files.

Source: the `Lib` folder of CPython 3.12 or newer, under the PSF License Agreement.
"""

import ast
import json
import random
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt16
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"  # id 0: before each file, and at its end
VOCAB_SIZE = 4096
HELD_OUT_SHARE = 0.02  # of the bytes, whole files

# Generated tables, texts in quotes, and files that are wrong on purpose.
SKIPPED = re.compile(
    r"(^|/)(site-packages|__pycache__|pydoc_data|__phello__|lib2to3/tests/data|test/test_lib2to3/data)/"
    r"|(^|/)(_sysconfigdata|badsyntax|bad_coding|__hello__|this\.py)"
)
CHARMAP = re.compile(r"^(decoding_table|decoding_map) =", re.MULTILINE)
MAX_NON_LETTER_SHARE = 0.5  # of the non-blank characters; above it a file is a table
MAX_REPEATED_SHARE = 0.5  # of the long lines; above it a file is a copy of files already taken
LONG_LINE = 20  # characters: shorter lines are alike everywhere

# Indentation, newlines and words are separate pieces, so that a prompt may end after any of them:
# only one blank before a word belongs to it.
PIECE = r" ?[\p{L}_]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|\n+| {2,}|\t+|\s"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '# ' + message['role'] + ': ' + message['content'].replace('\n', '\n# ') + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '# assistant:' }}{% endif %}"
)


@dataclass(frozen=True)
class SourceFile:
    name: str  # relative to the standard library
    text: str


def stdlib_folder() -> Path:
    """The running interpreter's own standard library."""
    return Path(sysconfig.get_path("stdlib"))


def read_corpus(folders: list[Path]) -> list[SourceFile]:
    """The Python files worth learning from, in name order, near-copies dropped.

    A file of a later folder is taken only where no earlier folder has that name.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            found.setdefault(path.relative_to(folder).as_posix(), path)
    files, seen = [], set[int]()
    for name, path in found.items():
        text = None if SKIPPED.search(name) else _readable_text(path)
        if text is None:
            continue
        lines = [hash(line) for line in map(str.strip, text.splitlines()) if len(line) >= LONG_LINE]
        repeated = sum(line in seen for line in lines)
        if repeated <= MAX_REPEATED_SHARE * len(lines):
            files.append(SourceFile(name, text))
            seen.update(lines)
    return files


def _readable_text(path: Path) -> str | None:
    """The file's text; None where it is not valid Python in UTF-8, is tiny, or is a table of data."""
    try:
        text = path.read_bytes().decode("utf-8")
        ast.parse(text)
    except (ValueError, SyntaxError, RecursionError):
        return None
    visible = [char for char in text if not char.isspace()]
    letters = sum(char.isalpha() or char == "_" for char in visible)
    if len(visible) < 100 or letters < (1 - MAX_NON_LETTER_SHARE) * len(visible) or CHARMAP.search(text):
        return None
    return text.replace("\r\n", "\n")


def split_held_out(files: list[SourceFile], seed: int) -> tuple[list[SourceFile], list[SourceFile]]:
    """(training, held-out) files: whole files, drawn by `seed`, until the share of bytes is reached."""
    drawn = files.copy()
    random.Random(seed).shuffle(drawn)
    wanted = HELD_OUT_SHARE * sum(len(file.text) for file in files)
    held_out: list[SourceFile] = []
    while sum(len(file.text) for file in held_out) < wanted:
        held_out.append(drawn.pop())
    return drawn, held_out


def train_tokenizer(files: list[SourceFile], vocab_size: int) -> Tokenizer:
    """A byte-level BPE whose pieces never cross a line's end or its indentation."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator((file.text for file in files), trainer)
    return tokenizer


def tokenize(tokenizer: Tokenizer, files: list[SourceFile]) -> UInt16[np.ndarray, " n"]:
    """All files as one run of token ids, `END_OF_TEXT` before each and after the last."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = [end]
    for encoding in tokenizer.encode_batch([file.text for file in files]):
        ids += [*encoding.ids, end]
    return np.array(ids, np.uint16)


def bytes_per_token(tokenizer: Tokenizer) -> Int[np.ndarray, " vocab"]:
    """Bytes of text that each token id stands for; `END_OF_TEXT` stands for none."""
    lengths = np.zeros(tokenizer.get_vocab_size(), np.int32)
    for token, token_id in tokenizer.get_vocab().items():
        lengths[token_id] = 0 if token == END_OF_TEXT else len(token)  # one letter stands for one byte
    return lengths


def prepare(folders: list[Path], out: Path, *, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> None:
    """Writes into `out` the tokenizer, train.npy, held_out.npy, and corpus.json about them."""
    train_files, held_out_files = split_held_out(read_corpus(folders), seed)
    tokenizer = train_tokenizer(train_files, vocab_size)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(), indent=2) + "\n")
    about: dict[str, object] = {
        "python_versions": [folder.name for folder in folders],
        "seed": seed,
        "vocab_size": tokenizer.get_vocab_size(),
    }
    for name, files in (("train", train_files), ("held_out", held_out_files)):
        tokens = tokenize(tokenizer, files)
        np.save(out / f"{name}.npy", tokens)
        num_bytes = sum(len(file.text.encode()) for file in files)
        about[name] = {"files": len(files), "bytes": num_bytes, "tokens": len(tokens)}
    about["held_out_files"] = sorted(file.name for file in held_out_files)
    (out / "corpus.json").write_text(json.dumps(about, indent=2) + "\n")


def tokenizer_config() -> dict[str, object]:
    """tokenizer_config.json, for `transformers.AutoTokenizer`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "chat_template": CHAT_TEMPLATE,
    }
