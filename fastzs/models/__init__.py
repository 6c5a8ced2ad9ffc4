"""One file per published system."""

from fastzs.models.clip_rc import ClipRC
from fastzs.models.lseg import LSeg
from fastzs.models.maskclip import MaskCLIP
from fastzs.models.maskclip_plus import MaskCLIPPlus
from fastzs.models.szn import SZN
from fastzs.models.zegclip import ZegCLIP
from fastzs.models.zegformer import ZegFormer
from fastzs.models.zsseg import ZSSeg

__all__ = ["SZN", "ClipRC", "LSeg", "MaskCLIP", "MaskCLIPPlus", "ZSSeg", "ZegCLIP", "ZegFormer"]
