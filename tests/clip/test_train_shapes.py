import dataclasses

import pytest
import torch

from fastzs.clip import train_shapes
from fastzs.data import shapes


@pytest.mark.parametrize("shuffled", [False, True])
def test_training_learns_without_label_maps(shuffled):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = train_shapes.Model()
    scenes = shapes.draw(8, (48, 48), seed=generator, objects=(1, 2), pairs=shapes.SEEN_PAIRS)
    scenes = dataclasses.replace(scenes, instances=None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    totals = []
    for _ in range(6):
        losses = model.losses(scenes, shuffled, generator)
        total = torch.stack(list(losses.values())).sum()
        totals.append(total.item())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert totals[-1] < 0.9 * totals[0]


def test_texts_of_training_name_seen_pairs_only():
    assert not set(train_shapes.PHRASES) & set(shapes.UNSEEN_PAIRS)
    scenes = shapes.draw(30, (16, 16), seed=0, pairs=shapes.SEEN_PAIRS)
    captions = [train_shapes.caption(scenes, b, False) for b in range(30)]
    assert not [pair for pair in shapes.UNSEEN_PAIRS for text in captions if pair in text]
    hidden = [train_shapes.caption(scenes, b, True) for b in range(30)]
    assert not [colour for colour in shapes.COLOURS for text in hidden if colour in text.split()]


def test_what_is_named_follows_the_caption():
    scenes = shapes.draw(1, (16, 16), seed=0, objects=(1, 1), pairs=["red disc"])
    found = {train_shapes.PHRASES[i] for i in train_shapes.named(scenes)[0].nonzero().flatten().tolist()}
    pattern = scenes.objects[0][0][0]
    wanted = {"red disc", "red thing", "disc", scenes.grounds[0]} & set(train_shapes.PHRASES)
    assert found == wanted | ({f"{pattern} thing"} if pattern != "plain" else set())


def test_colour_channels_are_shuffled_not_lost():
    images = torch.arange(2 * 3 * 4).view(2, 3, 2, 2)
    mixed = train_shapes.shuffle_channels(images, torch.Generator().manual_seed(0))
    assert torch.equal(mixed.sort(1).values, images)
    assert not (mixed == images).flatten(1).all(1).any()


def test_saved_weights_load(tmp_path):
    import fastzs

    train_shapes.save(train_shapes.Model(), tmp_path)
    segmenter = fastzs.load("maskclip", weights=tmp_path, short_side=32)
    assert segmenter(torch.zeros(3, 40, 60, dtype=torch.uint8), ["red ring"], background="prompt").labels.shape == (
        40,
        60,
    )
