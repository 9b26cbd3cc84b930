"""Files as torch.save writes them, without torch: pickles put together from opcodes, zips of tensors."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Global(NamedTuple):
    module: str
    name: str


class Call(NamedTuple):
    function: Any
    args: Any


class Persistent(NamedTuple):
    pid: Any


def assemble(value: Any) -> bytes:
    """Writes the opcodes of a pickle by hand, torch's globals included."""
    match value:
        case Global(module, name):
            return f"c{module}\n{name}\n".encode()
        case Call(function, args):
            return assemble(function) + assemble(args) + b"R"
        case Persistent(pid):
            return assemble(pid) + b"Q"
        case dict():
            return b"}" + b"".join(assemble(key) + assemble(item) + b"s" for key, item in value.items())
        case tuple():
            return b"(" + b"".join(assemble(item) for item in value) + b"t"
        case bool() | None:
            return pickle.dumps(value, protocol=2)[2:-1]
        case int():
            return f"I{value}\n".encode()
        case str():
            return f"V{value}\n".encode()
    raise TypeError(value)


def write_zip(path: Path, state: bytes, data: bytes = b"", **options: Any) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", state)
        archive.writestr("archive/data/0", data)
    return path


def tensor(
    *,
    offset: Any = 0,
    size: Any = (2, 2),
    stride: Any = (2, 1),
    numel: Any = 4,
    storage: str = "FloatStorage",
    key: str = "0",
) -> Call:
    pid = ("storage", Global("torch", storage), key, "cpu", numel)
    hooks = Call(Global("collections", "OrderedDict"), ())
    return Call(
        Global("torch._utils", "_rebuild_tensor_v2"), (Persistent(pid), offset, size, stride, False, hooks)
    )


def write_torch_file(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """A state dict of contiguous float32 tensors."""
    state = {}
    for key, (name, array) in enumerate(arrays.items()):
        assert array.dtype == np.float32
        strides = [1]
        for size in array.shape[:0:-1]:
            strides.insert(0, strides[0] * size)
        state[name] = tensor(
            size=array.shape, stride=tuple(strides[: array.ndim]), numel=array.size, key=str(key)
        )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + assemble(state) + b".")
        for key, array in enumerate(arrays.values()):
            archive.writestr(f"archive/data/{key}", array.tobytes())
    return path
