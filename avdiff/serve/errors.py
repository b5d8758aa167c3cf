"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import JSONResponse

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "server_error",
}


class ApiError(Exception):
    """One sentence for the client, with the status that its library reads.

    Args:
        status: HTTP status, 4xx or 503. message: what is wrong and what would fit.
        param: the field that it is about. code: for programs.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def response(self, headers: dict[str, str] | None = None) -> JSONResponse:
        """The error as a response."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else TYPES[400])
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": error}, status_code=self.status, headers=headers)


def bad(param: str, message: str) -> ApiError:
    """A field that cannot be used: 400."""
    return ApiError(400, message, param, "invalid_value")


async def answer_error(_: Request, error: Exception) -> JSONResponse:
    """Handler of `ApiError`."""
    assert isinstance(error, ApiError)
    retry = {"Retry-After": "5"} if error.status in (429, 503) else None
    return error.response(retry)
