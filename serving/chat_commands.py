"""`pjengine chat` and `pjengine complete`: a person talks to a server, or to a model in this process."""

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pjengine.config import EngineConfig, client_api_key
from pjengine.sampling_params import SamplingParams
from pjengine.serving.http_client import Endpoint, RemoteError, Source, events
from pjengine.serving.options import (
    CHAT_TEMPLATE,
    ENGINE_OPTIONS,
    SAMPLING_OPTIONS,
    TOKENIZER_OPTIONS,
    add_engine_options,
    add_options,
    check_utf8,
    given,
    positive,
)
from pjengine.serving.server_config import ServerConfig

DEFAULT_URL = "http://localhost:8000/v1"
MAX_TOKENS = 128  # of `complete`: a text has no end of its own, and OpenAI's 16 are few for a person
_MODEL_OPTIONS = (*ENGINE_OPTIONS, *TOKENIZER_OPTIONS, CHAT_TEMPLATE)


def add_chat(commands: Any) -> None:
    """Adds the command."""
    command = _add_client(
        commands,
        "chat",
        help="talk to a model",
        description="A conversation: each line is a message, and the answer comes as it is generated. "
        "Ctrl-C ends an answer, Ctrl-D the conversation.",
    )
    command.set_defaults(run=_chat)
    command.add_argument("--system-prompt", metavar="TEXT", help="what the model shall know or be")


def add_complete(commands: Any) -> None:
    """Adds the command."""
    command = _add_client(
        commands,
        "complete",
        help="have texts continued",
        description="Each line is the beginning of a text, and what follows comes as it is generated. "
        "Ctrl-C ends a text, Ctrl-D the program.",
    )
    command.set_defaults(run=_complete)


def add_server_options(command: argparse.ArgumentParser) -> None:
    """Adds what a client of a server takes."""
    server = command.add_argument_group("server")
    server.add_argument("--url", metavar="URL", help=f"its address (default: {DEFAULT_URL})")
    server.add_argument("--api-key", metavar="KEY", help="the key that it wants (default: $OPENAI_API_KEY)")
    server.add_argument("--model-name", metavar="NAME", help="the model, of several (default: its first)")


def endpoint_of(args: argparse.Namespace) -> Endpoint:
    return Endpoint(args.url or DEFAULT_URL, args.api_key or client_api_key())


def _add_client(commands: Any, name: str, *, help: str, description: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=help, description=description, usage="%(prog)s [options] [MODEL]"
    )
    command.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help='folder, Hub id, or "demo", which is loaded here; without, a server is asked',
    )
    command.add_argument("-q", "--quick", metavar="TEXT", help="answer this alone, and leave")
    command.add_argument("--stats", action="store_true", help="say after each answer how quick it was")
    add_server_options(command)
    sampling = command.add_argument_group("sampling")
    default = f" (default: {MAX_TOKENS})" if name == "complete" else " (default: as many as fit)"
    sampling.add_argument("--max-tokens", metavar="N", type=positive, help=f"of each answer{default}")
    sampling.add_argument(
        "--stop", metavar="TEXT", action="append", help="end before this text; may be given several times"
    )
    add_options(sampling, SAMPLING_OPTIONS, SamplingParams)
    add_engine_options(command, *TOKENIZER_OPTIONS, CHAT_TEMPLATE)
    return command


@dataclass
class _Conversation:
    """What has been said, for `chat`."""

    fields: dict[str, Any]  # of each request
    messages: list[dict[str, str]] = field(default_factory=list)

    path = "/chat/completions"

    def ask(self, text: str) -> dict[str, Any]:
        self.messages.append({"role": "user", "content": text})
        return {**self.fields, "messages": self.messages}

    def hear(self, answer: str) -> None:
        """Keeps an answer, or the beginning of one; without any, the message was not said either."""
        if answer:
            self.messages.append({"role": "assistant", "content": answer})
        else:
            self.messages.pop()

    @staticmethod
    def texts(choice: dict[str, Any]) -> tuple[str, str]:
        delta = choice["delta"]
        return delta.get("content") or "", delta.get("reasoning") or delta.get("reasoning_content") or ""


@dataclass
class _Continuation:
    """Texts that have nothing to do with one another, for `complete`."""

    fields: dict[str, Any]

    path = "/completions"

    def ask(self, text: str) -> dict[str, Any]:
        return {**self.fields, "prompt": text}

    def hear(self, answer: str) -> None:
        pass

    @staticmethod
    def texts(choice: dict[str, Any]) -> tuple[str, str]:
        return choice["text"], ""


