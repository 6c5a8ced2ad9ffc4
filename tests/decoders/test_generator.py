import pytest
import torch
import torch.nn.functional as F

from fastzs.decoders.generator import SIGMAS, PixelMLP, grouped_mmd, kernel_sum, label_graph, mmd, runs


def plain_mmd(x, y, sigmas=SIGMAS):
    """The definition, in fp64 and pair by pair."""

    def mean(a, b):
        square = (a[:, None] - b[None]).square().sum(-1)
        return sum((-square / (2 * s)).exp() for s in sigmas).mean()

    x, y = x.double(), y.double()
    return (mean(x, x) + mean(y, y) - 2 * mean(x, y)).clamp(min=0).sqrt()


@pytest.mark.parametrize("sigmas", [SIGMAS, (2, 5, 10, 20, 40, 60), (3.0,)])
def test_mmd_is_its_definition(sigmas):
    torch.manual_seed(0)
    x, y = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64) + 1
    torch.testing.assert_close(mmd(x, y, sigmas), plain_mmd(x, y, sigmas))
    distance = torch.rand(40, dtype=torch.float64) * 300
    wanted = sum((-distance / (2 * s)).exp() for s in sigmas)
    torch.testing.assert_close(kernel_sum(distance, sigmas), wanted)


def test_groups_are_what_a_loop_over_them_gives():
    torch.manual_seed(0)
    sizes = torch.tensor([1, 2, 3, 1, 40, 17, 5, 8, 33])
    groups = torch.arange(len(sizes)).repeat_interleave(sizes)[torch.randperm(int(sizes.sum()))]
    x, y = (torch.randn(len(groups), 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found = grouped_mmd(x, y, groups)
    wanted = torch.stack([plain_mmd(x[groups == g], y[groups == g]) for g in range(len(sizes))])
    torch.testing.assert_close(found, wanted)
    weights = torch.rand(len(sizes), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((v * weights).sum(), (x, y)) for v in (found, wanted))
    torch.testing.assert_close(ours, theirs)


def test_equal_sets_have_a_finite_gradient():
    x = torch.randn(7, 4, requires_grad=True)
    for value in (mmd(x, x.detach()), grouped_mmd(x, x.detach(), torch.tensor([0, 0, 0, 1, 1, 2, 2])).sum()):
        (gradient,) = torch.autograd.grad(value, x)
        assert value < 1e-2
        assert gradient.isfinite().all()


def test_no_rows_and_shapes_that_differ():
    assert grouped_mmd(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).shape == (0,)
    with pytest.raises(ValueError, match="differ"):
        grouped_mmd(torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.long))


def test_runs():
    assert runs(torch.tensor([3, 3, 1, 3, 3, 3, 0])).tolist() == [0, 0, 1, 2, 2, 2, 3]
    assert runs(torch.tensor([], dtype=torch.long)).tolist() == []


def flood(labels):
    """Parts with 8 neighbours, numbered by their first pixels, one pixel after the other."""
    h, w = labels.shape
    part, count = -torch.ones(h, w, dtype=torch.long), 0
    for start in range(h * w):
        if part[start // w, start % w] >= 0:
            continue
        queue = [(start // w, start % w)]
        part[queue[0]] = count
        while queue:
            i, j = queue.pop()
            for y in range(max(0, i - 1), min(h, i + 2)):
                for x in range(max(0, j - 1), min(w, j + 2)):
                    if part[y, x] < 0 and labels[y, x] == labels[i, j]:
                        part[y, x] = count
                        queue.append((y, x))
        count += 1
    return part


def test_label_graph():
    torch.manual_seed(0)
    for size, classes in (((11, 9), 2), ((1, 7), 3), ((30, 30), 2), ((6, 6), 1)):
        labels = torch.randint(classes, size)
        node, adjacency, first = label_graph(labels)
        wanted = flood(labels)
        assert torch.equal(node, wanted)
        touching = torch.zeros_like(adjacency)
        padded = F.pad(wanted[None, None].double(), (1, 1, 1, 1), value=-1)[0, 0].long()
        for dy in range(3):
            for dx in range(3):
                other = padded[dy : dy + size[0], dx : dx + size[1]]
                inside = (other >= 0) & (other != wanted)
                touching[wanted[inside], other[inside]] = 1
        assert torch.equal(adjacency, touching)
        assert torch.equal(node.flatten()[first], torch.arange(len(first)))


def test_a_generator_wants_a_rate_for_each_hidden_layer():
    assert PixelMLP((5, 4, 3), (0.5,), sigmoid=True)(torch.randn(7, 5)).shape == (7, 3)
    with pytest.raises(ValueError, match="expected 1 rates"):
        PixelMLP((5, 4, 3), (0.5, 0.5))
