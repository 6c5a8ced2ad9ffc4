"""The backends of ``mask_loss`` in the compiled library: the operator ``fastzs::mask_sums`` (csrc/mask_loss*)."""

from ..extension import why_missing
from .operator import register

# At import, not in a call: torch.compile cannot trace the loading of a library.
MISSING = {device: why_missing("mask_sums", device) for device in ("cpu", "cuda")}

if None in MISSING.values():
    register("mask_sums")
