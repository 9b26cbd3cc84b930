"""What it costs the host to note each step, and, beside it, to decide what runs in it. Needs no device.

python -m benchmarks.step_log --num-seqs 256 --num-pages 60000
"""

import argparse
import json
import statistics
import time

from pjengine.batching import Layout
from pjengine.page_pool import PagePool
from pjengine.request import Request
from pjengine.runner import Launched
from pjengine.sampling_params import SamplingParams
from pjengine.scheduler import Scheduler
from pjengine.step_log import MAX_STEPS, StepLog

PAGE_SIZE, PROMPT_LEN = 16, 128


def new_request(index: int, max_tokens: int) -> Request:
    return Request(
        request_id=f"request-{index}",
        prompt_token_ids=[index] * PROMPT_LEN,
        params=SamplingParams(max_tokens=max_tokens),
        max_total_tokens=PROMPT_LEN + max_tokens,
        eos_token_ids=frozenset(),
        seed=index,
    )


options = argparse.ArgumentParser(description=__doc__)
options.add_argument("--num-seqs", type=int, default=256)
options.add_argument("--num-pages", type=int, default=60_000)
options.add_argument("--num-steps", type=int, default=2 * MAX_STEPS)
args = options.parse_args()
num_seqs = args.num_seqs
scheduler = Scheduler(PagePool(args.num_pages), PAGE_SIZE, num_seqs, num_seqs * PROMPT_LEN)
for index in range(num_seqs):
    scheduler.add(new_request(index, args.num_steps + 1))
layout, log = Layout(num_seqs, num_seqs, PAGE_SIZE, is_decode=True), StepLog()
noted_us, scheduled_us = [], []
for _ in range(args.num_steps):
    begin = time.perf_counter()
    schedule = scheduler.schedule()
    decided = time.perf_counter()
    with log.turn(0.0):
        for name in ("schedule", "launch"):
            with log.phase(name):
                pass
        log.add(Launched(schedule, layout), scheduler, 0.0)
        with log.phase("output"), log.phase("read"):
            pass
    noted_us.append(1e6 * (time.perf_counter() - decided))
    scheduled_us.append(1e6 * (decided - begin))
quartiles = dict(zip(("p25", "p50", "p75"), statistics.quantiles(noted_us[1:], n=4), strict=True))
row = {"bench": "step_log", "num_seqs": num_seqs, "num_pages": args.num_pages, "num_steps": args.num_steps}
print(json.dumps({**row, "noted_us": quartiles, "scheduled_us": statistics.median(scheduled_us)}))
