"""The notebooks run from top to bottom, and show what their text says."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


# In a process of its own: Jupyter leaves sockets to the garbage collector, and here warnings are errors.
# The kernel "python3" is the Python that runs this.
RUN = """
import sys, nbformat, nbclient
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, kernel_name="python3", timeout=120).execute()
nbformat.write(notebook, sys.stdout)
"""


def execute(name: str, folder: Path) -> list[str]:
    """Runs a notebook in `folder`; returns what each code cell printed."""
    import nbformat

    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "IPYTHONDIR": str(folder / "ipython")}
    command = [sys.executable, "-c", RUN, str(ROOT / "notebooks" / name)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    notebook = nbformat.reads(done.stdout, as_version=4)
    return [printed(cell) for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: Any) -> str:
    assert not [output for output in cell.outputs if output.output_type == "error"]
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


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


def test_an_architecture_from_outside_is_served(tmp_path: Path) -> None:
    *_, generated, compared, refused = execute("07_your_own_architecture.ipynb", tmp_path)
    assert [len(line.split(", ")) for line in generated.splitlines()] == [16, 16]
    assert compared.splitlines() == ["True", "True"]
    assert "window=64" in refused and "TwinForCausalLM" in refused


def test_notebooks_are_committed_without_outputs() -> None:
    import nbformat

    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            assert not cell.get("outputs") and cell.get("execution_count") is None, path
