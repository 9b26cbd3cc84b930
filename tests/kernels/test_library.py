"""The kernels as a library: loaded alone, and as `pallas_kernels/README.md` says."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "pallas_kernels" / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", DOCUMENT, re.M | re.S)
ALONE = """
import sys
import pjengine.pallas_kernels as kernels
assert {name for name in kernels.__all__ if hasattr(kernels, name)} == set(kernels.__all__)
print(*sorted(sys.modules))
"""


def test_kernels_load_without_engine_models_and_server() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "jax" in loaded
    own = {name for name in loaded if name.startswith("pjengine.")}
    assert {name for name in own if not name.startswith("pjengine.pallas_kernels")} == set()
    assert not {"flax", "transformers", "tokenizers", "fastapi", "pydantic", "uvicorn"} & set(loaded)


def test_a_public_name_is_the_function_though_a_module_has_it_too() -> None:
    import pjengine.pallas_kernels as kernels
    from pjengine.pallas_kernels.paged_attention import paged_attention, reference

    assert kernels.paged_attention is paged_attention and callable(reference)
    assert [name for name in kernels.__all__ if inspect.ismodule(getattr(kernels, name))] == []


def test_every_public_name_is_documented_with_its_arguments() -> None:
    import pjengine.pallas_kernels as kernels

    for name in kernels.__all__:
        own = getattr(kernels, name)
        assert f"`{name}" in DOCUMENT, name
        assert own.__doc__, name
        if inspect.isfunction(own) and "backend" in inspect.signature(own).parameters:
            assert f"### {name}\n\n`{written(own)}`\n" in DOCUMENT, written(own)


def written(function: object) -> str:
    """A signature without types and defaults."""
    assert inspect.isfunction(function)
    names: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in names:
            names.append("*")
        names.append(parameter.name)
    return f"{function.__name__}({', '.join(names)})"


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_of_the_document_prints_what_it_says(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    example = EXAMPLES[number]
    said = re.findall(r"^print\(.*\)  # (.*)$", example, re.M)
    exec(compile(example, f"example {number}", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.splitlines() == said and said


def test_what_the_document_says_cannot_run_is_refused() -> None:
    import jax.numpy as jnp

    from pjengine.pallas_kernels import gated_linear, keep_threshold, skinny_linear

    x, weights = jnp.zeros((33, 64), jnp.bfloat16), jnp.zeros((1, 64, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="33 rows: at most 32"):
        skinny_linear(x, weights, 0, backend="triton_interpret")
    with pytest.raises(NotImplementedError, match="16 x 128 results: wanted 32 rows"):
        gated_linear(
            jnp.zeros((16, 64), jnp.bfloat16),
            jnp.zeros((1, 64, 2, 128), jnp.bfloat16),
            0,
            backend="mosaic_interpret",
        )
    ones = jnp.ones(1)
    with pytest.raises(ValueError, match="backend must be one of triton, reference, triton_interpret"):
        keep_threshold(jnp.zeros((1, 8)), ones, jnp.array([3]), ones, ones, backend="mosaic")
