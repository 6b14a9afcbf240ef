"""GCAHNG_AUTO: what "auto" takes on CUDA where a measurement says otherwise."""

from __future__ import annotations

import pytest
import torch
from engine_cases import Case
from gcahng.losses.passes import joined, passes_for

from gcahng import UserError
from gcahng.engine import auto, fused
from gcahng.env import _choices

CUDA = torch.device("cuda")


@pytest.fixture
def all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("gcahng.engine.auto", "gcahng.losses.passes", "gcahng.ops._implementations"):
        monkeypatch.setattr(f"{module}.available", lambda *_: None)


def test_what_it_may_say() -> None:
    assert auto.parse("triton") == ("triton", {})
    assert auto.parse("cuda+triton,mix_fwd_=triton,gate_bwd_=triton") == (
        "cuda+triton",
        {"mix_fwd_": "triton", "gate_bwd_": "triton"},
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cudnn", "GCAHNG_AUTO is cudnn; it must begin with one of cuda.triton, cuda, triton, torch"),
        ("reference", "it must begin with one of"),
        (
            "cuda,mixing=triton",
            "GCAHNG_AUTO is cuda,mixing=triton; .* each part must be OP=cuda or OP=triton, with OP one",
        ),
        ("cuda,mix_fwd_=cpp", "each part must be OP=cuda or OP=triton"),
        ("cuda,mix_fwd_", "each part must be OP=cuda or OP=triton"),
        ("torch,mix_fwd_=cuda", "after cuda.triton, cuda or triton each part"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        auto.parse(text)


def test_what_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "available", lambda impl, *_: "it is not built" if impl == "cuda" else None)
    monkeypatch.setenv("GCAHNG_AUTO", "triton,mix_fwd_=cuda")
    with pytest.raises(
        UserError, match="GCAHNG_AUTO is triton,mix_fwd_=cuda and cuda is not available on cuda: it is not"
    ):
        auto.wished()


@pytest.mark.usefixtures("all_there")
def test_auto_follows_it_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert joined("cuda", "cuda") == "cuda+triton"
    monkeypatch.setenv("GCAHNG_AUTO", "triton, mix_fwd_=cuda")
    assert joined("cuda", "cuda") == passes_for("auto", CUDA, "auto", None).stages == "triton,mix_fwd_=cuda"
    assert passes_for("cuda", CUDA, "auto", None).stages == "cuda"
    assert joined("cpp", "cpu") == "cpp"
    (loss,) = (text for op, text in _choices() if op == "loss")
    assert loss.endswith("triton,mix_fwd_=cuda (as GCAHNG_AUTO asks) on cuda")
    monkeypatch.setenv("GCAHNG_AUTO", "")
    assert joined("cuda", "cuda") == "cuda+triton"
    monkeypatch.setenv("GCAHNG_AUTO", "cudnn")
    (loss,) = (text for op, text in _choices() if op == "loss")
    assert "none (GCAHNG_AUTO is cudnn; it must begin" in loss


def test_ops_come_from_where_they_are_asked_for() -> None:
    routed = fused.stage_ops("cuda+triton,mix_fwd_=triton")
    assert routed.mix_fwd_ is torch.ops.gcahng_triton.mix_fwd_
    assert routed.mix_bwd_z_ is torch.ops.gcahng.mix_bwd_z_
    assert fused.stage_ops("triton,mix_fwd_=cuda").mix_fwd_ is torch.ops.gcahng.mix_fwd_
    assert fused.stage_ops("triton,mix_fwd_=cuda").gate_fwd_ is torch.ops.gcahng_triton.gate_fwd_


def test_a_step_of_two_implementations(monkeypatch: pytest.MonkeyPatch) -> None:
    """C++ stages, with two ops by Triton's interpreter."""
    pytest.importorskip("triton")
    case = Case(classes=3, views=2, dim=8, layers=1, heads=2)
    found = []
    for routes in ("cpp", "cpp,norm_gelu_=triton,mix_fwd_=triton"):
        monkeypatch.setattr("gcahng.losses.passes.joined", lambda *_, routes=routes: routes)
        z, labels = case.batch(dtype=torch.float32)
        z.requires_grad_()
        gca = case.loss("auto", torch.float32)
        gca(z, labels).backward()
        found.append({"dz": z.grad, **gca.generator_step()})
    assert found[0]["J_syn"] > 0
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
