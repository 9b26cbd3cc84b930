"""Finding a model's folder: local, packaged, or in the Hub's cache; never over the network here."""

from pathlib import Path

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
