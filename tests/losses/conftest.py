"""The contract is tested for every implementation of the loss."""

from __future__ import annotations

import loss_cases
import pytest


@pytest.fixture(params=loss_cases.IMPLEMENTATIONS)
def implementation(request, monkeypatch) -> str:
    """make_loss uses this implementation."""
    monkeypatch.setattr(loss_cases, "implementation", request.param)
    return request.param
