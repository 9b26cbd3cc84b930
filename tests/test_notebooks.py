"""The notebooks run from top to bottom, and show what their text says; committed is what they showed."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from notebooks.run import FOLDER, MAX_BYTES, faults, pictures

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LIMIT_S = 240  # less than 90 on two cores that have nothing else to do; CI has slower days
WITHOUT_PICTURES = ("07_your_own_architecture",)


def read(path: Path) -> Any:
    import nbformat

    return nbformat.read(path, as_version=4)


def execute(name: str, folder: Path) -> list[str]:
    """Runs a notebook, which takes less than LIMIT_S seconds; returns what each code cell printed."""
    # In a process of its own: Jupyter leaves sockets to the garbage collector, and here warnings are errors.
    command = [sys.executable, str(FOLDER / "run.py"), name, "--output", str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr[-4000:]
    return [printed(cell) for cell in read(folder / name).cells if cell.cell_type == "code"]


def printed(cell: Any) -> str:
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def test_quickstart_runs_and_shows_what_it_promises(tmp_path: Path) -> None:
    text = execute("01_quickstart.ipynb", tmp_path)
    opened, generated, streamed, seeded, stopped, ids, sure, chatted, metrics, refused, params, closed = text
    assert opened == ""
    assert generated.index("def fibonacci(n):") < generated.index("class Stack:")
    assert streamed.startswith("def fibonacci(n):\n") and streamed.splitlines()[-1] in ("[stop]", "[length]")
    first, again, other = seeded.splitlines()
    assert first == again != other
    assert "finish_reason='stop'" in stopped and "stop_reason=" in stopped
    assert ids.startswith("prompt     [")
    assert sure.startswith("least sure: ") and sure.endswith("%\n")
    assert "# user: Open a file and read its lines." in chatted
    assert "first token after" in metrics and "preempted 0 times" in metrics
    assert refused.splitlines()[0].startswith("the prompt is empty")
    assert "token id 4096 is out of the vocabulary" in refused and "max_model_len=1024" in refused
    assert "parameters" in params and "bfloat16" in params
    assert "closed" in closed


@pytest.mark.slow
def test_a_model_learns_to_comment_in_the_process_that_serves_it(tmp_path: Path) -> None:
    shown = [text for text in execute("03_rl_in_one_process.ipynb", tmp_path) if text]
    loaded, rewards, before, agreement, learned, kept, after = shown
    assert "million parameters in float32, of a Llama" in loaded
    assert rewards.split() == ["0.00", "0.50", "1.00"]
    assert float(agreement.split()[-2]) < 2e-5
    means = [float(line.split()[2]) for line in learned.splitlines()]
    assert len(means) == 8 and means[0] < 0.3 and means[-1] > 0.8
    programs, growth, is_same, _ = kept.splitlines()
    assert len(set(programs.split(": ")[1].strip("[]").split(", "))) == 1
    assert growth.endswith(": 0 bytes") and is_same.endswith(": True")
    assert before.count("reward 1.00") < 4 < after.count("reward 1.00")


def test_a_kernel_is_written_and_its_test_finds_a_missing_mask(tmp_path: Path) -> None:
    text = [shown for shown in execute("04_write_a_kernel.ipynb", tmp_path) if shown]
    normed, table, spec, kernel, poisoned, op, library, lowered, limits = text
    assert error_of(normed) < 1e-6
    assert table.splitlines()[1] == " [ 0  0  0  0  0]"
    assert spec == "True True\n"
    assert kernel.startswith("finite: True") and error_of(kernel) < 1e-5
    on_clean, on_poison = poisoned.splitlines()
    assert error_of(on_clean) < 1e-5 and on_poison.endswith("NaN [0, 2, 3]")
    assert op.splitlines() == ["triton_interpret True", "head_dim 24: wanted a power of 2"]
    assert error_of(library) < 1e-5
    assert "xla.gpu.triton" in lowered and "shape (48,)" in lowered
    assert limits.splitlines()[0].endswith("9% of the copy rate") and len(limits.splitlines()) == 6


def error_of(text: str) -> float:
    """The last number of a line."""
    return float(text.split()[-1])


@pytest.mark.slow
def test_a_step_is_taken_apart_and_a_crowd_is_watched(tmp_path: Path) -> None:
    text = [shown for shown in execute("02_inside_one_step.ipynb", tmp_path) if shown]
    sizes, scheduled, packed, ahead, chart, pool, slowest = text
    assert "31 pages of 16 tokens" in sizes
    assert "request b: row 1, tokens 32.." in scheduled and "is_sampled=False" in scheduled
    assert packed.startswith("program: mixed, 64 tokens")
    assert "decodes: a, b\nchunk:   c 25..47" in ahead and "tokens:  [  -1   -1 " in ahead
    assert (
        ".cP" in chart
        and "xc" in chart
        and chart.endswith("3 of 10 requests were preempted, 3 times in all\n")
    )
    assert pool == "pages held at most: 31 of 31; shared at most: 3\n"
    assert len(slowest.splitlines()) == 6


@pytest.mark.slow
def test_a_server_is_started_measured_and_ended(tmp_path: Path) -> None:
    text = [shown for shown in execute("06_serve_and_load_test.ipynb", tmp_path) if shown]
    url, answer, streamed, refused, loads, poisson, counters, histogram, ended = text
    assert url == "listening on http://127.0.0.1:<a free port>\n"
    assert answer.endswith("9 prompt tokens, 24 new ones\n")
    assert streamed and "there is no field 'temprature'" in refused
    assert [line.split(",")[0] for line in loads.splitlines()] == [
        f"{n} at once: 12 answered" for n in (1, 2, 4, 8)
    ]
    ttft_ms = [float(line.split("TTFT")[1].split()[0]) for line in loads.splitlines()]
    assert ttft_ms[3] > ttft_ms[0]  # two rows: most of eight wait
    assert poisson.startswith("16 of 16 answered")
    assert "num_preemptions_total    0" in counters
    assert histogram == "74 requests\n" and ended == "the server ended with 0\n"


@pytest.mark.slow
def test_heads_have_habits_and_a_direction_steers_its_own_requests(tmp_path: Path) -> None:
    text = [shown for shown in execute("05_steer_and_look_inside.ipynb", tmp_path) if shown]
    _, habits, settled, length, swept, written, failed = text
    shares = [int(line.split("with ")[1].split("%")[0]) for line in habits.splitlines()[:3]]
    assert shares[0] > 80 and min(shares) > 30
    assert "rows sum to 1.0 ... 1.0" in habits and "the answer stands from layer" in settled
    assert length.startswith("length ")
    same, chances = swept.splitlines()
    assert same.endswith("True")
    plain, steered = (part.split("[")[1].split("]")[0].split() for part in chances.split(" at strength 2"))
    assert max(map(float, plain)) < 0.05 and min(map(float, steered)) > 0.2
    by_strength = [[line for line in written.splitlines() if line[0] == strength] for strength in "03"]
    assert not any("for " in line for line in by_strength[0]) and all(
        "'for " in line for line in by_strength[1]
    )
    refused, ended, beside = failed.splitlines()
    assert "must return float32[256], as the state that it gets, got float32[3]" in refused
    assert ended.startswith("error - ") and "activation_edits (steer at layer 5)" in ended
    assert beside == "length - True"


def test_an_architecture_from_outside_is_served(tmp_path: Path) -> None:
    *_, generated, compared, refused = execute("07_your_own_architecture.ipynb", tmp_path)
    assert [len(line.split(", ")) for line in generated.splitlines()] == [16, 16]
    assert compared.splitlines() == ["True", "True"]
    assert "window=64" in refused and "TwinForCausalLM" in refused


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_the_outputs_of_one_run(path: Path) -> None:
    notebook = read(path)
    assert faults(notebook) == []
    assert path.stat().st_size <= MAX_BYTES
    assert pictures(notebook) or path.stem in WITHOUT_PICTURES
    assert all(picture.startswith(b"\x89PNG") for picture in pictures(notebook))


def test_every_notebook_is_run_by_a_test_here() -> None:
    tests = Path(__file__).read_text()
    assert [path.name for path in NOTEBOOKS if f'execute("{path.name}"' not in tests] == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"text": "opened /home/someone/model"}, "shows a path of this machine: 'opened /home/"),
        ({"text": "<Pool at 0x7f0123456789>"}, "shows an address in memory: '<Pool at 0x7f0123456789"),
        ({"name": "stderr", "text": "a warning"}, "writes to stderr: 'a warning'"),
        ({"text": "x" * MAX_BYTES}, "wanted at most 400,000; fewer or smaller pictures"),
        ({"output_type": "error", "ename": "ValueError", "evalue": "no"}, "fails: ValueError: no"),
    ],
)
def test_what_should_not_be_committed_is_found(change: dict[str, str], fault: str) -> None:
    notebook = read(FOLDER / "01_quickstart.ipynb")
    [cell, *_] = [cell for cell in notebook.cells if cell.cell_type == "code" and printed(cell)]
    cell.outputs[0].update(change)
    [found] = faults(notebook)
    assert fault in found
    cell.execution_count += 1
    assert "were not run once each, in order" in faults(notebook)[0]
