"""A CLIP small enough to run in milliseconds, with random weights and CLIP's own tokenizer."""

from fastzs.clip import Clip

VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


def tiny_clip(vision: dict = VISION, fingerprint: str = "tiny", **fields) -> Clip:
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT}
    return Clip("tiny", "random", config, True, (0.5,) * 3, (0.5,) * 3, fingerprint, **fields)
