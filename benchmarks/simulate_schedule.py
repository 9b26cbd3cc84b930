"""What the scheduler makes of a workload, by simulation: it decides itself, steps take what they took once.

python -m benchmarks.simulate_schedule --workload sharegpt-like --prefill-first
python -m benchmarks.simulate_schedule --num-pages 7500 --num-spare-pages 0   # too few for all
python -m benchmarks.simulate_schedule --batch-size 256 --prefill-first   # time per output token

The times are llama-8b's on one H200 (results/2026-11-26-profile-llama-8b-h200.jsonl), other models' in
proportion (`--scale`, `--kv-bytes`). It compares ways to schedule, and predicts no card: of sharegpt-like it
has the 1,037 steps that were counted there, in 14.9 s where 16.2 were measured; of llama2-13b it has 152
preemptions for 151, in 47.0 s for 48.5.
"""

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence

from pjengine.bench import DEFAULT_NUM_REQUESTS, WORKLOADS, Workload, random_tokens
from pjengine.config import RunnerConfig
from pjengine.page_pool import PagePool
from pjengine.request import Request
from pjengine.sampling_params import SamplingParams
from pjengine.schedule import Schedule
from pjengine.scheduler import Scheduler

# Milliseconds without attention, by a step's padded size. Decodes above 256 are by proportion.
DECODE_MS = {1: 3.85, 8: 4.0, 16: 4.0, 32: 4.27, 64: 4.55, 128: 4.85, 256: 6.65, 512: 10.9, 1024: 21.3}
MIXED_MS = {128: 5.1, 256: 6.25, 512: 10.3, 1024: 19.9, 2048: 41.1, 4096: 82.0, 8192: 171.0, 16384: 339.0}
DECODE_RATE = 3.95e9  # bytes of K and V a ms
MIXED_RATE = 2.4e9  # the same of decodes beside prompts: estimated
PROMPT_RATE = 350e9  # FLOP a ms of attention within prompts
DECODE_LAUNCH_MS, MIXED_LAUNCH_MS = 0.1, 2.0  # with what the device waits for the host
FEW_LOGITS_MS, ALL_LOGITS_MS = 0.26, 1.9  # of mixed steps that sample up to 64 tokens, and more


def time_of(size: float, times: Mapping[int, float]) -> float:
    """Between those that were measured, along a line."""
    for (small, low), (large, high) in itertools.pairwise(times.items()):
        if size <= large:
            return low + (high - low) * max(size - small, 0) / (large - small)
    return times[max(times)] * size / max(times)


def step_ms(schedule: Schedule, sizes: RunnerConfig, scale: float, kv_bytes: int) -> float:
    num_decodes = len(schedule.decodes.requests)
    read_bytes = kv_bytes * (int(schedule.decodes.starts.sum()) + num_decodes)
    buckets: Sequence[int] = sizes.decode_buckets if schedule.is_decode else sizes.mixed_buckets
    size = next(bucket for bucket in buckets if bucket >= schedule.num_tokens)
    if schedule.is_decode:
        return scale * time_of(size, DECODE_MS) + read_bytes / DECODE_RATE + DECODE_LAUNCH_MS
    flop = sum(2**19 * own.length * (own.length / 2 + own.start) for own in schedule.chunks)
    num_sampled = num_decodes + sum(own.is_sampled for own in schedule.chunks)
    logits_ms = FEW_LOGITS_MS if num_sampled <= 64 else ALL_LOGITS_MS
    attention_ms = flop / PROMPT_RATE + read_bytes / MIXED_RATE
    return scale * (time_of(size, MIXED_MS) + logits_ms) + attention_ms + MIXED_LAUNCH_MS


def read(schedule: Schedule) -> list[Request]:
    """Gives each sequence of a step its tokens; returns the requests that end."""
    grown = [
        (own, int(length))
        for own, length in zip(schedule.decodes.requests, schedule.decodes.lengths, strict=True)
    ]
    grown += [(own.request, 1) for own in schedule.chunks if own.is_sampled]
    for request, length in grown:
        for _ in range(0 if request.is_finished else length):
            request.append(0)
    return [request for request, _ in grown if request.is_finished]


def simulate(workload: Workload, args: argparse.Namespace) -> dict[str, float]:
    """Runs all requests, each step read while the next one runs."""
    sizes = RunnerConfig(
        num_pages=args.num_pages,
        page_size=16,
        max_model_len=2048,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
    )
    scheduler = Scheduler(
        PagePool(sizes.num_pages),
        sizes.page_size,
        sizes.max_num_seqs,
        sizes.max_num_batched_tokens,
        is_caching=args.enable_prefix_caching,
        mixed_sizes=sizes.mixed_buckets,
        prefill_first=args.prefill_first,
        num_spare_pages=args.num_spare_pages,
    )
    for index, (prompt, length) in enumerate(zip(workload.prompts, workload.output_lens, strict=True)):
        request = Request(
            request_id=str(index),
            prompt_token_ids=prompt,
            params=SamplingParams(max_tokens=length, ignore_eos=True),
            max_total_tokens=len(prompt) + length,
            eos_token_ids=frozenset(),
            seed=0,
        )
        scheduler.add(request)
    total_ms, num_steps, num_mixed, last = 0.0, 0, 0, None
    while scheduler.has_requests:
        schedule = scheduler.schedule()
        if schedule.num_seqs:
            total_ms += step_ms(schedule, sizes, args.scale, args.kv_bytes)
            num_steps, num_mixed = num_steps + 1, num_mixed + (not schedule.is_decode)
        if last is not None:
            scheduler.finish([own for own in read(last) if own.row >= 0])
        last = schedule
    return {
        "elapsed_s": total_ms / 1e3,
        "output_tokens_per_s": 1e3 * workload.num_output_tokens / total_ms,
        "num_steps": num_steps,
        "num_mixed_steps": num_mixed,
        "num_preemptions": scheduler.num_preemptions,
    }


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--workload", choices=WORKLOADS, default="sharegpt-like")
    options.add_argument("--num-pages", type=int, default=52_000, help="of 16 tokens")
    options.add_argument("--max-num-seqs", type=int, default=1024)
    options.add_argument("--max-num-batched-tokens", type=int, default=16_384)
    options.add_argument("--num-spare-pages", type=int, default=Scheduler.num_spare_pages)
    options.add_argument("--prefill-first", action=argparse.BooleanOptionalAction, default=False)
    options.add_argument(
        "--scale", type=float, default=1.0, help="of times without attention; llama2-13b: 1.7"
    )
    options.add_argument(
        "--kv-bytes", type=int, default=131_072, help="K and V of a token; llama2-13b: 819200"
    )
    options.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=False)
    options.add_argument(
        "--batch-size", type=int, help="of prompts of 512 and outputs of 128 tokens, for the workload"
    )
    args = options.parse_args()
    if args.batch_size is None:
        row = simulate(WORKLOADS[args.workload](1000, DEFAULT_NUM_REQUESTS[args.workload]), args)
    else:
        prompts = random_tokens(1000, [512] * args.batch_size, seed=0)
        first, whole = (simulate(Workload(prompts, [length] * args.batch_size), args) for length in (1, 128))
        args.workload = "decode-latency"
        row = {"tpot_ms": 1e3 * (whole["elapsed_s"] - first["elapsed_s"]) / 127}
    settings = {"bench": "simulate_schedule", **vars(args)}
    print(json.dumps({**settings, **{name: round(value, 3) for name, value in row.items()}}))


if __name__ == "__main__":
    main()
