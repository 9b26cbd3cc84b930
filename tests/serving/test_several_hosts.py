"""Two processes on CPU devices that gloo joins give the tokens of one, and end when one of them is lost."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.golden import golden as goldens
from tests.serving.process import ROOT, Server, start_server, wait_until

SIZES: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "skip_tokenizer_init": True}
SIZES |= {"dtype": "float32", "warm_up": False, "decode_steps": 1, "kv_cache_memory_bytes": 2**20}
OPTIONS = (
    *("--max-num-seqs=4", "--max-num-batched-tokens=32", "--skip-tokenizer-init", "--dtype=float32"),
    *("--no-warm-up", "--decode-steps=1", "--kv-cache-memory-bytes=1048576"),
)
MUST_END_S = 30  # a process that has lost another

# Every host runs the same: the worker's never comes past the first statement.
ALL_WAYS = """
import json, sys
from pjengine import LLM
from tests.serving.test_several_hosts import answers
with LLM(**json.loads(sys.argv[1])) as llm:
    print(json.dumps(answers(llm)), file=sys.stderr)
print("closed", file=sys.stderr)
"""
ENDLESS = """
import json, sys
from pjengine import LLM, SamplingParams
llm = LLM(**json.loads(sys.argv[1]))
while True:
    for chunk in llm.stream([1, 2, 3], SamplingParams(max_tokens=64, ignore_eos=True)):
        print("chunk", file=sys.stderr, flush=True)
"""


# Two hosts with a network of their own between them, which is cut when a line comes. That needs no rights, in
# a user namespace. Each host's name has the address of its network namespace, which gloo asks for.
NAMESPACES = """
set -e
mount -t tmpfs tmpfs /run
for n in 0 1; do ip netns add host$n; done
ip link add eth0 netns host0 type veth peer name eth0 netns host1
for n in 0 1; do
    ip -n host$n addr add 10.0.0.$((n + 1))/24 dev eth0
    ip -n host$n link set eth0 up
    ip -n host$n link set lo up
    echo "10.0.0.$((n + 1)) $(hostname)" > /run/hosts$n
