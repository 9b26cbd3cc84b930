"""Text that is handed out as it is generated."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pjengine.generation import Generation
from pjengine.replicas import Engine


@dataclass(frozen=True, kw_only=True)
class CompletionChunk:
    """What one prompt's completion has grown by."""

    index: int  # of the prompt
    completion: int = 0  # of its `n` continuations
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None


def chunks_of(engine: Engine, generations: Sequence[Generation]) -> Iterator[CompletionChunk]:
    """Queues requests and runs them; they are aborted where the loop is left before they have ended."""
    open_ones = [
        (prompt, completion)
        for prompt, generation in enumerate(generations)
        for completion in generation.completions
    ]
    try:
        for generation in generations:
            engine.submit(generation)
        while open_ones:
            still_open = []
            for prompt, completion in open_ones:
                text, token_ids = completion.take()
                request = completion.request
                if not request.is_finished:
                    still_open.append((prompt, completion))
                if token_ids or request.is_finished:
                    yield CompletionChunk(
                        index=prompt,
                        completion=completion.index,
                        text=text,
                        token_ids=token_ids,
                        finish_reason=request.finish_reason,
                        stop_reason=request.stop_reason,
                    )
            open_ones = still_open
            if open_ones:
                engine.advance()
    finally:
        for generation in generations:
            engine.abort_request(generation.request.request_id)
