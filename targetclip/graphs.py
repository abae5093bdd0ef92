"""Replay a step of fixed shapes as one CUDA graph, so that the device does not wait for Python.

Knows tensors and CUDA's graphs; nothing of what is computed.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

WARM = 3  # calls before a capture, in which libraries choose and load what they use

Step = Callable[..., tuple[Tensor, ...]]
"""From tensors to tensors. Depends on nothing else that changes from call to call."""


class Replayed:
    """A step that is captured once its shapes have come `WARM` times, and replayed from then on.

    On other devices than CUDA's, and where `capture` is false, it is called as it is. A step that
    cannot be captured is called as it is too, after a warning. Rows of other shapes are captured
    anew.
    """

    def __init__(self, step: Step, *, capture: bool = True) -> None:
        self.step, self.capture, self.calls = step, capture, 0
        self.shapes: list[torch.Size] = []
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Tensor, ...] = ()
        self.outputs: tuple[Tensor, ...] = ()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the step's outputs. Those of a replay are overwritten by the next call."""
        if not self.capture or not inputs[0].is_cuda:
            return self.step(*inputs)
        shapes = [each.shape for each in inputs]
        if shapes != self.shapes:
            self.shapes, self.calls = shapes, 0
            self.graph, self.inputs, self.outputs = None, (), ()
        self.calls += 1
        if self.calls <= WARM:
            return self.step(*inputs)
        if self.graph is None:
            try:
                self.record(inputs)
            except RuntimeError as error:
                self.capture, self.graph = False, None
                reason = (str(error).splitlines() or [""])[0]
                warnings.warn(
                    "expected steps that a CUDA graph can hold; they are taken one by one instead, "
                    f"more slowly: {reason}",
                    stacklevel=2,
                )
                return self.step(*inputs)
        else:
            for held, given in zip(self.inputs, inputs, strict=True):
                held.copy_(given)
        assert self.graph is not None
        self.graph.replay()
        return self.outputs

    def record(self, inputs: tuple[Tensor, ...]) -> None:
        """Capture the step with copies of inputs. RuntimeError: it does what no graph can hold."""
        self.inputs = tuple(each.detach().clone() for each in inputs)
        graph, cached = torch.cuda.CUDAGraph(), torch.is_autocast_cache_enabled()
        # What autocast keeps from a capture would be memory of the graph.
        torch.set_autocast_cache_enabled(False)
        try:
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                self.outputs = self.step(*self.inputs)
        finally:
            torch.set_autocast_cache_enabled(cached)
        self.graph = graph
