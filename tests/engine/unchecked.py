"""Runs host code of a million calls in a process without checks of annotations.

Even switched off they take most of the time.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_unchecked(function: Callable[[], None], *, timeout_s: float = 280, **environment: str) -> None:
    """Calls a function of a test module; what it raises is the failure of the test."""
    code = f"from {function.__module__} import {function.__name__} as run; run()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=timeout_s, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
