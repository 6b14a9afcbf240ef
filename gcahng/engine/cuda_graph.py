"""Captures passes as CUDA graphs, so that a small batch does not wait for hundreds of kernel launches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from gcahng.engine.workspace import Workspace

Run = Callable[[Sequence[Tensor], Workspace], list[Tensor]]
MOST = 8  # captured passes that a cache holds: two for each of four kinds of batches
_WARM_UPS = 2
_numbers = itertools.count(1)
_caches: WeakValueDictionary[int, GraphCache] = WeakValueDictionary()
_streams: dict[torch.device, torch.cuda.Stream] = {}  # on which captures are warmed up and made


class GraphCache:
    """The captured passes of one loss, for the last few kinds of batches.

    They share a pool of memory on each device: a loss runs one of them at a time, and what one of them has freed by its
    end is free for the others. What lasts, such as their outputs, keeps its place.

    Attributes:
        number: by which an operator, whose arguments are plain values, refers to the cache.
    """

    def __init__(self) -> None:
        self.number = next(_numbers)
        self._captured: dict[tuple[Any, ...], _Captured] = {}
        self._steps: dict[tuple[Any, ...], _CapturedStep] = {}
        self._pools: dict[torch.device, Any] = {}
        _caches[self.number] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphCache:
        return GraphCache()

    def __reduce__(self) -> tuple[type[GraphCache], tuple[()]]:
        return GraphCache, ()

    def pool(self, device: torch.device) -> Any:
        """The handle of the pool of memory on a device; None where there are no CUDA graphs."""
        if device.type != "cuda":
            return None
        if device not in self._pools:
            self._pools[device] = torch.cuda.graph_pool_handle()
        return self._pools[device]

    def held_for(self, kind: Any) -> int:
        """Bytes of device memory that the captured passes of a kind of batch took."""
        return sum(captured.taken.reserved for captured in self._captured.values() if captured.kind == kind)

    def idle(self, device: torch.device) -> int:
        """Bytes on a device that the cache's graphs keep for their temporaries. No one else can have them."""
        captured = (*self._captured.values(), *self._steps.values())
        return sum(max(0, one.taken.reserved - one.taken.allocated) for one in captured if one.device == device)

    def __call__(
        self, run: Run, inputs: Sequence[Tensor], fixed: Sequence[Tensor], settings: Any, kind: Any = None
    ) -> list[Tensor]:
        """Replays run(inputs, workspace), which is captured first where that has not happened yet.

        Args:
            run: the pass.
            inputs: tensors that may lie elsewhere each time; they are copied into the captured pass.
            fixed: tensors that `run` reads in place, such as weights and running statistics.
            settings: everything else that makes one pass differ from another; hashable.
            kind: the kind of batch, for `held_for`.

        Returns:
            Copies of what `run` returned.
        """
        shapes = tuple((tuple(t.shape), t.dtype, t.device) for t in inputs)
        places = tuple((t.data_ptr(), tuple(t.shape), t.dtype) for t in fixed)
        key = (settings, shapes, places)
        captured = self._captured.pop(key, None)
        if captured is None:
            captured = _Captured(run, inputs, kind, self.pool(inputs[0].device))
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
            captured = _CapturedStep(step, parameters, self.pool(parameters[0].device))
            while len(self._steps) >= MOST:
                del self._steps[next(iter(self._steps))]
        self._steps[places, shapes] = captured
        captured(parameters)


class _Memory(NamedTuple):
    """Bytes of device memory.

    Attributes:
        reserved: what torch has of the device.
        allocated: what of it tensors hold.
    """

    reserved: int
    allocated: int


def _memory(device: torch.device) -> _Memory:
    """Torch's memory on a device."""
    if device.type != "cuda":
        return _Memory(0, 0)
    return _Memory(torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device))


@contextmanager
def _taking(device: torch.device) -> Iterator[list[_Memory]]:
    """Yields a list, in which stands how much more memory torch has at the context's end than at its beginning."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # as each capture does: what that gives back would hide what the capture takes
    before, taken = _memory(device), []
    yield taken
    taken.append(_Memory(*(max(0, now - was) for now, was in zip(_memory(device), before, strict=True))))


class _CapturedStep:
    """A captured step, which reads gradients from memory of its own."""

    def __init__(self, step: Callable[[], None], parameters: Sequence[Tensor], pool: Any) -> None:
        self.device = parameters[0].device
        with _taking(self.device) as taken:
            self._gradients = [p.grad.clone() for p in parameters]
            gradients = [p.grad for p in parameters]
            _set_gradients(parameters, self._gradients)
            self._replay = record(step, self.device, pool)
            _set_gradients(parameters, gradients)
        (self.taken,) = taken

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
    def __init__(self, run: Run, inputs: Sequence[Tensor], kind: Any, pool: Any) -> None:
        self.kind, self.device = kind, inputs[0].device
        with _taking(self.device) as taken:
            self._inputs = [t.detach().clone() for t in inputs]
            self._workspace = Workspace()
            self._replay, self._outputs = capture(lambda: run(self._inputs, self._workspace), self.device, pool)
        (self.taken,) = taken

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        for captured_input, tensor in zip(self._inputs, inputs, strict=True):
            captured_input.copy_(tensor)
        self._replay()
        return [output.clone() for output in self._outputs]


def capturing() -> bool:
    """Whether the current stream is being captured, for instance as part of a whole training step."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def idle_memory(device: torch.device) -> int:
    """Bytes on a device that captured graphs keep for their temporaries."""
    return sum(one.idle(device) for one in list(_caches.values()))


def capture(
    run: Callable[[], list[Tensor]], device: torch.device, pool: Any = None
) -> tuple[Callable[[], None], list[Tensor]]:
    """Runs a function a few times to warm up, then captures it.

    Args:
        run: launches kernels and returns its outputs.
        device: the device that it launches them on.
        pool: the handle of the pool of memory that the capture takes from; None is a pool of its own.

    Returns:
        A function that replays the capture, and the tensors that a replay writes its outputs to.
    """
    with torch.cuda.device(device):  # which need not be the current one
        stream = _stream(device)  # libraries keep memory for each stream that they ran on
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
    with _graph(device, pool) as graph:
        outputs = run()
    return graph.replay, outputs


def record(run: Callable[[], None], device: torch.device, pool: Any = None) -> Callable[[], None]:
    """Captures a function without running it.

    Args:
        run: launches kernels.
        device: the device that it launches them on.
        pool: as in `capture`.

    Returns:
        A function that runs what was captured.
    """
    with _graph(device, pool) as graph:
        run()
    return graph.replay


@contextmanager
def _graph(device: torch.device, pool: Any) -> Iterator[torch.cuda.CUDAGraph]:
    """Captures what is launched on a device within the context."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        stream = _stream(device)
        # Other threads go on meanwhile: one of a DataLoader may take pinned memory, which would break a global capture.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            yield graph


def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of captures on a device, which is the current one. Torch's own is on that of the first capture."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream()
    return _streams[device]


def cache(number: int) -> GraphCache:
    """The cache of this number. Its loss holds the only lasting reference to it."""
    return _caches[number]
