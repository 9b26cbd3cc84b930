"""How a checkpoint's tensors map to a model's parameters, and whether they all fit."""

import fnmatch
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from jax.sharding import Sharding
from jaxtyping import Array

from pjengine.models.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The part of a tensor from `start` to `stop` along `axis`, where the tensor has `size` in all."""

    start: int
    stop: int
    size: int
    axis: int = 0


@dataclass(frozen=True, kw_only=True)
class Source:
    """One tensor of the checkpoint and how it is turned: in the order of the fields."""

    # As in the checkpoint; "{layer}" stands for the layer's number, "{expert}" for the expert's.
    name: str
    cut: Cut | None = None  # of a tensor that several parameters, or parts of one, lie in
    reshape: tuple[int, ...] | None = None  # splits axes; merges none, so that a transposed tensor is noticed
    transpose: tuple[int, ...] | None = None
    # The first so many of the last axis lie in rotary pairs (GPT-J order): the even ones go before the odd
    # ones, so that dimension i is rotated together with i + num_paired / 2, which gives the same scores.
    num_paired: int = 0
    has_unit_rows: bool = False  # along the last axis, each row is divided by its length
    # Of the whole tensor where one is written and `reshape` gives it more axes; loading does without.
    shape: tuple[int, ...] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is stored as it is wanted, but for the shape."""
        return self.transpose is None and not self.num_paired and not self.has_unit_rows


# Packed tensors, as the checkpoint has them but for their shape, to what they stand for in the dtype wanted.
type Unpack = Callable[[tuple[Array, ...], Any], Array]


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """One parameter: its sources, concatenated along `concat_axis`.

    With "{layer}" in the names it is stacked on a leading layer axis, and with "{expert}" on one for experts
    behind that; no axis given here counts them.
    """

    sources: tuple[Source, ...]
    concat_axis: int = 0
    # What the sources mean together, where their numbers are packed; `reshape` is then their whole shape. The
    # first axis stays as it is.
    unpack: Unpack | None = None

    @property
    def is_stacked(self) -> bool:
        return any("{layer}" in source.name for source in self.sources)

    @property
    def has_experts(self) -> bool:
        return any("{expert}" in source.name for source in self.sources)


@dataclass(frozen=True, kw_only=True)
class WeightTable:
    """How an architecture's checkpoints map to its parameters."""

    leaves: Mapping[str, Leaf]  # by path, as in "layers/qkv"
    ignored: tuple[str, ...] = ()  # fnmatch patterns of names that carry nothing we need
    # What a checkpoint's names may have in front where the table's do not, or lack where they do: ("model.",)
    # lets "layers.0.x" stand for "model.layers.0.x". The table's own spelling is tried first.
    prefixes: tuple[str, ...] = ("",)
    # The numbers of the layers in a stack, by what its paths begin with; a stack that is not named has all.
    stacks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def layers_of(self, path: str, num_layers: int) -> tuple[int, ...]:
        return self.stacks.get(path.partition("/")[0], tuple(range(num_layers)))


@dataclass(frozen=True, kw_only=True)
class Target:
    """A parameter to fill: its leaf in the table, and what the model wants it to be."""

    path: str
    leaf: Leaf
    shape: tuple[int, ...]  # without the axes for layers and experts
    dtype: Any
    sharding: Sharding  # without those axes
    stored_sharding: Sharding  # of the whole parameter, as it is stored
    layers: tuple[int, ...] = (0,)  # their numbers in the model
    num_experts: int | None = None  # None: no axis for experts
    is_widened: bool = False  # it is stored with padding, or in another order
    expert_axis: str | None = (
        None  # of the mesh: along it the experts are divided, each group to be read apart
    )
    num_groups: int = 1  # of experts

    def names(self, names_of: "Names", layer: int) -> list[list[str]]:
        """The checkpoint's names of each expert's sources; of one, where there are none."""
        return [
            [names_of(source.name, layer, expert) for source in self.leaf.sources]
            for expert in range(self.num_experts or 1)
        ]


class Names:
    """Resolves the table's names to the checkpoint's, with or without a prefix."""

    def __init__(self, checkpoint: Checkpoint, prefixes: tuple[str, ...]) -> None:
        self.known = set(checkpoint.names)
        self._prefixes = prefixes

    def __call__(self, name: str, layer: int, expert: int) -> str:
        """Returns the checkpoint's spelling of a name, or the table's own where the checkpoint has none."""
        name = name.replace("{layer}", str(layer)).replace("{expert}", str(expert))
        for prefix in self._prefixes:
            for spelling in (name, prefix + name, name.removeprefix(prefix)):
                if spelling in self.known:
                    return spelling
        return name


