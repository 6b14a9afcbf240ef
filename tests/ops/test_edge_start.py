"""Every implementation of edge_start against the reference: output, gradients, errors, compilation, determinism."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gcahng import UserError, _native
from gcahng.ops import edge_start
from gcahng.ops._implementations import OPS, available
from gcahng.reference.edge_start import edge_start as reference
from gcahng.testing import assert_close_to_truth, edge_start_inputs, nan_poisoned

SIZES = [(1, 1, 1), (5, 7, 13), (3, 37, 16), (17, 2, 515), (9, 9, 1040)]
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CPU_CASES = [
    *[(f"cpp-{arch}", dtype) for arch in _native.CPU_ARCHES for dtype in FLOATS[:3]],
    *[("torch", dtype) for dtype in FLOATS],
    *[("triton", dtype) for dtype in (torch.float32, torch.float64, torch.float16)],
]
GPU_CASES = [(impl, dtype) for impl in ("torch", "cuda", "triton") for dtype in FLOATS]


def use(name: str, device: str, dtype: torch.dtype) -> str:
    """The implementation's name; for cpp-<instruction set>, chooses that one. It must be there."""
    impl, _, arch = name.partition("-")
    if impl == "triton" and device == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels are compiled for the CUDA device in this process, not interpreted")
    reason = available(impl, device, "edge_start", dtype)
    assert reason is None, reason
    if arch:
        try:
            _native.set_cpu_arch(arch)
        except UserError as error:
            pytest.skip(str(error))
    return impl


@pytest.fixture(autouse=True)
def restore_cpu_arch():
    before = _native.cpu_arch()
    yield
    if before is not None:
        _native.set_cpu_arch(before)


def value_and_gradients(function, x_i: Tensor, x_j: Tensor, grad_e: Tensor) -> tuple[Tensor, ...]:
    e = function(x_i, x_j)
    return (e.detach(), *torch.autograd.grad(e, (x_i, x_j), grad_e))


def check_against_reference(name: str, device: str, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    impl = use(name, device, dtype)
    inputs = edge_start_inputs(*size, dtype=dtype, device=device)
    with nan_poisoned():
        actual = value_and_gradients(lambda a, b: edge_start(a, b, impl), *inputs)
    plain = value_and_gradients(reference, *inputs)
    wide = [x.detach().double() for x in inputs]
    truth = value_and_gradients(reference, wide[0].requires_grad_(), wide[1].requires_grad_(), wide[2])
    for what, *three in zip(("e", "dx_i", "dx_j"), actual, plain, truth, strict=True):
        assert_close_to_truth(*three, name=f"{name} {what}")


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("name", "dtype"), CPU_CASES, ids=str)
def test_matches_reference(name: str, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    check_against_reference(name, "cpu", dtype, size)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [*SIZES, (129, 65, 512)], ids=str)
@pytest.mark.parametrize(("name", "dtype"), GPU_CASES, ids=str)
def test_matches_reference_on_gpu(name: str, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    check_against_reference(name, "cuda", dtype, size)


@pytest.mark.parametrize("impl", ["torch", "cpp", "triton"])
def test_no_rows_or_columns(impl: str) -> None:
    impl = use(impl, "cpu", torch.float32)
    for rows, columns in ((0, 3), (3, 0), (0, 0)):
        inputs = edge_start_inputs(rows, columns, 4)
        for actual, expected in zip(
            value_and_gradients(lambda a, b: edge_start(a, b, impl), *inputs),
            value_and_gradients(reference, *inputs),
            strict=True,
        ):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("impl", ["torch", "cpp", "triton"])
def test_strided_inputs_and_expanded_gradient(impl: str) -> None:
    impl = use(impl, "cpu", torch.float32)
    base = edge_start_inputs(6, 10, 8)
    x_i, x_j = base.x_i.detach().t().contiguous().t(), base.x_j.detach()[::2]
    x_i.requires_grad_(), x_j.requires_grad_()
    actual = torch.autograd.grad(edge_start(x_i, x_j, impl).sum(), (x_i, x_j))  # an upstream gradient of strides 0
    expected = torch.autograd.grad(reference(x_i, x_j).sum(), (x_i, x_j))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["reference", "torch", "cpp"])
def test_gradcheck(impl: str) -> None:
    impl = use(impl, "cpu", torch.float64)
    x_i, x_j, _ = edge_start_inputs(3, 4, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: edge_start(a, b, impl), (x_i, x_j))
    assert torch.autograd.gradcheck(lambda a: edge_start(a, a, impl), (x_i,))  # a block on the diagonal


@pytest.mark.parametrize("impl", ["torch", "cpp", "triton"])
@pytest.mark.parametrize("constant_gradient", [True, False])
def test_second_derivative_is_an_error(impl: str, constant_gradient: bool) -> None:
    impl = use(impl, "cpu", torch.float32)
    x_i, x_j, grad_e = edge_start_inputs(3, 4, 5)
    e = edge_start(x_i, x_j, impl)
    loss = e.sum() if constant_gradient else (e * e * grad_e).sum()
    (dx_i,) = torch.autograd.grad(loss, x_i, create_graph=True)
    with pytest.raises(UserError, match="edge_start is differentiable once, not twice; impl='reference'"):
        dx_i.square().sum().backward()


