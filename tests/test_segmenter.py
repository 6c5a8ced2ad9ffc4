import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import fastzs
from fastzs.devices import choose_device, choose_precision, native_bf16
from fastzs.models import MaskCLIP
from fastzs.ops import label_map
from fastzs.segmenter import Segmenter
from fastzs.vocabulary import Vocabulary
from fastzs.windows import window_grid
from tests.models.ask import ask
from tests.tiny import tiny_clip

NAMES = ["cat", "dog", "sky"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTZS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def picture():
    return torch.randint(256, (3, 50, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def segmenter(**options):
    return Segmenter(MaskCLIP(tiny_clip()), **({"short_side": 32} | options))


def test_whole_picture_is_labelled_as_by_hand(picture):
    seg = segmenter(short_side=0)
    result = seg(picture, NAMES, scores=True)
    images = (picture / 255 - 0.5)[None] / 0.5
    logits = ask(seg.model, images, NAMES)
    scores = F.softmax(F.interpolate(logits, (50, 70), mode="bilinear"), dim=1)[0]
    assert result.names == tuple(NAMES)
    assert result.labels.dtype == torch.uint8
    assert torch.equal(result.labels.long(), scores.argmax(0))
    torch.testing.assert_close(result.scores, scores.amax(0))
    assert torch.equal(result.image, picture)


@pytest.mark.parametrize("kind", ["array", "pil", "path"])
def test_pictures_of_every_kind_give_the_same(picture, kind, tmp_path):
    from PIL import Image

    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    image.save(tmp_path / "picture.png")
    given = {"array": np.asarray(image), "pil": image, "path": tmp_path / "picture.png"}[kind]
    seg = segmenter()
    assert torch.equal(seg(given, NAMES).labels, seg(picture, NAMES).labels)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (333, 17), (64, 64)])
@pytest.mark.parametrize("windows", [{}, {"crop": 0}])
def test_any_size(size, windows):
    picture = torch.randint(256, (3, *size), dtype=torch.uint8)
    assert segmenter(**windows)(picture, NAMES).labels.shape == size


@pytest.mark.parametrize("windows", [{"crop": 24, "stride": 16}, {"crop": (16, 40)}])
def test_any_windows(windows):
    picture = torch.randint(256, (3, 45, 64), dtype=torch.uint8)
    assert segmenter(**windows)(picture, NAMES).labels.shape == (45, 64)


@pytest.mark.parametrize(("crop", "stride"), [(24, 17), (16, 16), ((20, 70), (9, 70)), ((50, 20), (50, 13)), (30, 5)])
def test_bands_change_nothing(picture, crop, stride, monkeypatch):
    seg = segmenter(short_side=0, crop=crop, stride=stride, batch_size=3)
    want = seg(picture, NAMES, scores=True)
    calls = []
    monkeypatch.setattr("fastzs.bands.MAPS_BYTES", 1)
    monkeypatch.setattr("fastzs.answer.label_map", lambda *a, **o: calls.append(a) or label_map(*a, **o))
    got = seg(picture, NAMES, scores=True)
    assert (len(calls) > 1) == (crop[0] < 50 if isinstance(crop, tuple) else True)
    assert torch.equal(got.labels, want.labels)
    assert torch.equal(got.scores, want.scores)


def test_a_crop_larger_than_the_picture_is_refused(picture):
    with pytest.raises(ValueError, match=r"crop, 24 x 80 pixels, is larger than the image, 50 x 70 as the model"):
        segmenter(short_side=0, crop=(24, 80))(picture, NAMES)


def test_each_window_sees_its_own_part(picture):
    seg = segmenter(short_side=0, crop=(24, 32), stride=(16, 20))
    windows = window_grid((50, 70), (24, 32), (16, 20))
    features = seg.encode(picture)
    assert torch.equal(features.places, windows)
    logits = seg.logits(features, NAMES)
    assert len(logits) == len(windows) == 9
    for i, (top, left, height, width) in enumerate(windows.tolist()):
        part = picture[:, top : top + height, left : left + width]
        alone = ask(seg.model, (part / 255 - 0.5)[None] / 0.5, NAMES)
        torch.testing.assert_close(logits[i], alone[0], rtol=1e-4, atol=1e-3)


def test_windows_do_not_depend_on_the_batch(picture):
    alone, together = (segmenter(crop=24, stride=16, batch_size=size)(picture, NAMES, scores=True) for size in (1, 8))
    torch.testing.assert_close(alone.scores, together.scores)
    assert (alone.labels != together.labels).float().mean() < 0.01


def test_more_than_255_names_get_int16(picture):
    names = [f"thing {i}" for i in range(300)]
    result = segmenter()(picture, names)
    assert result.labels.dtype == torch.int16
    assert result.names == tuple(names)


def test_background_modes(picture):
    seg = segmenter()
    none = seg(picture, NAMES, scores=True)
    assert none.background is None
    threshold = seg(picture, NAMES, background="threshold", threshold=float(none.scores.median()))
    assert threshold.names == (*NAMES, "background")
    assert torch.equal(threshold.labels == 3, none.scores < none.scores.median())
    kept = threshold.labels != 3
    assert torch.equal(threshold.labels[kept], none.labels[kept])
    prompt = seg(picture, NAMES, background="prompt", background_names=["wall", "grass"])
    assert prompt.names == (*NAMES, "background")
    explicit = seg(picture, [*NAMES, {"wall": ["grass"]}])
    assert torch.equal(prompt.labels, explicit.labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"background": "other"}, "'other'"),
        ({"background": "threshold", "names": ["cat"]}, "at least two"),
        ({"background": "threshold", "threshold": 2.0}, "expected 0 to 1, got 2.0"),
        ({"threshold": 0.5}, "background='threshold' asks for, but background is 'none'"),
        ({"background": "prompt", "background_names": ["Cat"], "names": ["cat"]}, "is a class already: Cat"),
        ({"names": []}, "no class names"),
        ({"background_names": ["sky"]}, "what background='prompt' looks for, but background is 'none'"),
        ({"background": "prompt", "background_names": []}, "expected names for 'background', got none"),
        ({"names": ["cat", "CAT"]}, "same name"),
    ],
)
def test_bad_calls_are_refused(picture, options, message):
    names = options.pop("names", NAMES)
    with pytest.raises(ValueError, match=message):
        segmenter()(picture, names, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "maskclap"}, "nearest known: maskclip"),
        ({"device": "tpu9"}, "tpu9"),
        ({"precision": "fp8"}, "fp8"),
        ({"weights": "opnai"}, "openai"),
        ({"batch_size": 0}, "batch_size"),
        ({"short_side": -1}, "short_side"),
        ({"crop": 16, "stride": 32}, "stride"),
    ],
)
def test_bad_settings_are_refused(picture, options, message):
    options = {"backbone": "ViT-B-32", "weights": "random"} | options
    with pytest.raises(ValueError, match=message):
        fastzs.load(**options)(picture, NAMES)


