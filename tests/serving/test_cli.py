"""The command line, as its users meet it: text on standard output, one line for each mistake."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SHORT = ("--max-tokens", "8", "--temperature", "0", "--max-num-seqs", "2", "--max-num-batched-tokens", "32")
TINY = ("--shape", "tiny", "--load-format", "dummy", "--max-num-seqs", "1", "--max-num-batched-tokens", "32")


def pjengine(*argv: str | Path) -> int:
    """Runs the command in this process; argparse leaves by SystemExit, which a shell cannot tell apart."""
    from pjengine.serving.cli import main

    try:
        return main([str(arg) for arg in argv])
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """What greedy decoding makes of the two prompts below."""
    from pjengine import LLM, SamplingParams

    with LLM("demo", warm_up=False, max_num_seqs=2, max_num_batched_tokens=32) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=8, temperature=0), use_tqdm=False)
    return [prompt + output.outputs[0].text for prompt, output in zip(PROMPTS, outputs, strict=True)]


PROMPTS = ["import os", "class Stack:"]


def test_text_goes_to_stdout_and_speed_to_stderr(
    capsys: pytest.CaptureFixture[str], expected: list[str]
) -> None:
    assert pjengine("generate", "demo", "--prompt", PROMPTS[0], *SHORT) == 0
    out, err = capsys.readouterr()
    assert out == expected[0] + "\n"
    assert "8 tokens in" in err and "tokens/s" in err and "start-up" in err


def documented_commands() -> list[str]:
    pages = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    text = "\n".join(page.read_text() for page in pages).replace("\\\n", "")
    found = re.findall(r"^    (pjengine (?:bench|plan|generate) .*)", text, re.MULTILINE)
    assert len(found) > 20
    return sorted(set(found))


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_have_options_that_there_are(command: str) -> None:
    from pjengine.serving.cli import _parser

    assert _parser().parse_args(shlex.split(command)[1:]).run


@pytest.mark.parametrize("mode", [(), ("--stream",)], ids=["at once", "streamed"])
def test_several_prompts_come_out_in_their_order(
    mode: tuple[str, ...], capsys: pytest.CaptureFixture[str], expected: list[str]
) -> None:
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    assert pjengine("generate", "demo", *prompts, *mode, *SHORT) == 0
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in expected)


def test_streamed_text_of_later_prompts_waits_for_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    from pjengine import CompletionChunk
    from pjengine.serving.cli import _show

    def chunk(index: int, text: str, finish_reason: str | None = None) -> CompletionChunk:
        return CompletionChunk(index=index, text=text, token_ids=[1], finish_reason=finish_reason)

    seen = []

    def chunks() -> Any:
        for one in (
            chunk(1, "x"),
            chunk(0, "1"),
            chunk(1, "y", "stop"),
            chunk(0, "2", "stop"),
            chunk(2, "!", "stop"),
        ):
            yield one
            seen.append(capsys.readouterr().out)

    assert _show(chunks(), ["a", "b", "c"]) == 5
    assert seen == ["a", "1", "", "2\nbxy\nc", "!\n"]


def test_prompt_comes_from_standard_input_without_its_last_newline(
    capsys: pytest.CaptureFixture[str], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt").write_text(PROMPTS[0] + "\n")
    with open(tmp_path / "prompt") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert pjengine("generate", "demo", *SHORT) == 0
    assert capsys.readouterr().out == expected[0] + "\n"


GENERATE = ("generate", "demo", "--prompt", "a")
LATENCY = ("bench", "latency", *TINY)
BAD_INPUT = {
    "no such command": (("generat",), "no such command: 'generat'; did you mean generate?"),
    "unlike any command": (("xyz",), "no such command: 'xyz'; there are serve, generate, chat,"),
    "no such benchmark": (("bench", "latenci"), "no such kind: 'latenci'; did you mean latency?"),
    "mistyped option before the command": (("--versio", "plan"), "did you mean --version?"),
    "mistyped option": ((*GENERATE, "--temperatur=1"), "did you mean --temperature?"),
    "mistyped required option": (("bench", "latency", "--shap", "tiny"), "did you mean --shape?"),
    "unlike any option": ((*GENERATE, "--quxzzy"), "no such option: --quxzzy (see pjengine generate --help)"),
    "no number": ((*GENERATE, "--top-k", "1.5"), "--top-k: invalid int value: '1.5'"),
    "no model": (("generate", "--prompt", "a"), "required: MODEL"),
    "no such folder": (("generate", "./nosuch", "--prompt", "a"), "'./nosuch': no such folder"),
    "empty prompt": (("generate", "demo", "--prompt", "", *SHORT), "the prompt is empty"),
    "no UTF-8": (("generate", "demo", "--prompt", "\udcff"), r"the prompt is not UTF-8: '\udcff'"),
    "prompt too long": ((*GENERATE[:3], "a b " * 40, "--max-model-len", "16"), "at most 15 leave room"),
    "temperature": ((*GENERATE, "--temperature", "3"), "temperature must be in [0, 2], got 3.0"),
    "no temperature": ((*GENERATE, "--temperature", "nan"), "temperature must be finite, got nan"),
    "top_p": ((*GENERATE, "--top-p", "0"), "top_p must be in (0, 1], got 0.0"),
    "max_tokens": ((*GENERATE, "--max-tokens", "0"), "max_tokens must be at least 1, or None, got 0"),
    "empty stop": ((*GENERATE, "--stop", ""), "stop must be free of empty strings"),
    "dtype": ((*GENERATE, "--dtype", "int3"), "dtype must be one of auto, bfloat16"),
    "overrides": ((*GENERATE, "--hf-overrides", "[1]"), "a JSON object is needed, got '[1]'"),
    "overrides, no JSON": ((*GENERATE, "--hf-overrides", "{"), "'{' is not valid JSON"),
    "unknown config key": ((*GENERATE, "--hf-overrides", '{"foo_bar": 1}'), "foo_bar"),
    "speculation": ((*GENERATE, "--speculative-config", '{"method": "x"}'), "needs a method, one of ngram"),
    "max_model_len": (
        (*GENERATE, "--max-model-len", "9999"),
        "max_model_len=9999 is beyond the 1024 positions",
    ),
    "max_model_len, no number": (
        (*GENERATE, "--max-model-len", "long"),
        "max_model_len must be a whole number of at least 2 and less than 2147483648, or None, got 'long'",
    ),
    "more KV than the card has": (
        ("plan", "llama-8b", "--gpu", "l4", "--kv-cache-memory-bytes", "60000000000"),
        "bytes of KV pages are too many beside 16,060,522,496 of weights",
    ),
    "no room for KV": ((*GENERATE, "--kv-cache-memory-bytes", "1000"), "the KV cache gets 1,000 bytes"),
    "shape of no name": (
        ("bench", "startup", "--shape", "lama"),
        "no shape is named 'lama'; there are llama-8b",
    ),
    "shape, but no dummy": (("bench", "latency", "--shape", "tiny"), "add --load-format dummy"),
    "shape and model": (("bench", "latency", "--shape", "tiny", "--model", "demo"), "not allowed with"),
    "workload": (
        ("bench", "throughput", *TINY, "--workload", "foo"),
        "invalid choice: 'foo' (choose from 'sharegpt-",
    ),
    "no requests": (("bench", "throughput", *TINY, "--num-requests", "0"), "at least 1 is needed, got '0'"),
    "requests too long": (
        ("bench", "throughput", *TINY, "--num-requests", "3"),
        "do not fit into max_model_len=512",
    ),
    "batch too large": (
        (*LATENCY, "--batch-size", "1", "2", "--prompt-len", "8"),
        "a batch of 2 does not run at",
    ),
    "one output": ((*LATENCY, "--batch-size", "1", "--output-len", "1"), "at least 2"),
    "refused in the child": (
        ("bench", "startup", *TINY, "--max-model-len", "9999"),
        "max_model_len=9999 is beyond",
    ),
    "output": (("bench", "startup", *TINY, "--output", "no/such/folder"), "No such file or directory"),
}


@pytest.mark.parametrize(("argv", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_line_and_status_2(
    argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pjengine(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pjengine: ") and err.endswith("\n") and err.count("\n") == 1
    assert message in err


def test_only_what_is_given_takes_the_place_of_the_model_s_own_sampling() -> None:
    from pjengine import SamplingParams
    from pjengine.serving.cli import _laid_over

    own = SamplingParams(temperature=0.6, top_k=5)
    assert _laid_over(own, {}) == SamplingParams(temperature=0.6, top_k=5, max_tokens=128)
    assert _laid_over(own, {"top_k": 0, "stop": ["x"]}) == SamplingParams(
        temperature=0.6, max_tokens=128, stop=["x"]
    )
    own = SamplingParams(max_tokens=300)
    assert [_laid_over(own, asked).max_tokens for asked in ({}, {"max_tokens": 9})] == [300, 9]


def test_the_model_s_generation_config_counts_unless_it_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = []
    for options in ((), ("--generation-config", "vllm"), ("--generation-config", "vllm", *SHORT[2:3], "0.6")):
        sizes = (*SHORT[:2], *SHORT[4:])
        assert pjengine(*GENERATE, "--sampling-seed", "3", *sizes, *options) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[2] != texts[1]


def test_truncated_weights_are_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(ROOT / "models/demo", tmp_path / "demo", ignore=shutil.ignore_patterns("*.py"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1_000_000])
    assert pjengine("generate", folder, "--prompt", "a") == 2
    err = capsys.readouterr().err
    assert err.startswith("pjengine: ") and err.count("\n") == 1
    assert "model.safetensors" in err and "truncated" in err


def test_latency_prints_one_json_object_for_each_batch_and_a_line_for_people(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.jsonl"
    sizes = ("--batch-size", "1", "1", "--prompt-len", "32", "--output-len", "4", "--repeats", "1")
    assert pjengine("bench", "latency", *TINY, *sizes, "--output", file) == 0
    out, err = capsys.readouterr()
    results = [json.loads(line) for line in out.splitlines()]
    assert [result["batch_size"] for result in results] == [1, 1]
    assert results[0]["bench"] == "decode-latency" and results[0]["model"] == "tiny"
    assert results[0]["command"].startswith("pjengine bench latency --shape tiny")
    assert {"device", "jax", "jaxlib", "python", "date"} <= results[0].keys()
    assert file.read_text() == out
    assert err.count("batch 1: ") == 2 and "ms per output token" in err


def test_throughput_reports_the_workload(capsys: pytest.CaptureFixture[str]) -> None:
    assert pjengine("bench", "throughput", *TINY, "--num-requests", "2") == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert (result["bench"], result["num_requests"]) == ("sharegpt-like", 2)
    assert result["recompiles_after_warmup"] == 0
    assert "sharegpt-like, 2 requests: " in err


def test_help_names_every_default_and_every_shape(capsys: pytest.CaptureFixture[str]) -> None:
    from pjengine.models.shapes import SHAPES

    assert pjengine("generate", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 0.92)" in text and "(default: 128)" in text and "(default: off)" in text
    assert pjengine("bench", "throughput", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in SHAPES)
    assert text.count("(default: sharegpt-like)") == 1


@pytest.mark.parametrize("argv", [(), ("bench",)])
def test_without_a_command_the_help_names_all_of_them(
    argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert pjengine(*argv, "--help") == 0
    text = capsys.readouterr().out
    assert pjengine(*argv) == 2
    out, err = capsys.readouterr()
    assert ((out, err) == ("", text) and "commands:" in text) or "kinds:" in text
    names = ("throughput", "serve") if argv else ("serve", "chat", "complete", "run-batch", "collect-env")
    assert all(re.search(rf"^    {name} +\S", text, re.MULTILINE) for name in names)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import pjengine as package

    assert pjengine("--version") == 0
    assert capsys.readouterr().out == f"pjengine {package.__version__}\n"


def test_module_runs_as_a_process_and_a_reader_that_leaves_ends_it_quietly() -> None:
    command = [
        sys.executable,
        "-m",
        "pjengine.serving.cli",
        "generate",
        "demo",
        "--prompt",
        "a\nb",
        "--stream",
    ]
    with subprocess.Popen(
        [*command, *SHORT], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "a\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_console_script_names_the_same_function() -> None:
    from importlib.metadata import entry_points

    (script,) = (entry for entry in entry_points(group="console_scripts") if entry.name == "pjengine")
    assert script.value == "pjengine.serving.cli:main"
    path = Path(sys.executable).with_name("pjengine")
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("pjengine ")


def test_kernels_are_timed_one_json_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert pjengine("bench", "kernels", "--shape", "demo", "--op", "product", "--interpret") == 0
    out, err = capsys.readouterr()
    for line in map(json.loads, out.splitlines()):
        assert line["bench"] == "kernels" and line["op"] == "product" and line["gb_per_s"] > 0
    assert "of the limit" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shape", "no-such"), "no shape of the kernels is named 'no-such'"),
        (("--op", "x"), "there is no op 'x'"),
        (("--shape", "mixtral-8x7b", "--op", "decode"), "mixtral-8x7b has no sizes for the op 'decode'"),
    ],
)
def test_unknown_kernels_are_refused_with_those_there_are(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pjengine("bench", "kernels", "--interpret", *arguments) == 2
    assert message in capsys.readouterr().err
