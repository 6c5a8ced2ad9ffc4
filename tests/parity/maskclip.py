"""``C_maskclip_vit`` and ``C_maskclip_resnet``: dense CLIP features, logits and their refinement."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import Bottleneck
from torch import Tensor, nn

from fastzs.clip import Clip
from fastzs.clip.state import to_openai_names
from fastzs.models.maskclip import LOGIT_SCALE, MaskCLIP
from tests.parity.golden import DTYPES, Check, Golden


def _clip(vision_cfg: dict, embed_dim: int) -> Clip:
    config = {"embed_dim": embed_dim, "vision_cfg": vision_cfg, "text_cfg": {}}
    return Clip("golden", "golden", config, False, (0.0,) * 3, (1.0,) * 3, "golden")


def _state(golden: Golden) -> dict[str, Tensor]:
    state = to_openai_names({k: v for k, v in golden.under("w.").items() if k != "head.text_embeddings"})
    return {k.removeprefix("visual."): v for k, v in state.items()}


def vit_model(golden: Golden, dtype: torch.dtype, **settings) -> MaskCLIP:
    """The model of a ``C_maskclip_vit`` file."""
    config, state = golden.config, _state(golden)
    side = round((state["positional_embedding"].shape[0] - 1) ** 0.5)
    shape = {
        "width": config["width"],
        "layers": config["layers"],
        "head_width": config["width"] // config["heads"],
        "patch_size": config["patch"],
        "image_size": side * config["patch"],
    }
    shape["mlp_ratio"] = state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / config["width"]
    clip = _clip(shape, config["text_channels"])

    built = MaskCLIP(clip, exact_gelu=True, norm_eps=config["ln_eps"], **settings)
    built.visual.load_state_dict(state)
    return built.to(dtype)


def vit(golden: Golden) -> Iterator[Check]:
    config, model = golden.config, partial(vit_model, golden)
    for dtype in DTYPES:
        text = golden["w.head.text_embeddings"].to(dtype)
        for i in range(len(config["sizes"])):
            image, at = golden[f"in.image{i}"].to(dtype), config[f"image{i}_thresholds"]
            plain = model(dtype)
            visual = plain.visual
            tokens, grid = visual.trunk(image)
            values = visual.ln_post(visual.last_values(tokens, grid, "identity", True, True))
            if f"out64.image{i}.x" in golden:
                last = visual.ln_post(visual.transformer.resblocks[-1](tokens))[:, 1:]
                yield golden.check(f"out64.image{i}.x", last.transpose(1, 2).unflatten(2, grid))
            yield golden.check(f"out64.image{i}.v", values.transpose(1, 2).unflatten(2, grid))
            yield golden.check(f"out64.image{i}.k", visual.keys(tokens))
            logits = plain(image, text) / LOGIT_SCALE
            yield golden.check(f"out64.image{i}.logits", logits)
            if dtype == torch.float32:
                yield golden.check(f"out.image{i}.logits", logits)
            denoised = model(dtype, denoising=at["pd"])(image, text) / LOGIT_SCALE
            yield golden.check(f"out64.image{i}.refined_pd", denoised)
            smoothed = model(dtype, smoothing="official", smoothing_threshold=at["ks"])(image, text)
            yield golden.check(f"out64.image{i}.refined_ks", smoothed)
            yield golden.check(f"out64.image{i}.refined_ks1", model(dtype, smoothing="official")(image, text))
            both = model(dtype, smoothing="official", smoothing_threshold=at["ks"], denoising=at["pd"])(image, text)
            yield golden.check(f"out64.image{i}.refined_kspd", both)
            if f"out64.image{i}.whole_labels" in golden:
                size = golden[f"out64.image{i}.whole_labels"].shape[-2:]
                scores = F.interpolate(both, image.shape[-2:], mode="bilinear")
                scores = F.interpolate(scores, size, mode="bilinear")
                yield golden.check(f"out64.image{i}.whole_scores_sub", scores)
                yield golden.check_labels(f"out64.image{i}.whole_labels", scores)


def resnet(golden: Golden) -> Iterator[Check]:
    config, state = golden.config, _state(golden)
    base, stem = config["base_channels"], config["stem_channels"]
    blocks = [1 + max(int(k.split(".")[1]) for k in state if k.startswith(f"layer{i}.")) for i in range(1, 5)]
    shape = {
        "layers": blocks,
        "width": base,
        "head_width": base * 32 // config["num_heads"],
        "image_size": config["img"][0],
    }
    clip = _clip(shape, config["text_channels"])
    # the official head has no positional table
    state["attnpool.positional_embedding"] = torch.zeros(1 + (config["img"][0] // 32) ** 2, base * 32)

    def model(dtype: torch.dtype, **settings) -> MaskCLIP:
        built = MaskCLIP(clip, **settings)
        tower = built.visual
        # the stem of these small networks is wider than CLIP's
        tower.conv1, tower.bn1 = nn.Conv2d(3, stem // 2, 3, 2, 1, bias=False), nn.BatchNorm2d(stem // 2)
        tower.conv2, tower.bn2 = nn.Conv2d(stem // 2, stem // 2, 3, 1, 1, bias=False), nn.BatchNorm2d(stem // 2)
        tower.conv3, tower.bn3 = nn.Conv2d(stem // 2, stem, 3, 1, 1, bias=False), nn.BatchNorm2d(stem)
        tower.layer1[0] = Bottleneck(stem, base, 1)
        tower.load_state_dict(state)
        return built.eval().to(dtype)

    for dtype in DTYPES:
        image, text = golden["in.image"].to(dtype), golden["w.head.text_embeddings"].to(dtype)
        logits = model(dtype, output_stride=32)(image, text) / LOGIT_SCALE
        yield golden.check("out64.logits", logits)
        pooled = model(dtype, output_stride=32, dense="qk")(image, text) / LOGIT_SCALE
        yield golden.check("out64.logits_attn_pooling", pooled)
        smoothing = {"smoothing": "official", "smoothing_threshold": config["ks"]}
        yield golden.check("out64.refined_ks", model(dtype, output_stride=32, **smoothing)(image, text))
        tokens, grid = model(dtype, output_stride=8).visual.trunk(image)
        yield golden.check("out64.dilated_layer4", tokens[:, 1:].transpose(1, 2).unflatten(2, grid))


RUNNERS = {"C_maskclip_vit": vit, "C_maskclip_resnet": resnet}
