"""Finds the folder of a model: local, packaged with pjengine, or from the Hugging Face Hub."""

import re
from collections.abc import Iterable
from pathlib import Path

# Beside the weights: configs, tokenizers and chat templates. Only at the root of a repository.
_COMPANIONS = re.compile(r"[^/]+\.(json|txt|model|jinja)")
_WEIGHTS = (  # in the order of preference; a repository often holds both
    re.compile(r"model(-\d+-of-\d+)?\.safetensors"),
    re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin"),
)
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?", re.ASCII)


def resolve_model(
    model: str,
    *,
    revision: str | None = None,
    download_dir: str | Path | None = None,
    hf_token: str | None = None,
) -> Path:
    """Returns the local folder that holds a model's config, tokenizer and weights.

    Args:
      model: a folder; "demo", the small model that comes with pjengine; or a Hub id such as "org/name".
      revision: branch, tag or commit on the Hub; None: main.
      download_dir: where Hub downloads are cached; None: where huggingface_hub keeps them.
      hf_token: for private and gated repositories; None: the token that `hf auth login` stored.

    Raises:
      OSError: there is no such folder, or the Hub cannot give it; the text says what was tried.
    """
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if model == "demo":
        return Path(__file__).parent / "demo"
    if folder.is_dir():
        raise OSError(f"{folder}: wanted a model's folder, found no config.json in it")
    if folder.exists():
        raise OSError(f"{folder}: wanted a model's folder, got a file")
    if not _HUB_ID.fullmatch(model):
        raise OSError(f"{model!r}: no such folder, and not a Hub id (org/name) either: check the path")
    return _download(model, revision=revision, download_dir=download_dir, hf_token=hf_token)


def choose_files(files: Iterable[str]) -> list[str]:
    """Returns which files of a repository to download: safetensors where there are any, else torch's .bin."""
    files = list(files)
    companions = [file for file in files if _COMPANIONS.fullmatch(file)]
    for pattern in _WEIGHTS:
        weights = [file for file in files if pattern.fullmatch(file)]
        if weights:
            return companions + weights
    raise OSError(
        "wanted model.safetensors or pytorch_model.bin, in one file or in shards, "
        f"got {', '.join(sorted(set(files) - set(companions))) or 'no such files'}"
    )


def _download(
    model: str, *, revision: str | None, download_dir: str | Path | None, hf_token: str | None
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    where = f"{model!r} (revision {revision or 'main'})"
    files, reason = _list_files(model, where, revision=revision, hf_token=hf_token)
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                cache_dir=download_dir,
                token=hf_token,  # None: the stored one, which huggingface_hub looks up itself
                allow_patterns=None if files is None else choose_files(files),
                local_files_only=files is None,
            )
        )
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"{where}: no such local folder, the Hub could not be reached ({reason}) and "
            f"{download_dir or 'the Hub cache'} holds no copy: give a folder, or download it once where "
            "there is a network (unset HF_HUB_OFFLINE if it is set)"
        ) from error


def _list_files(
    model: str, where: str, *, revision: str | None, hf_token: str | None
) -> tuple[list[str] | None, str]:
    """Returns the files of a repository, or None and why the Hub could not be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi(token=hf_token).model_info(model, revision=revision, timeout=20)
        return [file.rfilename for file in info.siblings or ()], "the connection was lost"
    except GatedRepoError as error:
        raise OSError(f"{where}: gated: ask for access on its Hub page, then pass hf_token") from error
    except RevisionNotFoundError as error:
        raise OSError(f"{where}: the repository has no such revision") from error
    except RepositoryNotFoundError as error:
        raise OSError(
            f"{where}: no such local folder, and no such repository on the Hub that this token can see: "
            "check the spelling, or pass hf_token if it is private"
        ) from error
    except Exception as error:  # of whichever HTTP client this version of huggingface_hub is built on
        return None, type(error).__name__
