"""Settings that hold for every test."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from importlib.metadata import PackageNotFoundError, version

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the processors: threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported

pytest_plugins = ["shared_files", "small_runs", "installs", "browsers"]  # fixtures


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """A selection of tests starts at once, in this process; all tests are shared by a worker for each processor."""
    selected = config.args_source is not pytest.Config.ArgsSource.TESTPATHS or config.option.keyword
    return 0 if selected else None


@pytest.fixture(autouse=True)
def bfloat16_interpreted(request: pytest.FixtureRequest) -> None:
    """Where Triton's kernels are interpreted, bf16 is computed as on a GPU."""
    if request.node.get_closest_marker("simulated") and os.environ.get("TRITON_INTERPRET") == "1":
        from gcahng.testing.interpreter import interpret_bfloat16

        interpret_bfloat16()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Runs a test with one thread, or with as many as OMP_NUM_THREADS asks for."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    yield
    torch.set_num_threads(before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """A test that fails for nothing but a Triton whose interpreter the installed numpy breaks is skipped."""
    try:
        return (yield)
    except Exception as error:
        reason = _interpreter_fails()
        if reason and (reason in str(error) or "only 0-dimensional arrays can be converted" in str(error)):
            pytest.skip(reason)
        raise


def _interpreter_fails() -> str | None:
    from gcahng.availability import interpreter_fails

    try:
        return interpreter_fails(version("triton"), version("numpy"))
    except PackageNotFoundError:
        return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a CUDA device are skipped without one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))
