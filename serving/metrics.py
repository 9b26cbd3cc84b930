"""Metrics for Prometheus, under vLLM's names."""

from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client import Counter as PrometheusCounter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pjengine.outputs import RequestOutput
from pjengine.replicas import Engine, engines_of
from pjengine.sampling_params import RequestOutputKind, SamplingParams
from pjengine.serving.recent import Recent
from pjengine.stats import read_own_stats

_LABELS = ("model_name", "engine")
_STEPS = (1, 2.5, 5)
_SECONDS = tuple(step * 10.0**power for power in range(-3, 4) for step in _STEPS)
_NUMBERS = (1, 2, 5, 10, 20)
_TOKENS = tuple(step * 10**power for power in range(7) for step in (1, 2, 5))

# Histogram -> what it holds, from the metrics of a request that has ended.
_TIMES = {
    "time_to_first_token_seconds": ("From arrival to the first token.", "ttft_s"),
    "request_time_per_output_token_seconds": ("Mean time per output token after the first.", "tpot_s"),
    "e2e_request_latency_seconds": ("From arrival to the end.", "e2e_s"),
    "request_queue_time_seconds": ("From arrival, tokenization included, to the first step.", "queue_s"),
    "request_prefill_time_seconds": ("From the first step to the first token.", "prefill_s"),
    "request_decode_time_seconds": ("From the first token to the last.", "decode_s"),
}

# What an engine counts by itself: a help text, and the field of `EngineStats`.
_GAUGES = {
    "num_requests_running": ("Continuations that run.", "num_running"),
    "num_requests_waiting": ("Continuations that wait for room.", "num_waiting"),
    "kv_cache_usage_perc": ("Share of the KV pages that are held; 1 is all.", "kv_cache_usage"),
}
_COUNTERS = {
    "prompt_tokens": ("Tokens of prompts that have begun to run.", "num_prompt_tokens"),
    "generation_tokens": ("Tokens generated.", "num_generation_tokens"),
    "num_preemptions": ("Continuations that had to make room.", "num_preemptions"),
    "prefix_cache_queries": ("Tokens looked up in the prefix cache.", "num_cache_queries"),
    "prefix_cache_hits": ("Tokens found there.", "num_cache_hits"),
    "spec_decode_num_drafts": ("Times that tokens were drafted.", "num_drafts"),
    "spec_decode_num_draft_tokens": ("Tokens drafted.", "num_draft_tokens"),
    "spec_decode_num_accepted_tokens": ("Drafted tokens that held.", "num_accepted_tokens"),
    "recompiles_after_warmup": ("Programs compiled after warm-up.", "num_recompiles"),
}


class Metrics:
    """What is measured of requests as they pass, and what the engine counts by itself."""

    def __init__(self, engine: Engine, *, model_name: str, prefix: str) -> None:
        self.recent = Recent()
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine, prefix, model_name))
        self._model_name = model_name
        all_labels = [(model_name, str(index)) for index in range(len(engines_of(engine)))]

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> list[Histogram]:
            """One for each engine."""
            made = Histogram(f"{prefix}:{name}", help, _LABELS, registry=self._registry, buckets=buckets)
            return [made.labels(*labels) for labels in all_labels]

        self._times = {
            attribute: histogram(name, help, _SECONDS) for name, (help, attribute) in _TIMES.items()
        }
        self.gaps = histogram(
            "inter_token_latency_seconds", "Between tokens of requests that are streamed.", _SECONDS
        )
        self._prompt_tokens = histogram("request_prompt_tokens", "Tokens of prompts.", _TOKENS)
        self._generation_tokens = histogram("request_generation_tokens", "Tokens of answers.", _TOKENS)
        self._most_tokens = histogram(
            "request_max_num_generation_tokens", "Tokens of the longest continuation.", _TOKENS
        )
        self._n = histogram("request_params_n", "Continuations that are asked for.", _NUMBERS)
        self._max_tokens = histogram("request_params_max_tokens", "Most tokens that are asked for.", _TOKENS)
        self._ends = PrometheusCounter(
            f"{prefix}:request_success",
            "Continuations that have ended, by reason.",
            (*_LABELS, "finished_reason"),
            registry=self._registry,
        )

    def watch(self, params: SamplingParams) -> "Watch":
        """For a request that begins."""
        return Watch(self, params)

    def add(
        self, params: SamplingParams, output: RequestOutput | None, most_tokens: int, reasons: Counter[str]
    ) -> None:
        """Counts a request that has ended; `output` is its last, if there was any."""
        engine = 0 if output is None else output.metrics.engine_index
        for reason, count in reasons.items():
            self._ends.labels(self._model_name, str(engine), reason).inc(count)
        if output is None:
            return
        self.recent.tpot.add(output.metrics.tpot_s)
        for attribute, histograms in self._times.items():
            if (value := getattr(output.metrics, attribute)) is not None:
                histograms[engine].observe(value)
        self._prompt_tokens[engine].observe(len(output.prompt_token_ids))
        self._generation_tokens[engine].observe(output.metrics.num_generation_tokens)
        self._most_tokens[engine].observe(most_tokens)
        self._n[engine].observe(params.n)
        if params.max_tokens is not None:
            self._max_tokens[engine].observe(params.max_tokens)

    def exposition(self) -> bytes:
        """All of them, in Prometheus's text format."""
        return generate_latest(self._registry)


