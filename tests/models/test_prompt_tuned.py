"""What ClipRC and ZegCLIP share: published checkpoints, own files, the segmenter, the command line, bad input."""

import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import fastzs
from bench.baselines.prompt_tuned import Published
from fastzs.cli import main
from fastzs.clip import WeightsError
from fastzs.models import ClipRC, ZegCLIP
from fastzs.segmenter import Segmenter
from fastzs.vocabulary import Vocabulary
from fastzs.windows import resize_size
from tests.models.ask import ask
from tests.models.official import DECODER, model, published_state, write

KINDS = {"clip_rc": ClipRC, "zegclip": ZegCLIP}
HEADS = {"heads": 3, "decoder_heads": DECODER["decoder_heads"]}
NAMES = ["cat", "dog", "tree", "sky"]


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def text():
    return F.normalize(torch.randn(4, 32, generator=torch.Generator().manual_seed(7)), dim=1)


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(8))


@torch.no_grad()
def test_published_checkpoint(kind, tmp_path, images, text):
    net = model(kind)
    path = write(tmp_path / "voc.pth", published_state(net))
    loaded = kind.from_checkpoint(path, **HEADS)
    assert not loaded.training
    assert torch.equal(loaded(images, text), net(images, text))
    assert (loaded.crop, loaded.stride, loaded.short_side) == (64, 53, 64)
    assert not any(unused in name for name in loaded.state_dict() for unused in ("self_attn", "norm1", "recovery"))


@torch.no_grad()
def test_checkpoint_with_carried_prompts(tmp_path, images, text):
    """Without deep prompts the published code has a prompt_norm that it does not use."""
    net = model(ZegCLIP, deep_prompts=0)
    unused = {"backbone.prompt_norm.weight": torch.ones(48), "backbone.prompt_norm.bias": torch.ones(48)}
    loaded = ZegCLIP.from_checkpoint(write(tmp_path / "voc.pth", published_state(net) | unused), **HEADS)
    assert torch.equal(loaded(images, text), net(images, text))


@torch.no_grad()
def test_wrapped_for_several_gpus(tmp_path, images, text):
    net = model(ZegCLIP)
    state = {f"module.{name}": t for name, t in published_state(net).items()}
    loaded = ZegCLIP.from_checkpoint(write(tmp_path / "voc.pth", state), **HEADS)
    assert torch.equal(loaded(images, text), net(images, text))


@torch.no_grad()
def test_safetensors_with_the_same_names(kind, tmp_path, images, text):
    net = model(kind)
    save_file(published_state(net), tmp_path / "voc.safetensors")
    loaded = kind.from_checkpoint(tmp_path / "voc.safetensors", **HEADS)
    assert torch.equal(loaded(images, text), net(images, text))


@torch.no_grad()
def test_save_and_load_our_own(kind, tmp_path, images, text):
    net = model(kind, seen=["cat", "dog"], calibration=0.2, deep_prompts=1)
    net.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(dict(net.named_parameters()))
    assert json.loads((tmp_path / "config.json").read_text())["sizes"]["width"] == 48
    loaded = kind.from_pretrained(tmp_path)
    assert torch.equal(loaded.eval()(images, text), net(images, text))
    assert (loaded.seen, loaded.calibration) == (["cat", "dog"], 0.2)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in net.parameters()]


def test_normalisation_switch(kind):
    assert tuple(model(kind).mean) == (0.485, 0.456, 0.406)
    assert tuple(model(kind, imagenet_normalization=False).mean) == pytest.approx((0.48145466, 0.4578275, 0.40821073))


@torch.no_grad()
def test_class_embedding_switch(kind, images, text):
    twice, once = model(kind), model(kind, double_class_embedding=False)
    assert not torch.allclose(twice(images, text), once(images, text))
    tokens = once.backbone.embed(images)[0][0, 0]
    assert torch.allclose(tokens, once.backbone.class_embedding + once.backbone.positional_embedding[0])


