"""Measures items in a process of its own, so that a lost device or a hanging kernel ends only that process.

    python benchmarks/_gpu_worker.py

It reads items as lines of JSON, and answers each with lines {"doing": case} … and then {"rows": …} or {"failed": why}.
After {"fatal": why} it ends.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Answer(NamedTuple):
    """Rows; or None with the reason, and the case that was being worked on, if there was one."""

    rows: list[dict[str, Any]] | None
    reason: str | None = None
    doing: str | None = None


class Worker:
    """The process, seen from this one. After a process is lost, a new one is started."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._buffer = b""

    def run(self, item: dict[str, Any], limit: float) -> Answer:
        """Measure an item in at most `limit` seconds."""
        process = self._process or self._start()
        doing = None
        deadline = time.monotonic() + limit
        try:
            process.stdin.write(json.dumps(item).encode() + b"\n")
            process.stdin.flush()
            while True:
                line = self._line(process, deadline)
                if line is None:
                    return self._lost(f"cut off after {limit:.0f} s", doing)
                answer = json.loads(line)
                if "rows" in answer:
                    return Answer(answer["rows"])
                if "failed" in answer:
                    return Answer(None, answer["failed"], doing)
                if "fatal" in answer:
                    return self._lost(answer["fatal"], doing)
                doing = answer["doing"]
        except (BrokenPipeError, EOFError):
            status = process.wait()
            return self._lost(f"the process that measures ended with status {status}", doing)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self) -> subprocess.Popen:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        # Segments that grow: baselines of many sizes in one process would else fragment the memory.
        environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ, "PYTHONPATH": path}
        command = [sys.executable, str(Path(__file__).resolve())]
        self._buffer = b""
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        return self._process

    def _line(self, process: subprocess.Popen, deadline: float) -> bytes | None:
        """The next line; None when the time is over.

        Raises:
            EOFError: the process has ended.
        """
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                if not selector.select(left):
                    return None
                part = os.read(process.stdout.fileno(), 1 << 16)
                if not part:
                    raise EOFError
                self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _lost(self, reason: str, doing: str | None) -> Answer:
        self.close()
        return Answer(None, reason, doing)


def measure(item: dict[str, Any], doing: Any) -> list[dict[str, Any]]:
    """The rows of an item."""
    import _gpu_ceilings
    import _gpu_products
    import _gpu_stages
    import _gpu_step

    sections = {
        "ceilings": _gpu_ceilings.measure,
        "plan": _gpu_step.plan,
        "step": _gpu_step.measure,
        "stages": _gpu_stages.measure,
        "products": _gpu_products.measure,
    }
    return sections[item["section"]](item, doing)


def serve() -> None:
    """Answer items until the input ends."""
    # What compilers and libraries print must not get among the answers.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        out.write(json.dumps(answer) + "\n")
        out.flush()

    from _gpu_errors import Fatal, one_line, release

    for line in sys.stdin:
        try:
            say({"rows": measure(json.loads(line), lambda case: say({"doing": case}))})
        except Fatal as error:  # the next item gets a process of its own
            say({"fatal": one_line(error)})
            return
        except Exception as error:  # a mistake in one item must not take the others along
            release()
            say({"failed": one_line(error)})


if __name__ == "__main__":
    serve()
