"""Captured passes: the memory that they read and write, with a stand-in for the CUDA graph; and that nothing in a pass
waits for the device or depends on data, which a capture would not survive."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import MagicMock

import pytest
import torch
from capture_cases import LABELS, same, train
from tiers import few
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from gcahng import GCAHNGLoss, UserError
from gcahng.engine import cuda_graph, prepare
from gcahng.engine.cuda_graph import GraphCache
from gcahng.engine.engine import Engine, PassOptions
from gcahng.engine.generator_pass import GeneratorTask, generator_pass
from gcahng.engine.metric_pass import metric_pass
from gcahng.engine.operands import PassInputs, Wanted
from gcahng.engine.weights import buffer_list, parameter_list
from gcahng.engine.workspace import Workspace
from gcahng.nn import GraphNetwork
from gcahng.reference.edge_update import Dropout
from gcahng.reference.training_step import Batch, GeneratorWeights
from gcahng.testing import seeded


def make(captured: bool, **options) -> GCAHNGLoss:
    torch.manual_seed(0)
    gca = GCAHNGLoss(8, 16, layers=2, heads=2, seed=3, impl="torch", **options)
    gca._graphs = GraphCache() if captured else None
    return gca


@pytest.mark.parametrize("compat", ["fixed", "official"])
def test_replayed_steps_are_the_same_bits(captures: list[int], compat: str) -> None:
    batches = [(seeded(len(LABELS), 16, seed=seed), LABELS.roll(seed)) for seed in range(4)]
    wanted = train(make(False, compat=compat), batches)
    assert captures == []
    found = train(make(True, compat=compat), batches)
    assert len(captures) == 2, "one of each phase, for all steps"
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_other_batches_are_captured_anew_and_few_are_kept(captures: list[int]) -> None:
    gca = make(True)
    batches = [(seeded(2 * classes, 16, seed=1), torch.arange(classes).repeat(2)) for classes in (2, 3, 4, 5, 6, 2)]
    wanted = train(make(False), batches)
    assert all(torch.equal(a, b) for a, b in zip(train(gca, batches), wanted, strict=True))
    assert len(captures) == 2 * len(batches)  # the first kind was dropped when it came again
    assert len(gca._graphs._captured) == cuda_graph.MOST


def test_a_pass_captured_in_inference_mode_is_replayed_outside(captures: list[int]) -> None:
    gca, batch = make(True).eval(), (seeded(len(LABELS), 16, seed=1), LABELS)
    with torch.inference_mode():
        wanted = gca(*batch)
    with torch.no_grad():
        assert torch.equal(gca(*batch), wanted)
    assert len(captures) == 1


def test_other_settings_are_captured_anew(captures: list[int]) -> None:
    """The seed, dropout and the mode are constants of a pass, not inputs."""
    batch = [(seeded(len(LABELS), 16, seed=1), LABELS)]
    gca, other = make(True), make(False)
    recompute = replace(gca.engine, edge_memory="recompute")
    for change in ({}, {"seed": 4}, {"edge_dropout": 0.5}, {"edge_dropout": 0.0}, {"engine": recompute}):
        for one in (gca, other):
            for name, value in change.items():
                setattr(one, name, value)
        assert same(train(gca, batch), train(other, batch)), change
    assert len(captures) == 10
    found, wanted = (one.eval()(*batch[0]) for one in (gca, other))
    assert torch.equal(found, wanted) and len(captures) == 11


def test_the_kind_that_was_used_last_is_kept_longest(captures: list[int]) -> None:
    batches = [(seeded(2 * classes, 16, seed=1), torch.arange(classes).repeat(2)) for classes in (2, 3, 4, 5, 2, 6, 2)]
    train(make(True), batches)
    assert len(captures) == 2 * 5, "6 took the place of 3"


def test_what_auto_stands_for_is_captured_anew(captures: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    batch = [(seeded(len(LABELS), 16, seed=1), LABELS)]
    gca, other = make(True, edge_memory="auto"), make(False)
    for count, memory in ((2, "store"), (4, "recompute"), (4, "store")):
        monkeypatch.setattr("gcahng.engine.prepare.choose_memory", lambda size, free, memory=memory: memory)
        found, wanted = train(gca, batch), train(other, batch)
        torch.testing.assert_close(found, wanted)
        assert len(captures) == count


def test_few_steps_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "record", lambda run, device, pool: lambda: None)
    graphs, parameters = GraphCache(), [torch.nn.Parameter(torch.zeros(2)) for _ in range(cuda_graph.MOST + 2)]
    for parameter in (*parameters[:3], parameters[0], *parameters[3:]):
        parameter.grad = torch.ones(2)
        graphs.step(lambda: None, [parameter], [])
        assert torch.equal(parameter.grad, torch.ones(2))
    kept = [places[0] for places, _ in graphs._steps]
    assert kept == [parameter.data_ptr() for parameter in (parameters[0], *parameters[3:])]


def test_moved_weights_are_captured_anew(captures: list[int]) -> None:
    batch = [(seeded(len(LABELS), 16, seed=1), LABELS)]
    gca, other = make(True), make(False)
    train(gca, batch)
    train(other, batch)
    for parameter in gca.graph_network.parameters():
        parameter.data = parameter.data.clone()
    found, wanted = train(gca, batch), train(other, batch)
    assert len(captures) == 4 and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_other_switches_of_torch_are_captured_anew(captures: list[int]) -> None:
    batch, gca = [(seeded(len(LABELS), 16, seed=1), LABELS)], make(True)
    before = torch.backends.cuda.matmul.fp32_precision
    train(gca, batch)
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        train(gca, batch)
        assert len(captures) == 4
        torch.use_deterministic_algorithms(True)
        train(gca, batch)
        assert len(captures) == 6
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.matmul.fp32_precision = before


def test_a_cache_is_not_copied_and_goes_with_its_loss(captures: list[int]) -> None:
    gca = make(True)
    train(gca, [(seeded(len(LABELS), 16, seed=1), LABELS)])
    twin, again = copy.deepcopy(gca), pickle.loads(pickle.dumps(gca._graphs))
    assert twin._graphs.number != gca._graphs.number != again.number
    assert not twin._graphs._captured and not again._captured
    number = gca._graphs.number
    assert cuda_graph.cache(number) is gca._graphs
    del gca
    gc.collect()
    with pytest.raises(KeyError):
        cuda_graph.cache(number)


class Cuda:
    """A stand-in for torch.cuda: which device is the current one, whose stream, and what captures ask for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at, self.asked, self.pools, self.streamed = torch.device("cuda", 0), [], [], []
        for name in ("device", "stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", lambda: MagicMock(device=self.at))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: MagicMock(device=self.at))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", MagicMock)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
        monkeypatch.setattr(cuda_graph, "_streams", {})

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.at = self.at, device
        yield
        self.at = before

    @contextmanager
    def stream(self, stream: MagicMock) -> Iterator[None]:
        self.streamed.append(stream)
        with self.device(stream.device):
            yield

    @contextmanager
    def graph(
        self, graph: MagicMock, pool: object, stream: MagicMock | None = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        self.asked.append((stream, capture_error_mode))
        self.pools.append(pool)
        with self.device(self.at if stream is None else stream.device):
            yield


def test_a_capture_is_on_its_own_device_and_lets_other_threads_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, devices = Cuda(monkeypatch), [torch.device("cuda", number) for number in (1, 0, 1)]
    for device in devices:
        ran = []

        def run(ran: list[torch.device] = ran) -> list[Tensor]:
            ran.append(cuda.at)
            return []

        cuda_graph.capture(run, device)
        cuda_graph.record(run, device)
        assert ran == [device] * 4  # two to warm up, and two captures
    assert cuda.at == devices[1]
    assert [stream.device for stream, _ in cuda.asked] == [device for device in devices for _ in range(2)]
    assert len({id(stream) for stream, _ in cuda.asked}) == 2, "one stream a device: the library's memory is by stream"
    assert {mode for _, mode in cuda.asked} == {"thread_local"}
    assert set(cuda.streamed) == {stream for stream, _ in cuda.asked}, "it warms up on the stream that it captures"


def test_captures_of_a_loss_share_a_pool_on_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, caches = Cuda(monkeypatch), (GraphCache(), GraphCache())
    for cache in caches:
        for number in (0, 1, 0):
            device = torch.device("cuda", number)
            cuda_graph.capture(lambda: [], device, cache.pool(device))
            cuda_graph.record(lambda: None, device, cache.pool(device))
    own = [cuda.pools[:6], cuda.pools[6:]]
    assert all(len({id(pool) for pool in pools}) == 2 for pools in own)
    assert all(pools[0] is pools[1] is pools[4] is pools[5] and pools[2] is pools[3] for pools in own)
    assert not {id(pool) for pool in own[0]} & {id(pool) for pool in own[1]}, "two losses may run at once"
    assert caches[0].pool(torch.device("cpu")) is None


def test_a_cache_knows_what_its_graphs_hold(captures: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Per capture a stand-in for torch reserves 100 bytes more, of which 30 stay allocated."""
    counts = iter(range(100))

    def memory(_: torch.device) -> cuda_graph._Memory:
        made = (next(counts) + 1) // 2  # it is asked before and after each capture
        return cuda_graph._Memory(1000 + 100 * made, 500 + 30 * made)

    monkeypatch.setattr(cuda_graph, "_memory", memory)
    gca, cpu = make(True), torch.device("cpu")
    before = cuda_graph.idle_memory(cpu)
    for classes in (3, 4):
        train(gca, [(seeded(2 * classes, 16, seed=1), torch.arange(classes).repeat(2))])
    kinds = {captured.kind for captured in gca._graphs._captured.values()}
    assert [kind[0] for kind in sorted(kinds, key=lambda kind: kind[0])] == [(6, 16), (8, 16)]
    assert [gca._graphs.held_for(kind) for kind in kinds] == [200, 200] and gca._graphs.held_for("other") == 0
    assert gca._graphs.idle(cpu) == 4 * 70 and gca._graphs.idle(torch.device("cuda", 0)) == 0
    assert cuda_graph.idle_memory(cpu) - before == 4 * 70


def test_auto_counts_what_other_graphs_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step may take what is free, less what graphs keep for themselves, and what its own graphs hold already."""
    asked, cache = [], GraphCache()
    monkeypatch.setattr(prepare, "free_memory", lambda device: 1000)
    monkeypatch.setattr(prepare, "choose_memory", lambda size, free: asked.append(free) or "store")
    monkeypatch.setattr(cuda_graph, "idle_memory", lambda device: 300 if device.type == "cuda" else 0)
    monkeypatch.setattr(cache, "held_for", lambda kind: 250 if kind[0] == (8, 16) else 0)
    z = MagicMock(shape=torch.Size((8, 16)), dtype=torch.float32, device=torch.device("cuda", 0))
    settings = Engine("cuda", PassOptions("auto", None, cache))._settings(GraphNetwork(16, 8, heads=2), eager_batch())
    for graphs, free in ((cache.number, 950), (0, 700)):
        assert prepare.edge_memory(z, 8, settings._replace(graphs=graphs)) == "store"
        assert asked.pop() == free
    on_cpu = MagicMock(shape=torch.Size((8, 16)), dtype=torch.float32, device=torch.device("cpu"))
    prepare.edge_memory(on_cpu, 8, settings._replace(graphs=0))
    assert asked == [1000]


def eager_batch() -> Batch:
    draw = torch.zeros((), dtype=torch.int64)
    dropout = Dropout(0.1, 3, draw, True)
    return Batch(torch.randn(8, 16), torch.arange(4), 2, torch.rand(()), torch.rand(2, 1), dropout, True)


def test_refusals() -> None:
    z = seeded(len(LABELS), 16, seed=0)
    with pytest.raises(UserError, match="cuda_graph is 1; it must be True or False"):
        GCAHNGLoss(8, 16, cuda_graph=1)
    with pytest.raises(UserError, match="cuda_graph is True and the embeddings are on cpu; CUDA graphs need a CUDA"):
        GCAHNGLoss(8, 16, heads=2, cuda_graph=True)(z, LABELS)


@pytest.mark.parametrize("memory", few(["store", "hidden", "recompute"]))
@pytest.mark.parametrize("stages", ["torch", "cuda", "triton", "cuda+triton"])
def test_a_pass_neither_waits_nor_depends_on_data(stages: str, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without data: what would need a value raises. Kernels are left out."""
    products = ("mlp_in.product_forward", "mlp_in.product_backward", "mlp_out.product_forward", "edge_update.forward")
    for launcher in products:
        monkeypatch.setattr(f"gcahng.kernels.{launcher}", lambda *_: None)
    with FakeTensorMode(), torch.no_grad():
        network, classifier = GraphNetwork(16, 8, layers=2, heads=2), torch.nn.Linear(16, 8)
        draw = torch.zeros((), dtype=torch.int64)
        batch = Batch(
            torch.randn(12, 16), torch.arange(6), 2, torch.rand(()), torch.rand(2, 1), Dropout(0.1, 3, draw, True), True
        )
        s = Engine(stages, PassOptions(memory))._settings(network, batch)
        parameters, buffers = parameter_list(network), buffer_list(network)
        inputs = PassInputs(batch.z, batch.classes, batch.pull, batch.u, draw, parameters, buffers)
        metric_pass.__wrapped__(inputs, s, Wanted(True, True), Workspace())
        head = (classifier.weight.detach(), classifier.bias.detach())
        task = GeneratorTask(*head, None, GeneratorWeights(1.0, 1.0, 1.0), record=True)
        found = generator_pass.__wrapped__(inputs, s, task, Workspace())
        with pytest.raises(DataDependentOutputException):
            bool(found.values[0] > 0)
