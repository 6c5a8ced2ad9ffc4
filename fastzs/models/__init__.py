"""One file per published system."""

from fastzs.models.cagnet import CaGNet
from fastzs.models.clip_rc import ClipRC
from fastzs.models.deop import DeOP
from fastzs.models.joint import Joint
from fastzs.models.lseg import LSeg
from fastzs.models.maskclip import MaskCLIP
from fastzs.models.maskclip_plus import MaskCLIPPlus
from fastzs.models.sign import SIGN
from fastzs.models.spnet import STRICT, SPNet
from fastzs.models.szn import SZN
from fastzs.models.zegclip import ZegCLIP
from fastzs.models.zegformer import ZegFormer
from fastzs.models.zs3 import ZS3
from fastzs.models.zsseg import ZSSeg

__all__ = [
    "SIGN",
    "STRICT",
    "SZN",
    "ZS3",
    "CaGNet",
    "ClipRC",
    "DeOP",
    "Joint",
    "LSeg",
    "MaskCLIP",
    "MaskCLIPPlus",
    "SPNet",
    "ZSSeg",
    "ZegCLIP",
    "ZegFormer",
]
