"""Checkpoints in the safetensors format, one tensor on the host at a time."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from pjengine.models.checkpoint import DTYPES

MAX_SHARD_BYTES = 5_000_000_000
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8  # bytes at which the tensors begin


def write_checkpoint(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype_of: Callable[[str], np.dtype],
    read: Callable[[str], np.ndarray],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes model.safetensors, or files of at most `max_shard_bytes` and their index.

    A tensor that is larger has a file of its own.

    Args:
      read: one tensor by its name, called once for each.
    """
    sizes = {name: math.prod(shape) * dtype_of(name).itemsize for name, shape in shapes.items()}
    shards = _divide(sizes, max_shard_bytes)
    if len(shards) == 1:
        _write_file(folder / "model.safetensors", shards[0], shapes, dtype_of, read)
        return
    file_of: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file, names, shapes, dtype_of, read)
        file_of |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(file_of.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _divide(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, own in sizes.items():
        if shards[-1] and size + own > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += own
    return shards


def _write_file(
    path: Path,
    names: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    dtype_of: Callable[[str], np.dtype],
    read: Callable[[str], np.ndarray],
) -> None:
    """Source: https://github.com/huggingface/safetensors, "Format"."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # which transformers asks for
    names, end = sorted(names, key=lambda name: -dtype_of(name).itemsize), 0  # so that all are aligned
    for name in names:
        begin, end = end, end + math.prod(shapes[name]) * dtype_of(name).itemsize
        about = {"dtype": _NAMES[dtype_of(name)], "shape": list(shapes[name]), "data_offsets": [begin, end]}
        header[name] = about
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = np.asarray(read(name), order="C")
            assert tensor.shape == shapes[name] and tensor.dtype == dtype_of(name), name
            file.write(tensor.reshape(-1).view(np.uint8).data)
