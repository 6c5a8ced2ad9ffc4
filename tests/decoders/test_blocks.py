"""The decoders' exact shortcuts against the long way, in fp64."""

import pytest
import torch
import torch.nn.functional as F

from bench.baselines import prompt_tuned as published
from fastzs.clip.products import linear
from fastzs.decoders import (
    CrossAttention,
    DecoderLayer,
    HeadMeanScores,
    Layers,
    RelationDescriptor,
    scores,
)
from fastzs.kernels.dispatch import watch
from fastzs.kernels.dropout import api as dropout_api
from fastzs.kernels.dropout_attention import api as dropout_attention_api
from fastzs.kernels.extension import why_not_loaded

f64 = torch.float64
DIM, HEADS = 24, 4


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def test_layer_is_the_published_layer():
    ours, theirs = DecoderLayer(DIM, HEADS, 40).to(f64).eval(), published.DecoderLayer(DIM, HEADS, 40).to(f64).eval()
    ours.load_state_dict(theirs.state_dict())
    x, memory = torch.randn(2, 7, DIM, dtype=f64), torch.randn(2, 15, DIM, dtype=f64)
    assert relative(ours(x, memory), theirs(x, memory)[0]) < 1e-14  # measured 3.3e-16


def test_last_scores_are_one_dot_product():
    """ZegCLIP's mean over heads of the last layer's scores, from a whole layer and from two projections."""
    long = published.DecoderLayer(DIM, HEADS, 40).to(f64).eval()
    short = HeadMeanScores(DIM, HEADS).to(f64)
    short.load_state_dict({name: t for name, t in long.state_dict().items() if ".q." in name or ".k." in name})
    x, memory = torch.randn(2, 7, DIM, dtype=f64), torch.randn(2, 15, DIM, dtype=f64)
    assert relative(short(x, memory), long(x, memory)[1]) < 1e-14  # measured 2.9e-16


def test_descriptor_in_two_halves():
    descriptor = RelationDescriptor(DIM).to(f64)
    visual, text = torch.randn(2, 3, DIM, dtype=f64), torch.randn(5, DIM, dtype=f64)
    texts = text.expand(2, 3, -1, -1)
    long = F.linear(torch.cat([visual[:, :, None] * texts, texts], -1), descriptor.weight, descriptor.bias)
    assert relative(descriptor(visual, text), long.flatten(1, 2)) < 1e-14  # measured 4.2e-16


def test_text_half_is_computed_once_and_anew_when_it_must_be(monkeypatch):
    descriptor = RelationDescriptor(DIM).requires_grad_(False)
    visual, text = torch.randn(1, 2, DIM), torch.randn(5, DIM)
    first = descriptor(visual, text)
    computed = []
    monkeypatch.setattr("fastzs.decoders.blocks.linear", lambda x, *rest: computed.append(x) or linear(x, *rest))
    assert torch.equal(descriptor(visual, text), first)
    assert not any(x is text for x in computed)
    text += 1
    assert not torch.equal(descriptor(visual, text), first)
    other = torch.randn(5, DIM)
    descriptor(visual, other)
    assert any(x is other for x in computed)
    before = descriptor(visual, other)
    descriptor.weight.mul_(2)  # in place, as optimisers and load_state_dict write
    assert not torch.equal(descriptor(visual, other), before)


def test_text_half_gets_its_gradient_after_evaluation():
    descriptor = RelationDescriptor(DIM)
    visual, text = torch.randn(1, 2, DIM), torch.randn(5, DIM)
    with torch.inference_mode():
        descriptor(visual, text)
    descriptor(visual, text).sum().backward()
    assert descriptor.weight.grad is not None
    assert (descriptor.weight.grad[:, DIM:] != 0).all()


def test_layers_start_equal():
    first, second = Layers(DecoderLayer(DIM, HEADS, 40), 2).layers
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not any(a is b for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_dropout_only_in_training():
    layer = DecoderLayer(DIM, HEADS, 40)
    x, memory = torch.randn(2, 7, DIM), torch.randn(2, 15, DIM)
    assert not torch.equal(layer(x, memory), layer(x, memory))
    layer.eval()
    assert torch.equal(layer(x, memory), layer(x, memory))


@pytest.mark.parametrize("compiled", [True, False])
def test_without_the_library_dropout_is_pytorchs(compiled, monkeypatch):
    """In place of the references, whose integers take 8 bytes for each weight of a map."""
    if not compiled:
        for api in (dropout_api, dropout_attention_api):
            monkeypatch.setattr(api, "why_not_cpu", lambda x: "there is no library")
    with watch() as choices:
        DecoderLayer(DIM, HEADS, 40)(torch.randn(2, 7, DIM), torch.randn(2, 15, DIM))
    assert [choice.op for choice in choices] == ["dropout_attention", "dropout", "dropout", "dropout"]
    missing = why_not_loaded() is not None
    assert {choice.backend for choice in choices[1:]} == {"torch" if missing or not compiled else "cpu"}
    assert all(choice.backend != "reference" for choice in choices)


def test_scores_are_fp32_under_autocast():
    q, k = torch.randn(1, 3, DIM), torch.randn(1, 5, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        out = scores(q.bfloat16(), k.bfloat16())
    assert out.dtype == torch.float32
    assert relative(out, q.bfloat16().float() @ k.bfloat16().float().transpose(1, 2)) < 1e-6


def test_width_must_be_a_multiple_of_the_heads():
    with pytest.raises(ValueError, match="24 is not a multiple of its 5 heads"):
        CrossAttention(24, 5)