def test_bf16_agrees_with_fp32_up_to_its_rounding(picture):
    exact = segmenter()
    rounded = Segmenter(MaskCLIP(tiny_clip()).to(torch.bfloat16), short_side=32)
    a, b = exact(picture, NAMES, scores=True), rounded(picture, NAMES, scores=True)
    assert (a.labels == b.labels).float().mean() > 0.9  # measured: 0.98
    assert b.scores.dtype == torch.float32


def test_a_model_that_is_cast_later_is_what_it_says(picture):
    seg = segmenter()
    wanted = seg(picture, NAMES, scores=True)
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, 0.1)):
        seg.model.to(dtype)
        assert (seg.dtype, seg.precision) == (dtype, str(dtype).removeprefix("torch."))
        torch.testing.assert_close(seg(picture, NAMES, scores=True).scores, wanted.scores, atol=tolerance, rtol=0)


def test_auto_precision_is_what_the_machine_multiplies():
    device = choose_device("cpu")
    wanted = torch.bfloat16 if native_bf16(device) else torch.float32
    assert choose_precision("auto", device) == wanted
    assert choose_precision("fp16", device) == torch.float16


def test_large_pictures_pass_window_by_window():
    picture = torch.randint(256, (3, 700, 900), dtype=torch.uint8)
    result = segmenter(short_side=0, crop=64, stride=48)(picture, NAMES)
    assert result.labels.shape == (700, 900)


def test_an_image_is_encoded_once_and_labelled_with_many_names(picture, monkeypatch):
    for windows in ({}, {"crop": 24, "stride": 16}, {"short_side": 0, "crop": 24, "stride": 16}):
        seg = segmenter(**windows)
        wanted = [seg(picture, names, scores=True, background="prompt") for names in (NAMES, ["a", "b"])]
        features = seg.encode(picture)
        with monkeypatch.context() as patch:
            patch.setattr(seg.model, "encode", None)
            for names, want in zip((NAMES, ["a", "b"]), wanted, strict=True):
                got = seg.label(features, names, scores=True, background="prompt")
                assert got.names == want.names
                assert torch.equal(got.labels, want.labels)
                torch.testing.assert_close(got.scores, want.scores)  # a PyTorch product may round by its alignment
                assert torch.equal(got.image, picture)


def test_features_are_ordinary_tensors(picture):
    features = segmenter().encode(picture).windows
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in features.tensors().values())


