"""The contract is tested for every implementation of the loss."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import loss_cases
import pytest


@pytest.fixture(params=loss_cases.IMPLEMENTATIONS)
def implementation(request, monkeypatch) -> str:
    """make_loss uses this implementation."""
    monkeypatch.setattr(loss_cases, "implementation", request.param)
    return request.param


@pytest.fixture
def no_other_warning() -> Iterator[None]:
    """A warning that a test does not expect fails it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
