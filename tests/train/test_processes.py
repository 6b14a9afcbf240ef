"""`gcahng train` in several processes trains as one process does, and fails in all of them if one fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from killed_runs import differences
from process_cases import COUNT, LOSSES, NORMS, gpu_process, measured, norm_case, process, steps_in_double
from torch import nn

from gcahng import UserError, cli
from gcahng.cli import main
from gcahng.processes import ALONE, OtherProcessFailed, Processes, run_processes
from gcahng.train.batch_norm import share_batch_norm

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of each process."""
    folder, tree = tmp_path_factory.mktemp("processes"), tmp_path_factory.mktemp("tree")
    make_tree(tree)
    mp.spawn(process, (str(folder), str(tree)), nprocs=COUNT)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(COUNT)]


def make_tree(root: Path) -> None:
    """4 classes of 4 images, one of which is no image."""
    from PIL import Image

    for c in range(4):
        where = root / ("train" if c < 2 else "test") / f"class_{c}"
        where.mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (40, 40), (60 * c, 60 * i, 9)).save(where / f"{i}.png")
    (root / "train" / "class_1" / "2.png").write_bytes(b"no image")


@pytest.mark.processes
@pytest.mark.parametrize("loss", LOSSES)
def test_training_steps_are_those_of_one_process(loss: str, found: list[dict[str, Any]]) -> None:
    """BatchNorm, graph, losses, gradients, proxies and optimizers are equal up to the order of sums."""
    wanted = steps_in_double(loss, ALONE)
    assert any(name.startswith("model ") for name in wanted) and "loss of step 3" in wanted
    for rank in range(COUNT):
        mine = found[rank]["double"][loss]
        assert mine.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(
                mine[name], value, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
            )
    for name in wanted:
        if name.startswith("model "):
            assert torch.equal(found[0]["double"][loss][name], found[1]["double"][loss][name]), f"{name} drifts apart"


@pytest.mark.processes
@pytest.mark.parametrize("case", range(len(NORMS)))
def test_batch_norm_of_a_shared_batch(case: int, found: list[dict[str, Any]]) -> None:
    wanted = norm_case(ALONE, *NORMS[case])
    for rank in range(COUNT):
        mine, part = found[rank]["norm"][case], slice(rank * 6, rank * 6 + 6)
        assert mine.keys() == wanted.keys()
        for name, value in wanted.items():
            value = value[part] if name in ("out", "gradient", "evaluated") else value
            torch.testing.assert_close(
                mine[name], value, rtol=1e-10, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_batch_norms_that_keep_their_statistics_stay_and_others_are_refused() -> None:
    class Odd(nn.BatchNorm2d):
        pass

    frozen = nn.Sequential(nn.BatchNorm2d(3).eval(), Odd(3).eval())
    share_batch_norm(frozen, None, "this")  # type: ignore[arg-type]
    assert [type(module) for module in frozen] == [nn.BatchNorm2d, Odd]
    with pytest.raises(UserError, match=r"backbone.name is timm:x, whose Odd cannot be shared .*freeze_bn to true"):
        share_batch_norm(nn.Sequential(Odd(3)), None, "timm:x")  # type: ignore[arg-type]


@pytest.mark.processes
def test_an_evaluation_is_that_of_one_process(found: list[dict[str, Any]]) -> None:
    metrics, embeddings = measured(ALONE)
    assert all(process["measured"][0] == metrics for process in found)
    assert torch.equal(found[0]["measured"][1], embeddings) and len(found[1]["measured"][1]) < len(embeddings)


@pytest.mark.processes
def test_processes_drop_out_apart(found: list[dict[str, Any]]) -> None:
    assert len({process["seed"] for process in found}) == COUNT


@pytest.mark.processes
def test_a_run_goes_to_its_end(found: list[dict[str, Any]]) -> None:
    first, second = (process["runs"]["whole"] for process in found)
    assert first == second and first["steps"] == 9 and first["processes"] == COUNT
    assert 0 < first["test"]["map@r"] < 1 and first["val"].keys() >= {"map@r"}


@pytest.mark.processes
def test_a_signal_to_one_process_stops_all_and_the_run_goes_on_with_the_same_bits(found: list[dict[str, Any]]) -> None:
    assert [process["runs"]["exit code"] for process in found] == [128 + signal.SIGTERM] * COUNT
    whole, stopped = found[0]["runs"]["outcomes"]
    assert whole["last.pt"]["processes"] == COUNT
    assert differences(whole, stopped) == []
    assert found[1]["runs"]["resumed"] == found[1]["runs"]["resumed again"] == found[0]["runs"]["resumed"]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("what", "first", "second"),
    [
        ("odd", "UserError: data.classes_per_batch is 3 and data.samples_per_class 3; their product must", "failed"),
        ("gpu", "UserError: device is 'cuda:1'; each of 2 processes takes a GPU of its own: give cuda", "failed"),
        ("full disk", "CannotWrite: ", "OtherProcessFailed: process 0 of 2 failed and says why"),
        ("broken pipe", "BrokenPipeError", "OtherProcessFailed: process 0 of 2 failed and says why"),
        ("not finite", "NonFinite: the largest embedding is", "NonFinite: the largest embedding is"),
    ],
)
def test_what_goes_wrong_ends_all(what: str, first: str, second: str, found: list[dict[str, Any]]) -> None:
    assert found[0]["failures"][what].startswith(first)
    assert second in found[1]["failures"][what]


