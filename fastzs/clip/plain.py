"""Whether modules compute what their weights alone say."""

from torch import nn

PACKAGES = ("torch.nn.", "timm.", "open_clip.", "fastzs.")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def plain(*modules: nn.Module) -> bool:
    """Whether these modules, and all inside them, are of packages known here, and have no hooks.

    Faster ways read a layer's weight and bias and leave out its ``forward``. An adapter that stands in a layer's place
    (LoRA), and a hook, compute something of their own there.
    """
    return all(
        type(part).__module__.startswith(PACKAGES) and not any(getattr(part, hooks) for hooks in HOOKS)
        for module in modules
        for part in module.modules()
    )
