# SPDX-License-Identifier: Apache-2.0
"""An archive's bytes as they are stored, from one place to another: held against its manifest on the way.

What belongs to the archive is there before its name is. Whatever ends a copy, half an archive
has no name; the next copy of the same archive goes on where this one was.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from io import FileIO
from typing import NamedTuple

from vmapipe.archiver.outputs.file import FileOutput
from vmapipe.archiver.outputs.manifests import SUFFIX as MANIFEST_SUFFIX
from vmapipe.archiver.outputs.object import ObjectOutput
from vmapipe.places.archives import PROTECTED_SUFFIX, KeptArchive
from vmapipe.places.place import ArchiveFolder, KeptPlace
from vmapipe.places.reading import source_state
from vmapipe.places.verified import SUFFIX as VERIFIED_SUFFIX
from vmapipe.restore.archive.digest import Hasher
from vmapipe.restore.archive.manifest import Manifest, read_stored
from vmapipe.restore.archive.object import ObjectInput, RemoteObject
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Damaged, Failure, os_error_text
from vmapipe.runtime.events import Emit, ignore
from vmapipe.runtime.immutable import SUFFIX as LOCK_SUFFIX
from vmapipe.runtime.objectlock import ObjectLock
from vmapipe.runtime.objectstore import StoredObject
from vmapipe.vma.errors import ArchiveError
from vmapipe.vma.manifest import Totals

# Of a file at a time.
_PIECE_BYTES = 1 << 20
_CHANGED = "{} was changed or replaced while it was read: nothing is stored"
Tell = Callable[[int], None]
_Output = FileOutput | ObjectOutput


class StoredDigest(NamedTuple):
    """Length and digest (XXH3-128) of an archive's file as it is stored."""

    size_bytes: int
    digest: bytes


class Copied(NamedTuple):
    """`kept_bytes` of it were there from an earlier try. `expected`: by a manifest."""

    stored: StoredDigest
    kept_bytes: int
    is_checked: bool


def expected_of(place: KeptPlace, archive: KeptArchive, cancel: Cancel) -> StoredDigest | None:
    """What the manifest says of the stored file; None: there is no manifest. Raises Failure, Damaged."""
    if not archive.has_manifest:
        return None
    path = place.full_name(archive.name + MANIFEST_SUFFIX)
    try:
        sealed = read_stored(path, cancel)
        if sealed is not None:
            return StoredDigest(sealed.total_bytes, sealed.digest)
        with Manifest(path, cancel) as manifest:
            while not isinstance(line := manifest.next(), Totals):
                cancel.check()
        return StoredDigest(line.file_bytes, line.file_digest)
    except ArchiveError as error:
        raise Damaged(f"{place.full_name(archive.name)}: {error}; nothing was copied") from error


def is_there(
    source: KeptPlace, archive: KeptArchive, target: KeptPlace, there: KeptArchive
) -> bool:
    """Return whether the archive of that name is this one, as far as size and manifest tell. Raises Failure."""
    if archive.file.size_bytes != there.file.size_bytes:
        return False
    if archive.has_manifest != there.has_manifest:
        return False
    if not archive.has_manifest:
        return True
    name = archive.name + MANIFEST_SUFFIX
    return _digest_of(source, name) == _digest_of(target, name)


def _digest_of(place: KeptPlace, name: str) -> StoredDigest:
    with contextlib.closing(Cancel()) as cancel:
        return read_back(place, name, cancel, lambda count: None)


def read_back(place: KeptPlace, name: str, cancel: Cancel, tell: Tell) -> StoredDigest:
    """Read a stored file, and return what it is now. Raises Failure, Cancelled."""
    hasher, size_bytes = Hasher(), 0
    for piece in stored_pieces(place, name, 0, cancel):
        hasher.update(piece)
        size_bytes += len(piece)
        tell(size_bytes)
    return StoredDigest(size_bytes, hasher.digest())


