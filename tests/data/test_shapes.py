import pytest
import torch

from fastzs.data import shapes


def test_a_seed_gives_the_same_scenes():
    first, second = shapes.draw(3, (48, 64), seed=7), shapes.draw(3, (48, 64), seed=7)
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.instances, second.instances)
    assert first.objects == second.objects
    assert not torch.equal(first.images, shapes.draw(3, (48, 64), seed=8).images)


@pytest.mark.parametrize("size", [(1, 1), (37, 90), (256, 64)])
def test_any_size(size):
    scenes = shapes.draw(2, size, seed=0)
    assert scenes.images.shape == (2, 3, *size)
    assert scenes.images.dtype == scenes.instances.dtype == torch.uint8
    assert scenes.instances.shape == (2, *size)


def test_unseen_pairs_leave_every_colour_and_shape_seen():
    assert len(shapes.PAIRS) == 64
    assert len(shapes.UNSEEN_PAIRS) == 16
    assert not set(shapes.SEEN_PAIRS) & set(shapes.UNSEEN_PAIRS)
    for words in (shapes.COLOURS, shapes.SHAPES):
        for word in words:
            assert any(word in pair.split() for pair in shapes.SEEN_PAIRS)
            assert sum(word in pair.split() for pair in shapes.UNSEEN_PAIRS) == 2


def test_training_scenes_hold_seen_pairs_only():
    scenes = shapes.draw(40, (32, 32), seed=1, pairs=shapes.SEEN_PAIRS)
    drawn = {f"{colour} {shape}" for objects in scenes.objects for _, colour, shape in objects}
    assert drawn <= set(shapes.SEEN_PAIRS)


def test_labels_are_exact():
    scenes = shapes.draw(6, (96, 96), seed=3, objects=(2, 3), radius=(12, 16))
    names = [*shapes.PAIRS, *shapes.GROUNDS]
    labels = scenes.labels(names)
    for b, objects in enumerate(scenes.objects):
        assert (labels[b][scenes.instances[b] == 0] == names.index(scenes.grounds[b])).all()
        for i, (_, colour, shape) in enumerate(objects, start=1):
            assert (labels[b][scenes.instances[b] == i] == names.index(f"{colour} {shape}")).all()
    assert (scenes.labels(["nothing"]) == 255).all()


def test_a_full_name_beats_nothing_and_the_first_fit_wins():
    scenes = shapes.draw(20, (64, 64), seed=4, objects=(1, 1), radius=(20, 20))
    b = next(b for b, objects in enumerate(scenes.objects) if objects[0][0] == "striped")
    _, colour, shape = scenes.objects[b][0]
    full, pair = f"striped {colour} {shape}", f"{colour} {shape}"
    assert scenes.names(b) == [full]
    inside = scenes.instances[b] == 1
    assert (scenes.labels([full, pair])[b][inside] == 0).all()
    assert (scenes.labels([pair, full])[b][inside] == 0).all()
    assert (scenes.labels([full])[b][~inside] == 255).all()


def test_plain_objects_have_their_colour():
    scenes = shapes.draw(60, (64, 64), seed=5, objects=(1, 1), radius=(20, 20))
    anchors = torch.tensor(list(shapes.COLOURS.values()))
    for b, ((pattern, colour, shape),) in enumerate(scenes.objects):
        if pattern == "plain" and shape == "disc":
            inside = scenes.images[b][:, scenes.instances[b] == 1].float().div(255).median(1).values
            nearest = (inside - anchors).norm(dim=1).argmin()
            assert list(shapes.COLOURS)[nearest] == colour


def test_caption_names_objects_and_ground():
    scenes = shapes.draw(1, seed=2, objects=(2, 2))
    first, second = scenes.names(0)
    assert scenes.caption(0) == f"a {first} and a {second} on {scenes.grounds[0]}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (0, 4)}, "0 x 4"),
        ({"objects": (3, 1)}, "ordered"),
        ({"radius": (0, 4)}, "ordered"),
        ({"pairs": ["red dog"]}, "red dog"),
    ],
)
def test_bad_requests_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        shapes.draw(1, **options)
