"""What a `ScheduleRecord` says of one step, of one request, and of one of them in the other. Plain Python."""

from dataclasses import dataclass
from enum import IntEnum

FREE, CACHED, SHARED = -1, -2, -3  # in place of a page's owner
LONG_S = 1e-3  # a wait for a program that is told of


class State(IntEnum):
    """What a request was doing while a step ran."""

    ABSENT = 0  # not there yet, or ended
    WAITING = 1  # for its first row
    PREFILL = 2  # known tokens of it were computed
    DECODE = 3
    HELD = 4  # its row and pages, without a token: the others took all, or its end is not read yet
    PREEMPTED = 5  # it had to give its pages back, and waits for others


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step. Times in seconds; None: its results were not read, as those of a last one need not be."""

    number: int  # since the engine started, as in a trace
    start_s: float  # when the host began to put it together, since the first step of the record did
    program: str  # what ran it, with the sequences or tokens that it has room for
    num_padded_tokens: int  # that it computes, whatever is in it
    num_decode_tokens: int
    num_prefill_tokens: int
    num_cached_tokens: int  # that requests which it admits need not compute
    num_waiting: int  # requests
    num_preempted: int
    num_held_pages: int
    num_cached_pages: int
    schedule_s: float  # the host: which tokens run
    launch_s: float  # the host: pack them, send them, start the program
    compile_s: float  # waits for programs that had to be made, since the step before; mostly in `launch_s`
    read_s: float | None  # the host waits for the device
    output_s: float | None  # the host: tokens to their requests
    took_s: float | None  # to its end, from its start or the end of the step before

    @property
    def num_tokens(self) -> int:
        return self.num_decode_tokens + self.num_prefill_tokens


@dataclass(frozen=True, kw_only=True)
class RequestRecord:
    """One request, or one of several continuations or beams, as it stood when the record was made."""

    request_id: str
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int  # found when it was first admitted, in the steps of the record
    num_preemptions: int
    queue_s: float | None
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float | None
