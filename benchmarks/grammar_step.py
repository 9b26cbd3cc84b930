"""How much longer a step of decodes takes when every request follows a JSON schema that never ends.

    python -m benchmarks.grammar_step > benchmarks/results/<date>-grammar-<gpu>.jsonl

Weights and vocabulary are random.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import pjengine
from pjengine.bench import environment, latency
from pjengine.models.shapes import SHAPES

LETTERS = 'etaoinshrdlucmfwypvbgkjqxz0123456789ET"{}[]:,._-'
PROPERTIES = {"name": {"type": "string", "maxLength": 40}, "age": {"type": "integer", "minimum": 0}}
PERSON = {
    "type": "object",
    "properties": {**PROPERTIES, "tags": {"type": "array", "items": {"type": "string"}}},
}
FORM = pjengine.StructuredOutputsParams(json={"type": "array", "items": PERSON, "minItems": 1000})
VARIANTS = {"plain": {}, "bias": {"logit_bias": {0: 1.0}}, "grammar": {"structured_outputs": FORM}}


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Byte-level BPE as of Llama 3: parts of words, many with a space before them."""
    rng = random.Random(0)
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    parts = [*LETTERS, *(letter for i, letter in enumerate(LETTERS) for _ in range(26 - i)), *["Ġ"] * 40]
    while len(vocab) < vocab_size - 1:
        left, right = rng.choice(parts), rng.choice(parts)
        if (both := left + right) not in vocab and len(both) <= 12 and "Ġ" not in both[1:]:
            vocab[both] = len(vocab)
            merges.append((left, right))
            parts += [both] * (len(both) < 6)
    bpe = Tokenizer(models.BPE(vocab, merges))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.add_special_tokens(["<|end|>"])
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


options = argparse.ArgumentParser(description=__doc__)
options.add_argument("--shape", default="llama-8b")
options.add_argument("--batch-size", type=int, default=64)
options.add_argument("--output-len", type=int, default=128)
args = options.parse_args()
plain_ms = 0.0
with tempfile.TemporaryDirectory() as tokenizer:
    write_tokenizer(Path(tokenizer), SHAPES[args.shape].vocab_size)
    sizes = {"max_num_seqs": args.batch_size, "max_num_batched_tokens": 64 * args.batch_size}
    with pjengine.LLM(args.shape, load_format="dummy", tokenizer=tokenizer, warm_up=False, **sizes) as llm:
        for name, wish in VARIANTS.items():
            lens = {"prompt_len": 64, "output_len": args.output_len}
            row = latency(llm, args.batch_size, **lens, sampling={"temperature": 1.0, **wish})
            plain_ms = plain_ms or row["tpot_ms"]
            row |= {"bench": "grammar-step", "shape": args.shape, "sampling": name}
            print(json.dumps({**row, "ratio": row["tpot_ms"] / plain_ms, **environment()}), flush=True)
