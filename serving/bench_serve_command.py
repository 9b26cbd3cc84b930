"""`pjengine bench serve`: a load on a running server, and how it bears it."""

import argparse
import asyncio
import json
import math
import sys
import uuid
from typing import Any

from pjengine.bench import DEFAULT_NUM_REQUESTS, WORKLOADS, Workload, cpu, versions
from pjengine.progress import progress_bar
from pjengine.serving.bench_commands import check_output, report
from pjengine.serving.chat_commands import add_server_options, endpoint_of, first_model
from pjengine.serving.http_client import Endpoint, RemoteError
from pjengine.serving.load_client import GOALS, Demand, arrivals, run_load, summarize
from pjengine.serving.open_files import SPARE, allow_open_files
from pjengine.serving.options import positive

_BUSY = 0.8  # of a core: a client above it may be what the figures show


def add_bench_serve(kinds: Any) -> None:
    """Adds the command to the kinds of benchmark."""
    command = kinds.add_parser(
        "serve",
        help="what the clients of a running server see",
        description="Sends the requests of a workload to a server, each as a stream of its own, and measures "
        "what comes back: throughput, time to first token (TTFT), time per output token (TPOT), gaps between "
        "chunks (ITL), whole requests (E2EL). Prompts are token ids, and no run finds pages of another "
        "cached.",
    )
    command.set_defaults(run=_bench_serve)
    add_server_options(command)
    load = command.add_argument_group("load")
    load.add_argument(
        "--workload", metavar="NAME", choices=WORKLOADS, default="sharegpt-like", help=" or ".join(WORKLOADS)
    )
    sizes = ", ".join(f"{count} for {name}" for name, count in DEFAULT_NUM_REQUESTS.items())
    load.add_argument("--num-requests", metavar="N", type=positive, help=f"(default: {sizes})")
    load.add_argument(
        "--num-warmups",
        metavar="N",
        type=int,
        default=0,
        help="so many of them are sent before, all at once, and not measured: a server that has just started "
        "makes its programs while it serves (default: none)",
    )
    load.add_argument(
        "--request-rate",
        metavar="R",
        type=_rate,
        help="requests a second, at random intervals, or inf: all at once (default: inf)",
    )
    load.add_argument(
        "--max-concurrency",
        metavar="N",
        type=positive,
        help="requests under way at once (default: any number)",
    )
    load.add_argument(
        "--goodput",
        metavar="NAME:MS",
        type=_goal,
        nargs="+",
        help="count the requests that take at most this: ttft, tpot or e2el, as in ttft:200 tpot:20",
    )
    load.add_argument(
        "--temperature", metavar="X", type=float, help="of all requests (default: the server's)"
    )
    load.add_argument("--seed", metavar="N", type=int, default=0, help="of the intervals between requests")
    load.add_argument(
        "--request-timeout", metavar="S", type=float, help="seconds that a request may take (default: any)"
    )
    load.add_argument(
        "--vocab-size", metavar="N", type=positive, help="token ids to draw from (default: the server says)"
    )
    command.add_argument("--output", metavar="FILE", help="append the result to this file too")
    command.add_argument("--verbose", action="store_true", help="log what happens, to standard error")


def _rate(text: str) -> float | None:
    """Requests a second; None: without limit."""
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not rate > 0:
        raise argparse.ArgumentTypeError(f"a number above 0 is needed, or inf; got {text!r}")
    return None if math.isinf(rate) else rate


def _goal(text: str) -> tuple[str, float]:
    name, _, limit = text.partition(":")
    try:
        limit_ms = float(limit)
    except ValueError:
        limit_ms = math.nan
    if name not in GOALS or not limit_ms > 0:
        raise argparse.ArgumentTypeError(
            f"{' or '.join(GOALS)} and ms are needed, as in ttft:200; got {text!r}"
        )
    return name, limit_ms


