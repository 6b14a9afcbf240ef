"""The end of a process that communicated through gloo."""

from __future__ import annotations

import subprocess
import sys

# A thread like gloo's, which needs the GIL when the main thread has nothing more to do. The times are longer than the
# real ones, so that a busy machine does not decide.
SCRIPT = """
import atexit, os, threading, time
import torch.distributed as dist
from gcahng.engine import ranks

def finish():
    exiting.wait()
    time.sleep(0.3)
    os.write(1, b"has finished")

ranks._SECONDS_TO_FINISH = 2.0
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
ranks.Ranks(dist.group.WORLD)
exiting = threading.Event()
atexit.register(exiting.set)
threading.Thread(target=finish, daemon=True).start()
"""


def test_threads_finish_before_the_interpreter_does() -> None:
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "has finished"), ended.stderr