def test_recovery_can_be_kept_for_more_training(tmp_path):
    net = model(ClipRC)
    path = write(tmp_path / "voc.pth", published_state(net))
    loaded = ClipRC.from_checkpoint(path, recovery=True, **HEADS)
    assert torch.equal(
        loaded.decode_head.recovery_decoder.linear_q_out.weight, net.decode_head.recovery_decoder.linear_q_out.weight
    )


def test_bridge_that_is_not_square(tmp_path, images, text):
    net = model(ClipRC, bridge=(2, 3))
    path = write(tmp_path / "voc.pth", published_state(net))
    with torch.no_grad():
        assert torch.equal(ClipRC.from_checkpoint(path, bridge=(2, 3), **HEADS)(images, text), net(images, text))
    with pytest.raises(WeightsError, match=r"6 region tokens, not 2 x 2; .* bridge=\(rows, columns\)"):
        ClipRC.from_checkpoint(path, **HEADS)


def test_checkpoint_of_the_other_model(tmp_path):
    one, other = (write(tmp_path / f"{n}.pth", published_state(model(k))) for n, k in KINDS.items())
    with pytest.raises(WeightsError, match=r"this is a CLIP-RC checkpoint, not ZegCLIP's; .*ClipRC.from_checkpoint"):
        ZegCLIP.from_checkpoint(one, **HEADS)
    with pytest.raises(WeightsError, match=r"this is a ZegCLIP checkpoint, not CLIP-RC's; .*ZegCLIP.from_checkpoint"):
        ClipRC.from_checkpoint(other, **HEADS)


def test_no_checkpoint_at_all(kind, tmp_path):
    with pytest.raises(WeightsError, match="there is no such file"):
        kind.from_checkpoint(tmp_path / "nothing.pth")
    with pytest.raises(WeightsError, match=f"not a {kind.__name__} checkpoint .*it holds conv.weight"):
        kind.from_checkpoint(write(tmp_path / "other.pth", {"conv.weight": torch.zeros(3)}))


def test_tensors_missing_or_unexpected(kind, tmp_path):
    state = published_state(model(kind))
    incomplete = {name: t for name, t in state.items() if name != "backbone.ln_post.weight"}
    with pytest.raises(WeightsError, match=r"missing: backbone\.ln_post\.weight"):
        kind.from_checkpoint(write(tmp_path / "a.pth", incomplete), **HEADS)
    incomplete = {name: t for name, t in state.items() if name != "backbone.proj"}
    with pytest.raises(WeightsError, match=r"'backbone\.proj' is missing; is this a whole"):
        kind.from_checkpoint(write(tmp_path / "b.pth", incomplete), **HEADS)
    with pytest.raises(WeightsError, match=r"unexpected: backbone\.adapter\.weight"):
        kind.from_checkpoint(write(tmp_path / "c.pth", state | {"backbone.adapter.weight": torch.ones(2)}), **HEADS)


def test_another_width(kind, tmp_path):
    state = published_state(model(kind))
    state["decode_head.q_proj.weight"] = torch.zeros(32, 48)
    with pytest.raises(WeightsError, match=r"q_proj.weight is \[32, 48\]; .* want \[32, 64\]"):
        kind.from_checkpoint(write(tmp_path / "a.pth", state), **HEADS)
    with pytest.raises(WeightsError, match=r"a tower 48 wide cannot have heads of 64 channels; .* heads="):
        kind.from_checkpoint(write(tmp_path / "b.pth", published_state(model(kind))))
    net = kind.from_checkpoint(write(tmp_path / "c.pth", published_state(model(kind))), **HEADS)
    with pytest.raises(ValueError, match=r"expected text vectors \[classes, 32\], got \[4, 16\]"):
        net(torch.zeros(1, 3, 64, 64), torch.zeros(4, 16))
    with pytest.raises(ValueError, match=r"expected text vectors 32 wide, .* are 16 wide"):
        ask(net, torch.zeros(1, 3, 64, 64), Vocabulary(NAMES, embeddings=torch.zeros(4, 16)))


