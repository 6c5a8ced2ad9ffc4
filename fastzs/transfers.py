"""To a GPU and back while it works: pinned memory, a stream for copies, events. Elsewhere nothing is copied early.

Copies from and to memory that is not pinned make the host wait for all that the GPU was asked before. Here images go up
on a stream of their own, from any thread, and labels come down behind the work that makes them; the host waits for one
event only, when it wants the labels.
"""

import functools
from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor


@functools.cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Sending:
    """The work inside ``with`` is done beside that of the model, if the device is a GPU; in any thread.

    Attributes:
        arrived: after the ``with``, what the model's stream is to wait for, see :func:`arrive`; None without a GPU.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.arrived: torch.cuda.Event | None = None

    def __enter__(self) -> "Sending":
        if self.device.type == "cuda":
            self._outside = torch.cuda.current_stream(self.device)
            self._inside = torch.cuda.stream(_copies(self.device))
            self._inside.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.arrived = torch.cuda.Event()
            self.arrived.record(_copies(self.device))
            self._inside.__exit__(kind, error, traceback)

    def send(self, tensor: Tensor) -> Tensor:
        """The tensor on the GPU; itself where there is none."""
        if self.device.type != "cuda":
            return tensor
        if tensor.device.type == "cuda":  # somebody's own, made by what they asked the GPU before
            _copies(self.device).wait_stream(self._outside)
            tensor.record_stream(_copies(self.device))
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)


def arrive(event: torch.cuda.Event | None, tensors: Iterable[Tensor | None]) -> None:
    """Let the current stream wait for tensors that were sent; the host does not."""
    if event is None:
        return
    for tensor in tensors:
        if tensor is not None and tensor.is_cuda:
            stream = torch.cuda.current_stream(tensor.device)
            stream.wait_event(event)
            tensor.record_stream(stream)  # its memory is not to be given away before


class Fetched:
    """A tensor on its way to the host, behind the work that makes it."""

    def __init__(self, tensor: Tensor):
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._here.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))
        else:
            self._here = tensor.cpu()

    def get(self) -> Tensor:
        """The tensor on the host; waits until it is there."""
        if self._event is not None:
            self._event.synchronize()
        return self._here
