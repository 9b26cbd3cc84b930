"""A second start compiles nothing; what shapes a program, or damages it, is a miss; strangers are refused."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__).parents[2]
TINY: dict[str, Any] = {
    "model": "tiny", "load_format": "dummy", "dtype": "float32", "skip_tokenizer_init": True,
    "max_num_seqs": 2, "max_num_batched_tokens": 32, "kv_cache_memory_bytes": 2**20,
}  # fmt: skip


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The layouts that were traced since."""
    from pjengine.step_compiler import StepCompiler

    layouts, lower = [], StepCompiler.lower

    def record(self: Any, layout: Any) -> Any:
        layouts.append(layout)
        return lower(self, layout)

    monkeypatch.setattr(StepCompiler, "lower", record)
    return layouts


def generate(folder: Path, **settings: Any) -> list[int]:
    """Starts an engine, waits for all programs, and continues a prompt."""
    from pjengine import LLM, SamplingParams

    with LLM(**{**TINY, "compile_cache_dir": str(folder), **settings}) as llm:
        llm.engine.runner.wait_until_warm()
        params = SamplingParams(max_tokens=8, temperature=1.0, seed=5, ignore_eos=True, detokenize=False)
        outputs = llm.generate([[1, 2, 3], [4] * 20], params, use_tqdm=False)
        assert llm.engine.runner.recompiles_after_warmup == 0
        return [token for output in outputs for token in output.outputs[0].token_ids]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A cache, and the tokens of the run that filled it."""
    folder = tmp_path_factory.mktemp("cache") / "new"
    return folder, generate(folder)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.program"))


def test_a_second_start_compiles_nothing_and_gives_the_same_tokens(
    filled: tuple[Path, list[int]], lowered: list[Any]
) -> None:
    folder, tokens = filled
    assert generate(folder) == tokens
    assert not lowered
    assert len(entries(folder)) == 3  # decode 1 and 2, mixed 32
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in entries(folder))


def make_compiler(folder: Path, *, dtype: str = "float32", num_pages: int = 64, **config: Any) -> Any:
    """Makes one-layer programs; knows the shapes of their arguments, and has no arrays."""
    from pjengine.batching import Rows
    from pjengine.compile_cache import CompileCache
    from pjengine.config import RunnerConfig
    from pjengine.models.registry import build_model
    from pjengine.models.shapes import SHAPES
    from pjengine.models.state import KVCache, kv_shape
    from pjengine.sharding.mesh import make_mesh, replicated
    from pjengine.step_compiler import StepCompiler

    shape = dataclasses.replace(SHAPES["tiny"], **{"num_layers": 1, **config})
    model = build_model(shape, jnp.dtype(dtype))
    sizes = RunnerConfig(
        num_pages=num_pages, page_size=16, max_model_len=64, max_num_seqs=1, max_num_batched_tokens=16
    )

    def state() -> Any:
        kv = jnp.zeros(kv_shape(shape, num_pages, 16), dtype)
        token_ids = jnp.zeros((num_pages, 16), jnp.int32)
        return model.init(jax.random.key(0)), KVCache(kv, kv, token_ids), Rows.empty(1, 4)

    sharding = replicated(make_mesh(jax.devices()[:1]))
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), jax.eval_shape(state)
    )
    return StepCompiler(model, sizes, shapes, sharding, CompileCache(folder))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A decode program, and its entry."""
    from pjengine.batching import Layout

    layout = Layout(1, 1, 16, is_decode=True)
    folder = tmp_path_factory.mktemp("cache")
    compiler = make_compiler(folder)
    program = compiler.compile(layout, compiler.lower(layout))
    return program, entries(folder)[0]


@dataclasses.dataclass
class Stored:
    """A program in a folder of the test's own."""

    program: Any
    layout: Any
    compiler: Any
    path: Path

    def load(self) -> Any:
        return self.compiler.load(self.layout)

    def store(self, key: str) -> None:
        self.compiler.cache.store(key, self.program, *self.compiler._trees(self.layout))