def _chat(args: argparse.Namespace) -> int:
    system = args.system_prompt
    messages = [] if system is None else [{"role": "system", "content": system}]
    return _talk(args, lambda fields: _Conversation(fields, messages))


def _complete(args: argparse.Namespace) -> int:
    if args.max_tokens is None:
        args.max_tokens = MAX_TOKENS
    return _talk(args, _Continuation)


def _talk(args: argparse.Namespace, begin: Callable[[dict[str, Any]], _Conversation | _Continuation]) -> int:
    asked = {**given(args, SAMPLING_OPTIONS), "max_tokens": args.max_tokens, "stop": args.stop}
    asked = {name: value for name, value in asked.items() if value is not None}
    SamplingParams(**asked)  # refuses before a model is loaded, or a server asked
    with _source(args) as source:
        name = args.model_name or asyncio.run(first_model(source))["id"]
        talk = begin({"model": name, "stream": True, "stream_options": {"include_usage": True}, **asked})
        if args.quick is not None:
            _answer(source, talk, args.quick, with_stats=args.stats)
            return 0
        if sys.stdin.isatty():
            print(f"{name}: Ctrl-C ends an answer, Ctrl-D the program", file=sys.stderr)
        for line in _lines():
            try:
                _answer(source, talk, line, with_stats=args.stats)
            except (RemoteError, ValueError) as error:
                print(f"pjengine: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                print(flush=True)
    return 0


@contextlib.contextmanager
def _source(args: argparse.Namespace) -> Iterator[Source]:
    """The server, or the model in this process."""
    settings = given(args, _MODEL_OPTIONS)
    if args.model is None:
        if settings:
            option = f"--{next(iter(settings)).replace('_', '-')}"
            raise ValueError(f"{option} is for a model in this process: give a MODEL, or leave it out")
        yield endpoint_of(args)
        return
    of_server = {"--url": args.url, "--api-key": args.api_key, "--model-name": args.model_name}
    if taken := [option for option, value in of_server.items() if value is not None]:
        raise ValueError(f"{taken[0]} is for a server: give it, or a MODEL, not both")
    config = EngineConfig(
        model=args.model,
        # One answer waits for its own programs alone.
        warm_up=args.quick is None,
        use_tqdm_on_load=sys.stderr.isatty(),
        **settings,
    )
    from pjengine.serving.in_process import InProcess, local_service

    with local_service(config, ServerConfig()) as (_, app):
        yield InProcess(app)


async def first_model(source: Source) -> dict[str, Any]:
    """What a server says about the first of its models.

    Raises:
      RemoteError: it cannot be asked, or has none.
    """
    async with source.request("GET", "/models") as reply:
        body = await (await reply.check()).read()
    try:
        model = json.loads(body)["data"][0]
        return {**model, "id": str(model["id"])}
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise RemoteError(f"the server names no model: {body[:80]!r}") from error


def _lines() -> Iterator[str]:
    """What is typed, or comes from a pipe; lines without anything are left out."""
    is_person = sys.stdin.isatty()
    if is_person:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() then has a history
    while True:
        try:
            line = input("> " if is_person else "")
        except EOFError:
            if is_person:
                print()
            return
        except KeyboardInterrupt:  # forget what has been typed
            print()
            continue
        if line.strip():
            yield line


def _answer(source: Source, talk: _Conversation | _Continuation, text: str, *, with_stats: bool) -> None:
    """Shows an answer as it comes. What has come of it is part of the conversation, however it ends."""
    check_utf8(text)
    content = json.dumps(talk.ask(text)).encode()
    shown: list[str] = []
    begun = time.perf_counter()
    first_s, usage = None, None

    async def stream() -> None:
        nonlocal first_s, usage
        async with (
            source.request("POST", talk.path, content) as reply,
            contextlib.aclosing(events(reply)) as chunks,
        ):
            async for chunk in chunks:
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    answer, reasoning = talk.texts(choice)
                    if (answer or reasoning) and first_s is None:
                        first_s = time.perf_counter() - begun
                    if reasoning:
                        print(reasoning, end="", flush=True, file=sys.stderr)
                    shown.append(answer)
                    print(answer, end="", flush=True)

    try:
        asyncio.run(stream())
    finally:
        talk.hear("".join(shown))
    print(flush=True)
    if with_stats:
        elapsed = time.perf_counter() - begun
        first = "no text" if first_s is None else f"first text after {1e3 * first_s:.1f} ms"
        num_tokens = 0 if usage is None else usage["completion_tokens"]
        print(
            f"{first}; {num_tokens} tokens in {elapsed:.2f} s: {num_tokens / elapsed:.1f} tokens/s",
            file=sys.stderr,
        )