def check(
    checkpoint: Checkpoint, table: WeightTable, targets: list[Target], names_of: Names, num_layers: int
) -> None:
    """Compares all names and shapes, and reports everything that is wrong at once."""
    missing: list[str] = []
    misshapen: list[str] = []
    used: set[str] = set()
    for target in targets:
        for names in itertools.chain.from_iterable(target.names(names_of, n) for n in target.layers):
            used.update(names)
            absent = [name for name in names if name not in names_of.known]
            missing += [f"{name} (for {target.path} {target.shape})" for name in absent]
            if not absent:
                find = _shape_faults if target.leaf.unpack is None else _packed_faults
                misshapen += find(checkpoint, target, names)
    unexpected = [
        f"{name} {checkpoint.shape(name)}"
        for name in checkpoint.names
        if name not in used and not any(fnmatch.fnmatchcase(name, pattern) for pattern in table.ignored)
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of the wrong shape or dtype": misshapen}
    if any(faults.values()):
        lists = "".join(
            f"\n{len(lines)} {fault}:" + "".join(f"\n  {line}" for line in lines)
            for fault, lines in faults.items()
            if lines
        )
        raise ValueError(
            f"{checkpoint.folder}: the tensors do not fit the model that config.json describes "
            f"({num_layers} layers); is the config of another model?{lists}"
        )


def _shape_faults(checkpoint: Checkpoint, target: Target, names: list[str]) -> Iterator[str]:
    axis, is_joined = target.leaf.concat_axis, len(names) > 1
    views = []
    for name, source in zip(names, target.leaf.sources, strict=True):
        shape = checkpoint.shape(name)
        if not jnp.issubdtype(checkpoint.dtype(name), jnp.floating) or checkpoint.dtype(name).itemsize < 2:
            yield f"{name}: wanted float64, float32, float16 or bfloat16, got {checkpoint.dtype(name)}"
        if source.cut is not None:
            cut = source.cut
            if len(shape) <= cut.axis or shape[cut.axis] != cut.size:
                yield f"{name}: wanted {cut.size} along axis {cut.axis}, got {shape}"
                return
            shape = (*shape[: cut.axis], cut.stop - cut.start, *shape[cut.axis + 1 :])
        if source.reshape is not None:
            if not _splits(shape, source.reshape):
                yield f"{name}: wanted a shape that splits into {source.reshape}, got {shape}"
                return
            shape = source.reshape
        order = source.transpose or tuple(range(len(target.shape)))
        wanted = [0] * len(order)
        for to, come_from in enumerate(order):
            wanted[come_from] = target.shape[to]
        free = order[axis] if is_joined else None  # this axis is checked by the sum below
        if len(shape) != len(wanted) or any(
            got != want for i, (got, want) in enumerate(zip(shape, wanted, strict=True)) if i != free
        ):
            text = ", ".join("any" if i == free else str(want) for i, want in enumerate(wanted))
            yield f"{name}: wanted ({text}), got {shape}"
            return
        views.append(tuple(shape[i] for i in order))
    if is_joined and sum(view[axis] for view in views) != target.shape[axis]:
        yield (
            f"{' + '.join(names)}: wanted {target.shape} once joined along axis {axis}, "
            f"got {' + '.join(str(checkpoint.shape(name)) for name in names)}"
        )


def _packed_faults(checkpoint: Checkpoint, target: Target, names: list[str]) -> Iterator[str]:
    for name, source in zip(names, target.leaf.sources, strict=True):
        shape, dtype = checkpoint.shape(name), checkpoint.dtype(name)
        assert source.reshape is not None, "a packed tensor's shape is in the table"
        if dtype != jnp.uint8 or not _splits(shape, source.reshape):
            yield f"{name}: wanted uint8 of a shape that splits into {source.reshape}, got {dtype} {shape}"


def _splits(shape: tuple[int, ...], into: tuple[int, ...]) -> bool:
    """Whether `into` only splits axes of `shape`: every boundary of `shape` is one of `into` too."""
    inner = {math.prod(into[:i]) for i in range(len(into) + 1)}
    outer = {math.prod(shape[:i]) for i in range(len(shape) + 1)}
    return math.prod(shape) == math.prod(into) and outer <= inner
