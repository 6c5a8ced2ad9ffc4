"""CUDA graphs: of a batch whose size came before, hundreds of launches become one.

A ViT-B/16 with a decoder is some 150 launches a batch (counted), each 3 to 10 µs of the host; a GPU that is asked for
two windows is done sooner. A graph is the same kernels on the same numbers, so results do not change.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger(__name__)
MOST = 4  # sizes: a graph keeps the memory of its batch


class Graphs:
    """A function of images on a GPU, which for the second batch of a size becomes a graph.

    What the function reads besides, such as weights, is read where it lies. One that waits for the GPU, or copies from
    the host, cannot be a graph and is called as it is; so is one whose graph gives anything else than it does itself.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self._function = function
        self._met: set[torch.Size] = set()
        self._graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._can = True

    def __call__(self, images: Tensor) -> Tensor:
        size = images.shape
        if size not in self._graphs:
            if size not in self._met or len(self._graphs) == MOST or not self._can:
                self._met.add(size)
                return self._function(images)
            self._capture(images)
            if not self._can:
                return self._function(images)
        graph, given, result = self._graphs[size]
        given.copy_(images)
        graph.replay()
        return result.clone()  # the next batch is written over it

    def _capture(self, images: Tensor) -> None:
        given, graph = images.clone(), torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(images.device)
        stream.wait_stream(torch.cuda.current_stream(images.device))
        try:
            with torch.cuda.stream(stream):
                wanted = self._function(given)  # what it computes once and keeps must not lie in the graph's memory
            # other threads go on sending images, which a stricter capture would not bear
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                result = self._function(given)
        except RuntimeError as error:
            torch.cuda.synchronize(images.device)
            log.info("no CUDA graph: %s", str(error).splitlines()[0])
            self._can = False
            return
        torch.cuda.current_stream(images.device).wait_stream(stream)
        graph.replay()
        if not torch.equal(result, wanted):
            log.warning("no CUDA graph: it gave other numbers than the function itself")
            self._can = False
            return
        self._graphs[images.shape] = (graph, given, result)
