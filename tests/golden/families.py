"""What a family of golden cases is, and how transformers 4 wrote the config.json of one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Config = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture: a tiny configuration, and how each case differs from it."""

    architecture: str  # as transformers names it
    base: Config
    cases: Mapping[str, Config]  # by name of the golden file
    old: Callable[[Config], Config]  # config.json of transformers 5 -> what older checkpoints hold
    draws: Mapping[str, float] = field(default_factory=dict)  # what golden.make_weights takes beside a seed
    prompt_lengths: Mapping[str, int] = field(default_factory=dict)  # 40 tokens where not given
    new_tokens: int = 32
    attention: str = "eager"  # which of transformers' implementations


def v4(config: Config, *dropped: str, **fields: Any) -> Config:
    """The config.json that transformers 4 wrote for the same model, without some keys and with some more."""
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
    if "rope_parameters" in config:
        old |= _v4_rope(config["rope_parameters"])
    old |= {"torch_dtype": config["dtype"], "transformers_version": "4.44.2"}
    return {key: value for key, value in (old | fields).items() if key not in dropped}


def _v4_rope(parameters: Config) -> Config:
    scaling = dict(parameters)
    old = {"rope_theta": scaling.pop("rope_theta")}
    kind = scaling.pop("rope_type")
    if "partial_rotary_factor" in scaling:
        old["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
    if kind == "longrope":  # the length stood beside rope_scaling
        old["original_max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
    spelling = "rope_type" if kind in ("llama3", "yarn") else "type"  # `type` until 4.43
    old["rope_scaling"] = None if kind == "default" else {spelling: kind, **scaling}
    return old


def renamed(config: Config, names: Mapping[str, str]) -> Config:
    """`config` with the keys of `names` called as its values say."""
    return {names.get(key, key): value for key, value in config.items()}


def rope(kind: str = "default", *, theta: float = 10000.0, **fields: Any) -> Config:
    return {"rope_type": kind, "rope_theta": theta, **fields}
