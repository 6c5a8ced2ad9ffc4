"""Small random models, and checkpoints of them as the published code writes them."""

import torch
from torch import Tensor, nn

from fastzs.models import ClipRC, ZegCLIP

SIZES = {"width": 48, "layers": 3, "heads": 3, "patch_size": 8, "grid": 8, "output_dim": 32, "mlp_ratio": 4.0}
DECODER = {"decoder_heads": 4, "decoder_hidden": 64}


def model(kind: type[ClipRC] | type[ZegCLIP], seed: int = 0, **options) -> ClipRC | ZegCLIP:
    """A small model whose every parameter is random, so that none of them can be forgotten unseen; in evaluation."""
    options = {"sizes": SIZES, "prompts": 3, "crop": 64, **DECODER} | options
    if kind is ClipRC:
        options = {"bridge": (2, 2)} | options
    out = kind(**options)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in out.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_scale = parameter.ndim == 1 and name.endswith("weight")
        size = 0.2 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
        nn.init.constant_(parameter, 1.0 if is_scale else 0.0)
        with torch.no_grad():
            parameter += size * noise
    with torch.no_grad():  # so that the best class changes over an image
        out.backbone.conv1.weight *= 8
        if isinstance(out, ClipRC):
            out.decode_head.lateral_proj.weight[:, -out.backbone.output_dim :] *= 8
        else:
            out.decode_head.decoder_1.layers[-1].multihead_attn["q"].weight *= 8
    return out.eval()


def published_state(of: ClipRC | ZegCLIP, text_tower: bool = False) -> dict[str, Tensor]:
    """The tensors of a published checkpoint, with those that influence nothing."""
    state = {name: t.clone() for name, t in of.state_dict().items()}
    dim, hidden = of.backbone.output_dim, of.settings["decoder_hidden"]
    layers = {name.rsplit(".multihead_attn", 1)[0] for name in state if ".multihead_attn" in name}
    for layer in layers:
        shapes = {
            "self_attn.in_proj_weight": (3 * dim, dim),
            "self_attn.in_proj_bias": (3 * dim,),
            "self_attn.out_proj.weight": (dim, dim),
            "self_attn.out_proj.bias": (dim,),
            "norm1.weight": (dim,),
            "norm1.bias": (dim,),
            "linear1.weight": (hidden, dim),
            "linear1.bias": (hidden,),
            "linear2.weight": (dim, hidden),
            "linear2.bias": (dim,),
            **{f"{norm}.{part}": (dim,) for norm in ("norm2", "norm3") for part in ("weight", "bias")},
            **{f"multihead_attn.{part}.weight": (dim, dim) for part in ("v", "proj")},
            **{f"multihead_attn.{part}.bias": (dim,) for part in ("v", "proj")},
        }
        for name, shape in shapes.items():
            state.setdefault(f"{layer}.{name}", torch.randn(shape))
    state["decode_head.loss_decode.criterion.empty_weight"] = torch.ones(6)
    if text_tower:
        width, words = 64, 49408
        state |= {
            "text_encoder.token_embedding.weight": 0.02 * torch.randn(words, width),
            "text_encoder.positional_embedding": 0.02 * torch.randn(77, width),
            "text_encoder.ln_final.weight": torch.ones(width),
            "text_encoder.ln_final.bias": torch.zeros(width),
            "text_encoder.text_projection": width**-0.5 * torch.randn(width, dim),
        }
        for i in range(2):
            block = nn.TransformerEncoderLayer(width, 1, 4 * width)
            names = {
                "self_attn.in_proj_weight": "attn.in_proj_weight",
                "self_attn.in_proj_bias": "attn.in_proj_bias",
                "self_attn.out_proj.": "attn.out_proj.",
                "linear1.": "mlp.c_fc.",
                "linear2.": "mlp.c_proj.",
                "norm1.": "ln_1.",
                "norm2.": "ln_2.",
            }
            for name, tensor in block.state_dict().items():
                old = next(old for old in names if name.startswith(old))
                state[f"text_encoder.transformer.resblocks.{i}.{name.replace(old, names[old])}"] = tensor
    return state


def write(path, state: dict[str, Tensor]):
    torch.save({"meta": {"epoch": 1, "mmseg_version": "0.20"}, "state_dict": state, "optimizer": {}}, path)
    return path
