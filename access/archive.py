# SPDX-License-Identifier: Apache-2.0
"""An archive that is open for access at any place: its index, and a check of what is read.

Each extent is compared with the manifest when it is first touched, header and data. Where
there is no manifest its header is checked, which VMA protects, and the data cannot be.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vmapipe.access.frames import FrameStorage
from vmapipe.access.index import (
    ArchiveIndex,
    IndexBuilder,
    StoredRun,
)
from vmapipe.access.kept_index import keep_index, kept_index
from vmapipe.access.open_storage import Caches, open_storage
from vmapipe.access.storage import (
    DamageError,
    SpoolStorage,
    Storage,
    damage_error,
)
from vmapipe.clusters.sizes import CLUSTER_BYTES, EXTENT_HEADER_BYTES, MAX_EXTENT_CLUSTERS
from vmapipe.restore.archive.digest import extent_digest
from vmapipe.restore.archive.errors import DigestError, InputError
from vmapipe.restore.archive.manifest import Manifest, manifest_beside
from vmapipe.restore.archive.reader import check_opening
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import os_error_text
from vmapipe.runtime.process import failure_text
from vmapipe.vma.errors import ArchiveError, ExtentError
from vmapipe.vma.extent import Extent, parse_extent_header
from vmapipe.vma.header import PEEK_BYTES, Header, parse_header, peek_header_bytes
from vmapipe.vma.manifest import ExtentDigest

if TYPE_CHECKING:
    from vmapipe.crypt.age import AgeIdentity

# Bytes read at a time while headers of zero extents follow each other.
_HEADERS_BYTES = 64 << 10
# The thread that makes an index ends with the extent that it is at.
_JOIN_S = 5.0
# The largest extent that there can be; and how much memory for such is kept.
_CHECK_BYTES = EXTENT_HEADER_BYTES + MAX_EXTENT_CLUSTERS * CLUSTER_BYTES
_KEPT_BUFFERS = 4
# The first of an archive's damages says that it is damaged; a log has all.
_MAX_DAMAGE = 16
Report = Callable[[str], None]


class OpenArchive:
    """One archive, opened once; its name may change or vanish afterwards.

    Every method may be called by any thread.
    """

    def __init__(self, name: str, storage: Storage, header: Header, report: Report) -> None:
        self.name = name
        self.header = header
        self.storage = storage
        self.index = ArchiveIndex(header.uuid)
        #: What was told of damage, the first of it.
        self.damage: list[str] = []
        self._report = report
        # By extent: whether it is good; and of those that are damaged, why.
        self._good = bytearray()
        self._damaged: dict[int, str] = {}
        self._checked = threading.Condition()
        self._under_check: set[int] = set()
        # For checks: fresh memory would cost more than the reading.
        self._buffers: list[memoryview] = []
        # While the index is being made: what is there of it, and why there will be no more.
        self._builder: IndexBuilder | None = None
        self._grown = threading.Condition()
        self._broken = ""
        self._thread: threading.Thread | None = None
        self._is_closing = False

    def use(self, index: ArchiveIndex) -> None:
        """The whole index is there."""
        with self._grown:
            self.index = index
            self._builder = None
            self._grown.notify_all()

    def find(self, dev_id: int, cluster: int) -> StoredRun:
        """The run that `cluster` is in. Waits for it where the index is still being made."""
        disk = self.index.disks.get(dev_id)
        if disk is not None:
            return disk.find(cluster)
        with self._grown:
            while self._builder is not None:
                place = self._builder.find(dev_id, cluster)
                if place is not None:
                    return place
                if self._broken:
                    raise OSError(errno.EIO, self._named(self._broken))
                self._grown.wait()
        return self.index.disks[dev_id].find(cluster)

    def grow(self, builder: IndexBuilder, build: Callable[[IndexBuilder], ArchiveIndex]) -> None:
        """Make the index in a thread; what is there of it is used at once."""
        self.index = builder.index
        self._builder = builder

        def work() -> None:
            try:
                index = build(builder)
            except Exception as error:  # noqa: BLE001  readers wait for it: they hear of any end
                why = failure_text(error)
                if isinstance(error, ArchiveError):
                    self.tell_damage(why)
                elif not self._is_closing:
                    self.tell(why)
                with self._grown:
                    self._broken = why
                    self._grown.notify_all()
            else:
                self.use(index)

        self._thread = threading.Thread(target=work, name="index", daemon=True)
        self._thread.start()

    def has_grown(self) -> None:
        """There is more of the index. Raises InputError where nobody wants it any more."""
        if self._is_closing:
            raise InputError(f"{self.name} is closed")
        with self._grown:
            self._grown.notify_all()

    def tell(self, text: str) -> None:
        """A line for the log."""
        self._report(self._named(text))

    def _named(self, text: str) -> str:
        return text if text.startswith(self.name) else f"{self.name}: {text}"

    def tell_damage(self, text: str) -> None:
        """A line for the log, of what is wrong in the archive itself."""
        if len(self.damage) < _MAX_DAMAGE:
            self.damage.append(text)
        self.tell(text)

    def is_checked(self, extent: int) -> bool:
        return extent < len(self._good) and bool(self._good[extent])

    def ensure(self, extent: int, wanted: str) -> None:
        """Check this extent, once. Raises DamageError, or another OSError where it cannot be read now.

        `wanted`: what is to be read from it, for the line that says so.
        """
        if self.is_checked(extent):
            return
        offset = self.index.offsets[extent]
        with self._checked:
            while extent in self._under_check:
                self._checked.wait()
            if self.is_checked(extent):
                return
            if extent in self._damaged:
                raise damage_error(self.name, offset, self._damaged[extent])
            self._under_check.add(extent)
        damage, is_good = "", False
        try:
            self._check(extent)
            is_good = True
        except (ArchiveError, DamageError) as error:
            damage = _damage_text(error)
        finally:
            # What else may happen (a store that does not answer, no memory) says nothing of the
            # archive: whoever reads next tries again.
            with self._checked:
                self._under_check.discard(extent)
                if is_good:
                    missing = max(0, len(self.index.offsets) - len(self._good))
                    self._good += bytes(missing)
                    self._good[extent] = 1
                elif damage:
                    self._damaged[extent] = damage
                self._checked.notify_all()
        if damage:
            self.tell_damage(f"the extent at offset {offset} is damaged ({wanted}): {damage}")
            raise damage_error(self.name, offset, damage)

    def _check(self, extent: int) -> None:
        offset, size = self.index.offsets[extent], self.index.sizes[extent]
        digest = self.index.digest_of(extent)
        if digest and isinstance(self.storage, FrameStorage):
            return self._check_parts(extent, list(self.storage.pieces(offset, size)), digest)
        buffer = self._buffers.pop() if self._buffers else memoryview(bytearray(_CHECK_BYTES))
        try:
            raw = buffer[: size if digest else EXTENT_HEADER_BYTES]
            self._check_parts(extent, [raw[: self.storage.read_into(raw, offset)]], digest)
        finally:
            if len(self._buffers) < _KEPT_BUFFERS:
                self._buffers.append(buffer)

    def _check_parts(self, extent: int, parts: Sequence[memoryview], digest: bytes) -> None:
        """`parts`: all of it; without a `digest` its header."""
        offset, size = self.index.offsets[extent], self.index.sizes[extent]
        if sum(map(len, parts)) < (size if digest else EXTENT_HEADER_BYTES):
            raise ExtentError("the archive ends inside it", offset=offset)
        if digest and extent_digest(*parts) != digest:
            raise DigestError("it is not what was stored: its digest differs", offset=offset)
        # A piece may end inside a header, where a frame does.
        raw = b"".join(part[:EXTENT_HEADER_BYTES] for part in parts[:2])[:EXTENT_HEADER_BYTES]
        found = parse_extent_header(raw, self.header.uuid, offset)
        if found.total_bytes != size or not self.index.agrees_with(extent, found):
            raise ExtentError("its header is not the one that was indexed", offset=offset)

    def close(self) -> None:
        self._is_closing = True
        if self._thread is not None:
            # It reads from the storage, and waits for what is decompressed.
            if isinstance(self.storage, SpoolStorage):
                self.storage.stop()
            self._thread.join(_JOIN_S)
            if self._thread.is_alive():
                return  # it ends with the process, and so do its files
        self.storage.close()


def open_for_access(name: str, cancel: Cancel, report: Report, caches: Caches) -> OpenArchive:
    """Open the archive `name`, a path or s3://…, with its manifest if that stands beside it.

    `report` is called with a line about what is damaged or cannot be checked. Raises
    InputError, ArchiveError, UsageError, Cancelled.
    """
    storage, identity = open_storage(name, cancel, caches)
    try:
        header, raw_header = _read_header(storage)
        archive = OpenArchive(name, storage, header, report)
        manifest = _manifest(name, header, raw_header, cancel, caches.identities)
        if manifest is None:
            archive.tell("there is no manifest beside it, so its data cannot be checked")
        elif identity:
            status = os.stat(manifest.path)
            identity = (*identity, status.st_size, status.st_mtime_ns)

        def build(builder: IndexBuilder) -> ArchiveIndex:
            with manifest or contextlib.nullcontext():
                return _build(archive, builder, len(raw_header), manifest, cancel)

        if isinstance(storage, SpoolStorage):
            archive.grow(IndexBuilder(header), build)
            return archive
        folder = caches.index_folder if identity else None
        index = kept_index(folder, identity, header)
        if index is None:
            index = build(IndexBuilder(header))
            # Damage has to be told anew each time, so it is looked for anew.
            # A machine's memory takes less than the header, which was written before, has room for.
            disks = [d for d in header.devices if not d.is_vmstate]
            if not any(index.disks[device.dev_id].missing() for device in disks):
                keep_index(folder, identity, index)
        elif manifest is not None:
            manifest.close()
        archive.use(index)
        return archive
    except BaseException:
        storage.close()
        raise


def _read_header(storage: Storage) -> tuple[Header, bytes]:
    try:
        start = _read(storage, PEEK_BYTES, 0)
        raw = _read(storage, peek_header_bytes(start), 0)
    except DamageError as error:
        raise InputError(os_error_text(error)) from error
    return parse_header(raw), raw


def _read(storage: Storage, length: int, offset: int) -> bytes:
    """Fewer bytes only at the end. Raises DamageError, InputError."""
    try:
        if isinstance(storage, FrameStorage):
            start = storage.read_start(length, offset)
            if len(start) == length:
                return start
        view = memoryview(bytearray(length))
        return bytes(view[: storage.read_into(view, offset)])
    except DamageError:
        raise
    except OSError as error:
        raise InputError(os_error_text(error)) from error


class _Headers:
    """Extents' headers, from the first to the last. Those without data stand one behind the other."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._chunk = b""
        self._chunk_at = 0

    def read(self, at: int) -> bytes:
        """Return the header at `at`, shorter only at the end. Raises DamageError, InputError."""
        start = at - self._chunk_at
        if not 0 <= start <= len(self._chunk) - EXTENT_HEADER_BYTES:
            follows = bool(self._chunk) and start == len(self._chunk)
            self._chunk, self._chunk_at, start = b"", at, 0
            self._chunk = self._read_chunk(at, _HEADERS_BYTES if follows else EXTENT_HEADER_BYTES)
        return self._chunk[start : start + EXTENT_HEADER_BYTES]

    def _read_chunk(self, at: int, length: int) -> bytes:
        try:
            return _read(self._storage, length, at)
        except DamageError:
            if length == EXTENT_HEADER_BYTES:
                raise
            return _read(self._storage, EXTENT_HEADER_BYTES, at)  # it may lie behind this header