def stored_pieces(place: KeptPlace, name: str, start: int, cancel: Cancel) -> Iterator[memoryview]:
    """Yield the stored bytes from `start` on; a piece is of no use any more when the next one comes."""
    path = place.full_name(name)
    view = memoryview(bytearray(_PIECE_BYTES))
    try:
        if isinstance(place, ArchiveFolder):
            raw: FileIO | ObjectInput = FileIO(place.folder.open(name, os.O_RDONLY | os.O_NONBLOCK))
            raw.seek(start)
        else:
            raw = ObjectInput(RemoteObject(path, (cancel,)), (cancel,), start)
        with raw:
            while got := raw.readinto(view):
                cancel.check()
                yield view[:got]
    except OSError as error:
        raise Failure(f"cannot read {path}: {os_error_text(error)}") from error


def copy_archive(
    source: KeptPlace,
    archive: KeptArchive,
    target: KeptPlace,
    tell: Tell,
    cancel: Cancel,
    lock: ObjectLock | None = None,
    emit: Emit = ignore,
) -> Copied:
    """Copy an archive and what belongs to it. `tell` hears how many bytes are there, `emit` what there is to say.

    Raises Damaged where it is not what its manifest says, Failure, Cancelled.
    """
    if not archive.has_manifest and source.has(archive.name + MANIFEST_SUFFIX):
        raise Failure(
            f"{source.full_name(archive.name + MANIFEST_SUFFIX)} is a link or no file, or has come just now; what stands "
            "beside an archive is copied as a file, and without it nothing would be compared: put the file in its place"
        )
    expected = expected_of(source, archive, cancel)
    if expected is not None and expected.size_bytes != archive.file.size_bytes:
        raise Damaged(
            f"{source.full_name(archive.name)} has {archive.file.size_bytes} bytes where its manifest says "
            f"{expected.size_bytes}: it is damaged, or the manifest is another archive's; nothing was copied"
        )
    word = expected.digest.hex() if expected is not None else ""
    output = _open(target, archive.name, cancel, lock, emit, resume=word)
    beside: list[_Output] = []
    try:
        found = _copy_bytes(source, archive, output, expected, tell, cancel)
        for name in _order(archive):
            if name in archive.beside:
                one = _copy_beside(source, name, target, name, cancel, lock)
                beside.append(one)
        # The manifest that has come is the one that vouches for what has come.
        if expected is not None and expected_of(target, archive, cancel) != expected:
            raise Failure(_CHANGED.format(source.full_name(archive.name)))
        output.commit()
    except BaseException:
        output.abandon()
        # Where another copy of it was quicker, what belongs to ours belongs to that one.
        if not _is_kept(target, archive):
            for other in beside:
                _take_back(other)
        raise
    if isinstance(target, ArchiveFolder):
        # `prune` holds the time of storing against the name's where a service stores.
        changed_s = archive.file.changed_s
        with contextlib.suppress(OSError):
            os.utime(archive.name, (changed_s, changed_s), dir_fd=target.folder.fd)
    return Copied(found, output.kept_bytes, is_checked=expected is not None)


def _is_kept(target: KeptPlace, archive: KeptArchive) -> bool:
    """Return whether an archive of this name and length is there. Raises nothing."""
    with contextlib.suppress(Failure, OSError):
        if isinstance(target, ArchiveFolder):
            status = target.folder.status(archive.name)
            return status is not None and status.st_size == archive.file.size_bytes
        with contextlib.closing(StoredObject(target.full_name(archive.name))) as store:
            found = store.head()
            return found is not None and found.size_bytes == archive.file.size_bytes
    return False


def _order(archive: KeptArchive) -> list[str]:
    """What goes along, the protected mark first: nothing prunes what has just come."""
    left = {archive.name + VERIFIED_SUFFIX, archive.name + LOCK_SUFFIX}
    mark = archive.name + PROTECTED_SUFFIX
    return [mark, *sorted(archive.beside - left - {mark})]


