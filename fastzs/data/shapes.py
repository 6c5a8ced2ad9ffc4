"""Images that the package draws itself: textured shapes on textured grounds, with captions and exact label maps.

A scene holds a few objects, each a colour, a shape and perhaps a pattern ("striped blue square"), on one of four
grounds. Everything follows from a seed, at any size. Of the 64 colour-shape pairs 16 are *unseen*: training scenes
never hold them, so that a model trained on captions can be asked for combinations of words it never met.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.84, 0.10, 0.12),
    "orange": (0.96, 0.53, 0.06),
    "yellow": (0.95, 0.87, 0.13),
    "green": (0.13, 0.60, 0.20),
    "cyan": (0.12, 0.75, 0.80),
    "blue": (0.13, 0.25, 0.83),
    "purple": (0.53, 0.17, 0.68),
    "pink": (0.97, 0.55, 0.73),
}
SHAPES = ("disc", "ring", "square", "triangle", "star", "cross", "heart", "moon")
PATTERNS = ("plain", "striped", "dotted", "checked")
GROUNDS = ("paper", "slate", "wood", "gravel")

PAIRS: tuple[str, ...] = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
UNSEEN_PAIRS: tuple[str, ...] = tuple(
    f"{colour} {shape}" for i, colour in enumerate(COLOURS) for j, shape in enumerate(SHAPES) if (i + 3 * j) % 4 == 0
)
SEEN_PAIRS: tuple[str, ...] = tuple(pair for pair in PAIRS if pair not in UNSEEN_PAIRS)


@dataclass(frozen=True)
class Scenes:
    """A batch of drawn scenes.

    Attributes:
        images: uint8 [B, 3, H, W], RGB.
        instances: uint8 [B, H, W]; 0 is the ground, i the i-th object of the scene. Later objects lie on top.
        objects: for each scene its objects from bottom to top, as (pattern, colour, shape).
        grounds: for each scene the name of its ground.
    """

    images: Tensor
    instances: Tensor
    objects: list[list[tuple[str, str, str]]]
    grounds: list[str]

    def names(self, scene: int) -> list[str]:
        """Names of the objects of one scene, bottom to top: "striped blue square"; plain objects drop the pattern."""
        return [name_of(*entry) for entry in self.objects[scene]]

    def labels(self, names: Sequence[str], ignore_index: int = 255) -> Tensor:
        """Exact label maps uint8 [B, H, W] for a vocabulary of pairs ("red ring"), full names or grounds.

        A pixel gets the index of the first name that fits its object or ground, ``ignore_index`` if none does.
        """
        index = {name: len(names) - 1 - i for i, name in enumerate(reversed(names))}
        labels = torch.full_like(self.instances, ignore_index)
        for b, (objects, ground) in enumerate(zip(self.objects, self.grounds, strict=True)):
            table = torch.full((len(objects) + 1,), ignore_index, dtype=torch.uint8)
            for i, fits in enumerate([(ground,), *((f"{c} {s}", name_of(p, c, s)) for p, c, s in objects)]):
                found = [index[name] for name in fits if name in index]
                if found:
                    table[i] = min(found)
            labels[b] = table[self.instances[b].long()]
        return labels

    def caption(self, scene: int) -> str:
        """One sentence that names the objects from bottom to top and the ground."""
        return " and ".join(f"a {name}" for name in self.names(scene)) + f" on {self.grounds[scene]}"


def name_of(pattern: str, colour: str, shape: str) -> str:
    return f"{colour} {shape}" if pattern == "plain" else f"{pattern} {colour} {shape}"


def draw(
    count: int,
    size: tuple[int, int] = (128, 128),
    *,
    seed: int | torch.Generator = 0,
    objects: tuple[int, int] = (1, 4),
    radius: tuple[float, float] = (12.0, 26.0),
    pairs: Sequence[str] = PAIRS,
) -> Scenes:
    """Draw ``count`` scenes.

    Args:
        size: height and width in pixels.
        seed: the same seed gives the same scenes; a CPU generator is advanced.
        objects: least and greatest number of objects in a scene, at most 254.
        radius: least and greatest half-extent of an object in pixels.
        pairs: colour-shape pairs to draw from, equally likely.

    Raises:
        ValueError: an empty scene size, an unknown pair, or limits that are not ordered.
    """
    height, width = size
    low, high = objects
    if min(height, width) < 1 or count < 1:
        raise ValueError(f"shapes: cannot draw {count} scenes of {height} x {width} pixels")
    if not 0 <= low <= high <= 254 or not 0 < radius[0] <= radius[1]:
        raise ValueError(f"shapes: objects={objects} and radius={radius} must be ordered, objects within 0 to 254")
    unknown = [pair for pair in pairs if pair not in PAIRS]
    if unknown or not pairs:
        raise ValueError(f"shapes: unknown pairs {unknown}; a pair is a colour and a shape such as 'red ring'")
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(*shape, generator=generator) * (high - low) + low

    def integers(end: int, *shape: int) -> Tensor:
        return torch.randint(end, shape, generator=generator)

    ground = integers(len(GROUNDS), count)
    number = low + integers(high - low + 1, count)
    pair = torch.tensor([PAIRS.index(p) for p in pairs])[integers(len(pairs), count, high)]
    pattern = integers(len(PATTERNS), count, high) * (uniform(count, high) < 0.6)
    extent = uniform(count, high, low=radius[0], high=radius[1])
    centre = _place(uniform(8, count, high, 2), extent, height, width)
    angle = uniform(count, high, low=-0.35, high=0.35)

    y = torch.arange(height, dtype=torch.float32)[:, None] + 0.5
    x = torch.arange(width, dtype=torch.float32)[None, :] + 0.5
    canvas = _grounds(ground, height, width, generator)  # [B, 3, H, W]
    instances = torch.zeros(count, height, width, dtype=torch.uint8)
    colours = torch.tensor(list(COLOURS.values()))
    for i in range(high):
        drawn = (number > i).float()[:, None, None]
        dy = y - centre[:, i, 0, None, None]
        dx = x - centre[:, i, 1, None, None]
        cos, sin = angle[:, i, None, None].cos(), angle[:, i, None, None].sin()
        u, v = (cos * dx + sin * dy), (cos * dy - sin * dx)  # object's frame, in pixels
        size_px = extent[:, i, None, None]
        distance = _distance(pair[:, i] % len(SHAPES), u / size_px, v / size_px) * size_px  # [B, H, W]
        base = colours[pair[:, i] // len(SHAPES)] + 0.03 * torch.randn(count, 3, generator=generator)
        shade = _pattern(pattern[:, i], u, v, size_px)[:, None]  # [B, 1, H, W], 0 or 1
        dark = base * (0.45 + 0.15 * uniform(count, 1))
        fill = torch.where(shade > 0, dark[:, :, None, None], base[:, :, None, None])
        alpha = ((0.5 - distance).clamp(0, 1) * drawn)[:, None]
        canvas = canvas + alpha * (fill - canvas)
        instances[(distance < 0) & (drawn > 0)] = i + 1
    canvas = canvas * uniform(count, 1, 1, 1, low=0.85, high=1.1)
    canvas = canvas + 0.02 * torch.randn(canvas.shape, generator=generator)
    kinds = [
        [
            (PATTERNS[int(p)], list(COLOURS)[int(c) // len(SHAPES)], SHAPES[int(c) % len(SHAPES)])
            for p, c in zip(pattern[b, : number[b]], pair[b, : number[b]], strict=True)
        ]
        for b in range(count)
    ]
    images = (canvas.clamp(0, 1) * 255).round().to(torch.uint8)
    return Scenes(images, instances, kinds, [GROUNDS[int(g)] for g in ground])


def _place(candidates: Tensor, extent: Tensor, height: int, width: int) -> Tensor:
    """Choose for each object the candidate position farthest from the objects before it: [8, B, K, 2] -> [B, K, 2]."""
    room = torch.tensor([height, width]) - 1.6 * extent[..., None]
    positions = 0.8 * extent[..., None] + candidates * room.clamp(min=0)  # [8, B, K, 2]
    chosen: list[Tensor] = []
    for i in range(extent.shape[1]):
        clearance = torch.full(positions.shape[:2], float("inf"))
        for j, other in enumerate(chosen):
            gap = (positions[:, :, i] - other).norm(dim=-1) - extent[:, i] - extent[:, j]
            clearance = torch.minimum(clearance, gap)
        best = clearance.clamp(max=2).argmax(0)
        chosen.append(positions[best, torch.arange(extent.shape[0]), i])
    return torch.stack(chosen, dim=1) if chosen else positions[0]


def _distance(shape: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Signed distance (negative inside, approximate) to each scene's shape in units of its extent: [B], [B, H, W]."""
    r = torch.hypot(u, v)
    result = torch.empty_like(u)
    for j, name in enumerate(SHAPES):
        where = shape == j
        if not where.any():
            continue
        a, b, d = u[where], v[where], r[where]
        if name == "disc":
            out = d - 0.9
        elif name == "ring":
            out = (d - 0.7).abs() - 0.25
        elif name == "square":
            out = torch.maximum(a.abs(), b.abs()) - 0.8
        elif name == "triangle":
            out = torch.maximum(0.87 * a.abs() - 0.5 * b, b) - 0.6
        elif name == "star":
            turn = torch.remainder(torch.atan2(a, -b) + torch.pi / 5, 2 * torch.pi / 5) - torch.pi / 5
            out = d * torch.cos(turn.abs() - 0.942) - 0.5 * 0.95
        elif name == "cross":
            long = torch.maximum(a.abs(), b.abs()) - 0.9
            out = torch.maximum(long, torch.minimum(a.abs(), b.abs()) - 0.28)
        elif name == "heart":
            lobes = torch.hypot(a.abs() - 0.42, b + 0.3) - 0.48
            body = torch.maximum((a.abs() + b - 0.62) * 0.71, -b - 0.3)
            out = torch.minimum(lobes, body)
        else:  # moon
            out = torch.maximum(d - 0.9, 0.72 - torch.hypot(a - 0.45, b))
        result[where] = out
    return result


