"""The hub's way, against a server on the loopback address that answers as the hub does."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from fastzs import clip
from fastzs.clip import WeightsError, hub, tokenizers

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "timm/vit_base_patch32_clip_224.openai"
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


class Hub(ThreadingHTTPServer):
    """Serves ``files`` (repository/name to bytes).

    Attributes:
        requests: (method, path, Range header) of each.
        cut: this many bytes of the next large file are sent, then the connection ends; None: all.
        extra: added to the size that is announced before a file is asked for.
        refused: the hub's code for an error, for all paths.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.cut: int | None = None
        self.extra = 0
        self.refused: tuple[int, str] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # a client that goes away is no error here


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        part = self.headers.get("Range")
        self.server.requests.append((self.command, self.path, part))
        repository, _, name = self.path.strip("/").partition("/resolve/main/")
        content = self.server.files.get(f"{repository}/{name}")
        known = any(path.startswith(f"{repository}/") for path in self.server.files)
        if self.server.refused or content is None:
            status, code = self.server.refused or (404, "EntryNotFound" if known else "RepoNotFound")
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        first = int(part.removeprefix("bytes=").split("-")[0]) if part else 0
        rest = content[first:]
        self.send_response(206 if part else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(rest) + (0 if body else self.server.extra)))
        if part:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if body:
            cut, self.server.cut = self.server.cut, None
            self.wfile.write(rest if cut is None else rest[:cut])


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Hub]:
    """The stand-in as the only hub there is, and an empty cache."""
    made = Hub()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", made.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub, "online", lambda: True)
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def weights(tmp_path, monkeypatch) -> bytes:
    """A small CLIP's weights; the backbone ViT-B-32 has its sizes."""
    torch.manual_seed(0)
    path = tmp_path / "weights.safetensors"
    save_file(open_clip.CLIP(**TINY, quick_gelu=True).state_dict(), path)
    known = open_clip.get_model_config
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: TINY if name == "ViT-B-32" else known(name))
    return path.read_bytes()


def offline(server, monkeypatch):
    server.shutdown()
    server.server_close()
    monkeypatch.setattr(hub, "online", lambda: False)


def test_downloads_once_and_needs_no_network_after(server, weights, monkeypatch):
    server.files[f"{REPOSITORY}/open_clip_model.safetensors"] = weights
    first = clip.load("ViT-B-32", "openai")
    images = torch.randn(1, 3, 32, 32)
    wanted = first.vision()(images)
    asked = len(server.requests)
    assert asked
    assert first.path.read_bytes() == weights
    clip.load("ViT-B-32", "openai")
    assert len(server.requests) == asked
    offline(server, monkeypatch)
    again = clip.load("ViT-B-32", "openai")
    assert again.fingerprint == first.fingerprint
    assert torch.equal(again.vision()(images), wanted)


def test_an_interrupted_download_goes_on_where_it_ended(server, weights, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what is lost at an interruption
    server.files[f"{REPOSITORY}/open_clip_model.safetensors"] = weights
    server.cut = len(weights) // 2
    assert clip.load("ViT-B-32", "openai").path.read_bytes() == weights
    first, second = [part for method, _, part in server.requests if method == "GET"]
    assert first is None
    assert len(weights) // 2 - 1000 <= int(second.removeprefix("bytes=").removesuffix("-")) <= len(weights) // 2


def test_a_download_that_ended_with_its_process_leaves_nothing_half_done(server, weights, monkeypatch):
    server.files[f"{REPOSITORY}/open_clip_model.safetensors"] = weights

    def killed(url, temp_file, **options):
        temp_file.write(weights[:1000])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.file_download, "http_get", killed)
        with pytest.raises(KeyboardInterrupt):
            clip.load("ViT-B-32", "openai")
    assert hub.in_cache(REPOSITORY, ("open_clip_model.safetensors",)) is None
    assert clip.load("ViT-B-32", "openai").path.read_bytes() == weights


def test_a_file_of_the_wrong_size_is_refused_and_not_kept(server, weights):
    server.files[f"{REPOSITORY}/open_clip_model.safetensors"] = weights
    server.extra = 7
    with pytest.raises(WeightsError, match=f"should be of size {len(weights) + 7} but has size {len(weights)}"):
        clip.load("ViT-B-32", "openai")
    server.extra = 0
    assert clip.load("ViT-B-32", "openai").path.read_bytes() == weights


def test_other_names_of_the_weights_are_found(server, weights):
    server.files[f"{REPOSITORY}/open_clip_pytorch_model.bin"] = weights
    found = hub.file("x", REPOSITORY, ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"))
    assert found.name == "open_clip_pytorch_model.bin"


def test_a_repository_without_the_expected_names_says_which(server, weights):
    server.files[f"{REPOSITORY}/something_else.bin"] = weights
    with pytest.raises(WeightsError, match=rf"{REPOSITORY} has none of open_clip_model\.safetensors, "):
        clip.load("ViT-B-32", "openai")
    with pytest.raises(WeightsError, match=r"has none of open_clip_config\.json, config\.json"):
        clip.load(weights=f"hf-hub:{REPOSITORY}")


def test_a_repository_that_is_not_there_or_gated_says_so(server):
    with pytest.raises(WeightsError, match="no such repository, or it is private"):
        clip.load(weights="hf-hub:nobody/nothing")
    server.refused = (403, "GatedRepo")
    with pytest.raises(WeightsError, match="it is gated: accept its licence"):
        clip.load(weights="hf-hub:somebody/gated")


def test_the_remedy_is_of_the_file_that_is_missing(server, weights, monkeypatch):
    offline(server, monkeypatch)
    with pytest.raises(WeightsError, match=rf"fetch open_clip_model\.safetensors from {REPOSITORY} and pass its path"):
        clip.load("ViT-B-32", "openai")
    config = {"hf_tokenizer_name": "somebody/words"}
    with pytest.raises(WeightsError, match=r"run 'hf download somebody/words' on") as refused:
        tokenizers.of_hub(config, "ViT-B-32")
    assert "pass its path as weights" not in str(refused.value)
    with pytest.raises(WeightsError, match=r"run 'hf download me/mine' on"):
        clip.load(weights="hf-hub:me/mine")


def test_a_hub_id_brings_its_configuration(server, weights):
    server.files["me/mine/open_clip_config.json"] = json.dumps({"model_cfg": TINY | {"quick_gelu": True}}).encode()
    server.files["me/mine/open_clip_model.safetensors"] = weights
    loaded = clip.load(weights="hf-hub:me/mine")
    assert loaded.quick_gelu
    assert loaded.vision()(torch.randn(1, 3, 32, 32)).shape == (1, 16)
