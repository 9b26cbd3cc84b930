"""The restricted unpickler: torch's own files give their tensors, everything else is refused and not run."""

import os
import pickle
import resource
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.golden import golden
from tests.models.torch_file import Call, Global, Persistent, assemble, tensor, write_zip


def write_tensor(path: Path, data: bytes = bytes(16), **fields: Any) -> Path:
    return write_zip(path, b"\x80\x02" + assemble({"w": tensor(**fields)}) + b".", data)


class Evil:
    """Runs a function of the standard library when it is unpickled."""

    def __init__(self, function: Any, argument: str) -> None:
        self.reduced = (function, (argument,))

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("file", ["state_zip.bin", "state_legacy.bin"])
def test_files_of_torch_save_give_their_tensors(file: str) -> None:
    from pjengine.models.unpickler import read_torch_file

    tensors = read_torch_file(golden.FOLDER / file)
    with np.load(golden.FOLDER / "state_expected.npz") as expected:
        assert set(tensors) == set(expected.files)
        for name, array in tensors.items():
            wanted = expected[name]
            assert str(array.dtype) == ("bfloat16" if name == "bfloat16" else str(wanted.dtype))
            np.testing.assert_array_equal(array.astype(wanted.dtype), wanted, err_msg=name, strict=True)
    assert tensors["transposed"].strides == (4, 16)
    assert not tensors["float32"].flags.writeable


def test_dtypes_without_a_storage_class_are_read() -> None:
    from pjengine.models.unpickler import read_torch_file

    (array,) = read_torch_file(golden.FOLDER / "state_float8.bin").values()
    assert str(array.dtype) == "float8_e4m3fn"
    np.testing.assert_array_equal(array.astype(np.float32), [0.5, -448, 3])


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize(
    "function, name", [(os.system, "system"), (eval, "eval"), (getattr, "getattr"), (os.rename, "rename")]
)
def test_pickle_that_runs_code_is_refused_by_name_and_not_run(
    tmp_path: Path, protocol: int, is_zip: bool, function: Any, name: str
) -> None:
    from pjengine.models.unpickler import read_torch_file

    trace = tmp_path / "trace"
    code = f"touch {trace}" if function is os.system else f"open({str(trace)!r}, 'w')"
    state = pickle.dumps({"w": Evil(function, code)}, protocol=protocol)
    path = tmp_path / "pytorch_model.bin"
    if is_zip:
        write_zip(path, state)
    else:
        path.write_bytes(state)
    with pytest.raises(
        ValueError, match=rf"pytorch_model\.bin: .* asks for (posix|nt|os|builtins|__builtin__)\.{name}:"
    ):
        read_torch_file(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "state",
    [
        {"w": Global("torch._utils", "_rebuild_tensor_v2.__globals__")},
        {"w": Global("collections", "OrderedDict.fromkeys")},
        {"w": Global("torch.nn.modules.linear", "Linear")},
        {"w": Persistent(("module", Global("torch", "FloatStorage"), "0", "cpu", 4))},
        {"w": Persistent("storage")},
        {"w": Call(Global("torch", "FloatStorage"), (4,))},
        {"w": Call(Global("torch._utils", "_rebuild_tensor_v2"), ())},
        {"w": Call(Global("torch._utils", "_rebuild_tensor_v2"), ("storage", 0, (2,), (1,)))},
        {"w": Call(Global("torch._utils", "_rebuild_parameter"), ({"w": 1}, False, ()))},
        {"w": Global("torch._utils", "_rebuild_tensor_v2")},
        {"w": 3},
        (1, 2),
    ],
    ids=str,
)
def test_pickle_of_anything_but_tensors_is_refused(tmp_path: Path, state: Any) -> None:
    from pjengine.models.unpickler import read_torch_file

    path = write_zip(tmp_path / "weights.bin", b"\x80\x02" + assemble(state) + b".")
    with pytest.raises(ValueError, match=r"weights\.bin"):
        read_torch_file(path)


