"""Checks of every request: host name, origin, token and size."""

from __future__ import annotations

import json
import secrets
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ctclip.preprocessing.whole_numbers import whole_number
from ctclip.serve import metrics
from ctclip.serve.settings import Settings

# The page contacts no other host. NiiVue decompresses in workers that it creates from blobs.
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; connect-src 'self' blob: data:; "
    "worker-src 'self' blob:; script-src 'self' 'wasm-unsafe-eval'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
# The browser may cache the page itself, but must revalidate it each time.
STATIC = {**HEADERS, "cache-control": "no-cache"}
# Paths that need no token: the health check, and the page, which asks for the token.
OPEN = ("/", "/healthz", "/favicon.ico")
# Paths whose body is a scan, which is written to disk as it arrives. All other bodies are read into memory.
UPLOADS = ("/v1/scans", "/v1/detect", "/v1/explain", "/v1/similar", "/v1/embed", "/v1/draft")
LONGEST_BODY = 64_000


class Guards:
    """Refuses requests before their body is read: for other host names (DNS rebinding), from pages of other origins,
    without the token, or with a body over the limit."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        status = 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                fixed = STATIC if scope["path"].startswith("/static/") else HEADERS
                mine = [(name.encode(), value.encode()) for name, value in fixed.items()]
                message = {**message, "headers": [*message.get("headers", []), *mine]}
            await send(message)

        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            await _answer(send_with_headers, *refusal)
        else:
            await self.app(scope, receive, send_with_headers)
        # Log the pattern of the route, not the path, which identifies a scan.
        route = scope.get("route")
        metrics.REQUESTS.labels(getattr(route, "path", "other"), str(status)).inc()

    def _refusal(self, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if _host_name(host) not in [name.lower() for name in self.settings.hosts] and "*" not in self.settings.hosts:
            return 421, "this host name is not allowed; start the service with --host-name to allow it"
        origin = headers.get("origin")
        if origin is not None and _host_of(origin) != host:
            return 403, "requests from other pages are refused"
        length = whole_number(headers.get("content-length", "0"))
        if length is None or length > self.settings.largest_bytes:
            return 413, f"the upload is larger than {self.settings.largest_gb:g} GB; --largest-gb raises the limit"
        if path not in UPLOADS and length > LONGEST_BODY:
            return 413, f"the body of this request is limited to {LONGEST_BODY} bytes"
        if path not in UPLOADS and "transfer-encoding" in headers:
            return 411, "state the length of the body (Content-Length)"
        token = self.settings.token
        if token and path not in OPEN and not path.startswith("/static/"):
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not secrets.compare_digest(given.encode(), token.encode()):
                return 401, "this service needs a token; send the header Authorization: Bearer TOKEN"
        return None


def _host_of(origin: str) -> str | None:
    """Host and port of an origin; None if it is not a URL."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _host_name(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0].lower()


async def _answer(send: Send, status: int, detail: str) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")] if status == 413 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