done
run='mount --bind "$0" /etc/hosts; exec "$@"'
ip netns exec host0 sh -c "$run" /run/hosts0 "$1" -c "$2" "$3" > "$5/0" 2>&1 &
head=$!
ip netns exec host1 sh -c "$run" /run/hosts1 "$1" -c "$2" "$4" > "$5/1" 2>&1 &
worker=$!
read _
ip -n host0 link set eth0 down
for process in $head $worker; do wait $process && echo 0 || echo $?; done
"""


def answers(llm: Any) -> list[Any]:
    """Of a few requests; and that one that cannot run leaves the engine well."""
    from pjengine import ActivationEdit, SamplingParams

    some: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True}
    params = [
        SamplingParams(temperature=0, **some),
        SamplingParams(temperature=0.8, seed=3, logprobs=2, logit_bias={7: 5.0}, **some),
    ]
    prompt = goldens.load("gqa").prompt
    outputs = llm.generate([prompt[: 20 + i] for i in range(len(params))], params, use_tqdm=False)
    streamed = [token for chunk in llm.stream(prompt[:20], params[0]) for token in chunk.token_ids]
    refusal = ""
    if llm.engine.config.nnodes > 1:
        edits = [ActivationEdit(1, never)]
        for fields in ({"logits_processors": [never]}, {"activation_edits": edits}):
            try:
                llm.generate(prompt, SamplingParams(**fields), use_tqdm=False)
            except ValueError as error:
                refusal += str(error)
        try:
            llm.update_params(llm.params)
        except NotImplementedError as error:
            refusal += str(error)
        interrupt_a_step(llm.engine, prompt)
    again = llm.generate(prompt[:20], params[0], use_tqdm=False)
    texts = [[one.token_ids for one in output.outputs] for output in [*outputs, *again]]
    return [texts, streamed, refusal]


def interrupt_a_step(engine: Any, prompt: list[int]) -> None:
    """As Ctrl-C does: all hosts start over."""
    advance = engine._advance

    def interrupted() -> None:
        advance()
        raise KeyboardInterrupt

    engine.add_request(prompt)
    engine._advance = interrupted
    try:
        engine.step()
        raise AssertionError("not interrupted")
    except KeyboardInterrupt:
        engine._advance = advance
    assert not engine.has_unfinished_requests() and not engine.is_broken


def never(token_ids: Any, logits: Any) -> Any:
    return logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gqa")
    goldens.write_checkpoint(goldens.load("gqa"), folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[Any]:
    from pjengine import LLM

    with LLM(folder, **SIZES) as llm:
        return answers(llm)


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


@contextmanager
def two_scripts(code: str, folder: Path, tmp_path: Path) -> Iterator[list[Server]]:
    """The same script on two hosts; first the head."""
    settings = {"model": str(folder), **SIZES, "tensor_parallel_size": 2, "nnodes": 2}
    settings["coordinator"] = free_address()
    with ExitStack() as stack:
        started = []
        for rank in range(2):
            (own := tmp_path / str(rank)).mkdir()
            given = json.dumps({**settings, "node_rank": rank})
            started.append(stack.enter_context(start_server(own, given, code=code)))
        yield started


def serve_command(folder: Path, rank: int, coordinator: str) -> tuple[str, ...]:
    hosts = ("--tensor-parallel-size=2", "--nnodes=2", f"--node-rank={rank}", f"--coordinator={coordinator}")
    return "serve", str(folder), *OPTIONS, *hosts, "--port=0"


@contextmanager
def two_servers(
    folder: Path, tmp_path: Path, coordinator: str = "", *more: str, workers: Path | None = None
) -> Iterator[list[Server]]:
    """`pjengine serve` on two hosts; first the head. The worker may have a model of its own."""
    coordinator = coordinator or free_address()
    with ExitStack() as stack:
        started = []
        for rank in range(2):
            (own := tmp_path / str(rank)).mkdir()
            given = workers if rank and workers is not None else folder
            command = (*serve_command(given, rank, coordinator), *more)
            started.append(stack.enter_context(start_server(own, *command, module="pjengine.serving.cli")))
        yield started


def complete(server: Server, prompt: list[int], **more: Any) -> Any:
    body = {"prompt": prompt, "temperature": 0, "ignore_eos": True, "return_token_ids": True, **more}
    return server.request("POST", "/v1/completions", body)


def test_two_hosts_give_the_tokens_of_one_and_end_together(
    folder: Path, alone: list[Any], tmp_path: Path
) -> None:
    with two_scripts(ALL_WAYS, folder, tmp_path) as (head, worker):
        assert head.wait(120) == 0, head.log
        assert worker.wait(30) == 0, worker.log
        lines = head.log.splitlines()
    texts, streamed, refusal = json.loads(next(line for line in lines if line.startswith("[[[")))
    assert [texts, streamed] == alone[:2]
    for name in ("logits_processors", "activation_edits"):
        assert f"{name} are functions of this process" in refusal
    assert "update_params is of one host" in refusal
    assert "closed" in lines and "closed" not in worker.log


def test_a_server_on_two_hosts_answers_takes_no_late_host_and_ends_both_on_sigterm(
    folder: Path, alone: list[Any], tmp_path: Path
) -> None:
    coordinator = free_address()
    with two_servers(folder, tmp_path, coordinator) as (head, worker):
        prompt = goldens.load("gqa").prompt[:20]
        whole = complete(head, prompt, max_tokens=8)
        whole.read_all()
        assert json.loads(whole.body)["choices"][0]["token_ids"] == alone[0][0][0]
        streamed = complete(head, prompt, max_tokens=8, stream=True)
        streamed.read_all()
        lines = [line for line in streamed.body.decode().splitlines() if line.startswith("data: {")]
        chunks = [json.loads(line.removeprefix("data: "))["choices"] for line in lines]
        assert [token for [own] in chunks for token in own["token_ids"]] == alone[0][0][0]
        late = [sys.executable, "-m", "pjengine.serving.cli", *serve_command(folder, 1, coordinator)]
        again = subprocess.run(late, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert again.returncode == 2
        assert f"the head at {coordinator} refused this host (node_rank=1): it is late" in again.stderr
        assert "was refused: it is late: all hosts had joined" in head.log
        head.terminate()
        assert head.wait(30) in (0, -signal.SIGTERM), head.log
        assert worker.wait(30) == 0, worker.log
        assert "lost" not in head.log + worker.log


@pytest.mark.slow
def test_hosts_that_cannot_start_together_end_with_status_2_and_the_reason(
    folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    path = other / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4096:] = content[-4096:][::-1]
    path.write_bytes(content)
    cases: list[tuple[Path, list[str], str]] = [
        (
            folder,
            ["--tensor-parallel-size=60"],
            "=60 on 2 hosts needs 30 devices of each; the one of node_rank",
        ),
        (other, [], r"host 1 \(\S+\) has weights=\w+, and the head \w+: give all hosts the same model"),
    ]
    for number, (workers, more, reason) in enumerate(cases):
        (own := tmp_path / str(number)).mkdir()
        with two_servers(folder, own, "", *more, workers=workers) as (head, worker):
            assert head.wait(60) == 2, head.log
            assert worker.wait(30) == 2, worker.log
            assert re.search(reason, head.log) and re.search(reason, worker.log), head.log + worker.log


def test_a_worker_killed_while_it_streams_ends_requests_with_its_name_and_the_head(
    folder: Path, tmp_path: Path
) -> None:
    with two_servers(folder, tmp_path) as (head, worker):
        stream = complete(head, [1, 2, 3], max_tokens=10_000, stream=True)
        stream.read_until(b"data: {")
        worker.process.send_signal(signal.SIGKILL)
        begun = time.monotonic()
        stream.read_all()
        assert b"host 1 (127.0.0.1:" in stream.body and b"is lost" in stream.body
        health = head.request("GET", "/health")
        assert health.read_all().startswith(b"HTTP/1.1 503")
        assert head.wait(MUST_END_S) == 1, head.log
        assert time.monotonic() - begun < MUST_END_S


@pytest.mark.slow
def test_a_worker_that_falls_silent_is_lost_and_one_without_a_head_ends(folder: Path, tmp_path: Path) -> None:
    with two_servers(folder, tmp_path) as (head, worker):
        stream = complete(head, [1, 2, 3], max_tokens=10_000, stream=True)
        stream.read_until(b"data: {")
        worker.process.send_signal(signal.SIGSTOP)  # as a partition: its connections stay open
        begun = time.monotonic()
        stream.read_all()
        assert b"it has said nothing for 10 s" in stream.body
        assert head.wait(MUST_END_S) == 1, head.log
        assert time.monotonic() - begun < MUST_END_S
        worker.process.send_signal(signal.SIGCONT)
        assert worker.wait(MUST_END_S) != 0


@pytest.mark.slow
@pytest.mark.parametrize("is_stopped", [False, True], ids=["killed", "silent"])
def test_a_loss_ends_a_script_that_waits_for_tokens(is_stopped: bool, folder: Path, tmp_path: Path) -> None:
    with two_scripts(ENDLESS, folder, tmp_path) as (head, worker):
        wait_until(lambda: "chunk" in head.log, "tokens")
        worker.process.send_signal(signal.SIGSTOP if is_stopped else signal.SIGKILL)
        assert head.wait(MUST_END_S) == 1
        assert re.search(r"HostLostError: host 1 \(\S+\) is lost", head.log)


@pytest.mark.slow
def test_a_worker_whose_head_is_gone_ends(folder: Path, tmp_path: Path) -> None:
    with two_scripts(ENDLESS, folder, tmp_path) as (head, worker):
        wait_until(lambda: "chunk" in head.log, "tokens")
        head.process.kill()
        assert worker.wait(MUST_END_S) != 0
        assert "the head (127.0.0.1:" in worker.log and "is lost" in worker.log


@pytest.mark.slow
def test_a_network_that_is_cut_ends_both_sides(folder: Path, tmp_path: Path) -> None:
    namespaces = ("unshare", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--kill-child")
    try:
        subprocess.run([*namespaces, "ip", "link"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces on this machine, or no iproute2: {error}")
    settings = {"model": str(folder), **SIZES, "tensor_parallel_size": 2, "nnodes": 2}
    settings["coordinator"] = "10.0.0.1:29500"
    each = [json.dumps({**settings, "node_rank": rank}) for rank in range(2)]
    script = ["bash", "-c", NAMESPACES, "-", sys.executable, ENDLESS, *each, str(tmp_path)]
    with subprocess.Popen(
        [*namespaces, *script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as both:
        head, worker = tmp_path / "0", tmp_path / "1"

        def has_begun() -> bool:
            assert both.poll() is None
            return head.exists() and "chunk" in head.read_text()

        try:
            wait_until(has_begun, "tokens")
            statuses, _ = both.communicate("\n", MUST_END_S)
        finally:
            both.kill()
    assert statuses.split() == ["1", "1"]
    assert "host 1 (10.0.0.2:" in head.read_text() and "it has said nothing for 10 s" in head.read_text()
    assert "it has said nothing for 10 s" in worker.read_text()


@contextmanager
def ray_node(folder: Path, *arguments: str) -> Iterator[Server]:
    """One node of a Ray cluster, which several of one machine may be."""
    start = ("start", "--block", "--num-cpus=1", "--disable-usage-stats", *arguments)
    with start_server(folder, *start, module="ray.scripts.scripts") as node:

        def has_started() -> bool:
            assert node.process.poll() is None, node.log
            return "Ray runtime started" in node.log

        wait_until(has_started, "a node of Ray")
        try:
            yield node
        finally:
            node.terminate()
            node.wait()


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two nodes. Their sockets need a short path."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'pjengine[ray]'")
    address = free_address()
    port = f"--port={address.rpartition(':')[2]}"
    with tempfile.TemporaryDirectory(prefix="ray") as name, ExitStack() as stack:
        first, second = Path(name) / "1", Path(name) / "2"
        first.mkdir()
        second.mkdir()
        places = ("--node-ip-address=127.0.0.1", f"--temp-dir={name}")
        stack.enter_context(ray_node(first, "--head", "--include-dashboard=false", port, *places))
        stack.enter_context(ray_node(second, f"--address={address}", "--node-ip-address=127.0.0.1"))
        monkeypatch.setenv("RAY_ADDRESS", address)
        yield


@pytest.mark.slow
def test_ray_starts_a_worker_on_each_other_node_and_its_loss_ends_the_head(
    ray_cluster: None, folder: Path, alone: list[Any], tmp_path: Path
) -> None:
    together = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
    settings = json.dumps({"model": str(folder), **SIZES, **together})
    whole, endless = tmp_path / "whole", tmp_path / "endless"
    whole.mkdir()
    endless.mkdir()
    with start_server(whole, settings, code=ALL_WAYS) as head:
        assert head.wait(120) == 0, head.log
        texts, streamed, _ = json.loads(next(own for own in head.log.splitlines() if own.startswith("[[[")))
        assert [texts, streamed] == alone[:2]
    with start_server(endless, settings, code=ENDLESS) as head:
        wait_until(lambda: "chunk" in head.log, "tokens")
        found = re.search(r"_Worker pid=(\d+)", head.log)  # with what gloo says there
        assert found is not None, head.log
        os.kill(int(found[1]), signal.SIGKILL)
        assert head.wait(MUST_END_S) == 1
        assert re.search(r"HostLostError: host 1 \(\S+\) is lost", head.log)
