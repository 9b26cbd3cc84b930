"""`pjengine run-batch`: a file of requests, answered without a server."""

import argparse
import sys
from pathlib import Path
from typing import Any

from pjengine.config import EngineConfig
from pjengine.serving.options import add_neutral_options, add_options, given, positive
from pjengine.serving.serve_command import API_OPTIONS, MODEL_OPTIONS
from pjengine.serving.server_config import ServerConfig

# Of what can be chosen about the API, all but what only a connection shows.
_API_OPTIONS = tuple(option for option in API_OPTIONS if option.field != "enable_request_id_headers")


def add_run_batch(commands: Any) -> None:
    """Adds the command."""
    command = commands.add_parser(
        "run-batch",
        help="answer a file of requests",
        usage="%(prog)s [options] -i FILE -o FILE MODEL",
        description="Answers a file of requests in the format of OpenAI's batches: JSON lines of custom_id, "
        "method, url (/v1/completions, /v1/chat/completions or /v1/embeddings) and body. The answers come in "
        "the order in which they are ready. Run again, it goes on with what has no answer yet.",
    )
    command.set_defaults(run=_run_batch)
    command.add_argument("model", metavar="MODEL", help='folder, Hub id, or "demo" for the packaged model')
    command.add_argument("-i", "--input-file", metavar="FILE", required=True, help="the requests")
    command.add_argument(
        "-o", "--output-file", metavar="FILE", required=True, help="the answers, which are added to it"
    )
    command.add_argument(
        "--max-in-flight",
        metavar="N",
        type=positive,
        help="requests that are given to the engine at once (default: twice --max-num-seqs)",
    )
    add_options(command.add_argument_group("API"), _API_OPTIONS, ServerConfig)
    add_options(command.add_argument_group("engine"), MODEL_OPTIONS, EngineConfig)
    command.add_argument("--verbose", action="store_true", help="log what happens, to standard error")
    add_neutral_options(command)


def _run_batch(args: argparse.Namespace) -> int:
    bars = sys.stderr.isatty()
    config = EngineConfig(model=args.model, use_tqdm_on_load=bars, **given(args, MODEL_OPTIONS))
    server_config = ServerConfig(**given(args, _API_OPTIONS))
    for name, path in (("--input-file", args.input_file), ("--output-file", args.output_file)):
        if "://" in path:
            raise ValueError(f"{name} must be a file of this machine, got {path!r:.200}")
    if config.node_rank > 0:  # the head reads the requests
        from pjengine.follower import follow

        return follow(config)
    from pjengine.serving.batch import run_batch

    source, output = Path(args.input_file), Path(args.output_file)
    return run_batch(config, server_config, source, output, max_in_flight=args.max_in_flight)
