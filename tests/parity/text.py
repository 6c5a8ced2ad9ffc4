"""``AB_text_encoder``: CLIP's text transformer."""

from collections.abc import Iterator

import torch
from open_clip.transformer import QuickGELU, TextTransformer

from tests.parity.golden import DTYPES, Check, Golden

OPTIONS = ("context_length", "vocab_size", "width", "heads", "layers")


def text_encoder(golden: Golden) -> Iterator[Check]:
    config = golden.config
    tower = TextTransformer(
        **{name: config[name] for name in OPTIONS}, output_dim=config["embed_dim"], act_layer=QuickGELU
    )
    tower.load_state_dict(golden.under("w."))
    for dtype in DTYPES:
        text = tower.to(dtype)(golden["in.tokens"])
        if dtype == torch.float32:
            yield golden.check("out.text", text)
        yield golden.check("out64.text", text)


RUNNERS = {"AB_text_encoder": text_encoder}
