import pytest
import torch
import torch.nn.functional as F

from fastzs.kernels.pixel_text_logits import pixel_text_logits

from .tolerances import assert_close


def cosine(features, text, scale):
    """The definition, with normalised copies, in fp64."""
    return scale * torch.einsum("bdhw,cd->bchw", F.normalize(features.double(), dim=1), text.double())


def inputs(B=2, D=12, C=5, h=3, w=4, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(B, D, h, w, generator=g) * 10 + 1
    text = F.normalize(torch.randn(C, D, generator=g), dim=1)
    return features.to(dtype), text.to(dtype)


def lay_out(features, layout):
    """The same values; all that lies between them is NaN."""
    if layout == "tokens":  # patch tokens [B, h * w, D] behind a class token, seen as a map
        B, D, h, w = features.shape
        tokens = torch.full((B, 1 + h * w, D), torch.nan, dtype=features.dtype, device=features.device)
        tokens[:, 1:] = features.flatten(2).transpose(1, 2)
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (h, w))
    if layout == "framed":
        B, D, h, w = features.shape
        wide = torch.full((B + 2, D + 2, h + 2, w + 2), torch.nan, dtype=features.dtype, device=features.device)
        inside = wide[1:-1, 1:-1, 1:-1, 1:-1]
        inside.copy_(features)
        return inside
    return features


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "tokens", "strided"])
def test_agrees_with_normalised_copies(dtype, layout):
    features, text = inputs(D=64, dtype=dtype)
    if layout == "tokens":  # patch tokens [B, h * w, D] seen as a map
        features = features.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    if layout == "strided":
        features = torch.stack([features, torch.full_like(features, torch.nan)], -1)[..., 0]
    out = pixel_text_logits(features, text, 100.0)
    assert out.dtype == dtype
    assert out.shape == (2, 5, 3, 4)
    assert_close("pixel_text_logits", out, cosine(features, text, 100.0))


def test_text_is_used_as_given():
    features, text = inputs()
    torch.testing.assert_close(pixel_text_logits(features, 1.5 * text), 1.5 * pixel_text_logits(features, text))


def test_feature_length_does_not_matter():
    features, text = inputs()
    scaled = features * torch.tensor([1e-6, 1e6]).view(2, 1, 1, 1)
    torch.testing.assert_close(pixel_text_logits(scaled, text), pixel_text_logits(features, text))


def test_half_precision_text_with_float_features():
    features, text = inputs()
    out = pixel_text_logits(features, text.half())
    assert_close("pixel_text_logits", out, cosine(features, text.half(), 1.0))


def test_zero_feature_scores_zero_with_finite_gradient():
    features, text = inputs()
    features[0, :, 1, 1] = 0
    features.requires_grad_()
    out = pixel_text_logits(features, text, 100.0)
    assert (out[0, :, 1, 1] == 0).all()
    out.square().sum().backward()
    assert features.grad.isfinite().all()


def test_gradcheck():
    features, text = inputs(B=1, D=4, C=3, h=2, w=2, dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda f, t: pixel_text_logits(f, t, 3.0), (features.requires_grad_(), text.requires_grad_())
    )


def test_compiles_as_one_graph():
    features, text = inputs()
    compiled = torch.compile(pixel_text_logits, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, text, 2.0), pixel_text_logits(features, text, 2.0))


def test_autocast_multiplies_in_bfloat16():
    features, text = inputs(D=64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = pixel_text_logits(features, text)
    assert out.dtype == torch.bfloat16
    assert_close("pixel_text_logits", out, cosine(features, text, 1.0))


def test_empty_batch_and_no_classes():
    features, text = inputs()
    assert pixel_text_logits(features[:0], text).shape == (0, 5, 3, 4)
    assert pixel_text_logits(features, text[:0]).shape == (2, 0, 3, 4)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda f, t: (f[0], t), ValueError, r"features has shape \[12, 3, 4\]; expected \[B, D, h, w\]"),
        (lambda f, t: (f, t[0]), ValueError, r"text has shape \[12\]; expected \[C, D\]"),
        (lambda f, t: (f, t[:, :7]), ValueError, r"12 channels and text \[5, 7\] has 7"),
        (lambda f, t: (f[:, :0], t[:, :0]), ValueError, "same D > 0"),
        (lambda f, t: (f.long(), t), TypeError, "features is torch.int64"),
        (lambda f, t: (f, t.numpy()), TypeError, "text is ndarray"),
        (lambda f, t: (f, t.to("meta")), ValueError, "features are on cpu, text is on meta"),
        (lambda f, t: (f, t, float("nan")), ValueError, "scale is nan"),
        (lambda f, t: (f, t, "100"), TypeError, "scale is str"),
        (lambda f, t: (f, t, 1.0, "cuda"), RuntimeError, "the features are on cpu"),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words):
        pixel_text_logits(*change(*inputs()))