def _bench_serve(args: argparse.Namespace) -> int:
    if args.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {args.seed}")
    if args.num_warmups < 0:
        raise ValueError(f"--num-warmups must be at least 0, got {args.num_warmups}")
    if args.request_timeout is not None and not args.request_timeout > 0:
        raise ValueError(f"--request-timeout must be above 0, got {args.request_timeout}")
    check_output(args.output)
    endpoint = endpoint_of(args)
    num_requests = args.num_requests or DEFAULT_NUM_REQUESTS[args.workload]
    _check_open_files(args.max_concurrency or num_requests)
    model = asyncio.run(_model(endpoint, args.model_name))
    if (vocab_size := args.vocab_size or model.get("vocab_size")) is None:
        raise ValueError("the server does not say how large its vocabulary is: give --vocab-size")
    workload = WORKLOADS[args.workload](vocab_size, num_requests)
    _check_lengths(workload, model.get("max_model_len"))
    if warmups := _demands(workload, model["id"], args.temperature)[: args.num_warmups]:
        asyncio.run(run_load(endpoint, warmups, [0.0] * len(warmups), max_concurrency=args.max_concurrency))
    demands = _demands(workload, model["id"], args.temperature)
    with progress_bar("Answered requests", unit=" requests", is_shown=sys.stderr.isatty()) as show:
        load = asyncio.run(
            run_load(
                endpoint,
                demands,
                arrivals(num_requests, args.request_rate, args.seed),
                max_concurrency=args.max_concurrency,
                timeout_s=args.request_timeout,
                show=show,
            )
        )
    figures = summarize(load, demands, dict(args.goodput or ()))
    settings = {
        "bench": "serve",
        "model": model["id"],
        "workload": args.workload,
        "num_requests": num_requests,
        "num_warmups": len(warmups),
        "request_rate": args.request_rate or "inf",
        "max_concurrency": args.max_concurrency,
        "temperature": args.temperature,
        "seed": args.seed,
        "url": endpoint.url,
    }
    # The server's machine and settings are not known here; `command` and `url` say where to look.
    report(args, {**settings, **figures}, _summary(figures), lambda: {"client": cpu(), **versions()})
    return 1 if figures["failed"] else 0


async def _model(endpoint: Endpoint, name: str | None) -> dict[str, Any]:
    """What the server says about a model; about its first, if none is named."""
    if name is None:
        return await first_model(endpoint)
    async with endpoint.request("GET", f"/models/{name}") as reply:
        body = await (await reply.check()).read()
    try:
        return {**json.loads(body), "id": name}
    except (ValueError, TypeError) as error:
        raise RemoteError(f"the server says of {name!r}: {body[:80]!r}") from error


def _check_open_files(num_connections: int) -> None:
    limit = allow_open_files(num_connections + SPARE)
    if limit < num_connections + SPARE:
        raise ValueError(
            f"{num_connections} connections at once are more than the {limit} open files of this process "
            "allow: raise `ulimit -n`, or give --max-concurrency"
        )


def _check_lengths(workload: Workload, max_model_len: int | None) -> None:
    for prompt, output_len in zip(workload.prompts, workload.output_lens, strict=True):
        if max_model_len is not None and len(prompt) + output_len > max_model_len:
            raise ValueError(
                f"{len(prompt)} prompt tokens and {output_len} output tokens do not fit into the server's "
                f"max_model_len={max_model_len}: take another workload, or a model with more positions"
            )


def _demands(workload: Workload, model: str, temperature: float | None) -> list[Demand]:
    shared = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        # Each token comes in a chunk, be it half a character, or a server without a tokenizer.
        "return_token_ids": True,
        "cache_salt": uuid.uuid4().hex,  # the same prompts are computed anew in the next run
        **({} if temperature is None else {"temperature": temperature}),
    }
    return [
        Demand(
            content=json.dumps({**shared, "prompt": prompt, "max_tokens": output_len}).encode(),
            num_prompt_tokens=len(prompt),
            num_output_tokens=output_len,
        )
        for prompt, output_len in zip(workload.prompts, workload.output_lens, strict=True)
    ]


def _summary(figures: dict[str, Any]) -> str:
    lines = [
        f"{figures['completed']} requests in {figures['duration_s']:.2f} s, {figures['failed']} failed, "
        f"{figures['peak_concurrency']} at once: {figures['requests_per_s']:,.2f} requests/s, "
        f"{figures['output_tokens_per_s']:,.1f} output tokens/s, "
        f"{figures['total_tokens_per_s']:,.1f} total tokens/s"
    ]
    if figures["completed"]:
        times = [
            f"{name.upper()} {_ms(figures[f'median_{name}_ms'])} (p99 {_ms(figures[f'p99_{name}_ms'])})"
            for name in ("ttft", "tpot", "itl", "e2el")
        ]
        lines[0] += "; median ms: " + ", ".join(times)
    if "goodput_per_s" in figures:
        lines[0] += f"; goodput {figures['goodput_per_s']:.2f} requests/s, {figures['goodput_share']:.1%}"
    lines += [f"failed, {count} times: {error}" for error, count in figures["errors"].items()]
    if figures["client_cpu_share"] > _BUSY:
        lines.append(
            f"this client was busy for {figures['client_cpu_share']:.0%} of the time: "
            "the figures may be its own"
        )
    return "\n".join(lines)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
