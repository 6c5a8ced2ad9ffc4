"""``T_sclip``, ``T_clearclip``, ``T_naclip``, ``T_resclip``: features, cosines, scores and labels."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import timm.models
import torch
from torch import Tensor

from fastzs.clip import Clip
from fastzs.clip.weights import OPENAI_MEAN, OPENAI_STD
from fastzs.kernels.dense_attention.procrustes import polar, procrustes
from fastzs.kernels.dense_attention.reference import neighbour_bias
from fastzs.models.base import IMAGENET_MEAN, IMAGENET_STD
from fastzs.models.pearl import PEARL
from fastzs.models.proxyclip import ProxyCLIP
from fastzs.models.resclip import ResCLIP
from fastzs.models.training_free import NACLIP, SCLIP, ClearCLIP, TrainingFree
from fastzs.operators import LastBlock
from fastzs.ops import refine
from fastzs.readout import read
from fastzs.windows import window_grid
from tests.parity.golden import DTYPES, FP64_STORED_AS_FP32, Check, Golden


def clip_of(golden: Golden) -> Clip:
    """As the file has it; images there are normalised already, with CLIP's own mean and deviation."""
    config = golden.config
    vision = {"width": config["width"], "layers": config["layers"], "head_width": config["width"] // config["heads"]}
    vision |= {"patch_size": config["patch"], "image_size": config["grid"] * config["patch"]}
    whole = {"embed_dim": config["dim"], "vision_cfg": vision, "text_cfg": {}}
    return Clip("golden", "golden", whole, True, OPENAI_MEAN, OPENAI_STD, "golden")


def build(kind: type[TrainingFree], golden: Golden, dtype: torch.dtype, **settings: Any) -> TrainingFree:
    model = kind(clip_of(golden), **settings)
    model.visual.load_state_dict(golden.under("w.visual."))
    return model.eval().requires_grad_(False).to(dtype)


class Published:
    """The published order of work with one model's parts, for whole images and for windows."""

    def __init__(self, model: TrainingFree, golden: Golden, dtype: torch.dtype, normalised: bool):
        self.model, self.golden, self.dtype, self.normalised = model, golden, dtype, normalised
        self.text = golden["in.text"].to(dtype)
        self.classes = golden["in.query_idx"]

    def maps(self, image: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines of the windows, and what the maps cover."""
        found = []
        for top, left, height, width in places.tolist():
            part = image[:, :, top : top + height, left : left + width]
            found.append(self.model.decode(self.model.encode(part), self.text))
        return torch.cat(found), self.model.covered(places)

    def checks(self, name: str, image: Tensor, places: Tensor, size: tuple[int, int], **more: Any) -> Iterator[Check]:
        """Scores, probabilities and labels at the original ``size``."""
        readout, golden = self.model.readout, self.golden
        assert readout is not None
        maps, cover = self.maps(image, places)
        seen = (image.shape[2], image.shape[3])
        if readout.direct and len(places) == 1:
            cover, seen = torch.tensor([[0, 0, *size]]), size
        guide = torch.nn.functional.interpolate(image, size, mode="bilinear")[0]
        text = self.text if readout.refine == "laplacian" else None
        options = {"windows": cover, "image_size": seen, "method": readout.refine, "cells": readout.cells}
        whole = refine(maps, guide, text=text, return_maps=True, **options).maps
        assert whole is not None
        yield from golden.checks(f"{name}.scores", whole[None])
        threshold = more.get("prob_thd") or None
        labels = read(readout, maps, cover, seen, guide, self.text, classes=self.classes, threshold=threshold).labels
        p = self.probabilities(whole)
        if threshold:  # what is below it has the first class's label
            p[0] = torch.where(p.amax(0) < threshold, 2.0, p[0])
        yield golden.check_labels(f"{name}.labels", p[None], labels[None])
        if self.dtype == torch.float64:
            for check in golden.checks(f"{name}.probs", self.probabilities(whole, self.normalised)):
                # the softmax enlarges what is allowed of the scores by the scale; only PEARL's lie that far apart,
                # whose system of equations is badly conditioned
                wide = readout.scale * FP64_STORED_AS_FP32
                yield replace(check, tolerance=wide) if readout.refine == "laplacian" else check

    def probabilities(self, whole: Tensor, normalised: bool = False) -> Tensor:
        """Of the classes, [K, H, W], from the refined cosines of all names."""
        assert self.model.readout is not None
        area = self.model.readout.area
        p = (self.model.readout.scale * whole).softmax(0)
        out = torch.stack([p[self.classes == c].amax(0) for c in range(int(self.classes.max()) + 1)])
        if area:
            labels = out.argmax(0)
            counts = torch.bincount(labels.flatten(), minlength=len(out))
            small = counts <= area * counts[1:].sum()
            small[0] = False
            out[small] = 0
        return out / out.sum(0) if normalised else out


SETTINGS = {  # of a variant in the file: ours
    "logit_scale": "scale",
    "area_thd": "area",
    "grid": "cells",
}


def runner(kind: type[TrainingFree], normalised: bool, refinement: str, **whole_settings: Any):
    """A runner for one system.

    Args:
        kind: its class.
        normalised: the published code divides the returned probabilities by their sum over the classes.
        refinement: of a variant that does not say that it has none.
        whole_settings: of whole images.
    """

    def run(golden: Golden) -> Iterator[Check]:
        config = golden.config
        for dtype in DTYPES:
            for name, image, places, size in cases(golden, dtype):
                more = whole_settings if name.startswith("image") else {}
                for variant, given in config["variants"].items():
                    settings = {SETTINGS[key]: value for key, value in given.items() if key in SETTINGS}
                    steps = given.get("pamr_steps")
                    method = refinement if steps is None else "pamr" if steps else "none"
                    if kind is SCLIP and name.startswith("image"):
                        method = "none"  # the published code refines windows only
                    model = build(kind, golden, dtype, refine=method, working_side=10**6, **settings, **more)
                    published = Published(model, golden, dtype, normalised)
                    if variant == "default" and name.startswith("image"):
                        features = model.encode(image).patches
                        yield golden.check(f"out64.{name}.features", features)
                        if dtype == torch.float32:
                            yield golden.check(f"out.{name}.features", features)
                        yield golden.check(f"out64.{name}.logits", model.decode(model.encode(image), published.text))
                    yield from published.checks(f"out64.{name}.{variant}", image, places, size, **given)
            yield from operators(golden, dtype, kind)

    return run


def cases(golden: Golden, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor, tuple[int, int]]]:
    """Name, image, windows and original size of every image of a file."""
    config = golden.config
    for i, size in enumerate(config["ori"]):
        image = golden[f"in.image{i}"].to(dtype)
        yield f"image{i}", image, torch.tensor([[0, 0, *image.shape[2:]]]), tuple(size)
    several = "in.slide0" in golden
    for i, size in enumerate(config["slide_ori"] if several else [config["slide_ori"]]):
        image = golden[f"in.slide{i}" if several else "in.slide_image"].to(dtype)
        places = window_grid((image.shape[2], image.shape[3]), config["crop"], config["stride"])
        yield f"slide{i}" if several else "slide", image, places, tuple(size)


OPERATORS = {  # of the features under other operators: (dense, residual and MLP)
    "ClearCLIP_residual_ffn": ("qq", True),
    "MaskCLIP_bare": ("identity", False),
    "MaskCLIP_residual_ffn": ("identity", True),
    "SCLIP_bare": ("qq+kk", False),
    "SCLIP_residual_ffn": ("qq+kk", True),
    "vanilla_bare": ("qk", False),
    "vanilla_residual_ffn": ("qk", True),
    "reduced_kk_5.0": ("kk", False),
    "reduced_naclip_5.0": ("kk+gaussian", False),
    "vanilla_csa_5.0": ("qq+kk", True),
    "vanilla_naclip_5.0": ("kk+gaussian", True),
    "vanilla_vanilla_5.0": ("qk", True),
}


def neighbours_only(block: LastBlock) -> Tensor:
    """NACLIP's control: the Gaussian alone, times the mean product of the lengths of queries and keys."""
    bias = neighbour_bias(block.grid, 5.0, block.q.dtype, block.q.device)
    lengths = (block.q.norm(dim=-1)[..., :, None] * block.k.norm(dim=-1)[..., None, :]).mean()
    scores = torch.nn.functional.pad(bias, (block.prefix, 0)) * lengths * block.scale
    return scores.softmax(-1) @ block.v


def operators(golden: Golden, dtype: torch.dtype, kind: type[TrainingFree]) -> Iterator[Check]:
    image = golden["in.image1"].to(dtype)
    for name, (dense, full) in OPERATORS.items():
        if (tensor := f"out64.image1.features_{name}") in golden:
            model = build(kind, golden, dtype, dense=dense, residual=full, ffn=full, multiple=0)
            yield golden.check(tensor, model.encode(image).patches)
    if kind is NACLIP:
        narrow = build(kind, golden, dtype, gaussian=1.5).encode(image).patches
        yield golden.check("out64.image1.features_reduced_naclip_1.5", narrow)
        only = build(kind, golden, dtype, dense=neighbours_only).encode(image).patches
        yield golden.check("out64.image1.features_reduced_nonly_5.0", only)


def resclip(golden: Golden) -> Iterator[Check]:
    config = golden.config
    for dtype in DTYPES:
        image = golden["in.image1"].to(dtype)
        for plug, given in config["plugs"].items():
            model = build(ResCLIP, golden, dtype, **resclip_settings(config["base"] | given))
            yield golden.check(f"out64.image1.features_plug_{plug}", features_of(model, image, golden, dtype))
        for name, image, places, size in cases(golden, dtype):
            for variant, given in config["variants"].items():
                settings = resclip_settings(config["base"] | given)
                model = build(ResCLIP, golden, dtype, working_side=10**6, **settings)
                if name.startswith("image"):
                    features = features_of(model, image, golden, dtype)
                    suffix = "" if variant == "default" else f"_{variant}"
                    yield golden.check(f"out64.{name}.features{suffix}", features)
                    if variant == "default":
                        if dtype == torch.float32:
                            yield golden.check(f"out.{name}.features", features)
                        cosines = model.decode(model.encode(image), golden["in.text"].to(dtype))
                        yield golden.check(f"out64.{name}.logits", cosines)
                yield from Published(model, golden, dtype, True).checks(
                    f"out64.{name}.{variant}", image, places, size, **given
                )


def resclip_settings(given: dict[str, Any]) -> dict[str, Any]:
    strength, feedback = given["attn_sfr_weights"]
    settings = {
        "base": {"resclip": "naclip"}.get(given["attn_strategy"], given["attn_strategy"]),
        "residual": given["arch"] == "w_resi",
        "ffn": given["arch"] == "w_resi",
        "mix": given["attn_rcs_weights"][1],
        "strength": strength,
        "feedback": feedback,
        "certain": given["temp_thd"],
        "paths": given["delete_same_entity"],
        "gaussian": given.get("gaussian_std", 5.0),
        "refine": "pamr" if given.get("pamr_steps") else "none",
    }
    return settings | {SETTINGS[key]: value for key, value in given.items() if key in SETTINGS}


def features_of(model: TrainingFree, image: Tensor, golden: Golden, dtype: torch.dtype) -> Tensor:
    """The dense features behind the cosines, which the model itself does not give out: it has them on the way."""
    seen: list[Tensor] = []
    read_out = model.visual.read

    def watch(*arguments: Any) -> Tensor:
        seen.append(read_out(*arguments))
        return seen[-1]

    model.visual.read = watch  # type: ignore[method-assign]
    try:
        model.decode(model.encode(image), golden["in.text"].to(dtype))
    finally:
        del model.visual.read
    return seen[-1]


def proxyclip(golden: Golden) -> Iterator[Check]:
    names = {"beta": "beta", "gamma": "gamma"} | SETTINGS
    for dtype in DTYPES:
        for name, image, places, size in cases(golden, dtype):
            for variant, given in golden.config["variants"].items():
                settings = {names[key]: value for key, value in given.items() if key in names}
                model = build(ProxyCLIP, golden, dtype, affinity=stand_in(golden), multiple=56, **settings)
                if name.startswith("image"):
                    features = model.encode(image).patches
                    suffix = "" if variant == "default" else f"_{variant}"
                    yield golden.check(f"out64.{name}.features{suffix}", features)
                    if variant == "default":
                        if dtype == torch.float32:
                            yield golden.check(f"out.{name}.features", features)
                        cosines = model.decode(model.encode(image), golden["in.text"].to(dtype))
                        yield golden.check(f"out64.{name}.logits", cosines)
                published = Published(model, golden, dtype, False)
                yield from published.checks(f"out64.{name}.{variant}", image, places, size, **given)


def stand_in(golden: Golden) -> torch.nn.Module:
    """The timm network of a ProxyCLIP file, its normalisation ImageNet's against CLIP's, which the images have."""
    state = golden.under("w.vfm.")
    width, patch = state["patch_embed.proj.weight"].shape[0], state["patch_embed.proj.weight"].shape[-1]
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    own = len(state["pos_embed"][0])
    prefix_rows = own - round(own**0.5) ** 2
    network = timm.models.VisionTransformer(
        img_size=round((own - prefix_rows) ** 0.5) * patch,
        patch_size=patch,
        embed_dim=width,
        depth=1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        num_heads=golden.config["vfm"]["heads"],
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        num_classes=0,
        dynamic_img_size=True,
        reg_tokens=registers,
        no_embed_class=prefix_rows == 0,
    )
    network.load_state_dict(state)
    network.pretrained_cfg = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    return network.eval().requires_grad_(False)


def pearl(golden: Golden) -> Iterator[Check]:
    names = {"alpha_kk": "key_weight"} | SETTINGS
    for dtype in DTYPES:
        yield from polar_checks(golden, dtype)
        for name, image, places, size in cases(golden, dtype):
            for variant, given in golden.config["variants"].items():
                settings = {names[key]: value for key, value in given.items() if key in names}
                method = "none" if given.get("use_prop") == "off" else "laplacian"
                model = build(PEARL, golden, dtype, refine=method, working_side=10**6, **settings)
                if name.startswith("image") and variant == "default":
                    features = model.encode(image).patches
                    yield golden.check(f"out64.{name}.features", features)
                    if dtype == torch.float32:
                        yield golden.check(f"out.{name}.features", features)
                    cosines = model.decode(model.encode(image), golden["in.text"].to(dtype))
                    yield golden.check(f"out64.{name}.logits", cosines)
                if dtype == torch.float64 or method == "none":  # 25 steps on an ill-conditioned system: fp64 only
                    published = Published(model, golden, dtype, True)
                    yield from published.checks(f"out64.{name}.{variant}", image, places, size, **given)


def polar_checks(golden: Golden, dtype: torch.dtype) -> Iterator[Check]:
    q, k, v = (golden[f"in.op.{name}"].to(dtype)[None] for name in "qkv")

    def by_svd(m: Tensor) -> Tensor:
        u, _, vh = torch.linalg.svd(m)
        return u @ vh

    yield golden.check("out64.op.polar5", procrustes(q, k, v, 1, 0.08)[0])
    yield golden.check("out64.op.svd", procrustes(q, k, v, 1, 0.08, by_svd)[0])
    # fifteen steps reach further into small singular values: fp32 keeps four digits of them
    many = procrustes(q, k, v, 1, 0.0, partial(polar, steps=15))[0]
    yield golden.check("out64.op.polar15_nokk", many, gradient=True)


RUNNERS = {
    "T_proxyclip": proxyclip,
    "T_pearl": pearl,
    "T_resclip": resclip,
    "T_sclip": runner(SCLIP, False, "none"),
    "T_clearclip": runner(ClearCLIP, False, "none", multiple=0),
    "T_naclip": runner(NACLIP, True, "pamr"),
}
