"""LSeg: a vision transformer trained so that every pixel's feature points where CLIP's text tower puts its class.

Source: Li et al., "Language-driven Semantic Segmentation", ICLR 2022, and its code. With f_p the DPT decoder's
feature of pixel p and t_c the frozen text vector of class c::

    tokens_1..4 = outputs of four blocks of the ViT      [B, 1 + N, W]   (after a quarter, half, ... of the blocks)
    F = DPT(tokens_1..4)                                 [B, D, 8 h, 8 w]   h, w: the grid of patches of 16 x 16
    S(c, p) = block(cos(f_p, t_c) / 0.07)                [B, C, 8 h, 8 w]   spatial regularisation, optional
    logits = double(S)                                   [B, C, 16 h, 16 w]   bilinear, align_corners=True

Trained with cross-entropy over the labels at hand; any label set can be asked for afterwards.

The published code multiplies in half precision; here the cosines are fp32 at least. Its factor 1 / 0.07 is neither
trained nor stored, and is a constant here. Left out: the ResNet-101 variant; testing at several scales and mirrored;
the first residual unit of the coarsest fusion block and the tower's last norm and classifier, which published
checkpoints hold and nothing uses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.models import VisionTransformer as TimmViT
from torch import Tensor, nn

from fastzs import clip as clip_module
from fastzs.clip import Clip, TextEncoder, VisionTransformer, WeightsError
from fastzs.clip.of_timm import TimmBlock
from fastzs.clip.state import fit
from fastzs.clip.vision import mlp_ratio, vit_sizes
from fastzs.decoders.dpt import DPTDecoder, Readout, Reassemble, SpatialBlock, double, enlarged, quarters
from fastzs.losses import pixel_cross_entropy
from fastzs.models.base import Features, Labels
from fastzs.models.trained import OWN, TrainedModel, count_layers
from fastzs.ops import pixel_text_logits
from fastzs.registry import register
from fastzs.trace import span, traced

LOGIT_SCALE = 1 / 0.07
# CLIPs by the width of their joint space: whose text vectors published checkpoints were trained with
_KNOWN = {512: "ViT-B-32", 768: "RN50x16"}


class Encoder(nn.Module):
    """The image tower and what brings its tokens back to maps, under the published names."""

    def __init__(self, model: TimmViT | VisionTransformer, width: int, levels: Sequence[int], readout: Readout):
        super().__init__()
        self.model = model
        for i, channels in enumerate(levels):
            self.add_module(f"act_postprocess{i + 1}", Reassemble(i, width, channels, readout))

    @traced("model.tower")
    def tokens(self, images: Tensor, hooks: Sequence[int]) -> tuple[list[Tensor], tuple[int, int]]:
        """Outputs [B, 1 + h * w, W] of the blocks ``hooks`` and the grid (h, w); sides are multiples of the patch."""
        if isinstance(self.model, VisionTransformer):
            x, grid = self.model.embed(images)
            x, blocks = self.model.ln_pre(x), self.model.blocks
        else:
            tower: Any = self.model
            patches = tower.patch_embed.proj(images)  # [B, W, h, w]
            grid = (patches.shape[2], patches.shape[3])
            cls = tower.cls_token.expand(len(images), -1, -1)
            x = torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1) + self.positions(tower, grid)
            blocks = list(tower.blocks)
        kept = {}
        for i, block in enumerate(blocks[: max(hooks) + 1]):
            x = kept[i] = block(x)
        return [kept[i] for i in hooks], grid

    def positions(self, tower: Any, grid: tuple[int, int]) -> Tensor:
        """timm's positional table resized to ``grid``, [1, 1 + h * w, W]; bilinear, unlike timm's own way."""
        table = tower.pos_embed
        side = round((table.shape[1] - 1) ** 0.5)
        if grid == (side, side):
            return table
        patches = table[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        patches = patches.to(torch.promote_types(table.dtype, torch.float32))
        patches = F.interpolate(patches, grid, mode="bilinear", align_corners=False)
        return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)

    def levels(self, tokens: Sequence[Tensor], grid: tuple[int, int]) -> list[Tensor]:
        """Maps of 4, 2, 1 and 1/2 times the grid."""
        return [self.get_submodule(f"act_postprocess{i + 1}")(x, grid) for i, x in enumerate(tokens)]


class Decoder(DPTDecoder):
    """The DPT decoder with the spatial block, under the published names."""

    def __init__(self, levels: Sequence[int], width: int, output_dim: int, block: SpatialBlock | None):
        super().__init__(levels, width, output_dim)
        self.head_block = block


@dataclass(frozen=True)
class PixelFeatures(Features):
    """Features of pixels in the text space."""

    pixels: Tensor  # [B, D, h, w], not normalised

    @property
    def dense(self) -> Tensor:
        """[B, D, h, w], unit length, fp32 at least."""
        return F.normalize(self.pixels.to(torch.promote_types(self.pixels.dtype, torch.float32)), dim=1)


@register(
    "lseg",
    paper="LSeg (Li et al., ICLR 2022)",
    does="a ViT over each window, a DPT decoder to half its size, cosines with the text",
    trained="a whole ViT and a DPT decoder; the text tower is frozen",
    needs="masks of the seen classes",
    checkpoints=f"published .ckpt (Lightning), {OWN}",
)
class LSeg(TrainedModel):
    """LSeg for images of any size and any label set.

    Args:
        backbone, weights: the CLIP whose text tower is used, see :func:`fastzs.clip.load`; published: ViT-B-32.
        image: the image tower: a plain ViT by timm's name, or "clip" for the vision tower of ``backbone``.
        pretrained: start from the image tower's published weights (timm's ImageNet weights; with ``image="clip"``
            those of ``weights``). Omitted: unless ``weights="random"``.
        sizes: the image tower's sizes, to build it without weights, as :meth:`from_pretrained` does: arguments of
            timm's ``VisionTransformer``, or of :class:`fastzs.clip.VisionTransformer` with ``image="clip"``.
        text_dim: width D of the text vectors, if it should not be looked up in ``backbone``.
        hooks: the four blocks that are read; published: 5, 11, 17 and 23 of 24, and so the default's quarters.
        reassemble: channels of the four levels, fine to coarse.
        features: channels inside the decoder.
        readout: what becomes of CLS: "project", "add" or "ignore".
        block, block_depth, block_activation: spatial regularisation, see :class:`fastzs.decoders.dpt.SpatialBlock`.
        crop: window side in training and testing; published: 480 of images with a shorter side of 520.
        double_logits: double the logits as published (bilinear, align_corners=True), so that they have the size of
            the image. Without it they stay at half of it and :func:`fastzs.ops.label_map` enlarges them, which is
            quicker and, away from a window's centre, up to half a pixel off.
        normalization: what images are normalised with: "half" (mean and deviation 0.5, published) or "clip".
        seen, calibration: the training classes, and what is taken from their probabilities in testing; published: 0.

    Raises:
        ValueError: settings that do not fit each other.
        WeightsError: towers that cannot be found, or that are not plain ViTs.
    """

    activation = "softmax"
    default_templates = "raw"
    file_options = ("heads",)
    opaque = ("pytorch_lightning", "lightning", "argparse", "omegaconf", "numpy")

    def __init__(
        self,
        backbone: str = "ViT-B-32",
        weights: str = "openai",
        *,
        image: str = "vit_large_patch16_384",
        pretrained: bool | None = None,
        sizes: Mapping[str, Any] | None = None,
        text_dim: int | None = None,
        hooks: Sequence[int] | None = None,
        reassemble: Sequence[int] = (256, 512, 1024, 1024),
        features: int = 256,
        readout: Readout = "project",
        block: Literal["depthwise", "bottleneck"] | None = None,
        block_depth: int = 1,
        block_activation: str = "lrelu",
        crop: int = 480,
        double_logits: bool = True,
        normalization: Literal["half", "clip"] | None = None,
        seen: Sequence[str] | Sequence[int] | None = None,
        calibration: float = 0.0,
    ):
        clip = None
        if text_dim is None or (image == "clip" and sizes is None):
            clip = clip_module.load(backbone, weights)
            text_dim = clip.embed_dim
        if pretrained is None:
            pretrained = str(weights) != "random"
        normalization = normalization or ("clip" if image == "clip" else "half")
        super().__init__(
            backbone=backbone, weights=weights, clip=clip, text_dim=text_dim, seen=seen, calibration=calibration
        )
        if image == "clip":
            tower, sizes = clip_tower("LSeg", clip, sizes, pretrained)
            self.patch_size, width, depth = sizes["patch_size"], sizes["width"], sizes["layers"]
        else:
            tower, sizes = _timm_tower(image, sizes, pretrained)
            self.patch_size, width, depth = sizes["patch_size"], sizes["embed_dim"], sizes["depth"]
        self.hooks = tuple(hooks or quarters(depth))
        if len(self.hooks) != 4 or len(reassemble) != 4 or not all(0 <= i < depth for i in self.hooks):
            raise ValueError(
                f"LSeg: expected four hooks among the tower's {depth} blocks and four widths, got hooks={self.hooks}, "
                f"reassemble={tuple(reassemble)}"
            )
        self.pretrained = Encoder(tower, width, reassemble, readout)
        spatial = SpatialBlock(block, block_depth, block_activation) if block else None
        self.scratch = Decoder(reassemble, features, text_dim, spatial)
        self.double_logits = double_logits
        if normalization == "half":
            self.mean = self.std = (0.5, 0.5, 0.5)
        else:
            self.mean, self.std = tuple(self.clip.mean), tuple(self.clip.std)
        self.crop, self.short_side, self.stride = crop, crop * 13 // 12, crop * 2 // 3
        self.settings.update(
            image=image,
            pretrained=False,
            sizes=dict(sizes),
            text_dim=text_dim,
            hooks=list(self.hooks),
            reassemble=list(reassemble),
            features=features,
            readout=readout,
            block=block,
            block_depth=block_depth,
            block_activation=block_activation,
            crop=crop,
            double_logits=double_logits,
            normalization=normalization,
        )

    def encode(self, images: Tensor) -> PixelFeatures:
        """Pixel features, 8 to a patch's side, so half the image's size.

        Sides are first enlarged to multiples of two patches, which the coarsest level needs.
        """
        images = enlarged(images, self.patch_size).to(next(self.parameters()).dtype)
        tokens, grid = self.pretrained.tokens(images, self.hooks)
        with span("model.decoder"):
            return PixelFeatures(self.scratch(self.pretrained.levels(tokens, grid)))

    def score(self, features: PixelFeatures, text: Tensor) -> Tensor:
        pixels = features.pixels.to(torch.promote_types(features.pixels.dtype, torch.float32))
        return pixel_text_logits(pixels, F.normalize(text.to(pixels), dim=1), LOGIT_SCALE)

    def finish(self, features: PixelFeatures, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Spatial regularisation and doubling, as configured: of the image's size or half of it."""
        if self.scratch.head_block is not None:
            logits = self.scratch.head_block(logits)
        return double(logits) if self.double_logits else logits

    def loss_parts(self, images: Tensor, labels: Labels, text: Tensor) -> dict[str, Tensor]:
        """The mean cross-entropy of the labelled pixels, ``cross_entropy``; 0 if there are none."""
        logits = self.decode(self.encode(images), text)
        return {"cross_entropy": pixel_cross_entropy(logits, labels.target, labels.ignore_index, align_corners=True)}

    @classmethod
    def _check_kind(cls, path: Path, state: Mapping[str, Tensor]) -> None:
        if not any(name.removeprefix("net.") == "scratch.head1.weight" for name in state):
            some = ", ".join(list(state)[:3])
            raise WeightsError(
                f"{path}: not an LSeg checkpoint (no 'scratch.head1.weight' in it; it holds {some}, ...)"
            )

    @classmethod
    def _used(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        named = {name.removeprefix("net."): tensor for name, tensor in state.items()}
        tower = "pretrained.model."
        dead = (f"{tower}norm.", f"{tower}head.", f"{tower}fc_norm.", "scratch.refinenet4.resConfUnit1.")
        return {n: t for n, t in named.items() if n.startswith(("pretrained.", "scratch.")) and not n.startswith(dead)}

    @classmethod
    def _sizes(cls, state: Mapping[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
        if "pretrained.model.cls_token" not in state:
            raise WeightsError(
                "the image tower is not timm's ViT (no 'pretrained.model.cls_token'); LSeg with a ResNet is not read"
            )
        tower = "pretrained.model."
        width, depth = state[f"{tower}cls_token"].shape[-1], count_layers(state, f"{tower}blocks.")
        patch = state[f"{tower}patch_embed.proj.weight"].shape[-1]
        if width % 64 and "heads" not in options:
            raise WeightsError(
                f"a tower {width} wide cannot have heads of 64 channels; tell how many it has: heads=..."
            )
        sizes = {
            "img_size": patch * round((state[f"{tower}pos_embed"].shape[1] - 1) ** 0.5),
            "patch_size": patch,
            "embed_dim": width,
            "depth": depth,
            "num_heads": options.pop("heads", width // 64),
            "mlp_ratio": mlp_ratio(len(state[f"{tower}blocks.0.mlp.fc1.weight"]), width),
        }
        has_block = "scratch.head_block.depthwise.depthwise.weight" in state
        if has_block and "block" not in options:
            raise WeightsError(
                "the checkpoint has a spatial block, and its tensors do not tell which; give block='bottleneck' or "
                "'depthwise' and block_depth=1 or more, or block=None to leave it out"
            )
        if "pretrained.act_postprocess1.0.project.0.weight" in state:
            options = {"readout": "project"} | options
        elif "readout" not in options:
            raise WeightsError("the checkpoint's readout is 'add' or 'ignore', which its tensors do not tell; give it")
        output_dim, features = state["scratch.head1.weight"].shape[:2]
        return {
            "backbone": _KNOWN.get(output_dim, ""),
            "weights": "openai",
            "pretrained": False,
            "sizes": sizes,
            "text_dim": output_dim,
            "reassemble": [len(state[f"pretrained.act_postprocess{i}.3.weight"]) for i in range(1, 5)],
            "features": features,
        } | options

    def _left_out(self, state: Mapping[str, Tensor]) -> set[str]:
        if self.scratch.head_block is not None:
            return set()
        return {name for name in state if name.startswith("scratch.head_block.")}

    def _own_clip(self, path: Path, state: Mapping[str, Tensor]) -> Clip | None:
        prefix = "net.clip_pretrained."
        tensors = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        if "token_embedding.weight" not in tensors:
            return None
        width = len(tensors["ln_final.weight"])
        text = {
            "context_length": len(tensors["positional_embedding"]),
            "vocab_size": len(tensors["token_embedding.weight"]),
            "width": width,
            "heads": max(1, width // 64),
            "layers": count_layers(tensors, "transformer.resblocks."),
        }
        encoder = TextEncoder.of_config(text, self.text_dim, quick_gelu=True)
        wanted = encoder.tower.state_dict()
        fit(encoder.tower, {name: t for name, t in tensors.items() if name in wanted}, str(path))
        return Clip(
            backbone=self.backbone_name,
            source=str(path),
            config={"embed_dim": self.text_dim, "vision_cfg": {"layers": 0}, "text_cfg": text},
            quick_gelu=True,
            mean=self.mean,
            std=self.std,
            fingerprint=self.fingerprint,
            _text=[encoder.requires_grad_(False).eval()],
        )


def clip_tower(
    model: str, clip: Clip | None, sizes: Mapping[str, Any] | None, pretrained: bool
) -> tuple[VisionTransformer, Mapping[str, Any]]:
    """A CLIP ViT without what follows its last block, and its sizes; ``model`` is whose, for messages."""
    if sizes is None:
        assert clip is not None
        tower = clip.vision()
        if not isinstance(tower, VisionTransformer) or tower.variant.differences():
            raise WeightsError(
                f"{model}: {clip.backbone} is not CLIP's own vision transformer, which the decoder reads"
            )
        sizes = vit_sizes(tower)
        if not pretrained:
            tower = VisionTransformer(**sizes)
    else:
        tower = VisionTransformer(**sizes)
    tower.ln_post = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    del tower.proj
    return tower.requires_grad_(True), sizes


def _timm_tower(name: str, sizes: Mapping[str, Any] | None, pretrained: bool) -> tuple[TimmViT, Mapping[str, Any]]:
    """timm's ViT without what follows its last block, and its sizes."""
    if sizes is None:
        try:
            named: Any = timm.create_model(name, pretrained=pretrained, num_classes=0)
        except RuntimeError as error:
            raise WeightsError(f"LSeg: image={name!r}: {error}; expected a ViT by timm's name, or 'clip'") from error
        except Exception as error:
            raise WeightsError(
                f"LSeg: the weights of {name} could not be fetched ({type(error).__name__}); give pretrained=False to "
                "start at random, or image='clip'"
            ) from error
        if not isinstance(named, TimmViT):
            raise WeightsError(f"LSeg: image={name!r} is not one of timm's VisionTransformers")
        block: Any = named.blocks[0]
        sizes = {
            "img_size": named.patch_embed.img_size[0],
            "patch_size": named.patch_embed.patch_size[0],
            "embed_dim": named.embed_dim,
            "depth": len(named.blocks),
            "num_heads": block.attn.num_heads,
            "mlp_ratio": mlp_ratio(block.mlp.fc1.out_features, block.mlp.fc1.in_features),
        }
        with torch.device("meta"):
            tower = _plain(sizes)
        if tower.state_dict().keys() != named.state_dict().keys():
            extra = sorted(tower.state_dict().keys() ^ named.state_dict().keys())
            raise WeightsError(f"LSeg: image={name!r} is not a plain ViT: {', '.join(extra[:4])}")
        tower.load_state_dict(named.state_dict(), assign=True)
    else:
        tower = _plain(sizes)
    tower.norm = nn.Identity()
    return tower, sizes


def _plain(sizes: Mapping[str, Any]) -> TimmViT:
    return TimmViT(**sizes, num_classes=0, block_fn=TimmBlock)
