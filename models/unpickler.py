"""Reads torch.save files without torch: tensors only, anything else in the pickle is refused by name.

A pickle is a program. Here it may build dicts, lists, strings and numbers, and call the few functions named
in `_GLOBALS`, all of them ours. What they return are tuples, which no pickle opcode can alter; offsets, sizes
and strides are checked after the program has ended, before any memory is looked at.
"""

import collections
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_ZIP_LOCAL_HEADER = struct.Struct(
    "<26xHH"
)  # ... length of the name, length of the extra field; then both, then data

_DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
_STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}


class _Dtype(NamedTuple):
    """Stands for a storage class or a torch.dtype; a name, so that no pickle can reach numpy's own object."""

    name: str


class _Storage(NamedTuple):
    key: str
    dtype: str
    start: int  # in elements: legacy files know views of storages
    numel: int


class _Tensor(NamedTuple):
    storage: Any
    offset: Any
    size: Any
    stride: Any
    dtype: Any


class _Rebuild(NamedTuple):
    """A callable stand-in for one of torch's rebuild functions."""

    name: str

    def __call__(self, *args: Any) -> Any:
        if self.name == "_rebuild_parameter":  # (tensor, requires_grad, hooks)
            return args[0]
        dtype = args[6] if self.name == "_rebuild_tensor_v3" else None
        return _Tensor(args[0], args[1], args[2], args[3], dtype)


_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _Rebuild("_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"): _Rebuild("_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"): _Rebuild("_rebuild_tensor_v3"),
    ("torch._utils", "_rebuild_parameter"): _Rebuild("_rebuild_parameter"),
    **{("torch", name): _Dtype(dtype) for name, dtype in _STORAGE_DTYPES.items()},
    ("torch.storage", "UntypedStorage"): _Dtype("uint8"),
    **{("torch", name): _Dtype(name) for name in _DTYPES},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file, encoding="utf-8")
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise ValueError(
                f"{self.path}: wanted a pickle of tensors only, got one that asks for {module}.{name}: "
                "nothing of it was run; convert the checkpoint to safetensors if you trust it"
            )
        return _GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        is_storage = isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage"
        if not is_storage or not isinstance(pid[1], _Dtype):
            raise ValueError(f"{self.path}: wanted references to tensor storages only, got {pid!r:.200}")
        _, dtype, key, _location, numel, *view = pid
        start = 0
        if view and view[0] is not None:
            _view_key, start, numel = view[0]
        if not _are_sizes((start, numel)):
            raise ValueError(f"{self.path}: storage {key!r} has start {start!r} and length {numel!r}")
        return _Storage(str(key), dtype.name, start, numel)