def _open(
    target: KeptPlace,
    name: str,
    cancel: Cancel,
    lock: ObjectLock | None,
    emit: Emit,
    *,
    resume: str,
) -> _Output:
    path = target.full_name(name)
    if isinstance(target, ArchiveFolder):
        return FileOutput(path, cancel=cancel, resume=bool(resume))
    return ObjectOutput(path, cancel=cancel, emit=emit, lock=lock, resume=resume)


def _copy_bytes(
    source: KeptPlace,
    archive: KeptArchive,
    output: _Output,
    expected: StoredDigest | None,
    tell: Tell,
    cancel: Cancel,
) -> StoredDigest:
    """Raises Damaged where what came is not what was expected; nothing of it is gone on with then."""
    path = source.full_name(archive.name)
    before = source_state(path)
    found = _copy_from(source, archive, output, output.kept_bytes, tell, cancel)
    differs = expected is not None and found != expected
    if differs and isinstance(output, FileOutput) and output.kept_bytes:
        # What was left was something else, or the disk has lost some of it: all of it anew.
        output.start_anew()
        found = _copy_from(source, archive, output, 0, tell, cancel)
    if expected is not None and found != expected:
        output.spoil()
        raise Damaged(
            f"{path} is not, byte for byte, the one that its manifest vouches for: it is damaged, or was changed "
            "while it was read; nothing was copied"
        )
    # Of what has no manifest nothing else tells that it is all of it.
    came_whole = found.size_bytes == archive.file.size_bytes and source_state(path) == before
    if expected is None and not came_whole:
        output.spoil()
        raise Failure(_CHANGED.format(path))
    return found


def _copy_from(
    source: KeptPlace,
    archive: KeptArchive,
    output: _Output,
    start: int,
    tell: Tell,
    cancel: Cancel,
) -> StoredDigest:
    hasher, size_bytes = Hasher(), 0
    if isinstance(output, FileOutput) and start:
        for kept in output.kept():
            hasher.update(kept)
            size_bytes += len(kept)
            tell(size_bytes)
    else:
        start = 0  # a store compares each part itself, and takes those that it lacks
    for piece in stored_pieces(source, archive.name, start, cancel):
        hasher.update(piece)
        size_bytes += len(piece)
        output.write([piece])
        tell(size_bytes)
    return StoredDigest(size_bytes, hasher.digest())


@contextlib.contextmanager
def copied_beside(
    source: KeptPlace,
    names: Mapping[str, str],
    target: KeptPlace,
    cancel: Cancel,
    lock: ObjectLock | None,
) -> Iterator[None]:
    """Copy what stands beside an archive that is stored anew in the block; take it back where that fails.

    `names`: the new one of each. Raises Failure, Cancelled.
    """
    done: list[_Output] = []
    try:
        for name, new_name in names.items():
            one = _copy_beside(source, name, target, new_name, cancel, lock)
            done.append(one)
        yield
    except BaseException:
        for output in done:
            _take_back(output)
        raise


def _copy_beside(
    source: KeptPlace,
    name: str,
    target: KeptPlace,
    new_name: str,
    cancel: Cancel,
    lock: ObjectLock | None,
) -> _Output:
    """Beside an archive that does not exist yet, what is there is stale."""
    path = target.full_name(new_name)
    output: _Output
    if isinstance(target, ArchiveFolder):
        output = FileOutput(path, cancel=cancel, replace=True)
    else:
        output = ObjectOutput(path, cancel=cancel, replace=True, lock=lock)
    try:
        for piece in stored_pieces(source, name, 0, cancel):
            output.write([piece])
        output.commit()
    except BaseException:
        output.abandon()
        raise
    return output


def _take_back(output: _Output) -> None:
    if isinstance(output, FileOutput):
        output.withdraw()
    else:
        output.remove()
