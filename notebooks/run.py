"""Runs notebooks from top to bottom, and keeps what they show: python notebooks/run.py [NAME ...]

Without names, all of this folder; in place, unless --output names a folder. What a run leaves that says
nothing of the notebook (versions, times of cells) is taken out. A notebook that shows what only this machine
has is refused: see `faults`.
"""

import argparse
import base64
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
MAX_BYTES = 400_000  # of one notebook, pictures included
CELL_LIMIT_S = 90
_HERE = re.compile(r"(?<![\w.:/])/(home|root|tmp|var|usr|opt|mnt|private|Users)/|[A-Z]:\\\\")
_ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}")


def execute(path: Path, folder: Path) -> Any:
    """Runs a notebook in `folder` with the Python that runs this; returns it with its outputs.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell fails.
    """
    import matplotlib.font_manager  # noqa: F401 - makes its cache of fonts, which a notebook would report
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(FOLDER.parent), *filter(None, [os.getenv("PYTHONPATH")])])
    os.environ["IPYTHONDIR"] = str(folder / "ipython")
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm's bars are text without ipywidgets
    client = nbclient.NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=CELL_LIMIT_S,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    return notebook


def normalise(notebook: Any) -> None:
    """Takes out what differs from run to run without meaning anything; neighbouring prints become one."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        outputs: list[Any] = []
        for output in cell.get("outputs", ()):
            before = outputs[-1] if outputs else None
            if output.output_type == "stream" and before is not None and before.get("name") == output.name:
                before.text += output.text
                continue
            if "metadata" in output:
                output.metadata = {}
            outputs.append(output)
        if "outputs" in cell:
            cell.outputs = outputs


def faults(notebook: Any) -> list[str]:
    """What must not be in a notebook that is committed, a line each."""
    found: list[str] = []
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in cells]
    if counts != list(range(1, len(cells) + 1)):
        found.append(f"its cells were not run once each, in order: {counts}")
    for number, cell in enumerate(cells, 1):
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"cell [{number}] fails: {output.ename}: {output.evalue}")
            if output.get("name") == "stderr":
                found.append(f"cell [{number}] writes to stderr: {output.text.strip()[:300]!r}")
        for text in texts(cell):
            for wrong, what in ((_HERE, "a path of this machine"), (_ADDRESS, "an address in memory")):
                if hit := wrong.search(text):
                    part = text[max(0, hit.start() - 40) : hit.end() + 40]
                    found.append(f"cell [{number}] shows {what}: {part!r}")
    size = len(as_text(notebook).encode())
    if size > MAX_BYTES:
        found.append(f"{size:,} bytes: wanted at most {MAX_BYTES:,}; fewer or smaller pictures")
    return found


def texts(cell: Any) -> Iterator[str]:
    """What a cell shows, but for pictures."""
    for output in cell.outputs:
        if "text" in output:
            yield output.text
        yield from (
            str(data) for kind, data in output.get("data", {}).items() if not kind.startswith("image/")
        )


def pictures(notebook: Any) -> list[bytes]:
    """The PNG files that a notebook shows, in order."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    data = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return [base64.b64decode(each) for each in data]


def as_text(notebook: Any) -> str:
    import nbformat

    return nbformat.writes(notebook) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as 01_quickstart; none: all")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where to write; by default in place")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="writes each picture there, too")
    arguments = parser.parse_args()
    known = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
    names = [name.removesuffix(".ipynb") for name in arguments.names] or list(known)
    if unknown := sorted(set(names) - known.keys()):
        parser.error(f"no notebook {', '.join(unknown)}; there are {', '.join(known)}")
    for name in names:
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(known[name], Path(folder))
        normalise(notebook)
        if found := faults(notebook):
            sys.exit("\n".join([f"{name}: not written", *found]))
        text = as_text(notebook)
        ((arguments.output or FOLDER) / f"{name}.ipynb").write_text(text)
        for number, picture in enumerate(pictures(notebook), 1):
            if arguments.pictures:
                arguments.pictures.mkdir(parents=True, exist_ok=True)
                (arguments.pictures / f"{name}-{number}.png").write_bytes(picture)
        print(f"{name}: {time.perf_counter() - begin:.0f} s, {len(text.encode()):,} bytes")


if __name__ == "__main__":
    main()
