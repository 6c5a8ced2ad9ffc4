"""One file per published system."""

from fastzs.models.maskclip import MaskCLIP

__all__ = ["MaskCLIP"]
