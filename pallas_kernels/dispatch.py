"""Which backend runs an op: a Pallas kernel on a GPU, the jnp reference on any platform.

On a GPU `mosaic` (Pallas, Mosaic GPU lowering: Hopper only) is tried first where an op has it, then `triton`
(Pallas, Triton lowering), then `reference`; elsewhere only `reference`. The others run only where they are
asked for: `jax_triton`, the attention kernels in Triton's own language (extra `triton`), on a GPU; and, for
tests, `triton_interpret` and `mosaic_interpret`, Pallas's interpreters.
"""

import logging
import re
from collections.abc import Callable, Mapping

import jax

from pjengine.pallas_kernels.triton_extra import import_jax_triton

# Those that an engine can be told to use. `mosaic` is one op's own.
BACKENDS = ("triton", "jax_triton", "reference", "triton_interpret")
_TRIED = {"gpu": ("mosaic", "triton", "reference")}  # best first; any other platform: `reference`

_HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")  # names of devices of compute capability 9.0

_logger = logging.getLogger(__name__)
_chosen: dict[str, str] = {}
_logged: set[tuple[str, str]] = set()


def platform() -> str:
    """Returns the platform that code traced now will run on.

    A mesh that names its device decides, so that a program can be lowered for CUDA on a machine without
    a GPU: the `use_abstract_mesh(...)` that Pallas's Triton lowering asks for there is enough.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None or device.platform is None else device.platform


def check_backend(name: str | None) -> None:
    """Refuses a backend that this platform does not have; None stands for the best one.

    Raises:
      ValueError: the name is unknown, or of another platform.
      NotImplementedError: its packages are not installed, or not in the versions it needs.
    """
    here = platform()
    available = [each for each in BACKENDS if here == "gpu" or each not in ("triton", "jax_triton")]
    if name is not None and name not in available:
        raise ValueError(f"kernel backend {name!r} cannot run on {here}; available: {', '.join(available)}")
    if name == "jax_triton":
        import_jax_triton()


def check_hopper() -> None:
    """Refuses GPUs other than Hopper; as in `platform`, a mesh that names its device decides.

    Raises:
      NotImplementedError: the GPU's compute capability is not 9.0, or its CUDA miscompiles causal masks (as
        JAX's own attention kernel for Hopper says of 12.8.0 to 12.9.0).
    """
    named = jax.sharding.get_abstract_mesh().abstract_device
    if named is not None and named.platform is not None:
        kind, is_hopper = named.device_kind, _HOPPER.search(named.device_kind) is not None
    else:
        device = jax.devices()[0]
        kind, is_hopper = device.device_kind, getattr(device, "compute_capability", None) == "9.0"
        cuda = re.search(r"cuda (\d+)", device.client.platform_version)
        if cuda is not None and 12080 <= int(cuda[1]) < 12091:
            raise NotImplementedError(f"mosaic: CUDA {cuda[1]} miscompiles masks: wanted 13, or below 12080")
    if not is_hopper:
        raise NotImplementedError(f"mosaic: device {kind}: wanted a Hopper GPU (compute capability 9.0)")


def chosen_backends() -> dict[str, str]:
    """Returns the backend that each op was last traced with, such as `{"paged_attention": "triton"}`."""
    return dict(_chosen)


def recall_backends(chosen: Mapping[str, str]) -> None:
    """Takes what `chosen_backends` returned when a program was made, which now is loaded and not traced."""
    _chosen.update(chosen)


def dispatch[Out](op: str, implementations: Mapping[str, Callable[[], Out]], backend: str | None) -> Out:
    """Runs `op` on `backend`, or on the first backend of this platform that can do it.

    Args:
      op: the name under which the choice is logged and recorded.
      implementations: backend name -> the op with its arguments bound.
      backend: None to choose; a backend that is asked for by name never falls back to another. One exception:
        `jax_triton` has attention only, and any other op runs as if nothing was asked for.

    Raises:
      ValueError: `backend` is no name in `implementations`.
      NotImplementedError: the named backend, or every backend of the platform, cannot do these shapes.
    """
    if backend == "jax_triton" and backend not in implementations:
        backend = None
    if backend is not None:
        if backend not in implementations:
            raise ValueError(f"backend must be one of {', '.join(implementations)}; got {backend!r}")
        result = implementations[backend]()
        _record(op, backend, "asked for")
        return result
    here = platform()
    refusals: list[NotImplementedError] = []
    for name in _TRIED.get(here, ("reference",)):
        if name not in implementations:
            continue
        try:
            result = implementations[name]()
        except NotImplementedError as error:
            refusals.append(error)
            continue
        _record(op, name, "; ".join([f"platform {here}", *map(str, refusals)]))
        return result
    raise NotImplementedError(f"no backend of platform {here} can run {op}: {'; '.join(map(str, refusals))}")


def _record(op: str, backend: str, reason: str) -> None:
    _chosen[op] = backend
    if (op, reason) not in _logged:
        _logged.add((op, reason))
        _logger.info("op=%s backend=%s reason=%r", op, backend, reason)
