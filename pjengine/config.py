"""Every setting, checked once and then frozen. The only module that touches the environment."""

import difflib
import numbers
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pjengine.models.window_group import WindowGroup
from pjengine.speculation_config import SpeculationConfig

DTYPES = ("auto", "bfloat16", "float16", "float32")
LOAD_FORMATS = ("auto", "safetensors", "bin", "dummy")
SCHEDULING_POLICIES = ("fcfs", "priority")
GENERATION_CONFIGS = ("auto", "vllm")
DTYPE_ALIASES = {"half": "float16", "float": "float32"}
FLAGS = (
    *("skip_tokenizer_init", "enable_expert_parallel", "enable_prefix_caching"),
    *("disable_custom_all_reduce", "warm_up", "use_tqdm_on_load", "deterministic"),
)
# Whole numbers: the least, and one more than the most.
LIMITS = {
    "kv_cache_memory_bytes": (1, 2**63),
    "max_model_len": (2, 2**31),
    "max_num_seqs": (1, 2**31),
    "max_num_batched_tokens": (1, 2**31),
    "decode_steps": (1, 2**31),
    "tensor_parallel_size": (1, 2**16),
    "data_parallel_size": (1, 2**16),
    "nnodes": (1, 2**16),
    "node_rank": (0, 2**16),
    "max_logprobs": (-1, 2**31),
    "seed": (0, 2**63),
}
NEVER_NONE = ("max_logprobs", "seed", "tensor_parallel_size", "data_parallel_size", "nnodes", "node_rank")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What a caller can choose, by vLLM's names. None means: decided from the model and the device.

    Raises:
      ValueError: a value is out of its range; the text names it.
    """

    model: str
    tokenizer: str | None = None  # None: the model's own
    skip_tokenizer_init: bool = False  # then prompts must be token ids
    chat_template: str | None = None  # Jinja text; None: the tokenizer's own
    revision: str | None = None
    tokenizer_revision: str | None = None
    download_dir: str | None = None
    hf_token: str | None = field(default=None, repr=False)
    hf_overrides: Mapping[str, Any] = field(default_factory=dict)  # laid over config.json
    dtype: str = "auto"
    load_format: str = "auto"  # dummy: random weights
    seed: int = 0
    gpu_memory_utilization: float = 0.92  # of the device's memory, for weights, KV pages and activations
    kv_cache_memory_bytes: int | None = None  # overrides what gpu_memory_utilization leaves for KV pages
    # Prompt and output together, in tokens: also "8k" (8000), "8K" (8192); None, -1 and "auto": what fits.
    max_model_len: int | str | None = None
    max_num_seqs: int | None = None  # requests that run at once
    max_num_batched_tokens: int | None = None  # tokens computed in one step
    decode_steps: int | None = None  # tokens a request gets from one launch, when none has a prompt to read
    page_size: int = 16  # tokens per page
    # Draft tokens and verify several in a step: a dict with vLLM's keys, such as {"method": "ngram",
    # "num_speculative_tokens": 4} or {"model": ..., "num_speculative_tokens": 4}; see `SpeculationConfig`.
    speculative_config: Any = None
    tensor_parallel_size: int = 1  # devices that compute each token together
    enable_expert_parallel: bool = False  # each of them has whole experts, and not a part of every one
    disable_custom_all_reduce: bool = False  # sums over devices by the collective library alone
    data_parallel_size: int = 1  # engines beside each other, each on as many devices as that
    nnodes: int = 1  # hosts that the devices are divided among evenly, each with a process of its own
    node_rank: int = 0  # of this one; 0 is the head, which takes the requests
    coordinator: str | None = None  # HOST:PORT of the head's machine, where the others join it
    distributed_executor_backend: str | None = None  # "ray": all nodes of its cluster, for these three
    enable_prefix_caching: bool = True  # requests share the pages of what they have in common
    scheduling_policy: str = "fcfs"  # or "priority": lower priorities first
    # While prompts fill whole steps, and each has a row, decodes wait: most loads end sooner, but tokens come
    # less evenly. None: an LLM does so, whose callers wait for whole answers; AsyncLLM and LLMEngine do not.
    prefill_first: bool | None = None
    max_logprobs: int = 20  # that a request may ask for at each position; -1: the whole vocabulary
    generation_config: str = "auto"  # the model's own defaults of sampling; "vllm": neutral ones
    kernel_backend: str | None = None  # None: the best that this device and these shapes allow
    # The same request gives the same bits, whatever runs beside it: see `determinism.py`.
    deterministic: bool = False
    record: str | None = None  # a new file for all requests and their outputs, as `recording.py` writes it
    warm_up: bool = True  # make every program at once; the first request waits for its own only
    use_tqdm_on_load: bool = False  # progress bars, on standard error, of what start-up waits for
    compile_cache_dir: str | None = None  # keeps compiled programs; "": none; None: ~/.cache/pjengine

    def __post_init__(self) -> None:
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.prefill_first, bool | None):
            raise ValueError(f"prefill_first must be True, False or None, got {self.prefill_first!r}")
        if not isinstance(self.hf_overrides, Mapping):
            raise ValueError(f"hf_overrides must be a dict, got {self.hf_overrides!r:.80}")
        if isinstance(self.dtype, str):
            object.__setattr__(self, "dtype", DTYPE_ALIASES.get(self.dtype, self.dtype))
        for name, choices in (
            ("dtype", DTYPES),
            ("load_format", LOAD_FORMATS),
            ("scheduling_policy", SCHEDULING_POLICIES),
            ("generation_config", GENERATION_CONFIGS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        share = self.gpu_memory_utilization
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
            raise ValueError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization!r}")
        if not is_whole(self.page_size) or self.page_size < 16 or self.page_size & (self.page_size - 1):
            raise ValueError(f"page_size must be a power of two and at least 16, got {self.page_size!r}")
        object.__setattr__(self, "max_model_len", parse_length(self.max_model_len))
        for name, (least, end) in LIMITS.items():
            value, needs_value = getattr(self, name), name in NEVER_NONE
            if (value is not None or needs_value) and not (is_whole(value) and least <= value < end):
                raise ValueError(
                    f"{name} must be a whole number of at least {least} and less than {end}"
                    f"{'' if needs_value else ', or None'}, got {value!r:.80}"
                )
        self._check_together()

    @property
    def speculation(self) -> SpeculationConfig | None:
        """What `speculative_config` says."""
        wanted = self.speculative_config
        return None if wanted is None else SpeculationConfig.read(wanted, self.page_size)

    @property
    def draft(self) -> "EngineConfig | None":
        """What the draft model is loaded by, where there is one."""
        speculation = self.speculation
        if speculation is None or speculation.model is None:
            return None
        return replace(
            self,
            model=speculation.model,
            revision=None,
            hf_overrides={},
            enable_expert_parallel=False,
            seed=(self.seed + 1) % 2**32,  # dummy weights of its own
            speculative_config=None,
        )

    def _check_together(self) -> None:
        """Raises ValueError where one setting does not go with another."""
        if self.decode_steps is not None and self.decode_steps > self.page_size:
            raise ValueError(
                f"decode_steps must be at most page_size={self.page_size}, got {self.decode_steps}"
            )
        self._check_deterministic()
        _ = self.speculation  # reads `speculative_config`, and refuses what is wrong with it
        if self.enable_expert_parallel and self.tensor_parallel_size == 1:
            raise ValueError(
                "enable_expert_parallel=True divides experts among the devices of tensor_parallel_size, "
                "which is 1: raise it, or leave enable_expert_parallel out"
            )
        self._check_hosts()
        if self.tokenizer_revision is not None and self.tokenizer is None:
            raise ValueError(
                f"tokenizer_revision={self.tokenizer_revision!r} is of the tokenizer that `tokenizer` names, "
                "and none is named; the model's own comes with `revision`"
            )

    def _check_deterministic(self) -> None:
        """Raises ValueError where a setting does not go with `deterministic` or `record`."""
        if self.deterministic:
            if self.speculative_config is not None:
                raise ValueError(
                    "deterministic=True computes each output token in a step of its own, and "
                    "speculative_config verifies several at once: leave one of them out"
                )
            if (self.decode_steps or 1) > 1:
                raise ValueError(
                    f"deterministic=True gives one token a launch, got decode_steps={self.decode_steps}: "
                    "leave it out"
                )
            if self.prefill_first is not None:
                raise ValueError(
                    f"deterministic=True never has prompts beside decodes, got prefill_first="
                    f"{self.prefill_first}: leave it out"
                )
            if self.tensor_parallel_size > 2:
                raise ValueError(
                    "deterministic=True takes at most tensor_parallel_size=2: the sums of more devices are "
                    f"in an order that depends on the place in a batch; got {self.tensor_parallel_size}"
                )
        if self.record is None:
            return
        if not isinstance(self.record, str) or not self.record:
            raise ValueError(f"record must be the name of a file, or None, got {self.record!r:.80}")
        ray = self.distributed_executor_backend is not None
        if self.data_parallel_size > 1 or self.nnodes > 1 or ray:
            raise ValueError("record is of one engine on one host: leave it out, or run such a one")
        if self.speculative_config is not None:
            raise ValueError(
                "record cannot keep what speculative_config decides by the clock: leave one of them out"
            )

    def _check_hosts(self) -> None:
        """Raises ValueError where the settings of several hosts do not go together."""
        backend = self.distributed_executor_backend
        if backend not in (None, "ray"):
            raise ValueError(f"distributed_executor_backend must be None or 'ray', got {backend!r:.80}")
        if backend is not None and self.nnodes > 1:
            raise ValueError(f"nnodes={self.nnodes}: leave it out, a Ray cluster says how many there are")
        if self.data_parallel_size > 1 and (self.nnodes > 1 or backend is not None):
            raise ValueError(
                f"data_parallel_size={self.data_parallel_size} is of one host: run an engine on each, behind "
                "a load balancer, or leave it out"
            )
        if self.nnodes == 1:
            for name, neutral in (("node_rank", 0), ("coordinator", None)):
                if getattr(self, name) != neutral:
                    raise ValueError(f"{name}={getattr(self, name)!r} is of several hosts, and nnodes=1")
            return
        host, _, port = (self.coordinator or "").rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 2**16):
            raise ValueError(
                f"nnodes={self.nnodes} needs coordinator='HOST:PORT', an address of the machine of "
                f"node_rank=0; got {self.coordinator!r:.80}"
            )
        if self.node_rank >= self.nnodes:
            raise ValueError(f"node_rank must be less than nnodes={self.nnodes}, got {self.node_rank}")
        if self.tensor_parallel_size % self.nnodes:
            raise ValueError(
                f"tensor_parallel_size={self.tensor_parallel_size} does not divide among "
                f"nnodes={self.nnodes}: it is the number of all their devices, as many of each"
            )


@dataclass(frozen=True, kw_only=True)
class RunnerConfig:
    """The sizes that the compiled programs are made for."""

    num_pages: int
    page_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    decode_steps: int = 1
    # Tokens of a step with logprobs of a prompt: a power of two, at least max_num_seqs. None: any number.
    max_prompt_logprob_tokens: int | None = None
    max_states: int | None = (
        None  # hidden states that a step keeps: its tokens times layers. None: any number
    )
    kernel_backend: str | None = None
    disable_custom_all_reduce: bool = False
    window_group: WindowGroup | None = (
        None  # layers with pages of their own; then `num_pages` is of the others
    )
    speculation: SpeculationConfig | None = None
    is_deterministic: bool = False
    is_batch_invariant: bool = False  # then decode steps of any size give the same bits
    # No step runs as a larger one while its own program is made, so that what runs depends on requests alone.
    waits_for_programs: bool = False

    @property
    def num_groups(self) -> int:
        """Of KV pages, each with a page table of its own."""
        return 1 if self.window_group is None else 2

    @property
    def pages_per_seq(self) -> int:
        return -(-self.max_model_len // self.page_size)

    @cached_property
    def decode_buckets(self) -> tuple[int, ...]:
        """Numbers of sequences that decode programs are compiled for."""
        if self.is_deterministic:
            return invariant_buckets(self.max_num_seqs) if self.is_batch_invariant else (self.max_num_seqs,)
        # Above 128 sequences a step's time grows with them: a power of two would pad by up to a half.
        step = max(128, self.max_num_seqs // 8)
        large = range(2 * step, self.max_num_seqs, step)
        return tuple(sorted({*buckets(1, min(step, self.max_num_seqs)), *large, self.max_num_seqs}))

    @cached_property
    def draft_buckets(self) -> tuple[int, ...]:
        """Numbers of sequences that decode programs with drafts are compiled for."""
        if self.speculation is None:
            return ()
        return buckets(1, min(self.max_num_seqs, self.speculation.max_num_seqs))

    @cached_property
    def mixed_buckets(self) -> tuple[int, ...]:
        """Numbers of tokens that mixed programs are compiled for."""
        most = self.max_num_batched_tokens
        if self.is_deterministic:
            return (most,)
        # On a GPU these steps, which a prompt or two make, cost as much as they have blocks of 128 tokens.
        between = [size for size in (384, 768) if size <= most // 16]
        return tuple(sorted({*buckets(min(max(32, most // 128), most), most), *between}))


def invariant_buckets(max_num_seqs: int) -> tuple[int, ...]:
    """Of decode steps in a deterministic engine. Below 64 rows other kernels make the products."""
    return (*(size for size in (64, 128, 256, 512) if size < max_num_seqs), max_num_seqs)


# vLLM's name -> ours.
RENAMED = {"block_size": "page_size"}
# Settings of vLLM that are not here, and the values that say just that.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "pipeline_parallel_size": (1,),
    **dict.fromkeys(("trust_remote_code", "enforce_eager", "enable_lora", "enable_sleep_mode"), (False,)),
    **dict.fromkeys(("quantization", "quantization_config"), (None,)),
    **dict.fromkeys(("code_revision", "logits_processors"), (None,)),
    **dict.fromkeys(("kv_cache_dtype", "tokenizer_mode", "config_format"), ("auto",)),
    **dict.fromkeys(("cpu_offload_gb", "swap_space"), (0, 0.0)),
    "enable_chunked_prefill": (True, None),
    "disable_log_stats": (True,),
}


def known_settings(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings that are fields of `EngineConfig`: all but those of NEUTRAL.

    Raises:
      TypeError: one is neither; the text names the closest.
      NotImplementedError: one of NEUTRAL asks for what is not here.
    """
    names = [setting.name for setting in fields(EngineConfig)]
    known = {}
    for name, value in settings.items():
        if name in NEUTRAL:
            if not any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL[name]):
                raise NotImplementedError(f"{name}={value!r:.80} is not supported, only {NEUTRAL[name][0]!r}")
            continue
        if name not in names:
            close = [RENAMED[name]] if name in RENAMED else difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"there is no setting {name!r}{hint}")
        known[name] = value
    return known


