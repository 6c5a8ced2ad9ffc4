"""The training-free systems on the built-in weights; parity with the published code is in tests/parity."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import fastzs.operators as operators
from fastzs import clip
from fastzs.clip import WeightsError
from fastzs.features import FeaturesError
from fastzs.kernels.dense_attention.procrustes import polar, procrustes
from fastzs.models.pearl import PEARL
from fastzs.models.proxyclip import ProxyCLIP
from fastzs.models.resclip import ResCLIP, agreement
from fastzs.models.training_free import NACLIP, SCLIP, ClearCLIP
from fastzs.segmenter import Segmenter
from tests.parity.golden import read
from tests.parity.training_free import build
from tests.tiny import VISION, tiny_clip

NAMES = ["blue moon", {"pink cross": ["pink heart"]}, "orange ring"]


@pytest.fixture(scope="module")
def shapes():
    return clip.load("shapes", "shapes")


@pytest.fixture(scope="module")
def image():
    return torch.randint(0, 255, (3, 70, 90), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("kind", [SCLIP, ClearCLIP, NACLIP])
def test_labels_an_image_and_asks_it_again(kind, shapes, image):
    segmenter = Segmenter(kind(shapes), short_side=64, crop=48, stride=24)
    result = segmenter(image, NAMES, scores=True)
    assert result.labels.shape == (70, 90)
    assert result.names == ("blue moon", "pink cross", "orange ring")
    assert 0 < result.scores.min() <= result.scores.max() <= 1
    again = segmenter.label(segmenter.encode(image), NAMES, scores=True)
    assert torch.equal(again.labels, result.labels)
    assert torch.equal(again.scores, result.scores)


def test_probabilities_of_every_class(shapes, image):
    segmenter = Segmenter(NACLIP(shapes), short_side=64, crop=48, stride=24)
    result = segmenter(image, NAMES, probabilities=True)
    assert result.probabilities.shape == (3, 70, 90)
    assert torch.equal(result.probabilities.argmax(0).to(torch.uint8), result.labels)


def test_background_by_threshold_and_by_words(shapes, image):
    segmenter = Segmenter(NACLIP(shapes), short_side=64, crop=48, stride=24)
    by_threshold = segmenter(image, NAMES, background="threshold", threshold=0.9)
    assert by_threshold.names[-1] == "background"
    assert (by_threshold.labels == 3).any()
    assert segmenter(image, NAMES, background="prompt").names[-1] == "background"


def test_padded_windows_are_cut_back():
    """A window whose side is no multiple of 16 is padded on both sides, and its map covers the padding."""
    model = ClearCLIP(clip.load("shapes", "shapes"))
    assert model.covered(torch.tensor([[10, 0, 45, 48]])).tolist() == [[9, 0, 48, 48]]
    assert model.fitted(torch.ones(1, 3, 45, 48)).shape == (1, 3, 48, 48)
    assert model.fitted(torch.ones(1, 3, 45, 48))[0, 0, 0].sum() == 0


def test_an_operator_of_ones_own(shapes, image, tmp_path):
    @operators.operator("test-kk")
    def keys(block):
        weights = (block.k[:, :, block.prefix :] @ block.k.mT * block.scale).softmax(-1)
        return weights @ block.v

    try:
        mine, built_in = (NACLIP(shapes, dense=dense).encode(_normal(image)).patches for dense in ("test-kk", "kk"))
        assert operators.operator("test-kk")(keys) is keys  # the same file is read again
        with pytest.raises(ValueError, match="'test-kk' exists already"):
            operators.operator("test-kk")(eval("lambda block: block.v"))
    finally:
        del operators._known["test-kk"]
    assert (mine - built_in).abs().max() <= 1e-5 * built_in.abs().max()
    path = tmp_path / "mine.py"
    path.write_text("def values(block):\n    return block.v[:, :, block.prefix:]\n")
    model = NACLIP(shapes, dense=f"{path}:values")
    own = model.encode(_normal(image)).patches
    identity = NACLIP(shapes, dense="identity").encode(_normal(image)).patches
    assert (own - identity).abs().max() <= 1e-5 * identity.abs().max()
    path.write_text(path.read_text() + "\n# another file")
    assert NACLIP(shapes, dense=f"{path}:values").settings != model.settings  # other contents, other results


@pytest.mark.parametrize(
    ("dense", "words"),
    [
        ("kk+gausian", r"unknown operator 'kk\+gausian'; nearest known: kk\+gaussian"),
        ("nowhere.py:f", r"there is no file nowhere\.py"),
    ],
)
def test_unknown_operators_are_refused(dense, words, shapes):
    with pytest.raises(ValueError, match=words):
        NACLIP(shapes, dense=dense)


def test_operators_ask_for_blocks_that_exist(shapes):
    @operators.operator("test-late", blocks=(40,))
    def late(block):
        return block.v

    try:
        with pytest.raises(ValueError, match="attention of block 40"):
            NACLIP(shapes, dense="test-late")
    finally:
        del operators._known["test-late"]


def test_resclip_wants_ten_blocks(shapes):
    with pytest.raises(ValueError, match="blocks 5 to 8"):
        ResCLIP(shapes)


def test_the_mean_of_earlier_attention_and_turned_keys_are_operators():
    """ "mean" against the definition; "procrustes" in NACLIP gives what it gives in PEARL."""
    tower = VISION | {"layers": 11}
    model, image = NACLIP(tiny_clip(tower), dense="mean").double().eval(), torch.rand(1, 3, 24, 40, dtype=torch.float64)
    maps = []
    tokens, grid = model.visual.trunk(
        image, lambda i, t, q, k, v: maps.append((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)) if 5 <= i <= 8 else None
    )
    attended = (sum(maps) / 4)[:, :, 1:] @ model.visual.projections(tokens, grid)[2]
    wanted = model.visual.read(model.visual.finish(tokens, attended, False, False), grid)
    torch.testing.assert_close(model.encode(image).patches, wanted)
    pearl = PEARL(tiny_clip()).double().eval()
    naclip = NACLIP(tiny_clip(), dense="procrustes").double().eval()
    naclip.visual.load_state_dict(pearl.visual.state_dict())
    torch.testing.assert_close(naclip.encode(image).patches, pearl.encode(image).patches)
    weighted = NACLIP(tiny_clip(), dense="procrustes", key_weight=0.5).double().eval()
    weighted.visual.load_state_dict(pearl.visual.state_dict())
    assert (weighted.encode(image).patches - pearl.encode(image).patches).abs().max() > 1e-4


def test_agreement_is_weaker_across_another_label():
    labels = torch.tensor([[0, 1, 0, 0]])
    found = agreement(labels, True, torch.float64)
    assert found[0, 1] == 0
    assert found[2, 3] == 1
    assert found[0, 3] == pytest.approx(torch.e**-1)
    assert torch.equal(agreement(labels, False, torch.float64), (labels == labels.T).double())


def _normal(image):
    return image[None].float() / 255


def test_proxyclip_reads_any_network_and_survives_a_plain_image(shapes, image):
    """Features of one's own; where all patches look alike each sees at least itself."""
    model = ProxyCLIP(shapes, affinity=lambda images: images[:, :, ::8, ::8], multiple=16)
    segmenter = Segmenter(model, short_side=64, crop=48, stride=24)
    assert segmenter(image, NAMES).labels.shape == (70, 90)
    plain = segmenter(torch.full_like(image, 90), NAMES, scores=True)
    assert plain.scores.isfinite().all()


