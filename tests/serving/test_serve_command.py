"""`pjengine serve`: what its options come to, before anything is started."""

from pathlib import Path
from typing import Any

import pytest

Started = list[tuple[Any, Any]]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """The configurations of servers that would have been started."""
    from pjengine.serving import server

    calls: Started = []

    def serve(engine_config: Any, config: Any) -> int:
        calls.append((engine_config, config))
        return 0

    monkeypatch.setattr(server, "serve", serve)
    monkeypatch.delenv("PJENGINE_API_KEY", raising=False)
    return calls


def pjengine(*argv: str | Path) -> int:
    from pjengine.serving.cli import main

    try:
        return main(["serve", *map(str, argv)])
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code


def test_without_options_it_serves_this_machine_alone(started: Started) -> None:
    from pjengine import EngineConfig
    from pjengine.serving.server_config import ServerConfig

    assert pjengine("demo") == 0
    assert started == [(EngineConfig(model="demo"), ServerConfig())]
    _, config = started[0]
    assert (config.host, config.port, config.is_open, config.api_keys) == ("127.0.0.1", 8000, False, ())


def test_options_reach_the_engine_and_the_server(started: Started, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages }}")
    argv = "demo --host 0.0.0.0 --port 81 --max-model-len 512 --served-model-name a b --api-key x --api-key y"
    more = "--request-timeout 2.5 --shutdown-timeout 0 --max-waiting 0 --enable-log-requests --no-warm-up"
    json_ones = ["--allowed-origins", '["*"]', "--default-chat-template-kwargs", '{"a": 1}']
    assert pjengine(*argv.split(), *more.split(), *json_ones, "--chat-template", template) == 0
    [(engine, config)] = started
    assert (engine.max_model_len, engine.warm_up, engine.chat_template) == (512, False, "{{ messages }}")
    assert (config.host, config.port, config.is_open) == ("0.0.0.0", 81, False)  # there are keys
    assert (config.served_model_names, config.api_keys) == (("a", "b"), ("x", "y"))
    assert (config.request_timeout_s, config.shutdown_timeout_s, config.max_waiting) == (2.5, 0, 0)
    assert config.enable_log_requests and config.allowed_origins == ("*",)
    assert config.default_chat_template_kwargs == {"a": 1}
    assert "x" not in repr(config.api_keys[1]) and "api_keys" not in repr(config)