def is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def parse_length(value: Any) -> Any:
    """A number of tokens as vLLM writes it: 8192, "8k", "25.6k", "8K"; None for -1 and "auto"."""
    if value in (-1, "-1", "auto", None):
        return None
    if not isinstance(value, str):
        return int(value) if is_whole(value) else value
    units = {"k": 1000, "K": 1024, "m": 10**6, "M": 2**20}
    try:
        return round(float(value[:-1]) * units[value[-1]]) if value[-1:] in units else int(value)
    except ValueError:
        return value


def buckets(smallest: int, largest: int) -> tuple[int, ...]:
    """Powers of two from `smallest`, and `largest` itself."""
    sizes = []
    while smallest < largest:
        sizes.append(smallest)
        smallest *= 2
    return (*sizes, largest)


def compile_cache_folder(wanted: str | None) -> Path | None:
    """Where compiled programs are kept: `wanted`, or the user's cache folder.

    None if `wanted` is empty, or if it is None and the user has no home.
    """
    if wanted is not None:
        return Path(wanted).expanduser() if wanted else None
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pjengine"
    except RuntimeError:
        return None


def api_keys() -> tuple[str, ...]:
    """The server's key that the environment sets, if it does."""
    key = os.environ.get("PJENGINE_API_KEY")
    return (key,) if key else ()


