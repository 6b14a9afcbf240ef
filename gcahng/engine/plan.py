"""Predicts what a training step takes from its sizes: memory by mode, arithmetic, and the largest batch that fits.

Memory is counted from what the engine allocates, in bytes at the peak of a step. It does not include the loss's
weights, their gradients and the optimizers' state, which `state_bytes` counts. Arithmetic is counted in multiply-adds
of matrix products (two FLOPs each).
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from gcahng.engine.masks import MASKS_AT_ONCE
from gcahng.engine.shared_attention import shares_attention
from gcahng.engine.stages.cross_entropy import LOGITS_AT_ONCE
from gcahng.engine.step_size import StepSize, tiling
from gcahng.errors import UserError

MODES = ("hidden", "store", "recompute")
LIBRARIES, LOW_PACKED = 4 << 20, 36 << 20
# Parts of free memory that edge_memory="auto" lets a step take.
COMFORTABLE, FULL = 0.5, 0.8


class Work(NamedTuple):
    """Multiply-adds of a step.

    Attributes:
        edges: on edges.
        negatives: of the classifier on synthetic negatives.
        nodes: on nodes, the classifiers on the batch included. Processes repeat them, but for shared attention.
    """

    edges: int
    negatives: int
    nodes: int

    @property
    def total(self) -> int:
        """All multiply-adds."""
        return sum(self)


# -- arithmetic


def edge_products(layers: int, memory: str) -> int:
    """Counts the D × D products per edge that the engine does in a step.

    A symmetric schedule has one edge per unordered pair. The forward of a layer takes 1 product for edge to node, and 8
    for the MLP (4 for each half). Its backward takes 16 for the MLP, 4 more if the MLP's first product is replayed, and
    3 for edge to node (replay, weights, edges). The head takes 1, and 2 more if it has a gradient. Phase 1 leaves out
    the backward of the last layer's edges, and phase 3 the gradient of the edge start.

    Args:
        layers: layers L.
        memory: store, hidden or recompute.
    """
    if memory == "recompute":
        return _recomputed_products(layers)
    _check_mode(memory)
    mlp = 16 if memory == "hidden" else 20
    metric = 9 * layers + 1 + mlp * (layers - 1) + 3 * layers
    generator = 9 * layers + 4 + mlp * layers + 3 * layers - 1
    return metric + generator


def floor_products(layers: int, replay: bool) -> int:
    """Counts the D × D products per edge that a step has to do at least if it stores its edges.

    With the MLP's first product replayed they are 64 L − 16 (56 D² n² multiply-adds at L = 2). With nothing computed
    twice they are 54 L − 13 (47.5 D² n²).

    Args:
        layers: layers L.
        replay: whether the MLP's first product is replayed.
    """
    return 64 * layers - 16 if replay else 54 * layers - 13


def _recomputed_products(layers: int) -> int:
    """edge_products of the mode that stores no edges."""
    forward = layers + 4 * layers * (layers + 1)  # a sweep of layer l runs the l layers below it again
    metric = forward + 2 * (8 * layers + 1)
    generator = forward + (8 * layers + 1) + (8 * layers + 3)
    for top, phase in ((layers - 2, 1), (layers - 1, 3)):
        for layer in range(top + 1):
            above = range(layer + 1, top + 1)
            work = 8 * (top + 1) + 16 + 8 * len(above)
            # Edge to node above each of these layers: the replay and the edges' gradient, and once the weights'.
            work += sum(2 for at in (layer, *above) if at + 1 < layers) + (1 if layer + 1 < layers else 0)
            if phase == 3:
                generator += work + 2
            else:
                metric += work
    start = 8 * (layers - 1) + 2 * (layers - 1) + 8 * (layers - 1) if layers > 1 else 0
    return metric + start + 3 + generator + 2


def work(size: StepSize, memory: str) -> Work:
    """Counts the arithmetic of one step.

    Args:
        size: of the step.
        memory: store, hidden or recompute.
    """
    n, d, layers, m = size.batch, size.dim, size.layers, size.classes
    rows = size.rows
    passes = 1 + layers if memory == "recompute" else 1
    mixes = n * n // size.views // size.ranks
    # Each product of a node layer (16 D²) and of the input has two in its backward, but for the last layer's tokens
    # in phase 1 and the embeddings' gradient in phase 3.
    # Attention: 2 n² D forward, 5 backward.
    attention = 14 * layers * n * n * d
    if shares_attention(n, size.device, size.ranks):
        attention //= size.ranks
    nodes = n * d * d * (6 * (16 * layers + 1) - 9) + attention + 5 * n * m * d
    return Work(edge_products(layers, memory) * rows * d * d, 2 * passes * mixes * m * d, nodes)


# -- memory


def parameters(size: StepSize) -> int:
    """Number of weights that are trained: those of the graph network and of the classifier."""
    d, m = size.dim, size.classes
    return generator_parameters(size) + d + 2 * (m * d + m)


def generator_parameters(size: StepSize) -> int:
    """Number of weights with a gradient in phase 3."""
    d = size.dim
    return size.layers * (25 * d * d + 31 * d) + 2 * d * d + 3 * d


def metric_parameters(size: StepSize) -> int:
    """Number of weights with a gradient in phase 1."""
    d, m = size.dim, size.classes
    return generator_parameters(size) + d + m * d + m - (12 * d * d + 19 * d) - (d * d + 2 * d)


def state_bytes(size: StepSize) -> int:
    """Bytes of weights, gradients and the optimizers' two moments."""
    return 4 * parameters(size) * size.accumulate.itemsize


