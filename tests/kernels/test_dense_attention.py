import pytest
import torch
import torch.nn.functional as F

from fastzs.kernels.dense_attention.procrustes import turned
from fastzs.kernels.dense_attention.reference import neighbour_bias
from fastzs.ops import dense_attention

GRID = (3, 5)


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, 4, 1 + 15, 8, dtype=torch.float64, generator=generator).unbind(0)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize(("kind", "parts"), [("qk", "qk"), ("qq", "qq"), ("kk", "kk"), ("vv", "vv"), ("qq+kk", "qqkk")])
def test_operators_are_sums_of_attentions(qkv, kind, parts, impl):
    by_name = dict(zip("qkv", qkv, strict=True))
    wanted = sum(
        F.scaled_dot_product_attention(by_name[a], by_name[b], qkv[2])
        for a, b in zip(parts[::2], parts[1::2], strict=True)
    )
    torch.testing.assert_close(dense_attention(*qkv, kind, GRID, impl=impl), wanted[:, :, 1:])


def test_identity_keeps_each_patchs_value(qkv):
    for impl in ("reference", "torch"):
        assert torch.equal(dense_attention(*qkv, "identity", GRID, impl=impl), qkv[2][:, :, 1:])


def test_neighbour_bias_by_its_formula():
    bias = neighbour_bias(GRID, 2.0, torch.float64, torch.device("cpu"))
    for i in range(15):
        for j in range(15):
            distance = (i // 5 - j // 5) ** 2 + (i % 5 - j % 5) ** 2
            assert bias[i, j].item() == pytest.approx(torch.tensor(-distance / 8).double().exp().item())


def test_gaussian_is_added_to_patch_keys_only(qkv):
    q, k, v = qkv
    bias = torch.zeros(15, 16, dtype=torch.float64)
    bias[:, 1:] = neighbour_bias(GRID, 5.0, torch.float64, q.device)
    wanted = F.scaled_dot_product_attention(k[:, :, 1:], k, v, attn_mask=bias)
    torch.testing.assert_close(dense_attention(q, k, v, "kk+gaussian", GRID, impl="reference"), wanted)
    with pytest.raises(RuntimeError, match=r"impl='torch' cannot run: .*Gaussian as a matrix"):
        dense_attention(q, k, v, "kk+gaussian", GRID, impl="torch")


def test_bad_inputs_are_named(qkv):
    q, k, v = qkv
    for arguments, message in (
        ((q, k, v, "nope", GRID), "nope"),
        ((q, k[:1], v, "qq", GRID), r"\[1, 4, 16, 8\]"),
        ((q, k, v, "qq", (4, 5)), "4 x 5"),
        ((q, k, v.float(), "qq", GRID), r"v is torch\.float32"),
        ((q, k.to("meta"), v, "qq", GRID), "k is .* on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            dense_attention(*arguments)
    with pytest.raises(ValueError, match="std"):
        dense_attention(q, k, v, "kk+gaussian", GRID, std=0)
    with pytest.raises(RuntimeError, match="no such backend"):
        dense_attention(q, k, v, "qq", GRID, impl="cuda")


@pytest.mark.parametrize("kind", ["qk", "qq+kk", "kk+gaussian", "procrustes", "identity", "proxy"])
def test_regions_by_a_mask(qkv, kind):
    """Every pair that is of one region, or whose row is of none, and the token before the patches."""
    q, k, v = qkv
    regions = torch.randint(-1, 3, (2, *GRID), generator=torch.Generator().manual_seed(1))
    affinity = torch.randn(2, 6, *GRID, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.5
    options = {"affinity": affinity} if kind == "proxy" else {}
    got = dense_attention(q, k, v, kind, GRID, regions=regions, **options)
    flat = regions.flatten(1).clamp_min(0)
    allowed = ((flat[:, :, None] == flat[:, None]) | (flat[:, :, None] == 0))[:, None]
    bias = torch.zeros(2, 1, 15, 16, dtype=torch.float64)
    bias[..., 1:].masked_fill_(~allowed, -torch.inf)
    if kind == "kk+gaussian":
        bias[..., 1:] += neighbour_bias(GRID, 5.0, torch.float64, q.device)
    if kind == "identity":
        wanted = v[:, :, 1:]
    elif kind == "proxy":
        unit = F.normalize(affinity.flatten(2), dim=1)
        alike = unit.mT @ unit
        scores = 3 * (alike - 1.2 * alike.mean((1, 2), keepdim=True))
        seen = allowed[:, 0] & ((scores >= 0) | torch.eye(15, dtype=torch.bool))
        wanted = scores.masked_fill(~seen, -torch.inf).softmax(-1)[:, None] @ v[:, :, 1:]
    else:
        pairs = {"qk": [(q, k)], "qq+kk": [(q, q), (k, k)], "procrustes": [turned(q, k, 1, 0.08)]}.get(kind, [(k, k)])
        wanted = sum((a[:, :, 1:] @ b.mT * 8**-0.5 + bias).softmax(-1) @ v for a, b in pairs)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"expected regions \[2, 3, 5\] of integers"):
        dense_attention(q, k, v, kind, GRID, regions=regions[:1], **options)
    with pytest.raises(RuntimeError, match=r"only the reference takes regions|'procrustes' has no kernel"):
        dense_attention(q, k, v, kind, GRID, regions=regions, impl="cpu", **options)
