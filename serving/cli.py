"""The command line. The only place that sets up logging."""

import argparse
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pjengine
from pjengine.bench import DEFAULT_NUM_REQUESTS, WORKLOADS
from pjengine.config import EngineConfig
from pjengine.sampling_params import SamplingParams
from pjengine.serving.options import (
    ENGINE_OPTIONS,
    SAMPLING_OPTIONS,
    TOKENIZER_OPTIONS,
    Option,
    Parser,
    add_options,
    given,
    positive,
)

MAX_TOKENS = 128  # of `generate`; SamplingParams' own 16 are few for a person who reads along


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 2 for what the caller can mend."""
    begun = time.perf_counter()
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(argv)
    args.begun, args.command_line = begun, shlex.join(["pjengine", *argv])
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("pjengine").setLevel(logging.INFO if args.verbose else logging.WARNING)
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush at exit
        return 141
    except (ValueError, OSError, NotImplementedError) as error:
        return _refuse(error)
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _refuse(f"the device is out of memory: {str(error).splitlines()[0]}")
    except KeyboardInterrupt:
        return 130
    return 0


def _refuse(reason: object) -> int:
    print(f"pjengine: {reason}", file=sys.stderr)
    return 2


def _parser() -> Parser:
    parser = Parser(prog="pjengine", description="LLM inference in JAX on NVIDIA GPUs, or a CPU.")
    parser.add_argument("--version", action="version", version=f"pjengine {pjengine.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_plan(commands)
    bench = commands.add_parser(
        "bench",
        help="measure speed",
        description="Measures speed on prompts of random tokens. One JSON object for each result goes to "
        "standard output, a line for people to standard error.",
    )
    kinds = bench.add_subparsers(required=True, metavar="WHAT")
    _add_throughput(kinds)
    _add_latency(kinds)
    _add_startup(kinds)
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
    _add_engine_options(command)


def _plan(args: argparse.Namespace) -> int:
    from pjengine.planning import plan_without_device

    config = EngineConfig(model=args.model, **given(args, ENGINE_OPTIONS))
    print(plan_without_device(config, args.gpu).table())
    return 0


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
        "--max-tokens", metavar="N", type=int, default=MAX_TOKENS, help="tokens to generate for each prompt"
    )
    sampling.add_argument(
        "--stop", metavar="TEXT", action="append", help="end before this text; may be given several times"
    )
    add_options(sampling, SAMPLING_OPTIONS, SamplingParams)
    engine = _add_engine_options(command, *TOKENIZER_OPTIONS)
    engine.add_argument(
        "--warm-up",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compile every program at the start, not each when it is first needed (default: --no-warm-up)",
    )


def _add_bench(kinds: Any, name: str, run: Any, *, help: str, description: str) -> argparse.ArgumentParser:
    """What the kinds of benchmark share."""
    command: argparse.ArgumentParser = kinds.add_parser(
        name, help=help, description=description, usage="%(prog)s (--model MODEL | --shape SHAPE) [options]"
    )
    command.set_defaults(run=run)
    model = command.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", metavar="MODEL", help='folder, Hub id, or "demo"')
    model.add_argument(
        "--shape",
        metavar="SHAPE",
        help="random weights in a named shape, with --load-format dummy: "
        "llama-8b, llama2-13b, opt-125m-llama or tiny",
    )
    command.add_argument("--output", metavar="FILE", help="append the results to this file too")
    _add_engine_options(command)
    return command


def _add_throughput(kinds: Any) -> None:
    command = _add_bench(
        kinds,
        "throughput",
        _throughput,
        help="requests and tokens per second of a workload",
        description="Submits all requests of a workload at once and measures until the last one is answered.",
    )
    command.add_argument(
        "--workload", metavar="NAME", choices=WORKLOADS, default="sharegpt-like", help=" or ".join(WORKLOADS)
    )
    sizes = ", ".join(f"{count} for {name}" for name, count in DEFAULT_NUM_REQUESTS.items())
    command.add_argument("--num-requests", metavar="N", type=positive, help=f"(default: {sizes})")
    command.add_argument("--temperature", metavar="X", type=float, default=1.0, help="of all requests")
    command.add_argument("--repeats", metavar="N", type=positive, default=1, help="runs, for the median")


def _add_latency(kinds: Any) -> None:
    command = _add_bench(
        kinds,
        "latency",
        _latency,
        help="time per output token of a greedy batch",
        description="Times greedy batches: TPOT = (T(output-len tokens) - T(1 token)) / (output-len - 1).",
    )
    command.add_argument(
        "--batch-size",
        metavar="N",
        type=positive,
        nargs="+",
        default=[1, 8, 32, 128, 256],
        help="one result for each (default: 1 8 32 128 256)",
    )
    command.add_argument(
        "--prompt-len", metavar="N", type=positive, default=512, help="tokens of each prompt"
    )
    command.add_argument(
        "--output-len", metavar="N", type=positive, default=128, help="tokens of each answer"
    )
    command.add_argument("--repeats", metavar="N", type=positive, default=3, help="runs, for the medians")


def _add_startup(kinds: Any) -> None:
    _add_bench(
        kinds,
        "startup",
        _startup,
        help="process start to the first token, cold and warm",
        description="Starts an engine in a fresh process, twice: with an empty compilation cache, then with "
        "what the first run left there. Times from process start to the first token.",
    )


def _add_engine_options(command: argparse.ArgumentParser, *more: Option) -> Any:
    engine = command.add_argument_group("engine")
    add_options(engine, (*ENGINE_OPTIONS, *more), EngineConfig)
    command.add_argument("--verbose", action="store_true", help="log what happens, to standard error")
    return engine


def _generate(args: argparse.Namespace) -> None:
    sampling = given(args, SAMPLING_OPTIONS)
    params = SamplingParams(max_tokens=args.max_tokens, stop=args.stop, **sampling)
    settings = given(args, (*ENGINE_OPTIONS, *TOKENIZER_OPTIONS))
    config = EngineConfig(model=args.model, warm_up=args.warm_up, **settings)  # refuses before jax is loaded
    prompts = args.prompt or [_read_prompt()]
    for prompt in prompts:
        _check_utf8(prompt)
    with pjengine.LLM(**vars(config)) as llm:
        ready, compile_s = time.perf_counter(), llm.engine.runner.compile_s
        if args.stream:
            num_tokens = _show(llm.stream(prompts, params), prompts)
        else:
            outputs = llm.generate(prompts, params, use_tqdm=sys.stderr.isatty())
            num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            for prompt, output in zip(prompts, outputs, strict=True):
                print(prompt + output.outputs[0].text)
        # Programs that were compiled on the way count as start-up: a second prompt finds them ready.
        compiled_late_s = llm.engine.runner.compile_s - compile_s
        elapsed = time.perf_counter() - ready - compiled_late_s
        start_s = ready - args.begun + compiled_late_s
    print(
        f"\nstart-up {start_s:.1f} s, of it compilation {compile_s + compiled_late_s:.1f} s; "
        f"{num_tokens} tokens in {elapsed:.2f} s: {num_tokens / elapsed:.1f} tokens/s",
        file=sys.stderr,
    )


def _read_prompt() -> str:
    if sys.stdin.isatty():
        print("pjengine: type the prompt; Ctrl-D ends it", file=sys.stderr)
    return sys.stdin.read().removesuffix("\n")


def _check_utf8(prompt: str) -> None:
    """Refuses what Python makes of arguments and input that are no UTF-8."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is not UTF-8: {prompt!r:.80}") from error


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


