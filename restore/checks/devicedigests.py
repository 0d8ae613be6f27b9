# SPDX-License-Identifier: Apache-2.0
"""A device's digest as the manifest has it: it vouches for one disk when an extent that holds
several is damaged (docs/vma-format.md)."""

from __future__ import annotations

from collections.abc import Callable, Collection

from vmapipe.restore.archive.reading import Archive, Piece
from vmapipe.restore.archive.source import PlainFile
from vmapipe.restore.archive.survey import survey
from vmapipe.restore.checks.digest import Hasher
from vmapipe.vma.errors import ArchiveError
from vmapipe.vma.extent import ClusterRun, Extent
from vmapipe.vma.layout import BLOCK_BYTES, EXTENT_HEADER_BYTES


class DeviceDigests:
    """Feed it extents in the archive's order, with their data."""

    def __init__(self, dev_ids: Collection[int]) -> None:
        self._devices = {dev_id: _DeviceDigest() for dev_id in dev_ids}

    def add(self, extent: Extent, data: bytes | memoryview) -> None:
        """`data`: the extent's stored blocks."""
        view = memoryview(data)
        for run in extent.runs:
            device = self._devices.get(run.dev_id)
            if device is not None:
                device.add(run, view[run.data_at : run.data_at + run.data_bytes])

    def digest(self, dev_id: int) -> bytes | None:
        """None where the clusters did not come in order."""
        device = self._devices.get(dev_id)
        return device.hasher.digest() if device is not None and device.in_order else None


class _DeviceDigest:
    def __init__(self) -> None:
        self.in_order = True
        self.hasher = Hasher()
        self._next = 0

    def add(self, run: ClusterRun, data: memoryview) -> None:
        self.in_order = self.in_order and run.first_cluster == self._next
        if not self.in_order:
            return
        self._next += run.count
        if run.is_zero:
            self.hasher.update(bytes(2 * run.count))
            return
        at = 0
        for mask in run.masks:
            stop = at + mask.bit_count() * BLOCK_BYTES
            self.hasher.update(mask.to_bytes(2, "big"))
            self.hasher.update(data[at:stop])
            at = stop


def digests_of_file(
    archive: Archive, dev_ids: Collection[int], check: Callable[[], None]
) -> DeviceDigests:
    """The digests of some devices of an archive that is a plain file, read once more."""
    source = archive.source
    digests = DeviceDigests(dev_ids)
    if not isinstance(source, PlainFile):
        raise RuntimeError("a stream cannot be read once more")
    for piece in survey(archive, check):
        if isinstance(piece, Piece) and any(run.dev_id in dev_ids for run in piece.extent.runs):
            extent = piece.extent
            data = source.pread(extent.data_bytes, extent.offset + EXTENT_HEADER_BYTES)
            if len(data) < extent.data_bytes:
                raise ArchiveError("the archive was cut while it was read", offset=extent.offset)
            digests.add(extent, data)
    return digests
