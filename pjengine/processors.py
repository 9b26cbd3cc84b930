"""Functions of the caller's that change logits: which, how they came to fail, those that run on the host.

Plain Python and numpy: `call_processors.py` calls them on the device.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from pjengine.schedule import EMPTIED, FAILED

logger = logging.getLogger(__name__)

type Processor = Callable[[Any, Any], Any]
type Chain = tuple[Processor, ...]  # of one request, called one after the other

MAX_CHAINS = 8  # different ones that run at once: a program holds all of them
MAX_NOTES = 4096  # errors on the host that nobody has asked for yet


class Chains(NamedTuple):
    """Which a program must have, and which it had better have: those of the next that wait, too."""

    now: frozenset[Any]  # a `Chain`, or an `EditChain` of activation edits
    soon: frozenset[Any]


NO_CHAINS = Chains(frozenset(), frozenset())


def processor_name(processor: Processor) -> str:
    """As an error calls it."""
    return str(getattr(processor, "__qualname__", None) or repr(processor))[:80]


class HostProcessor:
    """A processor that runs on the host, where a JAX function cannot do the work: see `host_processor`.

    Two of them are the same if they are the same object, whatever they wrap.
    """

    def __init__(self, function: Callable[[list[int], np.ndarray], np.ndarray]) -> None:
        if not callable(function):
            raise TypeError(f"host_processor takes a function, got {function!r:.80}")
        self.function = function
        self.__qualname__ = processor_name(function)
        self._notes: OrderedDict[bytes, str] = (
            OrderedDict()
        )  # what went wrong, by the tokens it went wrong at

    def __call__(self, token_ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """Calls the function for one sequence: `token_ids` padded with -1, `logits` [vocab] float32.

        Where that fails, the logits are NaN and `error_at` knows why: whoever runs beside it does not care.
        """
        known = np.asarray(token_ids)
        known = known[known >= 0]
        before = np.array(logits, np.float32)  # the function may write into it
        try:
            after = self.function(known.tolist(), before)
            if (got := _form(after)) != (wanted := f"float32{list(logits.shape)}"):
                raise ValueError(f"wanted numpy {wanted}, got {got}")
            return after
        except (Exception, SystemExit) as error:  # not Ctrl-C, which is the caller's
            logger.warning("a logits processor on the host failed: %s: %r", self.__qualname__, error)
            self._notes[_digest(known)] = f"{type(error).__name__}: {error}"[:300]
            if len(self._notes) > MAX_NOTES:
                self._notes.popitem(last=False)
            return np.full(logits.shape, np.nan, np.float32)

    def error_at(self, token_ids: Sequence[int]) -> str | None:
        """What went wrong behind these tokens, if anything did; it is asked for once."""
        return self._notes.pop(_digest(np.array(token_ids, np.int32)), None)


def host_processor(function: Callable[[list[int], np.ndarray], np.ndarray]) -> HostProcessor:
    """Makes a logits processor of a function that JAX cannot trace; also a decorator.

    `function(token_ids, logits)` gets the tokens so far, prompt and output together, and the logits, float32
    [vocab], and returns others of the same form. It runs on the host in the middle of a step, which waits
    for it, one sequence after the other: with 128,256 logits on one H200 about 1 ms for each. What it raises
    ends its own request alone.
    """
    return HostProcessor(function)


def _form(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    return f"{value!r:.80}"


def _digest(token_ids: np.ndarray) -> bytes:
    return blake2b(token_ids.astype(np.int32).tobytes(), digest_size=16).digest()


def why_no_token(token: int, chain: Chain, token_ids: Sequence[int]) -> str | None:
    """Which processor has left nothing to sample behind `token_ids`, and how; None: it was none of them."""
    if token > FAILED:
        return None
    is_emptied = token <= EMPTIED
    index = (EMPTIED if is_emptied else FAILED) - token
    name = f"logits_processors[{index}] ({processor_name(chain[index])})"
    if is_emptied:
        return f"{name} leaves no token: its logits are -inf for all that were not forbidden before"
    processor = chain[index]
    note = processor.error_at(token_ids) if isinstance(processor, HostProcessor) else None
    return f"{name} failed: {note}" if note else f"{name} returned NaN or +inf among its logits"