def _throughput(args: argparse.Namespace) -> None:
    from pjengine.bench import throughput

    settings = _bench_settings(args)
    SamplingParams(temperature=args.temperature)  # refuses before the model is loaded
    with pjengine.LLM(**settings, warm_up=False) as llm:  # the benchmark warms up once it has checked
        num_requests = args.num_requests or DEFAULT_NUM_REQUESTS[args.workload]
        workload = WORKLOADS[args.workload](llm.engine.model_config.vocab_size, num_requests)
        result = throughput(llm, workload, temperature=args.temperature, repeats=args.repeats)
    _report(
        args,
        {"bench": args.workload, **result},
        f"{args.workload}, {num_requests} requests: {result['output_tokens_per_s']:,.1f} output tokens/s, "
        f"{result['total_tokens_per_s']:,.1f} total tokens/s, {result['requests_per_s']:,.2f} requests/s "
        f"in {result['elapsed_s']:.2f} s",
    )


def _latency(args: argparse.Namespace) -> None:
    from pjengine.bench import check_batch, latency

    with pjengine.LLM(**_bench_settings(args), warm_up=False) as llm:
        for batch_size in args.batch_size:
            check_batch(llm, batch_size, args.prompt_len, args.output_len)
        for batch_size in args.batch_size:
            result = latency(
                llm, batch_size, prompt_len=args.prompt_len, output_len=args.output_len, repeats=args.repeats
            )
            _report(
                args,
                {"bench": "decode-latency", **result},
                f"batch {batch_size}: {result['tpot_ms']:.3f} ms per output token (spread "
                f"{result['tpot_spread_ms']:.3f}), {result['output_tokens_per_s']:,.1f} tokens/s, "
                f"first token after {result['first_token_ms']:.1f} ms",
            )


def _startup(args: argparse.Namespace) -> None:
    from pjengine.bench import startup

    # Both runs end before this process touches the device itself, which `_report` does.
    for result in list(startup(_bench_settings(args))):
        parts = ", ".join(f"{name} {result[f'{name}_s']:.2f}" for name in ("import", "weights", "compile"))
        _report(
            args,
            {"bench": "startup", **result},
            f"{result['kind']} start: {result['total_s']:.2f} s to the first token ({parts}, "
            f"first token {result['first_token_s']:.2f})",
        )


def _bench_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Settings of the engine, checked as far as that needs neither weights nor a device."""
    from pjengine.bench import check_shape

    settings = {
        "model": args.model or args.shape,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,  # a prompt that is repeated is measured again
        **given(args, ENGINE_OPTIONS),
    }
    if args.shape is not None:
        check_shape(args.shape)
        if settings.get("load_format") != "dummy":
            raise ValueError(f"--shape {args.shape} has no weights: add --load-format dummy")
    EngineConfig(**settings)
    if args.output:  # a file that cannot be written is found before the run, not after it
        with open(args.output, "a"):
            pass
    return settings


def _report(args: argparse.Namespace, result: Mapping[str, Any], summary: str) -> None:
    from pjengine.bench import environment

    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()}
    line = json.dumps(
        {"model": args.shape or args.model, **rounded, **environment(), "command": args.command_line}
    )
    print(line, flush=True)
    print(summary, file=sys.stderr)
    if args.output:
        with open(args.output, "a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
