"""Reads torch.save files without torch: tensors only, anything else in the pickle is refused by name.

A pickle is a program. Here it may build dicts, lists, strings and numbers, and call the few functions named
in `_GLOBALS`, all of them ours. What they return are tuples, which no pickle opcode can alter; offsets, sizes
and strides are checked after the program has ended, before any memory is looked at. Its opcodes are scanned
before it runs, so that none makes the unpickler allocate more than the pickle's own size suggests.
"""

import collections
import io
import math
import pickle
import pickletools
import reprlib
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_PICKLE_BYTES = 32 * 2**20  # a tensor takes some 300 of them, and its data none
_MAX_DIMS = 64  # numpy's own limit
_BYTE_ORDERS = (b"little", b"big")
_ENCRYPTED = 0x1 | 0x20 | 0x40  # flag bits of a zip entry: encrypted, patch data, strongly encrypted
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


class _RefusedError(ValueError):
    """Names the file already."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file, encoding="utf-8")
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise _RefusedError(
                f"{self.path}: wanted a pickle of tensors only, got one that asks for "
                f"{module[:100]}.{name[:100]}: "
                "nothing of it was run; convert the checkpoint to safetensors if you trust it"
            )
        return _GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        is_storage = isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage"
        if not is_storage or not isinstance(pid[1], _Dtype) or not isinstance(pid[2], str):
            raise _RefusedError(f"{self.path}: wanted references to tensor storages only, got {_shown(pid)}")
        _, dtype, key, _location, numel, *view = pid
        start = 0
        if view and view[0] is not None:
            _view_key, start, numel = view[0]
        if not _are_sizes((start, numel)):
            raise _RefusedError(
                f"{self.path}: storage {_shown(key)} has start {_shown(start)} and length {_shown(numel)}"
            )
        return _Storage(key, dtype.name, start, numel)


def _load_next(file: io.BytesIO, path: Path) -> Any:
    """Runs the pickle that begins here once its opcodes are known to be harmless; stops behind it."""
    begin = file.tell()
    try:
        # Here every read is bounded by what is in memory, whatever length an opcode claims.
        numbers = ((arg or 0, op.name) for op, arg, _ in pickletools.genops(file) if op.name in _ALLOCATING)
        largest, name = max(numbers, default=(0, ""))
    except (ValueError, AssertionError, struct.error) as error:
        raise pickle.UnpicklingError(str(error)) from error
    size = file.tell() - begin
    if largest > size:
        raise _RefusedError(
            f"{path}: wanted a pickle of tensors only, got {size} bytes with {name} {_shown(largest)}: "
            "it would take more memory than its size allows for"
        )
    file.seek(begin)
    return _Unpickler(io.BytesIO(file.read(size)), path).load()


# Opcodes whose argument is a number that the unpickler takes memory for: places in its memo, and a frame.
# Those with a length are checked by genops: what they hold must be there.
_ALLOCATING = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET", "FRAME"})


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
            size = path.stat().st_size
            raise OSError(f"{path}: wanted a whole zip file, got {size} bytes: {_reason(error)}") from error
        except (pickle.UnpicklingError, EOFError, struct.error) as error:
            raise OSError(f"{path}: not a whole torch.save file: {_reason(error)}") from error
        except _RefusedError:
            raise
        except _FAILURES as error:
            raise ValueError(
                f"{path}: wanted tensors only, got a pickle that does not run: {_reason(error)}"
            ) from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: wanted a dict of tensors, got a {type(state).__name__}")
    # dict's own items(): a pickle may have set attributes on an OrderedDict.
    tensors = {}
    for name, tensor in dict.items(state):
        if not isinstance(name, str):
            raise ValueError(f"{path}: wanted the names of tensors to be texts, got {_shown(name)}")
        tensors[name] = _view(tensor, storages, f"{path}: {_shown(name)}")
    return tensors


# What a pickle that is whole, but makes no sense, may fail with.
_FAILURES = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)


_REPR = reprlib.Repr(maxlevel=3, maxstring=150)  # whole names of tensors


def _shown(value: Any) -> str:
    """A short repr, never built in full: shared tuples within tuples can make that one endless."""
    try:
        return _REPR.repr(value)[:200]
    except ValueError:  # of an integer with more digits than Python converts
        return f"a {type(value).__name__}"


def _reason(error: BaseException) -> str:
    """The error in a bounded number of letters. A KeyError's own text would be the repr of the whole key."""
    text = _shown(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return f"{type(error).__name__}: {text[:200]}"


# A storage key to its bytes.
_Storages = Callable[[_Storage], np.ndarray]


def _read_zip(file: io.BufferedReader, path: Path) -> tuple[Any, _Storages]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            _check_entry(info, path)
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in entries if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise _RefusedError(f"{path}: wanted one entry named */data.pkl, got {_shown(pickles)}")
        if entries[pickles[0]].file_size > _MAX_PICKLE_BYTES:
            raise _RefusedError(
                f"{path}: wanted a pickle of at most {_MAX_PICKLE_BYTES} bytes, "
                f"got {entries[pickles[0]].file_size}: convert the checkpoint to safetensors"
            )
        root = pickles[0].removesuffix("data.pkl")
        order = entries.get(f"{root}byteorder")
        if order is not None:
            is_short = order.file_size <= max(map(len, _BYTE_ORDERS))
            value = archive.read(order) if is_short else b""
            if value not in _BYTE_ORDERS:
                got = repr(value) if is_short else f"{order.file_size} bytes"
                raise _RefusedError(f"{path}: byte order must be little or big, got {got}")
            if value != b"little":
                raise NotImplementedError(f"{path}: byte order must be little, got {value!r}")
        state = _load_next(io.BytesIO(archive.read(pickles[0])), path)
    data = np.memmap(path, mode="r")

    def bytes_of(storage: _Storage) -> np.ndarray:
        info = entries.get(f"{root}data/{storage.key}")
        if info is None:
            raise ValueError(f"{path}: storage {_shown(storage.key)} is not in the file")
        header = data[info.header_offset : info.header_offset + _ZIP_LOCAL_HEADER.size]
        start = info.header_offset + _ZIP_LOCAL_HEADER.size + sum(_ZIP_LOCAL_HEADER.unpack(header.tobytes()))
        if start + info.file_size > data.size:
            raise OSError(f"{path}: wanted {start + info.file_size} bytes, got {data.size}: truncated?")
        return data[start : start + info.file_size]

    return state, bytes_of


def _check_entry(info: zipfile.ZipInfo, path: Path) -> None:
    """Refuses an entry that is not plain bytes of the file: reading it could take any amount of memory."""
    name = _shown(info.filename)
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & _ENCRYPTED:
        raise _RefusedError(f"{path}: {name} must be stored uncompressed, as torch.save does")
    if info.file_size != info.compress_size:
        raise _RefusedError(
            f"{path}: {name} must be stored uncompressed, got {info.compress_size} bytes for {info.file_size}"
        )
    wanted, size = info.header_offset + _ZIP_LOCAL_HEADER.size + info.file_size, path.stat().st_size
    if info.header_offset < 0 or wanted > size:
        raise OSError(f"{path}: wanted {wanted} bytes for {name}, got {size}: truncated?")


def _read_legacy(file: io.BufferedReader, path: Path) -> tuple[Any, _Storages]:
    pickles = io.BytesIO(file.read(_MAX_PICKLE_BYTES))  # the data of the tensors comes behind them
    magic, protocol = _load_next(pickles, path), _load_next(pickles, path)
    if (magic, protocol) != (_LEGACY_MAGIC, _LEGACY_PROTOCOL):
        raise OSError(
            f"{path}: wanted a torch.save file, got other magic numbers: is it a .bin of another kind?"
        )
    system = _load_next(pickles, path)
    if not system["little_endian"]:
        raise NotImplementedError(f"{path}: byte order must be little, got big")
    used: dict[str, _Storage] = {}
    state, keys = _load_next(pickles, path), _load_next(pickles, path)
    for tensor in dict.values(state) if isinstance(state, dict) else ():
        if isinstance(tensor, _Tensor) and isinstance(tensor.storage, _Storage):
            used[tensor.storage.key] = tensor.storage
    data = np.memmap(path, mode="r")
    found: dict[str, np.ndarray] = {}
    position = pickles.tell()
    for key in keys:
        if not isinstance(key, str) or key not in used:
            raise _RefusedError(f"{path}: storage {_shown(key)} belongs to no tensor: its size is not known")
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
            raise ValueError(f"{path}: storage {_shown(storage.key)} is not in the file")
        return found[storage.key]

    return state, bytes_of


def _view(tensor: Any, bytes_of: _Storages, where: str) -> np.ndarray:
    """Returns the tensor as a strided view of its storage, once it is known to lie inside."""
    if not isinstance(tensor, _Tensor) or not isinstance(tensor.storage, _Storage):
        raise ValueError(f"{where} must be a tensor, got a {type(tensor).__name__}")
    storage, offset, size, stride, dtype_given = tensor
    if not (isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride)):
        raise ValueError(f"{where} has size {_shown(size)} and stride {_shown(stride)}")
    if len(size) > _MAX_DIMS:
        raise ValueError(f"{where} must have at most {_MAX_DIMS} dimensions, got {len(size)}")
    if not _are_sizes((offset, *size, *stride)):
        raise ValueError(
            f"{where} has offset {_shown(offset)}, size {_shown(size)} and stride {_shown(stride)}: "
            "all must be ints >= 0"
        )
    if dtype_given is not None and not isinstance(dtype_given, _Dtype):
        raise ValueError(f"{where} has dtype {_shown(dtype_given)}")
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
    strides = tuple(step * dtype.itemsize for step in stride)
    try:
        if math.prod(size) == 0:
            return np.empty(size, dtype)
        return np.ndarray(size, dtype, data, begin + offset * dtype.itemsize, strides)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{where} has size {_shown(size)} and stride {_shown(stride)}: {error}") from error


def _are_sizes(values: tuple[Any, ...]) -> bool:
    return all(type(value) is int and 0 <= value < 2**63 for value in values)