def test_an_own_operator_sees_the_other_networks_features(shapes, image):
    """ProxyCLIP's equations by hand on its grid; or rows for CLIP's own grid."""

    def proxy(block):
        unit = torch.nn.functional.normalize(block.affinity.flatten(2), dim=1)
        alike = unit.mT @ unit
        scores = 3 * (alike - 1.2 * alike.mean())
        weights = scores.masked_fill((scores < 0) & ~torch.eye(len(scores[0]), dtype=torch.bool), -torch.inf)
        v = block.v[:, :, block.prefix :].mT.flatten(1, 2).unflatten(2, block.grid)
        values = torch.nn.functional.interpolate(v, block.affinity.shape[2:], mode="bilinear").flatten(2).mT
        return (weights.softmax(-1) @ values).unflatten(2, (block.v.shape[1], -1)).transpose(1, 2)

    def network(images):
        return images[:, :, ::4, ::4]

    own, built_in, coarse = (
        ProxyCLIP(shapes, affinity=network, multiple=16, **options).encode(_normal(image)).patches
        for options in ({"dense": proxy}, {}, {"dense": lambda block: block.v[:, :, block.prefix :]})
    )
    assert own.shape[2:] == (20, 24)
    assert (own - built_in).abs().max() <= 1e-4 * built_in.abs().max()
    assert coarse.shape[2:] == (10, 12)
    with pytest.raises(ValueError, match="expected the operator 'proxy' or a function, got 'kk'"):
        ProxyCLIP(shapes, affinity=network, dense="kk")


