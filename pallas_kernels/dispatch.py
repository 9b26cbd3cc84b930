"""Which backend runs an op: the Pallas kernel on a GPU, the jnp reference on any platform.

`triton` (Pallas, Triton lowering) is tried first on a GPU, then `reference`; elsewhere only `reference`.
`triton_interpret` runs the same kernel in Pallas's interpreter, for tests; nothing chooses it by itself.
"""

import logging
from collections.abc import Callable, Mapping

import jax

BACKENDS = ("triton", "reference", "triton_interpret")
_TRIED = {"gpu": ("triton", "reference")}  # per platform, best first; any other platform: `reference`

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
    """
    here = platform()
    available = ("triton_interpret", *_TRIED.get(here, ("reference",)))
    if name is not None and name not in available:
        raise ValueError(f"kernel backend {name!r} cannot run on {here}; available: {', '.join(available)}")


def chosen_backends() -> dict[str, str]:
    """Returns the backend that each op was last traced with, such as `{"paged_attention": "triton"}`."""
    return dict(_chosen)


def dispatch[Out](op: str, implementations: Mapping[str, Callable[[], Out]], backend: str | None) -> Out:
    """Runs `op` on `backend`, or on the first backend of this platform that can do it.

    Args:
      op: the name under which the choice is logged and recorded.
      implementations: backend name -> the op with its arguments bound.
      backend: None to choose; a backend that is asked for by name never falls back to another.

    Raises:
      ValueError: `backend` is no name in `implementations`.
      NotImplementedError: the named backend, or every backend of the platform, cannot do these shapes.
    """
    if backend is not None:
        if backend not in implementations:
            raise ValueError(f"backend must be one of {', '.join(implementations)}; got {backend!r}")
        result = implementations[backend]()
        _record(op, backend, "asked for")
        return result
    here = platform()
    refusals: list[NotImplementedError] = []
    for name in _TRIED.get(here, ("reference",)):
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