@pytest.mark.processes
def test_not_finite_in_one_process_is_told_with_the_whole_batch(found: list[dict[str, Any]]) -> None:
    assert "at step 3" in found[0]["failures"]["not finite"] and "--resume" in found[0]["failures"]["not finite"]
    (line,) = found[0]["failures"]["written"].splitlines()
    assert json.loads(line)["step"] == 3 and len(json.loads(line)["images"]) == 12


@pytest.mark.processes
def test_a_file_that_cannot_be_read_ends_all_or_is_counted_once(found: list[dict[str, Any]]) -> None:
    strict = [process["unreadable"]["strict"] for process in found]
    (told,) = (text for text in strict if text.startswith("UnreadableImage: "))
    assert "class_1/2.png" in told
    assert sum(text.startswith("OtherProcessFailed: process") for text in strict) == COUNT - 1
    # Two classes of four images: each image is in every batch. Nine steps, one process has drawn it each time.
    assert [process["unreadable"]["lenient"] for process in found] == [9] * COUNT


@pytest.mark.processes
def test_a_machines_first_process_goes_first(found: list[dict[str, Any]]) -> None:
    assert [process["turns"] for process in found] == [(False, 1, [0, 10]), (True, 1, [0, 10])]


@pytest.mark.parametrize(("length", "multiple", "count"), [(12, 1, 3), (1000, 256, 2), (1000, 256, 8), (5, 256, 3)])
def test_parts_cover_everything_once(length: int, multiple: int, count: int) -> None:
    processes = [Processes() for _ in range(count)]
    for rank, one in enumerate(processes):
        one.rank, one.count = rank, count
    parts = [list(range(length))[one.part(length, multiple)] for one in processes]
    assert [i for part in parts for i in part] == list(range(length))
    assert all(part[0] % multiple == 0 for part in parts if part)