def test_features_one_has_already_are_an_affinity(shapes, image):
    features = torch.rand(5, 9, 11, generator=torch.Generator().manual_seed(0))
    model = ProxyCLIP(shapes, affinity=features, multiple=8)
    whole = Segmenter(model, short_side=0, crop=0, windows="stitched")
    assert whole.encode(image).windows.patches.shape[2:] == (9, 11)
    assert whole(image, NAMES).labels.shape == (70, 90)
    with pytest.raises(ValueError, match="the affinity is features of a whole image"):
        Segmenter(model, short_side=64, crop=48)(image, NAMES)
    with pytest.raises(ValueError, match=r"expected features \[C, h, w\] of one image, got \[9, 11\]"):
        ProxyCLIP(shapes, affinity=features[0])
    other = Segmenter(ProxyCLIP(shapes, affinity=features + 1, multiple=8), crop=0, windows="stitched")
    with pytest.raises(FeaturesError, match="of another model"):
        other.label(whole.encode(image), NAMES)


def test_features_under_another_operator_are_refused(shapes, image):
    def one(block):
        return block.v[:, :, block.prefix :]

    def two(block):
        return -block.v[:, :, block.prefix :]

    first, second = (Segmenter(NACLIP(shapes, dense=dense), short_side=64, crop=48) for dense in (one, two))
    with pytest.raises(FeaturesError, match="of another model"):
        second.label(first.encode(image), NAMES)


@pytest.mark.parametrize(
    "kind",
    [SCLIP, ClearCLIP, NACLIP, PEARL, partial(ProxyCLIP, affinity=lambda images: images[:, :, ::4, ::4], multiple=8)],
)
@pytest.mark.parametrize("size", [(1, 1), (30, 41)])
def test_small_and_plain_images(kind, size, shapes):
    """One pixel, and one colour: labels and finite scores, refined and not."""
    image = torch.full((3, *size), 90, dtype=torch.uint8)
    model = kind(shapes)
    for refine in ("none", "pamr", "laplacian"):
        model.readout = replace(model.readout, refine=refine)
        found = Segmenter(model, short_side=32, crop=24, stride=16)(image, NAMES, scores=True)
        assert found.labels.shape == size
        assert found.scores.isfinite().all()


def test_an_affinity_that_cannot_be_had_is_named(shapes):
    with pytest.raises(WeightsError, match="affinity 'vit_nowhere'"):
        ProxyCLIP(shapes, affinity="vit_nowhere")


def test_pearl_turns_keys_to_queries():
    """Keys that are the queries turned by any rotation attend as if they were not turned."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 40, 6, generator=generator, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    v = torch.randn(q.shape, generator=generator, dtype=torch.float64)
    exact = partial(polar, steps=40)
    turned, plain = (procrustes(q, k, v, 1, 0.0, exact) for k in (q @ turn, q))
    assert (turned - plain).abs().max() < 1e-9


def test_the_example_of_an_own_operator_is_the_published_one():
    root = Path(__file__).parents[2]
    golden = read(root / "tests" / "goldens" / "T_clearclip.safetensors")
    try:
        operators.find(f"{root}/examples/own_operator.py:queries")
        kind = operators.find(f"{root}/examples/own_operator.py:queries")  # each load reads the file
        model = build(ClearCLIP, golden, torch.float64, dense=kind, multiple=0)
        assert golden.check("out64.image1.features", model.encode(golden["in.image1"].double()).patches).ok
        earlier = build(ClearCLIP, golden, torch.float64, dense="earlier", multiple=0)
        assert earlier.encode(golden["in.image1"].double()).patches.isfinite().all()
    finally:
        for name in ("queries", "earlier"):
            operators._known.pop(name, None)
