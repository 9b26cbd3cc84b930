"""`pjengine serve`: its options, and what they come to."""

import argparse
import json
import logging
import sys
from typing import Any

from pjengine.config import EngineConfig, api_keys
from pjengine.serving.options import (
    CHAT_TEMPLATE,
    ENGINE_OPTIONS,
    HOST_OPTIONS,
    RECORD,
    TOKENIZER_OPTIONS,
    Option,
    add_neutral_options,
    add_options,
    given,
    json_object,
    positive,
)
from pjengine.serving.reasoning import REASONING_PARSERS
from pjengine.serving.server_config import ServerConfig
from pjengine.serving.tool_parsers import TOOL_PARSERS

logger = logging.getLogger(__name__)

_SWITCH = {"action": "store_true"}


def json_list(text: str) -> tuple[str, ...]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid JSON: {error}") from error
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise argparse.ArgumentTypeError(f"a JSON list of strings is needed, such as '[\"*\"]', got {text!r}")
    return tuple(value)


_SERVED_MODEL = (
    CHAT_TEMPLATE,
    RECORD,
    Option("skip_tokenizer_init", _SWITCH, "", "do without a tokenizer: prompts must be token ids"),
    Option("warm_up", argparse.BooleanOptionalAction, "", "compile every program at the start"),
)
_NETWORK = (
    Option("host", str, "HOST", "address to serve on; 0.0.0.0: all of this machine's"),
    Option("port", int, "N", "port to serve on; 0: any that is free"),
    Option("uds", str, "PATH", "Unix socket to serve on, in place of host and port"),
    Option("root_path", str, "PATH", "path under which a proxy shows the server"),
    Option("ssl_keyfile", str, "FILE", "private key: serve over TLS"),
    Option("ssl_certfile", str, "FILE", "certificate that goes with it"),
    Option("max_request_bytes", positive, "N", "largest body that is taken"),
    Option("request_timeout_s", float, "X", "seconds a request may take (default: any)", "--request-timeout"),
    Option(
        "max_waiting", int, "N", "continuations that may wait beyond those that run (default: any number)"
    ),
    Option(
        "max_sequences_per_request",
        positive,
        "N",
        "continuations that one request may ask for: prompts x n (default: 8 x those that run, at least 128)",
    ),
    Option(
        "shutdown_timeout_s", float, "X", "seconds for requests to end after SIGTERM", "--shutdown-timeout"
    ),
)
_ACCESS = (
    Option(
        "api_keys",
        {"action": "append", "metavar": "KEY"},
        "",
        "key that clients must send; may be given several times (default: $PJENGINE_API_KEY)",
        "--api-key",
    ),
    Option("allowed_origins", json_list, "JSON", "list of web origins whose pages may call (default: none)"),
    Option("allowed_methods", json_list, "JSON", "list of methods that they may use (default: all)"),
    Option("allowed_headers", json_list, "JSON", "list of headers that they may send (default: all)"),
    Option("allow_credentials", _SWITCH, "", "let them send cookies and keys of the browser"),
    Option(
        "trust_request_chat_template", _SWITCH, "", "take chat templates from requests: they are programs"
    ),
)
API_OPTIONS = (
    Option(
        "served_model_names",
        {"nargs": "+", "metavar": "NAME"},
        "",
        "names of the model in the API, the first in answers (default: MODEL)",
        "--served-model-name",
    ),
    Option("response_role", str, "ROLE", "role of the messages that answer"),
    Option("default_chat_template_kwargs", json_object, "JSON", "object of variables for the chat template"),
    Option("enable_auto_tool_choice", _SWITCH, "", "let the model decide whether it calls tools"),
    Option("tool_call_parser", str, "NAME", f"how the model writes tool calls: {', '.join(TOOL_PARSERS)}"),
    Option(
        "exclude_tools_when_tool_choice_none",
        _SWITCH,
        "",
        "keep tools from the chat template where none may be called",
    ),
    Option(
        "reasoning_parser",
        str,
        "NAME",
        f"split the model's reasoning from its answers: {', '.join(REASONING_PARSERS)}",
    ),
    Option("return_tokens_as_token_ids", _SWITCH, "", 'write tokens in logprobs as "token_id:17"'),
    Option("enable_request_id_headers", _SWITCH, "", "answer with an X-Request-Id header"),
)
_LOGS = (
    Option("enable_log_requests", _SWITCH, "", "log each request when it comes and when it ends"),
    Option("disable_log_stats", _SWITCH, "", "do without the line of figures every 10 seconds"),
    Option(
        "metrics_prefix", str, "NAME", "prefix of the names in /metrics; vllm: for dashboards made for vLLM"
    ),
    Option("uvicorn_log_level", str, "LEVEL", "critical, error, warning, info, debug or trace"),
    Option("disable_uvicorn_access_log", _SWITCH, "", "do without a line for each answer"),
)
_SERVER_OPTIONS = (*_NETWORK, *_ACCESS, *API_OPTIONS, *_LOGS)
MODEL_OPTIONS = (*ENGINE_OPTIONS, *TOKENIZER_OPTIONS, *HOST_OPTIONS, *_SERVED_MODEL)


def add_serve(commands: Any) -> None:
    """Adds the command."""
    command = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        usage="%(prog)s [options] MODEL",
        description="Serves a model over HTTP, as OpenAI's API. SIGTERM lets running requests end first.",
    )
    command.set_defaults(run=_serve, verbose=True)
    command.add_argument(
        "positional_model",
        metavar="MODEL",
        nargs="?",
        help='folder, Hub id, or "demo" for the packaged model',
    )
    command.add_argument("--model", metavar="MODEL", help="the same, as an option")
    command.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of options, such as 'port: 8001'; those given here come first",
    )
    for title, options in (("network", _NETWORK), ("access", _ACCESS), ("API", API_OPTIONS), ("logs", _LOGS)):
        add_options(command.add_argument_group(title), options, ServerConfig)
    add_options(command.add_argument_group("engine"), MODEL_OPTIONS, EngineConfig)
    add_neutral_options(command)


def _serve(args: argparse.Namespace) -> int:
    named = {name for name in (args.positional_model, args.model) if name is not None}
    if len(named) != 1:
        raise ValueError(f"one MODEL is needed, got {' and '.join(sorted(named)) or 'none'}")
    (model,) = named
    # Both refuse before jax is loaded.
    engine_config = EngineConfig(
        model=model, use_tqdm_on_load=sys.stderr.isatty(), **given(args, MODEL_OPTIONS)
    )
    options = given(args, _SERVER_OPTIONS)
    if "api_keys" in options and api_keys():
        logger.warning("--api-key takes the place of PJENGINE_API_KEY, whose key lets nobody in")
    config = ServerConfig(**{"api_keys": api_keys(), **options})
    if engine_config.node_rank > 0:
        from pjengine.follower import follow

        return follow(engine_config)
    from pjengine.serving.server import serve

    return serve(engine_config, config)