@pytest.mark.gpu
def test_gpus_train_as_one(tmp_path: Path) -> None:
    """With NCCL: one GPU is enough to make the calls, two share the work."""
    count = max(c for c in (1, 2, 4) if c <= torch.cuda.device_count())  # 12 samples in equal parts
    mp.spawn(gpu_process, (count, str(tmp_path)), nprocs=count)
    for loss in LOSSES:
        wanted = steps_in_double(loss, ALONE, "cuda")
        for rank in range(count):
            mine = torch.load(tmp_path / f"{rank}.pt", weights_only=True)[loss]
            assert mine.keys() == wanted.keys()
            for name, value in wanted.items():
                torch.testing.assert_close(mine[name], value, rtol=1e-8, atol=1e-9, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("local_rank", [None, "3"])
def test_a_script_that_gave_its_processes_gpus_keeps_them(
    local_rank: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        with run_processes() as alone:
            assert alone is ALONE and dist.is_initialized()
    finally:
        dist.destroy_process_group()
    assert taken == ([] if local_rank is None else [3])


# -- as torchrun starts it


def torchrun(*arguments: str, cwd: Path, program: tuple[str, ...] = ("-m", "gcahng")) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(COUNT)]
    return subprocess.Popen(
        [*command, *program, "train", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


SMALL = ["--device", "cpu", "--eval_every", "1000", "--data.val_classes", "4", "--backbone.width", "4"]


@pytest.mark.slow
def test_torchrun_trains_stops_and_goes_on(tmp_path: Path) -> None:
    run = torchrun(*SMALL, "--steps", "1000", "--log_every", "1", "--out", "run", cwd=tmp_path)
    until = time.monotonic() + 120
    while not (log := tmp_path / "run" / "metrics.jsonl").exists() or not log.read_text().count("\n"):
        assert run.poll() is None and time.monotonic() < until
        time.sleep(0.2)
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=120)
    assert run.returncode != 0 and out.count("2 processes on cpu") == 1
    assert (
        err.count("gcahng: interrupted after step") == 1
        and "torchrun --nproc-per-node 2 -m gcahng train --resume run" in err
    )
    steps = torch.load(tmp_path / "run" / "checkpoints" / "last.pt")["step"]
    again = torchrun("--resume", "run", "--skip_nonfinite", "1", cwd=tmp_path)
    first = again.stdout.readline()  # type: ignore[union-attr]
    again.send_signal(signal.SIGTERM)
    again.communicate(timeout=120)
    assert f"continues in run after step {steps}" in first


# torchrun ends all processes soon after the first has ended; the one that tells need not be that.
LATE = """
import os, sys, time
from gcahng import cli
from gcahng.cli import main
if os.environ["RANK"] == "0":
    time.sleep(2)
sys.exit(main())
"""


@pytest.mark.parametrize(("cause", "seconds"), [(None, cli.WAIT_FOR_MESSAGE), (KeyboardInterrupt(), 1)])
def test_a_process_that_says_nothing_waits_for_the_one_that_does(
    cause: BaseException | None,
    seconds: float,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    @contextmanager
    def no_first_process() -> Iterator[Processes]:
        raise OtherProcessFailed("process 0 of 2 failed and says why") from cause
        yield

    waited: list[float] = []
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("gcahng.processes.run_processes", no_first_process)
    monkeypatch.setattr("time.sleep", waited.append)
    assert main(["train", "--steps", "3"]) == 2 and waited == [seconds]
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_torchrun_says_a_mistake_once(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(LATE)
    mistakes = ((["--stepz", "3"], "--stepz is not an option"), (["--data.classes_per_batch", "7"], "multiple"))
    for arguments, told in mistakes:
        run = torchrun(*SMALL, *arguments, cwd=tmp_path, program=("late.py",))
        _, err = run.communicate(timeout=120)
        assert run.returncode != 0 and err.count("gcahng: error:") == 1 and told in err
    assert not (tmp_path / "runs").exists()


TWO_RUNS = """
from gcahng.train import DataConfig, TrainConfig, fit

data = DataConfig(classes_per_batch=4, train_classes=8, val_classes=4)
for out in ("one", "two"):
    config = TrainConfig(out=out, loss="npair", device="cpu", steps=2, eval_every=2, data=data)
    assert fit(config)["processes"] == 2
"""


@pytest.mark.slow
def test_a_script_trains_one_run_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "two_runs.py").write_text(TWO_RUNS)
    run = torchrun(cwd=tmp_path, program=("two_runs.py",))
    _, err = run.communicate(timeout=180)
    assert run.returncode == 0, err
    assert (tmp_path / "two" / "summary.json").exists()


def test_a_finished_run_is_told_by_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("steps: 1")
    summary = {"test": {"map@r": 0.5}, "best": {}, "steps": 1, "seconds": 1.0, "left_out": 0, "unreadable": 0}
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"loss": "npair", "data_digest": "0"}))
    second = Processes()
    second.first = False
    monkeypatch.setattr("gcahng.processes.run_processes", lambda: nullcontext(second))
    assert main(["train", "--resume", str(tmp_path)]) == 0
    assert capsys.readouterr() == ("", "")
