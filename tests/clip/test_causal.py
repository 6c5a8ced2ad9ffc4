"""Text vectors by the tokens up to the longest text's end: the whole tower's own, and who is left to it."""

import pytest
import torch

from fastzs.clip import TextEncoder, causal
from tests.clip.test_frozen import Adapted

CONFIG = {"context_length": 24, "width": 32, "heads": 2, "layers": 3}
TEXTS = ["a", "a photo of a very large dog in the old part of the town", "two words"]


def encoder(quick_gelu=True, **options):
    torch.manual_seed(0)
    made = TextEncoder.of_config(CONFIG | options, 16, quick_gelu).eval().requires_grad_(False)
    for parameter in made.parameters():  # open_clip's start leaves biases at zero
        parameter.add_(0.1 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize(
    "options",
    [{}, {"quick_gelu": False, "proj_bias": True}, {"pool_type": "eos", "eos_id": 49407}, {"proj_type": "none"}],
    ids=["clip", "gelu and bias", "by its end", "no projection"],
)
def test_the_towers_own_vectors(options):
    made = encoder(**options).double()
    tokens = made.tokenizer(TEXTS)
    assert causal.takes(made.tower)
    torch.testing.assert_close(causal.vectors(made.tower, tokens), made.tower(tokens), rtol=1e-12, atol=1e-12)
    unit = made(tokens).float()
    torch.testing.assert_close(made.encode(TEXTS, batch=2), unit, rtol=1e-6, atol=1e-7)


def test_only_the_tokens_of_the_longest_text_enter():
    made, seen = encoder(), []
    made.tower.token_embedding.register_forward_hook(lambda _, tokens, y: seen.append(tokens[0].shape))
    made.encode(TEXTS, batch=2)
    longest = 2 + len(TEXTS[1].split())  # with what begins and ends a text
    assert seen == [(2, longest), (1, 4)]


def test_a_text_that_fills_the_context():
    made = encoder().double()
    tokens = made.tokenizer(["dog " * 40])
    torch.testing.assert_close(causal.vectors(made.tower, tokens), made.tower(tokens), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"no_causal_mask": True},
        {"pool_type": "last"},
        {"embed_cls": True, "output_tokens": False},
        {"ls_init_value": 0.1},
        {"qk_norm": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_towers_go_their_own_way(options):
    made = encoder(**options)
    assert not causal.takes(made.tower)
    torch.testing.assert_close(made.encode(TEXTS), made(made.tokenizer(TEXTS)))


def test_adapters_in_a_layers_place_are_heard():
    made = encoder()
    mlp = made.tower.transformer.resblocks[1].mlp
    mlp.c_fc = Adapted(mlp.c_fc)
    torch.testing.assert_close(made.encode(TEXTS), made(made.tokenizer(TEXTS)))
