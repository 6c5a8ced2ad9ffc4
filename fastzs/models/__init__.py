"""One file per published system."""

from fastzs.models.cagnet import CaGNet
from fastzs.models.clip_rc import ClipRC
from fastzs.models.deop import DeOP
from fastzs.models.joint import Joint
from fastzs.models.lseg import LSeg
from fastzs.models.maskclip import MaskCLIP
from fastzs.models.maskclip_plus import MaskCLIPPlus
from fastzs.models.pearl import PEARL
from fastzs.models.proxyclip import ProxyCLIP
from fastzs.models.resclip import ResCLIP
from fastzs.models.sign import SIGN
from fastzs.models.spnet import STRICT, SPNet
from fastzs.models.szn import SZN
from fastzs.models.training_free import NACLIP, SCLIP, ClearCLIP
from fastzs.models.zegclip import ZegCLIP
from fastzs.models.zegformer import ZegFormer
from fastzs.models.zs3 import ZS3
from fastzs.models.zsseg import ZSSeg

__all__ = [
    "NACLIP",
    "PEARL",
    "SCLIP",
    "SIGN",
    "STRICT",
    "SZN",
    "ZS3",
    "CaGNet",
    "ClearCLIP",
    "ClipRC",
    "DeOP",
    "Joint",
    "LSeg",
    "MaskCLIP",
    "MaskCLIPPlus",
    "ProxyCLIP",
    "ResCLIP",
    "SPNet",
    "ZSSeg",
    "ZegCLIP",
    "ZegFormer",
]