def read_torch_file(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a file that torch.save wrote, by name, as read-only memory-mapped views.

    Knows the zip format and the one before torch 1.6. Nothing but the pickle is read until a view is.

    Raises:
      ValueError: the pickle asks for anything but tensors, or a tensor lies outside its storage.
      OSError: the file is truncated or neither format.
    """
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        try:
            state, storages = (_read_zip if is_zip else _read_legacy)(file, path)
        except zipfile.BadZipFile as error:
            raise OSError(
                f"{path}: wanted a whole zip file, got {path.stat().st_size} bytes: {error}"
            ) from error
        except (pickle.UnpicklingError, EOFError, struct.error) as error:
            raise OSError(f"{path}: not a whole torch.save file: {error!r}") from error
        except (ArithmeticError, AttributeError, LookupError, TypeError, UnicodeError) as error:
            raise ValueError(
                f"{path}: wanted tensors only, got a pickle that does not run: {error!r}"
            ) from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: wanted a dict of tensors, got a {type(state).__name__}")
    # dict's own items(): a pickle may have set attributes on an OrderedDict.
    return {str(name): _view(tensor, storages, f"{path}: {name!r}") for name, tensor in dict.items(state)}


# A storage key to its bytes.
_Storages = Callable[[_Storage], np.ndarray]


def _read_zip(file: io.BufferedReader, path: Path) -> tuple[Any, _Storages]:
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in entries if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"{path}: wanted one entry named */data.pkl, got {pickles}")
        root = pickles[0].removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in entries and archive.read(order) != b"little":
            raise NotImplementedError(f"{path}: byte order must be little, got {archive.read(order)!r}")
        for info in entries.values():
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{path}: {info.filename} must be stored uncompressed, as torch.save does")
        state = _Unpickler(io.BytesIO(archive.read(pickles[0])), path).load()
    data = np.memmap(path, mode="r")

    def bytes_of(storage: _Storage) -> np.ndarray:
        info = entries.get(f"{root}data/{storage.key}")
        if info is None:
            raise ValueError(f"{path}: storage {storage.key!r} is not in the file")
        header = data[info.header_offset : info.header_offset + _ZIP_LOCAL_HEADER.size]
        start = info.header_offset + _ZIP_LOCAL_HEADER.size + sum(_ZIP_LOCAL_HEADER.unpack(header.tobytes()))
        if start + info.file_size > data.size:
            raise OSError(f"{path}: wanted {start + info.file_size} bytes, got {data.size}: truncated?")
        return data[start : start + info.file_size]

    return state, bytes_of


def _read_legacy(file: io.BufferedReader, path: Path) -> tuple[Any, _Storages]:
    magic, protocol = _Unpickler(file, path).load(), _Unpickler(file, path).load()
    if (magic, protocol) != (_LEGACY_MAGIC, _LEGACY_PROTOCOL):
        raise OSError(
            f"{path}: wanted a torch.save file, got other magic numbers: is it a .bin of another kind?"
        )
    system = _Unpickler(file, path).load()
    if not system["little_endian"]:
        raise NotImplementedError(f"{path}: byte order must be little, got big")
    used: dict[str, _Storage] = {}
    unpickler = _Unpickler(file, path)
    state = unpickler.load()
    keys = _Unpickler(file, path).load()
    for tensor in dict.values(state) if isinstance(state, dict) else ():
        if isinstance(tensor, _Tensor) and isinstance(tensor.storage, _Storage):
            used[tensor.storage.key] = tensor.storage
    data = np.memmap(path, mode="r")
    found: dict[str, np.ndarray] = {}
    position = file.tell()
    for key in keys:
        if key not in used:
            raise ValueError(f"{path}: storage {key!r} belongs to no tensor: its size is not known")
        # Each storage: its number of elements, then its elements.
        size = (
            int.from_bytes(data[position : position + 8].tobytes(), "little")
            * _DTYPES[used[key].dtype].itemsize
        )
        position += 8 + size
        if position > data.size:
            raise OSError(f"{path}: wanted {position} bytes or more, got {data.size}: truncated?")
        found[key] = data[position - size : position]

    def bytes_of(storage: _Storage) -> np.ndarray:
        if storage.key not in found:
            raise ValueError(f"{path}: storage {storage.key!r} is not in the file")
        return found[storage.key]

    return state, bytes_of


def _view(tensor: Any, bytes_of: _Storages, where: str) -> np.ndarray:
    """Returns the tensor as a strided view of its storage, once it is known to lie inside."""
    if not isinstance(tensor, _Tensor) or not isinstance(tensor.storage, _Storage):
        raise ValueError(f"{where} must be a tensor, got a {type(tensor).__name__}")
    storage, offset, size, stride, dtype_given = tensor
    if not (isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride)):
        raise ValueError(f"{where} has size {size!r} and stride {stride!r}")
    if not _are_sizes((offset, *size, *stride)):
        raise ValueError(
            f"{where} has offset {offset!r}, size {size!r} and stride {stride!r}: all must be ints >= 0"
        )
    if dtype_given is not None and not isinstance(dtype_given, _Dtype):
        raise ValueError(f"{where} has dtype {dtype_given!r}")
    data = bytes_of(storage)
    dtype = _DTYPES[storage.dtype if dtype_given is None else dtype_given.name]
    # A storage begins and is counted in its own elements, the tensor's offset in the tensor's.
    begin = storage.start * _DTYPES[storage.dtype].itemsize
    end = begin + storage.numel * _DTYPES[storage.dtype].itemsize
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    wanted = 0 if 0 in size else begin + (last + 1) * dtype.itemsize
    if end > data.size or wanted > end:
        raise ValueError(
            f"{where} lies outside its storage: wanted {max(wanted, end)} bytes, got {min(end, data.size)}"
        )
    if math.prod(size) == 0:
        return np.empty(size, dtype)
    return np.ndarray(
        size, dtype, data, begin + offset * dtype.itemsize, tuple(step * dtype.itemsize for step in stride)
    )


def _are_sizes(values: tuple[Any, ...]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)
