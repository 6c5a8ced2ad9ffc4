"""``fastzs models``: the systems, what is trained of each, which checkpoints it reads."""

from dataclasses import dataclass

from jsonargparse import ArgumentParser, Namespace

HELP = "list the systems"


@dataclass(frozen=True)
class System:
    """What there is to say about a system beside its figures.

    Attributes:
        name: what :func:`fastzs.load` and ``--model`` call it.
        paper: who, where, when.
        trained: the parts that training changes.
        needs: what it must be given beside a picture and names.
        checkpoints: what it reads.
    """

    name: str
    paper: str
    trained: str
    needs: str
    checkpoints: str


OWN = "folders and hub ids of save_pretrained"
SYSTEMS = (
    System(
        "maskclip",
        "MaskCLIP (Zhou et al., ECCV 2022)",
        "nothing",
        "any CLIP",
        "CLIP weights: open_clip tags, hub ids, files; MaskCLIP's converted .pth",
    ),
    System(
        "zegclip",
        "ZegCLIP (Zhou et al., CVPR 2023)",
        "prompts in a frozen CLIP ViT, a decoder",
        "masks of the seen classes",
        f"published .pth (mmcv), {OWN}",
    ),
    System(
        "clip_rc",
        "CLIP-RC (Zhang et al., CVPR 2024)",
        "prompts in a frozen CLIP ViT, a decoder of two streams",
        "masks of the seen classes",
        f"published .pth (mmcv), {OWN}",
    ),
    System(
        "lseg",
        "LSeg (Li et al., ICLR 2022)",
        "a whole ViT and a DPT decoder; the text tower is frozen",
        "masks of the seen classes",
        f"published .ckpt (Lightning), {OWN}",
    ),
    System(
        "szn",
        "SZN (Doshi, Princeton 2018)",
        "an FCN-32s (VGG-16), then its seenmask head",
        "masks of the seen classes; word vectors, or CLIP's text tower",
        f"published .pth.tar, {OWN}",
    ),
    System(
        "maskclip_plus",
        "MaskCLIP+ (Zhou et al., ECCV 2022)",
        "a DeepLabV2 or V3+ (ResNet), or any network",
        "masks of the seen classes and where the unseen are, or no masks; MaskCLIP as its teacher",
        OWN,
    ),
    System(
        "zegformer",
        "ZegFormer (Ding et al., CVPR 2022)",
        "a MaskFormer (ResNet, pyramid, query decoder); CLIP is frozen",
        "masks of the seen classes; SciPy in training",
        OWN,
    ),
    System(
        "zsseg",
        "zsseg / SimSeg (Xu et al., ECCV 2022)",
        "a MaskFormer (ResNet, pyramid, query decoder); CLIP is frozen",
        "masks of the seen classes; SciPy in training",
        OWN,
    ),
)


def parser() -> ArgumentParser:
    return ArgumentParser(description="List the systems: paper, what is trained, what is needed, checkpoints read.")


def run(config: Namespace) -> int:
    """Print the systems; 0."""
    for system in SYSTEMS:
        print(f"{system.name}: {system.paper}")
        for what in ("trained", "needs", "checkpoints"):
            print(f"  {what + ':':12} {getattr(system, what)}")
    print("\nTheir figures stand in docs/systems.md; options in the docstrings of fastzs.models.")
    return 0
