"""Whether requests get the same bits whatever runs beside them, tried out on this machine.

What `deterministic=True` promises: one engine gives the same request the same tokens and logprobs, bit for
bit, whichever others run beside it and whenever they come, however its prompt is cut, whatever of it the
prefix cache holds, and whether it is preempted. Two things make it so.

Every token is computed in one way only. Prompts are read in steps of prompts, outputs computed in steps of
decodes, also where a preempted request gets them once more; the cache holds pages of prompts alone. And every
step of a kind runs the model at one shape, in a program that ends in logits: how a product is summed may
depend on its shape, so it never changes. But decodes have several shapes where all sums are in an order of
their own, see `models/batch_invariance.py`. Steps of prompts with logprobs or hidden states are programs of
their own, of the same shape, that give these out too; penalties, biases, forms and processors are in a
program of their own that draws from the logits. In such a program a row's result must not depend on the other
rows, nor on its place among them. Kernels here are written so: a split of the decode attention follows from
the row's own length, blocks of slots begin at the sequence's own beginning. Of products that libraries make
it is no more than the rule, so `verify_determinism` tries.
"""

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pjengine.comparison import Difference, first_difference
from pjengine.engine import LLMEngine
from pjengine.generation import Generation
from pjengine.hidden_states import HiddenStatesParams
from pjengine.page_pool import PagePool
from pjengine.recording import output_of
from pjengine.sampling_params import SamplingParams
from pjengine.scheduler import Scheduler
from pjengine.step_log import StepLog

# What the requests that are compared ask for.
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 20},
    {"temperature": 1.2, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.0, "n": 2},
    {"temperature": 0, "prompt_logprobs": 2},
    {"temperature": 0, "hidden_states": HiddenStatesParams(layers=(0, -1))},
    {"temperature": 1.0, "logit_bias": {0: 5.0, 1: -100.0}},
    {"temperature": 0.7, "repetition_penalty": 1.2, "presence_penalty": 0.3},
    {"temperature": 0},
)
NUM_LOGPROBS = 2
MAX_OUTPUT = 32
MAX_ARRIVAL = 24  # steps after which the last request of a mix comes


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A request, and what it came to alone."""

    prompt: list[int]
    params: SamplingParams
    wanted: dict[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        assert self.params.max_tokens is not None
        return len(self.prompt) + self.params.max_tokens


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How a mix is run, by fields of the scheduler."""

    num_pages: int
    max_num_seqs: int
    max_num_batched_tokens: int
    is_caching: bool


@dataclass
class DeterminismReport:
    """What was tried, and what it came to."""

    num_mixes: int = 0
    num_compared: int = 0  # requests that ran alone, run again in a mix
    num_tokens: int = 0  # of their outputs, each with its logprobs
    num_beside: int = 0  # other requests
    num_preempted: int = 0  # of those that were compared, as are the next two
    num_cached: int = 0  # some of the prompt was in the prefix cache
    num_cut: int = 0  # the prompt was longer than a step
    num_steps: dict[int, int] = field(default_factory=dict)  # of decodes, by the rows that their program has
    num_differences: int = 0
    first: Difference | None = None  # its `request` counts KINDS
    first_mix: int | None = None
    first_limits: Limits | None = None

    @property
    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def verify_determinism(
    engine: LLMEngine,
    *,
    num_mixes: int = 200,
    seed: int = 0,
    show: Callable[[int, int], None] = lambda num_done, total: None,
) -> DeterminismReport:
    """Runs a request of each of KINDS alone, then all in `num_mixes` random mixes, and compares the bits.

    Args:
      engine: an idle one. Its scheduler is replaced, so that steps are smaller, or pages fewer; its programs,
        whose shapes decide about bits, stay.
      seed: of prompts, limits, arrivals.
      show: is called with the number of mixes that are done, and of all.

    Raises:
      ValueError: the engine has requests, or is too small for any.
    """
    if engine.has_unfinished_requests():
        raise ValueError("the engine has requests that have not ended: wait for them, or abort them")
    rng, report = random.Random(seed), DeterminismReport()
    own = engine.scheduler
    trials = [_trial(engine, rng, index) for index in range(len(KINDS))]
    try:
        _limit(engine, replace(most_limits(engine), is_caching=False))
        for index, trial in enumerate(trials):
            [generation] = _run(engine, [(0, trial)])
            trials[index] = replace(trial, wanted=output_of(generation))
        for mix in range(num_mixes):
            _try_mix(engine, rng, trials, mix, report)
            show(mix + 1, num_mixes)
    finally:
        _settle(engine)
        _use(engine, own)
        engine.reset_prefix_cache()  # pages have been written since
    return report


def most_limits(engine: LLMEngine) -> Limits:
    """What the engine's programs have room for."""
    sizes = engine.runner.config
    return Limits(
        num_pages=sizes.num_pages,
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        is_caching=True,
    )


