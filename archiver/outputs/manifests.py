# SPDX-License-Identifier: Apache-2.0
"""The manifest: its digests, and where it goes (beside the archive, a named place, events).

What each digest covers, and why: docs/decisions/0004-manifest-digests.md. Only this file of the
room imports xxhash.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from xxhash import xxh3_128

from vmapipe.archiver.outputs.base import Buffers, Output, OutputWrapper
from vmapipe.archiver.outputs.cluster_digests import SUFFIX as DIGESTS_SUFFIX
from vmapipe.archiver.outputs.cluster_digests import DigestFile, file_bytes
from vmapipe.archiver.outputs.file import FileOutput
from vmapipe.clusters.sizes import BLOCK_BYTES, CLUSTER_BYTES, EXTENT_HEADER_BYTES
from vmapipe.vma.header import Device, Header
from vmapipe.vma.manifest import (
    VERSION,
    VERSION_SIGNED,
    VERSION_WITH_BASE,
    DeviceTotals,
    ExtentDigest,
    Opening,
    Totals,
    extent_line,
    opening_line,
    totals_line,
)
from vmapipe.vma.packer import PackedExtent, PackedRun

if TYPE_CHECKING:
    from vmapipe.archiver.outputs.object import ObjectOutput
    from vmapipe.crypt.age import Recipient
    from vmapipe.vma.sealed import StoredFile

SUFFIX = ".manifest.json"
#: Behind a manifest's name.
SIGNATURE_SUFFIX = ".sig"
# Lines of 40 bytes are not worth a system call each.
_BUFFER_BYTES = 64 << 10


class ManifestSink(Protocol):
    """Takes a manifest line by line. Errors are Failures."""

    def line(self, text: str) -> None:
        """The next line, with its end."""

    def commit(self) -> None:
        """All lines are there."""

    def abandon(self) -> None:
        """Leave nothing behind, after a commit too. Never raises."""


class ManifestOutput:
    """Lines into an output, which is committed like an archive: a stream's cannot be taken back."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._lines: list[bytes] = []
        self._length = 0
        self._committed = False

    def line(self, text: str) -> None:
        raw = text.encode()
        self._lines.append(raw)
        self._length += len(raw)
        if self._length >= _BUFFER_BYTES:
            self._flush()

    def commit(self) -> None:
        self._flush()
        self._output.commit()
        self._committed = True

    def abandon(self) -> None:
        self._output.abandon()
        if self._committed:
            self._committed = False
            self._remove()

    def _remove(self) -> None:
        """Take it back after its commit, if that can be. Never raises."""

    def _flush(self) -> None:
        lines, self._lines, self._length = self._lines, [], 0
        self._output.write([b"".join(lines)])


class ManifestFile(ManifestOutput):
    """A file. `replace`: one that exists is stale.

    That is so beside an archive that does not exist yet. A file that the user
    named is not replaced.
    """

    def __init__(self, path: str, *, replace: bool) -> None:
        self._file = FileOutput(path, replace=replace)
        super().__init__(self._file)

    def _remove(self) -> None:
        self._file.withdraw()


class ManifestObject(ManifestOutput):
    """An object of a store; `replace` as for a file.

    `prepare` is called before the commit: it sees to it that the archive can follow at once, and
    that nobody has made the same one meanwhile, whose manifest would not be stale.
    """

    def __init__(self, output: ObjectOutput, prepare: Callable[[], None]) -> None:
        super().__init__(output)
        self._object = output
        self._prepare = prepare

    def commit(self) -> None:
        self._prepare()
        super().commit()

    def _remove(self) -> None:
        self._object.remove()


class ManifestLines:
    """Hands each line to a function, for instance as an event."""

    def __init__(self, take: Callable[[str], None]) -> None:
        self._take = take

    def line(self, text: str) -> None:
        self._take(text)

    def commit(self) -> None:
        """Do nothing: the reader of the lines knows the last one by its start."""

    def abandon(self) -> None:
        """Do nothing: lines that were reported stay; the job's end tells that it failed."""


