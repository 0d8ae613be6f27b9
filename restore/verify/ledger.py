# SPDX-License-Identifier: Apache-2.0
"""State of each disk of an archive while it is read, and the verdict at the end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, cast

from vmapipe.clusters.cluster_set import ClusterSet
from vmapipe.clusters.sizes import BLOCK_BYTES, CLUSTER_BYTES, EXTENT_HEADER_BYTES, MAX_CLUSTERS
from vmapipe.restore.archive.errors import CompressionError, DigestError
from vmapipe.restore.archive.manifest import Manifest, ManifestWalk
from vmapipe.restore.archive.parts import Proof
from vmapipe.restore.archive.reader import Archive, FoundExtent, check_opening
from vmapipe.restore.archive.source import PlainFile, Stream
from vmapipe.restore.archive.survey import Gap
from vmapipe.restore.verify.compare import DeviceDigests, digest_of, digests_of_file
from vmapipe.restore.verify.coverage import UNREADABLE, CoverageReport
from vmapipe.restore.verify.report import (
    DAMAGED,
    INCOMPLETE,
    MAX_DAMAGE,
    SOUND,
    UNCHECKED,
    BadRange,
    Damage,
    DiskState,
)
from vmapipe.runtime.cancel import Cancel
from vmapipe.vma.errors import ArchiveError
from vmapipe.vma.extent import ClusterRun, Extent
from vmapipe.vma.header import Device, Header
from vmapipe.vma.manifest import Totals

if TYPE_CHECKING:
    from vmapipe.runtime.event_types import CheckerName, StateName

_WRONG_DIGEST = "its data is not what was stored, somewhere in this range (the manifest's digest)"
_WRONG_CHECKSUM = "the checksum of the compressed data that it comes from is wrong"
_SHIFTED = "bytes were added to or removed from the archive at its end"
# Extents whose checksum is still to come, one by one; more of them are remembered together.
_MAX_RECENT = 4096
# A message need not name every range of an extent that mixes many disks.
_MAX_PLACES = 8


def damage_of(error: ArchiveError) -> Damage:
    """Make a finding of the error that ended the reading."""
    if isinstance(error, CompressionError):
        more = "" if error.resumes else "; what follows could not be checked"
        return Damage(f"{error}{more}")
    return Damage(error.text, archive_offset=error.offset, reference_text=error.reference_text)


def open_manifest(
    archive: Archive, path: str, cancel: Cancel
) -> tuple[Manifest | None, ArchiveError | None]:
    """The manifest, if it is one of this archive; and what is wrong with it or with the header."""
    manifest: Manifest | None = None
    try:
        manifest = Manifest(path, cancel, archive.source.identities)
        check_opening(archive.header, archive.raw_header, manifest)
    except DigestError as error:
        return manifest, error
    except ArchiveError as error:
        if manifest is not None:
            manifest.close()
        return None, error
    return manifest, None


class Ledger:
    """Feed it what a `survey` finds, in order; tell it which digests were wrong; then `finish`.

    `error`: the first thing that is wrong, or None. `tell` hears of each.
    """

    def __init__(
        self,
        archive: Archive,
        manifest: Manifest | None,
        tell: Callable[[Damage], None],
        data_of: Callable[[FoundExtent], bytes | memoryview | None],
    ) -> None:
        """`data_of`: a stream's piece to its stored blocks."""
        header = archive.header
        self.error: ArchiveError | None = None
        self.data_checked = False
        #: The manifest is damaged, so that it cannot vouch for what came last.
        self.manifest_failed = False
        self._archive = archive
        self._header = header
        self._tell = tell
        self._data_of = data_of
        self._census = CoverageReport(header)
        self._manifest = manifest
        self._walk = ManifestWalk(manifest) if manifest else None
        self._streamed: DeviceDigests | None = None
        if manifest and len(header.devices) > 1 and isinstance(archive.source, Stream):
            self._streamed = DeviceDigests({device.dev_id for device in header.devices})
        self._proof = archive.source.proof if isinstance(archive.source, Stream) else None
        self._unproven = _Unproven()
        #: Devices with an extent that no manifest vouches for.
        self._unchecked: set[int] = set()
        #: Devices with a damaged extent that holds nothing but theirs.
        self._surely_damaged: set[int] = set()
        #: Findings about damaged extents that hold several devices, reported at the end if still true.
        self._shared: list[Damage] = []
        self._is_cut = False
        self._gaps = 0
        self._before_gaps: list[Extent] = []

    # --- While it is read

    def take(self, piece: FoundExtent) -> FoundExtent | None:
        """The piece with the digest that it must have; None for one that is not to be used."""
        extent = piece.extent
        if self._walk is not None:
            piece = self._with_digest(piece)
            if not piece.digest and self._walk is not None:
                return None
        for find in self._census.add(extent):
            self._tell(find)
            if self._walk is not None:
                self._walk.doubt()
        self._remember(self._census.first_error)
        if self._streamed is not None:
            self._streamed.add(extent, self._data_of(piece) or b"")
        if self._walk is None:
            self._unchecked.update(run.dev_id for run in extent.runs)
            if self._proof is not None:
                self._unproven.add(extent, self._proof)
        return piece._replace(left_out=self._census.left_out)

    def _with_digest(self, piece: FoundExtent) -> FoundExtent:
        """The piece as the manifest has it; without a digest where it does not list it."""
        if self._walk is None:
            return piece
        try:
            digest = self._walk.digest_of(
                piece.extent, lambda: digest_of(self._archive, piece, self._data_of(piece))
            )
        except ArchiveError as error:
            self.found(error)
            self.manifest_failed = True
            self._walk = None
            return piece
        if digest is None:
            self.found(
                DigestError(
                    "an extent that the manifest does not list: the archive was changed",
                    offset=piece.extent.offset,
                )
            )
            return piece
        return piece._replace(digest=digest)

    def wrong_digest(self, extent: Extent) -> None:
        """The digest of an extent that `take` has given out is not what it must be.

        Or its disk cannot read all of it: then that is missing. Raises InputError.
        """
        source = self._archive.source
        if isinstance(source, PlainFile) and (
            lost := source.lost_in(extent.offset, extent.total_bytes)
        ):
            self._unreadable(extent, lost)
            return
        self._remember(damaged_data(extent, {d.dev_id: d.name for d in self._header.devices}))
        # Zeroes stand in the header, which has a checksum of its own.
        runs = [run for run in extent.runs if not run.is_zero] or list(extent.runs)
        self._census.mark(runs, _WRONG_DIGEST)
        stored = {run.dev_id for run in runs}
        if len(stored) == 1:
            self._surely_damaged |= stored
        for find in damaged_runs(extent, self._header):
            if len(stored) > 1 and len(self._shared) < MAX_DAMAGE:
                self._shared.append(find)
            else:
                self._tell(find)

    def _unreadable(self, extent: Extent, lost: list[tuple[int, int]]) -> None:
        """Mark the clusters that cannot be read; the others are restored, unchecked."""
        for run in extent.runs:
            self._unchecked.add(run.dev_id)
            at = extent.offset + EXTENT_HEADER_BYTES + run.data_at
            for cluster, mask in enumerate(run.masks, run.first_cluster):
                end = at + mask.bit_count() * BLOCK_BYTES
                if any(first < end and first + length > at for first, length in lost):
                    self._census.mark_clusters(run.dev_id, cluster, 1, UNREADABLE)
                    self._surely_damaged.add(run.dev_id)
                at = end

    def _tell_lost(self) -> None:
        source = self._archive.source
        for at, length in (source.lost or ()) if isinstance(source, PlainFile) else ():
            self.found(ArchiveError(f"{UNREADABLE}: {length} bytes", offset=at))

    def gap(self, gap: Gap) -> None:
        """Archive bytes without an extent."""
        error = gap.error
        self._gaps += 1
        if isinstance(error, CompressionError):
            self.found(error)
            self._is_cut = self._is_cut or not error.resumes
            if error.unproven_from is not None and not error.cut:
                self._unproven.failed(error.unproven_from, self._mark_unproven)
        else:
            text = f"{error.text}; {gap.length} bytes of the archive hold no extent"
            self._tell(Damage(text, archive_offset=gap.offset, reference_text=error.reference_text))
            self._remember(error)
        if gap.before is not None and self._walk is None:
            if gap.is_shift:
                self._census.mark(gap.before.runs, _SHIFTED)
            elif len(self._before_gaps) < MAX_DAMAGE:
                self._before_gaps.append(gap.before)
        if self._walk is not None:
            self._walk.doubt()

    def _mark_unproven(self, dev_id: int, first: int, count: int) -> None:
        if self._walk is None:
            self._census.mark_clusters(dev_id, first, count, _WRONG_CHECKSUM)

    def found(self, error: ArchiveError) -> None:
        """Something is wrong with the archive, or with its manifest."""
        self._tell(damage_of(error))
        self._remember(error)

    def _remember(self, error: ArchiveError | None) -> None:
        self.error = self.error or error

    def are_spoilt(self, dev_ids: Collection[int]) -> bool:
        """Return whether it is clear already that one of these devices will not be whole."""
        return self.manifest_failed or any(
            dev_id in self._surely_damaged or self._census.reasons(dev_id) - {_WRONG_DIGEST}
            for dev_id in dev_ids
        )

    # --- At the end

    def finish(self, archive_bytes: int, check: Callable[[], None]) -> None:
        """The archive has ended, and all digests were compared."""
        self._tell_lost()
        self._finish_manifest(archive_bytes)
        self._acquit(check)
        for find in self._shared:
            self._tell(find)
        for find in self._census.finish():
            self._tell(find)
        self._remember(self._census.first_error)
        if self._walk is not None:
            self.data_checked = self._walk.is_complete
            # Without a header the disks have numbers for names.
            if self.totals is not None and self._archive.header_error is None:
                self._compare_devices(self.totals)
        elif not any(self._missing(device) for device in self._header.devices):
            # A gap, and nothing is missing: so bytes were added, and perhaps not only there.
            for extent in self._before_gaps:
                self._census.mark(extent.runs, _SHIFTED)

    @property
    def totals(self) -> Totals | None:
        """The manifest's, after `finish`."""
        return self._walk.totals if self._walk is not None else None

    def _missing(self, device: Device) -> bool:
        return not self._census.is_complete(device)

    def _finish_manifest(self, archive_bytes: int) -> None:
        if self._walk is None:
            return
        try:
            missed = self._walk.finish()
        except ArchiveError as error:
            self.found(error)
            self.manifest_failed = True
            self._walk = None
            self._unchecked.update(device.dev_id for device in self._header.devices)
            return
        if missed:
            self._tell(
                Damage(f"the manifest lists {missed} more extents", archive_offset=archive_bytes)
            )
            self._remember(
                ArchiveError(
                    "the archive ends here, and the manifest lists more extents",
                    offset=archive_bytes,
                )
            )

    def _acquit(self, check: Callable[[], None]) -> None:
        """Find out which devices are whole although they share a damaged extent.

        A device's own digest says so, where its clusters came in order.
        """
        digests = {t.dev_id: t.digest for t in self.totals.devices} if self.totals else {}
        suspects = {
            device.dev_id
            for device in self._header.devices
            if self._census.reasons(device.dev_id) == {_WRONG_DIGEST}
            and device.dev_id not in self._surely_damaged
            and not self._missing(device)
            and digests.get(device.dev_id) is not None
        }
        if not suspects:
            return
        found = self._streamed
        if isinstance(self._archive.source, PlainFile):
            found = digests_of_file(self._archive, suspects, check)
        for dev_id in suspects:
            if found is not None and found.digest(dev_id) == digests[dev_id]:
                self._census.unmark(dev_id, _WRONG_DIGEST)
                device = self._header.device(dev_id)
                name = device.name if device is not None else ""
                self._shared = [find for find in self._shared if find.device != name]

    def _compare_devices(self, totals: Totals) -> None:
        listed = [(d.dev_id, d.name, d.size_bytes) for d in totals.devices]
        found = [(d.dev_id, d.name, d.size_bytes) for d in self._header.devices]
        if sorted(listed) != sorted(found):
            self._tell(Damage("the manifest's list of devices is not the archive's"))
            self._remember(DigestError("the manifest's list of devices is not the archive's"))

    def states(self) -> list[DiskState]:
        """The verdict on each device, after `finish`."""
        return [self._state(device) for device in self._header.devices]

    def ranges(self, device: Device) -> Iterator[BadRange]:
        """Yield all that is missing or damaged of a device, in order."""
        yield from self._census.ranges(device)
        if device.is_vmstate and self._end_may_be_missing(device):
            end = self.vmstate_clusters(device.dev_id) * CLUSTER_BYTES
            yield BadRange(end, 0, "missing", "its end may be missing: its length stands nowhere")

    def vmstate_clusters(self, dev_id: int) -> int:
        """How long the vmstate stream is, in clusters."""
        return self._census.vmstate_clusters(dev_id)

    def clusters_seen(self, device: Device) -> int:
        """How many different clusters of it have come."""
        return self._census.clusters_seen(device)

    @property
    def proved(self) -> str | None:
        """Text about what the compression's checksums have proved; None without compression."""
        proof = self._proof
        if proof is None:
            return None
        name = self._archive.source.compression
        if name == "lzo":
            return "the lzo checksums of all blocks are right" if proof.parts_with else None
        what = {"zstd": "frame", "gzip": "member"}[name]
        kind = {"zstd": "checksum", "gzip": "CRC"}[name]
        if not proof.parts:
            return (
                f"no zstd {what} ended well" if name == "zstd" else f"no {name} {what} ended well"
            )
        if proof.parts_with == proof.parts:
            which = f"of all {proof.parts} {what}s" if proof.parts > 1 else f"of the {what}"
            return f"the {name} {kind} {which} that could be read is right"
        return f"{proof.parts_with} of {proof.parts} {name} {what}s have a {kind}"

    def _state(self, device: Device) -> DiskState:
        shown: list[BadRange] = []
        count = missing = damaged = 0
        is_complete = True
        for found in self.ranges(device):
            count += 1
            is_complete = is_complete and found.state != "missing"
            missing += found.length if found.state == "missing" else 0
            damaged += found.length if found.state == "damaged" else 0
            if len(shown) < MAX_DAMAGE:
                shown.append(found)
        checked_by: CheckerName | None = None
        state: StateName = UNCHECKED
        if not is_complete:
            state = INCOMPLETE
        elif count:
            state = DAMAGED
        else:
            checked_by = self._checked_by(device)
            state = UNCHECKED if checked_by is None else SOUND
        return DiskState(device, state, checked_by, missing, damaged, count, tuple(shown))

    def _checked_by(self, device: Device) -> CheckerName | None:
        """Return what has proved the data of a device that has nothing wrong."""
        if self._walk is not None:
            return "manifest" if device.dev_id not in self._unchecked else None
        proof = self._proof
        if self._archive.header_error is not None:
            return None  # its length is unknown
        if proof is None or not proof.parts_with or proof.parts_with < proof.parts:
            return None
        whole = not self._unproven.holds(device.dev_id, proof)
        # Only a compression has a proof.
        return cast("CheckerName", self._archive.source.compression) if whole else None

    def _end_may_be_missing(self, device: Device) -> bool:
        totals = self.totals
        if totals is not None:
            listed = [t.clusters for t in totals.devices if t.dev_id == device.dev_id]
            return listed != [self._census.clusters_seen(device)]
        others = [other for other in self._header.devices if not other.is_vmstate]
        return self._is_cut or self._gaps > 0 or any(self._missing(other) for other in others)


