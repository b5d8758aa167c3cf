"""ASGI middleware: who is let in, how large and how slow a request may be, an id for each."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from avdiff.serve.errors import ApiError
from avdiff.serve.settings import ServeSettings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/health", "/ready")  # no token: a load balancer has none
OPEN_PREFIXES = ("/studio",)
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
log = logging.getLogger("avdiff.serve.requests")


class Gate:
    """Lets requests in, bounded.

    Args:
        app: what is behind it. settings: tokens and limits.
    """

    def __init__(self, app: App, settings: ServeSettings) -> None:
        self.app = app
        self.settings = settings

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One request; others than HTTP pass as they are."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        offered = headers.get("x-request-id", "")
        request_id = offered if REQUEST_ID.fullmatch(offered) else secrets.token_hex(8)
        began = time.perf_counter()
        status = 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-request-id", request_id.encode()))
            await send(message)

        try:
            await self._serve(scope, headers, receive, answer)
        finally:
            log.info(
                "request",
                extra={
                    "request_id": request_id,
                    "method": scope["method"],
                    "path": scope["path"][:200],
                    "status": status,
                    "seconds": round(time.perf_counter() - began, 4),
                },
            )

    async def _serve(
        self, scope: MutableMapping[str, Any], headers: dict[str, str], receive: Receive, send: Send
    ) -> None:
        path = scope["path"]
        address = (scope.get("client") or ("unknown", 0))[0]
        client = self.settings.client_of(headers.get("authorization"), address)
        is_open = path in OPEN_PATHS or path.startswith(OPEN_PREFIXES)
        if client is None and not is_open:
            error = ApiError(
                401,
                "authorization: needs 'Bearer TOKEN' with a token of this server",
                None,
                "token",
            )
            await error.response({"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        scope.setdefault("state", {})["client"] = client or f"address:{address}"
        limit = self.settings.max_body
        declared = headers.get("content-length", "0")
        if not declared.isdigit() or int(declared) > limit:
            error = ApiError(413, f"body: is larger than {limit} bytes, which is all that is taken")
            await error.response({"Connection": "close"})(scope, receive, send)
            return
        bounded = _Bounded(receive, limit, self.settings.body_timeout)
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, bounded, answer)
        except ApiError as error:
            if started:
                raise
            await error.response({"Connection": "close"})(scope, receive, send)


class _Bounded:
    """A request's body, of bounded size, that has to arrive in time."""

    def __init__(self, receive: Receive, limit: int, seconds: float) -> None:
        self.receive = receive
        self.left = limit
        self.limit = limit
        self.until = time.monotonic() + seconds
        self.ended = False

    async def __call__(self) -> Message:
        if self.ended:
            return await self.receive()  # waits for the client to go
        try:
            wait = max(0.01, self.until - time.monotonic())
            message = await asyncio.wait_for(self.receive(), wait)
        except TimeoutError as error:
            raise ApiError(408, "body: did not arrive in time") from error
        if message["type"] == "http.request":
            self.left -= len(message.get("body", b""))
            self.ended = not message.get("more_body", False)
            if self.left < 0:
                said = f"body: is larger than {self.limit} bytes, which is all that is taken"
                raise ApiError(413, said)
        return message


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, message and what was given as `extra`."""

    _PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        line |= {k: v for k, v in vars(record).items() if k not in self._PLAIN}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
