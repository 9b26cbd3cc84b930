"""The command line. The only place that sets up logging."""

import argparse
import dataclasses
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pjengine
from pjengine.config import EngineConfig
from pjengine.sampling_params import SamplingParams
from pjengine.serving.batch_command import add_run_batch
from pjengine.serving.bench_commands import add_bench
from pjengine.serving.bench_serve_command import add_bench_serve
from pjengine.serving.chat_commands import add_chat, add_complete
from pjengine.serving.collect_env_command import add_collect_env
from pjengine.serving.determinism_commands import add_replay, add_verify_determinism
from pjengine.serving.options import (
    ENGINE_OPTIONS,
    HOST_OPTIONS,
    RECORD,
    SAMPLING_OPTIONS,
    TOKENIZER_OPTIONS,
    Parser,
    add_engine_options,
    add_options,
    check_utf8,
    given,
)
from pjengine.serving.serve_command import add_serve

MAX_TOKENS = 128  # of `generate`, where nobody says; SamplingParams' own 16 are few for a person who reads


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 2 for what the caller can mend."""
    begun = time.perf_counter()
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(argv)
    args.begun, args.command_line = begun, shlex.join(["pjengine", *_without_keys(argv)])
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("pjengine").setLevel(logging.INFO if args.verbose else logging.WARNING)
    try:
        status = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush at exit
        return 141
    except (ValueError, OSError, NotImplementedError) as error:
        return _refuse(error)
    except RuntimeError as error:
        from pjengine.hosts import HostLostError

        if isinstance(error, HostLostError):
            print(f"pjengine: {error}", file=sys.stderr)
            return 1
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _refuse(f"the device is out of memory: {str(error).splitlines()[0]}")
    except KeyboardInterrupt:
        return 130
    return status or 0


def _without_keys(argv: Sequence[str]) -> list[str]:
    """The command line as a result may show it."""
    shown = [re.sub("^--api-key=.*", "--api-key=...", arg) for arg in argv]
    return ["..." if before == "--api-key" else arg for before, arg in pairwise(["", *shown])]


def _refuse(reason: object) -> int:
    print(f"pjengine: {reason}", file=sys.stderr)
    return 2


def _parser() -> Parser:
    parser = Parser(prog="pjengine", description="LLM inference in JAX on NVIDIA GPUs, or a CPU.")
    parser.add_argument("--version", action="version", version=f"pjengine {pjengine.__version__}")
    commands = parser.add_commands("COMMAND")
    add_serve(commands)
    _add_generate(commands)
    add_chat(commands)
    add_complete(commands)
    add_run_batch(commands)
    add_bench_serve(add_bench(commands))
    add_verify_determinism(commands)
    add_replay(commands)
    _add_plan(commands)
    add_collect_env(commands)
    return parser


def _add_plan(commands: Any) -> None:
    command = commands.add_parser(
        "plan",
        help="what a model takes of a GPU's memory",
        usage="%(prog)s [options] MODEL",
        description="Shows how an engine would divide a GPU's memory. Needs neither the GPU nor weights.",
    )
    command.set_defaults(run=_plan)
    command.add_argument("model", metavar="MODEL", help='folder, Hub id, "demo", or a shape such as llama-8b')
    command.add_argument("--gpu", metavar="NAME", default="h200", help="the card, such as h100 or l4")
    add_engine_options(command)


def _plan(args: argparse.Namespace) -> None:
    from pjengine.planning import plan_without_device

    config = EngineConfig(model=args.model, **given(args, ENGINE_OPTIONS))
    print(plan_without_device(config, args.gpu).table())
    if config.data_parallel_size > 1:
        num_devices = config.data_parallel_size * config.tensor_parallel_size
        print(f"of {config.data_parallel_size} engines on {num_devices} devices, each device as above")


def _add_generate(commands: Any) -> None:
    command = commands.add_parser(
        "generate",
        help="complete prompts",
        usage="%(prog)s [options] MODEL",
        description="Completes prompts. The text goes to standard output, its speed to standard error.",
    )
    command.set_defaults(run=_generate)
    command.add_argument("model", metavar="MODEL", help='folder, Hub id, or "demo" for the packaged model')
    command.add_argument(
        "--prompt",
        metavar="TEXT",
        action="append",
        help="may be given several times (default: standard input, less the newline at its end)",
    )
    command.add_argument("--stream", action="store_true", help="show the text while it is generated")
    sampling = command.add_argument_group("sampling")
    sampling.add_argument(
        "--max-tokens",
        metavar="N",
        type=int,
        help=f"tokens to generate for each prompt, unless the model says how many (default: {MAX_TOKENS})",
    )
    sampling.add_argument(
        "--stop", metavar="TEXT", action="append", help="end before this text; may be given several times"
    )
    add_options(sampling, SAMPLING_OPTIONS, SamplingParams)
    engine = add_engine_options(command, *TOKENIZER_OPTIONS, *HOST_OPTIONS, RECORD)
    engine.add_argument(
        "--warm-up",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compile every program at the start, not each when it is first needed (default: off)",
    )


def _generate(args: argparse.Namespace) -> int:
    asked = {**given(args, SAMPLING_OPTIONS), "max_tokens": args.max_tokens, "stop": args.stop}
    asked = {name: value for name, value in asked.items() if value is not None}
    SamplingParams(**asked)  # refuses before jax is loaded, as the next line does
    settings = given(args, (*ENGINE_OPTIONS, *TOKENIZER_OPTIONS, *HOST_OPTIONS, RECORD))
    bars = sys.stderr.isatty()
    config = EngineConfig(model=args.model, warm_up=args.warm_up, use_tqdm_on_load=bars, **settings)
    if config.node_rank > 0:  # the head's prompts count
        from pjengine.follower import follow

        return follow(config)
    prompts = args.prompt or [_read_prompt()]
    for prompt in prompts:
        check_utf8(prompt)
    from pjengine.stats import read_stats

    with pjengine.LLM(**vars(config)) as llm:
        params = _laid_over(llm.get_default_sampling_params(), asked)
        ready, compile_s = time.perf_counter(), read_stats(llm.engine).compile_s
        if args.stream:
            num_tokens = _show(llm.stream(prompts, params), prompts)
        else:
            outputs = llm.generate(prompts, params, use_tqdm=bars)
            num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            for prompt, output in zip(prompts, outputs, strict=True):
                print(prompt + output.outputs[0].text)
        # Programs that were compiled on the way count as start-up: a second prompt finds them ready.
        compiled_late_s = read_stats(llm.engine).compile_s - compile_s
        elapsed = time.perf_counter() - ready - compiled_late_s
        start_s = ready - args.begun + compiled_late_s
    print(
        f"\nstart-up {start_s:.1f} s, of it compilation {compile_s + compiled_late_s:.1f} s; "
        f"{num_tokens} tokens in {elapsed:.2f} s: {num_tokens / elapsed:.1f} tokens/s",
        file=sys.stderr,
    )
    return 0


def _laid_over(defaults: SamplingParams, asked: Mapping[str, Any]) -> SamplingParams:
    """What the caller asks for, over what the model says."""
    is_open = defaults.max_tokens == SamplingParams().max_tokens
    own = {"max_tokens": MAX_TOKENS} if is_open else {}
    return dataclasses.replace(defaults, **{**own, **asked})


def _read_prompt() -> str:
    if sys.stdin.isatty():
        print("pjengine: type the prompt; Ctrl-D ends it", file=sys.stderr)
    return sys.stdin.read().removesuffix("\n")


def _show(chunks: Iterable["pjengine.CompletionChunk"], prompts: Sequence[str]) -> int:
    """Prints completions one below the other as they grow; returns their number of tokens.

    All run at once: the text of the second one waits until the first is complete.
    """
    unseen = list(prompts)
    is_finished = [False] * len(prompts)
    current = num_tokens = 0

    def catch_up() -> None:
        nonlocal current
        while current < len(prompts):
            print(unseen[current], end="", flush=True)
            unseen[current] = ""
            if not is_finished[current]:
                return
            print(flush=True)
            current += 1

    catch_up()
    for chunk in chunks:
        num_tokens += len(chunk.token_ids)
        unseen[chunk.index] += chunk.text
        is_finished[chunk.index] = chunk.finish_reason is not None
        catch_up()
    return num_tokens


if __name__ == "__main__":
    sys.exit(main())
