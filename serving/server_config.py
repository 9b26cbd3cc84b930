"""What an operator can choose about the HTTP server, checked once and then frozen."""

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pjengine.serving.reasoning import REASONING_PARSERS
from pjengine.serving.tool_parsers import TOOL_PARSERS

LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What an operator can choose, by the names of vLLM's flags where it has them.

    Raises:
      ValueError: a value is out of its range; the text names it.
    """

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    uds: str | None = None  # path of a Unix socket, in place of host and port
    root_path: str = ""  # under which a proxy shows the server
    api_keys: Sequence[str] = field(default=(), repr=False)  # none: everybody is let in
    served_model_names: Sequence[str] = ()  # the first is the one in answers; none: the model's own
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    allowed_origins: tuple[str, ...] = ()  # of web pages that may call; none: no CORS headers at all
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    max_request_bytes: int = 16 * 2**20
    request_timeout_s: float | None = None  # from the body's arrival to the end of the answer
    max_waiting: int | None = None  # continuations that may wait beyond the max_num_seqs that run
    max_sequences_per_request: int | None = None  # prompts x n; none: 8 x max_num_seqs, at least 128
    shutdown_timeout_s: float = 25.0  # below the 30 s that Kubernetes gives
    response_role: str = "assistant"
    trust_request_chat_template: bool = False
    default_chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    enable_auto_tool_choice: bool = False  # the model itself decides whether to call tools
    tool_call_parser: str | None = None  # how the model writes calls
    exclude_tools_when_tool_choice_none: bool = False  # from the chat template
    reasoning_parser: str | None = None  # how the model marks its reasoning; none: it is content
    return_tokens_as_token_ids: bool = False
    enable_request_id_headers: bool = False
    enable_log_requests: bool = False
    disable_log_stats: bool = False
    metrics_prefix: str = "pjengine"
    uvicorn_log_level: str = "info"
    disable_uvicorn_access_log: bool = False

    def __post_init__(self) -> None:
        for name in ("api_keys", "served_model_names"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port must be in [0, 65535], got {self.port}")
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ValueError("ssl_keyfile and ssl_certfile go together: give both, or none")
        if "" in self.api_keys:
            raise ValueError("an api_key must not be empty")
        least = {
            "max_request_bytes": 1,
            "max_waiting": 0,
            "max_sequences_per_request": 1,
            "shutdown_timeout_s": 0,
        }
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and not lowest <= value:
                raise ValueError(f"{name} must be at least {lowest}, got {value}")
        if self.request_timeout_s is not None and not self.request_timeout_s > 0:
            raise ValueError(f"request_timeout_s must be above 0, got {self.request_timeout_s}")
        for name, parsers in (("tool_call_parser", TOOL_PARSERS), ("reasoning_parser", REASONING_PARSERS)):
            if (value := getattr(self, name)) is not None and value not in parsers:
                raise ValueError(f"{name} must be one of {', '.join(parsers)}, got {value!r}")
        if self.enable_auto_tool_choice and self.tool_call_parser is None:
            raise ValueError(
                f"enable_auto_tool_choice needs tool_call_parser, one of {', '.join(TOOL_PARSERS)}"
            )
        if not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", self.metrics_prefix):
            raise ValueError(f"metrics_prefix must be a name, such as vllm; got {self.metrics_prefix!r}")
        if self.uvicorn_log_level not in LOG_LEVELS:
            raise ValueError(
                f"uvicorn_log_level must be one of {', '.join(LOG_LEVELS)}, got {self.uvicorn_log_level!r}"
            )

    @property
    def is_open(self) -> bool:
        """Whether other machines get in without a key."""
        if self.api_keys or self.uds is not None or self.host == "localhost":
            return False
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name
            return True