def test_damaged_files(kind, tmp_path):
    path = write(tmp_path / "whole.pth", published_state(model(kind)))
    (tmp_path / "cut.pth").write_bytes(path.read_bytes()[:20000])
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        kind.from_checkpoint(tmp_path / "cut.pth", **HEADS)
    state = published_state(model(kind))
    state["backbone.ln_pre.weight"][3] = torch.nan
    with pytest.raises(WeightsError, match=r"ln_pre.weight has NaN"):
        kind.from_checkpoint(write(tmp_path / "nan.pth", state), **HEADS)


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_does_not_run(kind, tmp_path, zipped):
    trap = tmp_path / "it ran"
    content = {"state_dict": published_state(model(kind)), "meta": Code(trap)}
    if zipped:
        torch.save(content, tmp_path / "bad.pth")
    else:
        (tmp_path / "bad.pth").write_bytes(pickle.dumps(content))
    with pytest.raises(WeightsError, match=r"refused, since reading it would run code|cannot be read as weights"):
        kind.from_checkpoint(tmp_path / "bad.pth", **HEADS)
    assert not trap.exists()


def test_without_a_text_tower(kind, tmp_path):
    net = kind.from_checkpoint(write(tmp_path / "voc.pth", published_state(model(kind))), **HEADS)
    with pytest.raises(WeightsError, match=r"no text tower .*embeddings="):
        ask(net, torch.zeros(1, 3, 64, 64), NAMES)


@torch.no_grad()
def test_text_tower_of_the_checkpoint(kind, tmp_path, monkeypatch, images):
    monkeypatch.setenv("FASTZS_CACHE", str(tmp_path))
    net = kind.from_checkpoint(write(tmp_path / "voc.pth", published_state(model(kind), text_tower=True)), **HEADS)
    logits = ask(net, images, NAMES)
    assert torch.equal(logits, net(images, Vocabulary(NAMES).embed(net.clip)))
    assert not torch.equal(logits[:, 0], logits[:, 1])
    assert ask(net, images, [{"cat": ["kitten", "tomcat"]}, "dog"]).shape[1] == 2


@torch.no_grad()
def test_a_vocabulary_is_embedded_once(kind, text, images):
    """The same tensor for equal vocabularies: the decoder keeps its half for the text by it."""
    segmenter = Segmenter(model(kind))
    halves = []
    segmenter.model.decode_head.q_proj._text_half = lambda sources, compute: halves.append(sources[2]) or compute()
    for _ in range(2):
        segmenter(picture(50, 90), Vocabulary(NAMES, embeddings=text))
    assert len(halves) > 1
    assert all(half is halves[0] for half in halves)
    assert torch.equal(segmenter.question(Vocabulary(NAMES, embeddings=-text)).text, -text)
    double = Segmenter(model(kind).to(torch.float64)).question(Vocabulary(NAMES, embeddings=text))
    assert double.text.dtype == torch.float64


def picture(height, width):
    noise = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return noise.repeat(8, 0).repeat(8, 1)[:height, :width].copy()


@pytest.mark.parametrize(
    ("name", "seen"), [("clip_rc", None), ("clip_rc", ["dog", "sky"]), ("zegclip", None), ("zegclip", ["cat", "sky"])]
)
def test_segments_as_published(name, seen, tmp_path, text):
    """From an image to labels through sliding windows, against the published order of work."""
    net = model(KINDS[name], seed=1)  # of this one the best class changes over the image
    state = published_state(net)
    path = write(tmp_path / "voc.pth", state)
    segmenter = fastzs.load(name, checkpoint=path, seen=seen, precision="fp32", device="cpu", **HEADS)
    original = picture(50, 90)
    result = segmenter(original, Vocabulary(NAMES, embeddings=text))
    size = resize_size((50, 90), 64)
    resized = segmenter._resize(torch.from_numpy(original).permute(2, 0, 1)).float()
    assert resized.shape[1:] == size
    image = (resized / 255 - torch.tensor(net.mean)[:, None, None]) / torch.tensor(net.std)[:, None, None]
    published = Published(name, state, 3, 4, 64).eval()
    indices = None if seen is None else [NAMES.index(n) for n in seen]
    labels = published.segment(image[None], text, segmenter.stride, (50, 90), indices)
    assert (result.labels != labels).float().mean() < 1e-3  # measured 0; two scores may tie
    assert len(labels.unique()) > 1
    if seen is not None:
        plain = published.segment(image[None], text, segmenter.stride, (50, 90))
        assert not torch.equal(plain, labels)


