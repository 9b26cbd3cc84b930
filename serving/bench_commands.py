"""`pjengine bench`: what each kind of benchmark takes, runs and reports."""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pjengine
from pjengine.bench import DEFAULT_NUM_REQUESTS, WORKLOADS, Workload
from pjengine.config import EngineConfig, add_xla_flag
from pjengine.sampling_params import SamplingParams
from pjengine.serving.options import (
    ENGINE_OPTIONS,
    HOST_OPTIONS,
    SAMPLING_OPTIONS,
    Option,
    add_engine_options,
    add_options,
    given,
    positive,
)

PROFILE_SIZES = ("batch_size", "num_tokens", "num_requests")  # what a profile was of, by its kind


def add_bench(commands: Any) -> Any:
    """Adds the command; returns what takes its kinds."""
    bench = commands.add_parser(
        "bench",
        help="measure speed",
        description="Measures speed on prompts of random tokens. One JSON object for each result goes to "
        "standard output, a line for people to standard error.",
    )
    kinds = bench.add_commands("KIND")
    _add_throughput(kinds)
    _add_latency(kinds)
    _add_startup(kinds)
    _add_host(kinds)
    _add_kernels(kinds)
    _add_profile(kinds)
    return kinds


def _add_bench(
    kinds: Any, name: str, run: Any, *more: Option, help: str, description: str
) -> argparse.ArgumentParser:
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
        help="random weights in a named shape, with --load-format dummy: llama-8b, llama-1b, llama-70b, "
        "llama2-13b, gemma2-9b, qwen3-8b, qwen3-30b-a3b, gpt2-xl, bloom-7b, falcon-7b, opt-125m, "
        "opt-125m-llama or tiny",
    )
    command.add_argument("--output", metavar="FILE", help="append the results to this file too")
    add_engine_options(command, *more)
    return command