def test_pickle_cannot_change_what_stands_for_a_tensor(tmp_path: Path) -> None:
    from pjengine.models.unpickler import read_torch_file

    for target in (tensor(), Global("torch._utils", "_rebuild_tensor_v2"), Global("torch", "FloatStorage")):
        for change in ({"offset": 99}, (None, {"offset": 99}), (None, {"__class__": 1})):
            state = b"\x80\x02}" + assemble("w") + assemble(target) + assemble(change) + b"bs."
            with pytest.raises(ValueError, match=r"weights\.bin"):
                read_torch_file(write_zip(tmp_path / "weights.bin", state, bytes(16)))


def test_views_of_a_storage_are_read(tmp_path: Path) -> None:
    from pjengine.models.unpickler import read_torch_file

    data = np.arange(12, dtype=np.float32)
    path = write_tensor(tmp_path / "a.bin", data.tobytes(), offset=1, size=(2, 3), stride=(1, 4), numel=12)
    np.testing.assert_array_equal(read_torch_file(path)["w"], [[1, 5, 9], [2, 6, 10]])
    path = write_tensor(tmp_path / "b.bin", data.tobytes(), size=(), stride=(), offset=11, numel=12)
    assert read_torch_file(path)["w"] == 11


@pytest.mark.parametrize(
    "fields",
    [
        {"offset": 1},
        {"offset": -1},
        {"offset": 2**62},
        {"offset": True},
        {"size": (2, 3)},
        {"size": (-2, 2)},
        {"size": (2,)},
        {"size": "ab"},
        {"stride": (3, 1)},
        {"stride": (-2, 1)},
        {"size": (2**40, 2**40), "stride": (0, 2**30)},
        {"numel": 5},
        {"numel": -1},
        {"numel": 3},
        {"storage": "DoubleStorage"},
        {"key": "1"},
        {"key": "../data.pkl"},
    ],
    ids=str,
)
def test_tensor_outside_its_storage_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    from pjengine.models.unpickler import read_torch_file

    with pytest.raises(ValueError, match=r"weights\.bin.*(w|storage)"):
        read_torch_file(write_tensor(tmp_path / "weights.bin", **fields))


