"""How a client names its requests."""

import re
import uuid

from fastapi import Request

from pjengine.serving.errors import ApiError
from pjengine.serving.protocol import REQUEST_ID

REQUEST_ID_HEADER = "X-Request-Id"


def request_id_of(request: Request, wanted: str | None = None) -> str:
    """The id in the client's header, or else in the body, or else one that nobody else has."""
    given = request.headers.get(REQUEST_ID_HEADER)
    if given is None:
        return wanted or uuid.uuid4().hex
    if not re.fullmatch(REQUEST_ID, given):
        raise ApiError(
            400, f"{REQUEST_ID_HEADER} must be 1 to 256 visible ASCII characters", param=REQUEST_ID_HEADER
        )
    return given
