"""A tokenizer.model of SentencePiece, rebuilt on the Rust library that runs every tokenizer.json."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pjengine.models.json_values import read_json_object

_UNIGRAM, _BPE = 1, 2  # kinds of models, and
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # of pieces, as SentencePiece numbers them
_SPACE = "▁"


def read_sentencepiece(folder: Path, settings: Mapping[str, Any]) -> tuple[Any, dict[str, str]]:
    """Reads tokenizer.model and the tokens that are added to it.

    Text is normalized and cut as the model itself says. Each part between special tokens is encoded as if it
    stood alone, as transformers 4 does; with `legacy: false` only the first begins with the space that
    SentencePiece puts in front.

    Args:
      settings: what tokenizer_config.json and special_tokens_map.json hold.

    Returns:
      A `tokenizers.Tokenizer`, and the special tokens {"bos_token": ...} that there are.

    Raises:
      ValueError: it is no SentencePiece model, or what is added has other ids than those after the model's.
      NotImplementedError: it is no model of BPE or Unigram, or marks spaces in a way of its own.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Tokenizer

    path = folder / "tokenizer.model"
    # By its name, because protobuf makes the classes as the module is imported.
    proto: Any = vars(sentencepiece_model_pb2)["ModelProto"].FromString(path.read_bytes())
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    if not proto.pieces:
        raise ValueError(
            f"{path}: wanted a SentencePiece model, got a file without pieces: add tokenizer.json"
        )
    if trainer.model_type not in (_UNIGRAM, _BPE):
        raise NotImplementedError(f"{path}: wanted a SentencePiece model of BPE or Unigram, got another")
    if trainer.treat_whitespace_as_suffix or not rules.escape_whitespaces:
        raise NotImplementedError(f"{path}: wanted spaces escaped in front of words, got another way")
    pieces = [piece.piece for piece in proto.pieces]
    added = _added_tokens(folder, settings)
    known = set(pieces)
    for token, fields in added.items():
        if token < len(pieces) and fields["content"] not in known:
            pieces[token] = fields["content"]  # a placeholder of the model that has been given a use
    backend = Tokenizer(_model(proto, pieces))
    has_prefix = rules.add_dummy_prefix and settings.get("add_prefix_space") is not False
    is_legacy = settings.get("legacy") is not False
    _set_spaces(backend, rules, has_prefix, is_legacy, trainer.byte_fallback)
    _add_tokens(backend, proto, pieces, added)
    return backend, _set_special_tokens(backend, trainer, pieces, settings)


def _model(proto: Any, pieces: list[str]) -> Any:
    from tokenizers import models

    trainer = proto.trainer_spec
    scores = [piece.score for piece in proto.pieces]
    if trainer.model_type == _UNIGRAM:
        return models.Unigram(
            list(zip(pieces, scores, strict=True)), unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback
        )
    is_merged = [piece.type == _NORMAL for piece in proto.pieces]
    return models.BPE(
        {piece: i for i, piece in enumerate(pieces)},
        list(_merges(pieces, scores, is_merged)),
        unk_token=pieces[trainer.unk_id],
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
    )


def _merges(pieces: list[str], scores: list[float], is_merged: list[bool]) -> Iterator[tuple[str, str]]:
    """The pairs that make a piece, those of the best pieces first."""
    ids = {piece: i for i, piece in enumerate(pieces) if is_merged[i]}
    for i in sorted(ids.values(), key=lambda i: (-scores[i], i)):
        piece = pieces[i]
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = [(left, right) for left, right in halves if left in ids and right in ids]
        yield from sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))


def _set_spaces(backend: Any, rules: Any, has_prefix: bool, is_legacy: bool, has_bytes: bool) -> None:
    """How text is normalized before it is cut, and how tokens become text again."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if has_prefix and is_legacy:
        steps.append(normalizers.Prepend(_SPACE))
    if has_prefix and not is_legacy:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False)
    else:
        steps.append(normalizers.Replace(" ", _SPACE))
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            *([decoders.ByteFallback()] if has_bytes else []),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if has_prefix or rules.remove_extra_whitespaces else []),
        ]
    )


def _add_tokens(backend: Any, proto: Any, pieces: list[str], added: Mapping[int, dict[str, Any]]) -> None:
    """Makes tokens of what is never cut: the model's own symbols, and what was added to it."""
    from tokenizers import AddedToken

    own = [
        AddedToken(name, normalized=False, special=piece.type == _CONTROL)
        for name, piece in zip(pieces, proto.pieces, strict=True)
        if piece.type in (_CONTROL, _USER_DEFINED)
    ]
    backend.add_tokens([*own, *(AddedToken(**fields) for _, fields in sorted(added.items()))])
    for token, fields in added.items():
        if backend.token_to_id(fields["content"]) != token:
            raise ValueError(
                f"wanted added tokens with the ids after the model's {len(pieces)}, got "
                f"{fields['content']!r} as {token}"
            )


def _set_special_tokens(
    backend: Any, trainer: Any, pieces: list[str], settings: Mapping[str, Any]
) -> dict[str, str]:
    """Returns the special tokens by their keys; puts those before and after each text that belong there."""
    from tokenizers import AddedToken, processors

    names: dict[str, str] = {}
    own = {"bos": trainer.bos_id, "eos": trainer.eos_id, "unk": trainer.unk_id, "pad": trainer.pad_id}
    for key, token in own.items():
        # The first conversions of Llama have empty ones.
        name = _text(settings.get(f"{key}_token")) or (pieces[token] if 0 <= token < len(pieces) else None)
        if name:
            names[f"{key}_token"] = name
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in names.values()])
    has_bos, has_eos = settings.get("add_bos_token") is not False, bool(settings.get("add_eos_token"))
    first = [names["bos_token"]] if has_bos and "bos_token" in names else []
    last = [names["eos_token"]] if has_eos and "eos_token" in names else []
    if first or last:
        backend.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            special_tokens=[(name, backend.token_to_id(name)) for name in dict.fromkeys([*first, *last])],
        )
    return names


def _added_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Token id -> the fields of an AddedToken."""
    path = folder / "added_tokens.json"
    tokens = read_json_object(path) if path.is_file() else {}
    special = {
        _text(settings.get(f"{key}_token")) for key in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
    }
    special |= {_text(token) for token in settings.get("additional_special_tokens") or ()}
    added: dict[int, dict[str, Any]] = {
        token: {"content": name, "normalized": False, "special": name in special}
        for name, token in tokens.items()
    }
    fields = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    for token, given in (settings.get("added_tokens_decoder") or {}).items():
        added[int(token)] = {key: given[key] for key in fields if key in given}
    return added


def _text(token: Any) -> str | None:
    """A special token as tokenizer_config.json writes it: its text, or its fields."""
    return token.get("content") if isinstance(token, Mapping) else token