@pytest.mark.parametrize("command", [("serve",), ("run-batch", "-i", "a", "-o", "b")])
@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("-pp 2", "-pp 2 is not supported yet: only 1"),
        ("--pipeline-parallel-size=2", "--pipeline-parallel-size 2 is not supported yet: only 1"),
        ("--quantization fp8", "--quantization fp8 is not supported yet: leave it out"),
        ("--trust-remote-code", "only --no-trust-remote-code: checkpoints run no code here"),
        ("--enforce-eager", "--enforce-eager is not supported yet: only --no-enforce-eager"),
        ("--no-enable-chunked-prefill", "only --enable-chunked-prefill"),
        ("--kv-cache-dtype fp8", "--kv-cache-dtype fp8 is not supported yet: only auto"),
    ],
)
def test_what_is_not_here_is_refused_by_the_name_that_vllm_has_for_it(
    command: tuple[str, ...], option: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from pjengine.serving.cli import main

    with pytest.raises(SystemExit) as end:
        main([*command, "demo", *option.split()])
    assert end.value.code == 2 and reason in capsys.readouterr().err


def test_options_that_ask_for_nothing_are_taken(started: Started, tmp_path: Path) -> None:
    from pjengine import EngineConfig

    argv = "--tensor-parallel-size 1 -pp 1 -dp 1 --no-trust-remote-code --no-enforce-eager --swap-space 0"
    more = "--enable-chunked-prefill --kv-cache-dtype auto --disable-log-stats"
    file = tmp_path / "serve.yaml"
    file.write_text("trust-remote-code: false\nenable-chunked-prefill: true\ntensor-parallel-size: 1\n")
    assert pjengine("demo", "-tp", "1", *argv.split(), *more.split(), "--config", file) == 0
    [(engine, config)] = started
    assert engine == EngineConfig(model="demo") and config.disable_log_stats


def test_the_environment_may_hold_the_key(
    started: Started, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PJENGINE_API_KEY", "of the environment")
    assert pjengine("demo") == 0 and "PJENGINE_API_KEY" not in caplog.text
    assert pjengine("demo", "--api-key", "given") == 0
    assert "--api-key takes the place of PJENGINE_API_KEY" in caplog.text
    assert "of the environment" not in caplog.text
    assert [config.api_keys for _, config in started] == [("of the environment",), ("given",)]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_addresses_are_not_open(host: str) -> None:
    from pjengine.serving.server_config import ServerConfig

    assert not ServerConfig(host=host).is_open and not ServerConfig(host="0.0.0.0", uds="x").is_open


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_all_others_are(host: str) -> None:
    from pjengine.serving.server_config import ServerConfig

    assert ServerConfig(host=host).is_open and not ServerConfig(host=host, api_keys=("x",)).is_open


def test_a_file_may_hold_the_options_and_the_command_line_comes_first(
    started: Started, tmp_path: Path
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(
        "model: demo\nport: 81\nmax-num-seqs: 3\nenable_log_requests: true\ndisable-log-stats: false\n"
        "enable-prefix-caching: false\nwarm-up: true\nserved-model-name: [a, b]\napi-key: [x, y]\n"
        'allowed-origins: ["*"]\nhf-overrides: {num_hidden_layers: 1}\nmax-model-len: -1\n'
        "enable-auto-tool-choice: true\ntool-call-parser: qwen3_xml\nreasoning-parser: qwen3\n"
    )
    assert pjengine("--config", file, "--port", "82") == 0
    [(engine, config)] = started
    assert (engine.model, engine.max_num_seqs, engine.hf_overrides) == ("demo", 3, {"num_hidden_layers": 1})
    assert (engine.enable_prefix_caching, engine.warm_up, engine.max_model_len) == (False, True, None)
    assert (config.port, config.served_model_names, config.api_keys) == (82, ("a", "b"), ("x", "y"))
    assert config.allowed_origins == ("*",) and config.enable_auto_tool_choice
    assert (config.tool_call_parser, config.reasoning_parser) == ("qwen3_xml", "qwen3")
    assert (config.enable_log_requests, config.disable_log_stats) == (True, False)


BAD_FILES = {
    "unknown": ("prot: 81", "no such option: --prot; did you mean --port?"),
    "unknown switch": ("warmup: false", "no such option: --warmup; did you mean --warm-up?"),
    "no value": ("max-waiting: false", "--max-waiting: invalid int value: 'false'"),
    "no object": ("- a", "must hold one object, such as 'port: 8000', got list"),
    "no YAML": ("a: [", "is not valid YAML"),
    "another file": ("config: b.yaml", "must not name another file of options"),
}


@pytest.mark.parametrize(("text", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_wrong_is_one_line_and_status_2(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], started: Started
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    assert pjengine("demo", "--config", file) == 2 and not started
    assert message in capsys.readouterr().err


BAD_OPTIONS = {
    "no model": ((), "one MODEL is needed, got none"),
    "two models": (("demo", "--model", "other"), "one MODEL is needed, got demo and other"),
    "mistyped": (("demo", "--prot", "1"), "no such option: --prot; did you mean --port?"),
    "no file": (("demo", "--config", "no/such.yaml"), "No such file or directory"),
    "port": (("demo", "--port", "70000"), "port must be in [0, 65535], got 70000"),
    "half of TLS": (("demo", "--ssl-keyfile", "x"), "ssl_keyfile and ssl_certfile go together"),
    "empty key": (("demo", "--api-key", ""), "an api_key must not be empty"),
    "origins": (("demo", "--allowed-origins", "*"), "'*' is not valid JSON"),
    "origins, no list": (("demo", "--allowed-origins", '"*"'), "a JSON list of strings is needed"),
    "timeout": (("demo", "--request-timeout", "0"), "request_timeout_s must be above 0, got 0"),
    "not a number": (("demo", "--shutdown-timeout", "nan"), "shutdown_timeout_s must be at least 0, got nan"),
    "waiting": (("demo", "--max-waiting", "-1"), "max_waiting must be at least 0, got -1"),
    "sequences": (("demo", "--max-sequences-per-request", "0"), "whole number of at least 1 is needed"),
    "prefix": (("demo", "--metrics-prefix", "a-b"), "metrics_prefix must be a name"),
    "tools": (
        ("demo", "--tool-call-parser", "hermez"),
        "tool_call_parser must be one of hermes",
    ),
    "auto": (("demo", "--enable-auto-tool-choice"), "enable_auto_tool_choice needs tool_call_parser"),
    "reasoning": (("demo", "--reasoning-parser", "r1"), "reasoning_parser must be one of deepseek_r1, qwen3"),
    "level": (("demo", "--uvicorn-log-level", "loud"), "uvicorn_log_level must be one of critical"),
    "template": (("demo", "--chat-template", "no/such"), "no/such: No such file or directory"),
    "engine": (("demo", "--max-num-seqs", "0"), "max_num_seqs must be a whole number of at least 1"),
}


@pytest.mark.parametrize(("argv", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_a_wrong_option_is_one_line_and_status_2(
    argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], started: Started
) -> None:
    assert pjengine(*argv) == 2 and not started
    err = capsys.readouterr().err
    assert message in err and err.startswith("pjengine: ") and err.count("\n") == 1


def test_a_certificate_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "key").write_text("no key")
    files = ("--ssl-keyfile", tmp_path / "key", "--ssl-certfile", tmp_path / "key")
    assert pjengine("./no-such-model", *files) == 2
    assert "PEM" in capsys.readouterr().err


def test_help_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert pjengine("--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "--api-key KEY",
        "(default: 127.0.0.1)",
        "(default: 8000)",
        "--served-model-name NAME",
        "network:",
    ):
        assert part in text
    assert "(default: ())" not in text and "default: False" not in text