@pytest.mark.parametrize("name", KINDS)
def test_bf16(name, tmp_path, text):
    path = write(tmp_path / "voc.pth", published_state(model(KINDS[name], seed=1)))
    vocabulary = Vocabulary(NAMES, embeddings=text)
    low, full = (
        fastzs.load(name, checkpoint=path, precision=precision, device="cpu", **HEADS)(picture(50, 90), vocabulary)
        for precision in ("bf16", "fp32")
    )
    assert (low.labels == full.labels).float().mean() > 0.9  # measured 0.951 and 0.996


@pytest.mark.parametrize("size", [(40, 30), (20, 200)])
def test_windows_shrink_to_a_smaller_picture(size, tmp_path, text):
    """As in the published code: the crop is at most the image. Here no image is resized."""
    path = write(tmp_path / "voc.pth", published_state(model(ClipRC)))
    segmenter = fastzs.load("clip_rc", checkpoint=path, short_side=0, **HEADS)
    assert segmenter(picture(*size), Vocabulary(NAMES, embeddings=text)).labels.shape == size


def test_more_than_255_classes(tmp_path):
    path = write(tmp_path / "voc.pth", published_state(model(ClipRC)))
    embeddings = F.normalize(torch.randn(300, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    segmenter = fastzs.load("clip_rc", checkpoint=path, precision="fp32", **HEADS)
    labels = segmenter(picture(50, 90), Vocabulary([f"c{i}" for i in range(300)], embeddings=embeddings)).labels
    assert labels.dtype == torch.int16
    assert labels.min() >= 0
    assert labels.max() < 300


@torch.no_grad()
def test_exports_with_any_vocabulary(kind, images, text):
    """torch.export with the text vectors as an input: one graph for every batch and every number of classes."""
    net = model(kind)
    dynamic = ({0: torch.export.Dim("batch", max=64)}, {0: torch.export.Dim("classes", max=4096)})
    exported = torch.export.export(net, (images, text), dynamic_shapes=dynamic).module()
    more, names = torch.randn(3, 3, 64, 64), torch.randn(9, 32)
    ours = net(more, names)
    # rounding only: the graph has torch's own products, the model on AMD those of oneDNN
    assert torch.allclose(exported(more, names), ours, rtol=1e-5, atol=2e-6 * ours.abs().max().item())


def test_sizes_of_a_published_checkpoint(kind):
    """ViT-B/16 with nothing but the tensors to go by: heads of 64 channels, OpenAI's text tower."""
    sizes = {"width": 768, "layers": 12, "heads": 12, "patch_size": 16, "grid": 32, "output_dim": 512}
    with torch.device("meta"):
        state = published_state(kind(sizes=sizes, prompts=100))
        options = kind._sizes(state, {})
        net = kind(**options)
    assert options["sizes"] == sizes | {"mlp_ratio": 4.0}
    assert (options["backbone"], options["weights"]) == ("ViT-B-16", "openai")
    assert (net.settings["prompts"], net.settings["deep_prompts"], net.crop, net.stride) == (100, 11, 512, 426)
    wanted = {"decoder_layers": 3, "decoder_heads": 8, "decoder_hidden": 2048}
    assert wanted.items() <= net.settings.items()
    assert net.settings.get("bridge") == ([4, 4] if kind is ClipRC else None)


@pytest.mark.parametrize("name", KINDS)
def test_trains_under_autocast(name, images, text):
    net = model(KINDS[name]).train()
    target = torch.randint(0, 4, (2, 64, 64))
    with torch.autocast("cpu", torch.bfloat16):
        losses = net.losses(images, target, text)
    losses["total"].backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)


def test_whole_picture_at_once(tmp_path, text):
    path = write(tmp_path / "voc.pth", published_state(model(ClipRC)))
    segmenter = fastzs.load("clip_rc", checkpoint=path, crop=0, **HEADS)
    assert segmenter(picture(50, 90), Vocabulary(NAMES, embeddings=text)).labels.shape == (50, 90)


def test_own_folder_through_load(tmp_path, text):
    net = model(ClipRC, seen=["dog"])
    net.save_pretrained(tmp_path)
    segmenter = fastzs.load("clip_rc", checkpoint=tmp_path)
    assert segmenter.model.seen == ["dog"]
    assert segmenter(picture(50, 90), Vocabulary(NAMES, embeddings=text)).labels.shape == (50, 90)


def test_seen_classes_that_are_not_asked_for(tmp_path, text):
    """Those that are asked for are lowered, and a vocabulary may lack them all."""
    path = write(tmp_path / "voc.pth", published_state(model(ClipRC, seed=1)))
    labels = {}
    for seen in (None, ("sky",), ("sky", "zebra"), ("zebra", "Gnu")):
        segmenter = fastzs.load("clip_rc", checkpoint=path, seen=seen, calibration=0.9, precision="fp32", **HEADS)
        labels[seen] = segmenter(picture(50, 90), Vocabulary(NAMES, embeddings=text)).labels
    assert torch.equal(labels["sky",], labels["sky", "zebra"])
    assert torch.equal(labels[None], labels["zebra", "Gnu"])
    assert not torch.equal(labels[None], labels["sky",])


def test_load_needs_a_checkpoint_where_training_is_needed(tmp_path):
    with pytest.raises(ValueError, match="clip_rc needs a trained checkpoint"):
        fastzs.load("clip_rc")
    with pytest.raises(ValueError, match="maskclip has no training"):
        fastzs.load("maskclip", checkpoint="voc.pth")
    with pytest.raises(WeightsError, match="there is no such file"):
        fastzs.load("clip_rc", checkpoint=tmp_path / "voc.pth")


def test_command_line(tmp_path, monkeypatch):
    """``fastzs segment --model clip_rc --checkpoint FILE`` on a checkpoint in the published format."""
    monkeypatch.setenv("FASTZS_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path / "voc.pth", published_state(model(ClipRC), text_tower=True))
    Image.fromarray(picture(50, 90)).save(tmp_path / "street.png")
    options = ["--options.heads=3", "--options.decoder_heads=4", "--precision=fp32"]
    arguments = ["segment", str(tmp_path / "street.png"), "--model=clip_rc", f"--checkpoint={path}"]
    code = main([*arguments, "--classes=cat,dog,tree", "--seen=dog", f"--output={tmp_path / 'out'}", *options])
    assert code == 0
    labels = np.array(Image.open(next((tmp_path / "out").glob("**/street*.png"))))
    assert labels.shape == (50, 90)
    assert set(np.unique(labels)) <= {0, 1, 2}


def test_command_line_with_a_bad_checkpoint(tmp_path, capsys):
    Image.fromarray(picture(50, 90)).save(tmp_path / "street.png")
    path = write(tmp_path / "voc.pth", published_state(model(ZegCLIP)))
    arguments = ["segment", str(tmp_path / "street.png"), "--model=clip_rc", f"--checkpoint={path}", "--classes=cat"]
    assert main([*arguments, f"--output={tmp_path / 'out'}"]) == 2
    assert "this is a ZegCLIP checkpoint" in capsys.readouterr().err
