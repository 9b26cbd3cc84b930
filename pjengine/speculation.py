"""Speculative decoding, on the host: what is asked for, and in which steps it pays. Plain Python and numpy.

A step that speculates drafts `num_drafts` tokens for each row, on the device, and computes them together with
the row's own: token by token it samples what it would have sampled anyway, and keeps a draft while it is
that. So a step gives each row one token or more, and never another one (see `speculative_step`).

Such a step costs more than a plain one, a little with one row and a lot with fifty, and what it gives
depends on the text. Both are measured as steps are read, and the one that gives more tokens a second runs.
"""

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np

from pjengine.edits import NEEDS
from pjengine.row_table import RowTable
from pjengine.schedule import Schedule
from pjengine.speculation_config import SpeculationConfig

SUPPORTED = ("penalties", "top", "asked")  # of edits.NEEDS: what such a step can do; others run in plain ones
_UNSUPPORTED = np.array([name not in SUPPORTED for name in NEEDS])

GAIN_WEIGHT = 0.25  # of the last step that speculated, in a row's mean of accepted drafts
MARGIN = 1.03  # more than a plain step's tokens a second, by so much at least
MIN_PAUSE, MAX_PAUSE = 4, 64  # plain steps between two that try whether speculation would pay
TRIAL_SHARE = 0.02  # of the time, for such trials, at most
ASSUMED_COST = 1.15  # of a step that speculates, in plain ones, until both have been timed
MIN_TIMED, MAX_TIMED = 4, 16  # steps of a kind and size whose times are believed
TIMING_PERIOD = 64  # of so many steps that could speculate one is plain, so that its time is known


def typical(times: Collection[float]) -> float:
    """Their mean, but for the longest quarter: what disturbs the host is not of the step."""
    shortest = sorted(times)[: len(times) - len(times) // 4]
    return sum(shortest) / len(shortest)


@dataclass
class Speculation:
    """Decides which steps speculate, and counts what came of it."""

    config: SpeculationConfig
    num_rows: int
    # Whether there is a program for a step of so many rows, with edits that need so much; else it is begun.
    can_run: Callable[[int, np.ndarray], bool] = lambda num_seqs, needs: True
    num_drafts: int = 0  # times that a row had any
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_by_position: np.ndarray = field(init=False)
    _gains: np.ndarray = field(init=False)  # by row: mean of accepted drafts in a step that speculates
    _admissions: np.ndarray = field(init=False)  # whom they are of
    _mean_gain: float = field(init=False)  # of all rows, for those that are new
    _times: dict[tuple[int, int], deque[float]] = field(default_factory=dict)  # seconds, by drafts and size
    _num_plain: int = 0  # steps since the last that speculated
    _num_chosen: int = 0  # steps that could speculate and were to
    _pause: int = MIN_PAUSE
    _last_read_s: float | None = None

    def __post_init__(self) -> None:
        self.accepted_by_position = np.zeros(self.config.num_drafts, np.int64)
        self._gains = np.zeros(self.num_rows)
        self._admissions = np.zeros(self.num_rows, np.int64)
        self._mean_gain = self.config.num_drafts / 2  # hope, until there is experience

    def choose(self, table: RowTable, rows: np.ndarray, needs: np.ndarray, plain_depth: int) -> int:
        """How many tokens to draft for each row of the next step, which decodes only; 0: a plain one.

        `plain_depth`: tokens that a plain step would give each row.
        """
        if not 0 < len(rows) <= self.config.max_num_seqs or needs[_UNSUPPORTED].any():
            return 0
        cost = self._cost(len(rows), plain_depth)
        pause = max(self._pause, (cost - 1) / plain_depth / TRIAL_SHARE)
        if self._pays(table, rows, cost) or self._num_plain >= pause:
            if self.can_run(len(rows), needs):
                self._num_plain = 0
                self._num_chosen += 1
                return self.config.num_drafts if self._num_chosen % TIMING_PERIOD else 0
        self._num_plain += 1
        return 0

    def _pays(self, table: RowTable, rows: np.ndarray, cost: float) -> bool:
        if len(self._times.get((0, len(rows).bit_length()), ())) < MIN_TIMED:
            return False  # what it costs is unknown
        is_new = self._admissions[rows] != table.admissions[rows]
        self._gains[rows[is_new]] = self._mean_gain
        self._admissions[rows] = table.admissions[rows]
        num_tokens = 1 + self._gains[rows].mean()
        return bool(num_tokens > MARGIN * cost)

    def _cost(self, num_rows: int, plain_depth: int) -> float:
        """Of a step that speculates, in the time in which plain steps give each row a token."""
        size = num_rows.bit_length()
        own, plain = (self._times.get((drafts, size), ()) for drafts in (self.config.num_drafts, 0))
        if min(len(own), len(plain)) < MIN_TIMED:
            return ASSUMED_COST
        return max(1.0, plain_depth * typical(own) / typical(plain))

    def pause(self) -> None:
        """The device had nothing to do before the next step."""
        self._last_read_s = None

    def see(self, schedule: Schedule, now: float) -> None:
        """Times a step that was read at `now`.

        It was launched before the last one was read: what lies between the two readings is its time.
        """
        if self._last_read_s is not None and schedule.is_decode:
            key = (schedule.num_drafts, schedule.num_seqs.bit_length())
            self._times.setdefault(key, deque(maxlen=MAX_TIMED)).append(now - self._last_read_s)
        self._last_read_s = now

    def settle(self, table: RowTable, schedule: Schedule, taken: np.ndarray, drafted: np.ndarray) -> None:
        """Takes back what was booked for a step that has been read, and counts what its drafts were worth.

        `taken`: tokens that each row of the decodes got; `drafted`: how many were tried for it.
        """
        decodes = schedule.decodes
        is_live = table.admissions[decodes.rows] == decodes.admissions
        rows, lengths = decodes.rows[is_live], decodes.lengths[is_live]
        taken, drafted = taken[is_live], drafted[is_live]
        table.computed[rows] -= lengths - taken
        table.unsure[rows] -= lengths - 1
        accepted = taken - 1
        self._gains[rows] += GAIN_WEIGHT * (accepted - self._gains[rows])
        if len(rows):
            self._mean_gain += GAIN_WEIGHT * (accepted.mean() - self._mean_gain)
            self._pause = MIN_PAUSE if accepted.any() else min(2 * self._pause, MAX_PAUSE)
        self.num_drafts += int(np.count_nonzero(drafted))
        self.num_draft_tokens += int(drafted.sum())
        self.num_accepted_tokens += int(accepted.sum())
        positions = np.arange(self.config.num_drafts)
        self.accepted_by_position += (accepted[:, None] > positions).sum(axis=0)
