"""The head takes in one worker of each rank that is like it, and says to all others why not."""

import json
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.golden import golden


@pytest.fixture
def door() -> Iterator[Any]:
    from pjengine.host_join import Door

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    door = Door(config(port))
    yield door
    door.close()


def config(port: int, **more: Any) -> Any:
    from pjengine.config import EngineConfig

    some = {"model": "demo", "tensor_parallel_size": 3, "nnodes": 3, "coordinator": f"127.0.0.1:{port}"}
    return EngineConfig(**{**some, **more})


def worker(door: Any, **more: Any) -> Any:
    return replace(door._config, **{"node_rank": 1, **more})


def frame(text: str) -> bytes:
    return struct.pack("<II", len(text.encode()), 0) + text.encode()


def refusal(config: Any) -> str:
    from pjengine.host_join import RefusedError, join

    with pytest.raises(RefusedError) as caught:
        join(config)
    return str(caught.value)


def test_all_ranks_join_in_any_order_and_speak_with_the_head(door: Any) -> None:
    from pjengine.host_join import join

    numbers = np.arange(5, dtype=np.int32)
    joined = {rank: join(worker(door, node_rank=rank))[0] for rank in (2, 1)}
    found = door.wait()
    assert list(found) == [1, 2]
    for rank, wire in joined.items():
        wire.send("rank", numbers * rank, rank=rank)
        message = found[rank][0].receive()
        assert (message.kind, message.fields) == ("rank", {"rank": rank})
        np.testing.assert_array_equal(message.vector, numbers * rank)
    for wire in [*joined.values(), *(wire for wire, _ in found.values())]:
        wire.close()


def test_a_second_worker_of_a_rank_and_a_late_one_are_refused(door: Any) -> None:
    from pjengine.host_join import join

    wires = [join(worker(door))[0]]
    assert "node_rank=1 has joined already, from 127.0.0.1:" in refusal(worker(door))
    wires.append(join(worker(door, node_rank=2))[0])
    assert "it is late: all hosts had joined" in refusal(worker(door))
    for wire in [*wires, *(wire for wire, _ in door.wait().values())]:
        wire.close()


def test_a_worker_that_leaves_before_all_have_joined_frees_its_rank(door: Any) -> None:
    from pjengine.host_join import join

    gone, _ = join(worker(door))
    gone.send("alive")
    gone.close()
    wires = [join(worker(door, node_rank=rank))[0] for rank in (1, 2)]
    found = door.wait()
    wires[0].send("second")
    assert found[1][0].receive().kind == "second"
    wires[1].close()
    assert "it is late: all hosts had joined" in refusal(worker(door, node_rank=2))
    for wire in [*wires, *(wire for wire, _ in found.values())]:
        wire.close()


def test_a_host_with_other_weights_of_the_same_shapes_is_refused(door: Any, tmp_path: Path) -> None:
    from pjengine.host_join import join
    from pjengine.hosts import Hosts
    from pjengine.loading import weights_digest

    case = golden.load("tied")
    own, other = (golden.write_checkpoint(case, tmp_path / name) for name in ("own", "other"))
    path = other / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4096:] = content[-4096:][::-1]  # part of one tensor
    path.write_bytes(content)
    digests = {folder: weights_digest(door._config, folder) for folder in (own, other)}

    wires = [join(worker(door, node_rank=rank))[0] for rank in (1, 2)]
    hosts = Hosts(0, door.wait(), door)
    for wire, folder in zip(wires, (own, other), strict=True):
        wire.send("ready", facts={"weights": digests[folder]})
    told = rf"host 2 .* has weights={digests[other]}, and the head {digests[own]}: give all hosts the same"
    with pytest.raises(ValueError, match=told):
        hosts.begin({"weights": digests[own]})
    hosts._close()
    for wire in wires:
        wire.close()