def _trial(engine: LLMEngine, rng: random.Random, kind: int | None) -> Trial:
    """A random request of one of KINDS; None: one that is not compared, of any."""
    sizes = engine.runner.config
    longest = min(engine.max_model_len, (sizes.num_pages - 1) * sizes.page_size // 2)
    max_output = min(MAX_OUTPUT, longest // 4)
    max_prompt = min(longest - max_output, 3 * sizes.max_num_batched_tokens)
    if max_output < 1:
        raise ValueError(f"requests have at most {longest} tokens here: raise max_model_len, or the memory")
    length = int(max_prompt ** rng.random())  # as many short ones as long ones
    if kind is not None:
        length = max_prompt if kind == len(KINDS) - 1 else rng.randint(1, max_prompt)
    params = KINDS[rng.randrange(len(KINDS)) if kind is None else kind]
    if kind is not None or rng.random() < 0.5:
        params = {"logprobs": NUM_LOGPROBS, **params}
    if kind is None:
        params = {
            name: value
            for name, value in params.items()
            if name not in ("n", "prompt_logprobs", "hidden_states")
        }
    return Trial(
        prompt=[rng.randrange(engine.model_config.vocab_size) for _ in range(length)],
        params=SamplingParams(
            max_tokens=max_output if kind is not None else rng.randint(1, max_output),
            seed=rng.randrange(2**31),
            ignore_eos=True,
            detokenize=False,
            **params,
        ),
    )


def _try_mix(
    engine: LLMEngine, rng: random.Random, trials: list[Trial], mix: int, report: DeterminismReport
) -> None:
    limits, compared = _random_limits(engine, rng, trials), list(range(len(trials)))
    crowd = int((2 * limits.max_num_seqs) ** rng.random())  # as many small crowds as large ones
    sizes = engine.runner.config.decode_buckets
    if mix < len(sizes):  # each program of decodes is full once
        limits, crowd = replace(most_limits(engine), max_num_seqs=sizes[mix]), sizes[mix]
    arrivals = [(rng.randint(0, MAX_ARRIVAL), trials[index]) for index in compared]
    twice = rng.sample(compared, k=rng.randint(len(trials) // 2, len(trials)))  # these may find pages
    arrivals += [(arrivals[index][0] + rng.randint(0, MAX_ARRIVAL // 2), trials[index]) for index in twice]
    compared += twice
    for _ in range(crowd):
        beside = _trial(engine, rng, None)
        if rng.random() < 0.3:  # shares a beginning
            whole = rng.choice(trials).prompt
            beside = replace(beside, prompt=[*whole[: rng.randint(1, len(whole))], *beside.prompt[:16]])
        if beside.num_tokens <= max(trial.num_tokens for trial in trials):
            arrivals.append((rng.randint(0, MAX_ARRIVAL), beside))
    _limit(engine, limits)
    generations = _run(engine, arrivals)
    for step in engine.step_log.steps:
        if step.layout.is_decode:
            report.num_steps[step.layout.num_tokens] = report.num_steps.get(step.layout.num_tokens, 0) + 1
    report.num_mixes += 1
    report.num_beside += len(arrivals) - len(compared)
    for index, generation in zip(compared, generations, strict=False):
        request, metrics = generation.request, [own.request.metrics for own in generation.completions]
        report.num_compared += 1
        report.num_tokens += generation.num_output_tokens
        report.num_preempted += any(own.num_preemptions for own in metrics)
        report.num_cached += request.num_cached_tokens > 0
        report.num_cut += len(request.prompt_token_ids) > limits.max_num_batched_tokens
        difference = first_difference(index, trials[index].wanted, output_of(generation))
        report.num_differences += difference is not None
        if difference is not None and report.first is None:
            report.first, report.first_mix, report.first_limits = difference, mix, limits


def _random_limits(engine: LLMEngine, rng: random.Random, trials: list[Trial]) -> Limits:
    most, page_size = most_limits(engine), engine.runner.config.page_size
    num_pages, max_num_seqs = most.num_pages, rng.randint(min(2, most.max_num_seqs), most.max_num_seqs)
    if rng.random() < 0.4:  # few pages: requests are preempted
        needed = -(-max(trial.num_tokens for trial in trials) // page_size)
        num_pages = min(num_pages, rng.randint(needed + 1, 2 * needed + 1))
        max_num_seqs = min(max_num_seqs, 16)
    smallest = min(16, most.max_num_batched_tokens)
    return Limits(
        num_pages=num_pages,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=rng.randint(smallest, most.max_num_batched_tokens),
        is_caching=rng.random() < 0.7,
    )


def _run(engine: LLMEngine, arrivals: list[tuple[int, Trial]]) -> list[Generation]:
    """Runs requests, each from its step on, until all have ended; in their order."""
    generations: dict[int, Generation] = {}
    step = 0
    while len(generations) < len(arrivals) or engine.has_unfinished_requests():
        for index, (first, trial) in enumerate(arrivals):
            if index not in generations and first <= step:
                prompt = {"prompt_token_ids": trial.prompt}
                generations[index] = engine.add_request(prompt, trial.params)
        engine.advance()
        step += 1
    return [generations[index] for index in range(len(arrivals))]


def _limit(engine: LLMEngine, limits: Limits) -> None:
    """Gives an idle engine a scheduler of its own, with empty pages."""
    _settle(engine)
    group = engine.runner.config.window_group
    scheduler = replace(
        engine.scheduler,
        pool=PagePool(limits.num_pages),
        window_pool=None if group is None else PagePool(group.num_pages),
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        mixed_sizes=(),
        is_caching=limits.is_caching,
        num_spare_pages=0,  # so that some are preempted
    )
    _use(engine, scheduler)


def _use(engine: LLMEngine, scheduler: Scheduler) -> None:
    engine.scheduler = scheduler
    engine.step_log = StepLog(engine.step_log.num_steps)  # of other pages


def _settle(engine: LLMEngine) -> None:
    """Reads the step that is still under way."""
    for _ in range(2):
        engine.advance()
