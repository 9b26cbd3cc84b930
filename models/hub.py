"""Finds the folder of a model: local, packaged with pjengine, or from the Hugging Face Hub."""

import re
from collections.abc import Iterable
from pathlib import Path

# Beside the weights: configs, tokenizers and chat templates. Only at the root of a repository.
_COMPANIONS = re.compile(r"[^/]+\.(json|txt|model|jinja)")
_WEIGHTS = {  # by load format, in the order of preference; a repository often holds both
    "safetensors": re.compile(r"model(-\d+-of-\d+)?\.safetensors"),
    "bin": re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin"),
}
_WEIGHT_NAMES = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}
_LOAD_FORMATS = ("auto", "safetensors", "bin", "dummy")
_MAX_NAMES = 12  # of files, in an error
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?", re.ASCII)


def resolve_model(
    model: str,
    *,
    revision: str | None = None,
    download_dir: str | Path | None = None,
    hf_token: str | None = None,
    load_format: str = "auto",
    needs_weights: bool = True,
    needs_config: bool = True,
) -> Path:
    """Returns the local folder that holds a model's config, tokenizer and weights.

    For a tokenizer on its own, pass needs_weights=False and needs_config=False.

    Args:
      model: a folder; "demo", the small model that comes with pjengine; or a Hub id such as "org/name".
      revision: branch, tag or commit on the Hub; None: main.
      download_dir: where Hub downloads are cached; None: where huggingface_hub keeps them.
      hf_token: for private and gated repositories; None: the token that `hf auth login` stored.
      load_format: which weights to download; see `choose_files`.
      needs_weights: False: downloads none.
      needs_config: False: a folder or repository without config.json will do.

    Raises:
      OSError: there is no such folder, or the Hub cannot give it; the text says what was tried.
      ValueError: there is no such load_format.
    """
    _check_load_format(load_format)
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file() or (not needs_config and _has_companions(folder)):
        return folder
    if model == "demo":
        return Path(__file__).parent / "demo"
    if folder.is_dir():
        wanted = (
            "a model's folder, found no config.json" if needs_config else "a tokenizer, found no such files"
        )
        raise OSError(f"{folder}: wanted {wanted} in it")
    if folder.exists():
        raise OSError(f"{folder}: wanted a model's folder, got a file")
    if not _HUB_ID.fullmatch(model):
        raise OSError(f"{model!r}: no such folder, and not a Hub id (org/name) either: check the path")
    where = f"{model!r} (revision {revision or 'main'})"
    files, reason = _list_files(model, where, revision=revision, hf_token=hf_token)
    chosen = None
    if files is not None:
        chosen = choose_files(
            files,
            load_format=load_format,
            needs_weights=needs_weights,
            needs_config=needs_config,
            where=where,
        )
    return _download(
        model, where, chosen, reason, revision=revision, download_dir=download_dir, hf_token=hf_token
    )


def choose_files(
    files: Iterable[str],
    *,
    load_format: str = "auto",
    needs_weights: bool = True,
    needs_config: bool = False,
    where: str = "the repository",
) -> list[str]:
    """Returns which files of a repository to download: what lies beside the weights, and the weights.

    Args:
      load_format: "safetensors", "bin" (torch's), "auto": safetensors where there are any, else bin; or
        "dummy": no weights.
      needs_weights: False: none, whatever load_format says.
      needs_config: True: config.json must be there.
      where: names the repository in errors.

    Raises:
      OSError: what is needed is not there.
    """
    _check_load_format(load_format)
    files = list(files)
    companions = [file for file in files if _COMPANIONS.fullmatch(file)]
    if needs_config and "config.json" not in files:
        raise OSError(f"{where}: wanted config.json, got {_names(files)}: is it a model in another format?")
    if not needs_weights or load_format == "dummy":
        if not companions:
            raise OSError(f"{where}: wanted a config or a tokenizer, got {_names(files)}")
        return companions
    formats = list(_WEIGHTS) if load_format == "auto" else [load_format]
    for name in formats:
        weights = [file for file in files if _WEIGHTS[name].fullmatch(file)]
        if weights:
            return companions + weights
    raise OSError(
        f"{where}: wanted {' or '.join(_WEIGHT_NAMES[name] for name in formats)}, in one file or in shards, "
        f"got {_names(set(files) - set(companions))}"
    )


def _check_load_format(load_format: str) -> None:
    if load_format not in _LOAD_FORMATS:
        raise ValueError(f"load_format must be one of {', '.join(_LOAD_FORMATS)}, got {load_format!r}")


def _has_companions(folder: Path) -> bool:
    return folder.is_dir() and any(_COMPANIONS.fullmatch(path.name) for path in folder.iterdir())


def _names(files: Iterable[str]) -> str:
    names = sorted(files)
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return (", ".join(names[:_MAX_NAMES]) or "no such files") + more


def _download(
    model: str,
    where: str,
    files: list[str] | None,
    reason: str,
    *,
    revision: str | None,
    download_dir: str | Path | None,
    hf_token: str | None,
) -> Path:
    """Downloads these files; None: finds what was downloaded before, as the Hub is out of reach."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                cache_dir=download_dir,
                token=hf_token,  # None: the stored one, which huggingface_hub looks up itself
                allow_patterns=files,
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
