"""Prompt templates by name; ``{}`` stands for the class name."""

from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

_SIZES = ("", "small ", "medium ", "large ")
_SCENE = (
    "there is a {} in the scene.",
    "there is the {} in the scene.",
    "this is a {} in the scene.",
    "this is the {} in the scene.",
    "this is one {} in the scene.",
)
_OPENAI80 = tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)

TEMPLATES: dict[str, tuple[str, ...]] = {
    # LSeg
    "raw": ("{}",),
    # ZegCLIP and CLIP-RC on PASCAL VOC
    "single": ("a photo of a {}",),
    # ZegCLIP and CLIP-RC on COCO-Stuff
    "coco15": (
        *(f"a photo of a {size}{{}}." for size in _SIZES),
        *(f"This is a photo of a {size}{{}}." for size in _SIZES),
        "a {} in the scene.",
        "a photo of a {} in the scene.",
        *(template[0].upper() + template[1:] for template in _SCENE),
    ),
    # CLIP's ImageNet ensemble
    "openai80": _OPENAI80,
    # MaskCLIP: CLIP's ensemble and five about scenes
    "maskclip85": (*_OPENAI80, *_SCENE),
    # the package's own shapes weights
    "shapes": ("{}", "a {}"),
}
