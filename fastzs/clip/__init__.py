"""CLIP as a dense encoder: towers, text tower, weights."""

from fastzs.clip.at_hand import from_model
from fastzs.clip.conv import ConvTower
from fastzs.clip.resnet import ResNet
from fastzs.clip.state import WeightsError
from fastzs.clip.templates import TEMPLATES
from fastzs.clip.text import TextEncoder
from fastzs.clip.vision import VisionTransformer
from fastzs.clip.weights import Clip, load

__all__ = [
    "TEMPLATES",
    "Clip",
    "ConvTower",
    "ResNet",
    "TextEncoder",
    "VisionTransformer",
    "WeightsError",
    "from_model",
    "load",
]