def test_a_worker_whose_devices_fail_first_says_that_the_head_is_lost(
    door: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jax.errors import JaxRuntimeError

    from pjengine import hosts
    from pjengine.host_join import join

    ended: list[int] = []
    monkeypatch.setattr(hosts, "_end", ended.append)
    wires = [join(worker(door, node_rank=rank))[0] for rank in (1, 2)]
    head = {rank: wire for rank, (wire, _) in door.wait().items()}
    own = hosts.Hosts(1, {0: (wires[0], "a name")})

    class Loss(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            head[1].close()  # which the devices knew first
            return super().wait(timeout)

    own._is_lost = Loss()
    own.fail(JaxRuntimeError("Connection reset by peer"))
    assert str(own.lost).startswith("the head (a name) is lost: its connection has ended")
    own._close()
    assert ended == [1]
    for wire in (*wires, *head.values()):
        wire.close()


def test_another_version_is_refused(door: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import pjengine.host_join

    own = pjengine.host_join.versions()
    both = iter([{**own, "jax": "0.1\nwell"}, own])  # what the worker says, and what the head has
    monkeypatch.setattr(pjengine.host_join, "versions", lambda: next(both))
    text = refusal(worker(door))
    assert rf"it has jax 0.1\nwell, and the head {own['jax']}: all hosts need the same" in text


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"max_num_seqs": 8}, "it has max_num_seqs=8, and the head null: start both alike"),
        ({"nnodes": 5, "tensor_parallel_size": 5, "node_rank": 4}, "it has nnodes=5, and the head 3"),
    ],
    ids=["sizes", "hosts"],
)
def test_other_settings_are_refused(door: Any, more: dict[str, Any], reason: str) -> None:
    assert reason in refusal(worker(door, **more))


def test_a_worker_without_the_secret_is_refused(door: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PJENGINE_HOSTS_SECRET", "another")
    assert "its secret is another: set PJENGINE_HOSTS_SECRET alike" in refusal(worker(door))


def test_a_worker_follows_no_head_without_the_secret() -> None:
    from pjengine.host_join import RefusedError, join
    from pjengine.host_messages import Wire

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        joining = pool.submit(join, config(listener.getsockname()[1], node_rank=1))
        wire = Wire(listener.accept()[0])
        wire.send("hello", nonce="1")
        wire.receive()
        wire.send("welcome", proof="guessed")
        with pytest.raises(RefusedError, match="does not know the secret"):
            joining.result()
        wire.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 8,
        frame("[]"),
        frame("[" * 60_000),
        frame('{"kind": "run"}'),
        frame('{"kind": "join", "proof": "é"}'),
    ],
    ids=["http", "too large", "no object", "nested", "another kind", "no proof"],
)
def test_what_is_no_handshake_is_hung_up_on_and_holds_nobody_up(door: Any, sent: bytes) -> None:
    from pjengine.host_join import join

    with socket.create_connection(door._listener.getsockname(), timeout=10) as stranger:
        stranger.sendall(sent)
        with socket.create_connection(door._listener.getsockname(), timeout=10):  # who says nothing
            join(worker(door))[0].close()
            while stranger.recv(4096):
                pass


def test_who_does_not_say_who_it_is_is_named_so_in_the_log(
    door: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pjengine.host_join.HANDSHAKE_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()):
            assert door._visitors.acquire(blocking=False)
            door._meet(listener.accept()[0], "there")
    reason = "a connection from there was no worker: it did not say within 0.1 s who it is"
    assert reason in caplog.messages  # beside what others of this process log


