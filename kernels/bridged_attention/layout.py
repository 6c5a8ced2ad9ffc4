"""Which token sees which in CLIP-RC's tower: the region mask as an object instead of a matrix."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLayout:
    """Order and visibility of the tokens ``[prefix | patches, row by row | bridge, row by row]``.

    Prefix tokens (CLS, and prompts where they are tokens) and patches see all prefix tokens and patches. A bridge
    token stands for a rectangle of patches, its region: it sees itself and these patches, and besides itself only
    they see it (CLIP-RC, CVPR 2024, region-level bridge). Region (i, j) of a bridge ``(rh, rw)`` on a grid
    ``(h, w)`` is the rows ``i * (h // rh)`` to ``(i + 1) * (h // rh) - 1`` and the columns likewise; where the
    bridge does not divide the grid, the rows and columns left over at the bottom and right belong to no region, as
    in the published code.

    Args:
        prefix: number of tokens before the patches; 0 in towers without CLS (SigLIP).
        grid: rows and columns of patches.
        bridge: rows and columns of bridge tokens, or None without them (ZegCLIP).

    Raises:
        ValueError: a count is too small, or the bridge has more rows or columns than the grid.
    """

    prefix: int
    grid: tuple[int, int]
    bridge: tuple[int, int] | None = None

    def __post_init__(self):
        if self.prefix < 0 or min(self.grid) < 1 or min(self.bridge or (1, 1)) < 1:
            raise ValueError(
                f"token layout: prefix {self.prefix}, grid {self.grid}, bridge {self.bridge}; "
                "expected a prefix of at least 0, every other count at least 1"
            )
        if self.bridge and (self.bridge[0] > self.grid[0] or self.bridge[1] > self.grid[1]):
            raise ValueError(
                f"token layout: a bridge of {self.bridge[0]} x {self.bridge[1]} leaves regions empty on a grid of "
                f"{self.grid[0]} x {self.grid[1]} patches; use larger images or windows, or a smaller bridge"
            )

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def regions(self) -> int:
        return self.bridge[0] * self.bridge[1] if self.bridge else 0

    @property
    def shared(self) -> int:
        """Prefix and patches: the tokens that all see each other."""
        return self.prefix + self.patches

    @property
    def length(self) -> int:
        return self.shared + self.regions

    @property
    def cell(self) -> tuple[int, int]:
        """Rows and columns of patches in a region."""
        if self.bridge is None:
            raise ValueError("token layout: no bridge, so no regions")
        return self.grid[0] // self.bridge[0], self.grid[1] // self.bridge[1]

    def region_of_patch(self, device: torch.device | str = "cpu") -> Tensor:
        """Region of every patch, int64 [h * w]; -1 where a patch belongs to none."""
        if self.bridge is None:
            return torch.full((self.patches,), -1, device=device)
        (h, w), (rh, rw), (ch, cw) = self.grid, self.bridge, self.cell
        row = torch.arange(h, device=device)[:, None] // ch
        column = torch.arange(w, device=device) // cw
        return torch.where((row < rh) & (column < rw), row * rw + column, -1).flatten()

    def dense_mask(self, prompts: int = 0, device: torch.device | str = "cpu") -> Tensor:
        """Bool [length, prompts + length], True where the row's query sees the column's key.

        ``prompts`` keys without queries come first; prefix and patches see them.
        """
        mask = torch.zeros(self.length, prompts + self.length, dtype=torch.bool, device=device)
        mask[: self.shared, : prompts + self.shared] = True
        region = torch.arange(self.regions, device=device)
        owns = region[:, None] == self.region_of_patch(device)  # [R, N]
        patches = slice(self.prefix, self.shared)
        mask[self.shared :, prompts + self.prefix : prompts + self.shared] = owns
        mask[patches, prompts + self.shared :] = owns.T
        mask[self.shared + region, prompts + self.shared + region] = True
        return mask

    def cells(self, x: Tensor) -> Tensor:
        """Patches [B, H, h * w, ...] by region: a view [B, H, rh, h // rh, rw, w // rw, ...] without the left-over."""
        assert self.bridge is not None
        (rh, rw), (ch, cw) = self.bridge, self.cell
        x = x.unflatten(2, self.grid)[:, :, : rh * ch, : rw * cw]
        return x.unflatten(3, (rw, cw)).unflatten(2, (rh, ch))
