"""Sums over the GPUs of one process, through each other's memory: a kernel in place of a collective.

Each GPU stores what it has into the inboxes of the others, waits for theirs, and adds all up in float32, in
the order of the GPUs: the same bits on each. Nothing else is waited for and no library is called, so that the
sums of a decode step, two a layer and a few KB each, take little more than the way from GPU to GPU.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array, Float, UInt32

from pjengine.pallas_kernels.dispatch import check_hopper, dispatch
from pjengine.pallas_kernels.peer_sum_ptx import LANES, MAX_THREADS, VALUES, Inbox, Sum
from pjengine.pallas_kernels.skinny_linear import Normed, Residual, start_norm

_DTYPES = {"bfloat16": "bf16", "float16": "f16"}
_WARPGROUP = 128  # threads: a block has whole ones


def inbox_bytes(num_gpus: int) -> int:
    """The size of the memory that each of so many GPUs lends the others. It starts as zeros."""
    return Inbox(num_gpus).num_bytes


def peer_sum(
    x: Float[Array, "..."],
    inboxes: UInt32[Array, "words 2"] | None,
    *,
    axis: str,
    backend: str | None = None,
) -> Float[Array, "..."]:
    """The sum of what the devices of a mesh's axis have, on each of them: `lax.psum`, within a `shard_map`.

    Args:
      inboxes: this GPU's table, addresses with their low half first: of each GPU's inbox, in the order of the
        axis, and of its own; then its place in that order, and 0. All GPUs write into all inboxes, which
        nobody else touches, and which stay where they are while programs run that were given them. None:
        there are none, and a collective sums.
      backend: None to let `dispatch` choose.

    Two sums of a program must be one after the other: the second has to depend on the first. All GPUs run the
    same sums in the same order. Where one leaves a sum out, the others wait a minute for it and fail; their
    process then has no use of them any more.

    Raises:
      ValueError: no such backend.
      NotImplementedError: `backend` is named and cannot do this; see `check_peer_sum_can`.
    """
    return dispatch(
        "peer_sum",
        {
            "mosaic": functools.partial(peer_sum_mosaic, x, inboxes),
            "reference": functools.partial(lax.psum, x, axis),
        },
        backend,
    )


def peer_sum_residual(
    x: Float[Array, "m n"],
    inboxes: UInt32[Array, "words 2"] | None,
    residual: Residual,
    *,
    axis: str,
    backend: str | None = None,
) -> tuple[Float[Array, "m n"], Normed]:
    """Adds the sum over the devices to the residual rows, and starts the norm of these: one kernel for three.

    Returns the new rows, and what the next product takes. The rest as in `peer_sum`.

    Raises:
      ValueError: no such backend.
      NotImplementedError: `backend` is named and cannot do this; see `check_peer_sum_can`.
    """
    return dispatch(
        "peer_sum_residual",
        {
            "mosaic": functools.partial(_residual_mosaic, x, inboxes, residual),
            "reference": functools.partial(reference, x, inboxes, residual, axis=axis),
        },
        backend,
    )


def peer_sum_norm(
    x: Float[Array, "m n"],
    inboxes: UInt32[Array, "words 2"] | None,
    residual: Residual,
    *,
    eps: float,
    axis: str,
    backend: str | None = None,
) -> tuple[Float[Array, "m n"], Float[Array, "m n"]]:
    """Adds the sum over the devices to the residual rows, and takes RMSNorm of these: one kernel for two.

    Returns the new rows, and their norm, of which only the result is rounded. The rest as in `peer_sum`.

    Raises:
      ValueError: no such backend.
      NotImplementedError: `backend` is named and cannot do this; see `check_peer_sum_can`.
    Source: RMSNorm, Zhang & Sennrich 2019.
    """
    return dispatch(
        "peer_sum_norm",
        {
            "mosaic": functools.partial(_norm_mosaic, x, inboxes, residual, eps=eps),
            "reference": functools.partial(norm_reference, x, inboxes, residual, eps=eps, axis=axis),
        },
        backend,
    )


def norm_reference(
    x: Float[Array, "m n"],
    inboxes: UInt32[Array, "words 2"] | None,
    residual: Residual,
    *,
    eps: float,
    axis: str,
) -> tuple[Float[Array, "m n"], Float[Array, "m n"]]:
    """The spec of `peer_sum_norm`."""
    rows = residual.rows + peer_sum(x, inboxes, axis=axis)
    wide = rows.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return rows, (wide * residual.norm_weights[residual.norm].astype(jnp.float32)[None]).astype(x.dtype)


def reference(
    x: Float[Array, "m n"], inboxes: UInt32[Array, "words 2"] | None, residual: Residual, *, axis: str
) -> tuple[Float[Array, "m n"], Normed]:
    """The spec of `peer_sum_residual`; that of `peer_sum` is `lax.psum`, summed in float32."""
    rows = residual.rows + peer_sum(x, inboxes, axis=axis)
    return rows, start_norm(rows, residual.norm_weights[residual.norm])


def check_peer_sum_can(
    x: Array, inboxes: Array | None, residual: Residual | None = None, eps: float | None = None
) -> Sum:
    """Refuses what the kernel does not do. `eps` is that of a norm that is finished.

    Raises:
      NotImplementedError: no inboxes; dtypes other than bfloat16 and float16; no values, or no multiple of 8;
        more than 16 MiB on two GPUs, or 12 MiB for the others together on more. With a residual: other
        dtypes than bfloat16 (rows that are not yet divided by their root mean square may leave float16's
        range). With a norm that is started, rows of no multiple of 256, and more of them than fit into
        packets; with one that is finished, rows of no multiple of 1024, or of more than 8192.
    """
    if inboxes is None:
        raise NotImplementedError("no inboxes: the GPUs do not see each other's memory")
    num_gpus, dtype = len(inboxes) - 2, _DTYPES.get(x.dtype.name)
    if dtype is None:
        raise NotImplementedError(f"{x.dtype}: wanted bfloat16 or float16")
    if x.size % VALUES or not x.size:
        raise NotImplementedError(f"{x.size} values: wanted a multiple of {VALUES}")
    if x.size * x.dtype.itemsize > (limit := Inbox(num_gpus).row_bytes):
        raise NotImplementedError(f"{x.size} values of {num_gpus} GPUs: at most {limit} bytes")
    row_size = 0 if residual is None else x.shape[-1]
    sum_ = Sum(num_gpus=num_gpus, num_values=x.size, dtype=dtype, row_size=row_size, eps=eps)
    if residual is not None:
        dtypes = {x.dtype, residual.rows.dtype, residual.norm_weights.dtype}
        if dtypes != {jnp.dtype(jnp.bfloat16)}:
            raise NotImplementedError(f"dtypes {', '.join(map(str, dtypes))} with a norm: wanted bfloat16")
        if eps is not None and (row_size % (VALUES * _WARPGROUP) or row_size > VALUES * MAX_THREADS):
            limits = VALUES * _WARPGROUP, VALUES * MAX_THREADS
            raise NotImplementedError(
                f"rows of {row_size} with a norm: wanted a multiple of {limits[0]}, at most {limits[1]}"
            )
        if eps is None and (row_size % (VALUES * LANES) or not sum_.in_packets):
            raise NotImplementedError(f"{x.shape} with a norm: rows of {VALUES * LANES}, and fewer of them")
    return sum_


@jax.jit
def peer_sum_mosaic(x: Float[Array, "..."], inboxes: UInt32[Array, "words 2"] | None) -> Float[Array, "..."]:
    """`peer_sum` as a kernel. The jit is there so that the layers of a model share one trace.

    Raises:
      NotImplementedError: the device is no Hopper GPU, or see `check_peer_sum_can`.
    """
    check_hopper()
    sum_ = check_peer_sum_can(x, inboxes)
    return _run(sum_, "peer_sum", jax.ShapeDtypeStruct(x.shape, x.dtype), x, inboxes)


# Of what comes with a residual: results stand behind what they are made from.
_ORDER = (0, 1, 5, 2, 3, 4, 6)


def _residual_mosaic(x: Array, inboxes: Array | None, residual: Residual) -> tuple[Array, Normed]:
    norm = jnp.asarray(residual.norm, jnp.int32)
    return peer_sum_residual_mosaic(x, inboxes, residual._replace(norm=norm))


@jax.jit
def peer_sum_residual_mosaic(
    x: Float[Array, "m n"], inboxes: UInt32[Array, "words 2"] | None, residual: Residual
) -> tuple[Float[Array, "m n"], Normed]:
    """`peer_sum_residual` as a kernel.

    Raises:
      NotImplementedError: the device is no Hopper GPU, or see `check_peer_sum_can`.
    """
    check_hopper()
    sum_ = check_peer_sum_can(x, inboxes, residual)
    rows = jax.ShapeDtypeStruct(x.shape, x.dtype)
    squares = jax.ShapeDtypeStruct((x.shape[1] // (VALUES * LANES), len(x)), jnp.float32)
    norm = jnp.asarray(residual.norm, jnp.int32)[None]
    operands = x, inboxes, residual.rows, residual.norm_weights, norm
    out, *normed = _run(sum_, "peer_sum_residual", (rows, rows, squares), *operands, order=(*_ORDER, 7))
    return out, Normed(*normed)


def _norm_mosaic(x: Array, inboxes: Array | None, residual: Residual, *, eps: float) -> tuple[Array, Array]:
    norm = jnp.asarray(residual.norm, jnp.int32)
    return peer_sum_norm_mosaic(x, inboxes, residual._replace(norm=norm), eps=eps)


@functools.partial(jax.jit, static_argnames="eps")
def peer_sum_norm_mosaic(
    x: Float[Array, "m n"], inboxes: UInt32[Array, "words 2"] | None, residual: Residual, *, eps: float
) -> tuple[Float[Array, "m n"], Float[Array, "m n"]]:
    """`peer_sum_norm` as a kernel.

    Raises:
      NotImplementedError: the device is no Hopper GPU, or see `check_peer_sum_can`.
    """
    check_hopper()
    sum_ = check_peer_sum_can(x, inboxes, residual, eps)
    rows = jax.ShapeDtypeStruct(x.shape, x.dtype)
    norm = jnp.asarray(residual.norm, jnp.int32)[None]
    operands = x, inboxes, residual.rows, residual.norm_weights, norm
    out, normed = _run(sum_, "peer_sum_norm", (rows, rows), *operands, order=_ORDER)
    return out, normed


def _run(sum_: Sum, name: str, out_type: Any, *operands: Any, order: tuple[int, ...] = (0, 1, 2)) -> Any:
    """The program with the addresses of operands and results, which `order` puts into its own order."""

    def body(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))  # type: ignore[untyped-decorator]
        def run(_: Any, *memrefs: Any) -> None:
            word = ir.IntegerType.get_signless(64)
            addresses = [llvm.ptrtoint(word, mgpu_utils.memref_ptr(memrefs[i])) for i in order]
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                addresses,
                sum_.ptx(),
                ",".join(["l"] * len(addresses)) + ",~{memory}",
                has_side_effects=True,
            )

        run(*refs)

    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(sum_.num_blocks,),
        grid_names=("block",),
        num_threads=sum_.num_threads // _WARPGROUP,
        thread_name="warpgroup",
        kernel_name=name,
    )(*operands)