def beside(archive: str) -> str:
    """The path of an archive's manifest, or its object's name."""
    return archive + SUFFIX


def files_of(archive: str) -> list[str]:
    """The paths of an archive and of all that is stored together with it."""
    manifest = beside(archive)
    return [archive, manifest, manifest + SIGNATURE_SUFFIX, archive + DIGESTS_SUFFIX]


# The output has waited for its commit before; what is left is a few calls.
_SETTLE_S = 0.5


class Digests:
    """Hashes what one thread hands it, in order, and hands the manifest's lines to `sink`.

    `recipients`: whom the archive is encrypted to. The manifest tells nobody else what is in it.
    `to_be_signed`: it gets a digest of the stored file that stops a forger, too.
    """

    def __init__(
        self,
        sink: ManifestSink,
        clusters: DigestFile | None = None,
        recipients: Sequence[Recipient] = (),
        *,
        to_be_signed: bool = False,
    ) -> None:
        self._sink = sink
        self._sha256 = hashlib.sha256() if to_be_signed else None
        self._line = sink.line
        self._seal: Callable[[StoredFile], None] | None = None
        if recipients:
            # Late: a compiled library takes 30 ms, and most backups do not encrypt.
            from vmapipe.archiver.outputs.encrypt import ManifestSealer

            sealer = ManifestSealer(recipients, sink.line)
            self._line, self._seal = sealer.line, sealer.finish
        self._clusters = clusters
        self._clusters_bytes = 0
        self._devices: dict[int, _DeviceHasher] = {}
        self._extents = 0
        self._archive_bytes = 0
        self._file = xxh3_128()
        self._file_bytes = 0
        #: Of the manifest's last line.
        self.incrementals = 0

    def begin(
        self,
        header: Header,
        raw_header: bytes,
        based: Mapping[int, Device] | None = None,
        version: int = VERSION,
    ) -> None:
        """`based`: the devices that have a base, by their dev_ids there."""
        self._devices = {device.dev_id: _DeviceHasher(device) for device in header.devices}
        self._archive_bytes = len(raw_header)
        if self._clusters is not None:
            version = VERSION_WITH_BASE
            self._clusters.begin(header.uuid, header.devices, based or {})
            self._clusters_bytes = file_bytes(header.devices)
        if self._sha256 is not None:
            version = VERSION_SIGNED
        opening = Opening(header.uuid, header.ctime_s, digest_of([raw_header]), version)
        self._line(opening_line(opening))

    def extents(self, batch: Sequence[PackedExtent[Any]]) -> None:
        """The next extents of the archive, in order."""
        for extent in batch:
            each: list[Buffers] = [extent.buffers]
            if extent.extents > 1:  # of zeroes: headers alone, back to back
                headers = memoryview(extent.buffers[0])
                starts = range(0, len(headers), EXTENT_HEADER_BYTES)
                each = [[headers[at : at + EXTENT_HEADER_BYTES]] for at in starts]
            for buffers in each:
                digest = digest_of(buffers)
                self._line(extent_line(self._extents, digest))
                self._extents += 1
                self._archive_bytes += digest.total_bytes
            for dev_id, first, count, masks, data in extent.clusters:
                self._devices[dev_id].add(first, count, masks, data)
            if self._clusters is not None:
                self._clusters.add(extent.clusters)

    def changed(self, clusters: Sequence[PackedRun]) -> None:
        """Which clusters of the extents are not as in the base."""
        if self._clusters is not None:
            self._clusters.add_changed(clusters)

    def stored(self, buffers: Buffers) -> None:
        """The next bytes of the file, in order."""
        for buffer in buffers:
            self._file_bytes += len(buffer)
            self._file.update(buffer)
            if self._sha256 is not None:
                self._sha256.update(buffer)

    def finish(self) -> None:
        """Write the manifest's last line and commit it. Raises Failure."""
        totals = Totals(
            extents=self._extents,
            archive_bytes=self._archive_bytes,
            file_bytes=self._file_bytes,
            file_digest=self._file.digest(),
            devices=tuple(device.totals() for device in self._devices.values()),
            incrementals=self.incrementals,
            cluster_digests_bytes=self._clusters_bytes,
            file_sha256=self._sha256.digest() if self._sha256 is not None else b"",
        )
        if self._clusters is not None:
            self._clusters.commit()
        self._line(totals_line(totals))
        if self._seal is not None:
            # Imported here: few archives are encrypted.
            from vmapipe.vma.sealed import StoredFile

            self._seal(StoredFile(totals.file_bytes, totals.file_digest, totals.file_sha256))
        self._sink.commit()

    def abandon(self) -> None:
        """Leave no manifest behind, not even a committed one. Never raises."""
        self._sink.abandon()
        if self._clusters is not None:
            self._clusters.abandon()


