"""`pjengine run-batch`: every request has one answer, however often the run is cut off."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serving.client import Client
from tests.serving.process import RANDOM, ROOT, wait_until

SETTINGS = (*RANDOM[:-1], "--no-warm-up")


def pjengine(*argv: str | Path) -> int:
    from pjengine.serving.cli import main

    try:
        return main(["run-batch", *map(str, argv)])
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code


def completion(custom_id: Any, prompt: str = "a", **body: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": 4, "temperature": 0, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def chat(custom_id: str, text: str) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 4, "temperature": 0}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def write(path: Path, *lines: Any) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_names(body: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key not in ("id", "created", "model")}


BAD_LINES = {
    "{broken": "it is not valid JSON",
    "[1]": "a JSON object is needed, got list",
    '{"custom_id": "k"}': "method is missing",
    json.dumps(completion(7)): "custom_id must be a string, got 7",
    json.dumps({**completion("m"), "method": "GET"}): "method must be POST, got 'GET'",
    json.dumps({**completion("u"), "url": "/v1/rerank"}): "url must be /v1/completions or",
    json.dumps({**completion("b"), "body": []}): "body must be an object, got list",
    json.dumps({**completion("x"), "extra": 1}): "'extra' is no part of a request",
    json.dumps(completion("s", stream=True)): "stream is not for batches",
}


def test_answers_are_those_of_the_server_and_lines_that_are_none_are_told(
    client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [completion(f"c{i}", f"import {i}") for i in range(6)] + [chat("chat", "Hello")]
    refused = completion("refused", max_tokens=-1)
    source = write(tmp_path / "in.jsonl", *good[:3], "", refused, *BAD_LINES, *good[3:])
    output = tmp_path / "out.jsonl"
    assert pjengine("-i", source, "-o", output, "demo", "--max-in-flight", "3", *SETTINGS) == 1
    lines = read(output)
    assert all(line.keys() == {"id", "custom_id", "response", "error"} for line in lines)
    assert len({line["id"] for line in lines}) == len(lines) == len(good) + 1 + len(BAD_LINES)
    answered = {line["custom_id"]: line["response"] for line in lines if line["error"] is None}
    assert answered.keys() == {"refused", *(line["custom_id"] for line in good)}
    for line in good:
        response = answered[line["custom_id"]]
        assert response["status_code"] == 200 and response["request_id"] in response["body"]["id"]
        wanted = client.answer(line["url"], **line["body"])
        assert without_names(response["body"]) == without_names(wanted)
    assert answered["refused"]["status_code"] == 400
    assert answered["refused"]["body"]["error"]["param"] == "max_tokens"
    told = {line["id"]: line["error"]["message"] for line in lines if line["error"] is not None}
    for number, wanted in enumerate(BAD_LINES.values(), start=6):
        assert wanted in told[f"line-{number}"]
    err = capsys.readouterr().err
    assert f"{len(lines)} requests answered, {1 + len(BAD_LINES)} of them with an error" in err
    # Again: nothing is left, and no model is loaded.
    before = output.read_bytes()
    assert pjengine("-i", source, "-o", output, "./no-such-model") == 1  # some failed, then
    summary = f"have been answered already, in {output}, {1 + len(BAD_LINES)} of them with an error"
    assert output.read_bytes() == before and summary in capsys.readouterr().err
    write(source, *good)
    output.write_text("".join(json.dumps(line) + "\n" for line in lines if line["custom_id"] in answered))
    kept = [line for line in read(output) if line["custom_id"] != "refused"]
    output.write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert pjengine("-i", source, "-o", output, "./no-such-model") == 0


def cut_off(command: list[str], output: Path, signal_number: int) -> tuple[int, str]:
    """Runs the command until it has written three more answers; returns its status and what it told."""
    num_before = output.read_bytes().count(b"\n") if output.exists() else 0

    def has_begun() -> bool:
        return output.exists() and output.read_bytes().count(b"\n") >= num_before + 3

    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        wait_until(has_begun, "three answers")
        process.send_signal(signal_number)
        _, err = process.communicate(timeout=60)
    assert output.read_bytes().count(b"\n") < NUM_LONG
    return process.returncode, err


NUM_LONG = 120


@pytest.mark.slow
@pytest.mark.usefixtures("takes_interrupts")
def test_a_run_that_was_killed_goes_on_with_what_is_left(tmp_path: Path) -> None:
    lines = [completion(f"c{i}", f"import {i}", ignore_eos=True, max_tokens=30) for i in range(NUM_LONG)]
    source, output = write(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl"
    files = ["-i", str(source), "-o", str(output)]
    command = [sys.executable, "-m", "pjengine.serving.cli", "run-batch", *files, "demo", *SETTINGS]
    status, err = cut_off(command, output, signal.SIGINT)
    assert status == 130 and "the same command goes on with the rest" in err and "Traceback" not in err
    assert cut_off(command, output, signal.SIGKILL) == (-signal.SIGKILL, "")
    kept = output.read_bytes()
    output.write_bytes(kept + b'{"id": "line-60", "custom_id": "c59", "resp')
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    num_kept = kept.count(b"\n")
    assert output.read_bytes().startswith(kept) and f"({num_kept} more before)" in done.stderr
    answers = read(output)
    assert sorted(line["custom_id"] for line in answers) == sorted(line["custom_id"] for line in lines)
    assert {line["response"]["body"]["usage"]["completion_tokens"] for line in answers} == {30}


def _nothing(path: Path) -> None:
    path.write_text("\n\n")


def _twice(path: Path) -> None:
    write(path, completion("a"), "", completion("b"), completion("a"))


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "nothing": (_nothing, "holds no requests"),
    "twice": (_twice, "custom_id 'a' is on line 1 and again on line 4: each request needs its own"),
    "no file": (lambda path: None, "No such file or directory"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_an_input_that_is_none_is_refused_before_anything_runs(
    make: Callable[[Path], None], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in.jsonl")
    assert pjengine("-i", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "./no-such-model") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a text\n", "line 1 is no answer of a batch"),
        ('{"custom_id": "a"}\n', "line 1 is no answer of a batch"),
        ('{"id": "1", "custom_id": "z", "response": null, "error": null}\n', "answers 'z', which is not in"),
    ],
)
def test_an_output_that_holds_something_else_is_left_alone(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write(tmp_path / "in.jsonl", completion("a")), tmp_path / "out.jsonl"
    output.write_text(content)
    assert pjengine("-i", source, "-o", output, "./no-such-model") == 2
    assert message in capsys.readouterr().err and output.read_text() == content


def test_two_runs_do_not_write_one_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pjengine.serving.batch import open_output

    source, output = write(tmp_path / "in.jsonl", completion("a")), tmp_path / "out.jsonl"
    with open_output(output):
        assert pjengine("-i", source, "-o", output, "./no-such-model") == 2
    assert "is being written by another run" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["-i", "-o"])
def test_files_of_other_machines_are_refused_by_name(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files: dict[str, str | Path] = {
        "-i": write(tmp_path / "in.jsonl", completion("a")),
        "-o": tmp_path / "out.jsonl",
    }
    words = {**files, option: "https://host/file"}
    assert pjengine("-i", words["-i"], "-o", words["-o"], "demo") == 2
    assert "must be a file of this machine, got 'https://host/file'" in capsys.readouterr().err
