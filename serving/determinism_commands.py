"""`pjengine verify-determinism` and `pjengine replay`: whether this machine gives the same bits again."""

import argparse
import json
import sys
from typing import Any

from pjengine.config import EngineConfig
from pjengine.serving.bench_commands import check_output, report
from pjengine.serving.options import ENGINE_OPTIONS, add_engine_options, given, positive


def add_verify_determinism(commands: Any) -> None:
    """Adds the command."""
    command = commands.add_parser(
        "verify-determinism",
        help="try whether requests get the same bits in any batch",
        usage="%(prog)s [options] MODEL",
        description="Runs requests alone, then in random mixes with others, with prompts cut and cached and "
        "requests preempted, and compares tokens and logprobs bit for bit. Status 0: all are the same; 1: "
        "some are not. The engine is one of --deterministic; --no-deterministic shows what others do.",
    )
    command.set_defaults(run=_verify)
    command.add_argument("model", metavar="MODEL", help='folder, Hub id, "demo", or a shape such as llama-8b')
    command.add_argument("--num-mixes", metavar="N", type=positive, default=200, help="random mixes")
    command.add_argument("--mix-seed", metavar="N", type=int, default=0, help="seed of all that is random")
    command.add_argument("--output", metavar="FILE", help="append the result to this file too")
    add_engine_options(command)


def _verify(args: argparse.Namespace) -> int:
    settings = {"deterministic": True, **given(args, ENGINE_OPTIONS)}
    config = EngineConfig(model=args.model, skip_tokenizer_init=True, warm_up=False, **settings)
    if config.data_parallel_size > 1:
        raise ValueError("verify-determinism tries one engine: leave --data-parallel-size out")
    check_output(args.output)
    from pjengine.determinism import KINDS, verify_determinism
    from pjengine.engine import LLMEngine
    from pjengine.progress import progress_bar

    engine = LLMEngine(config)
    try:
        with progress_bar("Mixes", unit=" mixes", is_shown=sys.stderr.isatty()) as show:
            found = verify_determinism(engine, num_mixes=args.num_mixes, seed=args.mix_seed, show=show)
    finally:
        engine.close()
    rows = " and ".join(map(str, sorted(found.num_steps)))
    summary = (
        f"{found.num_mixes} mixes, {found.num_compared} requests compared with what they get alone "
        f"({found.num_preempted} preempted, {found.num_cached} with a cached beginning, {found.num_cut} cut)"
        f", {found.num_tokens} tokens, in decodes of {rows} rows: {found.num_differences} differ"
    )
    if found.first is not None:
        kind = KINDS[found.first.request]
        summary += f"; the first in mix {found.first_mix}, {found.first_limits}: {kind}: {found.first}"
    report(args, {"bench": "verify-determinism", "settings": settings, **found.as_json}, summary)
    return 1 if found.num_differences else 0


def add_replay(commands: Any) -> None:
    """Adds the command."""
    command = commands.add_parser(
        "replay",
        help="run a recording again and compare",
        usage="%(prog)s [options] FILE",
        description="Runs what `--record FILE` wrote again, each request before the same step as then, and "
        "compares tokens and logprobs bit for bit. Status 0: all are the same; 1: some are not; 2: the "
        "model, a version, the device or a setting is another one, or the file is damaged.",
    )
    command.set_defaults(run=_replay)
    command.add_argument("file", metavar="FILE", help="the recording")
    command.add_argument("--model", metavar="MODEL", help="where the model is now (default: where it was)")
    command.add_argument("--output", metavar="FILE", help="append the result to this file too")
    command.add_argument("--verbose", action="store_true", help="log what happens, to standard error")


def _replay(args: argparse.Namespace) -> int:
    check_output(args.output)
    from pjengine.recording_reader import read_recording
    from pjengine.replay import replay

    found = replay(read_recording(args.file), model=args.model)
    line = json.dumps({"replay": args.file, **found.as_json})
    print(line)
    if args.output:
        with open(args.output, "a") as file:
            file.write(line + "\n")
    summary = f"{found.num_requests} requests, {found.num_tokens} tokens: {found.num_differences} differ"
    if found.num_unended:
        summary += f"; of {found.num_unended} more the recording has no end"
    if found.is_cut_short:
        summary += "; the recording ends with a step that failed"
    if found.first is not None:
        summary += f"; the first: {found.first}"
    print(summary, file=sys.stderr)
    return 1 if found.num_differences else 0
