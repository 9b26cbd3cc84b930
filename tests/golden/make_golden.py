"""Writes the golden files beside it: tiny Hugging Face models and what they answer.

Needs torch and transformers, in an environment of its own, from the root of the repository:

    python3.11 -m venv /tmp/torchenv
    /tmp/torchenv/bin/pip install torch==2.13.0 transformers==5.17.0 safetensors
    /tmp/torchenv/bin/python tests/golden/make_golden.py              # all of them
    /tmp/torchenv/bin/python tests/golden/make_golden.py gpt2 tied    # some cases
    /tmp/torchenv/bin/python tests/golden/make_golden.py hidden_states attentions

The cases are in the tables of cases_*.py. torch's CPU wheel is enough; another version of torch, or another
processor, changes last bits of the logits.
"""

import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: TID251
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))
import cases_2023  # noqa: E402
import cases_modern  # noqa: E402
import cases_moe  # noqa: E402
from cases_llama import DYNAMIC_LENGTHS, LLAMA, ROPES  # noqa: E402
from families import Family  # noqa: E402
from golden import ATTENTIONS, CASES, STATES, checksum, load, make_weights  # noqa: E402
from make_golden_restated import RESTATED  # noqa: E402

FAMILIES: tuple[Family, ...] = (LLAMA, *cases_2023.FAMILIES, *cases_modern.FAMILIES, *cases_moe.FAMILIES)