@pytest.mark.parametrize("file", ["state_zip.bin", "state_legacy.bin"])
def test_truncated_file_is_an_error_wherever_it_ends(tmp_path: Path, file: str) -> None:
    from pjengine.models.unpickler import read_torch_file

    whole = (golden.FOLDER / file).read_bytes()
    path = tmp_path / "cut.bin"
    for size in [*range(0, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises((OSError, ValueError), match=r"cut\.bin"):
            read_torch_file(path)


def test_compressed_zip_is_refused(tmp_path: Path) -> None:
    from pjengine.models.unpickler import read_torch_file

    path = write_zip(tmp_path / "w.bin", b"\x80\x02}.", bytes(400), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="stored uncompressed"):
        read_torch_file(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    from pjengine.models.unpickler import read_torch_file

    path = tmp_path / "w.bin"
    for content in (b"", b"hello", pickle.dumps({"a": 1}), b"GGUF" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises((OSError, ValueError), match=r"w\.bin"):
            read_torch_file(path)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Ends with a MemoryError, not with a machine brought down, what takes memory without bounds."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize(
    "state",
    [
        b"\x80\x02}r" + (2**27).to_bytes(4, "little") + b".",
        b"\x80\x02}q\xff.",
        b"}p999999999\n.",
        b"\x80\x04\x95" + (2**40).to_bytes(8, "little") + b"}.",
        b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"ab.",
        b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"ab.",
        b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"ab.",
        b"\x80\x02\x8b" + (2**31 - 1).to_bytes(4, "little") + b"ab.",
    ],
    ids=["LONG_BINPUT", "BINPUT", "PUT", "FRAME", "BINBYTES8", "BYTEARRAY8", "BINUNICODE8", "LONG4"],
)
def test_pickle_that_claims_more_than_it_holds_is_refused_unread(
    tmp_path: Path, state: bytes, is_zip: bool
) -> None:
    from pjengine.models.unpickler import read_torch_file

    path = tmp_path / "bomb.bin"
    if is_zip:
        write_zip(path, state)
    else:
        path.write_bytes(state)
    with pytest.raises((OSError, ValueError), match=r"bomb\.bin: .*(more memory|not a whole)") as caught:
        read_torch_file(path)
    assert len(str(caught.value)) < 500 + len(str(path))


@pytest.mark.parametrize(
    "error", [MemoryError(), RecursionError("too deep"), ValueError("bad"), KeyError("k" * 9999)], ids=repr
)
def test_pickle_that_fails_is_a_value_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from pjengine.models import unpickler

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(unpickler._Unpickler, "load", fail)
    with pytest.raises(ValueError, match=r"w\.bin: wanted tensors only, got a pickle that does") as caught:
        unpickler.read_torch_file(write_zip(tmp_path / "w.bin", b"\x80\x02}."))
    assert type(error).__name__ in str(caught.value) and len(str(caught.value)) < 500 + len(str(tmp_path))


def nested(levels: int, *, is_shared: bool) -> bytes:
    """Opcodes of tuples within tuples; shared ones double the size of the repr at each level."""
    return b")" + (b"2\x86" if is_shared else b"\x85") * levels


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("value", [nested(200, is_shared=True), nested(100_000, is_shared=False)])
@pytest.mark.parametrize("place", ["pid", "key", "size", "state"])
def test_errors_stay_short_whatever_they_show(tmp_path: Path, value: bytes, place: str) -> None:
    from pjengine.models.unpickler import read_torch_file

    class Raw(NamedTuple):
        opcodes: bytes

    whole = assemble({"w": tensor(size="PLACE") if place == "size" else tensor(key="PLACE")})
    state = {
        "pid": b"}" + assemble("w") + value + b"Qs",
        "key": whole.replace(assemble("PLACE"), value),
        "size": whole.replace(assemble("PLACE"), value),
        "state": b"}" + assemble("w") + value + b"s",
    }[place]
    path = write_zip(tmp_path / "w.bin", b"\x80\x02" + state + b".", bytes(16))
    with pytest.raises(ValueError, match=r"w\.bin") as caught:
        read_torch_file(path)
    assert len(str(caught.value)) < 1000 + len(str(path))


@pytest.mark.parametrize("name", ["archive/byteorder", "archive/version", "archive/data.pkl"])
def test_no_entry_is_read_before_all_are_known_to_be_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from pjengine.models.unpickler import read_torch_file

    path = tmp_path / "w.bin"
    with zipfile.ZipFile(path, "w") as archive:
        for entry in ("archive/data.pkl", "archive/version", "archive/byteorder"):
            is_bomb = entry == name
            archive.writestr(
                entry,
                bytes(10**7) if is_bomb else b"\x80\x02}.",
                zipfile.ZIP_DEFLATED if is_bomb else zipfile.ZIP_STORED,
            )
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("an entry was read"))
    with pytest.raises(ValueError, match=rf"w\.bin: '{name}' must be stored uncompressed"):
        read_torch_file(path)


@pytest.mark.parametrize(
    "order, error, message",
    [
        (b"big", NotImplementedError, "must be little, got b'big'"),
        (b"middle", ValueError, "little or big, got b'middle'"),
        (b"", ValueError, "little or big, got b''"),
        (bytes(10**6), ValueError, "little or big, got 1000000 bytes"),
    ],
)
def test_byte_order_is_little(tmp_path: Path, order: bytes, error: type[Exception], message: str) -> None:
    from pjengine.models.unpickler import read_torch_file

    path = write_zip(tmp_path / "w.bin", b"\x80\x02}.")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", order)
    with pytest.raises(error, match=message) as caught:
        read_torch_file(path)
    assert len(str(caught.value)) < 500 + len(str(path))


@pytest.mark.parametrize(
    "fields", [{"size": (1,) * 65, "stride": (0,) * 65}, {"size": (0, 2**62), "stride": (2**62, 1)}]
)
def test_shape_beyond_numpy_is_refused_by_name(tmp_path: Path, fields: dict[str, Any]) -> None:
    from pjengine.models.unpickler import read_torch_file

    with pytest.raises(ValueError, match=r"w\.bin: 'w'"):
        read_torch_file(write_tensor(tmp_path / "w.bin", **fields))
