"""Which requests the server takes: those that the page and the HTTP API need, and only from this machine."""

import os
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOSTS = ("127.0.0.1", "localhost")
JSON_BYTES = 1 << 20  # of what the page sends beside images
FORM_BYTES = 1 << 16  # of what stands around an image in a form
# what gradio's page reads; it has more, such as a proxy and recordings, which nothing here needs
READ = (
    "/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", "/gradio_api/info",
    "/gradio_api/theme.css", "/gradio_api/queue/data", "/gradio_api/startup-events", "/gradio_api/app_id",
    "/gradio_api/upload_progress",
)  # fmt: skip
READ_BELOW = ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/", "/images/", "/answers/")
FILE = "/gradio_api/file="
# The browser itself asks nobody else for anything. Gradio's page has inline scripts and compiles its templates.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)


class Gate:
    """Middleware that refuses, in a sentence, whatever is not needed; see :meth:`refusal`.

    Args:
        app: the server behind it.
        folder: the only one whose files are given out.
        file_bytes: largest image.
        images: most images that are sent at once.
    """

    def __init__(self, app: ASGIApp, *, folder: str, file_bytes: int, images: int):
        self.app, self.folder, self.file_bytes = app, folder, file_bytes
        self.takes = {
            "/label": file_bytes + FORM_BYTES,
            "/gradio_api/upload": images * (file_bytes + FORM_BYTES),
            "/gradio_api/queue/join": JSON_BYTES,
            "/gradio_api/cancel": JSON_BYTES,
            "/gradio_api/reset": JSON_BYTES,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # a websocket, which the page does not use
            return None
        refused = self.refusal(scope["method"], scope["path"], Headers(scope=scope))
        if refused is not None:
            status, why = refused
            return await PlainTextResponse(f"{why}\n", status)(scope, receive, send)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        return await self.app(scope, receive, guarded)

    def refusal(self, method: str, path: str, headers: Headers) -> tuple[int, str] | None:
        """The status and the reason if a request is refused.

        It names another host (so that a foreign name that leads to 127.0.0.1 gets nothing); it comes from another
        site's page; its path is not among those that are needed; it is too large, or does not say how large it is.
        """
        host = headers.get("host", "")
        if urlsplit(f"//{host}").hostname not in HOSTS:
            return 403, f"expected a request to 127.0.0.1, got one to {host!r}"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return 403, f"requests of other sites' pages are refused, got one of {origin!r}"
        if method in ("GET", "HEAD"):
            wanted = path in READ or path.startswith(READ_BELOW) or self._is_upload(path)
            return None if wanted else (404, f"there is nothing at {path}")
        if method != "POST" or path not in self.takes:
            return 404, f"there is nothing at {path} for {method}"
        length = headers.get("content-length", "")
        if not length.isdecimal():
            return 411, "expected a request that gives its Content-Length"
        if int(length) > self.takes[path]:
            return 413, too_large(self.file_bytes)
        return None

    def _is_upload(self, path: str) -> bool:
        file = path.removeprefix(FILE)
        return file != path and os.path.normpath(file).startswith(self.folder + os.sep)


def too_large(file_bytes: int) -> str:
    return (
        f"expected a file of at most {file_bytes / (1 << 20):.4g} MB; shrink it, or start with a larger --max-megabytes"
    )