class _DeviceHasher:
    """One device's totals, and its digest as long as its clusters come in order."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._next = 0
        self._clusters = 0
        self._stored_bytes = 0
        self._in_order = True
        self._hasher = xxh3_128()

    def add(self, first: int, count: int, masks: bytes, data: memoryview) -> None:
        """Clusters in the packer's form: no masks where all are zero."""
        self._clusters += count
        self._stored_bytes += len(data)
        self._in_order = self._in_order and first == self._next
        if not self._in_order:
            return
        self._next += count
        if not masks:
            self._hasher.update(bytes(2 * count))
            return
        at = 0
        for index in range(0, 2 * count, 2):
            mask = masks[index : index + 2]
            stop = at + int.from_bytes(mask, "big").bit_count() * BLOCK_BYTES
            self._hasher.update(mask)
            self._hasher.update(data[at:stop])
            at = stop

    def digest(self) -> bytes | None:
        complete = self._device.is_vmstate or self._next == self._device.clusters
        return self._hasher.digest() if self._in_order and complete else None

    def totals(self) -> DeviceTotals:
        device = self._device
        return DeviceTotals(
            dev_id=device.dev_id,
            name=device.name,
            size_bytes=device.size_bytes,
            clusters=self._clusters,
            zero_bytes=self._clusters * CLUSTER_BYTES - self._stored_bytes,
            digest=self.digest(),
        )


class DigestedOutput(OutputWrapper):
    """Lets `digests` see the bytes that an output gets, and commits the manifest first.

    An archive under its final name then has its manifest beside it. What a
    crash between the two commits leaves is a manifest without an archive: the
    next backup of that name replaces it.
    """

    def __init__(self, inner: Output, digests: Digests) -> None:
        super().__init__(inner)
        self._digests = digests
        self._committing = threading.Lock()
        self._committed = False

    def write(self, buffers: Buffers) -> None:
        self._digests.stored(buffers)
        self._inner.write(buffers)

    def write_shared(self, buffers: Buffers, places: Sequence[int], fd: int) -> None:
        """As `FileOutput.write_shared`, if that is where it goes."""
        self._digests.stored(buffers)
        if isinstance(self._inner, FileOutput):
            self._inner.write_shared(buffers, places, fd)
        else:
            self._inner.write(buffers)

    def commit(self) -> None:
        with self._committing:
            self._digests.finish()
            self._inner.commit()
            self._committed = True

    def abandon(self) -> None:
        self._inner.abandon()
        # A commit that hangs in another thread can no longer give the archive its name.
        through = self._committing.acquire(timeout=_SETTLE_S)
        if not self._committed:
            self._digests.abandon()
        if through:
            self._committing.release()


def digest_of(buffers: Buffers) -> ExtentDigest:
    """Length and digest of a header or an extent, as the manifest has them."""
    hasher, size_bytes = xxh3_128(), 0
    for buffer in buffers:
        hasher.update(buffer)
        size_bytes += len(buffer)
    return ExtentDigest(size_bytes, hasher.digest())
