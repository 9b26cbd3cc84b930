"""`pjengine chat`, `complete` and `bench serve`, each a process of its own, with a server in another."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.serving.process import RANDOM, ROOT, Server, start_server, wait_until

KEY = "sk-of-the-tests"
GREEDY = ("--temperature", "0", "--max-tokens", "8")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = ("--model=demo", "--served-model-name=first", "--port=0", f"--api-key={KEY}", *RANDOM)
    with start_server(tmp_path_factory.mktemp("server"), *arguments) as server:
        server.url  # noqa: B018 - waits
        yield server


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A named shape with random weights, and no tokenizer."""
    arguments = ("serve", "tiny", "--load-format=dummy", "--skip-tokenizer-init", "--port=0")
    sizes = ("--max-num-seqs=2", "--max-num-batched-tokens=64", "--no-warm-up", "--decode-steps=1")
    folder = tmp_path_factory.mktemp("shape")
    with start_server(folder, *arguments, *sizes, module="pjengine.serving.cli") as server:
        server.url  # noqa: B018 - waits
        yield server


def command(*argv: str | Path) -> list[str]:
    return [sys.executable, "-m", "pjengine.serving.cli", *map(str, argv)]


def run(
    *argv: str | Path, stdin: str = "", key: str | None = KEY, timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    if key is not None:
        env["OPENAI_API_KEY"] = key
    return subprocess.run(
        command(*argv), cwd=ROOT, input=stdin, env=env, capture_output=True, text=True, timeout=timeout_s
    )


def ask(server: Server, path: str, **body: Any) -> Any:
    request = server.request("POST", path, body, {"Authorization": f"Bearer {KEY}"})
    request.read_all()
    return json.loads(request.body)


def expected_chat(server: Server, *messages: tuple[str, str]) -> str:
    """What the server answers to a conversation, when it is asked without this client."""
    said = [{"role": role, "content": content} for role, content in messages]
    answer = ask(server, "/v1/chat/completions", messages=said, temperature=0, max_tokens=8)
    return answer["choices"][0]["message"]["content"]


def test_quick_answers_once_and_says_how_quick_it_was(server: Server) -> None:
    url = ("--url", f"{server.url}/v1")
    done = run("chat", *url, "-q", "Hello", "--system-prompt", "Be brief", "--stats", *GREEDY)
    assert (done.returncode, done.stdout) == (
        0,
        expected_chat(server, ("system", "Be brief"), ("user", "Hello")) + "\n",
    )
    assert re.fullmatch(
        r"first text after \d+\.\d ms; 8 tokens in \d+\.\d\d s: \d+\.\d tokens/s\n", done.stderr
    )
    done = run("complete", *url, "--model-name", "first", "--quick", "import os", *GREEDY)
    wanted = ask(server, "/v1/completions", prompt="import os", temperature=0, max_tokens=8)
    assert (done.returncode, done.stdout) == (0, wanted["choices"][0]["text"] + "\n")


def test_a_conversation_remembers_what_was_said_and_outlives_errors(server: Server) -> None:
    lines = ["Hello", "", "a b " * 2000, "Again"]
    done = run("chat", "--url", f"{server.url}/v1", *GREEDY, stdin="\n".join(lines) + "\n")
    first = expected_chat(server, ("user", "Hello"))
    second = expected_chat(server, ("user", "Hello"), ("assistant", first), ("user", "Again"))
    assert (done.returncode, done.stdout) == (0, f"{first}\n{second}\n")
    [error] = done.stderr.splitlines()
    assert error.startswith("pjengine: the server answers 400: ")


def test_lines_to_complete_have_nothing_to_do_with_each_other(server: Server) -> None:
    done = run("complete", "--url", f"{server.url}/v1", *GREEDY, stdin="import os\nimport os\n")
    first, second = done.stdout[: len(done.stdout) // 2], done.stdout[len(done.stdout) // 2 :]
    assert done.returncode == 0 and first == second != ""


class Terminal:
    """A process at a terminal, with somebody who types."""

    def __init__(self, *argv: str) -> None:
        env = {**os.environ, "OPENAI_API_KEY": KEY, "TERM": "dumb"}
        self._end, theirs = pty.openpty()
        self.process = subprocess.Popen(
            command(*argv),
            cwd=ROOT,
            env=env,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.shown = b""

    def read_until(self, mark: bytes) -> bytes:
        """Waits for `mark`; returns what was shown before it, and forgets both."""
        while mark not in self.shown:
            self.shown += os.read(self._end, 65536)
        before, _, self.shown = self.shown.partition(mark)
        return before

    def type(self, text: bytes) -> None:
        os.write(self._end, text)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)


@pytest.mark.usefixtures("takes_interrupts")
def test_ctrl_c_ends_the_answer_and_ctrl_d_the_program(server: Server) -> None:
    arguments = ("complete", "--url", f"{server.url}/v1", "--temperature", "0", "--max-tokens", "900")
    with closing(Terminal(*arguments)) as terminal:
        assert b"first: Ctrl-C ends an answer" in terminal.read_until(b"> ")
        terminal.type(b"a\n")
        terminal.read_until(b"a\r\n")  # the echo of the terminal
        while not terminal.shown.strip():  # some of the answer
            terminal.shown += os.read(terminal._end, 65536)
        terminal.process.send_signal(signal.SIGINT)
        terminal.read_until(b"> ")

        def is_idle() -> bool:
            request = server.request("GET", "/load", headers={"Authorization": f"Bearer {KEY}"})
            request.read_all()
            return json.loads(request.body)["server_load"] == 0

        wait_until(is_idle, "the answer to end on the server", 30)
        terminal.process.send_signal(signal.SIGINT)  # nothing is under way: the line is forgotten
        terminal.read_until(b"> ")
        terminal.type(b"\x04")
        assert terminal.process.wait(30) == 0


ERRORS = {
    "no key": (("chat", "-q", "a"), None, "the server answers 401: a key is needed"),
    "another key": (("chat", "-q", "a", "--api-key", "x"), KEY, "the server answers 401"),
    "another model": (("chat", "-q", "a", "--model-name", "b"), KEY, "404: The model `b` does not exist."),
    "value": (("complete", "-q", "a", "--top-p", "7"), KEY, "top_p must be in (0, 1], got 7.0"),
    "no UTF-8": (("complete", "-q", b"\xff".decode(errors="surrogateescape")), KEY, "is not UTF-8"),
    "engine": (("chat", "-q", "a", "--dtype", "float32"), KEY, "--dtype is for a model in this process"),
    "both": (("chat", "demo", "-q", "a"), KEY, "--url is for a server"),
    "bench": (("bench", "serve", "--num-requests", "2", "--model-name", "b"), KEY, "404: The model `b`"),
    "too long": (
        ("bench", "serve", "--num-requests", "100"),
        KEY,
        "do not fit into the server's max_model_len",
    ),
}


@pytest.mark.parametrize(("argv", "key", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_are_one_line_and_status_2(
    server: Server, argv: tuple[str, ...], key: str | None, message: str
) -> None:
    done = run(*argv, "--url", f"{server.url}/v1", key=key)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and done.stderr.startswith("pjengine: ") and done.stderr.count("\n") == 1


def test_a_url_without_v1_gets_a_hint(server: Server) -> None:
    for argv in (("chat", "-q", "a"), ("complete", "-q", "a"), ("bench", "serve", "--num-requests", "2")):
        done = run(*argv, "--url", server.url)
        assert done.returncode != 0
        assert f"404: Not Found; the URL should end in /v1, got {server.url}" in done.stderr


def test_a_model_in_this_process_answers_as_a_server_does(server: Server) -> None:
    done = run("chat", "demo", "-q", "Hello", *GREEDY, *RANDOM[:-1], key=None)
    assert (done.returncode, done.stdout) == (0, expected_chat(server, ("user", "Hello")) + "\n")


def metric(server: Server, name: str) -> float:
    request = server.request("GET", "/metrics", headers={"Authorization": f"Bearer {KEY}"})
    request.read_all()
    found = re.search(rf"^pjengine:{name}{{.*}} (\S+)$".encode(), request.body, re.MULTILINE)
    assert found, name
    return float(found[1])


def bench(server: Server, *argv: str | Path) -> tuple[dict[str, Any], str]:
    done = run("bench", "serve", "--url", f"{server.url}/v1", "--num-requests", "2", *argv)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


COUNTED = ("prompt_tokens_total", "generation_tokens_total")


def test_bench_serve_counts_what_the_server_counts(shape: Server, tmp_path: Path) -> None:
    from pjengine.bench import sharegpt_like

    workload = sharegpt_like(256, 2)
    before = [metric(shape, name) for name in COUNTED]
    file = tmp_path / "results.jsonl"
    goals = ("--goodput", "ttft:600000", "e2el:0.001")
    result, err = bench(shape, "--max-concurrency", "1", "--output", file, *goals)
    grown = [metric(shape, name) - old for name, old in zip(COUNTED, before, strict=True)]
    assert grown == [result["prompt_tokens"], result["output_tokens"]]
    assert grown == [sum(map(len, workload.prompts)), workload.num_output_tokens]
    assert (result["completed"], result["failed"], result["peak_concurrency"]) == (2, 0, 1)
    assert (result["bench"], result["model"], result["request_rate"]) == ("serve", "tiny", "inf")
    assert result["requests_per_s"] == pytest.approx(2 / result["duration_s"], rel=1e-3)
    assert result["output_tokens_per_s"] == pytest.approx(grown[1] / result["duration_s"], rel=1e-3)
    # One after the other: their times add up to the whole.
    assert 2 * result["mean_e2el_ms"] == pytest.approx(1e3 * result["duration_s"], rel=0.1)
    assert result["mean_ttft_ms"] < result["mean_e2el_ms"] and result["mean_itl_ms"] > 0
    assert result["goodput_share"] == 0 and result["goodput_goals_ms"] == {"ttft": 600000, "e2el": 0.001}
    assert [json.loads(line) for line in file.read_text().splitlines()] == [result]
    assert "2 requests in" in err and "goodput 0.00 requests/s" in err


def test_bench_serve_finds_no_pages_of_the_run_before(shape: Server) -> None:
    hits = metric(shape, "prefix_cache_hits_total")
    result, _ = bench(shape, "--num-warmups", "2", "--request-rate", "1000")
    assert (result["num_warmups"], result["completed"]) == (2, 2)
    assert metric(shape, "prefix_cache_hits_total") == hits


def test_no_key_is_in_a_result(shape: Server) -> None:
    for words in (("--api-key", "sk-secret"), ("--api-key=sk-secret",)):
        result, err = bench(shape, *words)
        assert "sk-secret" not in json.dumps(result) + err and "--api-key" in result["command"]


def test_requests_that_fail_are_counted_and_the_status_says_so(shape: Server) -> None:
    done = run(
        "bench", "serve", "--url", f"{shape.url}/v1", "--num-requests", "2", "--request-timeout", "1e-6"
    )
    result = json.loads(done.stdout)
    assert (done.returncode, result["completed"], result["failed"]) == (1, 0, 2)
    assert result["errors"] == {"no end within 1e-06 s": 2} and "no end within" in done.stderr