class _Unproven:
    """Clusters whose part of the compressed file has not ended yet: nothing vouches for them."""

    def __init__(self) -> None:
        self._recent: deque[tuple[int, tuple[ClusterRun, ...]]] = deque()
        self._older: dict[int, ClusterSet] = {}
        self._older_end = 0

    def add(self, extent: Extent, proof: Proof) -> None:
        self._forget(proof)
        self._recent.append((extent.offset + extent.total_bytes, extent.runs))
        if len(self._recent) > _MAX_RECENT:
            self._older_end, runs = self._recent.popleft()
            for run in runs:
                if run.dev_id not in self._older:
                    self._older[run.dev_id] = ClusterSet(MAX_CLUSTERS)
                self._older[run.dev_id].add_all(run.first_cluster, run.count)

    def _forget(self, proof: Proof) -> None:
        while self._recent and self._recent[0][0] <= proof.proven_bytes:
            self._recent.popleft()
        if self._older and self._older_end <= proof.proven_bytes:
            self._older = {}

    def failed(self, start: int, mark: Callable[[int, int, int], None]) -> None:
        """Mark what came from this plain position on as damaged."""
        if self._older_end > start:
            for dev_id, clusters in self._older.items():
                for first, count in clusters.present():
                    mark(dev_id, first, count)
            self._older = {}
        for end, runs in self._recent:
            if end > start:
                for run in runs:
                    mark(run.dev_id, run.first_cluster, run.count)
        self._recent = deque(one for one in self._recent if one[0] <= start)

    def holds(self, dev_id: int, proof: Proof) -> bool:
        """Return whether something of this device is unproven at the end."""
        self._forget(proof)
        return dev_id in self._older or any(
            run.dev_id == dev_id for _, runs in self._recent for run in runs
        )


