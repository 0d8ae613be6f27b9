# SPDX-License-Identifier: Apache-2.0
"""Opens an archive whose header is damaged or lost: what its extents tell stands in for it."""

from __future__ import annotations

from vmapipe.restore.archive.compressed import ReadOptions
from vmapipe.restore.archive.reading import Archive, open_archive
from vmapipe.restore.archive.source import open_source
from vmapipe.restore.archive.survey import Gap, find_first_extent, survey
from vmapipe.restore.checks.manifest import Manifest, manifest_beside
from vmapipe.restore.errors import SourceError
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.objectstore import is_object
from vmapipe.vma.errors import ArchiveError, NotAnArchiveError
from vmapipe.vma.header import Device, Header
from vmapipe.vma.layout import CLUSTER_BYTES, UUID_BYTES
from vmapipe.vma.manifest import Totals


def open_damaged(
    name: str, cancel: Cancel, options: ReadOptions, manifest: str | None = None
) -> Archive:
    """As `open_archive`; but where the header is damaged, devices and sizes come from the extents.

    `manifest`: where it is not beside the archive; it knows the sizes exactly. The archive's
    `notes` tell what is lost or guessed. Raises as `open_archive`, where there is not one extent.
    """
    options = options._replace(salvage=True)
    try:
        return open_archive(name, cancel, options)
    except ArchiveError as error:
        return _open_without_header(name, cancel, options, manifest, error)


def _open_without_header(
    name: str, cancel: Cancel, options: ReadOptions, manifest: str | None, error: ArchiveError
) -> Archive:
    with _at_first_extent(name, cancel, options, error) as archive:
        if archive.source.path is None and not is_object(name):
            raise SourceError(
                f"{error}: without it the archive has to be read twice, and {archive.source.name} "
                "can be read only once: store it in a file first"
            )
        ends: dict[int, int] = {}
        for find in survey(archive, cancel.check):
            if not isinstance(find, Gap):
                for run in find.extent.runs:
                    end = run.first_cluster + run.count
                    ends[run.dev_id] = max(ends.get(run.dev_id, 0), end)
        totals = _totals(archive, manifest, cancel)
    return _with_devices(_at_first_extent(name, cancel, options, error), ends, totals, error)


def _at_first_extent(
    name: str, cancel: Cancel, options: ReadOptions, error: ArchiveError
) -> Archive:
    """The archive opened once more, its header empty but for what its first extent says.

    Raises `error` where there is no extent.
    """
    source = open_source(name, cancel, options)
    try:
        archive = Archive(source, Header(bytes(UUID_BYTES), 0, (), ()), b"")
        if not find_first_extent(archive, cancel.check):
            raise error
    except BaseException:
        source.close()
        raise
    return archive


def _totals(archive: Archive, path: str | None, cancel: Cancel) -> Totals | None:
    """The manifest's, where there is one of this very archive."""
    path = path or manifest_beside(archive.source, cancel)
    if path is None:
        return None
    try:
        with Manifest(path, cancel) as manifest:
            if manifest.opening.uuid != archive.header.uuid:
                return None
            while not isinstance(line := manifest.next(), Totals):
                cancel.check()
            return line
    except ArchiveError:
        return None


def _with_devices(
    archive: Archive, ends: dict[int, int], totals: Totals | None, error: ArchiveError
) -> Archive:
    known = {device.dev_id: device for device in (totals.devices if totals is not None else ())}
    kind = "it is not there" if isinstance(error, NotAnArchiveError) else str(error)
    notes = [f"the header is lost ({kind}): the configs are, too, and the disks' names"]
    devices: list[Device] = []
    for dev_id in sorted({*ends, *known}):
        listed = known.get(dev_id)
        if listed is not None:
            size_bytes = listed.size_bytes
            notes.append(
                f"disk {dev_id} was {listed.name!r}, {size_bytes} bytes: the manifest says so"
            )
        else:
            size_bytes = ends[dev_id] * CLUSTER_BYTES
            notes.append(
                f"disk {dev_id} has at least {size_bytes - CLUSTER_BYTES + 1} bytes, and {size_bytes} "
                "in its file: up to 65535 bytes at its end are not its own, unless more of its end "
                "is missing"
            )
        devices.append(Device(dev_id, str(dev_id), size_bytes))
    archive.header = archive.header._replace(devices=tuple(devices))
    archive.notes = notes
    archive.header_error = error
    return archive
