# SPDX-License-Identifier: Apache-2.0
"""A manifest for an archive that was made without one."""

from __future__ import annotations

from vmapipe.archiver.outputs.manifests import Digests, ManifestSink
from vmapipe.places.reading import SoundArchive
from vmapipe.places.repack import Tell, as_packed
from vmapipe.restore.archive.source import PlainFile
from vmapipe.restore.verify.verify import stored_bytes_of
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import UsageError


def make_manifest(source: SoundArchive, sink: ManifestSink, tell: Tell, cancel: Cancel) -> int:
    """Read the archive, check all of it that can be checked, and write its manifest. Return the count of extents.

    A compressed archive is read twice. Raises ArchiveError where it is damaged: a manifest would vouch
    for it; UsageError where it can be read only once; Failure, Cancelled.
    """
    if source.source.place is None:
        raise UsageError(
            f"{source.name} can be read only once: store it first, then make its manifest"
        )
    header, raw_header = source.archive.header, source.archive.raw_header
    digests = Digests(sink)
    count = 0
    try:
        digests.begin(header, raw_header)
        is_plain = isinstance(source.source, PlainFile)
        if is_plain:
            digests.stored([raw_header])
        for found in source.extents():
            extent = as_packed(found)
            digests.extents([extent])
            if is_plain:
                digests.stored(extent.buffers)
            count += 1
            tell(found.extent.offset + found.extent.total_bytes)
        if not is_plain:
            for piece in stored_bytes_of(source.source, cancel):
                digests.stored([piece])
        source.check_unchanged()
        digests.finish()
    except BaseException:
        digests.abandon()
        raise
    return count
