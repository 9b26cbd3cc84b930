"""Finding a model's folder: local, packaged, or in the Hub's cache; never over the network here."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def write_cached(cache: Path, repository: str, revision: str = "main") -> Path:
    """Lays a repository out as huggingface_hub caches it; returns the snapshot's folder."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (root / "refs").mkdir()
    (root / "refs" / revision).write_text(commit)
    return snapshot


def test_local_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pjengine.models.hub import resolve_model

    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path / "demo")) == tmp_path / "demo"
    monkeypatch.chdir(tmp_path)
    assert resolve_model("demo").resolve() == tmp_path / "demo"


def test_demo_is_the_packaged_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pjengine.models import hub

    (tmp_path / "demo").mkdir()  # a folder without a model does not shadow it
    monkeypatch.chdir(tmp_path)
    assert hub.resolve_model("demo") == Path(hub.__file__).parent / "demo"


@pytest.mark.parametrize("model", ["./nope", "/nope/model", "~nobody/x", "a/b/c", "org/na me", "-x", ""])
def test_path_that_is_not_there_is_never_looked_up(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pjengine.models.hub import resolve_model

    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=r"check the path|no config\.json"):
        resolve_model(model)


def test_folder_without_config_and_file_are_refused(tmp_path: Path) -> None:
    from pjengine.models.hub import resolve_model

    with pytest.raises(OSError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(OSError, match="got a file"):
        resolve_model(str(tmp_path / "model.gguf"))


def test_cached_download_is_found_offline(tmp_path: Path) -> None:
    from pjengine.models.hub import resolve_model

    snapshot = write_cached(tmp_path, "org/model")
    assert resolve_model("org/model", download_dir=tmp_path) == snapshot
    snapshot = write_cached(tmp_path, "org/other", revision="v2")
    assert resolve_model("org/other", revision="v2", download_dir=str(tmp_path)) == snapshot


def test_offline_error_says_what_was_tried_and_keeps_the_token(tmp_path: Path) -> None:
    from pjengine.models.hub import resolve_model

    with pytest.raises(OSError) as caught:
        resolve_model("org/model", revision="v1", download_dir=tmp_path, hf_token="hf_SECRET")
    text = str(caught.value)
    for part in (
        "'org/model' (revision v1)",
        "no such local folder",
        str(tmp_path),
        "HF_HUB_OFFLINE",
        "Offline",
    ):
        assert part in text
    chain: BaseException | None = caught.value
    while chain is not None:
        assert "hf_SECRET" not in str(chain)
        chain = chain.__cause__ or chain.__context__


def test_one_format_of_weights_is_chosen() -> None:
    from pjengine.models.hub import choose_files

    companions = [
        "config.json",
        "generation_config.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
    ]
    indexes = ["model.safetensors.index.json"]
    others = [
        "README.md",
        "original/consolidated.00.pth",
        "onnx/model.safetensors",
        "training_args.bin",
        "x.gguf",
    ]
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    torch = ["pytorch_model-00001-of-00001.bin"]
    both = choose_files([*companions, *indexes, *others, *shards, *torch])
    assert sorted(both) == sorted([*companions, *indexes, *shards])
    assert sorted(choose_files([*companions, *others, *torch])) == sorted([*companions, *torch])
    assert choose_files(["model.safetensors"]) == ["model.safetensors"]
    with pytest.raises(OSError, match=r"got README\.md, .*x\.gguf"):
        choose_files([*companions, *others])


COMPANIONS = ["config.json", "tokenizer.json"]
SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"


@pytest.mark.parametrize(
    "options, chosen",
    [
        ({}, [*COMPANIONS, SAFETENSORS]),
        ({"load_format": "safetensors"}, [*COMPANIONS, SAFETENSORS]),
        ({"load_format": "bin"}, [*COMPANIONS, TORCH]),
        ({"load_format": "dummy"}, COMPANIONS),
        ({"needs_weights": False, "needs_config": False}, COMPANIONS),
    ],
    ids=str,
)
def test_only_what_is_needed_is_downloaded(
    hub: list[list[str]], tmp_path: Path, options: dict[str, Any], chosen: list[str]
) -> None:
    from pjengine.models.hub import resolve_model

    hub.append([*COMPANIONS, SAFETENSORS, TORCH, "README.md"])
    assert resolve_model("org/model", **options) == tmp_path
    assert hub[1:] == [chosen]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A Hub whose only repository holds the files of the first list; of downloads, the lists that follow."""
    import huggingface_hub

    lists: list[list[str]] = []

    def model_info(*_: Any, **__: Any) -> SimpleNamespace:
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in lists[0]])

    def snapshot_download(*_: Any, allow_patterns: list[str], **__: Any) -> str:
        lists.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return lists


def test_repository_of_a_tokenizer_alone_is_enough_for_a_tokenizer(
    hub: list[list[str]], tmp_path: Path
) -> None:
    from pjengine.models.hub import resolve_model

    hub.append(["tokenizer.json", "README.md"])
    assert resolve_model("org/tokenizer", needs_weights=False, needs_config=False) == tmp_path
    assert hub[1:] == [["tokenizer.json"]]
    with pytest.raises(OSError, match=r"'org/tokenizer' \(revision main\): wanted config\.json, got README"):
        resolve_model("org/tokenizer")
    hub[0] = ["README.md"]
    with pytest.raises(OSError, match=r"'org/tokenizer' .*: wanted a config or a tokenizer, got README\.md"):
        resolve_model("org/tokenizer", needs_weights=False, needs_config=False)


def test_repository_without_the_weights_is_named(hub: list[list[str]]) -> None:
    from pjengine.models.hub import resolve_model

    hub.append(["config.json", SAFETENSORS, *(f"{i}.gguf" for i in range(1000))])
    with pytest.raises(
        OSError, match=r"'org/model' \(revision v1\): wanted pytorch_model\.bin, in"
    ) as caught:
        resolve_model("org/model", revision="v1", load_format="bin")
    assert "and 989 more" in str(caught.value)
    with pytest.raises(ValueError, match=r"load_format must be one of auto, .*got 'gguf'"):
        resolve_model("org/model", load_format="gguf")


def test_folder_of_a_tokenizer_alone_is_enough_for_a_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pjengine.models import hub

    options: Any = {"needs_weights": False, "needs_config": False}
    folder = tmp_path / "demo"
    folder.mkdir()
    with pytest.raises(OSError, match="wanted a tokenizer, found no such files"):
        hub.resolve_model(str(folder), **options)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve_model("demo", **options) == Path(hub.__file__).parent / "demo"
    (folder / "tokenizer.model").write_text("")
    assert hub.resolve_model(str(folder), **options) == folder
    with pytest.raises(OSError, match=r"no config\.json"):
        hub.resolve_model(str(folder))


def copy_tokenizer(folder: Path) -> Path:
    from pjengine.models.hub import resolve_model

    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve_model("demo") / name, folder)
    return folder


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("text", ["{", "[]", "[" * 10**5], ids=lambda text: text[:2])
def test_broken_file_of_a_tokenizer_is_named(tmp_path: Path, name: str, text: str) -> None:
    from pjengine.tokenizer import load_tokenizer

    (copy_tokenizer(tmp_path) / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{tmp_path}/{name}: wanted (a )?JSON"):
        load_tokenizer(tmp_path)


def test_tokenizer_that_makes_no_sense_is_a_value_error(tmp_path: Path) -> None:
    from pjengine.tokenizer import load_tokenizer

    (copy_tokenizer(tmp_path) / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=rf"{tmp_path}: wanted a tokenizer that loads, got tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_tokenizer_without_a_decoder_loads(tmp_path: Path) -> None:
    from pjengine.tokenizer import load_tokenizer

    path = copy_tokenizer(tmp_path) / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "decoder": None}))
    assert not load_tokenizer(tmp_path).has_byte_tokens
