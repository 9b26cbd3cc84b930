"""What goes wrong, as OpenAI's clients expect to be told: `{"error": {message, type, param, code}}`."""

import json
import logging
import re
from collections.abc import Container, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from pjengine.async_llm import EngineDeadError, EngineGenerateError

logger = logging.getLogger(__name__)

# The names of the openai client's exceptions, where it has one for the status.
TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "TimeoutError",
    413: "RequestTooLargeError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: int


class ErrorReply(BaseModel):
    """For the OpenAPI document: the body of every status that is not 200."""

    error: ErrorDetail


# For the OpenAPI document: of all routes.
ERRORS: dict[int | str, dict[str, Any]] = {"default": {"model": ErrorReply}}


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, headers

    def body(self) -> dict[str, Any]:
        detail = ErrorDetail(
            message=self.message, type=TYPES.get(self.status, "ApiError"), param=self.param, code=self.status
        )
        return {"error": detail.model_dump()}

    def response(self) -> Response:
        headers = {"content-type": "application/json", **(self.headers or {})}
        return Response(json.dumps(self.body()), status_code=self.status, headers=headers)


def bad_request(
    error: Exception, names: Container[str], fields: Mapping[str, str] = MappingProxyType({})
) -> ApiError:
    """Of a mistake of the caller. The text of an error about one field begins with its name.

    `fields`: what the body calls some of the names.
    """
    text = str(error)
    found = re.match(r"(?:the )?([a-z_]*)", text)
    assert found is not None
    name = found[1]
    if name not in names:
        return ApiError(400, text)
    param = fields.get(name, name)
    if param != name and not text.startswith("the "):
        text = text.replace(name, param, 1)
    return ApiError(400, text, param=param)


def as_api_error(error: Exception) -> ApiError:
    """What the client is told of an error; one that nobody foresaw is logged, and kept from the client."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TimeoutError):
        return ApiError(504, "the request took longer than this server allows; ask for fewer tokens")
    if isinstance(error, EngineGenerateError):
        return ApiError(500, str(error))
    if isinstance(error, EngineDeadError):
        return ApiError(503, str(error))
    if isinstance(error, HTTPException):  # of Starlette: no such route, or method
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, RequestValidationError):
        return _of_schema(error.errors())
    logger.error("an answer failed", exc_info=error)
    return ApiError(500, "internal error; the server's log says more")


def _of_schema(errors: Iterable[Mapping[str, Any]]) -> ApiError:
    """Of a body that has not the types that it should have."""
    told, param = [], None
    # Of what may be of several types, each is told to be none: first what says more.
    for error in sorted(errors, key=lambda error: error["type"] != "too_long"):
        # First is "body", or what else was read; then, in brackets, which of several bodies is meant.
        place = [str(part) for part in error["loc"][1:] if not str(part).startswith("<")]
        if error["type"] == "json_invalid":
            return ApiError(
                400, f"the body is not valid JSON: {error['ctx']['error']} at character {place[0]}"
            )
        if not place:
            return ApiError(400, "the body must be a JSON object, sent as Content-Type: application/json")
        param = param or place[0]
        told.append(f"{'.'.join(place)}: {error['msg']}")
    more = f"; and {len(told) - 3} more" if len(told) > 3 else ""
    return ApiError(400, "; ".join(told[:3]) + more, param=param)


async def _answer(_: Request, error: Exception) -> Response:
    return as_api_error(error).response()


def add_error_handlers(app: FastAPI) -> None:
    for kind in (ApiError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer)
