"""Embeddings that several processes make together: each embeds a part of the images, and the first puts them together.

Each process collects its rows beside the file X that is asked for, in `X.R-of-N.part`, as one process does in `X.part`,
so that an interrupted call continues with the same number of processes. Batches are cut where one process cuts them,
and no image is embedded twice, so that X has the same bits.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import torch

from gcahng.errors import UserError
from gcahng.evaluation.embed_job import EmbedJob, EmbedResult
from gcahng.evaluation.partial_embeddings import PartialRows
from gcahng.processes import Processes
from gcahng.progress import Progress
from gcahng.retrieval.embeddings import check_free, read_embeddings


def embed_in_parts(job: EmbedJob, processes: Processes, progress: Progress | None = None) -> EmbedResult:
    """What `embed_to_file` does in several processes, which must reach the same files.

    Args:
        job: what is embedded.
        processes: that embed together.
        progress: called with the images of this process's part that are done, and all of its part.

    Raises:
        UserError: as `embed_to_file`; or the processes were not given the same, or do not reach the same files.
    """
    names = hashlib.sha256("\0".join(job.items.names).encode("utf-8", "surrogateescape")).hexdigest()[:12]
    processes.same(
        {
            "out": str(job.out),
            "the digest of the network": job.identity.fingerprint[:12],
            "the digest of the images' names": names,
            **vars(replace(job.options, workers=None)),
        }
    )
    with processes.together():
        device = processes.device(job.options.device)
    processes.check_devices(device)
    if processes.on_first(job.out.exists):
        return _read(job, processes)
    processes.on_first(lambda: check_free(job.out))
    mine = processes.part(len(job.images), job.options.batch_size)
    own = _part_of(job, mine, processes.rank, processes.count)
    resumed = 0
    with processes.together(patient=True):
        if len(own.images):
            with PartialRows(own.out, own.key()) as part:
                resumed = part.rows_done
                own.collect(part, progress)
    parts = processes.all_of((mine.start, mine.stop))
    skipped = processes.on_first(lambda: _put_together(job, parts))
    resumed = sum(processes.all_of(resumed))
    with processes.together():
        made = read_embeddings(job.out)
    return EmbedResult(made, [job.items.names[i] for i in skipped], resumed)


def _read(job: EmbedJob, processes: Processes) -> EmbedResult:
    """What is in the file that is there already, in all processes."""
    first = processes.on_first(lambda: _left_out(job))
    with processes.together():
        there = read_embeddings(job.out)
    return EmbedResult(there, first, resumed=len(there))


def _left_out(job: EmbedJob) -> list[str]:
    there = job.already()
    return [] if there is None else there.skipped


def _part_of(job: EmbedJob, rows: slice, rank: int, count: int) -> EmbedJob:
    """The part of a job that one process does."""
    places = list(range(rows.start, rows.stop))
    return replace(
        job,
        images=job.images.subset(torch.tensor(places, dtype=torch.int64)),
        items=job.items.subset(places),
        out=job.out.with_name(f"{job.out.name}.{rank}-of-{count}"),
    )


def _put_together(job: EmbedJob, parts: list[tuple[int, int]]) -> list[int]:
    """Write the file from the parts of all processes, remove these, and return the places that were left out."""
    with PartialRows(job.out, job.key()) as whole:
        for rank, (start, stop) in enumerate(parts):
            if stop > max(start, whole.images_done):
                _append(whole, _part_of(job, slice(start, stop), rank, len(parts)), start)
        skipped = job.write(whole)
    name = re.compile(re.escape(job.out.name) + r"\.\d+-of-\d+\.part(\.json)?")
    for path in job.out.parent.iterdir():  # those of a call with another number of processes, too
        if name.fullmatch(path.name):
            path.unlink(missing_ok=True)
    return skipped


def _append(whole: PartialRows, part: EmbedJob, start: int) -> None:
    """Append the rows of a part that `whole` does not have yet; `start` is the place of its first image."""
    with PartialRows(part.out, part.key()) as made:
        if made.images_done != len(part.images):
            raise UserError(
                f"{Path(f'{part.out}.part')} does not hold what another process has embedded; out must be on a file "
                "system that all processes share"
            )
        there = max(whole.images_done - start, 0)
        left_out = [place for place in made.skipped if place >= there]
        first = there - (len(made.skipped) - len(left_out))
        rows = made.rows()[first:] if made.rows_done else torch.empty(0, 0)
        whole.append(rows, [start + place for place in left_out], start + len(part.images))
