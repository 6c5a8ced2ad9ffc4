"""From masks to polygons without holes that cover them exactly.

The points are pixels, and the pixels on a polygon's edges belong to it, as in OpenCV's ``fillPoly`` and in Pillow, with
which the tools draw polygons. Polygons cannot have holes in these formats, so a region with holes is cut along the
uppermost row of each hole: both parts then have the hole at their edge.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from fastzs.needed import needed


def polygons(mask: np.ndarray) -> Iterator[np.ndarray]:
    """Polygons int32 [N, 2] (x, y in pixels), N at least 3, that together cover a mask bool [H, W] and nothing else.

    Raises:
        ModuleNotFoundError: OpenCV is not installed.
    """
    cv2 = needed("cv2", "OpenCV (opencv-python-headless)", "Polygons")
    contours, tree = cv2.findContours(mask.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    for i, contour in enumerate(contours):
        _, _, hole, parent = tree[0, i]
        if parent >= 0:
            continue
        if hole < 0:
            points = contour[:, 0]
            yield np.concatenate([points, points[-1:].repeat(max(0, 3 - len(points)), axis=0)])
        else:
            yield from _without_holes(cv2, contours, tree, i)


def _without_holes(cv2, contours, tree: np.ndarray, index: int) -> Iterator[np.ndarray]:
    """Polygons of the parts of one region, which has holes."""
    left, top, width, height = cv2.boundingRect(contours[index])
    region = np.zeros((height, width), np.uint8)
    cv2.drawContours(region, contours, index, 1, cv2.FILLED, 8, tree, 1, (-left, -top))
    cuts, hole = {0, height}, tree[0, index, 2]
    while hole >= 0:
        cuts.add(int(contours[hole][:, 0, 1].min()) + 1 - top)  # a hole's contour runs on the pixels around it
        hole = tree[0, hole, 0]
    for start, stop in itertools.pairwise(sorted(cuts)):
        for points in polygons(region[start:stop] > 0):
            yield points + np.array([left, top + start], np.int32)
