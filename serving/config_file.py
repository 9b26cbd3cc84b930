"""A YAML file of options: each key is the name of an option of the command line."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def read_arguments(path: str, actions: Mapping[str, argparse.Action]) -> list[str]:
    """The file's entries as they would stand on the command line; `actions` are the options there are.

    Raises:
      ValueError: it is no YAML, or holds no object.
      OSError: it cannot be read.
    """
    try:
        entries = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(entries, dict) or not all(isinstance(key, str) for key in entries):
        raise ValueError(f"{path} must hold one object, such as 'port: 8000', got {type(entries).__name__}")
    if "config" in entries:
        raise ValueError(f"{path} must not name another file of options")
    named = {f"--{key.replace('_', '-')}": value for key, value in entries.items()}
    return [word for name, value in named.items() for word in _words(name, value, actions.get(name))]


def _words(name: str, value: Any, action: argparse.Action | None) -> list[str]:
    if isinstance(value, bool) and f"--no-{name.removeprefix('--')}" in getattr(action, "option_strings", ()):
        return [name if value else f"--no-{name.removeprefix('--')}"]
    if isinstance(value, bool) and isinstance(action, argparse._StoreTrueAction):
        return [name] if value else []
    if isinstance(value, list) and isinstance(action, argparse._AppendAction):
        return [f"{name}={_text(item)}" for item in value]
    if isinstance(value, list) and action is not None and action.nargs == "+":
        return [name, *map(_text, value)]
    return [f"{name}={_text(value)}"]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
