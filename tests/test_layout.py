"""STYLE's budgets and the direction of imports, held by reading the source."""

import ast
import statistics
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("pjengine", "models", "sharding", "serving", "pallas_kernels")
ALLOWED: dict[str, set[str]] = {
    "pallas_kernels": set(),
    "sharding": set(),
    "models": {"pallas_kernels", "sharding"},
    "pjengine": {"models", "sharding", "pallas_kernels"},
    "serving": {"pjengine"},
}
# Deeper than one level: `python -m pjengine.serving.openai.api_server` has been the command since 2023.
NESTED = {"pjengine.serving.openai": "serving/openai"}
HOST_ONLY = (
    "activation_edits.py",
    "beam_rows.py",
    "beam_search.py",
    "beams.py",
    "comparison.py",
    "edits.py",
    "edit_sizes.py",
    "line_file.py",
    "resolution.py",
    "token_logprobs.py",
    "sampling_params.py",
    "structured_outputs.py",
    "grammar_check.py",
    "outputs.py",
    "request.py",
    "page_pool.py",
    "processors.py",
    "routing.py",
    "row_table.py",
    "schedule.py",
    "scheduler.py",
    "speculation.py",
    "speculation_config.py",
    "step_record.py",
    "step_turns.py",
)  # plain Python: no jax
BANNED_NAMES = ("utils", "common", "manager", "handler", "helpers", "v2")


def sources(*packages: str) -> list[Path]:
    return sorted(
        path
        for package in packages
        for path in (ROOT / package).rglob("*.py")
        if not any(part.is_symlink() for part in [path, *path.parents] if part.is_relative_to(ROOT))
    )


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_of(module: str) -> str | None:
    """`pjengine.models.llama` -> `models`; `pjengine.config` -> `pjengine`; `numpy` -> None."""
    parts = module.split(".")
    if parts[0] != "pjengine":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in PACKAGES else "pjengine"


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts if parts[0] == "pjengine" else ["pjengine", *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    for name in imported(ast.parse(path.read_text())):
        package = package_of(name)
        assert package is None or package == own or package in ALLOWED[own], f"{path} imports {name}"


def test_there_are_no_import_cycles() -> None:
    modules = {module_name(path): path for path in sources(*PACKAGES)}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        top = [node for node in ast.parse(path.read_text()).body if not isinstance(node, ast.FunctionDef)]
        found = {part for node in top for part in imported(node)}
        targets = {module if module in modules else module.rpartition(".")[0] for module in found}
        # A package's __init__ runs before its modules, and re-exports them: no edge from module to it.
        graph[name] = {t for t in targets if t in modules and not name.startswith(f"{t}.")}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join((*trail, name))}"
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_host_modules_import_no_jax() -> None:
    for file in HOST_ONLY:
        names = set(imported(ast.parse((ROOT / "pjengine" / file).read_text())))
        assert not any(name.split(".")[0] in ("jax", "flax", "jaxtyping") for name in names), file


def test_an_architecture_is_a_short_file() -> None:
    from pjengine.models.registry import architecture, known_architectures

    for name in known_architectures():
        module = architecture(name).__module__.rpartition(".")[2]
        assert len((ROOT / "models" / f"{module}.py").read_text().splitlines()) <= 150, module


def test_nothing_imports_torch() -> None:
    for path in sources(*PACKAGES, "tests"):
        if path.name.startswith(("make_golden", "check_saved")):  # run in an environment of their own
            continue
        assert not any(n.split(".")[0] == "torch" for n in imported(ast.parse(path.read_text()))), path


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=lambda p: str(p.relative_to(ROOT)))
def test_size_budgets(path: Path) -> None:
    text = path.read_text()
    is_kernel = path.parent.name == "pallas_kernels"
    assert len(text.splitlines()) <= (700 if is_kernel else 500), f"{path}: find the missing idea"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            limit = 120 if is_kernel and node.name.endswith("_kernel") else 60
            assert length <= limit, f"{path}:{node.lineno} {node.name} has {length} lines, {limit} allowed"
        if isinstance(node, ast.ClassDef):
            defs = [child for child in node.body if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)]
            public = {own.name for own in defs if not own.name.startswith("_") and not is_property(own)}
            limit = 14 if node.name == "LLM" else 12  # the one object that users see
            assert len(public) <= limit, f"{path}: class {node.name} has {len(public)} public methods"
            stores = {
                target.attr
                for child in defs
                for target in ast.walk(child)
                if isinstance(target, ast.Attribute)
                and isinstance(target.ctx, ast.Store)
                and isinstance(target.value, ast.Name)
                and target.value.id == "self"
            }
            assert len(stores) <= 15, f"{path}: class {node.name} sets {len(stores)} attributes"


def is_property(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(getattr(own, "id", None) in ("property", "cached_property") for own in function.decorator_list)


def test_median_file_is_small() -> None:
    assert statistics.median(len(path.read_text().splitlines()) for path in sources(*PACKAGES)) <= 150


def test_file_names_are_nouns_of_the_field() -> None:
    for path in sources(*PACKAGES):
        assert path.stem not in BANNED_NAMES, path


def test_packages_in_pyproject_equal_the_folders() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = set(project["tool"]["setuptools"]["packages"])
    assert packages == {"pjengine"} | {f"pjengine.{name}" for name in PACKAGES[1:]} | NESTED.keys()
    folders = project["tool"]["setuptools"]["package-dir"]
    assert folders == {"pjengine": "pjengine"} | {f"pjengine.{name}": name for name in PACKAGES[1:]} | NESTED
    own = {str(path.parent.relative_to(ROOT)) for path in sources(*PACKAGES) if path.name == "__init__.py"}
    assert own == set(folders.values())
    for name in PACKAGES[1:]:
        link = ROOT / "pjengine" / name
        assert link.is_symlink() and link.resolve() == ROOT / name
    assert len(project["project"]["dependencies"]) <= 12
