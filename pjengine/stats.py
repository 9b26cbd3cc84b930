"""What the engine has done and is doing, in numbers, and in a line for the log."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from pjengine.engine import LLMEngine
from pjengine.pallas_kernels.dispatch import chosen_backends
from pjengine.replicas import Engine, engines_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """One moment of an engine. Its thread may go on while they are read: each number is whole."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float  # of the pages, in the group where it is highest; 1: all
    num_prompt_tokens: int  # and all below: since the engine started
    num_generation_tokens: int
    num_preemptions: int
    num_cache_queries: int
    num_cache_hits: int
    num_drafts: int = 0  # times that a row had any
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_by_position: tuple[int, ...] = ()  # of each token of a draft, how often it was kept
    num_recompiles: int
    compile_s: float = 0.0  # that callers waited for programs
    kernel_backends: Mapping[str, str]  # of each op of the programs


def read_stats(engine: Engine) -> EngineStats:
    """Of all its engines together: sums, and the highest share of pages."""
    return total([read_own_stats(own) for own in engines_of(engine)])


def total(each: Sequence[EngineStats]) -> EngineStats:
    """Engines beside each other, as one."""
    first, *others = each
    if not others:
        return first
    names = [own.name for own in fields(EngineStats) if own.name.startswith("num_")]
    positions = zip(*(stats.accepted_by_position for stats in each), strict=True)
    return replace(
        first,
        **{name: sum(getattr(stats, name) for stats in each) for name in names},
        kv_cache_usage=max(stats.kv_cache_usage for stats in each),
        compile_s=max(stats.compile_s for stats in each),
        accepted_by_position=tuple(sum(counts) for counts in positions),
    )


def read_own_stats(engine: LLMEngine) -> EngineStats:
    scheduler, speculation = engine.scheduler, engine.scheduler.speculation
    return EngineStats(
        num_running=scheduler.rows.num_rows - scheduler.rows.num_free,
        num_waiting=scheduler.num_waiting,
        kv_cache_usage=max(1 - pool.num_free / pool.num_usable for pool in scheduler.pools),
        num_prompt_tokens=scheduler.num_prompt_tokens,
        num_generation_tokens=engine.num_generation_tokens,
        num_preemptions=scheduler.num_preemptions,
        num_cache_queries=scheduler.num_cache_queries,
        num_cache_hits=scheduler.num_cache_hits,
        num_drafts=0 if speculation is None else speculation.num_drafts,
        num_draft_tokens=0 if speculation is None else speculation.num_draft_tokens,
        num_accepted_tokens=0 if speculation is None else speculation.num_accepted_tokens,
        accepted_by_position=() if speculation is None else tuple(speculation.accepted_by_position.tolist()),
        num_recompiles=engine.runner.recompiles_after_warmup,
        compile_s=engine.runner.compile_s,
        kernel_backends=chosen_backends(),
    )


def log_stats(before: EngineStats, now: EngineStats, seconds: float) -> None:
    """Logs what has happened in between; at the level of debugging, if nothing has."""

    def grown(name: str) -> int:
        return max(0, getattr(now, name) - getattr(before, name))  # smaller: the engine has started over

    queries = grown("num_cache_queries")
    hits = f"{grown('num_cache_hits') / queries:.1%}" if queries else "-"
    drafted = grown("num_draft_tokens")
    is_idle = before.num_running == now.num_running == now.num_waiting == grown("num_generation_tokens") == 0
    logger.log(
        logging.DEBUG if is_idle else logging.INFO,
        "prompt %.1f tokens/s, generation %.1f tokens/s, running %d, waiting %d, preempted %d, "
        "KV usage %.1f%%, prefix hits %s%s",
        grown("num_prompt_tokens") / seconds,
        grown("num_generation_tokens") / seconds,
        now.num_running,
        now.num_waiting,
        grown("num_preemptions"),
        100 * now.kv_cache_usage,
        hits,
        f", drafts kept {grown('num_accepted_tokens') / drafted:.1%}" if drafted else "",
    )
