"""README and the pages of docs/: their examples run and print what they show, their links lead somewhere."""

import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.process import start_server

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
LINKING = (*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "pallas_kernels" / "README.md")
PACKAGES = ("pjengine", "models", "sharding", "serving", "pallas_kernels")
OF_THE_TESTS = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")  # conftest.py sets them
SERVER = "http://localhost:8000"  # what examples of clients have as their base URL
LIMIT_S = 280
SLOW = ("determinism", "inside", "pipelines", "speculation", "weights_and_training")
MARK = "<end of a block>"
# A block of Python, and what stands directly behind it: indented lines, or a fenced block without a language.
EXAMPLE = re.compile(r"^```python\n.*?^```\n(?:\n((?:    [^\n]*\n)+)|\n```\n(.*?)^```\n)?", re.M | re.S)
# What the packaged model computes on the CPU and with the JAX that the pages were written with: others may
# round otherwise, and tokens differ where two are almost as likely.
LOGITS = "75fa025b1d3f50f8"
HASH_LOGITS = """
import hashlib
import jax, jax.numpy as jnp, numpy as np
from pjengine import functional
model, params = functional.load("demo")
tokens = jnp.arange(128).reshape(2, 64) * 61 % 4096
logits = jax.jit(model.forward)(params, tokens)
print(hashlib.sha256(np.asarray(logits, np.float32).tobytes()).hexdigest()[:16])
"""
NUMBER = re.compile(r"-?\d+\.\d+")


def with_examples() -> list[object]:
    """The pages that have Python, as pytest's parameters."""
    found = [page for page in PAGES if "```python" in page.read_text()]
    assert len(found) > 5
    return [
        pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if page.stem in SLOW else [])
        for page in found
    ]


def program(text: str) -> str:
    """The Python of a page, each line where the page has it, for tracebacks; a mark behind each block."""
    lines = []
    is_code = False
    for line in text.splitlines():
        if line == "```python":
            is_code = True
        elif line == "```" and is_code:
            is_code = False
            lines.append(f"print({MARK!r}, end='', flush=True)")
            continue
        lines.append(line if is_code and line != "```python" else "")
    return "\n".join(lines)


def shown(text: str) -> list[str | None]:
    """What a page says that each block prints; None where it says nothing."""
    outputs = []
    for indented, fenced in EXAMPLE.findall(text):
        outputs.append(re.sub("^    ", "", indented, flags=re.M) or fenced or None)
    return outputs


def is_close(said: str, printed: str) -> bool:
    """Whether they are equal, but for what rounding in one batch or another does to numbers."""
    said, printed = said.rstrip("\n"), printed.rstrip("\n")
    numbers = [[float(number) for number in NUMBER.findall(text)] for text in (said, printed)]
    return NUMBER.sub("", said) == NUMBER.sub("", printed) and all(
        math.isclose(one, other, rel_tol=0.02, abs_tol=0.02) for one, other in zip(*numbers, strict=True)
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of one server of the packaged model, for all pages that ask one."""
    arguments = ("--model=demo", "--port=0", "--max-num-seqs=4", "--max-num-batched-tokens=64")
    with start_server(tmp_path_factory.mktemp("server"), *arguments) as running:
        yield running.url


@pytest.mark.timeout(3 * LIMIT_S)  # a server may have to start first
@pytest.mark.parametrize("page", with_examples())
def test_the_examples_of_a_page_run_in_order_and_print_what_it_shows(
    page: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    text = page.read_text()
    code = program(text)
    if SERVER in code:
        code = code.replace(SERVER, request.getfixturevalue("server"))
    script = tmp_path / f"{page.stem}.py"
    script.write_text(code)
    printed = run(script)
    different = [
        (said, own)
        for said, own in zip(shown(text), printed.split(MARK)[:-1], strict=True)
        if said is not None and not is_close(said, own)
    ]
    if different:
        script.write_text(HASH_LOGITS)
        if run(script).strip() != LOGITS:
            pytest.skip("the examples ran; what they print is of a CPU or a JAX that rounds otherwise")
        said, own = different[0]
        assert own == said


def run(script: Path) -> str:
    """What it prints, as its reader runs it: on a CPU, as many devices as there are, XLA's optimizations."""
    env = {name: value for name, value in os.environ.items() if name not in OF_THE_TESTS}
    env |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(script)]
    done = subprocess.run(
        command, cwd=script.parent, env=env, capture_output=True, text=True, check=False, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_an_output_belongs_to_the_block_before_it() -> None:
    text = "# A\n\n```python\nprint(1)\nprint(2)\n```\n\n    1\n    2\n\n"
    text += "```python\nx = 3\n```\n\nA command:\n\n    make\n\n```python\nprint(x)\n```\n\n```\n3\n```\n"
    assert shown(text) == ["1\n2\n", None, "3\n"]
    done = subprocess.run(
        [sys.executable, "-c", program(text)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split(MARK) == ["1\n2\n", "", "3\n", ""]
    assert program(text).splitlines()[3] == text.splitlines()[3] == "print(1)"


def test_only_numbers_with_a_point_may_differ_and_little() -> None:
    assert is_close("-4.72 'a 1'\n7.6\n", "-4.73 'a 1'\n7.5\n")
    assert not is_close("-4.72 'a 1'\n", "-4.72 'a 2'\n")
    assert not is_close("-4.72\n", "-4.83\n")
    assert not is_close("1.0 2.0\n", "1.0\n")


def prose(text: str) -> str:
    """A page without blocks of code and what stands between backticks."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    text = re.sub(r"^    .*$", "", text, flags=re.M)
    return re.sub(r"`[^`\n]*`", "code", text)


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page in its URLs."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(anchor if anchor not in found else f"{anchor}-1")
    return found


def broken_links(page: Path) -> list[str]:
    """Relative links to files or headings that do not exist."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_or_a_heading(page: Path) -> None:
    assert broken_links(page) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# The `KV` cache, twice\n\n```\n# no heading\n```\n")
    page = tmp_path / "a.md"
    page.write_text(
        "# Here\n[good](#here) [good](b.md#the-kv-cache-twice) [`good`](b.md) [good](https://there.is/none)\n"
        "[bad](#there) [bad](b.md#no-heading) [`bad`](c.md) `[code](d.md)`\n"
    )
    assert broken_links(page) == ["#there", "b.md#no-heading", "c.md"]


def test_readme_is_short_and_leads_to_every_page() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 330, "move the details to a page of docs/"
    assert [page.name for page in PAGES[1:] if f"](docs/{page.name}" not in text] == []


def test_the_tree_names_every_module_and_no_other() -> None:
    tree = (ROOT / "docs" / "tree.md").read_text().split("```")[1]
    for package in PACKAGES:
        section = re.search(rf"^{package}/ .*?(?=^\w|\Z)", tree, re.M | re.S)
        assert section, package
        named = set(re.findall(r"[\w/]+(?:\.py|/(?= ))", section[0])) - {f"{package}/"}
        assert named == modules(ROOT / package), package


def test_the_folders_in_readme_have_the_files_that_it_names() -> None:
    section = README.read_text().split("## Where things are")[1].split("```")[1]
    names = re.findall(r"\w+\.(?:py|md)", section)
    assert len(names) > 20
    assert [name for name in names if not any(ROOT.glob(f"*/{name}"))] == []


def modules(package: Path) -> set[str]:
    """The files of a package by their names, and `name/` for a folder in it that has some."""
    files = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    return files | {f"{path.parent.name}/" for path in package.glob("*/*.py") if not path.parent.is_symlink()}