@pytest.fixture
def stored(made: tuple[Any, Path], tmp_path: Path) -> Stored:
    from pjengine.batching import Layout

    program, path = made
    copy = Path(shutil.copy2(path, tmp_path))
    return Stored(program, Layout(1, 1, 16, is_decode=True), make_compiler(tmp_path), copy)


def test_a_loaded_program_updates_the_cache_in_place(stored: Stored) -> None:
    made, loaded = stored.program, stored.load()
    assert loaded.input_shardings == made.input_shardings
    assert loaded.output_shardings == made.output_shardings
    params, cache, rows, blob = jax.tree.map(
        lambda leaf: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding),
        stored.compiler._arguments(stored.layout),
    )
    for program in (made, loaded):
        assert program.memory_analysis().alias_size_in_bytes >= cache.k.nbytes + cache.v.nbytes
        before = cache.k
        cache, rows, _ = program(params, cache, rows, blob)
        assert before.is_deleted()


def test_a_loaded_program_tells_what_its_kernels_run_on(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pjengine.pallas_kernels import dispatch

    stored.store(stored.path.stem)
    made = dispatch.chosen_backends()
    assert made["paged_attention"] == "reference"
    monkeypatch.setattr(dispatch, "_chosen", {})  # as in a process that has traced nothing
    assert stored.load() is not None
    assert dispatch.chosen_backends() == made


CHANGES: list[dict[str, Any]] = [
    {"num_layers": 2}, {"num_pages": 65}, {"dtype": "bfloat16"}, {"norm_eps": 1e-3},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_another_program_is_a_miss(stored: Stored, change: dict[str, Any]) -> None:
    assert stored.load() is not None
    assert make_compiler(stored.path.parent, **change).load(stored.layout) is None
    other_layout = dataclasses.replace(stored.layout, num_tokens=2, num_rows=2)
    assert stored.compiler.load(other_layout) is None


def test_other_flags_sources_and_settings_are_a_miss(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    from pjengine import compile_cache

    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_cpu_enable_fast_math=true")
        assert stored.load() is None
    with monkeypatch.context() as patch:
        patch.setattr(compile_cache, "SOURCES", "edited")
        assert stored.load() is None
    with jax.default_matmul_precision("highest"):
        assert stored.load() is None
    assert stored.load() is not None


def test_a_model_from_outside_the_package_is_not_cached(stored: Stored) -> None:
    from pjengine.models.block import Block
    from pjengine.models.llama import Llama
    from pjengine.step_compiler import StepCompiler

    class OwnBlock(Block):  # whose source may change
        pass

    class Own(Llama):
        block = OwnBlock

    old = stored.compiler
    assert old.cache is not None
    for architecture, is_cached in ((Llama, True), (Own, False)):
        model = architecture(old.model.config, old.model.dtype)
        compiler = StepCompiler(model, old.config, old.state, old.sharding, old.cache)
        assert (compiler.load(stored.layout) is not None) == is_cached


def test_another_version_of_what_compiles_the_kernels_is_a_miss(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pjengine.pallas_kernels import triton_extra

    stored.compiler.config = dataclasses.replace(stored.compiler.config, kernel_backend="jax_triton")
    monkeypatch.setattr(triton_extra, "version", lambda name: "3.7.1")
    stored.store(stored.compiler._key(stored.layout))
    assert stored.load() is not None
    monkeypatch.setattr(triton_extra, "version", lambda name: "3.8.0")
    assert stored.load() is None


def test_every_traced_module_is_among_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    from pjengine import compile_cache

    read: list[Path] = []
    read_bytes = Path.read_bytes

    def record(self: Path) -> bytes:
        read.append(self.resolve())
        return read_bytes(self)

    monkeypatch.setattr(Path, "read_bytes", record)
    compile_cache._hash_sources()
    package = ROOT / "pjengine"
    for folder in (package, ROOT / "models", ROOT / "pallas_kernels", ROOT / "sharding"):
        assert set(folder.glob("*.py")) <= set(read)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "digest of nonsense"])
def test_a_damaged_entry_is_a_miss_and_is_replaced(
    stored: Stored, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    content, nonsense = stored.path.read_bytes(), b"no pickle"
    stored.path.write_bytes({
        "truncated": content[:-100],
        "flipped": content[:500] + bytes([content[500] ^ 1]) + content[501:],
        "empty": b"",
        "digest of nonsense": hashlib.sha256(nonsense).digest() + nonsense,
    }[damage])  # fmt: skip
    assert stored.load() is None
    assert "cannot be used" in caplog.text and str(stored.path) in caplog.text
    stored.store(stored.path.stem)
    assert stored.load() is not None
    assert list(stored.path.parent.iterdir()) == [stored.path]


def test_a_folder_or_an_entry_that_others_can_write_is_refused(
    stored: Stored, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pjengine.compile_cache import open_compile_cache

    stored.path.chmod(0o620)
    assert stored.load() is None
    assert "writable by nobody else" in caplog.text
    caplog.clear()
    folder = stored.path.parent
    folder.chmod(0o777)
    assert open_compile_cache(folder) is None
    assert "writable by nobody else" in caplog.text
    folder.chmod(0o700)
    assert open_compile_cache(folder) is not None
    stranger = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: stranger)
    assert open_compile_cache(folder) is None


def test_a_link_in_place_of_an_entry_is_refused(stored: Stored) -> None:
    stored.path.symlink_to(stored.path.rename(stored.path.with_name("elsewhere")))
    assert stored.load() is None


def test_trees_that_are_not_the_programs_own_are_a_fault(stored: Stored) -> None:
    in_tree, _ = stored.compiler._trees(stored.layout)
    with pytest.raises(RuntimeError, match="wanted a program of"):
        stored.compiler.cache.store("another", stored.program, in_tree, in_tree)


def test_a_folder_that_cannot_be_made_means_no_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from pjengine.compile_cache import open_compile_cache

    (tmp_path / "file").write_text("")
    assert open_compile_cache(tmp_path / "file" / "cache") is None
    assert "no compile cache" in caplog.text
    assert open_compile_cache(None) is None


def test_a_full_disk_is_logged_and_no_more(
    stored: Stored, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        stored.store("another")
    assert "was not stored" in caplog.text
    assert list(stored.path.parent.iterdir()) == [stored.path]


def test_the_folder_follows_the_setting_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from pjengine.config import compile_cache_folder

    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert compile_cache_folder(None) == Path("/somewhere/pjengine")
    assert compile_cache_folder("/else/where") == Path("/else/where")
    assert compile_cache_folder("") is None
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/one")
    assert compile_cache_folder(None) == Path("/home/one/.cache/pjengine")


def test_what_was_not_used_for_longest_goes_first(stored: Stored) -> None:
    folder, size = stored.path.parent, stored.path.stat().st_size
    for age, name in enumerate(["new", "middle", "old", "tmp_abandoned"]):
        (folder / name).write_bytes(bytes(size))
        os.utime(folder / name, (10**9 - age, 10**9 - age))
    os.utime(stored.path, (10**8, 10**8))
    assert stored.load() is not None  # used now: the youngest
    stored.compiler.cache.max_bytes = 3 * size + size // 2
    stored.store("another")
    assert {path.name for path in folder.iterdir()} == {stored.path.name, "another.program", "new"}


@pytest.mark.slow
def test_two_processes_fill_one_folder_at_once(tmp_path: Path, filled: tuple[Path, list[int]]) -> None:
    code = (
        "import json, sys; from tests.engine.test_compile_cache import generate; from pathlib import Path; "
        "print(json.dumps(generate(Path(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)
    ]  # both compile: neither finds an entry when it starts
    tokens = [json.loads(process.communicate(timeout=200)[0]) for process in processes]
    assert tokens == [filled[1], filled[1]]
    assert len(list(tmp_path.iterdir())) == 4, "three programs, the autotune folder, no temporary files"


def test_the_first_request_is_answered_before_the_rest_is_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pjengine import LLM, SamplingParams
    from pjengine.batching import Layout
    from pjengine.step_compiler import StepCompiler

    gate, compile_ = threading.Event(), StepCompiler.compile

    def wait_and_compile(self: Any, layout: Any, program: Any) -> Any:
        assert layout.num_tokens in (1, 32) or gate.wait(60)
        return compile_(self, layout, program)

    monkeypatch.setattr(StepCompiler, "compile", wait_and_compile)
    with LLM(**TINY, compile_cache_dir=str(tmp_path)) as llm:
        runner = llm.engine.runner
        params = SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False)
        output = llm.generate([[1, 2, 3]], params, use_tqdm=False)[0]
        assert len(output.outputs[0].token_ids) == 4
        assert {layout.num_tokens for layout in runner.programs if isinstance(layout, Layout)} == {1, 32}
        gate.set()
        runner.wait_until_warm()
        assert set(runner.programs) == set(runner.layouts()) and runner.recompiles_after_warmup == 0


def test_a_program_that_fails_in_the_background_ends_only_what_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pjengine import LLM, SamplingParams
    from pjengine.draw import DrawLayout
    from pjengine.step_compiler import StepCompiler

    is_broken, compile_ = True, StepCompiler.compile

    def compile_or_fail(self: Any, layout: Any, program: Any) -> Any:
        if is_broken and isinstance(layout, DrawLayout) and layout.edits.num_bias:
            raise MemoryError("biases do not fit")
        return compile_(self, layout, program)

    monkeypatch.setattr(StepCompiler, "compile", compile_or_fail)
    plain = SamplingParams(max_tokens=9, ignore_eos=True, detokenize=False)
    biased = dataclasses.replace(plain, logit_bias={5: 1.0})
    with LLM(**TINY, compile_cache_dir=str(tmp_path)) as llm:
        outputs = llm.generate([[1, 2, 3]] * 3, [plain, biased, plain], use_tqdm=False)
        assert [len(output.outputs[0].token_ids) for output in outputs] == [9, 0, 9]
        ended = outputs[1].outputs[0]
        assert ended.finish_reason == "error" and "biases do not fit" in str(ended.stop_reason)
        is_broken = False
        (output,) = llm.generate([[1, 2, 3]], biased, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 9


@pytest.mark.parametrize("place", ["step_compiler.StepCompiler.lower", "runner.new_state"])
def test_a_start_that_fails_leaves_no_thread_and_no_recording(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pjengine import LLM

    def fail(*_: Any) -> Any:
        raise NotImplementedError("no kernel for this shape")

    monkeypatch.setattr(f"pjengine.{place}", fail)
    with pytest.raises(NotImplementedError, match="no kernel"):
        LLM(**TINY, compile_cache_dir=str(tmp_path), record=str(tmp_path / "recording"))
    assert not [thread for thread in threading.enumerate() if thread.name == "pjengine-programs"]
    assert not (tmp_path / "recording").exists()
    open_files = [os.readlink(link) for link in Path("/dev/fd").iterdir() if link.is_symlink()]
    assert not [name for name in open_files if name.startswith(str(tmp_path / "recording"))]


def test_an_interpreter_that_ends_while_it_compiles_ends_cleanly(tmp_path: Path) -> None:
    code = "import json, sys; from pjengine import LLM; llm = LLM(**json.loads(sys.argv[1])); print('up')"
    settings = json.dumps({**TINY, "max_num_seqs": 8, "compile_cache_dir": str(tmp_path)})
    done = subprocess.run(
        [sys.executable, "-c", code, settings], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("up\n", "")
