# SPDX-License-Identifier: Apache-2.0
"""Archives as the job hands them to the store: a header, then packed extents."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from tests.vma.archives import UUID, Run, header
from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.vma.header import Device, Header, encode_header
from vmapipe.vma.packer import PackedExtent, Packer


class Archive(NamedTuple):
    header: Header
    raw_header: bytes
    extents: list[PackedExtent[int]]

    @property
    def plain(self) -> bytes:
        """The whole archive."""
        extents = (buffer for extent in self.extents for buffer in extent.buffers)
        return b"".join((self.raw_header, *extents))


def archive(runs: Iterable[Run], devices: Iterable[Device]) -> Archive:
    """Notes are the numbers of the runs, from 0."""
    head = header(devices)
    packer: Packer[int] = Packer(UUID)
    extents: list[PackedExtent[int]] = []
    for number, run in enumerate(runs):
        masks = run.raw_masks
        extents += packer.add(run.dev_id, run.first, len(run.masks), masks, run.payload, number)
    extents += packer.flush()
    return Archive(head, encode_header(head), extents)


def disk(dev_id: int, masks: Iterable[int], clusters_a_run: int = 16) -> list[Run]:
    """A whole disk, in order; a mask a cluster."""
    all_masks = tuple(masks)
    step = clusters_a_run
    return [Run(dev_id, at, all_masks[at : at + step]) for at in range(0, len(all_masks), step)]


def device(dev_id: int, clusters: int, name: str = "") -> Device:
    return Device(dev_id, name or f"disk{dev_id}", clusters * CLUSTER_BYTES)


def dense(clusters: int) -> Archive:
    """One disk without a single zero block."""
    return archive(disk(1, [0xFFFF] * clusters), [device(1, clusters)])


def sparse(clusters: int) -> Archive:
    """One disk of zeroes."""
    return archive(disk(1, [0] * clusters, clusters_a_run=clusters), [device(1, clusters)])
