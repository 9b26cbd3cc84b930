"""How a client names its requests."""

import random
import re

from fastapi import Request

from pjengine.serving.errors import ApiError
from pjengine.serving.protocol import REQUEST_ID

REQUEST_ID_HEADER = "X-Request-Id"
# The system is asked once: to ask it each time, as uuid4 does, lets go of the interpreter's lock each time.
_ids = random.Random()


def request_id_of(request: Request, wanted: str | None = None) -> str:
    """The id in the client's header, or else in the body, or else one that nobody else has."""
    given = request.headers.get(REQUEST_ID_HEADER)
    if given is None:
        return wanted or f"{_ids.getrandbits(128):032x}"
    if not re.fullmatch(REQUEST_ID, given):
        raise ApiError(
            400, f"{REQUEST_ID_HEADER} must be 1 to 256 visible ASCII characters", param=REQUEST_ID_HEADER
        )
    return given