def _add_throughput(kinds: Any) -> None:
    command = _add_bench(
        kinds,
        "throughput",
        _throughput,
        *HOST_OPTIONS,
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
        *HOST_OPTIONS,
        help="time per output token of a batch",
        description="Times batches, greedy unless an option of sampling is given: "
        "TPOT = (T(output-len tokens) - T(1 token)) / (output-len - 1).",
    )
    add_options(command.add_argument_group("sampling"), SAMPLING_OPTIONS, SamplingParams)
    command.add_argument(
        "--copying",
        action="store_true",
        help="answers copy a part of their prompts, up to half of --prompt-len: what n-grams draft best",
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
    command.add_argument("--use-beam-search", action="store_true", help="each request is a beam search")
    command.add_argument("--beam-width", metavar="N", type=positive, help="of --use-beam-search (default: 8)")


def _add_startup(kinds: Any) -> None:
    _add_bench(
        kinds,
        "startup",
        _startup,
        help="process start to the first token, cold and warm",
        description="Starts an engine in a fresh process, twice: with an empty compilation cache, then with "
        "what the first run left there. Times from process start to the first token.",
    )


def _add_host(kinds: Any) -> None:
    command = kinds.add_parser(
        "host",
        help="the host's share of a step",
        description="Times what the host does in a step of decodes, with a device that answers at once. "
        "Needs no GPU.",
    )
    command.set_defaults(run=_host)
    command.add_argument(
        "--num-running", metavar="N", type=positive, default=1000, help="requests that decode"
    )
    command.add_argument(
        "--num-stop-ids", metavar="N", type=int, default=0, help="stop ids of each (default: none)"
    )
    command.add_argument("--output", metavar="FILE", help="append the result to this file too")
    command.add_argument("--verbose", action="store_true", help="log what happens, to standard error")


def _add_kernels(kinds: Any) -> None:
    command = kinds.add_parser(
        "kernels",
        help="each kernel's GB/s or TFLOP/s",
        description="Times the kernels at the sizes of a model, each beside the limit of the card that was "
        "measured in the same run. Needs a GPU.",
    )
    command.set_defaults(run=_kernels)
    command.add_argument(
        "--shape",
        metavar="SHAPE",
        default="llama-8b",
        help="sizes, such as llama2-13b, or qwen3-30b-a3b for experts (default: llama-8b)",
    )
    command.add_argument(
        "--op",
        metavar="OP",
        nargs="+",
        help="only these: decode, prefill, product, gated, stacked, experts, small "
        "(default: all that the shape has)",
    )
    command.add_argument("--tune", action="store_true", help="other tiles too, not only the chosen ones")
    command.add_argument(
        "--interpret", action="store_true", help="tiny cases in Pallas's interpreter, to try this on a CPU"
    )
    command.add_argument("--output", metavar="FILE", help="append the results to this file too")
    command.add_argument("--verbose", action="store_true", help="log what happens, to standard error")


def _add_profile(kinds: Any) -> None:
    command = _add_bench(
        kinds,
        "profile",
        _profile,
        help="the kernels of a step, and whether it ran as CUDA graphs",
        description="Times steps, then sums the kernels of others by name, in JAX's profile, which has "
        "kernels of GPUs only.",
    )
    command.add_argument(
        "--batch-size",
        metavar="N",
        type=positive,
        nargs="*",
        default=[1, 32, 256],
        help="steps of so many decodes, one result for each (default: 1 32 256)",
    )
    command.add_argument(
        "--mixed", metavar="N", type=positive, nargs="*", default=[], help="steps that read so many tokens"
    )
    command.add_argument(
        "--workload", metavar="NAME", choices=WORKLOADS, nargs="*", default=[], help="all steps of a workload"
    )
    command.add_argument("--num-requests", metavar="N", type=positive, help="of the workloads")
    command.add_argument(
        "--prompt-len", metavar="N", type=positive, default=512, help="tokens of each prompt"
    )
    command.add_argument("--num-steps", metavar="N", type=positive, default=12, help="steps of a profile")


def _throughput(args: argparse.Namespace) -> None:
    from pjengine.bench import throughput

    settings = _bench_settings(args)
    SamplingParams(temperature=args.temperature)  # refuses before the model is loaded
    with pjengine.LLM(**settings, warm_up=False) as llm:  # the benchmark warms up once it has checked
        workload = _workload(args, llm, args.workload)
        result = throughput(llm, workload, temperature=args.temperature, repeats=args.repeats)
    report(
        args,
        {"bench": args.workload, **result},
        f"{args.workload}, {len(workload.prompts)} requests: "
        f"{result['output_tokens_per_s']:,.1f} output tokens/s, "
        f"{result['total_tokens_per_s']:,.1f} total tokens/s, {result['requests_per_s']:,.2f} requests/s "
        f"in {result['elapsed_s']:.2f} s{_kept(result)}",
    )


def _workload(args: argparse.Namespace, llm: pjengine.LLM, name: str) -> Workload:
    return WORKLOADS[name](
        llm.engine.model_config.vocab_size, args.num_requests or DEFAULT_NUM_REQUESTS[name]
    )


def _latency(args: argparse.Namespace) -> None:
    from pjengine.bench import check_batch, latency

    if sampling := given(args, SAMPLING_OPTIONS):
        sampling = {"temperature": SamplingParams().temperature, **sampling}
    if args.beam_width and not args.use_beam_search:
        raise ValueError(f"--beam-width {args.beam_width} needs --use-beam-search")
    if args.use_beam_search:
        sampling = {"temperature": 0, **sampling, "use_beam_search": True, "best_of": args.beam_width or 8}
    SamplingParams(**sampling)  # refuses before the model is loaded
    with pjengine.LLM(**_of_one_engine(args), warm_up=False) as llm:
        for batch_size in args.batch_size:
            check_batch(llm, batch_size, args.prompt_len, args.output_len, sampling.get("best_of", 1))
        for batch_size in args.batch_size:
            result = latency(
                llm,
                batch_size,
                prompt_len=args.prompt_len,
                output_len=args.output_len,
                repeats=args.repeats,
                sampling=sampling,
                is_copying=args.copying,
            )
            beams = "{beam_tokens_per_s:,.1f} of all beams, " if args.use_beam_search else ""
            report(
                args,
                {"bench": "decode-latency", **result},
                f"batch {batch_size}: {result['tpot_ms']:.3f} ms per output token (spread "
                f"{result['tpot_spread_ms']:.3f}), {result['output_tokens_per_s']:,.1f} tokens/s, "
                f"{beams.format(**result)}first token after {result['first_token_ms']:.1f} ms{_kept(result)}",
            )


def _kept(result: Mapping[str, Any]) -> str:
    """What a line for people says of drafts."""
    if "acceptance_rate" not in result:
        return ""
    rate = result["acceptance_rate"]
    kept = "" if rate is None else f", of which {rate:.0%} held"
    return f"; {result['num_draft_tokens']} tokens drafted{kept}"


def _host(args: argparse.Namespace) -> None:
    from pjengine.bench import host_share

    result = host_share(args.num_running, num_stop_ids=args.num_stop_ids)
    report(
        args,
        {"bench": "host", **result},
        f"{args.num_running} running requests, {args.num_stop_ids} stop ids each: "
        f"{result['median_ms']:.3f} ms a step (median), {result['mean_ms']:.3f} (mean), "
        f"{result['p99_ms']:.3f} (99th percentile)",
    )


def _kernels(args: argparse.Namespace) -> None:
    from pjengine.bench import kernels

    for row in kernels(args.shape, args.op, is_tuning=args.tune, interpret=args.interpret):
        if "error" in row:
            summary = f"failed: {row['error']}"
        else:
            unit = "gb_per_s" if "gb_per_s" in row else "tflop_per_s"
            summary = f"{row['us']:.1f} us, {row[unit]:,.0f} {unit}, {row['share']:.0%} of the limit"
        case = [str(value) for value in row.values() if type(value) in (str, int)]
        report(args, {"bench": "kernels", **row}, f"{', '.join(case)}: {summary}")


def _profile(args: argparse.Namespace) -> None:
    settings = _of_one_engine(args)
    from pjengine.step_profile import KEEP_GRAPHS, profile_decode, profile_mixed, profile_workload

    add_xla_flag(KEEP_GRAPHS)
    sizes = {"prompt_len": args.prompt_len, "num_steps": args.num_steps}
    with pjengine.LLM(**settings, warm_up=False) as llm:
        runs = [functools.partial(profile_decode, llm, size, **sizes) for size in args.batch_size]
        runs += [functools.partial(profile_mixed, llm, size, **sizes) for size in args.mixed]
        runs += [
            functools.partial(profile_workload, llm, _workload(args, llm, name)) for name in args.workload
        ]
        for run in runs:
            row = run()
            largest = ", ".join(f"{name} {us:,.0f}" for name, us in list(row["kernels_us"].items())[:6])
            report(
                args,
                {"bench": "profile", **row},
                f"{row['kind']} of {next(row[size] for size in PROFILE_SIZES if size in row)}: "
                f"{row['step_ms']:.3f} ms a step, busy {row['busy_ms']:.3f} ms with "
                f"{row['num_kernels']:.1f} kernels; "
                f"{row['num_graph_launches']:.1f} graphs and {row['num_kernel_launches']:.1f} kernels by "
                f"themselves launched; us: {largest or 'none, without a GPU'}",
            )


def _startup(args: argparse.Namespace) -> None:
    from pjengine.bench import startup

    # Both runs end before this process touches the device itself, which `report` does.
    for result in list(startup({**_bench_settings(args), "use_tqdm_on_load": False})):
        parts = ", ".join(f"{name} {result[f'{name}_s']:.2f}" for name in ("import", "weights", "compile"))
        report(
            args,
            {"bench": "startup", **result},
            f"{result['kind']} start: {result['total_s']:.2f} s to the first token ({parts}, "
            f"first token {result['first_token_s']:.2f})",
        )


def _of_one_engine(args: argparse.Namespace) -> dict[str, Any]:
    """Those of a benchmark that times the steps of one batch."""
    settings = _bench_settings(args)
    if (size := settings.get("data_parallel_size", 1)) > 1:
        raise ValueError(
            f"this benchmark times the steps of one engine, got data_parallel_size={size}: leave it out, or "
            "take `bench throughput`"
        )
    return settings


def _bench_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Settings of the engine, checked as far as that needs neither weights nor a device."""
    from pjengine.bench import check_shape

    settings = {
        "model": args.model or args.shape,
        "skip_tokenizer_init": True,
        "use_tqdm_on_load": sys.stderr.isatty(),
        "enable_prefix_caching": False,  # a prompt that is repeated is measured again
        **given(args, (*ENGINE_OPTIONS, *HOST_OPTIONS)),
    }
    if args.shape is not None:
        check_shape(args.shape)
        if settings.get("load_format") != "dummy":
            raise ValueError(f"--shape {args.shape} has no weights: add --load-format dummy")
    EngineConfig(**settings)
    check_output(args.output)
    return settings


def report(
    args: argparse.Namespace,
    result: Mapping[str, Any],
    summary: str,
    where: Callable[[], Mapping[str, Any]] | None = None,
) -> None:
    """Prints a result, and keeps it if that is asked for.

    `where` says on what it was measured; by default on the device of this process, which is touched then.
    """
    from pjengine.bench import environment

    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()}
    line = json.dumps(
        {
            "model": getattr(args, "shape", None) or getattr(args, "model", "tiny"),
            **rounded,
            **(where or environment)(),
            "command": args.command_line,
        }
    )
    print(line, flush=True)
    print(summary, file=sys.stderr)
    if args.output:
        with open(args.output, "a") as file:
            file.write(line + "\n")


def check_output(path: str | None) -> None:
    """Finds a file that cannot be written before the run, not after it."""
    if path:
        with open(path, "a"):
            pass
