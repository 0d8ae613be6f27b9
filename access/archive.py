# SPDX-License-Identifier: Apache-2.0
"""An archive that is open for access at any place: its index, and a check of what is read.

Each extent is compared with the manifest when it is first touched, header and data. Where
there is no manifest its header is checked, which VMA protects, and the data cannot be.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Callable

from vmapipe.access.index import ArchiveIndex, IndexBuilder, decode_index, encode_index
from vmapipe.access.storage import FrameStorage, PlainStorage, Storage, read_error
from vmapipe.restore.archive.compressed import MAGIC_BYTES, is_compressed
from vmapipe.restore.archive.zstd import seekable_frames
from vmapipe.restore.archive.zstdframes import is_zstd
from vmapipe.restore.checks.digest import extent_digest
from vmapipe.restore.checks.manifest import SUFFIX, Manifest
from vmapipe.restore.errors import DigestError, SourceError
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import UsageError, os_error_text
from vmapipe.runtime.objectnames import is_object
from vmapipe.vma.errors import ArchiveError, ExtentError
from vmapipe.vma.extent import Extent, parse_extent_header
from vmapipe.vma.header import PEEK_BYTES, Device, Header, parse_header, peek_header_bytes
from vmapipe.vma.layout import EXTENT_HEADER_BYTES
from vmapipe.vma.manifest import ExtentDigest

# Headers of zeroes stand one behind the other: so many are read at a time.
_HEADERS_BYTES = 64 << 10
_UNKNOWN, _GOOD, _DAMAGED = range(3)
Report = Callable[[str], None]


class OpenArchive:
    """One archive, opened once: what becomes of its name afterwards does not matter.

    Every method may be called by any thread.
    """

    def __init__(self, name: str, storage: Storage, header: Header, report: Report) -> None:
        self.name = name
        self.header = header
        self.storage = storage
        self.index = ArchiveIndex(header.uuid)
        #: Whether its data can be checked.
        self.has_digests = False
        self._report = report
        self._states = bytearray()
        self._why: dict[int, str] = {}
        self._lock = threading.Lock()

    def use(self, index: ArchiveIndex, *, has_digests: bool) -> None:
        self.index = index
        self.has_digests = has_digests
        self._states = bytearray(len(index.offsets))

    def tell(self, text: str) -> None:
        """A line for the log."""
        self._report(f"{self.name}: {text}")

    def is_checked(self, extent: int) -> bool:
        return self._states[extent] == _GOOD

    def ensure(self, extent: int) -> None:
        """Check this extent, unless that was done. Raises OSError (EIO) where it is damaged."""
        if self._states[extent] == _GOOD:
            return
        if self._states[extent] == _DAMAGED:
            raise read_error(self.name, self.index.offsets[extent], self._why[extent])
        offset = self.index.offsets[extent]
        try:
            self._check(extent)
        except (ArchiveError, OSError) as error:
            why = str(error)
            with self._lock:
                is_news = self._states[extent] != _DAMAGED
                self._why[extent] = why
                self._states[extent] = _DAMAGED
            if is_news:
                self.tell(f"the extent at offset {offset} is damaged: {why}")
            raise read_error(self.name, offset, why) from error
        self._states[extent] = _GOOD

    def _check(self, extent: int) -> None:
        offset, size = self.index.offsets[extent], self.index.sizes[extent]
        digest = self.index.digest_of(extent)
        length = size if digest else EXTENT_HEADER_BYTES
        raw = memoryview(bytearray(length))
        got = self.storage.read_into(raw, offset)
        if got < length:
            raise ExtentError("the archive ends inside it", offset=offset)
        if digest and extent_digest(raw) != digest:
            raise DigestError("it is not what was stored: its digest differs", offset=offset)
        found = parse_extent_header(raw[:EXTENT_HEADER_BYTES], self.header.uuid, offset)
        if found.total_bytes != size or not self.index.agrees_with(extent, found):
            raise ExtentError("its header is not the one that was indexed", offset=offset)

    def device(self, name: str) -> Device | None:
        return next((d for d in self.header.devices if d.name == name), None)

    def close(self) -> None:
        self.storage.close()


def open_for_access(
    name: str, cancel: Cancel, report: Report, cache_folder: str | None = None
) -> OpenArchive:
    """Open the archive at the path `name`, with its manifest if that stands beside it.

    `cache_folder`: where its index is kept for the next time; None: nowhere. `report` is
    called with a line about what is damaged or cannot be checked. Raises SourceError,
    ArchiveError, UsageError, Cancelled.
    """
    storage, identity = _open(name, cancel)
    try:
        header, raw_header = _read_header(storage)
        archive = OpenArchive(name, storage, header, report)
        with contextlib.ExitStack() as stack:
            manifest = _manifest(name, header, raw_header, cancel)
            if manifest is None:
                archive.tell("there is no manifest beside it, so its data cannot be checked")
            else:
                stack.enter_context(manifest)
                status = os.stat(manifest.path)
                identity = (*identity, status.st_size, status.st_mtime_ns)
            index = _kept_index(cache_folder, identity, header)
            if index is None:
                index = _build(archive, len(raw_header), manifest, cancel)
                # Damage has to be told anew each time, so it is looked for anew.
                if not any(disk.missing() for disk in index.disks.values()):
                    _keep_index(cache_folder, identity, index)
        archive.use(index, has_digests=manifest is not None)
        return archive
    except BaseException:
        storage.close()
        raise


def _open(name: str, cancel: Cancel) -> tuple[Storage, tuple[int, ...]]:
    """What is read, and by what an index that was kept is known to belong to it."""
    if name == "-" or name.startswith(("fd:", "exec:", "/dev/fdset/")):
        raise UsageError(
            f"{name}: what comes in order, and once, cannot be read at any place: "
            "put the archive into a file first"
        )
    if is_object(name):
        raise UsageError(f"{name}: an object store's archive cannot be served yet: copy it first")
    try:
        # O_NONBLOCK: opening a FIFO would else wait for its writer, deaf to signals.
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise SourceError(f"cannot open the archive {name}: {os_error_text(error)}") from error
    try:
        status = os.fstat(fd)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
            raise SourceError(f"{name} is neither a file nor a block device: it cannot be served")
        size = os.lseek(fd, 0, os.SEEK_END)
        storage = _storage(name, fd, size, cancel)
    except OSError as error:
        os.close(fd)
        raise SourceError(f"cannot read {name}: {os_error_text(error)}") from error
    except BaseException:
        os.close(fd)
        raise
    return storage, (status.st_dev, status.st_ino, size, status.st_mtime_ns)


def _storage(name: str, fd: int, size_bytes: int, cancel: Cancel) -> Storage:
    start = os.pread(fd, MAGIC_BYTES, 0)
    if not is_compressed(name, start):
        return PlainStorage(name, fd, size_bytes)
    frames = None
    if is_zstd(start):
        frames = seekable_frames(
            lambda length, offset: os.pread(fd, length, offset), size_bytes, (cancel,)
        )
    if frames is None:
        raise SourceError(
            f"{name} is compressed as one piece, which has to be read in order: decompress it "
            "into a file, or store it again with `vmapipe` (--compress zstd)"
        )
    return FrameStorage(name, fd, frames)


def _read_header(storage: Storage) -> tuple[Header, bytes]:
    start = _read(storage, PEEK_BYTES, 0)
    raw = _read(storage, peek_header_bytes(start), 0)
    return parse_header(raw), raw


def _read(storage: Storage, length: int, offset: int) -> bytes:
    """Fewer bytes only at the end. Raises SourceError."""
    try:
        if isinstance(storage, FrameStorage):
            return storage.read_start(length, offset)
        view = memoryview(bytearray(length))
        return bytes(view[: storage.read_into(view, offset)])
    except OSError as error:
        raise SourceError(error.strerror or str(error)) from error


def _manifest(name: str, header: Header, raw_header: bytes, cancel: Cancel) -> Manifest | None:
    path = name + SUFFIX
    if not os.path.exists(path):
        return None
    manifest = Manifest(path, cancel)
    opening = manifest.opening
    if opening.uuid != header.uuid:
        manifest.close()
        raise ArchiveError(f"the manifest {path} belongs to another archive (its uuid differs)")
    if opening.header != ExtentDigest(len(raw_header), extent_digest(raw_header)):
        manifest.close()
        raise DigestError("the header is not the one that was stored: its digest differs", offset=0)
    return manifest


def _build(
    archive: OpenArchive, at: int, manifest: Manifest | None, cancel: Cancel
) -> ArchiveIndex:
    """Walk along all extents' headers.

    What is damaged is told and left out: its clusters are missing from the index, and so an
    I/O error to who reads them. With a manifest the walk goes on behind a damaged header.
    """
    header, storage = archive.header, archive.storage
    builder = IndexBuilder(header)
    chunk, chunk_at = b"", 0
    while at < storage.size_bytes:
        cancel.check()
        start = at - chunk_at
        if not 0 <= start <= len(chunk) - EXTENT_HEADER_BYTES:
            # Headers of extents without data stand one behind the other.
            length = _HEADERS_BYTES if chunk and start == len(chunk) else EXTENT_HEADER_BYTES
            chunk, chunk_at, start = _read(storage, length, at), at, 0
        raw = chunk[start : start + EXTENT_HEADER_BYTES]
        line = manifest.next() if manifest is not None else None
        listed = line if isinstance(line, ExtentDigest) else None
        try:
            extent = _parse(raw, header, at, listed, manifest is not None)
            if at + extent.total_bytes > storage.size_bytes:
                raise ExtentError("the archive ends inside an extent's data", offset=at)
        except ArchiveError as error:
            archive.tell(str(error))
            if listed is None:
                break
            at += listed.total_bytes
            continue
        builder.add(extent, listed.digest if listed is not None else b"")
        at += extent.total_bytes
    index = builder.finish()
    for dev_id, cluster in builder.double.items():
        archive.tell(f"cluster {cluster} of device {dev_id} comes twice: neither is served")
    return index


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


# --- The index, kept for the next time ---


def default_cache_folder() -> str:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(base, "vmapipe", "index")


def _index_path(folder: str, header: Header) -> str:
    return os.path.join(folder, header.uuid.hex())


def _kept_index(
    folder: str | None, identity: tuple[int, ...], header: Header
) -> ArchiveIndex | None:
    """None where there is none that belongs to exactly this file and is whole."""
    if folder is None:
        return None
    try:
        fd = os.open(
            _index_path(folder, header),
            os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK,
        )
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
        if not ours or status.st_mode & 0o022:
            return None  # somebody else could have written it
        with os.fdopen(fd, "rb", closefd=False) as file:
            raw = file.read()
    except OSError:
        return None
    finally:
        os.close(fd)
    head = _identity_line(identity)
    body = raw[len(head) + 16 :]
    if not raw.startswith(head) or extent_digest(body) != raw[len(head) : len(head) + 16]:
        return None
    return decode_index(body, header)


def _identity_line(identity: tuple[int, ...]) -> bytes:
    return (" ".join(map(str, identity)) + "\n").encode()


def _keep_index(folder: str | None, identity: tuple[int, ...], index: ArchiveIndex) -> None:
    """It is comfort: whatever is in the way leaves the next start slower, no more."""
    if folder is None:
        return
    body = encode_index(index)
    path = os.path.join(folder, index.uuid.hex())
    try:
        os.makedirs(folder, 0o700, exist_ok=True)
        scratch = f"{path}.{os.getpid()}"
        fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(_identity_line(identity) + extent_digest(body) + body)
            os.rename(scratch, path)
        except BaseException:
            os.unlink(scratch)
            raise
    except OSError:
        return
