"""Checkpoint folders: which files are read, and that damaged ones are refused with both sizes."""

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.golden import golden


def write_raw(path: Path, header: Any, body: bytes = b"") -> Path:
    """Writes a safetensors file with whatever header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def entry(begin: int, end: int, shape: list[Any], dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_safetensors_are_mapped_whole_or_in_shards(tmp_path: Path, shards: int, dtype: Any) -> None:
    from pjengine.models.checkpoint import open_checkpoint

    case = golden.load("tied")
    checkpoint = open_checkpoint(golden.write_checkpoint(case, tmp_path, shards=shards, dtype=dtype))
    weights = case.weights()
    assert set(checkpoint.names) == set(weights)
    for name, array in weights.items():
        assert checkpoint.shape(name) == array.shape and checkpoint.dtype(name) == dtype
        np.testing.assert_array_equal(checkpoint.tensor(name), array.astype(dtype))
        assert isinstance(checkpoint.tensor(name), np.memmap) and not checkpoint.tensor(name).flags.writeable


def test_a_digest_tells_trained_weights_apart_and_not_how_files_divide_them(tmp_path: Path) -> None:
    from pjengine.models.checkpoint import Checkpoint, open_checkpoint

    case = golden.load("tied")
    whole = open_checkpoint(golden.write_checkpoint(case, tmp_path / "whole"))
    shards = open_checkpoint(golden.write_checkpoint(case, tmp_path / "shards", shards=3))
    assert shards.digest() == whole.digest()
    others = [{**whole.tensors, name: whole.tensor(name)[::-1]} for name in whole.names]
    others.append({name: tensor for name, tensor in whole.tensors.items() if name != whole.names[0]})
    digests = {Checkpoint(folder=tmp_path, tensors=tensors).digest() for tensors in others}
    assert whole.digest() not in digests


def test_file_of_the_safetensors_library_gives_every_dtype() -> None:
    from pjengine.models.checkpoint import read_safetensors

    tensors = read_safetensors(golden.FOLDER / "state.safetensors")
    with np.load(golden.FOLDER / "state_expected.npz") as expected:
        assert set(tensors) == set(expected.files)
        for name in expected.files:
            np.testing.assert_array_equal(
                tensors[name].astype(expected[name].dtype), expected[name], strict=True
            )


def test_torch_files_are_read_whole_or_in_shards(tmp_path: Path) -> None:
    from pjengine.models.checkpoint import open_checkpoint

    whole = tmp_path / "whole"
    whole.mkdir()
    shutil.copy(golden.FOLDER / "state_zip.bin", whole / "pytorch_model.bin")
    assert "float32" in open_checkpoint(whole).names
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    files = {"a.bin": "state_legacy.bin", "b.bin": "state_float8.bin"}
    for file, source in files.items():
        shutil.copy(golden.FOLDER / source, sharded / file)
    names = {name: "a.bin" for name in open_checkpoint(whole).names} | {"float8_e4m3fn": "b.bin"}
    (sharded / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    assert set(open_checkpoint(sharded).names) == set(names)


def test_safetensors_are_preferred_and_a_format_can_be_asked_for(tmp_path: Path) -> None:
    from pjengine.models.checkpoint import open_checkpoint

    case = golden.load("tied")
    golden.write_checkpoint(case, tmp_path)
    shutil.copy(golden.FOLDER / "state_zip.bin", tmp_path / "pytorch_model.bin")
    assert set(open_checkpoint(tmp_path).names) == set(case.shapes)
    assert "float32" in open_checkpoint(tmp_path, "bin").names
    with pytest.raises(ValueError, match="got 'gguf'"):
        open_checkpoint(tmp_path, "gguf")


def test_folder_without_weights_names_what_was_looked_for(tmp_path: Path) -> None:
    from pjengine.models.checkpoint import open_checkpoint

    with pytest.raises(OSError, match=r"model\.safetensors, .*pytorch_model\.bin\.index\.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "index, error, message",
    [
        (b"{", ValueError, "wanted JSON"),
        (b"[]", ValueError, "weight_map"),
        (b'{"weight_map": {"a": 1}}', ValueError, "weight_map"),
        (b'{"weight_map": {"a": "../model.safetensors"}}', ValueError, "beside the index"),
        (b'{"weight_map": {"a": "/etc/passwd"}}', ValueError, "beside the index"),
        (b'{"weight_map": {"a": "gone.safetensors"}}', OSError, r"missing: gone\.safetensors"),
        (b'{"weight_map": {"a": "one.safetensors"}}', ValueError, "missing: a"),
    ],
)
def test_bad_index_is_refused(tmp_path: Path, index: bytes, error: type[Exception], message: str) -> None:
    from pjengine.models.checkpoint import open_checkpoint

    write_raw(tmp_path / "one.safetensors", {"b": entry(0, 4, [1])}, bytes(4))
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(error, match=message):
        open_checkpoint(tmp_path)


def test_tensor_in_two_shards_is_taken_from_where_the_index_says(tmp_path: Path) -> None:
    from pjengine.models.checkpoint import open_checkpoint

    for file, value in (("a.safetensors", 1.0), ("b.safetensors", 2.0)):
        write_raw(tmp_path / file, {"w": entry(0, 4, [1])}, np.float32(value).tobytes())
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "b.safetensors"}}')
    assert open_checkpoint(tmp_path).tensor("w") == 2.0
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "a.safetensors"}}')
    assert open_checkpoint(tmp_path).tensor("w") == 1.0


def test_truncated_safetensors_are_an_error_wherever_they_end(tmp_path: Path) -> None:
    from pjengine.models.checkpoint import read_safetensors

    whole = (golden.FOLDER / "state.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    for size in [*range(0, len(whole), 41), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(OSError, match=rf"cut\.safetensors: wanted .* got {size}"):
            read_safetensors(path)


@pytest.mark.parametrize(
    "header, error, message",
    [
        ({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, ValueError, "'b' to begin at byte 4.* got 0"),
        ({"a": entry(0, 4, [1]), "b": entry(6, 10, [1])}, ValueError, "'b' to begin at byte 4.* got 6"),
        ({"a": entry(0, 4, [2])}, ValueError, r"'a': wanted 8 bytes for F32 \(2,\), got 4"),
        ({"a": entry(0, 4, [-1])}, ValueError, "integers >= 0"),
        ({"a": entry(0, 4, [1.0])}, ValueError, "integers >= 0"),
        ({"a": entry(8, 4, [1])}, ValueError, "got -4"),
        ({"a": entry(0, 4, [1], "F4")}, ValueError, "dtype must be one of .* got 'F4'"),
        ({"a": {"dtype": "F32"}}, ValueError, "wanted dtype, shape and data_offsets"),
        ({"a": 3}, ValueError, "wanted dtype, shape and data_offsets"),
        ({"a": entry(0, 4, [1], ["F32"])}, ValueError, r"dtype must be one of .* got \['F32'\]"),
        ({"a": entry(0, 4, [1], {})}, ValueError, "dtype must be one of"),
        ({"a": {"dtype": "F32", "shape": [1] * 9999}}, ValueError, r"shape and data_offsets, got .{1,200}$"),
        (b"[" * 100_000, ValueError, "wanted JSON"),
        (b'{"a":' * 100_000, ValueError, "wanted JSON"),
        ([], ValueError, "wanted a JSON object"),
        (b'{"a": 1, "a": 2}', ValueError, "occurs twice"),
        (b"\xff\xfe", ValueError, "wanted JSON"),
        ({}, OSError, "wanted 10 bytes, got 22"),
    ],
)
def test_malformed_safetensors_header_is_refused(
    tmp_path: Path, header: Any, error: type[Exception], message: str
) -> None:
    from pjengine.models.checkpoint import read_safetensors

    path = write_raw(tmp_path / "bad.safetensors", header, bytes(12))
    with pytest.raises(error, match=message) as caught:
        read_safetensors(path)
    assert "bad.safetensors" in str(caught.value)


def test_header_beyond_the_limit_is_refused_unread(tmp_path: Path) -> None:
    from pjengine.models.checkpoint import read_safetensors

    path = tmp_path / "huge.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + bytes(100))
    with pytest.raises(ValueError, match="at most 100000000 bytes, got 4611686018427387904"):
        read_safetensors(path)


def test_empty_tensors_share_their_place(tmp_path: Path) -> None:
    from pjengine.models.checkpoint import read_safetensors

    header = {"full": entry(0, 4, [1]), "none": entry(0, 0, [0, 4]), "last": entry(4, 4, [0])}
    tensors = read_safetensors(write_raw(tmp_path / "w.safetensors", header, bytes(4)))
    assert {name: array.shape for name, array in tensors.items()} == {
        "full": (1,),
        "none": (0, 4),
        "last": (0,),
    }
