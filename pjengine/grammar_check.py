"""Grammars are tried in a process of their own, which may take too long, too much memory, or crash.

A short schema can keep the compiler busy for hours, fill the memory or overrun the stack, and nothing stops
it from outside but the end of its process. So each grammar is compiled there first, and here only once
it is known to be harmless. The process runs this file as a script: it imports nothing of pjengine, no jax.
"""

import json
import re
import resource
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MAX_COMPILE_S = 10.0
MAX_COMPILE_BYTES = 256 * 2**20  # of memory, beside the stack
STACK_BYTES = 512 * 2**20  # address space; definitions that refer to each other recurse as deeply as they go
MAX_START_S = 120.0  # of the process, which reads the tokenizer
MAX_ERROR_CHARS = 500
OVER_LIMIT = "it takes more than"  # how such errors begin
_NO_TOKEN = "NoExtensionBias"  # how llguidance says that none may come
NUM_TRIED = 2  # tokens
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,  # 7 ms
    "step_max_items": 20_000,  # 1 ms, or a few hundred where a grammar is made for it
    "max_lexer_states": 50_000,  # of 1 to 2 kB
}

_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)
_stack_lock = threading.Lock()  # of the size that new threads get


def make_tokenizer(tokenizer_json: str, end_ids: list[int]) -> Any:
    """The vocabulary as llguidance reads it."""
    from llguidance import LLTokenizer

    return LLTokenizer(tokenizer_json, eos_token=end_ids)


def compile_grammar(tokenizer: Any, grammar: str) -> tuple[Any, str]:
    """The matcher at the start of the output, and why it cannot be used; empty: it can."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(verbose_errors=False, **LIMITS)
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        ahead = matcher.deep_copy()
        mask = ahead.compute_bitmask()
        error = error_of(ahead)
        if error and error != _NO_TOKEN:  # such as a limit
            return matcher, error
        if ahead.is_stopped() and not ahead.is_accepting():
            return matcher, "no output satisfies it"
        for _ in range(NUM_TRIED):  # many a grammar turns out to be too large with its first tokens
            ahead.consume_token(_lowest_bit(mask))
            if ahead.is_stopped():
                break
            mask = ahead.compute_bitmask()
        if ahead.is_error():
            matcher = ahead
    return matcher, error_of(matcher)


def lark_of(ebnf: str) -> tuple[str, str]:
    """A grammar of llama.cpp's kind (GBNF) in Lark's language, and why there is none; empty: there is."""
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(_ESCAPE.sub(_unescaped, ebnf)), ""
    except RecursionError:
        return "", "it is nested too deeply"
    except Exception as error:  # the converter has no class of its own for all of them
        return "", str(error)[:MAX_ERROR_CHARS]


def _unescaped(found: re.Match[str]) -> str:
    """What an escape of GBNF stands for, where the converter or Lark's language has not the same."""
    digits = found[1] or found[2]
    if digits is None:
        return found[0]
    code = int(digits, 16)
    if code > sys.maxunicode or 0xD800 <= code < 0xE000:
        raise ValueError(f"{found[0]} is no character")
    return chr(code) if code >= 0x80 else f"\\x{code:02x}"


def error_of(matcher: Any) -> str:
    """Why a matcher cannot go on; empty: it can."""
    if not matcher.is_error():
        return ""
    error = matcher.get_error().partition("<backtrace>")[0].replace("<non-verbose/>", "")
    return error.strip()[:MAX_ERROR_CHARS] or "it broke the compiler"


def _lowest_bit(mask: bytes) -> int:
    byte = next(i for i, bits in enumerate(mask) if bits)
    return byte * 8 + (mask[byte] & -mask[byte]).bit_length() - 1


def with_deep_stack[T](function: Callable[[], T]) -> T:
    """Calls a function on a thread with a stack of STACK_BYTES; returns what it returns, or raises it."""
    with ThreadPoolExecutor(1, thread_name_prefix="pjengine-grammar") as threads:
        with _stack_lock:
            usual = threading.stack_size(STACK_BYTES)
            try:
                result = threads.submit(function)
            finally:
                threading.stack_size(usual)
        return result.result()


