import torch
import torch.nn.functional as F

from fastzs.decoders.contextual import Contextual, SelfAttention, SpatialAttention, SpatialGates, relative_positions
from fastzs.decoders.multi_scale import greatest, nearest_labels, reductions


def test_labels_are_taken_at_rounded_down_places():
    labels = torch.arange(57 * 321).view(1, 57, 321)
    found = nearest_labels(labels, (8, 41))
    assert found.shape == (1, 8, 41)
    assert all(found[0, i, j] == labels[0, i * 57 // 8, j * 321 // 41] for i in range(8) for j in range(41))


def test_sizes_of_reductions_and_their_maximum():
    images = torch.randn(2, 3, 61, 33)
    found = reductions(images, (0.5, 0.75))
    assert [x.shape[2:] for x in found] == [(61, 33), (30, 16), (45, 24)]
    large, small = torch.zeros(1, 1, 6, 6), torch.tensor([[[[-1.0, 2.0]]]])
    wanted = F.interpolate(small, (6, 6), mode="bilinear").clamp(min=0)
    assert torch.equal(greatest([large, small]), wanted)


def test_positions_do_not_depend_on_the_size():
    small, large = (relative_positions(torch.zeros(1, 8, *size, dtype=torch.float64))[0] for size in ((3, 5), (5, 9)))
    torch.testing.assert_close(small, large[:, ::2, ::2])
    assert torch.equal(small[:4, 0], small[:4, 2])  # columns first
    assert torch.equal(small[4:, :, 0], small[4:, :, 4])
    angle = torch.tensor([0.0, 511 / 4], dtype=torch.float64)
    torch.testing.assert_close(small[0, 0, :2], angle.sin())
    torch.testing.assert_close(small[3, 0, :2], (angle * 10000**-0.5).cos())


def test_self_attention_is_its_definition():
    torch.manual_seed(0)
    layer, y = SelfAttention(6).double(), torch.randn(2, 6, 3, 4, dtype=torch.float64)
    q, k, v = (conv(y).flatten(2) for conv in (layer.query, layer.key, layer.value))
    share = torch.einsum("bdn,bdm->bnm", q, k).softmax(-1)
    wanted = y + layer.out(torch.einsum("bnm,bdm->bdn", share, v).view_as(y))
    torch.testing.assert_close(layer(y), wanted)


def test_modules_keep_the_shape():
    h = torch.randn(2, 8, 5, 6)
    for module in (SpatialGates(8, 4), SpatialAttention(8, 4)):
        assert module(h).shape == h.shape
    mean, log_variance = Contextual(8, 4)(h)
    assert mean.shape == h.shape
    assert (log_variance >= 0).all()