def expected_terms(size: StepSize, memory: str) -> dict[str, int]:
    """Lists what a step holds at its peak beyond its state.

    Args:
        size: of the step.
        memory: store, hidden or recompute.

    Returns:
        Bytes by kind of tensor.

    Raises:
        UserError: `memory` is no such mode.
    """
    _check_mode(memory)
    return max(_moments(size, memory).values(), key=lambda terms: sum(terms.values()))


@lru_cache(maxsize=256)
def expected_bytes(size: StepSize, memory: str) -> int:
    """Bytes of a step's peak beyond its state: its tensors, and on the CPU the overhead beside them."""
    return sum(expected_terms(size, memory).values()) + (cpu_overhead(size, memory) if size.device == "cpu" else 0)


def cpu_overhead(size: StepSize, memory: str) -> int:
    """Bytes that a process on the CPU holds beyond its tensors, as measured with glibc.

    They are code that runs for the first time, the memory into which oneDNN packs operands (more if products are in
    bf16), and freed memory that the heap does not give back: six tenths of the gradients, which are freed as a step
    begins, and two tiles of logits.
    """
    packed = LOW_PACKED if size.compute is not size.accumulate else 0
    heap = 6 * parameters(size) // 10 + 2 * _rows_at_once(size, memory) * size.classes
    return LIBRARIES + packed + heap * size.accumulate.itemsize


