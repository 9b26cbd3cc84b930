"""The notebooks run from top to bottom, and show what their text says."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def execute(name: str, folder: Path) -> list[str]:
    """Runs a notebook in `folder`, in a kernel of this very Python; returns what each code cell printed."""
    import nbformat
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    nbformat.validate(notebook)
    manager = AsyncKernelManager()
    manager._kernel_spec = KernelSpec(
        argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        display_name="this Python",
        language="python",
        env={"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    client: Any = NotebookClient(
        notebook, timeout=120, km=manager, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    return [printed(cell) for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: Any) -> str:
    assert not [output for output in cell.outputs if output.output_type == "error"]
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


@pytest.mark.filterwarnings("default::DeprecationWarning", "default::ResourceWarning")  # Jupyter's own
def test_quickstart_runs_and_shows_what_it_promises(tmp_path: Path) -> None:
    text = execute("01_quickstart.ipynb", tmp_path)
    opened, generated, streamed, seeded, stopped, ids, chatted, metrics, refused, params, closed = text
    assert opened == ""
    assert generated.index("def fibonacci(n):") < generated.index("class Stack:")
    assert streamed.startswith("def fibonacci(n):\n") and streamed.splitlines()[-1] in ("[stop]", "[length]")
    first, again, other = seeded.splitlines()
    assert first == again != other
    assert "finish_reason='stop'" in stopped and "stop_reason=" in stopped
    assert ids.startswith("prompt     [")
    assert "# user: Open a file and read its lines." in chatted
    assert "first token after" in metrics and "preempted 0 times" in metrics
    assert refused.splitlines()[0].startswith("the prompt is empty")
    assert "token id 4096 is out of the vocabulary" in refused and "max_model_len=1024" in refused
    assert "parameters" in params and "bfloat16" in params
    assert "closed" in closed
    assert not list(tmp_path.iterdir())


def test_notebooks_are_committed_without_outputs() -> None:
    import nbformat

    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            assert not cell.get("outputs") and cell.get("execution_count") is None, path
