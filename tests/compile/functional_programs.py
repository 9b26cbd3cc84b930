"""Programs of `pjengine.functional` as a user would write them, of a wide model two layers deep."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Compiled

from pjengine import functional
from pjengine.models.registry import build_model
from pjengine.models.shapes import SHAPES
from tests.compile.target import sharding
from tests.kernels.cases import cuda_target

LENGTH = 40  # nothing else is as large as a weight
MODEL = build_model(dataclasses.replace(SHAPES["llama-8b"], num_layers=2), jnp.dtype("bfloat16"))
type Generate = Callable[[Any, Any], Any]


def generate(params: Any, tokens: Any) -> Any:
    """Prompts to as many tokens, the likeliest."""
    cache = functional.init_cache(MODEL, len(tokens), 2 * LENGTH)

    def step(carry: Any, _: None) -> Any:
        token = jnp.argmax(carry[0], axis=-1)
        return functional.decode_step(MODEL, params, carry[1], token), token

    return lax.scan(step, functional.prefill(MODEL, params, cache, tokens), length=LENGTH)[1].T


def mapped(params: Any, tokens: Any) -> Any:
    return jax.vmap(lambda own: generate(params, own[None])[0])(tokens)


def compile_it(
    function: Generate, num_rows: int, *, num_devices: int = 1, has_options: bool = True
) -> Compiled:
    mesh = sharding(num_devices).mesh
    whole, rows = PartitionSpec(), PartitionSpec(mesh.axis_names[-1])

    def place(leaf: Any, spec: Any = whole) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    params = jax.tree.map(place, jax.eval_shape(MODEL.init, jax.random.key(0)))
    tokens = place(jax.ShapeDtypeStruct((num_rows, LENGTH), jnp.int32), rows)
    if num_devices > 1:
        function = jax.shard_map(function, mesh=mesh, in_specs=(whole, rows), out_specs=rows, check_vma=False)
    with cuda_target():
        options = functional.compiler_options() if has_options else None
        lowered = jax.jit(function).lower(params, tokens)
    return lowered.compile(options)


PROGRAMS: Mapping[str, Callable[[], Compiled]] = {
    "functional 32 mapped": functools.partial(compile_it, mapped, 32),
    "functional 192 mapped": functools.partial(compile_it, mapped, 192),
    "functional 32 without options": functools.partial(compile_it, generate, 32, has_options=False),
    "functional 192 without options": functools.partial(compile_it, generate, 192, has_options=False),
    "functional 64 on two": functools.partial(compile_it, generate, 64, num_devices=2),
}
