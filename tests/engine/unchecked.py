"""Runs host code of a million calls in a process without checks of annotations.

Even switched off they take most of the time.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_unchecked(function: Callable[[], None]) -> None:
    """Calls a function of a test module; what it raises is the failure of the test."""
    code = f"from {function.__module__} import {function.__name__} as run; run()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr
