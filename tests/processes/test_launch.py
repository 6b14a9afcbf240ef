"""How a process finds out that it is one of several, and what it says of the others."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gcahng import UserError
from gcahng.cli import main
from gcahng.devices import local_device_index
from gcahng.engine.peers import Peer, difference, says_lost, this_process
from gcahng.errors import UserNote
from gcahng.launch import Launch, launched
from gcahng.processes.meeting import meet
from gcahng.streams import print_line

WORLD = {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch(0, 1, 0)),
        (WORLD, Launch(3, 4, 0)),
        ({**WORLD, "LOCAL_RANK": "1"}, Launch(3, 4, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Launch(0, 1, 0)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4", **WORLD}, Launch(3, 4, 0)),
        # A batch script that asked for 4 tasks is one process itself.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "ENVIRONMENT": "BATCH"}, Launch(0, 1, 0)),
    ],
)
def test_what_the_environment_says(environment: dict[str, str], expected: Launch) -> None:
    assert launched(environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"},
            r"srun started 2 processes \(SLURM_NTASKS\).*srun --ntasks-per-node",
        ),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "ENVIRONMENT": "BATCH"}, "srun started 2 processes"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "mpirun started 2 processes.*torchrun --nproc"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "mpiexec started 2 processes"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and RANK, MASTER_ADDR, MASTER_PORT are not set"),
        ({**WORLD, "RANK": "4"}, "RANK is 4 and WORLD_SIZE is 4; RANK must be from 0 to 3"),
        ({**WORLD, "WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'; it must be a whole number"),
    ],
)
def test_processes_that_know_nothing_of_each_other_are_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        launched(environment)


@pytest.mark.parametrize("command", ["train", "embed m --out e.npy", "report run"])
def test_srun_alone_is_refused_with_the_right_command(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (("SLURM_PROCID", "1"), ("SLURM_NTASKS", "2")):
        monkeypatch.setenv(name, value)
    assert main(command.split()) == 2
    assert "--no-python gcahng" in capsys.readouterr().err and not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("local_rank", "devices", "index"), [("2", 4, 2), ("2", 1, 0), ("0", 1, 0), ("4", 4, None), (None, 4, None)]
)
def test_the_gpu_of_a_local_rank_is_its_own_or_the_only_one(
    local_rank: str | None, devices: int, index: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert local_device_index() == index


def met(facts: list[dict[str, Any]], count: int, timeout: float = 60.0) -> list[Any]:
    """What processes find that come to a meeting; here they are threads."""
    store, found = dist.HashStore(), [None] * len(facts)

    def come(rank: int) -> None:
        try:
            found[rank] = meet(store, rank, count, facts[rank], timeout)  # type: ignore[call-overload]
        except UserError as error:
            found[rank] = str(error)  # type: ignore[call-overload]

    threads = [Thread(target=come, args=(rank,)) for rank in range(len(facts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_processes_that_meet_know_each_other() -> None:
    first, second = met([{"a": 1}, {"a": 1}], 2)
    assert first == second and [str(peer) for peer in first] == [
        f"process {i} of 2 on {platform.node()}" for i in (0, 1)
    ]


def test_all_are_told_what_differs_and_who_is_missing() -> None:
    first, second = met([{"a": 1}, {"a": 2}], 2)
    assert first == second and first.startswith("a is 1 in process 0 of 2 on")
    first, second = met([{}, {}], 4, timeout=0.2)
    assert first == second and first.startswith("processes 2, 3 of 4 did not come within 0 s; WORLD_SIZE is 4")


def test_one_waits_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gcahng.processes.meeting._SECONDS_TO_NOTE", 0.05)
    with (
        pytest.warns(UserNote, match=r"waiting up to 0 s for process 1 of 2; all must call this, unless .*alone"),
        pytest.raises(UserError, match="process 1 of 2 did not come within 0 s"),
    ):
        meet(dist.HashStore(), 0, 2, {}, 0.1)


def test_the_first_process_does_not_end_before_the_others_know_why() -> None:
    """The store may end with it, and the others would have nothing but the frames of C++ to show."""
    store, raised = dist.HashStore(), []

    def first() -> None:
        with pytest.raises(UserError, match="x is 1 in process 0") as found:
            meet(store, 0, 2, {"x": 1}, 10.0)
        raised.append(found.value)

    store.set("here/1", json.dumps([this_process(1, 2), {"x": 2}]))
    thread = Thread(target=first)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and not raised
    with pytest.raises(UserError, match="x is 1 in process 0"):
        meet(store, 1, 2, {"x": 2}, 10.0)
    thread.join(10)
    assert len(raised) == 1


def test_a_store_that_has_gone_is_told_in_a_line() -> None:
    class Gone:
        def set(self, *_: object) -> None:
            raise RuntimeError("Connection was reset\nException raised from recvBytes at Utils.hpp:670\nframe #0: c10")

    with pytest.raises(UserError) as raised:
        meet(Gone(), 1, 2, {}, 1.0)
    assert str(raised.value) == "process 1 of 2 has lost the others before all had come (Connection was reset)"


def test_a_difference_names_both_and_counts_the_rest() -> None:
    who = [Peer(rank, 3, host, "", 1, "") for rank, host in enumerate("aab")]
    same = {"x": 1, "y": None}
    assert difference(who, [same, dict(same), dict(same)]) is None
    other = {"x": 2, "y": "text", "z": [1], "u": 1, "v": 1}
    assert difference(who, [same, same, other]) == (
        "x is 1 in process 0 of 3 on a and 2 in process 2 of 3 on b; "
        "y is null in process 0 of 3 on a and text in process 2 of 3 on b; "
        "z is missing in process 0 of 3 on a and [1] in process 2 of 3 on b, and 2 more differ; "
        "it must be the same in all processes"
    )


def test_which_errors_mean_a_lost_process() -> None:
    gloo = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711"
    assert says_lost(RuntimeError(gloo)) == gloo
    assert says_lost(RuntimeError("Timed out waiting 10000ms for recv operation to complete"))
    assert says_lost(RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited or there was an error"))
    assert says_lost(RuntimeError("Expected all tensors to be on the same device")) is None
    assert (
        says_lost(RuntimeError("NCCL error, invalid usage (run with NCCL_DEBUG=WARN)\nDuplicate GPU detected")) is None
    )
    assert says_lost(RuntimeError("ProcessGroupNCCL is only supported with GPUs, no GPUs found!")) is None


@pytest.mark.skipif(sys.platform != "linux", reason="states are read from /proc")
def test_the_state_of_another_process() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        fields = Path(f"/proc/{process.pid}/stat").read_bytes().rpartition(b")")[2].split()
        peer = this_process(0, 1)._replace(pid=process.pid, started=fields[19].decode())
        assert peer.state() == "runs" and peer._replace(started="1").state() == "ended"
        assert peer._replace(space="another machine").state() is None
        process.send_signal(signal.SIGSTOP)
        while peer.state() != "stopped":
            time.sleep(0.01)
        process.kill()
        while peer.state() != "ended":
            time.sleep(0.01)


def test_torchrun_can_show_the_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    print_line("error: a\n  b")
    assert capsys.readouterr().err == "gcahng: error: a b\n"
    written = json.loads((tmp_path / "error.json").read_text())["message"]
    assert written["message"] == "error: a b" and written["extraInfo"]["timestamp"].isdecimal()


def test_an_error_of_one_process_says_whose_it_is() -> None:
    error = UserError("x is 1; it must be 2")
    assert str(error) == error.text == "x is 1; it must be 2"
    error.where = "process 1 of 2 on here"
    assert str(error) == "process 1 of 2 on here: x is 1; it must be 2" and error.text == "x is 1; it must be 2"