def _rows_at_once(size: StepSize, memory: str) -> int:
    """Number of negatives whose logits exist at the same time."""
    return min(tiling(size, memory).mixes, max(1, LOGITS_AT_ONCE // size.classes))


def _moments(size: StepSize, memory: str) -> dict[str, dict[str, int]]:
    """What a step holds at each moment that may be its peak, in bytes by kind of tensor.

    For either phase these moments are the sweep that forms the losses, and the last sweep of the backward (in recompute
    mode the losses are formed again there). Another is when the gradients of phase 1 are scaled.
    """
    n, d, m = size.batch, size.dim, size.classes
    a, c = size.accumulate.itemsize, size.compute.itemsize
    low = size.compute is not size.accumulate
    mixes = tiling(size, memory).mixes
    at_once = _rows_at_once(size, memory)
    if size.stages == "torch":
        # Logits and their log-probabilities, and the next rows' logits where there are such.
        logits = m * (2 * at_once + min(at_once, mixes - at_once)) * a + at_once * (m if low else 0) * c
        diversity = 2 * tiling(size, memory).rows * d * a  # J_div's gradient
        negatives = mixes * d * a + max(logits + at_once * d * c, 2 * mixes * d * a, diversity)
    else:  # logits in the workspace; rows as operands, and their gradient
        negatives = at_once * (m + (2 if low else 1) * d) * c
    vectors = 2 * tiling(size, memory).rows * d * a + (4 * d * d * c if low else 0)
    entropy = 2 * n * m * a + (n * m * c if low else 0)
    pairs = 3 * size.views * (n // size.views) ** 2 * a
    moments = {}
    for phase, formed, losses in ((1, metric_parameters(size), pairs), (3, generator_parameters(size), negatives)):
        held = _held(size, memory, phase)
        again = memory == "recompute" and phase == 3
        early = 10 * d * d if again else 2 * d * d
        moments[f"losses of phase {phase}"] = held | {
            "gradients, less the state's": (early - parameters(size)) * a,
            "node tensors": _node_bytes(size, memory, size.layers),
            "tiles": _tile_bytes(size, memory, losses=True),
            "losses": losses,
        }
        moments[f"backward of phase {phase}"] = held | {
            "gradients, less the state's": (formed - parameters(size)) * a,
            "node tensors": _node_bytes(size, memory, 1),
            "tiles": _tile_bytes(size, memory, losses=False),
            "losses": max(vectors, losses)
            if again and size.stages != "torch"
            else vectors + (entropy if phase == 1 else 0),
        }
    moments["gradients of phase 1"] = {  # as formed, and scaled by the upstream gradient; phase 3's are scaled in place
        "gradients, less the state's": (2 * metric_parameters(size) - parameters(size)) * a,
        "tiles": _tile_bytes(size, memory, losses=False) if size.stages != "torch" else 0,
    }
    return moments


def _held(size: StepSize, memory: str, phase: int) -> dict[str, int]:
    """What a phase holds from its beginning to its end, in bytes by kind of tensor."""
    n, d, layers = size.batch, size.dim, size.layers
    a, c, e = size.accumulate.itemsize, size.compute.itemsize, size.edge_dtype.itemsize
    low = size.compute is not size.accumulate
    rows = size.rows
    terms = {}
    if memory != "recompute":
        terms["edges, one vector a layer"] = layers * rows * d * e + 2 * layers * rows * a
        if phase == 3:  # in phase 1 they take the place of the last layer's edges
            terms["edges' gradients"] = rows * d * e
    if memory == "hidden":
        terms["hidden pre-activations"] = layers * rows * 4 * d * c
    terms["prepared weights"] = (7 * layers + 1) * d * d * c
    if low:
        terms["prepared weights"] += (18 * layers + 2) * d * d * c + (size.classes * d * c if phase == 3 else 0)
    # Who attends to whom, and of every negative its place, node, class and label, whether it counts, and two losses.
    terms["pairs of nodes"] = n * (n + 1) * c + n * n // size.views // size.ranks * (4 * 8 + 1 + 2 * a)
    return terms


def _node_bytes(size: StepSize, memory: str, recorded: int) -> int:
    """Bytes of node tensors, and of the sums over edges, whose bands wrap around.

    The workspace holds 7 n D values of each layer in the products' dtype and 3 n D in the accumulating one. 12 n D and
    3 n D more are saved for each of the `recorded` layers, whose backward is still to come.
    """
    n, d, layers = size.batch, size.dim, size.layers
    a, c = size.accumulate.itemsize, size.compute.itemsize
    band = (size.batch // size.views + tiling(size, memory).reach) * size.views * d * a
    saved = recorded * (12 * c + 3 * a) + layers * (7 * c + 3 * a)
    return n * d * (saved + 6 * a + 8 * c) + (4 * layers + 8) * band


def _tile_bytes(size: StepSize, memory: str, losses: bool) -> int:
    """Bytes of tile-sized memory: the workspace of fused stages, or the temporaries of plain torch.

    `losses` says whether the moment is that in which the losses are formed, or else the backward.
    """
    a, c, layers = size.accumulate.itemsize, size.compute.itemsize, size.layers
    low = size.compute is not size.accumulate
    # Bytes per channel and edge of a tile.
    if size.stages != "torch":
        e = c if size.narrow else a
        pair = e + (c if low and not size.narrow else 0)
        # p, product and scaled; g and dn; edges in, e1 and out; the head's p, dy and theta; dtheta; negatives and dn.
        each = (3 + 8) * c + 3 * pair + 2 * c + e + e + 4 * a / size.views
        if low and not size.narrow:
            each += c
        if low or size.edge_dtype is not size.accumulate or memory == "recompute":
            each += e
        if memory == "recompute":  # of every layer: e and e1, hidden pre-activations, s
            each += layers * (2 * pair + 4 * c + e) + pair
    elif losses:
        each = 6 * a + (layers * (4 * a + 4 * c) if memory == "recompute" else 0)
    elif memory == "recompute":
        each = 14 * a + 12 * c + (layers - 1) * (10 * a + 5 * c)
    else:
        each = 17 * a + (6 if memory == "hidden" else 10) * c
    # Masks are drawn for some tiles at a time, in 64-bit integers.
    masks = 160 * min(size.rows, MASKS_AT_ONCE + tiling(size, memory).rows) if size.stages == "torch" else 0
    return int(tiling(size, memory).rows * size.dim * each) + masks


# -- choices


def choose_memory(size: StepSize, free: int | None) -> str:
    """Decides what edge_memory="auto" means for a training step.

    "hidden" is the fastest, and is taken if its step fits into half of the free memory. Otherwise "store" is taken if
    its step fits into eight tenths, and else "recompute". Where free memory is not known, it is "store".

    Args:
        size: of the step.
        free: bytes of free memory, or None.

    Returns:
        store, hidden or recompute.
    """
    if free is None:
        return "store"
    if expected_bytes(size, "hidden") <= COMFORTABLE * free:
        return "hidden"
    return "store" if expected_bytes(size, "store") <= FULL * free else "recompute"


def largest_batch(size: StepSize, memory: str, limit: int) -> int | None:
    """Finds the largest batch that fits into memory.

    Args:
        size: of a step with any batch. Everything but the batch is taken from it; there are more training classes if a
            batch has more.
        memory: store, hidden or recompute.
        limit: bytes that a step may take, its state included.

    Returns:
        Samples n, or None if not even two classes fit.
    """

    def fits(classes: int) -> bool:
        candidate = replace(size, batch=classes * size.views, classes=max(size.classes, classes))
        return state_bytes(candidate) + expected_bytes(candidate, memory) <= limit

    low, high = 2, 4
    if not fits(low):
        return None
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * size.views


def _check_mode(memory: str) -> None:
    if memory not in MODES:
        raise UserError(f"edge_memory is {memory!r}; it must be one of {', '.join(MODES)}")
