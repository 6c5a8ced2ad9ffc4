"""Train the small CLIP that the package carries, on images it draws and their captions.

    python -m fastzs.clip.train_shapes --output DIR [--minutes 60]

The training sees images and captions, never label maps. Two losses read them: CLIP's contrastive loss between
image and caption, and a loss on the dense features that MaskCLIP reads (the last block's value path), which asks
(a) that every name of the caption is found somewhere, (b) that every patch shows something the caption names, and
(c) that neighbouring patches of like colour show the same. Attributes alone ("red thing", "ring") are asked for like
names, and the text of a pair is drawn towards the sum of the texts of its attributes; that lets unseen pairs be
composed. Scenes and texts hold seen pairs only. In every third batch the colour channels are shuffled and the captions
name no colours, so that shapes are learnt apart from colours: there an image may look like an unseen pair, but no text
ever names one.
"""

import argparse
import itertools
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fastzs.clip.text import TextEncoder
from fastzs.clip.tokenizers import WordTokenizer
from fastzs.clip.vision import VisionTransformer
from fastzs.data import shapes

CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 128, "layers": 5, "width": 128, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 0, "width": 128, "heads": 4, "layers": 1},
}
MEAN = STD = (0.5, 0.5, 0.5)
WORDS = ("a", "and", "on", "thing", *shapes.PATTERNS[1:], *shapes.COLOURS, *shapes.SHAPES, *shapes.GROUNDS)
PHRASES = (
    *shapes.SEEN_PAIRS,
    *(f"{colour} thing" for colour in shapes.COLOURS),
    *shapes.SHAPES,
    *(f"{pattern} thing" for pattern in shapes.PATTERNS[1:]),
    *shapes.GROUNDS,
)
SEEN_INDICES = [divmod(shapes.PAIRS.index(pair), len(shapes.SHAPES)) for pair in shapes.SEEN_PAIRS]
GROUP_SIZES = (len(shapes.SEEN_PAIRS), len(shapes.COLOURS), len(shapes.SHAPES), 3, len(shapes.GROUNDS))


def named(scenes: shapes.Scenes) -> Tensor:
    """Which of PHRASES the captions support, bool [B, phrases]."""
    index = {phrase: i for i, phrase in enumerate(PHRASES)}
    out = torch.zeros(len(scenes.objects), len(PHRASES), dtype=torch.bool)
    for b, objects in enumerate(scenes.objects):
        out[b, index[scenes.grounds[b]]] = True
        for pattern, colour, shape in objects:
            for phrase in (f"{colour} {shape}", f"{colour} thing", shape, f"{pattern} thing"):
                if phrase in index:
                    out[b, index[phrase]] = True
    return out