def test_torch_func_is_an_error() -> None:
    x_i, x_j, _ = edge_start_inputs(3, 4, 5)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda a: edge_start(a, x_j.detach(), "torch").sum())(x_i.detach())


@pytest.mark.parametrize(("impl", "namespace"), [("cpp", "gcahng"), ("triton", "gcahng_triton")], ids=["cpp", "triton"])
@pytest.mark.parametrize("size", [(5, 7, 13), (0, 3, 4)], ids=str)
def test_opcheck(impl: str, namespace: str, size: tuple[int, int, int]) -> None:
    use(impl, "cpu", torch.float32)
    x_i, x_j, grad_e = (x.detach() for x in edge_start_inputs(*size))
    torch.library.opcheck(getattr(torch.ops, namespace).edge_start_fwd.default, (x_i, x_j))
    torch.library.opcheck(getattr(torch.ops, namespace).edge_start_bwd.default, (grad_e, x_i, x_j))


@pytest.mark.parametrize("impl", ["auto", "reference", "torch", "cpp", "triton"])
def test_compiles_whole(impl: str) -> None:
    inputs = edge_start_inputs(5, 7, 13)
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b: edge_start(a, b, impl) * 2, fullgraph=True)
    actual = value_and_gradients(compiled, *inputs)
    expected = value_and_gradients(lambda a, b: reference(a, b) * 2, *inputs)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_leaves_the_dtype() -> None:
    x_i, x_j, _ = edge_start_inputs(3, 4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert edge_start(x_i, x_j).dtype == torch.float32
        assert edge_start(x_i.bfloat16(), x_j.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("impl", ["torch", "cpp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads(impl: str, dtype: torch.dtype) -> None:
    inputs = edge_start_inputs(67, 131, 96, dtype=dtype)  # large enough to be shared out
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5, 2):
            torch.set_num_threads(count)
            results.append(value_and_gradients(lambda a, b: edge_start(a, b, impl), *inputs))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0], torch.ones(2, 3)), "x_i is a list: a tensor is needed"),
        ((torch.ones(3), torch.ones(2, 3)), r"x_i has shape \(3,\): \(rows, channels\) is needed"),
        ((torch.ones(2, 3), torch.ones(2, 3, 1)), r"x_j has shape \(2, 3, 1\)"),
        ((torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3)), "x_i has dtype torch.int64: a floating one"),
        ((torch.ones(2, 3), torch.ones(2, 4)), "x_j has 4 channels: x_i has 3"),
        ((torch.ones(2, 3), torch.ones(2, 3).double()), "x_j has dtype torch.float64: x_i has torch.float32"),
        ((torch.ones(2, 3), torch.ones(2, 3, device="meta")), "x_j is on meta: x_i is on cpu"),
        ((torch.ones(2, 3), torch.ones(2, 3), "numpy"), "impl='numpy': choose one of auto, reference, torch"),
        ((torch.ones(2, 3), torch.ones(2, 3), "cuda"), "impl='cuda' is not available for edge_start on cpu: .*CUDA"),
        ((torch.ones(2, 3).half(), torch.ones(2, 3).half(), "cpp"), "takes float32, float64, bfloat16, not float16"),
        ((torch.ones(2, 3).bfloat16(), torch.ones(2, 3).bfloat16(), "triton"), "not available for edge_start on cpu"),
    ],
)
def test_errors_name_the_argument(arguments: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        edge_start(*arguments)


def test_native_op_checks_what_it_gets() -> None:
    use("cpp", "cpu", torch.float32)
    fwd, bwd = torch.ops.gcahng.edge_start_fwd, torch.ops.gcahng.edge_start_bwd
    x = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="x_j has another shape"):
        fwd(x, torch.ones(2, 4))
    with pytest.raises(RuntimeError, match="x_j has another dtype"):
        fwd(x, x.double())
    with pytest.raises(RuntimeError, match="float32, float64 or bfloat16 is needed"):
        fwd(x.half(), x.half())
    with pytest.raises(RuntimeError, match="grad_e has another shape"):
        bwd(torch.ones(2, 2), x, x)


def test_auto_takes_the_first_of_the_list() -> None:
    assert OPS["edge_start"].cpu == ("cpp", "torch", "reference")
    assert OPS["edge_start"].cuda == ("cuda", "triton", "torch", "reference")
    x_i, x_j, _ = edge_start_inputs(2, 3, 4)
    assert torch.equal(edge_start(x_i, x_j), edge_start(x_i, x_j, "cpp"))
    half = [x.detach().half() for x in (x_i, x_j)]  # C++ does not take it, and auto goes on to torch
    assert torch.equal(edge_start(*half), edge_start(*half, "torch"))
