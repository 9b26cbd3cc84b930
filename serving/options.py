"""The options of the command line: fields of EngineConfig and SamplingParams, and how they are parsed."""

import argparse
import dataclasses
import difflib
import itertools
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from pjengine.config import NEUTRAL, EngineConfig


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is needed, got {text!r}")
    return int(text)


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"a JSON object is needed, got {text!r}")
    return value


def check_utf8(prompt: str) -> None:
    """Refuses what Python makes of arguments and input that are no UTF-8."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is not UTF-8: {prompt!r:.80}") from error


def template_text(text: str) -> str:
    """A chat template, or the file that holds it."""
    if "{" in text:
        return text
    try:
        return Path(text).read_text()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from error


class Option(NamedTuple):
    """An option that is a field of a dataclass, which checks its value."""

    field: str
    kind: Any  # what makes a value of the text; an action; or all that argparse wants to know
    metavar: str
    help: str  # where the field's default is None it says what that means
    flag: str | None = None  # None: the field's name
    short: str | None = None  # a second spelling

    @property
    def name(self) -> str:
        return self.flag or f"--{self.field.replace('_', '-')}"

    @property
    def how(self) -> dict[str, Any]:
        if isinstance(self.kind, dict):
            return self.kind
        if isinstance(self.kind, type) and issubclass(self.kind, argparse.Action):
            return {"action": self.kind}
        return {"metavar": self.metavar, "type": self.kind}


ENGINE_OPTIONS = (
    Option("dtype", str, "DTYPE", "auto (the checkpoint's own), bfloat16, float16 or float32"),
    Option("load_format", str, "FORMAT", "auto, safetensors, bin, or dummy for random weights"),
    Option("revision", str, "REV", "branch, tag or commit on the Hub (default: main)"),
    Option("download_dir", str, "DIR", "where Hub downloads are kept (default: huggingface_hub's cache)"),
    Option("hf_overrides", json_object, "JSON", "object that is laid over the model's config.json"),
    Option("seed", int, "N", "seed of dummy weights and of requests without a seed of their own"),
    Option(
        "max_model_len",
        str,
        "N",
        "longest prompt and output together, such as 8192, 8k or 8K tokens (default: the model's)",
    ),
    Option("max_num_seqs", int, "N", "requests that run at once (default: by device; 16 on a CPU)"),
    Option(
        "max_num_batched_tokens", int, "N", "tokens computed in one step (default: by device; 512 on a CPU)"
    ),
    Option("gpu_memory_utilization", float, "X", "share of the GPU's memory for weights, KV and activations"),
    Option("kv_cache_memory_bytes", int, "N", "bytes for KV pages (default: what the share above leaves)"),
    Option("page_size", int, "N", "tokens per KV page"),
    Option("decode_steps", int, "N", "tokens a request gets from one launch (default: by the model's size)"),
    Option(
        "speculative_config",
        json_object,
        "JSON",
        'draft tokens and verify several at once: {"method": "ngram", "num_speculative_tokens": 4}',
    ),
    Option(
        "tensor_parallel_size",
        int,
        "N",
        "devices that compute each token together",
        short="-tp",
    ),
    Option(
        "enable_expert_parallel",
        argparse.BooleanOptionalAction,
        "",
        "divide whole experts among these devices, and not each expert",
        short="-ep",
    ),
    Option(
        "disable_custom_all_reduce",
        argparse.BooleanOptionalAction,
        "",
        "sum over these devices with NCCL alone, and not through each other's memory",
    ),
    Option(
        "data_parallel_size",
        int,
        "N",
        "engines beside each other, each on as many devices",
        short="-dp",
    ),
    Option("scheduling_policy", str, "NAME", "fcfs, or priority: lower priorities go first"),
    Option(
        "prefill_first",
        argparse.BooleanOptionalAction,
        "",
        "decodes wait while prompts fill whole steps (default: of generate and bench)",
    ),
    Option("enable_prefix_caching", argparse.BooleanOptionalAction, "", "share pages of equal beginnings"),
    Option("max_logprobs", int, "N", "most that a request may ask for at a position; -1: the vocabulary"),
    Option("generation_config", str, "NAME", "auto: the model's own sampling defaults; vllm: neutral ones"),
    Option("compile_cache_dir", str, "DIR", "keeps compiled programs (default: ~/.cache/pjengine; '': none)"),
    Option("kernel_backend", str, "NAME", "triton, jax_triton or reference (default: the best that fits)"),
    Option(
        "deterministic",
        argparse.BooleanOptionalAction,
        "",
        "give a request the same bits whatever runs beside it",
    ),
)
# Of those that take requests. The file is readable by its owner only: the prompts are in it.
RECORD = Option(
    "record",
    str,
    "FILE",
    "write requests, prompts and outputs to a new file (mode 0600), for `pjengine replay`",
)
HOST_OPTIONS = (
    Option("nnodes", int, "N", "hosts whose devices compute together, each with a process like this one"),
    Option("node_rank", int, "N", "of this process; 0 is the head, which takes the requests"),
    Option("coordinator", str, "HOST:PORT", "address of the head's machine, where the others join it"),
    Option("distributed_executor_backend", str, "NAME", "ray: let Ray start a process on each node it has"),
)
TOKENIZER_OPTIONS = (
    Option("tokenizer", str, "MODEL", "folder or Hub id of the tokenizer (default: the model's)"),
    Option("tokenizer_revision", str, "REV", "branch, tag or commit of that tokenizer (default: main)"),
)
CHAT_TEMPLATE = Option(
    "chat_template", template_text, "FILE", "chat template, or its file (default: the tokenizer's own)"
)
SAMPLING_OPTIONS = (
    Option("temperature", float, "X", "0 takes the likeliest token; up to 2"),
    Option("top_p", float, "X", "keep the likeliest tokens that together reach this probability"),
    Option("top_k", int, "N", "keep the N likeliest tokens; 0: all"),
    Option("min_p", float, "X", "keep tokens at least this likely, relative to the likeliest"),
    Option("seed", int, "N", "seed of the requests (default: drawn from --seed)", "--sampling-seed"),
)


class Parser(argparse.ArgumentParser):
    """Errors are one line, and a mistyped option gets the name that is closest."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **settings)

    def add_commands(self, metavar: str) -> Any:
        """Adds what takes commands. Without any, the help is shown: it names them."""
        self.set_defaults(run=self._show_help, verbose=False)
        return self.add_subparsers(title=f"{metavar.lower()}s", metavar=metavar)

    def _show_help(self, _: argparse.Namespace) -> int:
        self.print_help(sys.stderr)
        return 2

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if args is not None and self._subparsers is None:
            args = [*self._config_file(args), *args]
            self._refuse_unknown(args)  # before a missing option is complained about
        elif args is not None:  # those that stand before the command
            self._refuse_unknown(itertools.takewhile(lambda arg: arg.startswith("-"), args))
        return super().parse_known_args(args, namespace)

    def _config_file(self, args: Sequence[str]) -> list[str]:
        """What the file of `--config` says, if the command has such an option, and it is given."""
        if "--config" not in self._option_string_actions:
            return []
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config")
        if (path := finder.parse_known_args(args)[0].config) is None:
            return []
        from pjengine.serving.config_file import read_arguments

        try:
            return read_arguments(path, self._option_string_actions)
        except (OSError, ValueError) as error:
            self.error(str(error))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Names the command that is closest to one that is mistyped."""
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            close = difflib.get_close_matches(value, action.choices, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(action.choices)}"
            self.error(f"no such {str(action.metavar).lower()}: {value!r}; {hint}")
        super()._check_value(action, value)

    def _refuse_unknown(self, args: Iterable[str]) -> None:
        for arg in args:
            name = arg.partition("=")[0]
            if arg == "--":
                return
            if not name.startswith("--") or " " in name or name in self._option_string_actions:
                continue
            close = difflib.get_close_matches(name, self._option_string_actions, n=1)
            self.error(f"no such option: {name}" + (f"; did you mean {close[0]}?" if close else ""))

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"pjengine: {message} (see {self.prog} --help)\n")


class _HelpFormatter(argparse.HelpFormatter):
    """Leaves room for the longest option, and says defaults that are not None."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):  # which is indented once more than argparse counts
            self._action_max_length += self._indent_increment

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_said = action.default in (None, False, argparse.SUPPRESS) or "(default" in (action.help or "")
        return action.help if is_said else f"{action.help} (default: %(default)s)"


