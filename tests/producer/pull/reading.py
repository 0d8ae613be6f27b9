# SPDX-License-Identifier: Apache-2.0
"""What a reader of an export gives, taken without an archiver."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from vmapipe.clusters.sizes import BLOCK_BYTES, CLUSTER_BYTES
from vmapipe.producer.pull_reader import PulledRun, PullReader
from vmapipe.producer.shared_memory import Ring

FRAME_BYTES = 8 << 20


def runs(reader: PullReader, *, is_incremental: bool = False) -> Iterator[tuple[PulledRun, bytes]]:
    """Yield all runs of a disk, each with its data, up to the proof at the end."""
    with closing(Ring(reader.beside_bytes)) as ring:
        reader.begin(ring, FRAME_BYTES, is_incremental=is_incremental)
        while not reader.has_all:
            reader.plan_ahead(FRAME_BYTES)
            found = reader.next_run()
            if found is None:
                reader.pump(0.05)
                continue
            run = found.run
            yield found, bytes(ring.view[run.position : run.position + run.length])
            if found.free is not None:
                found.free()
        while not reader.prove():
            reader.pump(0.05)


def content(reader: PullReader, base: bytes | None = None) -> bytes:
    """The whole disk, by its runs; with `base` what is unchanged comes from there."""
    whole = bytearray()
    for pulled, data in runs(reader, is_incremental=base is not None):
        run = pulled.run
        start = run.first_cluster * CLUSTER_BYTES
        assert start == len(whole), "a gap, or an overlap"
        if pulled.is_unchanged:
            assert base is not None
            length = run.clusters * CLUSTER_BYTES
            whole += base[start : start + length].ljust(length, b"\0")
            continue
        at = 0
        for index in range(run.clusters):
            mask = int.from_bytes(run.masks[2 * index : 2 * index + 2], "big")
            for block in range(CLUSTER_BYTES // BLOCK_BYTES):
                there = bool(mask >> block & 1)
                whole += data[at : at + BLOCK_BYTES] if there else bytes(BLOCK_BYTES)
                at += BLOCK_BYTES if there else 0
        assert at == len(data)
    return bytes(whole[: reader.size_bytes])
