"""Functions of the caller's that become part of a program: tried on shapes alone, before a request waits."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr

# What they raise ends the step with all its requests, and what they print is of all that run beside, too.
_HOST_CALLS = ("pure_callback", "io_callback", "debug_callback", "debug_print")


class Role(NamedTuple):
    """What a function is for, in the words of its errors."""

    changes: str  # what it gets and returns another of
    form: str  # how it must be
    instead: str  # of a call of the host


def why_refused(function: Callable[..., Any], inputs: Sequence[Any], changed: Any, role: Role) -> str:
    """Why a function cannot be part of a program, to stand behind its name; empty: it can.

    Args:
      inputs: shapes and dtypes of its arguments, pytrees of them; `changed` is the one of what it changes.
    """
    wanted = f"{changed.dtype}{list(changed.shape)}, as the {role.changes} that it gets"
    several = jax.tree.map(lambda own: jax.ShapeDtypeStruct((2, *own.shape), own.dtype), tuple(inputs))
    try:
        alone, result = jax.make_jaxpr(function, return_shape=True)(*inputs)
        found = _host_calls(alone.jaxpr)
        if not found:  # batched, it may be another
            found = _host_calls(jax.make_jaxpr(jax.vmap(function))(*several).jaxpr)
    except Exception as error:  # whatever the caller's function raises
        first_line = str(error).strip().partition("\n")[0]
        return f"cannot be traced by JAX: {type(error).__name__}: {first_line:.300}. {role.form}"
    if found:
        return (
            f"must not call the host, got {', '.join(sorted(found))}: an error there would end all requests "
            f"of the step. {role.instead}"
        )
    if not isinstance(result, jax.ShapeDtypeStruct):
        return f"must return {wanted}, got {result!r:.80}"
    if (result.shape, result.dtype) != (changed.shape, changed.dtype):
        return f"must return {wanted}, got {result.dtype}{list(result.shape)}"
    return ""


def _host_calls(program: Jaxpr) -> set[str]:
    """The kinds of calls of the host in it, within branches, loops and inner functions, too."""
    found: set[str] = set()
    for equation in program.eqns:
        if equation.primitive.name in _HOST_CALLS:
            found.add(equation.primitive.name)
        for value in equation.params.values():
            for inner in _programs_in(value):
                found |= _host_calls(inner)
    return found


def _programs_in(value: Any) -> Iterator[Jaxpr]:
    inner = getattr(value, "jaxpr", value)  # of a closed one
    if isinstance(inner, Jaxpr):
        yield inner
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _programs_in(item)
