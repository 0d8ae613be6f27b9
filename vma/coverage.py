# SPDX-License-Identifier: Apache-2.0
"""The check that an archive has each cluster of every device exactly once, none beyond its end."""

from __future__ import annotations

from collections.abc import Iterator

from vmapipe.clusters.cluster_set import ClusterSet
from vmapipe.clusters.sizes import BLOCK_BYTES, BLOCKS_PER_CLUSTER, FULL_MASK, cluster_count
from vmapipe.vma.errors import CoverageError
from vmapipe.vma.extent import ClusterRun, Extent
from vmapipe.vma.header import Device, Header
from vmapipe.vma.names import printable


class _DeviceCoverage:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.is_vmstate = device.is_vmstate
        self.end = device.clusters
        self.clusters = ClusterSet(self.end)
        self.next_vmstate = 0


class Coverage:
    """Checks an archive's extents against its header. Feed it every extent, then `finish`."""

    def __init__(self, header: Header) -> None:
        self._devices = {d.dev_id: _DeviceCoverage(d) for d in header.devices}

    def add(self, extent: Extent) -> None:
        """Raises CoverageError for the first cluster that cannot be right."""
        for run in extent.runs:
            self.add_run(run, extent.offset)

    def add_run(self, run: ClusterRun, offset: int) -> None:
        """One run of the extent at `offset`, as `add`."""
        state = self._devices.get(run.dev_id)
        if state is None:
            raise CoverageError(
                f"a cluster of device {run.dev_id}, which the header does not list",
                device=str(run.dev_id),
                cluster_num=run.first_cluster,
                offset=offset,
                reference_text=f"got wrong dev id {run.dev_id}",
            )
        if state.is_vmstate:
            self._add_vmstate(state, run, offset)
        else:
            self._add_disk(state, run, offset)

    def _add_vmstate(self, state: _DeviceCoverage, run: ClusterRun, offset: int) -> None:
        if run.first_cluster != state.next_vmstate:
            raise CoverageError(
                f"vmstate: cluster {run.first_cluster} where {state.next_vmstate} must come",
                device=state.device.name,
                cluster_num=run.first_cluster,
                offset=offset,
                reference_text="found out of order vmstate data",
            )
        state.next_vmstate += run.count

    def _add_disk(self, state: _DeviceCoverage, run: ClusterRun, offset: int) -> None:
        device, count = state.device, len(run.masks)
        end = run.first_cluster + count
        if end > state.end:
            raise CoverageError(
                f"device {device.name!r}: cluster {max(run.first_cluster, state.end)} lies "
                f"beyond its end ({state.end} clusters)",
                device=device.name,
                cluster_num=max(run.first_cluster, state.end),
                offset=offset,
                reference_text="got wrong block address - write beyond end",
            )
        if end == state.end and not mask_fits(device, run.masks[-1]):
            raise CoverageError(
                f"device {device.name!r}: cluster {end - 1} has data beyond the device's end",
                device=device.name,
                cluster_num=end - 1,
                offset=offset,
                reference_text="got wrong block address - write beyond end",
            )
        double = state.clusters.add(run.first_cluster, count)
        if double is not None:
            raise CoverageError(
                f"device {device.name!r}: cluster {double} comes a second time",
                device=device.name,
                cluster_num=double,
                offset=offset,
                reference_text=(
                    f"found duplicated cluster {double} for stream {printable(device.name)}"
                ),
            )

    def missing_of(self, dev_id: int) -> Iterator[tuple[int, int]]:
        """Runs (first cluster, count) of this device that have not come."""
        return self._devices[dev_id].clusters.missing()

    def clusters_seen(self, dev_id: int) -> int:
        """How many of its clusters have come."""
        return self._devices[dev_id].clusters.count

    def missing(self) -> Iterator[tuple[Device, int, int]]:
        """(device, first cluster, count) of what has not come; vmstate has no fixed length."""
        for state in self._devices.values():
            if not state.is_vmstate:
                for first, count in state.clusters.missing():
                    yield state.device, first, count

    def finish(self) -> None:
        """Raises CoverageError when the archive ended and clusters are missing."""
        for device, first, _ in self.missing():
            expected = cluster_count(device.size_bytes)
            got = self._devices[device.dev_id].clusters.count
            raise CoverageError(
                f"device {device.name!r}: cluster {first} is missing "
                f"({expected - got} of {expected} are)",
                device=device.name,
                cluster_num=first,
                reference_text=(
                    f"detected missing cluster {first} for stream {printable(device.name)}"
                ),
            )

    def vmstate_clusters(self, dev_id: int) -> int:
        """How long the vmstate stream is so far, in clusters."""
        return self._devices[dev_id].next_vmstate


def mask_fits(device: Device, mask: int, *, cut_full: bool = True) -> bool:
    """Return whether a last cluster's mask stays within the device.

    A reader cuts a full mask at the device's end (`cut_full`), as the
    reference does; any other must not have a block beyond it.
    """
    if cut_full and mask == FULL_MASK:
        return True
    tail_bytes = device.size_bytes - (device.clusters - 1) * BLOCKS_PER_CLUSTER * BLOCK_BYTES
    return mask >> -(-tail_bytes // BLOCK_BYTES) == 0