class Transformers:
    """One case of what transformers ships. Tensors have the names of its checkpoints, not of its modules."""

    def __init__(self, family: Family, name: str) -> None:
        self.kind = getattr(transformers, family.architecture)
        fields = copy.deepcopy(family.base | family.cases[name])  # transformers completes rope_parameters
        config = self.kind.config_class(**fields, architectures=[family.architecture], dtype="float32")
        with tempfile.TemporaryDirectory() as folder:
            self.kind(config).save_pretrained(folder)
            saved = load_file(f"{folder}/model.safetensors")
        self.shapes = {name: list(saved[name].shape) for name in sorted(saved)}
        self.config = json.loads(config.to_json_string(use_diff=True)) | {
            "architectures": [family.architecture]
        }
        self.hf_config = config
        self.attention = family.attention

    def fill(self, weights: dict[str, np.ndarray]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.hf_config.save_pretrained(folder)
            tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
            save_file(tensors, f"{folder}/model.safetensors", {"format": "pt"})
            self.model, info = self.kind.from_pretrained(
                folder, attn_implementation=self.attention, output_loading_info=True
            )
        assert not any(info.values()), info

    def logits(self, tokens: list[int]) -> torch.Tensor:
        return self.model(torch.tensor([tokens]), use_cache=False).logits[0].float()

    def hidden_states(self, tokens: list[int]) -> torch.Tensor:
        """[layers + 1, tokens, width]"""
        outputs = self.model(torch.tensor([tokens]), use_cache=False, output_hidden_states=True)
        return torch.stack(outputs.hidden_states)[:, 0]

    def attentions(self, tokens: list[int]) -> torch.Tensor:
        """[layers, heads, tokens, tokens]"""
        self.model.set_attn_implementation("eager")
        outputs = self.model(torch.tensor([tokens]), use_cache=False, output_attentions=True)
        return torch.stack(outputs.attentions)[:, 0]

    def generate(self, prompt: list[int], new_tokens: int) -> tuple[list[int], torch.Tensor]:
        """Returns the greedy tokens and the logits that each was chosen from."""
        self.model.generation_config.eos_token_id = None
        out = self.model.generate(
            torch.tensor([prompt]),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = out.sequences[0, len(prompt) :].tolist()
        assert len(tokens) == new_tokens
        return tokens, torch.stack(out.logits)[:, 0]


class Restated:
    """One case of what transformers does not ship, by our own statement of the published model."""

    def __init__(self, family: Family, name: str) -> None:
        self.config = family.base | family.cases[name] | {"architectures": [family.architecture]}
        shapes, self.forward = RESTATED[family.architecture]
        self.shapes = dict(sorted(shapes(self.config).items()))

    def fill(self, weights: dict[str, np.ndarray]) -> None:
        self.weights = {name: torch.from_numpy(array) for name, array in weights.items()}

    def logits(self, tokens: list[int]) -> torch.Tensor:
        return self.forward(self.config, self.weights, torch.tensor(tokens))

    def generate(self, prompt: list[int], new_tokens: int) -> tuple[list[int], torch.Tensor]:
        tokens, logits = list(prompt), []
        for _ in range(new_tokens):
            logits.append(self.logits(tokens)[-1])
            tokens.append(int(logits[-1].argmax()))
        return tokens[len(prompt) :], torch.stack(logits)


def answer(family: Family, name: str, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    case: Restated | Transformers = (Restated if family.architecture in RESTATED else Transformers)(
        family, name
    )
    weights = make_weights(case.shapes, seed, **family.draws)
    case.fill(weights)
    rng = np.random.default_rng(seed + 1)
    vocab_size = case.config["vocab_size"]
    prompt = rng.integers(3, vocab_size, family.prompt_lengths.get(name, 40)).tolist()
    arrays = {"last_logits": case.logits(prompt)[-4:, :256].numpy()}
    case.fill(weights)  # dynamic scaling remembers the longest sequence it has seen
    tokens, logits = case.generate(prompt, family.new_tokens)
    if not name.startswith("dynamic"):
        recomputed = case.logits(prompt + tokens)[len(prompt) - 1 : -1]
        assert recomputed.argmax(-1).tolist() == tokens, "transformers' cache changes the answer"
    top = logits.topk(2).values
    about = dict(
        config=case.config,
        config_v4=family.old(case.config),
        shapes=case.shapes,
        seed=seed,
        prompt=prompt,
        tokens=tokens,
        margin=float((top[:, 0] - top[:, 1]).min()),
    )
    if family is LLAMA and isinstance(case, Transformers):
        rotary = case.kind(case.hf_config).model.rotary_emb
        arrays["inv_freq"] = rotary.inv_freq.numpy().copy()
        about["attention_factor"] = float(rotary.attention_scaling)
    return about | dict(family.draws) | {"weight_sum": checksum(weights)}, arrays


def write_case(family: Family, name: str, folder: Path = FOLDER) -> None:
    """Takes the first seed whose greedy tokens are far from any tie and not stuck in a short loop."""
    margin, distinct = (0.02, 20) if family is LLAMA else (0.005, 8)
    for seed in range(100, 250):
        about, arrays = answer(family, name, seed)
        if about["margin"] > margin and len(set(about["tokens"])) >= distinct:
            break
    else:
        raise RuntimeError(f"{name}: no seed gives well separated logits")
    np.savez_compressed(folder / f"{name}.npz", about=json.dumps(about), **arrays)
    print(name, seed, about["margin"], about["tokens"], float(arrays["last_logits"].std()))


def write_hidden_states() -> None:
    """Of some cases, as they are on disk: of the last four tokens of the prompt, and the mean of all."""
    arrays = {}
    for family in FAMILIES:
        for name in STATES.intersection(family.cases):
            golden, case = load(name), Transformers(family, name)
            case.fill(golden.weights())
            states = case.hidden_states(golden.prompt)
            arrays[name] = torch.cat([states[:, -4:], states.mean(dim=1, keepdim=True)], dim=1).numpy()
    np.savez_compressed(FOLDER / "hidden_states.npz", **arrays)


def write_attentions() -> None:
    """Of some cases, as they are on disk: of the last four tokens of the prompt."""
    arrays = {}
    for family in FAMILIES:
        for name in ATTENTIONS.intersection(family.cases):
            golden, case = load(name), Transformers(family, name)
            case.fill(golden.weights())
            arrays[name] = case.attentions(golden.prompt)[:, :, -4:].numpy()
    np.savez_compressed(FOLDER / "attentions.npz", **arrays)


def write_ropes() -> None:
    about, arrays = {}, {}
    for name, (head_dim, length, parameters) in ROPES.items():
        config = LlamaConfig(
            **(LLAMA.base | {"head_dim": head_dim, "max_position_embeddings": length}),
            architectures=["LlamaForCausalLM"],
        )
        config.rope_parameters = dict(parameters)
        rotary = LlamaForCausalLM(config).model.rotary_emb
        arrays[name] = rotary.inv_freq.numpy()
        saved = json.loads(config.to_json_string(use_diff=True)) | {"architectures": ["LlamaForCausalLM"]}
        about[name] = {"config": saved, "attention_factor": float(rotary.attention_scaling)}
        if parameters["rope_type"] == "dynamic":
            for tokens in DYNAMIC_LENGTHS:
                scaled, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, seq_len=torch.tensor(tokens))
                arrays[f"{name}_{tokens}"] = scaled.numpy()
    np.savez_compressed(FOLDER / "rope_frequencies.npz", about=json.dumps(about), **arrays)


def write_state_dicts() -> None:
    """The same few tensors as torch.save writes them, in both its formats, and as safetensors."""
    torch.manual_seed(0)
    grid = torch.randn(6, 4)
    state = {
        "float32": grid,
        "float64": torch.randn(3, dtype=torch.float64),
        "float16": torch.randn(2, 3).half(),
        "bfloat16": torch.randn(5, 2).bfloat16(),
        "int64": torch.arange(-3, 4),
        "int32": torch.arange(4, dtype=torch.int32).reshape(2, 2),
        "int16": torch.tensor([-32768, 32767], dtype=torch.int16),
        "int8": torch.tensor([-128, 127], dtype=torch.int8),
        "uint8": torch.tensor([0, 255], dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "transposed": grid.T,  # a view of float32's storage with strides (1, 4)
        "offset_view": grid[2:4, 1:3],
        "parameter": torch.nn.Parameter(torch.randn(3, 2)),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
    }
    torch.save(state, FOLDER / "state_zip.bin")
    torch.save(state, FOLDER / "state_legacy.bin", _use_new_zipfile_serialization=False)
    # Newer dtypes have no storage class of their own and are pickled another way, in the zip format only.
    newer = {"float8_e4m3fn": torch.tensor([0.5, -448.0, 3.0]).to(torch.float8_e4m3fn)}
    torch.save(newer, FOLDER / "state_float8.bin")
    dense: dict[str, torch.Tensor] = {
        name: value.detach().contiguous().clone() for name, value in state.items()
    }
    save_file(dense, FOLDER / "state.safetensors")
    (FOLDER / "state.safetensors").chmod(0o644)
    numbers = {name: (v.float() if v.dtype == torch.bfloat16 else v).numpy() for name, v in dense.items()}
    np.savez_compressed(FOLDER / "state_expected.npz", **numbers)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)  # quicker than more, for models this small
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    found = {name: family.architecture for family in FAMILIES for name in family.cases}
    assert found == CASES, f"golden.py lists other cases: {set(found.items()) ^ set(CASES.items())}"
    unknown = set(sys.argv[1:]) - set(CASES) - {"hidden_states", "attentions"}
    if unknown:
        raise SystemExit(f"no such cases: {sorted(unknown)}; there are {list(CASES)}")
    for each in FAMILIES:
        for case in each.cases:
            if case in sys.argv[1:] or len(sys.argv) == 1:
                write_case(each, case)
    if "hidden_states" in sys.argv[1:] or len(sys.argv) == 1:
        write_hidden_states()
    if "attentions" in sys.argv[1:] or len(sys.argv) == 1:
        write_attentions()
    if len(sys.argv) == 1:
        write_ropes()
        write_state_dicts()
