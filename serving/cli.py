"""The command line. The only place that sets up logging."""

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

# What an argument of the engine looks like on the command line: name, type, help.
ENGINE_OPTIONS: tuple[tuple[str, type, str], ...] = (
    ("tokenizer", str, "folder or Hub id of the tokenizer; default: the model's own"),
    ("revision", str, "branch, tag or commit of the model on the Hub"),
    ("download-dir", str, "where downloaded models are kept"),
    ("dtype", str, "auto, bfloat16, float16 or float32"),
    ("load-format", str, "auto, safetensors, bin or dummy (random weights)"),
    ("seed", int, "seed of the engine"),
    ("gpu-memory-utilization", float, "share of the GPU's memory to use"),
    ("kv-cache-memory-bytes", int, "bytes for KV pages; overrides gpu-memory-utilization"),
    ("max-model-len", int, "longest prompt and output together, in tokens"),
    ("max-num-seqs", int, "requests that run at once"),
    ("max-num-batched-tokens", int, "tokens computed in one step"),
    ("page-size", int, "tokens per KV page"),
    ("kernel-backend", str, "reference or triton; default: the best that fits"),
)
SAMPLING_OPTIONS: tuple[tuple[str, type, str], ...] = (
    ("max-tokens", int, "tokens to generate"),
    ("temperature", float, "0 is greedy"),
    ("top-p", float, "keep the likeliest tokens that together reach this probability"),
    ("top-k", int, "keep the k likeliest tokens"),
    ("min-p", float, "keep tokens at least this likely, relative to the likeliest"),
    ("sampling-seed", int, "seed of the request"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    args = _parser().parse_args(argv)
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    try:
        return args.run(args)
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"pjengine: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pjengine", description="LLM inference in JAX.", allow_abbrev=False)
    parser.add_argument("--verbose", action="store_true", help="log what happens, to standard error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="complete prompts", allow_abbrev=False)
    generate.add_argument("model", help='folder, Hub id, or "demo"')
    generate.add_argument("--prompt", action="append", help="may be given several times; default: standard input")
    generate.add_argument("--stop", action="append", help="text that ends generation; may be given several times")
    generate.add_argument("--stream", action="store_true", help="show the text while it is generated")
    _add_options(generate, ENGINE_OPTIONS)
    _add_options(generate, SAMPLING_OPTIONS)
    generate.set_defaults(run=_generate)

    bench = commands.add_parser("bench", help="measure speed").add_subparsers(required=True, metavar="WHAT")
    for name, run in (("throughput", _throughput), ("latency", _latency), ("startup", _startup)):
        command = bench.add_parser(name, help=(run.__doc__ or "").strip(), allow_abbrev=False)
        model = command.add_mutually_exclusive_group(required=True)
        model.add_argument("--model", help="folder or Hub id")
        model.add_argument("--shape", help="a named shape, with --load-format dummy")
        command.add_argument("--output", help="append the result to this file, one JSON object a line")
        _add_options(command, ENGINE_OPTIONS)
        if name == "throughput":
            command.add_argument("--workload", default="sharegpt-like", help="sharegpt-like or random-1024-128")
            command.add_argument("--num-requests", type=int, help="default: the workload's own")
            command.add_argument("--temperature", type=float, default=1.0)
        if name == "latency":
            command.add_argument("--batch-size", type=int, nargs="+", default=[1, 8, 32, 128, 256])
            command.add_argument("--prompt-len", type=int, default=512)
            command.add_argument("--output-len", type=int, default=128)
        command.set_defaults(run=run)
    return parser


def _add_options(parser: argparse.ArgumentParser, options: Sequence[tuple[str, type, str]]) -> None:
    for name, kind, help_text in options:
        parser.add_argument(f"--{name}", type=kind, help=help_text, default=argparse.SUPPRESS)


def _given(args: argparse.Namespace, options: Sequence[tuple[str, type, str]]) -> dict[str, Any]:
    """The options that were given, by their Python names."""
    names = [name.replace("-", "_") for name, _, _ in options]
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def _generate(args: argparse.Namespace) -> int:
    from pjengine import LLM, SamplingParams

    prompts = args.prompt or [sys.stdin.read()]
    sampling = _given(args, SAMPLING_OPTIONS)
    sampling["seed"] = sampling.pop("sampling_seed", None)
    params = SamplingParams(**{"max_tokens": 128, "stop": args.stop, **sampling})
    with LLM(args.model, **_given(args, ENGINE_OPTIONS)) as llm:
        start = time.perf_counter()
        if args.stream and len(prompts) == 1:
            print(prompts[0], end="", flush=True)
            num_tokens = 0
            for chunk in llm.stream(prompts[0], params):
                print(chunk.text, end="", flush=True)
                num_tokens += len(chunk.token_ids)
            print()
        else:
            outputs = llm.generate(prompts, params, use_tqdm=sys.stderr.isatty())
            num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            for output in outputs:
                print(f"{output.prompt}{output.outputs[0].text}")
        elapsed = time.perf_counter() - start
    print(f"\n{num_tokens} tokens in {elapsed:.2f} s: {num_tokens / elapsed:.1f} tokens/s", file=sys.stderr)
    return 0


def _engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    settings = _given(args, ENGINE_OPTIONS)
    if args.shape is not None:
        if settings.get("load_format") != "dummy":
            raise ValueError(f"--shape {args.shape} has no weights: add --load-format dummy")
        return {"model": args.shape, "skip_tokenizer_init": True, **settings}
    return {"model": args.model, **settings}


def _report(args: argparse.Namespace, result: dict[str, Any]) -> None:
    from pjengine.bench import environment

    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()}
    line = json.dumps({"model": args.shape or args.model, **rounded, **environment()})
    print(line)
    if args.output:
        with open(args.output, "a") as file:
            file.write(line + "\n")


def _throughput(args: argparse.Namespace) -> int:
    """Requests, output tokens and total tokens per second of a workload."""
    from pjengine import LLM
    from pjengine.bench import DEFAULT_NUM_REQUESTS, WORKLOADS, throughput

    if args.workload not in WORKLOADS:
        raise ValueError(f"--workload must be one of {', '.join(WORKLOADS)}, got {args.workload!r}")
    with LLM(**_engine_settings(args)) as llm:
        num_requests = args.num_requests or DEFAULT_NUM_REQUESTS[args.workload]
        workload = WORKLOADS[args.workload](llm.engine.model_config.vocab_size, num_requests)
        result = throughput(llm, workload, temperature=args.temperature)
        recompiles = llm.engine.runner.recompiles_after_warmup
    _report(args, {"bench": args.workload, **result, "recompiles_after_warmup": recompiles})
    return 0


def _latency(args: argparse.Namespace) -> int:
    """Time per output token of a greedy batch."""
    from pjengine import LLM
    from pjengine.bench import latency

    with LLM(**_engine_settings(args)) as llm:
        for batch_size in args.batch_size:
            result = latency(llm, batch_size, prompt_len=args.prompt_len, output_len=args.output_len)
            _report(args, {"bench": "decode-latency", **result})
    return 0


def _startup(args: argparse.Namespace) -> int:
    """Process start to the first token, cold and warm."""
    from pjengine.bench import startup

    # Both runs end before this process touches the device itself.
    for result in list(startup(_engine_settings(args))):
        _report(args, {"bench": "startup", **result})
    return 0


if __name__ == "__main__":
    sys.exit(main())