def test_a_worker_comes_again_where_too_many_are_at_the_door(
    door: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from pjengine.host_join import MAX_VISITORS, join

    at, silent = door._listener.getsockname(), []
    for _ in range(MAX_VISITORS):
        silent.append(socket.create_connection(at, timeout=10))
        assert silent[-1].recv(1)  # its hello
    for _ in range(2):
        with socket.create_connection(at, timeout=10) as one_more:
            assert one_more.recv(1) == b""
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(join, worker(door))
        for stranger in silent:
            stranger.close()
        joining.result()[0].close()
    assert sum("connections do not say who they are: more are" in text for text in caplog.messages) == 1


def test_who_waits_says_once_for_whom(
    door: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from pjengine.host_join import join

    monkeypatch.setattr("pjengine.host_join.PATIENCE_S", 0)
    with pytest.raises(TimeoutError):
        door.wait(timeout_s=0.7)
    # Other threads of this process may log, too.
    [text] = [text for text in caplog.messages if text.startswith("waiting")]
    assert text.partition(":")[0] == "waiting up to 0.7 s for node_rank 1, 2"
    caplog.clear()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(OSError, match=rf"coordinator 127.0.0.1:{port}: no answer within 0.3 s \(.* refused"):
        join(config(port, node_rank=1), timeout_s=0.3)
    [text] = [text for text in caplog.messages if text.startswith("waiting")]
    assert text.startswith(f"waiting up to 0.3 s for the head at 127.0.0.1:{port} (Connection refused): ")


@pytest.mark.parametrize("name", ["a b", "x" * 64])
def test_a_worker_does_not_wait_for_a_name_that_is_none(name: str) -> None:
    from pjengine.host_join import join

    with pytest.raises(OSError, match=rf"coordinator {name}:1: this machine does not know that name"):
        join(config(1, node_rank=1, coordinator=f"{name}:1"))


@pytest.mark.parametrize("said", [b"SSH-2.0-OpenSSH\r\n", b"", frame("[]"), frame('{"kind": "hello"}')])
def test_what_is_no_head_is_told_with_its_address(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    from pjengine.host_join import join

    monkeypatch.setattr("pjengine.host_join.HANDSHAKE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        port = listener.getsockname()[1]
        joining = pool.submit(join, config(port, node_rank=1))
        with listener.accept()[0] as other:
            other.sendall(said)
            told = f"coordinator 127.0.0.1:{port}: what answers there is no pjengine head "
            with pytest.raises(OSError, match=told):
                joining.result()


def test_the_head_says_which_worker_is_missing(door: Any) -> None:
    with pytest.raises(TimeoutError, match=r"no worker of node_rank 1, 2 has joined .* --coordinator 127"):
        door.wait(timeout_s=0)


def test_an_address_that_is_not_of_this_machine_is_refused() -> None:
    from pjengine.config import EngineConfig
    from pjengine.host_join import Door

    far = EngineConfig(model="demo", tensor_parallel_size=2, nnodes=2, coordinator="192.0.2.1:4000")
    with pytest.raises(
        OSError, match=r"node_rank=0 cannot listen there: .* must be an address of its machine"
    ):
        Door(far)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"nnodes": 2, "tensor_parallel_size": 2}, "nnodes=2 needs coordinator='HOST:PORT'"),
        ({"nnodes": 2, "tensor_parallel_size": 2, "coordinator": "head"}, "needs coordinator='HOST:PORT'"),
        ({"distributed_executor_backend": "mp"}, "must be None or 'ray', got 'mp'"),
        (
            {"nnodes": 2, "tensor_parallel_size": 2, "distributed_executor_backend": "ray"},
            "nnodes=2: leave it out, a Ray cluster says how many",
        ),
        ({"nnodes": 2, "data_parallel_size": 2}, "data_parallel_size=2 is of one host"),
        ({"node_rank": 1}, "node_rank=1 is of several hosts, and nnodes=1"),
        ({"coordinator": "a:1"}, "coordinator='a:1' is of several hosts"),
        ({"nnodes": 2, "tensor_parallel_size": 3, "coordinator": "a:1"}, "does not divide among nnodes=2"),
        (
            {"nnodes": 2, "tensor_parallel_size": 2, "coordinator": "a:1", "node_rank": 2},
            "node_rank must be less than nnodes=2",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], reason: str) -> None:
    from pjengine.config import EngineConfig

    with pytest.raises(ValueError, match=reason):
        EngineConfig(model="demo", **settings)


def test_ray_that_is_not_installed_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from pjengine import LLM

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"needs Ray: pip install 'pjengine\[ray\]'"):
        LLM("demo", distributed_executor_backend="ray")


def test_a_layout_travels_as_json_and_one_with_functions_does_not() -> None:
    from pjengine.activation_edits import EditChain, EditRoom
    from pjengine.batching import Layout
    from pjengine.draw import DrawLayout
    from pjengine.edit_sizes import EditSizes
    from pjengine.host_messages import layout_fields, read_layout

    for layout in (Layout(32, 4, 16, True, num_prompt_top=2), DrawLayout(4, EditSizes(num_bias=2), 2)):
        assert read_layout(json.loads(json.dumps(layout_fields(layout)))) == layout
    with pytest.raises(ValueError, match="logits processors cannot be named to other hosts"):
        layout_fields(DrawLayout(4, EditSizes(chains=((print,),))))
    with pytest.raises(ValueError, match="activation edits cannot be named to other hosts"):
        layout_fields(Layout(32, 4, 16, True, edit_room=EditRoom((EditChain(()),), 1)))
    all_damaged: list[Any] = [{}, [], {**layout_fields(Layout(32, 4, 16, True)), "num_tokens": "32"}]
    for damaged in all_damaged:
        with pytest.raises(ValueError, match=r"wanted the fields of Layout|must be a number"):
            read_layout(damaged)
