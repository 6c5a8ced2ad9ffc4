"""ZegFormer and zsseg in the published order of work, eagerly: the bar for :mod:`bench.test_systems`.

The weights are those of our models, and so is the MaskFormer, which both run alike. What differs is what follows: the
masks of all proposals are enlarged to the picture, masked copies of the picture are made of them at full resolution (or
one after the other, in a loop), every one of CLIP's tokens goes through its last block, and the scores of all classes
are held at full resolution, resized to the picture and searched.
"""

import torch
import torch.nn.functional as F
from torchvision.ops import roi_align

from fastzs.models import ZegFormer, ZSSeg


def segment(model: ZegFormer | ZSSeg, images, text, seen, size):
    """Labels int64 [H', W'] of a normalised picture [1, 3, H, W], for text vectors [C, D] and seen classes bool [C]."""
    return scores(model, images, text, seen, size).argmax(0)


def scores(model: ZegFormer | ZSSeg, images, text, seen, size):
    """What the labels are the argmax of, [C, H', W']."""
    found = model.maskformer(images)
    masks = F.interpolate(found.masks[-1], images.shape[2:], mode="bilinear", align_corners=False)[0].sigmoid()
    own = model.compare(found.embeddings[-1], text)[0].float().softmax(-1)[:, :-1]  # [Q, C]
    side = model.settings["sizes"]["grid"] * model.settings["sizes"]["patch_size"]
    picture = model.for_clip(images)[0].to(images.dtype)
    cut_outs, full = (all_at_once if isinstance(model, ZegFormer) else one_by_one)(picture, masks > 0.5, side)
    of_clip = torch.ones_like(own)
    if len(cut_outs):
        vectors = F.normalize(whole_tower(model.tower, cut_outs), dim=-1)
        of_clip[full] = (model.clip_scale * vectors @ text.T).float().softmax(-1)
    joined = model.join(own, of_clip, seen, full[:, None])
    scores = torch.einsum("qc,qhw->chw", joined, masks.float())
    scores = F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0]
    scores[seen] -= model.calibration
    return scores


def all_at_once(picture, masks, side):
    """ZegFormer's cut-outs: masked copies of the whole picture for all proposals, then RoIAlign."""
    copies = picture * masks[:, None]  # [Q, 3, H, W]
    F.interpolate(copies, (side, side), mode="bilinear", align_corners=False)  # made as published, and used by nothing
    height, width = picture.shape[1:]
    boxes = torch.tensor([0, 0, width, height], device=picture.device).repeat(len(masks), 1)
    for axis, (low, high) in ((1, (0, 2)), (2, (1, 3))):  # columns, rows
        along = masks.any(axis)
        some = along.any(1)
        first = along.int().argmax(1)
        last = along.cumsum(1).argmax(1)
        boxes[some, low], boxes[some, high] = first[some], last[some] + 1
    number = torch.arange(len(masks), device=picture.device)[:, None]
    rois = torch.cat([number, boxes], dim=1).to(copies)
    return roi_align(copies, rois, side, aligned=True), torch.ones(len(masks), dtype=torch.bool, device=picture.device)


def one_by_one(picture, masks, side):
    """zsseg's cut-outs: a loop over the masks that have a pixel."""
    out, full = [], []
    for mask in masks:
        full.append(bool(mask.any()))
        if full[-1]:
            rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
            filled = picture * mask  # CLIP's mean colour, zero, elsewhere
            part = filled[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            out.append(F.interpolate(part[None], (side, side), mode="bicubic", align_corners=False))
    return torch.cat(out) if out else picture.new_zeros(0, 3, side, side), torch.tensor(full, device=picture.device)


def whole_tower(tower, images):
    """CLIP's picture embedding with all tokens in every block."""
    tokens, _ = tower.trunk(images)
    return tower.ln_post(tower.blocks[-1](tokens)[:, 0]) @ tower.proj
