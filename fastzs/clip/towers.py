"""Vision towers by open_clip's configuration: which of this package's classes computes one, and its weights."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from open_clip.model import _build_vision_tower
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer as OpenClipViT
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.fastvit import FastVit
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastzs.clip import translate
from fastzs.clip.conv import ConvTower
from fastzs.clip.resnet import ResNet
from fastzs.clip.state import WeightsError, check
from fastzs.clip.vision import VisionTransformer

Tower = VisionTransformer | ResNet | ConvTower


class Sizes(TorchFunctionMode):
    """Modules are made without memory and without initial values, both of which would be thrown away."""

    def __enter__(self):
        self.device = torch.device("meta")
        self.device.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.device.__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__") and args and isinstance(args[0], Tensor):
            return args[0]  # normal_, fill_, erfinv_, ...
        return func(*args, **(kwargs or {}))


def blueprint(config: dict, name: str) -> nn.Module:
    """open_clip's own tower of a configuration, without memory for its weights (device "meta").

    Raises:
        WeightsError: the configuration asks for what open_clip or timm cannot build.
    """
    try:
        with Sizes():
            return _open_clips(config)
    except Exception as error:
        raise WeightsError(f"backbone {name!r}: open_clip cannot build its vision tower ({error})") from error


def build(config: dict, name: str, state: dict[str, Tensor] | None, source: str, **options) -> Tower:
    """A vision tower with weights, or with random ones where ``state`` is None.

    Args:
        config: open_clip's model configuration.
        name: of the backbone, and ``source``: of the weights, for messages.
        state: the tensors under open_clip's names, without ``visual.``.
        options: of :class:`VisionTransformer` (``quick_gelu``, ``norm_eps``, ``position_mode``,
            ``double_class_embedding``) or :class:`ResNet` (``output_stride``).

    Raises:
        WeightsError: an architecture that is not supported, tensors that do not fit, NaN among them.
    """
    if "sizes" in config["vision_cfg"]:  # transformers' SigLIP, which open_clip's configurations cannot describe
        sizes = config["vision_cfg"]["sizes"] | options
        if state is not None:
            with Sizes():
                check(VisionTransformer(**sizes).state_dict(), state, source)
        return _filled(lambda: VisionTransformer(**sizes), state)
    model = blueprint(config, name)
    if state is not None:
        check(model.state_dict(), state, source)
    return _of(model, lambda: _open_clips(config), config["embed_dim"], name, state, **options)


def of_module(model: nn.Module, output_dim: int, name: str, **options) -> Tower:
    """A vision tower with the weights of open_clip's own; arguments and errors as of :func:`build`.

    Args:
        model: ``visual`` of an open_clip model, on any device and of any dtype; it is left as it is.
        output_dim: width of the joint space, D.
    """
    state = model.state_dict()
    check(state, state, name)
    return _of(model, lambda: copy.deepcopy(model).float(), output_dim, name, state, **options)


def _of(
    model: nn.Module,
    make: Callable[[], nn.Module],
    output_dim: int,
    name: str,
    state: dict[str, Tensor] | None,
    **options,
) -> Tower:
    """The tower that computes what open_clip's ``model`` does, which only tells the sizes; ``make`` gives another."""
    if isinstance(model, ModifiedResNet):
        return _filled(lambda: _resnet(model, **options), state)
    if isinstance(model, OpenClipViT):
        sizes = translate.open_clip_sizes(model, name) | options
        return _filled(lambda: VisionTransformer(**sizes), state and translate.from_open_clip(state))
    if isinstance(model, TimmModel) and isinstance(model.trunk, TimmViT | Eva):
        sizes = translate.timm_sizes(model, name) | options
        return _filled(lambda: VisionTransformer(**sizes), state and translate.from_timm(state, sizes))
    if isinstance(model, TimmModel) and isinstance(model.trunk, ConvNeXt | FastVit):
        return _filled(lambda: ConvTower(make(), output_dim), state and _conv_names(state))
    network = type(getattr(model, "trunk", model)).__name__
    raise WeightsError(f"backbone {name!r}: {_REFUSED.get(network, f'its kind of network, {network}, is not known')}")


_REFUSED = {
    "SwinTransformer": "its attention is inside windows of a fixed image size, so other sizes cannot be read",
    "VisionTransformerRelPos": "its attention adds learnt biases between positions, which no attention here computes",
}


def _open_clips(config: dict) -> nn.Module:
    vision: Any = config["vision_cfg"] | {"timm_model_pretrained": False}  # its weights come from elsewhere
    return _build_vision_tower(config["embed_dim"], vision, config.get("quick_gelu", False))


def _filled(make: Any, state: dict[str, Tensor] | None) -> Any:
    if state is None:
        return make()
    with Sizes():
        tower = make()
    tower.to_empty(device="cpu")
    tower.load_state_dict(state)
    return tower


def _resnet(model: ModifiedResNet, **options) -> ResNet:
    layers = [len(stage) for stage in (model.layer1, model.layer2, model.layer3, model.layer4)]
    heads, width = model.attnpool.num_heads, model.conv3.out_channels
    return ResNet(layers, model.output_dim, heads, model.image_size, width, **options)


def _conv_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"network.{k.removeprefix('trunk.')}" if k.startswith("trunk.") else k: v for k, v in state.items()}
