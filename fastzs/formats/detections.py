"""``supervision.Detections`` of a segmentation."""

from typing import TYPE_CHECKING, Any

import numpy as np

from fastzs.needed import needed

if TYPE_CHECKING:
    from fastzs.result import Segmentation


def detections(result: "Segmentation") -> Any:
    """See :meth:`fastzs.Segmentation.to_detections`."""
    sv = needed("supervision", "supervision", "Detections")
    labels = result.labels.numpy()
    present = [i for i in np.unique(labels).tolist() if i != result.background]
    masks = labels == np.array(present, labels.dtype).reshape(-1, 1, 1)
    confidence = None
    if result.scores is not None:
        scores = result.scores.numpy()
        confidence = np.array([scores[mask].mean(dtype=np.float64) for mask in masks], np.float32)
    return sv.Detections(
        xyxy=sv.mask_to_xyxy(masks).astype(np.float32).reshape(-1, 4),
        mask=masks,
        class_id=np.array(present, int),
        confidence=confidence,
        data={"class_name": np.array([result.names[i] for i in present], str)},
    )
