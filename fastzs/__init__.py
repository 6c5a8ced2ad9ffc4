"""Zero-shot semantic segmentation with CLIP, fast: name the classes, get the masks."""

__version__ = "0.1.0"
