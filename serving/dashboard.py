"""GET /dashboard: a page that shows what the engine does, and the numbers behind it."""

import base64
import hashlib
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request
from starlette.responses import HTMLResponse, Response

import pjengine
from pjengine.page_pool import CACHED, HELD
from pjengine.replicas import engines_of
from pjengine.serving.errors import ERRORS
from pjengine.serving.recent import WINDOW_S
from pjengine.serving.service import Service, service_of
from pjengine.stats import read_stats

router = APIRouter(responses=ERRORS)

MAX_CELLS = 1280  # of the map


@router.get("/dashboard", response_class=Response, responses={200: {"content": {"text/html": {}}}})
async def dashboard() -> HTMLResponse:
    """The live page. It holds no secret and loads nothing but its numbers."""
    page, headers = _page()
    return HTMLResponse(page, headers=headers)


@cache
def _page() -> tuple[str, dict[str, str]]:
    """The file, and headers that let it run its own script and style and nothing else."""
    page = Path(__file__).with_name("dashboard.html").read_text(encoding="utf-8")
    policy = {
        "default-src": "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "script-src": _digest(page, "script"),
        "style-src": _digest(page, "style"),
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        # Text that is put in as HTML is an error of the page's, whatever the text is.
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return page, {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }


def _digest(page: str, element: str) -> str:
    [text] = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@router.get("/dashboard/stats")
async def stats(request: Request, since: Annotated[int, Query(ge=0)] = 0) -> dict[str, Any]:
    """What the page shows: one moment, and the samples from the one numbered `since`."""
    service = service_of(request)
    recent = service.metrics.recent
    return {
        **_engine(service),
        "ttft_s": recent.ttft.summary(),
        "tpot_s": recent.tpot.summary(),
        "window_s": WINDOW_S,
        "uptime_s": round(recent.clock() - recent.begun_s, 1),
        "samples": recent.samples(since),
        "num_samples": recent.num_samples,
    }


def _engine(service: Service) -> dict[str, Any]:
    engine = service.llm.engine
    now = read_stats(engine)
    state = "failed" if service.llm.errored else "running" if service.llm.is_running else "closed"
    return {
        "state": state,
        "version": pjengine.__version__,
        "model": service.model_names[0],
        "max_model_len": engine.max_model_len,
        "max_num_seqs": service.num_rows,
        "has_tokenizer": service.prompts.tokenizer is not None,
        "has_chat_template": service.prompts.has_chat_template,
        "num_running": now.num_running,
        "num_waiting": now.num_waiting,
        "num_prompt_tokens": now.num_prompt_tokens,
        "num_generation_tokens": now.num_generation_tokens,
        "num_preemptions": now.num_preemptions,
        "num_recompiles": now.num_recompiles,
        "num_cache_queries": now.num_cache_queries,
        "num_cache_hits": now.num_cache_hits,
        "pages": {
            "page_size": engine.config.page_size,
            **page_map([own.scheduler.pool.states for own in engines_of(engine)]),
        },
    }


def page_map(pools: Sequence[bytearray]) -> dict[str, Any]:
    """How many pages are held and how many cached, in each cell of equally many pages; the rest is free.

    The pages of several engines follow each other, and each engine's first page is its null page. The
    engines' threads may write meanwhile: each state is whole.
    """
    states = b"".join(pools)
    num_pages = len(states)
    pages_per_cell = 1
    while -(-num_pages // pages_per_cell) > MAX_CELLS:
        pages_per_cell *= 2
    now = np.frombuffer(states, np.uint8)
    starts = np.arange(0, num_pages, pages_per_cell)
    held, cached = (np.add.reduceat(now == state, starts, dtype=np.int64) for state in (HELD, CACHED))
    return {
        "num_pages": num_pages,
        "num_null": len(pools),
        "num_held": int(held.sum()),
        "num_cached": int(cached.sum()),
        "pages_per_cell": pages_per_cell,
        "held": held.tolist(),
        "cached": cached.tolist(),
    }
