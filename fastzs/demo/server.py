"""The server behind the page: the HTTP API, the downloads, and the page itself, all on 127.0.0.1."""

import json
import os
import signal
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from fastzs.demo.answers import Answer, Answers
from fastzs.demo.gate import Gate, too_large
from fastzs.demo.view import shown_image, shown_map
from fastzs.errors import FastzsError
from fastzs.outputs import coco_dataset

HOST = "127.0.0.1"
IMAGES = 8  # that are sent at once
WAITING = 16  # requests of the HTTP API that wait for their turn
FORMATS = {"png": "labels.png", "overlay": "overlay.jpg", "coco": "coco.json"}
TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".json": "application/json"}
FIELDS = ("names", "system", "precision", "background", "threshold", "format")


def application(answers: Answers, folder: str, file_bytes: int) -> FastAPI:
    """The HTTP API and what the page loads, without the page.

    Args:
        folder: where files may be written for a moment.
        file_bytes: largest image.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, folder=folder, file_bytes=file_bytes, images=IMAGES)
    waiting = 0

    @app.get("/images/{name}")
    def image(name: str) -> Response:
        kept = answers.image(name.removesuffix(".jpg"))
        if kept is None:
            return PlainTextResponse("this image is no longer kept; drop it again\n", 404)
        return Response(shown_image(kept), media_type="image/jpeg", headers={"Cache-Control": "private, immutable"})

    @app.get("/answers/{answer_id}/{file}")
    def download(answer_id: str, file: str) -> Response:
        answer = answers.find(answer_id)
        if answer is None or file not in ("map.png", *FORMATS.values()):
            return PlainTextResponse("this answer is no longer kept; ask again\n", 404)
        if file == "map.png":
            return Response(shown_map(answer), media_type="image/png")
        name = f"{Path(answer.title).stem}_{file}"
        headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}"}
        return Response(content(answer, file, folder), media_type=TYPES[Path(file).suffix], headers=headers)

    @app.post("/label")
    async def label(request: Request) -> Response:
        nonlocal waiting
        if waiting >= WAITING:
            return PlainTextResponse(f"{WAITING} requests are waiting already; try again later\n", 503)
        waiting += 1
        try:
            async with request.form(max_files=1, max_fields=len(FIELDS)) as form:
                return await run_in_threadpool(_label, answers, form, folder, file_bytes)
        finally:
            waiting -= 1

    return app


def _label(answers: Answers, form: FormData, folder: str, file_bytes: int) -> Response:
    """The answer to a form of the HTTP API."""
    try:
        image, fields = form.get("image"), {name: form[name] for name in form if name != "image"}
        if not isinstance(image, UploadFile):
            raise ValueError("expected a form with the field 'image', a file, got none")
        if unknown := [name for name in fields if name not in FIELDS]:
            raise ValueError(f"{unknown[0]}: there is no such field; there are image, {', '.join(FIELDS)}")
        wanted, threshold = str(fields.pop("format", "png")), str(fields.pop("threshold", "0"))
        if wanted not in FORMATS:
            raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {wanted!r}")
        try:
            number = float(threshold)
        except ValueError:
            raise ValueError(f"threshold: expected a number from 0 to 1, got {threshold!r}") from None
        if (image.size or 0) > file_bytes:
            return PlainTextResponse(f"{too_large(file_bytes)}\n", 413)
        options: dict[str, Any] = {"names": "", **{name: str(value) for name, value in fields.items()}}
        answer = answers.ask(image.file.read(), image.filename or "image", threshold=number, **options)
    except (FastzsError, ValueError) as error:
        return PlainTextResponse(f"{error}\n", 422)
    file = FORMATS[wanted]
    timing = [f"label;dur={1000 * answer.label_seconds:.1f}"]
    if answer.encode_seconds is not None:
        timing.insert(0, f"encode;dur={1000 * answer.encode_seconds:.1f}")
    headers = {"Server-Timing": ", ".join(timing)}
    return Response(content(answer, file, folder), media_type=TYPES[Path(file).suffix], headers=headers)


def content(answer: Answer, file: str, folder: str) -> bytes:
    """A file of :data:`FORMATS` of an answer."""
    if file == FORMATS["coco"]:
        return json.dumps(coco_dataset(answer.result, Path(answer.title))).encode()
    with tempfile.TemporaryDirectory(dir=folder) as here:
        path = Path(here, file)
        (answer.result.save if path.suffix == ".png" else answer.result.overlay)(path)
        return path.read_bytes()


def listen(port: int) -> socket.socket:
    """A socket on 127.0.0.1; port 0 takes any that is free.

    Raises:
        ValueError: the port is in use, or may not be taken.
    """
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if os.name == "posix":  # a port whose last connections are still closing may be taken
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
        listening.listen()  # requests wait until the model is there
    except (OSError, OverflowError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"port {port} of {HOST} cannot be taken: {reason.lower()}; choose another with --port, or 0 for any"
        ) from error
    return listening


def serve(make: Callable[[str], FastAPI], listening: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until Ctrl-C or a SIGTERM. Uploads lie in a folder of this process, which is removed at the end.

    Args:
        make: gives the application for that folder.
        ready: called when everything is made.
    """

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)  # uvicorn ends in order and then raises the signal again
    try:
        with tempfile.TemporaryDirectory(prefix="fastzs-demo-", ignore_cleanup_errors=True) as folder:
            app = make(os.path.realpath(folder))
            ready()
            config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, proxy_headers=False)
            uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
        listening.close()