def _manifest(
    name: str,
    header: Header,
    raw_header: bytes,
    cancel: Cancel,
    identities: tuple[AgeIdentity, ...],
) -> Manifest | None:
    path = manifest_beside(name, cancel)
    if path is None:
        return None
    manifest = Manifest(path, cancel, identities)
    try:
        check_opening(header, raw_header, manifest)
    except BaseException:
        manifest.close()
        raise
    return manifest


def _build(
    archive: OpenArchive, builder: IndexBuilder, at: int, manifest: Manifest | None, cancel: Cancel
) -> ArchiveIndex:
    """Walk along all extents' headers.

    What is damaged is told and left out: its clusters are missing from the index, and so an
    I/O error to their readers. With a manifest the walk goes on behind a damaged header.
    """
    header, storage = archive.header, archive.storage
    headers = _Headers(storage)
    while at < storage.size_bytes:
        cancel.check()
        line = manifest.next() if manifest is not None else None
        listed = line if isinstance(line, ExtentDigest) else None
        try:
            raw = headers.read(at)
            if not raw:
                break  # the end of what had no known size
            extent = _parse(raw, header, at, listed, manifest is not None)
            if at + extent.total_bytes > storage.size_bytes:
                _check_end(storage)
                raise ExtentError("the archive ends inside an extent's data", offset=at)
        except (ArchiveError, DamageError) as error:
            archive.tell_damage(_damage_text(error))
            if listed is None:
                break
            at += listed.total_bytes
            continue
        builder.add(extent, listed.digest if listed is not None else b"")
        archive.has_grown()
        at += extent.total_bytes
    _check_end(storage)
    index = builder.finish()
    for dev_id, cluster in builder.double.items():
        archive.tell_damage(f"cluster {cluster} of device {dev_id} comes twice: neither is served")
    return index


def _damage_text(error: ArchiveError | DamageError) -> str:
    return str(error) if isinstance(error, ArchiveError) else os_error_text(error)


def _check_end(storage: Storage) -> None:
    """Raises CompressionError or InputError where the stream ended before its end."""
    if isinstance(storage, SpoolStorage):
        storage.check_end()


def _parse(
    raw: bytes, header: Header, at: int, listed: ExtentDigest | None, has_manifest: bool
) -> Extent:
    """Raises ArchiveError. An extent without data is compared at once: it is not read again."""
    extent = parse_extent_header(raw, header.uuid, at)
    if has_manifest and (listed is None or listed.total_bytes != extent.total_bytes):
        raise DigestError(
            "an extent that the manifest does not list: the archive was changed", offset=at
        )
    if listed is not None and not extent.data_bytes and extent_digest(raw) != listed.digest:
        raise DigestError("it is not what was stored: its digest differs", offset=at)
    return extent