def add_options(group: Any, options: Iterable[Option], settings: type[Any]) -> None:
    """Adds options that are left out of the namespace unless given; the dataclass knows the defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    for option in options:
        default = defaults[option.field]
        is_empty = default is False or default in (None, "", (), dataclasses.MISSING)
        is_said = is_empty or "(default" in option.help
        group.add_argument(
            *([option.name] if option.short is None else [option.short, option.name]),
            default=argparse.SUPPRESS,
            help=option.help if is_said else f"{option.help} (default: {default})",
            **option.how,
        )


class _NeutralAction(argparse.Action):
    """Takes an option of vLLM where it asks for nothing, and says else that it is not supported."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if self.nargs == 0:
            values = not (option_string or "").startswith("--no-")
        if values not in NEUTRAL[self.dest]:
            shown = option_string if self.nargs == 0 else f"{option_string} {values}"
            parser.error(f"{shown} is not supported yet: {self.help}")


_SHORT_FLAGS = {"pipeline_parallel_size": "-pp"}


def add_neutral_options(command: argparse.ArgumentParser) -> None:
    """Adds options of vLLM for what is not here, unless the command has one of that name."""
    group = command.add_argument_group("of vLLM, taken where they ask for nothing")
    for name, (neutral, *_) in NEUTRAL.items():
        flag = f"--{name.replace('_', '-')}"
        if flag in command._option_string_actions:
            continue
        flags, taken = [flag], f"only {neutral}"
        how: dict[str, Any] = {"metavar": "X"}
        if neutral is None:
            taken = "leave it out"
        elif isinstance(neutral, bool):
            no = f"--no-{flag.removeprefix('--')}"
            flags, how, taken = [flag, no], {"nargs": 0}, f"only {flag if neutral else no}"
        else:
            how["type"] = type(neutral)
        if name == "trust_remote_code":
            taken += ": checkpoints run no code here"
        if name in _SHORT_FLAGS:
            flags.append(_SHORT_FLAGS[name])
        group.add_argument(
            *flags, dest=name, action=_NeutralAction, default=argparse.SUPPRESS, help=taken, **how
        )


def given(args: argparse.Namespace, options: Iterable[Option]) -> dict[str, Any]:
    """The options that were given, by the names of their fields."""
    named = {option.field: option.name.removeprefix("--").replace("-", "_") for option in options}
    return {field: getattr(args, name) for field, name in named.items() if hasattr(args, name)}


def add_engine_options(command: argparse.ArgumentParser, *more: Option) -> Any:
    """Adds the options of the engine and `--verbose`; returns the group."""
    engine = command.add_argument_group("engine")
    add_options(engine, (*ENGINE_OPTIONS, *more), EngineConfig)
    command.add_argument("--verbose", action="store_true", help="log what happens, to standard error")
    add_neutral_options(command)
    return engine
