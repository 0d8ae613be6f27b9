# SPDX-License-Identifier: Apache-2.0
"""The archive that comes of a base and of what has changed, extent after extent: the synthesis, carried out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from vmapipe.archiver.base.extents import BaseExtents, DamagedBase
from vmapipe.archiver.job.device import FillRun
from vmapipe.archiver.job.synthesis import Keep, Mix, Synthesis
from vmapipe.archiver.outputs.compress import Compressed
from vmapipe.clusters.sizes import EXTENT_HEADER_BYTES
from vmapipe.vma.errors import CoverageError
from vmapipe.vma.header import Device
from vmapipe.vma.packer import PackedExtent, PackedRun

_NOTHING = memoryview(b"")


class FilledExtent(NamedTuple):
    """An extent to write at once; where each of its buffers lies in the base's file, in bytes (-1: nowhere)."""

    extent: PackedExtent[None]
    places: list[int]
    #: Those of its clusters that are not as in the base.
    changed: list[PackedRun]
    #: All of its data, as a compressed base has it.
    frames: Sequence[Compressed] = ()


class Filler:
    """Give it what comes, in order, and write what it yields before the next of it is asked for.

    `devices`: those of the new archive that have a base, by their dev_ids there.
    """

    def __init__(self, base: BaseExtents, uuid: bytes, devices: Mapping[int, Device]) -> None:
        self._base = base
        self._synthesis = Synthesis(uuid, base.base.header, devices)

    @property
    def fd(self) -> int:
        """The base's file."""
        return self._base.fd

    @property
    def kept_bytes(self) -> int:
        """Data that was taken from the base so far, in bytes."""
        return self._synthesis.kept_bytes

    def take(self, run: FillRun) -> Iterator[FilledExtent]:
        """Yield what can be written now. Raises DamagedBase."""
        if run.payload is None:
            self._synthesis.add_unchanged(run.dev_id, run.first, run.clusters)
        else:
            for extent, places in self._synthesis.add(
                run.dev_id, run.first, run.clusters, run.masks, run.payload
            ):
                yield FilledExtent(extent, places, extent.clusters)
        yield from self._go_on()

    def _go_on(self) -> Iterator[FilledExtent]:
        while (extent := self._base.peek()) is not None:
            try:
                plan = self._synthesis.plan(extent)
            except CoverageError as error:
                raise self._contradiction(error) from error
            if plan is None:
                return
            if isinstance(plan, Mix) and not plan.needs_base:
                self._base.skip()
                data = _NOTHING
            else:
                data = self._base.take()
            packed = self._synthesis.pack(plan, data)
            if packed is not None:
                made, places = packed
                data_at = extent.offset + EXTENT_HEADER_BYTES
                is_plain = self._base.is_plain
                in_file = [at + data_at if at >= 0 and is_plain else -1 for at in places]
                changed = plan.changed(made) if isinstance(plan, Mix) else []
                frames = self._base.frames if isinstance(plan, Keep) else ()
                yield FilledExtent(made, in_file, changed, frames)

    def finish(self) -> Iterator[FilledExtent]:
        """All clusters of all devices have come: yield the rest. Raises DamagedBase."""
        yield from self._go_on()
        if self._base.peek() is not None:
            raise RuntimeError("a base that is not used up, although all has come")
        try:
            self._synthesis.finish()
        except CoverageError as error:
            raise self._contradiction(error) from error

    def close(self) -> None:
        self._base.close()

    def _contradiction(self, error: CoverageError) -> DamagedBase:
        return DamagedBase(
            f"the base {self._base.base.archive} contradicts its manifest: {error}; make a full "
            "backup (--base none)"
        )
