import pytest
import torch
import torch.nn.functional as F

from fastzs import pseudo

IGNORE = 255
UNSEEN = [1, 3]


@pytest.fixture
def labels():
    return torch.tensor([[[0, IGNORE, IGNORE], [IGNORE, 2, IGNORE]]])


@pytest.fixture
def scores():
    torch.manual_seed(0)
    return torch.randn(1, 5, 2, 3)


def unlabelled(labels):
    return labels == IGNORE


def test_best(labels, scores):
    found = pseudo.best(labels, scores, UNSEEN)
    wanted = torch.where(scores[:, 1] >= scores[:, 3], 1, 3)
    assert torch.equal(found[unlabelled(labels)], wanted[unlabelled(labels)])
    assert torch.equal(found[~unlabelled(labels)], labels[~unlabelled(labels)])


def test_rank_keeps_those_among_the_first(labels, scores):
    order = scores.argsort(dim=1, descending=True)
    for within in range(1, 6):
        found = pseudo.rank(labels, scores, UNSEEN, within)
        for i, j in (unlabelled(labels)[0]).nonzero().tolist():
            ranking = order[0, :, i, j].tolist()
            best = next(c for c in ranking if c in UNSEEN)
            assert found[0, i, j] == (best if ranking.index(best) < within else IGNORE)


def test_share_takes_the_most_confident_of_each_picture():
    torch.manual_seed(1)
    scores, labels = torch.randn(2, 4, 10, 10), torch.full((2, 10, 10), IGNORE)
    labels[:, :3] = 0
    found = pseudo.share(labels, scores, UNSEEN, 25)
    confidence, guess = scores.softmax(1).max(1)
    for b in range(2):
        candidates = (labels[b] == IGNORE) & torch.isin(guess[b], torch.tensor(UNSEEN))
        taken = found[b] != labels[b]
        assert taken.sum() == int(candidates.sum() * 0.25)
        assert torch.equal(found[b][taken], guess[b][taken])
        assert confidence[b][taken].min() >= confidence[b][candidates & ~taken].max()
    assert torch.equal(pseudo.share(labels, scores, UNSEEN, 0), labels)


def test_annealed_weights(labels, scores):
    found, weights = pseudo.annealed(labels, scores, UNSEEN, 10.0)
    assert torch.equal(found, pseudo.best(labels, scores, UNSEEN))
    new = unlabelled(labels)
    assert (weights[~new] == 1).all()
    p = scores.softmax(1).gather(1, found[:, None])[:, 0]
    torch.testing.assert_close(weights[new], (10 * (p[new] - p[new].max())).exp())
    assert weights[new].max() == 1


def test_views_must_all_agree(labels, scores):
    other = scores.clone()
    other[0, UNSEEN, 0, 1] = other[0, UNSEEN, 0, 1].flip(0)  # the second pixel's order is turned round
    found = pseudo.consistent(labels, [scores, other, scores], UNSEEN)
    assert found[0, 0, 1] == IGNORE
    found[0, 0, 1] = pseudo.best(labels, scores, UNSEEN)[0, 0, 1]
    assert torch.equal(found, pseudo.best(labels, scores, UNSEEN))
    background = torch.where(labels == IGNORE, 0, labels)
    assert pseudo.consistent(background, [scores, other], UNSEEN, ignore_index=0)[0, 0, 1] == 0


def test_views_lie_on_the_pictures_grid():
    torch.manual_seed(0)
    images, kernel = torch.randn(2, 3, 31, 24), torch.randn(4, 3, 3, 3)
    views = pseudo.views_of(lambda x: F.conv2d(x, kernel, stride=2, padding=1), images, (1.5, 0.7))
    assert len(views) == 6
    assert all(view.shape == views[0].shape for view in views)
    symmetric = kernel + kernel.flip(3)
    plain, mirrored, *_ = pseudo.views_of(lambda x: F.conv2d(x, symmetric, padding=1), images, ())
    torch.testing.assert_close(plain, mirrored)


def test_nothing_unseen(labels, scores):
    with pytest.raises(ValueError, match="every class is seen"):
        pseudo.best(labels, scores, [])
