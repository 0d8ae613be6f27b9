# SPDX-License-Identifier: Apache-2.0
"""What a reader of an export gives, taken without an archiver."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from vmapipe.clusters.sizes import BLOCK_BYTES, CLUSTER_BYTES
from vmapipe.producer.pull_reader import PullReader
from vmapipe.producer.runs import Run
from vmapipe.producer.shared_memory import Ring

FRAME_BYTES = 8 << 20


def runs(reader: PullReader) -> Iterator[tuple[Run, bytes]]:
    """Yield all runs of a disk, each with its data, up to the proof at the end."""
    with closing(Ring()) as ring:
        reader.begin(ring, FRAME_BYTES)
        while not reader.has_all:
            reader.plan_ahead(FRAME_BYTES)
            found = reader.next_run()
            if found is None:
                reader.pump(0.05)
                continue
            run, free = found
            yield run, bytes(ring.view[run.position : run.position + run.length])
            if free is not None:
                free()
        while not reader.prove():
            reader.pump(0.05)


def content(reader: PullReader) -> bytes:
    """The whole disk, by its runs."""
    whole = bytearray()
    for run, data in runs(reader):
        assert run.first_cluster * CLUSTER_BYTES == len(whole), "a gap, or an overlap"
        at = 0
        for index in range(run.clusters):
            mask = int.from_bytes(run.masks[2 * index : 2 * index + 2], "big")
            for block in range(CLUSTER_BYTES // BLOCK_BYTES):
                there = bool(mask >> block & 1)
                whole += data[at : at + BLOCK_BYTES] if there else bytes(BLOCK_BYTES)
                at += BLOCK_BYTES if there else 0
        assert at == len(data)
    return bytes(whole[: reader.size_bytes])
