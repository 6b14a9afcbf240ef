"""Captures passes as CUDA graphs, so that a small batch does not wait for hundreds of kernel launches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from gcahng.engine.workspace import Workspace

Run = Callable[[Sequence[Tensor], Workspace], list[Tensor]]
MOST = 8  # captured passes that a cache holds: two for each of four kinds of batches
_WARM_UPS = 2
_numbers = itertools.count(1)
_caches: WeakValueDictionary[int, GraphCache] = WeakValueDictionary()
_streams: dict[torch.device, torch.cuda.Stream] = {}  # on which captures are made


class GraphCache:
    """The captured passes of one loss, for the last few kinds of batches.

    Attributes:
        number: by which an operator, whose arguments are plain values, refers to the cache.
    """

    def __init__(self) -> None:
        self.number = next(_numbers)
        self._captured: dict[tuple[Any, ...], _Captured] = {}
        self._steps: dict[tuple[Any, ...], _CapturedStep] = {}
        _caches[self.number] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphCache:
        return GraphCache()

    def __reduce__(self) -> tuple[type[GraphCache], tuple[()]]:
        return GraphCache, ()

    def __call__(self, run: Run, inputs: Sequence[Tensor], fixed: Sequence[Tensor], settings: Any) -> list[Tensor]:
        """Replays run(inputs, workspace), which is captured first where that has not happened yet.

        Args:
            run: the pass.
            inputs: tensors that may lie elsewhere each time; they are copied into the captured pass.
            fixed: tensors that `run` reads in place, such as weights and running statistics.
            settings: everything else that makes one pass differ from another; hashable.

        Returns:
            Copies of what `run` returned.
        """
        shapes = tuple((tuple(t.shape), t.dtype, t.device) for t in inputs)
        places = tuple((t.data_ptr(), tuple(t.shape), t.dtype) for t in fixed)
        key = (settings, shapes, places)
        captured = self._captured.pop(key, None)
        if captured is None:
            captured = _Captured(run, inputs)
            while len(self._captured) >= MOST:
                del self._captured[next(iter(self._captured))]
        self._captured[key] = captured  # the last one used stands last
        return captured(inputs)

    def step(self, step: Callable[[], None], parameters: Sequence[Tensor], state: Sequence[Tensor]) -> None:
        """Replays an optimizer's step, which is captured first where that has not happened yet.

        Args:
            step: reads the parameters' gradients, and changes parameters and state in place. It must have run before,
                so that all of its state exists.
            parameters: those that are stepped.
            state: the optimizer's tensors.
        """
        places = tuple(t.data_ptr() for t in (*parameters, *state))
        shapes = tuple((tuple(t.shape), t.dtype) for t in parameters)
        captured = self._steps.pop((places, shapes), None)
        if captured is None:
            captured = _CapturedStep(step, parameters)
            while len(self._steps) >= MOST:
                del self._steps[next(iter(self._steps))]
        self._steps[places, shapes] = captured
        captured(parameters)


class _CapturedStep:
    """A captured step, which reads gradients from memory of its own."""

    def __init__(self, step: Callable[[], None], parameters: Sequence[Tensor]) -> None:
        self._gradients = [p.grad.clone() for p in parameters]
        gradients = [p.grad for p in parameters]
        _set_gradients(parameters, self._gradients)
        self._replay = record(step, parameters[0].device)
        _set_gradients(parameters, gradients)

    def __call__(self, parameters: Sequence[Tensor]) -> None:
        torch._foreach_copy_(self._gradients, [p.grad for p in parameters])
        self._replay()


def _set_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


class _Captured:
    """A captured pass, with inputs, workspace and outputs of its own."""

    # Whatever mode it is made in, it is replayed in training too, and an inference tensor stays one.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, run: Run, inputs: Sequence[Tensor]) -> None:
        self._inputs = [t.detach().clone() for t in inputs]
        self._workspace = Workspace()
        self._replay, self._outputs = capture(lambda: run(self._inputs, self._workspace), inputs[0].device)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        for captured_input, tensor in zip(self._inputs, inputs, strict=True):
            captured_input.copy_(tensor)
        self._replay()
        return [output.clone() for output in self._outputs]


def capturing() -> bool:
    """Whether the current stream is being captured, for instance as part of a whole training step."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def capture(run: Callable[[], list[Tensor]], device: torch.device) -> tuple[Callable[[], None], list[Tensor]]:
    """Runs a function a few times to warm up, then captures it.

    Args:
        run: launches kernels and returns its outputs.
        device: the device that it launches them on.

    Returns:
        A function that replays the capture, and the tensors that a replay writes its outputs to.
    """
    with torch.cuda.device(device):  # which need not be the current one
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
    with _graph(device) as graph:
        outputs = run()
    return graph.replay, outputs


def record(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Captures a function without running it.

    Args:
        run: launches kernels.
        device: the device that it launches them on.

    Returns:
        A function that runs what was captured.
    """
    with _graph(device) as graph:
        run()
    return graph.replay


@contextmanager
def _graph(device: torch.device) -> Iterator[torch.cuda.CUDAGraph]:
    """Captures what is launched on a device within the context."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        # The stream that torch would take by itself is on the device of the process's first capture.
        if device not in _streams:
            _streams[device] = torch.cuda.Stream()
        # Other threads go on meanwhile: one of a DataLoader may take pinned memory, which would break a global capture.
        with torch.cuda.graph(graph, stream=_streams[device], capture_error_mode="thread_local"):
            yield graph


def cache(number: int) -> GraphCache:
    """The cache of this number. Its loss holds the only lasting reference to it."""
    return _caches[number]