def damaged_data(extent: Extent, names: dict[int, str]) -> DigestError:
    """Make the error for an extent whose digest is wrong: which bytes of which devices."""
    places = []
    for run in extent.runs[:_MAX_PLACES]:
        start = run.first_cluster * CLUSTER_BYTES
        name = names.get(run.dev_id)
        label = f"device {run.dev_id}" if name is None else repr(name)
        places.append(f"{label} bytes {start}..{start + run.count * CLUSTER_BYTES - 1}")
    if len(extent.runs) > _MAX_PLACES:
        places.append(f"{len(extent.runs) - _MAX_PLACES} more ranges")
    return DigestError(
        f"the data is damaged (its digest is not the manifest's), somewhere in "
        f"{', '.join(places) or 'an extent without data'}",
        offset=extent.offset,
    )


def damaged_runs(extent: Extent, header: Header) -> Iterator[Damage]:
    """An extent whose digest is wrong: somewhere in these bytes of these devices."""
    text = "the data is damaged, somewhere in this range: the digest is not the manifest's"
    stored = [run for run in extent.runs if not run.is_zero]
    for run in stored:
        device = header.device(run.dev_id)
        start = run.first_cluster * CLUSTER_BYTES
        length = run.count * CLUSTER_BYTES
        name = f"{run.dev_id}" if device is None else device.name
        if device is not None and not device.is_vmstate:
            length = max(0, min(length, device.size_bytes - start))
        yield Damage(text, name, start, length, extent.offset)
    if not stored:
        yield Damage("an extent without data is not the stored one", archive_offset=extent.offset)
