"""A checkpoint of the weights in force, in a folder that transformers and this engine load."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pjengine.config import EngineConfig
from pjengine.loading import read_model_config
from pjengine.models.checkpoint_writer import write_checkpoint
from pjengine.models.decoder import Decoder, Params
from pjengine.models.hf_names import HFTensors
from pjengine.models.hub import resolve_model
from pjengine.models.json_values import read_json_object

# What a tokenizer and what `generate` go by; none of them depends on the weights.
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json"),
)


def save_checkpoint(
    folder: Path, config: EngineConfig, model: Decoder, params: Params, *, max_shard_bytes: int
) -> None:
    """Writes all files beside `folder`, then gives them its name. Raises as `LLM.save_pretrained` does."""
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
    folder = folder.expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: wanted a new or an empty folder; name another, or empty this one")
    tensors = HFTensors(model, params)
    source, about = _model_files(config, model)
    own = _tokenizer_folder(config, source)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        write_checkpoint(
            partial, tensors.shapes, tensors.dtype, tensors.read, max_shard_bytes=max_shard_bytes
        )
        copied = [own / name for name in _TOKENIZER_FILES] + [source / "generation_config.json"]
        if "auto_map" in about:  # which names code of the model's own
            copied += sorted(source.glob("*.py"))
        for path in copied:
            if path.is_file():
                shutil.copyfile(path, partial / path.name)
        dtype = tensors.dtype(next(iter(tensors.shapes))).name
        (partial / "config.json").write_text(json.dumps(_of_dtype(about, dtype), indent=2) + "\n")
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _model_files(config: EngineConfig, model: Decoder) -> tuple[Path, dict[str, Any]]:
    """The folder that the model came from, and what config.json has to say of it as it runs."""
    source, parsed = read_model_config(config, needs_weights=False)
    if source is None:
        raise ValueError(
            f"{config.model!r} is a named shape and has no config.json: wanted a model from a folder or the "
            "Hub (pjengine.to_hf gives the tensors alone)"
        )
    if parsed != model.config:
        raise ValueError(f"{source / 'config.json'} has changed since the model was loaded: wanted the same")
    about = {**read_json_object(source / "config.json"), **config.hf_overrides}
    if model.unpacked() != model:
        about.pop("quantization_config", None)
    return source, about


def _tokenizer_folder(config: EngineConfig, source: Path) -> Path:
    if config.tokenizer is None:
        return source
    return resolve_model(
        config.tokenizer,
        revision=config.tokenizer_revision,
        download_dir=config.download_dir,
        hf_token=config.hf_token,
        needs_weights=False,
        needs_config=False,
    )


def _of_dtype(about: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """transformers 4 calls it `torch_dtype`, and 5 reads that, too."""
    keys = [key for key in ("dtype", "torch_dtype") if key in about] or ["torch_dtype"]
    return {**about, **dict.fromkeys(keys, dtype)}
