"""Whether transformers loads what `LLM.save_pretrained` writes, and computes from it what we compute.

In two environments, from the root of the repository; the second one is that of make_golden.py:

    .venv/bin/python tests/golden/check_saved.py write /tmp/saved
    /tmp/torchenv/bin/python tests/golden/check_saved.py compare /tmp/saved

The first loads the golden checkpoints, puts other weights in force, saves them, and keeps its own logits of
the prompt; NAMES behind the folder choose the cases. The second prints the largest difference of any logit,
and ends with status 1 if one is above TOLERANCE or a tensor is missing or left over.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from golden import BY_ARCHITECTURE, load, make_weights, write_checkpoint

# transformers ships no Baichuan, and calls MPT by one of its two names.
NOT_SHIPPED = ("BaiChuanForCausalLM", "BaichuanForCausalLM", "MPTForCausalLM")
NAMES = [names[0] for kind, names in BY_ARCHITECTURE.items() if kind not in NOT_SHIPPED]
NAMES += ["tied", "cohere_qk_norm", "falcon_rw", "gpt_neox_head_dim_24", "phi_qk_layernorm", "glm4_bias"]
TOLERANCE = 2e-4  # as of the golden tests: float32, in another order of sums


def write(name: str, folder: Path) -> None:
    import jax
    import jax.numpy as jnp

    from pjengine import LLM, from_hf

    golden = load(name)
    source = write_checkpoint(golden, folder / f"source-{name}")
    scales: Any = {"norm_mean": golden.norm_mean, "embedding_scale": golden.embedding_scale}
    others = make_weights(golden.shapes, golden.seed + 1, **scales)
    sizes: dict[str, Any] = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "kv_cache_memory_bytes": 2**22}
    with LLM(source, dtype="float32", skip_tokenizer_init=True, warm_up=False, **sizes) as llm:
        llm.update_params(from_hf(llm.model, others))
        llm.save_pretrained(folder / name, max_shard_bytes=100_000)
        logits = jax.jit(llm.model.forward)(llm.params, jnp.asarray([golden.prompt], jnp.int32))
    np.save(folder / f"{name}.npy", np.asarray(logits[0]))
    print(f"{name}: {len(list((folder / name).glob('*.safetensors')))} files", flush=True)


def compare(name: str, folder: Path) -> bool:
    """Whether they agree."""
    import torch  # noqa: TID251
    from transformers import AutoModelForCausalLM

    settings: Any = {"output_loading_info": True}
    if name.startswith("gemma2"):
        settings["attn_implementation"] = "eager"  # the one that is chosen by itself leaves its soft cap out
    model, about = AutoModelForCausalLM.from_pretrained(folder / name, **settings)
    faults = {kind: names for kind, names in about.items() if names}
    with torch.no_grad():
        logits = model(torch.tensor([load(name).prompt]), use_cache=False).logits[0].float().numpy()
    ours = np.load(folder / f"{name}.npy")
    error = float(np.abs(logits - ours).max())
    print(f"{name}: {type(model).__name__}, largest difference {error:.1e}, logits up to {ours.max():.0f}")
    if faults:
        print(f"{name}: {faults}")
    return error <= TOLERANCE and not faults


def main() -> int:
    command, folder, *names = sys.argv[1:]
    if command == "write":
        for name in names or NAMES:
            write(name, Path(folder))
        return 0
    found = names or sorted(path.stem for path in Path(folder).glob("*.npy"))
    return 0 if all([compare(name, Path(folder)) for name in found]) else 1


if __name__ == "__main__":
    sys.exit(main())
