"""The rows and pages of beam searches: one row for each beam. Plain Python and numpy.

The first beam's request leads: it is queued, computes the prompt, and is preempted, and the others with it.
They hold rows from the beginning, and pages from the end of the prompt on: its own, by reference, but for the
last one if that is not full.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pjengine.beam_search import BeamStep
from pjengine.page_groups import PageGroups, PageUpdates
from pjengine.request import Request, RequestStatus
from pjengine.row_table import RowTable
from pjengine.schedule import Chunk, Decodes


@dataclass(frozen=True)
class BeamRows:
    """What the scheduler does for beam searches beside what it does for every row."""

    rows: RowTable
    pages: PageGroups
    page_size: int

    def start(self, request: Request) -> None:
        """Gives a search that has got its first row the others. It begins anew."""
        if request.beams is None:
            return
        request.beams.begin()
        for follower in request.followers:
            follower.status = RequestStatus.RUNNING
            follower.row = self.rows.admit_follower(follower)

    def num_tails(self, request: Request) -> int:
        """Pages that a request's followers need when they fork from the end of its prompt."""
        return len(request.followers) if request.num_known % self.page_size else 0

    def fork(self, request: Request, updates: PageUpdates) -> None:
        """Has the followers go on from where their leader is, when the prompt has been booked."""
        table, pages = self.rows, self.pages
        full, rest = divmod(int(table.computed[request.row]), self.page_size)
        first = int(table.window_start[request.row]) // self.page_size
        for follower in request.followers:
            table.fork(request.row, follower.row)
            follower.pages = request.pages[:full]
            pages.pool.retain(follower.pages)
            if pages.window_pool is not None:
                follower.window_pages = request.window_pages[:full]
                pages.window_pool.retain(follower.window_pages[first:])
            table.room[follower.row] = full * self.page_size
            if rest:
                pages.grow(follower, 1, updates)

    def steps(self, decodes: Decodes, chunks: Sequence[Chunk]) -> list[BeamStep]:
        """The searches that go on in a step: all beams of one are in it, or none."""
        table, found = self.rows, list[BeamStep]()

        def add(request: Request, kv_len: int, rows: list[int], seqs: list[int]) -> None:
            admission = int(table.admissions[request.row])
            found.append(BeamStep(request, admission, kv_len, rows, seqs, request.edits.beam_ends))

        for seq in np.flatnonzero(table.is_beam[decodes.rows]).tolist():
            request = decodes.requests[seq]
            if request.edits.leads_beams:
                rows = [own.row for own in request.row_requests]
                add(request, int(decodes.starts[seq]) + 1, rows, np.searchsorted(decodes.rows, rows).tolist())
        for seq, chunk in enumerate(chunks, len(decodes.requests)):
            if chunk.is_sampled and table.is_beam[chunk.row]:
                rows = [own.row for own in chunk.request.row_requests]
                add(chunk.request, chunk.start + chunk.length, rows, [seq])
        return found

    def follow(self, step: BeamStep, parents: Sequence[int]) -> None:
        """Learns which beams have gone on as others' continuations: each takes over its parent's full pages.

        Steps since then know it already, and the pages that they have opened are each beam's own. A page
        that no beam refers to any more is free at once: no step under way reads it.
        """
        requests, full = step.request.row_requests, step.kv_len // self.page_size
        for pool, held in zip(self.pages.pools, ("pages", "window_pages"), strict=False):
            before = [getattr(request, held) for request in requests]
            taken, left = list[int](), list[int]()
            for request, own, parent in zip(requests, before, parents, strict=True):
                theirs = before[parent]
                if theirs[:full] != own[:full]:
                    changed = [column for column in range(full) if theirs[column] != own[column]]
                    taken += [theirs[column] for column in changed]
                    left += [own[column] for column in changed]
                    setattr(request, held, theirs[:full] + own[full:])
            pool.retain(taken)
            pool.release(left)