def _pattern(pattern: Tensor, u: Tensor, v: Tensor, extent: Tensor) -> Tensor:
    """Where each object is painted in its darker shade: [B], [B, H, W] -> {0, 1} [B, H, W]."""
    step = (extent / 3.2).clamp(min=4.0)
    a, b = torch.floor(u / step), torch.floor(v / step)
    dots = torch.hypot(torch.remainder(u, step) - step / 2, torch.remainder(v, step) - step / 2) < 0.34 * step
    choices = torch.stack(
        [torch.zeros_like(u), torch.remainder(a, 2), dots.float(), torch.remainder(a + b, 2)]
    )  # [4, B, H, W]
    return choices[pattern, torch.arange(len(pattern))]


def _grounds(ground: Tensor, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Textured grounds of low saturation, [B, 3, H, W]."""
    count = len(ground)
    fine = torch.randn(count, 1, height, width, generator=generator)
    coarse = torch.randn(count, 1, height // 6 + 2, width // 6 + 2, generator=generator)
    coarse = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    x = torch.arange(width, dtype=torch.float32)
    y = torch.arange(height, dtype=torch.float32)[:, None]
    phase = 6.3 * torch.rand(count, 1, 1, 1, generator=generator)
    grain = torch.sin(y * 0.9 + phase + 1.5 * coarse + 0.02 * x)
    base = torch.tensor([[0.90, 0.88, 0.83], [0.26, 0.29, 0.32], [0.50, 0.39, 0.29], [0.58, 0.58, 0.56]])
    texture = torch.stack(
        [0.015 * fine + 0.01 * coarse, 0.02 * fine + 0.05 * coarse, 0.02 * fine + 0.06 * grain,
         0.10 * fine + 0.06 * coarse.sign()]
    )  # fmt: skip
    return base[ground][:, :, None, None] + texture[ground, torch.arange(count)]
