"""Checkpoint folders: every tensor by name, memory-mapped, nothing read until it is looked at."""

import hashlib
import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from pjengine.models.unpickler import read_torch_file

# In the order of preference, as transformers has it.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SAMPLES = 4096  # of a checkpoint, or one of each tensor: so many pages are read for a digest
_SAMPLE_SIZE = 32  # elements
_MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The tensors of a folder, by their names in the files."""

    folder: Path
    tensors: Mapping[str, np.ndarray]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self.tensors[name].dtype

    def tensor(self, name: str) -> np.ndarray:
        """Returns a read-only view of the file, not always contiguous. The file must stay as it is."""
        return self.tensors[name]

    def digest(self) -> str:
        """A hash of all names, types and shapes, and of samples of every tensor's elements.

        Tells checkpoints apart that were trained apart; it is no proof that two are the same.
        """
        found = hashlib.blake2b(digest_size=16)
        num_samples = max(1, _SAMPLES // max(1, len(self.tensors)))
        for name, tensor in sorted(self.tensors.items()):
            found.update(repr((name, tensor.dtype.name, tensor.shape)).encode())
            last = max(0, tensor.size - _SAMPLE_SIZE)
            # Not from the first element on: a table often begins with tokens that no training touches.
            for begin in sorted({last * (2 * i + 1) // (2 * num_samples) for i in range(num_samples)}):
                found.update(tensor.flat[begin : begin + _SAMPLE_SIZE].tobytes())
        return found.hexdigest()


def open_checkpoint(folder: Path, load_format: str = "auto") -> Checkpoint:
    """Opens the weights of a folder, in one file or in shards.

    Args:
      load_format: "safetensors", "bin" (torch's), or "auto": safetensors where there are any, else bin.

    Raises:
      OSError: there are no weights, a shard is missing, or a file is truncated.
      ValueError: a file is not what its name says, or holds more than tensors.
    """
    if load_format not in ("auto", "safetensors", "bin"):
        raise ValueError(f"load_format must be 'auto', 'safetensors' or 'bin', got {load_format!r}")
    wanted = [name for name in WEIGHT_FILES if load_format == "auto" or f".{load_format}" in name]
    found = [name for name in wanted if (folder / name).is_file()]
    if not found:
        raise OSError(f"{folder}: wanted one of {', '.join(wanted)}, found none of them")
    path = folder / found[0]
    if path.suffix != ".json":
        return Checkpoint(folder=folder, tensors=_read_file(path))
    file_of = _read_index(path)
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(set(file_of.values())):
        part = _read_file(folder / file)
        # A tensor that the index places in another file is a stale copy; one that it does not know is kept,
        # so that the loader can refuse it by name.
        tensors |= {name: tensor for name, tensor in part.items() if file_of.get(name, file) == file}
    missing = sorted(set(file_of) - set(tensors))
    if missing:
        raise ValueError(
            f"{path}: every tensor of the index must be in its file, missing: {', '.join(missing)}"
        )
    return Checkpoint(folder=folder, tensors=tensors)


def _read_index(path: Path) -> dict[str, str]:
    """Returns the file of every tensor; all files exist, beside the index."""
    index = _parse_json(path.read_bytes(), path)
    file_of = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
        raise ValueError(f'{path}: wanted {{"weight_map": {{tensor: file}}}}, got something else')
    files = sorted(set(file_of.values()))
    outside = [file for file in files if Path(file).name != file]
    if outside:
        raise ValueError(f"{path}: wanted names of files beside the index, got {', '.join(outside)}")
    absent = [file for file in files if not (path.parent / file).is_file()]
    if absent:
        raise OSError(f"{path} names {len(files)} files, these are missing: {', '.join(absent)}")
    return file_of


def _read_file(path: Path) -> dict[str, np.ndarray]:
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of one file, by name, as read-only memory-mapped views.

    Our own reader, because the library's numpy one copies, and refuses bfloat16.

    Raises:
      OSError: the file is shorter or longer than its header says.
      ValueError: the header is malformed, or tensors overlap or leave gaps.
    Source: https://github.com/huggingface/safetensors, "Format".
    """
    size = path.stat().st_size
    if size < 8:
        raise OSError(f"{path}: wanted a safetensors header of 8 bytes or more, got {size} bytes")
    data = np.memmap(path, mode="r")
    header_size = int.from_bytes(data[:8].tobytes(), "little")
    if header_size > _MAX_HEADER_BYTES:
        raise ValueError(f"{path}: wanted a header of at most {_MAX_HEADER_BYTES} bytes, got {header_size}")
    if 8 + header_size > size:
        raise OSError(f"{path}: wanted {8 + header_size} bytes for the header, got {size}: truncated?")
    header = _parse_json(data[8 : 8 + header_size].tobytes(), path)
    if not isinstance(header, dict):
        raise ValueError(f"{path}: wanted a JSON object as header, got a {type(header).__name__}")
    header.pop("__metadata__", None)
    body = data[8 + header_size :]
    spans = {name: _read_span(entry, f"{path}: {name!r}") for name, entry in header.items()}
    end = 0
    # By first byte, then by size: an empty tensor shares its first byte with the next one.
    for name, (dtype, shape, begin) in sorted(spans.items(), key=lambda i: (i[1][2], math.prod(i[1][1]))):
        nbytes = math.prod(shape) * dtype.itemsize
        if begin != end:
            raise ValueError(
                f"{path}: wanted {name!r} to begin at byte {end}, where the last ended, got {begin}"
            )
        end = begin + nbytes
    if end != body.size:
        raise OSError(f"{path}: wanted {8 + header_size + end} bytes, got {size}: truncated?")
    return {
        name: body[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
        for name, (dtype, shape, begin) in spans.items()
    }


def _read_span(entry: Any, where: str) -> tuple[np.dtype, tuple[int, ...], int]:
    """Returns dtype, shape and first byte of a header's entry."""
    try:
        dtype_name, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: wanted dtype, shape and data_offsets, got {reprlib.repr(entry)}"
        ) from error
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise ValueError(f"{where}: dtype must be one of {', '.join(DTYPES)}, got {reprlib.repr(dtype_name)}")
    dtype = DTYPES[dtype_name]
    if not all(type(value) is int and value >= 0 for value in (*shape, begin, end)):
        raise ValueError(f"{where}: shape and data_offsets must be integers >= 0, got {reprlib.repr(entry)}")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{where}: wanted {math.prod(shape) * dtype.itemsize} bytes for {dtype_name} {shape}, "
            f"got {end - begin}"
        )
    return dtype, shape, begin


def _parse_json(text: bytes, path: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 are ValueErrors
        raise ValueError(f"{path}: wanted JSON, got something else: {error}") from error
