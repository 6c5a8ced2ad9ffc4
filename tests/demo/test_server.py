"""The server without the page: the HTTP API, the downloads, what it refuses."""

import asyncio
import io
import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from fastzs import Segmentation, Segmenter
from fastzs.cli import main
from fastzs.demo.view import card, problem
from tests.demo.conftest import NAMES

pytest.importorskip("fastapi", reason="needs the extra demo")
import httpx

from fastzs.demo.server import FORMATS, WAITING, application, listen

HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(2)>'
LIMIT = 3 << 18


class Client:
    """Requests to an application without a network."""

    def __init__(self, app):
        self.transport = httpx.ASGITransport(app)

    def open(self):
        return httpx.AsyncClient(transport=self.transport, base_url="http://127.0.0.1:7860")

    def get(self, path, **options):
        return asyncio.run(self._request("GET", path, options))

    def post(self, path, **options):
        return asyncio.run(self._request("POST", path, options))

    async def _request(self, method, path, options):
        async with self.open() as client:
            return await client.request(method, path, **options)


@pytest.fixture
def client(answers, tmp_path):
    return Client(application(answers, str(tmp_path), LIMIT))


def ask(client, scene, name="scene.png", headers=None, **fields):
    return client.post("/label", files={"image": (name, scene)}, data={"names": NAMES, **fields}, headers=headers)


def test_labels_over_http(client, scene, answers, tmp_path):
    said = ask(client, scene)
    assert said.headers["content-type"] == "image/png"
    (tmp_path / "labels.png").write_bytes(said.content)
    got = Segmentation.load(tmp_path / "labels.png")
    assert got.names == tuple(NAMES.split(", "))
    assert torch.equal(got.labels, answers.ask(scene, "scene.png", NAMES).result.labels)
    again = ask(client, scene, background="threshold", threshold="0.9", format="coco")
    assert again.headers["server-timing"].startswith("label;dur=")  # and no "encode"
    coco = json.loads(again.content)
    assert [one["name"] for one in coco["categories"]] == NAMES.split(", ")
    assert coco["images"][0]["file_name"] == "scene.png"
    assert Image.open(io.BytesIO(ask(client, scene, format="overlay").content)).format == "JPEG"
    assert [path.name for path in tmp_path.iterdir()] == ["labels.png"]  # nothing else is left


def test_what_the_page_loads(client, scene, answers):
    answer = answers.ask(scene, "my scene/../é.png", "blue moon, gravel", background="threshold")
    shown = card(answer)
    coded = np.array(Image.open(io.BytesIO(client.get(f"/answers/{answer.id}/map.png").content)))
    assert np.array_equal(coded[..., 0] + 256 * coded[..., 1].astype(int), answer.result.labels.numpy())
    image = Image.open(io.BytesIO(client.get(f"/images/{answer.image_id}.jpg").content))
    assert image.size == (384, 256)
    assert "network did not run" in card(answers.ask(scene, "scene.png", "gravel"))
    for file in FORMATS.values():
        assert f"answers/{answer.id}/{file}" in shown
        got = client.get(f"/answers/{answer.id}/{file}")
        assert got.status_code == 200
        assert got.headers["content-disposition"] == f"attachment; filename*=UTF-8''%C3%A9_{file}"
    assert client.get("/answers/nothing/labels.png").status_code == 404
    assert client.get(f"/answers/{answer.id}/other.png").status_code == 404


def test_names_and_titles_are_text_not_html(scene, answers):
    answer = answers.ask(scene, HOSTILE, "blue moon, gravel")
    renamed = Segmentation(answer.result.labels, (HOSTILE, "gravel"), answer.result.scores, answer.result.image)
    object.__setattr__(answer, "result", renamed)
    for shown in (card(answer), problem(HOSTILE)):
        assert "<script" not in shown
        assert "<img src=x" not in shown
        assert "&lt;script&gt;" in shown


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"names": "zebra"}, "do not know the word 'zebra'"),
        ({"format": "gif"}, "format: expected one of png, overlay, coco, got 'gif'"),
        ({"threshold": "high"}, "threshold: expected a number from 0 to 1, got 'high'"),
        ({"colour": "red"}, "colour: there is no such field"),
    ],
)
def test_a_form_that_does_not_fit(client, scene, fields, why):
    said = ask(client, scene, **fields)
    assert said.status_code == 422
    assert why in said.text
    assert "\n" not in said.text.strip()


def test_a_form_without_an_image(client):
    said = client.post("/label", data={"names": NAMES})
    assert (said.status_code, said.text) == (422, "expected a form with the field 'image', a file, got none\n")