class GrammarCheck:
    """The process, which is started when it is first needed, and anew when it has ended."""

    def __init__(self, *tokenizer: Any) -> None:
        """`tokenizer`: the arguments of `make_tokenizer`."""
        self._setup = {"path": sys.path, "tokenizer": tokenizer}
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = lambda: None

    def error(self, grammar: str, timeout_s: float = MAX_COMPILE_S) -> str:
        """Why a grammar cannot be used; empty: it can. Called from one thread at a time."""
        return self._answer({"grammar": grammar}, timeout_s)["error"]

    def lark(self, ebnf: str) -> tuple[str, str]:
        """As `lark_of`: what it takes grows with the square of the length."""
        answer = self._answer({"ebnf": ebnf}, MAX_COMPILE_S)
        return answer.get("lark", ""), answer["error"]

    def _answer(self, question: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """With an `error`, which may be that there was no answer."""
        try:
            if self._process is None or self._process.poll() is not None:
                self._start()
            answer = self._ask(question, timeout_s)
        except BaseException:  # such as Ctrl-C: its answer is not for the next one who asks
            self.close()
            raise
        if answer is not None:
            return answer
        process = self._process
        assert process is not None
        is_late = process.poll() is None and not _has_ended(process)
        self.close()
        if is_late:
            return {"error": f"{OVER_LIMIT} {timeout_s:g} s to compile: make it smaller"}
        megabytes = MAX_COMPILE_BYTES // 2**20
        return {"error": f"{OVER_LIMIT} {megabytes} MiB to compile, or breaks the compiler: make it smaller"}

    def _start(self) -> None:
        self.close()
        process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is not meant for it
        )
        self._process, self._end = process, weakref.finalize(self, _end_process, process)
        if self._ask(self._setup, MAX_START_S) is None:
            raise RuntimeError("the process that tries grammars did not start: is llguidance installed?")

    def _ask(self, question: dict[str, Any], timeout_s: float) -> dict[str, Any] | None:
        """The answer; None: there is none, or not in time."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            rest = memoryview(json.dumps(question).encode() + b"\n")
            while rest:
                rest = rest[process.stdin.write(rest) :]
        except BrokenPipeError:
            return None
        waiting = select.poll()
        waiting.register(process.stdout, select.POLLIN)
        line = process.stdout.readline() if waiting.poll(timeout_s * 1000) else b""
        return json.loads(line) if line.endswith(b"\n") else None

    def interrupt(self) -> None:
        """Ends the process, whoever waits for its answer: there is none."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """Ends the process; it is started again when it is needed again."""
        self._end()
        self._process = None


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether it ends within a moment: its pipe is closed a little before."""
    try:
        process.wait(0.2)
    except subprocess.TimeoutExpired:
        return False
    return True


def _end_process(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _answer_all() -> None:
    """What the process does: a question and an answer a line, until there are no more questions."""
    setup = json.loads(sys.stdin.readline())
    sys.path[:] = setup["path"]
    tokenizer = make_tokenizer(*setup["tokenizer"])
    print(json.dumps({"error": ""}), flush=True)
    _limit_memory()
    for line in sys.stdin:
        _limit_time()
        question = json.loads(line)
        if "ebnf" in question:
            lark, error = lark_of(question["ebnf"])
        else:
            lark, (_, error) = "", compile_grammar(tokenizer, question["grammar"])
        print(json.dumps({"error": error, "lark": lark}), flush=True)


def _limit_time() -> None:
    """Ends this process some time after the one that asks should have done so."""
    end = int(time.process_time() + 2 * MAX_COMPILE_S)
    resource.setrlimit(resource.RLIMIT_CPU, (end, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _limit_memory() -> None:
    """Refuses this process more than MAX_COMPILE_BYTES on top of what it has; on Linux alone."""
    sizes = Path("/proc/self/statm")
    if sizes.is_file():
        limit = int(sizes.read_text().split()[0]) * resource.getpagesize() + MAX_COMPILE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    with_deep_stack(_answer_all)