def shuffle_channels(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [3, H, W] of the batch with its colour channels in another order."""
    orders = torch.tensor([order for order in itertools.permutations(range(3)) if order != (0, 1, 2)])
    order = orders[torch.randint(len(orders), (len(images),), generator=generator)]  # [B, 3]
    return images[torch.arange(len(images))[:, None], order]


def neighbours(images: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """How alike in mean colour each patch is to the one below [B, h - 1, w] and to its right [B, h, w - 1], in 0..1."""
    mean = F.avg_pool2d(images.float() / 255, patch_size)
    down = (mean[:, :, 1:] - mean[:, :, :-1]).square().sum(1)
    right = (mean[:, :, :, 1:] - mean[:, :, :, :-1]).square().sum(1)
    return (-down / 0.02).exp(), (-right / 0.02).exp()


def caption(scenes: shapes.Scenes, scene: int, shuffled: bool) -> str:
    """The scene's caption; without colours where those were shuffled."""
    words = scenes.caption(scene).split()
    return " ".join(word for word in words if not (shuffled and word in shapes.COLOURS))


class Model(nn.Module):
    """Both towers and the temperature, randomly initialised."""

    def __init__(self):
        super().__init__()
        vision = CONFIG["vision_cfg"]
        self.visual = VisionTransformer(
            width=vision["width"], layers=vision["layers"], heads=vision["width"] // vision["head_width"],
            patch_size=vision["patch_size"], grid=vision["image_size"] // vision["patch_size"],
            output_dim=CONFIG["embed_dim"], quick_gelu=False,
        )  # fmt: skip
        nn.init.normal_(self.visual.positional_embedding, std=0.02)
        tokenizer = WordTokenizer(WORDS, CONFIG["text_cfg"]["context_length"])
        CONFIG["text_cfg"]["vocab_size"] = tokenizer.vocab_size
        self.text = TextEncoder.of_config(CONFIG["text_cfg"], CONFIG["embed_dim"], False, tokenizer)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.phrase_tokens = torch.stack([tokenizer(PHRASES), tokenizer([f"a {phrase}" for phrase in PHRASES])])

    def tokens(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, tuple[int, int]]:
        """Tokens entering the last block; small images see a random window of the positional table."""
        x = images.float().div_(127.5).sub_(1.0)
        v = self.visual
        patches = v.conv1(x)
        grid = (patches.shape[2], patches.shape[3])
        side = math.isqrt(v.positional_embedding.shape[0] - 1)
        table = v.positional_embedding[1:].unflatten(0, (side, side))
        top = int(torch.randint(side - grid[0] + 1, (), generator=generator))
        left = int(torch.randint(side - grid[1] + 1, (), generator=generator))
        positions = table[top : top + grid[0], left : left + grid[1]].flatten(0, 1)
        cls = (v.class_embedding + v.positional_embedding[0]).expand(len(x), 1, -1)
        tokens = v.ln_pre(torch.cat([cls, patches.flatten(2).transpose(1, 2) + positions], dim=1))
        for block in v.blocks[:-1]:
            tokens = block(tokens)
        return tokens, grid

    def losses(self, scenes: shapes.Scenes, shuffled: bool, generator: torch.Generator) -> dict[str, Tensor]:
        """The parts of the loss, scalars, from images and captions; ``shuffled`` hides the colours from both."""
        images = shuffle_channels(scenes.images, generator) if shuffled else scenes.images
        tokens, grid = self.tokens(images, generator)
        scale = self.logit_scale.exp().clamp(max=100)
        captions = [caption(scenes, b, shuffled) for b in range(len(scenes.objects))]
        article = int(torch.randint(2, (), generator=generator))
        text = self.text(torch.cat([self.phrase_tokens[article], self.text.tokenizer(captions)]))
        phrases, captions = text[: len(PHRASES)], text[len(PHRASES) :]

        picture = F.normalize(self.visual.pooled(tokens, grid), dim=-1)
        logits = scale * picture @ captions.T
        match = torch.arange(len(logits))
        contrastive = (F.cross_entropy(logits, match) + F.cross_entropy(logits.T, match)) / 2

        patches = F.normalize(self.visual.dense(tokens, grid).flatten(2), dim=1)  # [B, D, N]
        scores = scale * (phrases @ patches)  # [B, phrases, N]
        target = named(scenes)
        pairs, colours, forms, patterns, grounds = scores.split(GROUP_SIZES, dim=1)
        t_pairs, t_colours, t_forms, t_patterns, t_grounds = target.split(GROUP_SIZES, dim=1)
        groups = [(forms, t_forms)] if shuffled else [(pairs, t_pairs), (colours, t_colours), (forms, t_forms)]
        near = neighbours(images, self.visual.patch_size)
        presence = patch = smooth = torch.zeros(())
        for group, wanted in groups:
            group, wanted = torch.cat([group, grounds], 1), torch.cat([wanted, t_grounds], 1)
            logp = group.log_softmax(dim=1)  # [B, n, N]
            k = max(1, logp.shape[2] // 10)
            found = logp.exp().topk(k, dim=2).values.mean(2).clamp(1e-6, 1 - 1e-6)  # [B, n]
            presence = presence - found.log()[wanted].mean()
            absent = torch.where(wanted[..., None], -math.inf, logp).logsumexp(1)  # log probability of unnamed
            patch = patch - torch.log1p(-absent.exp().clamp(max=1 - 1e-6)).mean()
            root = (logp / 2).exp().unflatten(2, grid)  # [B, n, h, w]
            down = 1 - (root[:, :, 1:] * root[:, :, :-1]).sum(1)
            right = 1 - (root[:, :, :, 1:] * root[:, :, :, :-1]).sum(1)
            smooth = smooth + (near[0] * down).mean() + (near[1] * right).mean()
        pattern_logits = (patterns - 0.3 * scale).topk(max(1, patterns.shape[2] // 16), dim=2).values.mean(2)
        pattern = F.binary_cross_entropy_with_logits(pattern_logits, t_patterns.float())
        pair_text, colour_text, shape_text, _, _ = phrases.split(GROUP_SIZES)
        parts = torch.stack([colour_text[i] + shape_text[j] for i, j in SEEN_INDICES])
        composition = 1 - F.cosine_similarity(pair_text, parts, dim=1).mean()
        return {
            "contrastive": contrastive,
            "presence": presence,
            "patch": patch,
            "smooth": smooth,
            "pattern": pattern,
            "composition": composition,
        }


def batch_at(done: float, generator: torch.Generator) -> shapes.Scenes:
    """Scenes for a fraction of the training: single objects first, then a few, whole images at the end."""
    if done < 0.35:
        count, side, objects, radius = 64, 48, (1, 1), (9.0, 22.0)
    elif done < 0.8:
        count, side, objects, radius = 48, 64, (1, 2), (9.0, 25.0)
    else:
        count, side, objects, radius = 12, 128, (2, 4), (10.0, 30.0)
    return shapes.draw(count, (side, side), seed=generator, objects=objects, radius=radius, pairs=shapes.SEEN_PAIRS)


@torch.inference_mode()
def score(model: Model, count: int = 64, seed: int = 10_000) -> dict[str, float]:
    """mIoU of the dense features on held-out scenes, over seen and unseen pairs (64 names and the 4 grounds)."""
    names = [*shapes.PAIRS, *shapes.GROUNDS]
    text = model.text.encode(names)
    scenes = shapes.draw(count, (128, 128), seed=seed, objects=(2, 4), radius=(10, 30))
    truth = scenes.labels(names).long()
    n = len(names)
    form, side = torch.arange(n) % 8, torch.arange(n) // 8
    confusion = torch.zeros(n * n, dtype=torch.int64)
    for i in range(0, count, 16):
        x = scenes.images[i : i + 16].float() / 127.5 - 1
        tokens, grid = model.visual.trunk(x)
        features = F.normalize(model.visual.dense(tokens, grid), dim=1)
        logits = torch.einsum("bdhw,cd->bchw", features, text)
        labels = F.interpolate(logits, (128, 128), mode="bilinear").argmax(1)
        confusion += torch.bincount((truth[i : i + 16] * n + labels).flatten(), minlength=n * n)
    matrix = confusion.view(n, n).double()
    hit = matrix.diagonal()
    iou = hit / (matrix.sum(0) + matrix.sum(1) - hit)
    same_colour = torch.where(side[:, None] == side, matrix, 0).sum(1)
    same_shape = torch.where((form[:, None] == form) & (side < 8), matrix, 0).sum(1)
    seen = torch.tensor([name in shapes.SEEN_PAIRS for name in names])
    unseen = torch.tensor([name in shapes.UNSEEN_PAIRS for name in names])
    return {
        "mIoU_seen": float(iou[seen].nanmean()),
        "mIoU_unseen": float(iou[unseen].nanmean()),
        "mIoU_grounds": float(iou[64:].nanmean()),
    } | {
        f"{what}_{group}": float(right[where].sum() / matrix[where].sum())
        for what, right in (("pixels", hit), ("colour", same_colour), ("shape", same_shape))
        for group, where in (("seen", seen), ("unseen", unseen))
    }


def save(model: Model, folder: Path) -> None:
    """Write the weights as open_clip lays out a folder, with the closed vocabulary beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"visual.{k}": v for k, v in model.visual.state_dict().items()} | model.text.tower.state_dict()
    state["logit_scale"] = model.logit_scale.detach()
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "open_clip_model.safetensors")
    preprocess = {"mean": MEAN, "std": STD}
    config = {"model_cfg": CONFIG, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "words.json").write_text(json.dumps({"words": WORDS, "background": shapes.GROUNDS}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = Model()
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.98),
    )
    start = time.monotonic()

    mean: dict[str, float] = {}
    step = 0
    while (progress := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        scenes = batch_at(progress, generator)
        for group in optimizer.param_groups:
            group["lr"] = (
                1.5e-3 * min(1.0, (step + 1) / 200) * max(0.02, 0.5 * (1 + math.cos(math.pi * min(1, progress))))
            )
        losses = model.losses(scenes, step % 3 == 2, generator)
        total = (
            0.3 * losses["contrastive"]
            + losses["presence"]
            + losses["patch"]
            + losses["smooth"]
            + 0.3 * losses["pattern"]
            + losses["composition"]
        )
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for name, value in losses.items():
            mean[name] = 0.98 * mean.get(name, value.item()) + 0.02 * value.item()
        step += 1
        if step % 500 == 0:
            parts = " ".join(f"{name} {value:.3f}" for name, value in (mean | score(model, 32)).items())
            save(model, args.output)
            print(f"{progress:6.1%} step {step} {parts} scale {model.logit_scale.exp().item():.1f}", flush=True)

    save(model, args.output)
    print(score(model, 512))


if __name__ == "__main__":
    main()
