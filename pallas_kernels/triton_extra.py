"""What is known of the `jax_triton` backend without its packages, which the extra `triton` installs."""

import importlib
from importlib.metadata import version
from typing import Any

import jax


def import_jax_triton() -> Any:
    """The module of the `jax_triton` kernels, which nothing imports unless they are asked for.

    Raises:
      NotImplementedError: its packages are not installed, or not in the versions it needs.
    """
    try:
        found = version("jax-triton")
        module = importlib.import_module("pjengine.pallas_kernels.jax_triton_attention")
    except ImportError as error:  # PackageNotFoundError is one
        reason = str(error)
    else:
        major, minor = map(int, found.split(".")[:2])
        if (major, minor) < (0, 4):
            reason = f"jax-triton {found} is too old"  # its calls keep a step out of CUDA graphs
        elif found in ("0.4.0", "0.4.1") and jax.__version_info__ >= (0, 12):
            reason = f"jax-triton {found} does not work with JAX {jax.__version__}"
        else:
            return module
    raise NotImplementedError(f"jax_triton: {reason}: pip install 'pjengine[triton]'")


def run_jax_triton(kernel: str, *args: Any, **options: Any) -> Any:
    """Calls one of the `jax_triton` kernels.

    Raises:
      NotImplementedError: see `import_jax_triton`, and the kernel.
    """
    return getattr(import_jax_triton(), kernel)(*args, **options)


def backend_versions(name: str | None) -> tuple[str, ...]:
    """What compiles this backend's kernels, beside JAX itself."""
    return tuple(
        f"{each} {version(each)}" for each in (("jax-triton", "triton") if name == "jax_triton" else ())
    )
