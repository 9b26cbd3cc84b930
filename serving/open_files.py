"""How many files, connections among them, this process may have open."""

import resource
import sys

SPARE = 64  # for all that is no connection


def allow_open_files(wanted: int = sys.maxsize) -> int:
    """Raises the limit that the process may raise itself, up to `wanted`; returns what it then is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        soft = min(most, 2**20)  # Linux takes no more, where the hard limit says infinity
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft
