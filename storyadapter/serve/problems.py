"""Errors as RFC 9457 problems, with the field at fault."""

import json
import sqlite3
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from storyadapter.method.errors import InputError, StoryAdapterError

MEDIA_TYPE: Final = "application/problem+json"
_TITLES: Final = {
    400: "Bad request",
    401: "No valid key",
    404: "Not found",
    405: "Method not allowed",
    409: "Conflict",
    413: "Too large",
    415: "Unsupported media type",
    421: "Unknown host",
    422: "It can't be drawn as asked",
    429: "Too many requests",
    503: "Not now",
    507: "No space left",
}


# parts of a place that nobody has written: where a value stood, and which of several forms it was taken for
_NO_FIELDS: Final = ("body", "query", "path", "header", "FrameRequest", "CharacterRequest", "str")


class ProblemResponse(JSONResponse):
    """In ASCII: what was sent may hold what is no character, and be told."""

    media_type = MEDIA_TYPE

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


class Problem(HTTPException):
    """Answers a request with an error; `more` are other members of the problem."""

    def __init__(self, status: int, detail: str, *, retry_after: int | None = None, **more: Any) -> None:
        super().__init__(status, detail)
        self.retry_after = retry_after
        self.more = more


def response(problem: Problem) -> JSONResponse:
    """The problem as it is sent; `error` is where clients of OpenAI's API look."""
    detail, status = problem.detail, problem.status_code
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {
        "type": "about:blank",
        "title": _TITLES.get(status, "Error"),
        "status": status,
        "detail": detail,
        **problem.more,
        "error": {"message": detail, "type": kind, "param": problem.more.get("field"), "code": None},
    }
    headers = {} if problem.retry_after is None else {"Retry-After": str(problem.retry_after)}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return ProblemResponse(body, status, headers)


def add_problem_handlers(app: FastAPI) -> None:
    """Every error of the app becomes a problem."""

    @app.exception_handler(Problem)
    async def _(request: Request, error: Problem) -> JSONResponse:
        return response(error)

    @app.exception_handler(StoryAdapterError)
    async def _(request: Request, error: StoryAdapterError) -> JSONResponse:
        status = 422 if isinstance(error, InputError) else 503
        more: dict[str, Any] = error.as_dict()
        return response(Problem(status, str(error), **more))

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> JSONResponse:
        first = max(error.errors(), key=lambda one: len(one["loc"]))  # of alternatives the one that came furthest
        if first["type"] == "json_invalid":
            return response(Problem(422, f"the body isn't JSON: {first['ctx']['error']}"))
        place = [str(part) for part in first["loc"] if part not in _NO_FIELDS]
        return response(Problem(422, f"{'.'.join(place) or 'the body'}: {first['msg']}", field=".".join(place) or None))

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> JSONResponse:
        answer = response(Problem(error.status_code, str(error.detail)))
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(sqlite3.OperationalError)
    async def _(request: Request, error: sqlite3.OperationalError) -> JSONResponse:
        return response(Problem(507, f"the queue can't be written: {error}", retry_after=60))
