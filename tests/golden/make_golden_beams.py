"""Writes beams.npz: what Hugging Face's beam search finds after a few prompts, with a tiny model.

    /tmp/torchenv/bin/python tests/golden/make_golden_beams.py

`make_golden.py` says how to make the environment. The vocabulary is small, so that sequences end at any
length.
A seed is taken only if many end early, the ways to stop differ, and float64 finds the same: then no choice
hangs on last bits.
"""

import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: TID251
import transformers
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))
from golden import checksum, make_weights  # noqa: E402

CONFIG: dict[str, Any] = dict(
    vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=[2, 3, 4],
    tie_word_embeddings=False, architectures=["LlamaForCausalLM"], dtype="float32",
)  # fmt: skip
PROMPT_LENGTHS = (5, 16, 30)
MAX_TOKENS = 20


def cases() -> list[dict[str, Any]]:
    """Names as in SamplingParams; `stop_token_ids` end a sequence as `eos_token_id` does."""
    every = [
        {"best_of": width, "early_stopping": mode, "length_penalty": penalty, "prompt": prompt}
        for width in (2, 4, 8)
        for mode in (True, False, "never")
        for penalty in (0.6, 1.0, 2.0)
        for prompt in range(len(PROMPT_LENGTHS))
    ]
    base: dict[str, Any] = {"best_of": 4, "length_penalty": 1.0, "prompt": 0}
    more: list[dict[str, Any]] = [
        {"early_stopping": False, "stop_token_ids": [7, 11, 19]},
        {"early_stopping": True, "stop_token_ids": [7]},
        {"early_stopping": "never", "ignore_eos": True},
        {"early_stopping": True, "min_tokens": 6},
        {"early_stopping": "never", "length_penalty": -1.0},
        {"early_stopping": False, "best_of": 16},  # more than half the vocabulary
    ]
    return every + [{**base, **own} for own in more]


def search(model: Any, case: dict[str, Any], prompt: list[int]) -> tuple[list[list[int]], list[float]]:
    ends = [] if case.get("ignore_eos") else list(CONFIG["eos_token_id"])
    ends += case.get("stop_token_ids", [])
    model.generation_config.eos_token_id = ends or None
    out = model.generate(
        torch.tensor([prompt]),
        num_beams=case["best_of"],
        num_return_sequences=case["best_of"],
        do_sample=False,
        max_new_tokens=MAX_TOKENS,
        min_new_tokens=case.get("min_tokens"),
        length_penalty=case["length_penalty"],
        early_stopping=case["early_stopping"],
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    lengths = (out.beam_indices >= 0).sum(1).tolist()
    tokens = [
        row[len(prompt) : len(prompt) + n].tolist() for row, n in zip(out.sequences, lengths, strict=True)
    ]
    return tokens, out.sequences_scores.tolist()


def answer(seed: int) -> dict[str, Any] | None:
    config = LlamaConfig(**CONFIG)
    model = LlamaForCausalLM(config).eval()
    shapes = {name: list(tensor.shape) for name, tensor in sorted(model.state_dict().items())}
    weights = make_weights(shapes, seed)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
        save_file(tensors, f"{folder}/model.safetensors", {"format": "pt"})
        model = LlamaForCausalLM.from_pretrained(folder)
        saved = json.loads((Path(folder) / "config.json").read_text())
    rng = np.random.default_rng(seed + 1)
    prompts = [rng.integers(3, 32, length).tolist() for length in PROMPT_LENGTHS]
    if not ends_early(search(model, cases()[0] | {"best_of": 8}, prompt)[0] for prompt in prompts):
        return None
    results = [(case, *search(model, case, prompts[case["prompt"]])) for case in cases()]
    if not ends_early(found for _, found, _ in results) or num_modes(results) < 2:
        return None
    exact = model.double()
    for case, tokens, _ in results:
        if search(exact, case, prompts[case["prompt"]])[0] != tokens:
            return None
    found = [{**case, "sequences": tokens, "scores": scores} for case, tokens, scores in results]
    return dict(
        config=saved, shapes=shapes, seed=seed, prompts=prompts, max_tokens=MAX_TOKENS, cases=found,
        weight_sum=checksum(weights),
    )  # fmt: skip


def ends_early(found: Iterable[list[list[int]]]) -> bool:
    """A good part of the sequences."""
    return float(np.mean([len(tokens) < MAX_TOKENS for sequences in found for tokens in sequences])) > 0.4


def num_modes(results: list[tuple[dict[str, Any], list[list[int]], list[float]]]) -> int:
    """For how many widths, penalties and prompts the three ways to stop find three different things."""
    by_mode: dict[str, set[str]] = {}
    for case, tokens, _ in results:
        key = json.dumps({**case, "early_stopping": ""})
        by_mode.setdefault(key, set()).add(str(tokens))
    return sum(len(found) == 3 for found in by_mode.values())


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    about = next(found for seed in range(300, 600) if (found := answer(seed)) is not None)
    np.savez_compressed(FOLDER / "beams.npz", about=json.dumps(about))
    lengths = [len(tokens) for case in about["cases"] for tokens in case["sequences"]]
    print(about["seed"], len(about["cases"]), np.bincount(lengths))