def test_too_large(client, monkeypatch, scene):
    async def unread():
        raise AssertionError("a body that is too large was read")
        yield b""

    form = {"content-type": "multipart/form-data; boundary=x"}
    announced = client.post("/label", content=unread(), headers={**form, "content-length": str(10 * LIMIT)})
    for said in (ask(client, bytes(LIMIT + 1)), announced):
        assert said.status_code == 413
        assert said.text == "expected a file of at most 0.75 MB; shrink it, or start with a larger --max-megabytes\n"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    buffer = io.BytesIO()
    Image.new("1", (300, 300)).save(buffer, "PNG")
    said = ask(client, buffer.getvalue(), "large.png")
    assert (said.status_code, "large.png: has more than 20,000 pixels" in said.text) == (422, True)

    async def unsized():
        yield scene

    said = client.post("/label", content=unsized(), headers=form)
    assert (said.status_code, said.text) == (411, "expected a request that gives its Content-Length\n")


def test_others_get_nothing(client, scene, tmp_path):
    """Foreign names for 127.0.0.1, other sites' pages, paths that nothing needs, files outside of the folder."""
    assert client.get("/", headers={"host": "evil.example"}).status_code == 403
    assert ask(client, scene, headers={"origin": "https://evil.example"}).status_code == 403
    assert ask(client, scene, headers={"origin": "http://127.0.0.1:7860"}).status_code == 200
    inside = tmp_path / "upload.png"
    inside.write_bytes(scene)
    paths = ["/gradio_api/proxy=http://x", "/gradio_api/file=http://x/a.png", "/docs", "/openapi.json"]
    paths += [
        f"/gradio_api/file={path}" for path in ("/etc/passwd", f"{tmp_path}/../x", str(tmp_path), f"{tmp_path}x/a")
    ]
    for path in paths:
        assert client.get(path).text.startswith("there is nothing at"), path
    for path in (
        "/gradio_api/run/find",
        "/gradio_api/call/find",
        "/gradio_api/vibe-edit",
        "/gradio_api/process_recording",
    ):
        assert client.post(path, json={}).text.startswith("there is nothing at"), path
    assert client.get(f"/gradio_api/file={inside}").json() == {"detail": "Not Found"}  # it got through to the page
    policy = client.get("/images/a.jpg").headers["content-security-policy"]
    assert policy.startswith("default-src 'self'")


def test_one_at_a_time(client, answers, scene, monkeypatch):
    """Of many requests at once one is worked on, some wait, the rest are sent away."""
    running, most, go = 0, 0, threading.Event()
    label = Segmenter.label

    def slow(*arguments, **options):
        nonlocal running, most
        running += 1
        most = max(most, running)
        go.wait(10)
        running -= 1
        return label(*arguments, **options)

    monkeypatch.setattr(Segmenter, "label", slow)

    async def crowd() -> list[int]:
        async with client.open() as opened:
            form = {"files": {"image": ("scene.png", scene)}, "data": {"names": NAMES}}
            tasks = [asyncio.create_task(opened.post("/label", **form)) for _ in range(WAITING + 3)]
            while sum(task.done() for task in tasks) < 3:
                await asyncio.sleep(0.01)
            go.set()
            return sorted(said.status_code for said in await asyncio.gather(*tasks))

    assert asyncio.run(crowd()) == [200] * WAITING + [503] * 3
    assert most == 1


def test_a_busy_port_is_one_sentence():
    with listen(0) as taken:
        port = taken.getsockname()[1]
        assert taken.getsockname()[0] == "127.0.0.1"
        with pytest.raises(ValueError, match=rf"^port {port} of 127\.0\.0\.1 cannot be taken: address already in use"):
            listen(port)
    with pytest.raises(ValueError, match=r"port 99999 .* cannot be taken"):
        listen(99999)


def test_the_command_says_what_is_wrong_before_it_loads_a_model(capsys, monkeypatch):
    with listen(0) as taken:
        port = taken.getsockname()[1]
        assert main(["demo", "--port", str(port)]) == 2
        assert capsys.readouterr().err.startswith(f"fastzs demo: port {port} of 127.0.0.1 cannot be taken")
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None if package == "gradio" else package)
    assert main(["demo"]) == 2
    assert (
        "pages of fastzs demo need gradio, which is not installed: pip install 'fastzs[demo]'"
        in capsys.readouterr().err
    )
    monkeypatch.undo()
    assert main(["demo", "--max-pixels", "0"]) == 2
    assert capsys.readouterr().err == "fastzs demo: --max-pixels: expected a number above 0, got 0\n"