def test_the_picture_is_resized_once(picture, monkeypatch):
    calls = []
    seg = segmenter()
    resize = seg._resize
    monkeypatch.setattr(seg, "_resize", lambda *a: calls.append(1) or resize(*a))
    seg(picture, NAMES)
    assert calls == [1]


def images(count=7):
    """Of three sizes, so that some share a forward pass and some do not."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(50, 70), (50, 70), (64, 40), (50, 70), (90, 33), (64, 40), (50, 70)]
    return [torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes[:count]]


@pytest.mark.parametrize("windows", [{}, {"crop": 24, "stride": 16}, {"short_side": 0, "crop": 24, "stride": 16}])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_many_images_are_what_each_is_alone(windows, batch_size):
    seg, given = segmenter(**windows), images()
    alone = [seg(image, NAMES, scores=True) for image in given]
    for together in (given, tuple(given), iter(given)):
        results = list(seg(together, NAMES, scores=True, batch_size=batch_size))
        assert len(results) == len(given)
        for one, other, image in zip(results, alone, given, strict=True):
            assert torch.equal(one.image, image)
            torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-5)
            assert (one.labels != other.labels).float().mean() < 0.01  # where scores tie within rounding


def test_images_share_forward_passes_and_are_read_when_it_is_their_turn(monkeypatch):
    seg, sizes, read = segmenter(batch_size=4), [], []
    encode = seg.model.encode
    monkeypatch.setattr(seg.model, "encode", lambda batch: sizes.append(len(batch)) or encode(batch))

    def given():
        for i, image in enumerate(images(2) * 5):
            read.append(i)
            yield image

    results = seg(given(), NAMES)
    assert read == sizes == []
    next(results)
    assert (sizes, read) == ([4], [0, 1, 2, 3])
    assert len(list(results)) == 9
    assert sizes == [4, 4, 2]


def test_a_cpu_gets_no_more_in_a_forward_pass_than_its_caches_hold(monkeypatch):
    monkeypatch.setattr("fastzs.segmenter.CPU_PIXELS", 2 * 24 * 24)
    given = images(3)
    seg, sizes = segmenter(crop=24, stride=16, batch_size=4), []
    wanted = [segmenter(crop=24, stride=16, batch_size=1)(image, NAMES).labels for image in given]
    encode = seg.model.encode
    monkeypatch.setattr(seg.model, "encode", lambda batch: sizes.append(len(batch)) or encode(batch))
    for ways in (lambda: [seg(image, NAMES) for image in given], lambda: seg(given, NAMES)):
        sizes.clear()
        for result, labels in zip(ways(), wanted, strict=True):
            assert (result.labels != labels).float().mean() < 0.01  # where scores tie within rounding
        assert max(sizes) == 2
    sizes.clear()
    seg.encode(given[0])
    assert max(sizes) == 2
    monkeypatch.setattr("fastzs.segmenter.CPU_PIXELS", 1)  # a window is larger
    sizes.clear()
    seg(given[0], NAMES)
    assert set(sizes) == {1}


def test_a_folder(tmp_path):
    from PIL import Image

    for i, image in enumerate(images(3)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    results = list(segmenter()(tmp_path, NAMES))
    assert [tuple(result.labels.shape) for result in results] == [(50, 70), (50, 70), (64, 40)]


def test_a_broken_image_among_many(tmp_path, caplog):
    (tmp_path / "broken.png").write_bytes(b"no image")
    for broken, name in ((tmp_path / "broken.png", r"broken\.png"), (np.zeros((2, 2, 2, 2)), "image 1: ")):
        given = [images(1)[0], broken, images(2)[1]]
        results = segmenter()(given, NAMES)
        assert next(results).labels.shape == (50, 70)  # what came before it is not lost
        with pytest.raises(fastzs.FastzsError, match=name):
            next(results)
        caplog.clear()
        assert len(list(segmenter()(given, NAMES, on_error="skip"))) == 2
        (record,) = caplog.records
        assert re.search(name, record.message)


def test_an_iterator_that_raises():
    def given():
        yield from images(2)
        raise RuntimeError("the camera is gone")

    for on_error in ("raise", "skip"):
        results = segmenter()(given(), NAMES, on_error=on_error)
        assert len([next(results), next(results)]) == 2
        with pytest.raises(RuntimeError, match="the camera is gone"):
            next(results)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([], {}, "got an empty sequence"),
        (None, {}, "got None"),
        ([1], {"on_error": "ignore"}, "on_error must be"),
        ([1], {"batch_size": 0}, "batch_size must be at least 1"),
        (5, {}, "int"),
    ],
)
def test_bad_images(given, options, message):
    with pytest.raises(ValueError, match=message):
        segmenter()(given, NAMES, **options)


def test_the_old_names_of_arguments(picture):
    seg = Segmenter(MaskCLIP(tiny_clip()), short_side=32, batch=3)
    assert seg.batch_size == 3
    assert torch.equal(seg(picture=picture, names=NAMES).labels, seg(images=picture, names=NAMES).labels)


class TestOrdinaryTensors:
    """Nothing that is given out belongs to inference mode or to the caller's buffer."""

    @pytest.fixture(scope="class")
    def shapes_segmenter(self):
        return fastzs.load("maskclip", weights="shapes", precision="fp32", device="cpu", short_side=32)

    NAMES = ("red disc", "blue ring", "green star")

    def test_results_may_be_changed_and_trained_on(self, shapes_segmenter):
        image = torch.randint(0, 256, (3, 40, 48), dtype=torch.uint8)
        result = shapes_segmenter(image, self.NAMES, scores=True)
        features = shapes_segmenter.encode(image)
        labelled = shapes_segmenter.label(features, self.NAMES, scores=True)
        logits = shapes_segmenter.logits(features, self.NAMES)
        answer = next(shapes_segmenter.answers([image], shapes_segmenter.question(self.NAMES, scores=True)))
        given = [result.labels, result.scores, result.image, labelled.labels, labelled.scores, logits]
        given += [answer.image, *answer.labels, *answer.scores, *features.windows.tensors().values()]
        for tensor in given:
            assert not tensor.is_inference()
            tensor += 1
        weight = torch.ones_like(logits, requires_grad=True)
        (weight * logits).sum().backward()
        assert torch.equal(weight.grad, logits)

    def test_text_vectors_can_be_trained_on_after_they_were_used(self, shapes_segmenter):
        vocabulary = Vocabulary(self.NAMES)
        shapes_segmenter(torch.zeros(3, 32, 32, dtype=torch.uint8), vocabulary)
        vectors = vocabulary.embed(shapes_segmenter.model.clip)
        weight = torch.ones_like(vectors, requires_grad=True)
        (weight * vectors).sum().backward()
        kept = vectors.clone()
        vectors += 1  # and what is kept does not change with them
        assert torch.equal(vocabulary.embed(shapes_segmenter.model.clip), kept)

    def test_the_callers_buffer_may_be_used_again(self, shapes_segmenter):
        buffer = torch.randint(0, 256, (3, 40, 48), dtype=torch.uint8)
        before = buffer.clone()
        result, features = shapes_segmenter(buffer, self.NAMES), shapes_segmenter.encode(buffer)
        buffer.zero_()
        assert torch.equal(result.image, before)
        assert torch.equal(features.image, before)

    def test_batches_are_many_images(self, shapes_segmenter):
        batch = torch.randint(0, 256, (3, 3, 40, 48), dtype=torch.uint8)
        results = list(shapes_segmenter(batch, self.NAMES))
        arrays = list(shapes_segmenter(batch.permute(0, 2, 3, 1).numpy(), self.NAMES))
        for image, one, other in zip(batch, results, arrays, strict=True):
            wanted = shapes_segmenter(image, self.NAMES).labels
            assert torch.equal(one.labels, wanted)
            assert torch.equal(other.labels, wanted)

    def test_probabilities_are_the_scores_of_every_class(self, shapes_segmenter, tmp_path):
        image = torch.randint(0, 256, (3, 40, 48), dtype=torch.uint8)
        result = shapes_segmenter(image, self.NAMES, scores=True, probabilities=True)
        assert result.probabilities.shape == (3, 40, 48)
        assert torch.equal(result.probabilities.argmax(0).to(torch.uint8)[~tied(result.probabilities)],
                           result.labels[~tied(result.probabilities)])  # fmt: skip
        assert (result.probabilities.amax(0).float() - result.scores).abs().max() <= 2**-11  # a rounding to fp16
        result.save_probabilities(tmp_path / "p.npz")
        with np.load(tmp_path / "p.npz") as read:
            assert np.array_equal(read["probabilities"], result.probabilities.numpy())
            assert tuple(read["names"]) == self.NAMES
        result.save_scores(tmp_path / "s.png")
        with Image.open(tmp_path / "s.png") as read:
            levels = np.asarray(read).astype(np.float64) / 65535
        assert np.abs(levels - result.scores.numpy().clip(0, 1)).max() <= 0.5 / 65535 + 1e-7


def tied(probabilities):
    """Where the two best are equal as fp16."""
    best = probabilities.float().topk(2, 0).values
    return best[0] == best[1]


def test_class_maps_of_crops_are_those_of_an_encoded_image(picture):
    seg = segmenter(crop=24, stride=16)
    view = seg.view(picture)
    assert torch.equal(
        seg.class_maps(list(view.crops(view.windows)), seg.question(NAMES)), seg.logits(seg.encode(picture), NAMES)
    )
