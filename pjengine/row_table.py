"""What the host knows of each running request, by row: columns, so that all decodes are booked at once."""

import heapq
import itertools

import numpy as np

from pjengine.edits import NEEDS
from pjengine.request import Request

_BEAMS = NEEDS.index("beams")
MAX_END_IDS = 64  # columns of tokens that end a request; of those with more, each token is looked at


class RowTable:
    """Who owns which row, and how far it is.

    A row counts its request's tokens, prompt and output together:

        |------ known when admitted ------|---- sampled since ----|
        0                            prefill_end                limit
        |------ computed: K and V are, or will be, in the pages -----|------ room: of its pages

    From `prefill_end` on the row decodes: the token to compute next is known to the device only. It may be
    the end of the prompt though more is known: then outputs are sampled once more, and come out the same.
    While a step with drafts is under way, `computed` counts all of them; `unsure` ones may turn out wrong.
    An admission is a number that no other has, so that a late result finds its request or nobody.
    """

    def __init__(self, num_rows: int) -> None:
        self.requests: list[Request | None] = [None] * num_rows
        self.admissions = np.zeros(num_rows, np.int64)  # 0: the row is free
        self.computed = np.zeros(num_rows, np.int64)
        self.unsure = np.zeros(num_rows, np.int64)
        self.prefill_end = np.zeros(num_rows, np.int64)
        self.limit = np.zeros(num_rows, np.int64)  # of computed tokens; the last one sampled never is
        self.room = np.zeros(num_rows, np.int64)
        self.window_start = np.zeros(num_rows, np.int64)  # slots before it have no page in the window's pool
        self.needs = np.zeros((num_rows, len(NEEDS)), np.int64)  # of its edits
        self.travels = np.zeros(num_rows, np.bool_)  # something of its edits, with every step
        self.has_filters = np.zeros(num_rows, np.bool_)  # top_k, top_p or min_p
        self.is_watched = np.zeros(num_rows, np.bool_)  # each of its tokens has to be looked at
        self.end_ids = np.full((num_rows, 1), -1, np.int32)  # tokens that end it; -1: no more
        self._free = list(range(num_rows))  # a heap: low rows first
        self._numbers = itertools.count(1)

    @property
    def num_rows(self) -> int:
        return len(self.requests)

    @property
    def is_beam(self) -> np.ndarray:
        """Of each row, whether it and others are the beams of one search."""
        return self.needs[:, _BEAMS] > 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    def admit(self, request: Request, num_computed: int, room: int, prefill_end: int | None = None) -> int:
        """Gives a request the lowest free row, and returns it. `prefill_end` None: all its tokens."""
        row = heapq.heappop(self._free)
        self.requests[row] = request
        self.admissions[row] = next(self._numbers)
        self.computed[row] = num_computed
        self.unsure[row] = 0
        self.prefill_end[row] = request.num_known if prefill_end is None else prefill_end
        self.limit[row] = request.max_total_tokens - 1
        self.room[row] = room
        self.window_start[row] = 0
        self.needs[row] = request.edits.needs
        self.travels[row] = request.edits.travels
        self.has_filters[row] = request.params.has_filters
        self.is_watched[row] = request.is_watched or len(request.end_ids) > MAX_END_IDS
        self._set_end_ids(row, () if self.is_watched[row] else tuple(request.end_ids))
        return row

    def admit_follower(self, request: Request) -> int:
        """The same for another beam, which has nothing to compute until `fork`."""
        row = self.admit(request, num_computed=0, room=0)
        self.prefill_end[row] = self.limit[row] = 0
        return row

    def fork(self, row: int, follower: int) -> None:
        """Has a follower decode from where `row` is; its pages are yet to be counted."""
        for column in (self.computed, self.prefill_end, self.limit, self.window_start):
            column[follower] = column[row]

    def _set_end_ids(self, row: int, ids: tuple[int, ...]) -> None:
        if (more := len(ids) - self.end_ids.shape[1]) > 0:
            self.end_ids = np.pad(self.end_ids, ((0, 0), (0, more)), constant_values=-1)
        self.end_ids[row] = -1
        self.end_ids[row, : len(ids)] = ids

    def vacate(self, row: int) -> None:
        self.requests[row] = None
        self.admissions[row] = 0
        self.needs[row] = 0
        heapq.heappush(self._free, row)

    def needs_look(
        self, rows: np.ndarray, starts: np.ndarray, lengths: np.ndarray, tokens: np.ndarray
    ) -> np.ndarray:
        """Of rows that decoded: where a token may be the last, or is more than a token.

        They were at `starts`, and got `lengths` tokens: of `tokens`, [depth, sequences], the first sequences.
        """
        own = tokens[:, : len(rows)]
        is_end = (own < 0) | (own[:, :, None] == self.end_ids[rows]).any(axis=2)
        is_short = lengths < len(tokens)
        return self.is_watched[rows] | (starts + lengths >= self.limit[rows]) | is_short | is_end.any(axis=0)

    def owner(self, row: int) -> Request:
        request = self.requests[row]
        assert request is not None
        return request

    def running(self) -> list[Request]:
        """In order of admission."""
        return [self.owner(row) for row in self._in_order(self.admissions > 0).tolist()]

    def decoding(self) -> np.ndarray:
        """Rows that decode and have tokens left to compute."""
        is_decoding = (self.computed >= self.prefill_end) & (self.computed < self.limit)
        return np.flatnonzero(is_decoding & (self.admissions > 0))

    def prefilling(self) -> list[int]:
        """Rows with known tokens left to compute, in order of admission."""
        return self._in_order((self.admissions > 0) & (self.computed < self.prefill_end)).tolist()

    def _in_order(self, chosen: np.ndarray) -> np.ndarray:
        rows = np.flatnonzero(chosen)
        return rows[np.argsort(self.admissions[rows])]

    def check_integrity(self, page_size: int, num_drafts: int = 0) -> None:
        """Raises RuntimeError where a row and its request disagree, or a row is lost.

        A page more may be held for wrong drafts, `num_drafts` a step, of the two steps read last.
        """
        occupied = np.flatnonzero(self.admissions).tolist()
        if sorted(occupied + self._free) != list(range(self.num_rows)):
            raise RuntimeError(f"rows are lost or shared: running {occupied}, free {self._free}")
        for row in occupied:
            request, computed = self.owner(row), int(self.computed[row])
            if request.row != row:
                raise RuntimeError(f"row {row} is of {request.request_id}, which has row {request.row}")
            held = len(request.pages) * page_size
            if held != self.room[row] or held - page_size >= computed + 2 * num_drafts or computed > held:
                raise RuntimeError(
                    f"{request.request_id} holds {len(request.pages)} pages for {computed} tokens"
                )
            if computed > self.limit[row]:
                raise RuntimeError(
                    f"{request.request_id} has computed {computed} of {self.limit[row]} tokens"
                )
