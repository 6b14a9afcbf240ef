"""The engine's ops as torch knows them: schemas, fakes, and what they check of their arguments."""

from __future__ import annotations

import pytest
import torch
from engine_cases import Case
from torch import Tensor

from gcahng.engine.schema import OPS, TRITON

SMALL = Case(classes=4, views=2, dim=8, heads=2, tile_rows=20)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_opcheck(autocast, recorded):
    for name, calls in recorded(SMALL, 2, autocast).items():
        for call in calls:
            op = getattr(torch.ops.gcahng, name).default
            torch.library.opcheck(op, call, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.simulated
def test_opcheck_of_triton_ops(recorded):
    for name, (call,) in recorded(SMALL, 1).items():
        op = getattr(getattr(torch.ops, TRITON), name).default
        torch.library.opcheck(op, call, test_utils=("test_schema", "test_faketensor"))


def test_ops_check_what_they_get(recorded):
    """Memory is written through raw pointers: a tensor of another size or type must not get there."""
    for name, (arguments,) in recorded(SMALL, 1).items():
        op = getattr(torch.ops.gcahng, name)
        for place, argument in enumerate(arguments):
            if not isinstance(argument, Tensor) or argument.dim() == 0:
                continue
            before, after = arguments[:place], arguments[place + 1 :]
            strided = argument.repeat_interleave(2, dim=-1)[..., ::2]
            for wrong in (argument.half(), argument.flatten()[:1].clone(), strided):
                with pytest.raises(RuntimeError, match=f"gcahng::{name[:4]}"):
                    op(*before, wrong, *after)


def test_every_op_is_in_both_namespaces():
    for name, op in OPS.items():
        for namespace in ("gcahng", TRITON):
            schema = getattr(getattr(torch.ops, namespace), name).default._schema
            assert len(schema.arguments) == len(op.flat(*(empty(struct) for struct in op.structs)))
            assert any(argument.is_write for argument in schema.arguments)


def empty(struct: type) -> tuple:
    """A NamedTuple of Nones."""
    return struct(*[None] * len(struct._fields))