def hosts_secret() -> str:
    """What the processes of several hosts know each other by; empty: whoever reaches the port may join."""
    return os.environ.get("PJENGINE_HOSTS_SECRET", "")


def set_hosts_secret(secret: str) -> None:
    os.environ["PJENGINE_HOSTS_SECRET"] = secret


def client_api_key() -> str | None:
    """The key that clients send, as OpenAI's own read it."""
    return os.environ.get("OPENAI_API_KEY") or None


# What a report of the environment shows. Of keys it says only whether there is one.
SHOWN_VARIABLES = (
    *("JAX_PLATFORMS", "XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"),
    *("XLA_PYTHON_CLIENT_PREALLOCATE", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "LD_LIBRARY_PATH"),
    *("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "XDG_CACHE_HOME"),
)
SECRET_VARIABLES = ("PJENGINE_API_KEY", "PJENGINE_HOSTS_SECRET", "OPENAI_API_KEY", "HF_TOKEN")


def shown_variables() -> dict[str, str]:
    """Those of the environment that pjengine or its libraries heed; of keys, not the values."""
    names = (*SHOWN_VARIABLES, *sorted(name for name in os.environ if name.startswith("NCCL_")))
    shown = {name: os.environ[name] for name in names if name in os.environ}
    return shown | {name: "set, not shown" for name in SECRET_VARIABLES if os.environ.get(name)}


def leave_device_memory() -> None:
    """Has JAX take device memory as it is needed, for who only looks at the device."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def xla_flags() -> str:
    """The flags that XLA was started with."""
    return os.environ.get("XLA_FLAGS", "")


def add_xla_flag(flag: str) -> None:
    """Sets a flag of this process, before JAX starts its backend: XLA reads them once, then."""
    os.environ["XLA_FLAGS"] = f"{xla_flags()} {flag}".strip()


def reserve_device_memory(fraction: float) -> float:
    """Lets JAX take `fraction` of a GPU's memory, and returns the fraction that is in force.

    A fraction that the environment sets already stays, and so does that of an earlier engine: JAX
    reads it once, when it starts its backend.
    """
    if in_force := os.environ.get("XLA_CLIENT_MEM_FRACTION"):
        return float(in_force)
    return float(os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(fraction)))
