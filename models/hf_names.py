"""Parameters under Hugging Face's names, and back: a model's weight table, read from right to left."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from pjengine.models.checkpoint import Checkpoint
from pjengine.models.decoder import Decoder, Params
from pjengine.models.loader import Show, load_params
from pjengine.models.parameters import by_path, placed_shapes, refuse_differences
from pjengine.models.share import narrow, widen
from pjengine.models.weight_table import Leaf, Names, Source
from pjengine.sharding.mesh import choose_devices, make_mesh


def to_hf(model: Decoder, params: Params) -> dict[str, np.ndarray]:
    """The parameters as a checkpoint of transformers has them: its names, its shapes, on the host.

    What a model divided among devices has beside them, padding and repeated KV heads, is left out. Tied
    embeddings are there once. The output layer of Baichuan 2 is written with rows of length one, as it is
    computed with. Weights that came packed (MXFP4) are written unpacked.

    Args:
      model: `llm.model`.
      params: in its form, of any dtype, such as `llm.params` or those of a trainer.

    Raises:
      ValueError: the parameters are not the model's; the text lists the differences.
      NotImplementedError: some are on other hosts; or the table of an architecture from outside does not say
        what a tensor's shape is.
    """
    tensors = HFTensors(model, params)
    return {name: tensors.read(name) for name in tensors.shapes}


def from_hf(model: Decoder, tensors: Mapping[str, Any], *, mesh: Mesh | None = None) -> Params:
    """The inverse of `to_hf`: parameters of the model's dtype on its devices, as the engine has them.

    Takes every spelling that checkpoints have: names with or without their prefix, weights packed or not.

    Args:
      tensors: by name, numpy's or JAX's, of any floating dtype.
      mesh: of the devices; None: the first ones of this process.

    Raises:
      ValueError: tensors are missing, left over, of the wrong shape or not floating point; the text
        lists all.
    """
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    checkpoint = Checkpoint(folder=Path("from_hf"), tensors=arrays)
    if any(leaf.unpack is not None for leaf in model.weight_table().leaves.values()):
        names_of = Names(checkpoint, model.weight_table().prefixes)
        leaf = next(leaf for leaf in model.weight_table().leaves.values() if leaf.unpack is not None)
        if names_of(leaf.sources[0].name, 0, 0) not in arrays:
            model = model.unpacked()
    return read_params(
        model, checkpoint, make_mesh(choose_devices(model.num_devices)) if mesh is None else mesh
    )


def read_params(
    model: Decoder,
    checkpoint: Checkpoint,
    mesh: Mesh,
    show: Show = lambda num_done, num_layers: None,
) -> Params:
    """The parameters that a checkpoint holds, on the devices of `mesh`. Raises as `load_params` does."""
    undivided = replace(model, num_devices=1)
    return load_params(
        checkpoint,
        model.weight_table(),
        jax.eval_shape(undivided.init, jax.random.key(0)),
        num_layers=model.config.num_layers,
        stored=placed_shapes(model, mesh),
        widen=partial(widen, config=model.config, num_devices=model.num_devices),
        show=show,
    )


@dataclass(frozen=True)
class _Part:
    """Where a tensor, or a cut of one, lies among the parameters."""

    path: str
    source: Source
    start: int  # along the axis on which the leaf's sources are joined
    layer: int | None  # its place in the stack; None: it is of no layer
    expert: int | None


class HFTensors:
    """What a checkpoint of these parameters holds: names, shapes and dtypes at once, tensors one at a time.

    Raises as `to_hf` does.
    """

    def __init__(self, model: Decoder, params: Params) -> None:
        self._model = model = model.unpacked()
        self._table = model.weight_table()
        undivided = by_path(jax.eval_shape(replace(model, num_devices=1).init, jax.random.key(0)))
        wanted = jax.eval_shape(model.init, jax.random.key(0))
        refuse_differences(wanted, params, shapes_only=True)
        self._params = by_path(params)
        for path, leaf in self._params.items():
            if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
                raise NotImplementedError(
                    f"{path} is on other hosts, too: wanted arrays of this process alone"
                )
        self._shapes = {path: struct.shape for path, struct in undivided.items()}
        self._last: tuple[tuple[str, int | None], np.ndarray] | None = None  # read before
        self._parts: dict[str, list[_Part]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        stacked = {path: leaf for path, leaf in self._table.leaves.items() if leaf.is_stacked}
        for path in self._table.leaves.keys() - stacked.keys():
            self._add(path, None, 0)
        for layer in range(model.config.num_layers):
            for path in stacked:
                layers = self._table.layers_of(path, model.config.num_layers)
                if layer in layers:
                    self._add(path, layers.index(layer), layer)
        self._refuse_gaps()

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(self._params[self._parts[name][0].path].dtype)

    def read(self, name: str) -> np.ndarray:
        """One tensor, contiguous, on the host."""
        first, *others = parts = self._parts[name]
        if not others and first.source.cut is None:
            return np.asarray(self._read(first).reshape(self.shapes[name]), order="C")
        whole = np.empty(self.shapes[name], self.dtype(name))
        for part in parts:
            cut = part.source.cut
            assert cut is not None
            where = whole[(slice(None),) * cut.axis + (slice(cut.start, cut.stop),)]
            where[...] = self._read(part).reshape(where.shape)
        return whole

    def _add(self, path: str, place: int | None, layer: int) -> None:
        """Notes the tensors that a parameter lies in, in one layer."""
        leaf, start = self._table.leaves[path], 0
        shape = self._shape_of(path, place)
        experts = range(shape[0]) if leaf.has_experts else [None]
        shape = shape[1:] if leaf.has_experts else shape
        for source in leaf.sources:
            joined = _joined_size(path, leaf, source, shape)
            for expert in experts:
                name = source.name.replace("{layer}", str(layer)).replace("{expert}", str(expert))
                self._parts.setdefault(name, []).append(_Part(path, source, start, place, expert))
                own = [joined if axis == leaf.concat_axis else size for axis, size in enumerate(shape)]
                self.shapes[name] = _whole_shape(source, tuple(own) if len(leaf.sources) > 1 else shape)
            start += joined

    def _shape_of(self, path: str, place: int | None) -> tuple[int, ...]:
        """Of a parameter in one layer, undivided; experts are in front."""
        shape = self._shapes[path]
        return shape if place is None else shape[1:]

    def _refuse_gaps(self) -> None:
        """Of a tensor that is cut, every part must be some parameter's."""
        for name, parts in self._parts.items():
            if len(parts) == 1 and parts[0].source.cut is None:
                continue
            cuts = sorted((p.source.cut.start, p.source.cut.stop) for p in parts if p.source.cut is not None)
            borders = [0, *(stop for _, stop in cuts)]
            axes = {part.source.cut.axis for part in parts if part.source.cut is not None}
            size = self.shapes[name][next(iter(axes), 0)]
            if len(axes) != 1 or [start for start, _ in cuts] != borders[:-1] or borders[-1] != size:
                raise NotImplementedError(
                    f"{name}: the weight table cuts it into {cuts} of {size}, wanted parts that are all of it"
                )

    def _read(self, part: _Part) -> np.ndarray:
        """A part as it was before it was joined and turned."""
        leaf, array = self._table.leaves[part.path], self._read_layer(part.path, part.layer)
        if part.expert is not None:
            array = array[part.expert]
        if len(leaf.sources) > 1:
            stop = part.start + _joined_size(part.path, leaf, part.source, array.shape)
            array = array[(slice(None),) * leaf.concat_axis + (slice(part.start, stop),)]
        if num := part.source.num_paired:
            pairs = np.stack([array[..., : num // 2], array[..., num // 2 : num]], axis=-1)
            array = np.concatenate([pairs.reshape(*array.shape[:-1], num), array[..., num:]], axis=-1)
        if part.source.transpose is not None:
            array = array.transpose(np.argsort(part.source.transpose))
        return array

    def _read_layer(self, path: str, place: int | None) -> np.ndarray:
        """A parameter of one layer, or of none, on the host, as one device would have it."""
        if self._last is not None and self._last[0] == (path, place):
            return self._last[1]
        self._last = None  # before there is another
        array = self._params[path]
        if place is not None:
            array = _one_layer(array, np.int32(place)) if isinstance(array, jax.Array) else array[place]
        own = np.asarray(array)
        if own.shape != self._shape_of(path, place):
            own = narrow(path.rpartition("/")[2], own, self._model.config, self._model.num_devices)
        self._last = (path, place), own
        return own


@jax.jit
def _one_layer(stack: Array, place: Int[Array, ""] | np.int32) -> Array:
    return jax.lax.dynamic_index_in_dim(stack, place, axis=0, keepdims=False)


def _joined_size(path: str, leaf: Leaf, source: Source, shape: tuple[int, ...]) -> int:
    """How much of the axis on which a leaf's sources are joined comes from this one; 0 for a scalar."""
    if len(leaf.sources) == 1:
        return shape[leaf.concat_axis] if shape else 0
    axis = leaf.concat_axis if source.transpose is None else source.transpose[leaf.concat_axis]
    if source.reshape is None and source.cut is not None and source.cut.axis == axis:
        return source.cut.stop - source.cut.start
    view = source.reshape or source.shape
    if view is None:
        raise NotImplementedError(f"{path}: the weight table joins {source.name}, and has no `shape` of it")
    return view[axis]


def _whole_shape(source: Source, turned: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a source's whole tensor, of which `turned` is the part once it is turned."""
    if source.shape is not None:
        return source.shape
    if source.reshape is not None:
        raise NotImplementedError(
            f"the weight table reshapes {source.name} and does not say what its shape is: "
            f"give Source(shape=...), or plain(shape=...), beside reshape={source.reshape}"
        )
    order = range(len(turned)) if source.transpose is None else np.argsort(source.transpose)
    shape = [turned[axis] for axis in order]
    if source.cut is not None:
        shape[source.cut.axis] = source.cut.size
    return tuple(shape)