class Watch:
    """What is seen of one request."""

    def __init__(self, metrics: Metrics, params: SamplingParams) -> None:
        self._metrics, self._params, self._n = metrics, params, params.n
        self._is_delta = params.output_kind is RequestOutputKind.DELTA
        self._num_tokens = [0] * params.n
        self._output: RequestOutput | None = None
        self._has_begun = False  # its first token has been seen
        self._last_token_s: float | None = None
        self._reasons: Counter[str] = Counter()

    def see(self, output: RequestOutput) -> None:
        if not self._has_begun and output.metrics.first_token_s is not None:
            self._has_begun = True
            self._metrics.recent.ttft.add(output.metrics.ttft_s)
        last_token_s = output.metrics.last_token_s
        if self._last_token_s is not None and last_token_s is not None and last_token_s > self._last_token_s:
            self._metrics.gaps[output.metrics.engine_index].observe(last_token_s - self._last_token_s)
        self._output, self._last_token_s = output, last_token_s
        for completion in output.outputs:
            before = self._num_tokens[completion.index] if self._is_delta else 0
            self._num_tokens[completion.index] = before + len(completion.token_ids)
            if completion.finish_reason is not None:
                self._reasons[completion.finish_reason] += 1

    def refuse(self) -> None:
        """It has not been run, and is no request that has ended."""
        self._n = 0

    def end(self) -> None:
        """Whatever has not finished by now has been left by its client, or by the engine."""
        if left := self._n - self._reasons.total():
            self._reasons["abort"] += left
        self._metrics.add(self._params, self._output, max(self._num_tokens), self._reasons)


class _EngineCollector:
    """Reads the engines when Prometheus asks: whole numbers, which other threads may change meanwhile."""

    def __init__(self, engine: Engine, prefix: str, model_name: str) -> None:
        self._engine, self._prefix, self._model_name = engine, prefix, model_name

    def collect(self) -> Iterator[Metric]:
        each = {
            (self._model_name, str(index)): read_own_stats(own)
            for index, own in enumerate(engines_of(self._engine))
        }
        for kind, numbers in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, (help, field) in numbers.items():
                family = kind(f"{self._prefix}:{name}", help, labels=_LABELS)
                for labels, stats in each.items():
                    family.add_metric(labels, getattr(stats, field))
                yield family
        accepted = CounterMetricFamily(
            f"{self._prefix}:spec_decode_num_accepted_tokens_per_pos",
            "Drafted tokens that held, by their place in the draft.",
            labels=(*_LABELS, "position"),
        )
        backends = GaugeMetricFamily(
            f"{self._prefix}:kernel_backend_info", "What runs each op.", labels=(*_LABELS, "op", "backend")
        )
        for labels, stats in each.items():
            for position, count in enumerate(stats.accepted_by_position):
                accepted.add_metric((*labels, str(position)), count)
            for op, backend in stats.kernel_backends.items():
                backends.add_metric((*labels, op, backend), 1)
        yield accepted
        yield backends
