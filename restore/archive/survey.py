# SPDX-License-Identifier: Apache-2.0
"""Walks along an archive, damaged or not: where an extent is not, looks for the next one.

From a file only the extents' headers are read; the data stays where it is until it is
needed. From a stream the data comes along. Where even the header is damaged, what the extents
tell stands in for it (`open_damaged`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from vmapipe.clusters.sizes import CLUSTER_BYTES, EXTENT_HEADER_BYTES
from vmapipe.restore.archive.compressed import ReadOptions
from vmapipe.restore.archive.errors import CompressionError, InputError
from vmapipe.restore.archive.manifest import Manifest, manifest_beside
from vmapipe.restore.archive.reader import Archive, FoundExtent, open_archive
from vmapipe.restore.archive.slots import ExtentSlots
from vmapipe.restore.archive.source import PlainFile, open_source
from vmapipe.runtime.cancel import Cancel
from vmapipe.vma.errors import ArchiveError, ExtentError, NotAnArchiveError
from vmapipe.vma.extent import (
    EXTENT_MAGIC,
    Extent,
    extent_uuid,
    find_extent_header,
    parse_extent_header,
)
from vmapipe.vma.header import UUID_BYTES, Device, Header
from vmapipe.vma.manifest import Totals

# Searched in one go.
_SEARCH_BYTES = 1 << 20


class Gap(NamedTuple):
    """Archive bytes [offset, offset + length) that hold no extent, and why not.

    `before`: the extent that ends where the gap begins, where another one comes behind it.
    """

    offset: int
    length: int
    error: ArchiveError
    before: Extent | None = None

    @property
    def is_shift(self) -> bool:
        """True when bytes were added or removed here: the gap is not a multiple of 512 bytes.

        The data of the extent in front may then be wrong, too.
        """
        return self.length % EXTENT_HEADER_BYTES != 0


class _Cursor:
    """A place in the archive; looks ahead, also in a stream, by a bounded number of bytes."""

    def __init__(self, archive: Archive, at: int, held: bytes) -> None:
        """`held`: what a stream has given already of what stands at `at`."""
        self.at = at
        self._source = archive.source
        self._held = held
        self._error: CompressionError | None = None
        self._seen = -1, b""

    def peek(self, length: int) -> bytes:
        """The next bytes, fewer only at the end. Raises CompressionError."""
        window = self.window(length)
        if len(window) < length and self._error is not None:
            self._raise_damage()
        return window

    def window(self, length: int) -> bytes:
        """The next bytes, fewer only at the end or before damage; CompressionError there."""
        source = self._source
        if isinstance(source, PlainFile):
            # The walk comes next to the place behind an extent that it has looked at.
            at, seen = self._seen
            if at != self.at or len(seen) != length:
                seen = source.pread(length, self.at)
                self._seen = self.at, seen
            return seen
        while len(self._held) < length and self._error is None:
            try:
                piece = source.read(length - len(self._held), up_to_damage=True)
            except CompressionError as error:
                self._error = error
                break
            if not piece:
                break
            self._held += piece
        if not self._held:
            self._raise_damage()
        return self._held[:length]

    @property
    def held(self) -> bytes:
        """Bytes of a stream that were read already and come next."""
        return self._held

    def _raise_damage(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def pass_over(self, length: int) -> None:
        """Go behind what `peek` has shown."""
        self._held = self._held[length:]
        self.at += length

    def put_back(self, data: bytes) -> None:
        """Let these bytes of a stream come next once more."""
        self._held = data + self._held
        self.at -= len(data)

    def postpone(self, error: CompressionError) -> None:
        """Raise it once more when what is held has been taken."""
        self._error = error

    def fill(self, view: memoryview) -> int:
        """Take a stream's next bytes; fewer only at the end. Raises CompressionError."""
        done = min(len(view), len(self._held))
        view[:done] = self._held[:done]
        self.pass_over(done)
        source = self._source
        if isinstance(source, PlainFile):
            raise RuntimeError("a file's data stays in the file")
        while done < len(view):
            self._raise_damage()
            got = source.readinto(view[done:], up_to_damage=True)
            if not got:
                break
            done += got
            self.at += got
        return done

    def break_off(self, error: CompressionError) -> None:
        """Drop what is held, which has lost its end, and go on behind the damage."""
        self.at += len(self._held) + (error.lost_bytes or 0)
        self._held = b""


def survey(
    archive: Archive, check: Callable[[], None], slots: ExtentSlots | None = None
) -> Iterator[FoundExtent | Gap]:
    """Yield all extents that can be found, and the gaps between them, in order.

    `check` is called now and then. `slots`: where a stream's data goes; without them it comes
    as bytes. Raises InputError.
    """
    walk = _Walk(archive, check, slots)
    error: ArchiveError | None = None
    start = walk.cursor.at
    while True:
        check()
        if error is not None:
            before = walk.last if isinstance(error, ExtentError) else None
            again: CompressionError | None = None
            if isinstance(error, CompressionError):
                walk.cursor.break_off(error)
            if not isinstance(error, CompressionError) or error.resumes:
                again = walk.search()
            _forget_frames(error)
            yield Gap(start, walk.cursor.at - start, error, None if walk.at_end else before)
            if isinstance(error, CompressionError) and not error.resumes:
                return
            walk.last = None
            start, error = walk.cursor.at, again
            if again is not None:
                continue
        start = walk.cursor.at
        try:
            piece = walk.piece()
        except (ExtentError, CompressionError) as broken:
            error = broken
            continue
        if piece is None:
            return
        error = None
        yield piece


def _forget_frames(error: BaseException | None) -> None:
    """Drop an error's frames: an error that is kept would keep views of the data's memory."""
    while error is not None:
        before, error.__context__ = error.__cause__ or error.__context__, None
        error.__traceback__ = error.__cause__ = None
        error = before


class _Walk:
    """State of a `survey`, and its work at one place."""

    def __init__(
        self, archive: Archive, check: Callable[[], None], slots: ExtentSlots | None
    ) -> None:
        self.cursor = _Cursor(archive, archive.header.header_bytes, archive.held)
        self.last: Extent | None = None
        self.at_end = False
        self._source = archive.source
        self._uuid = archive.header.uuid
        self._check = check
        self._slots = slots
        self._pending: CompressionError | None = None
        # Where a header was found inside the data of the extent that was read last.
        self._found_at = -1

    def piece(self) -> FoundExtent | None:
        """The extent here; None at the end. Raises ExtentError, CompressionError."""
        if self._pending is not None:
            error, self._pending = self._pending, None
            raise error
        start = self.cursor.at
        raw_header = self.cursor.peek(EXTENT_HEADER_BYTES)
        if not raw_header:
            if isinstance(self._source, PlainFile) and start < self._source.size_bytes:
                self.cursor.at = self._source.size_bytes
                raise ExtentError("the archive was cut while it was read", offset=start)
            self.at_end = True
            return None
        extent = parse_extent_header(raw_header, self._uuid, start)
        self.cursor.pass_over(EXTENT_HEADER_BYTES)
        data, slot, got = self._data(extent)
        if (
            got < extent.data_bytes
            or not self._another_follows()
            or self._ends_in_header(extent, data, slot)
        ):
            inside = self._header_inside(extent, data, slot, got)
            if inside >= 0:
                self._found_at = inside
                self.last = None
                raise ExtentError(
                    "bytes of an extent's data are missing: the next one begins inside it",
                    offset=start,
                    reference_text="wrong vma extent header magic",
                )
        if got < extent.data_bytes:
            self._give_back(slot)
            raise cut_off(extent, got)
        self.last = extent
        return FoundExtent(extent, raw_header, data, slot=slot)

    def _data(self, extent: Extent) -> tuple[bytes | memoryview | None, int, int]:
        """(bytes, slot, length) of the extent's data, as far as there is any."""
        source = self._source
        if isinstance(source, PlainFile):
            got = max(0, min(extent.data_bytes, source.size_bytes - self.cursor.at))
            self.cursor.at += got
            return None, -1, got
        if not extent.data_bytes:
            return (b"" if self._slots is None else None), -1, 0
        if self._slots is None:
            view = memoryview(bytearray(extent.data_bytes))
            got = self.cursor.fill(view)
            return view[:got], -1, got
        slot = self._slots.take()
        try:
            got = self.cursor.fill(self._slots.view(slot, extent.data_bytes))
        except BaseException:
            self._slots.give(slot)
            raise
        return None, slot, got

    def _another_follows(self) -> bool:
        """Return whether an extent seems to come next, or the end."""
        try:
            start = self.cursor.peek(EXTENT_HEADER_BYTES)
        except CompressionError as error:
            self._pending = error
            return True
        return not start or start.startswith(EXTENT_MAGIC)

    def _ends_in_header(self, extent: Extent, data: bytes | memoryview | None, slot: int) -> bool:
        """Return whether an extent of zeroes stands where this one's data should end.

        Then as many bytes of the data are missing, and what comes next is in its place again.
        """
        at = extent.data_bytes - EXTENT_HEADER_BYTES
        if at < 0:
            return False
        source = self._source
        mark = EXTENT_MAGIC
        if isinstance(source, PlainFile):
            tail = source.pread(len(mark), extent.offset + EXTENT_HEADER_BYTES + at)
        elif data is not None:
            tail = bytes(data[at : at + len(mark)])
        elif slot >= 0 and self._slots is not None:
            tail = bytes(self._slots.view(slot, extent.data_bytes)[at : at + len(mark)])
        else:
            return False
        return tail == mark

    def _header_inside(
        self, extent: Extent, data: bytes | memoryview | None, slot: int, got: int
    ) -> int:
        """Return where the next extent's header stands inside this one's data; -1: it does not.

        The cursor is then put there.
        """
        source = self._source
        if isinstance(source, PlainFile):
            held = source.pread(got, self.cursor.at - got)
        elif data is not None:
            held = bytes(data)
        elif slot >= 0 and self._slots is not None:
            held = bytes(self._slots.view(slot, got))
        else:
            return -1
        # It may begin in the last bytes and go on behind them.
        try:
            ahead = self.cursor.window(EXTENT_HEADER_BYTES - 1)
        except CompressionError as error:
            self.cursor.postpone(error)
            ahead = b""
        at = find_extent_header(held + ahead, self._uuid)
        if 0 <= at < len(held):
            if isinstance(source, PlainFile):
                self.cursor.at -= got - at
            else:
                self.cursor.put_back(held[at:])
            self._give_back(slot)
            return at
        return -1

    def _give_back(self, slot: int) -> None:
        if slot >= 0 and self._slots is not None:
            self._slots.give(slot)

    def search(self) -> CompressionError | None:
        """Put the cursor to the next sound extent header, or to the end.

        Where the compressed data is damaged on the way, returns the error instead.
        """
        try:
            if self._found_at >= 0:
                self._found_at = -1
                return None
            while window := self.cursor.window(_SEARCH_BYTES):
                self._check()
                at = find_extent_header(window, self._uuid)
                if at >= 0:
                    self.cursor.pass_over(at)
                    return None
                # The last bytes may be the beginning of a header.
                whole = len(window) < _SEARCH_BYTES
                self.cursor.pass_over(
                    len(window) if whole else len(window) - EXTENT_HEADER_BYTES + 1
                )
            self.at_end = True
        except CompressionError as error:
            return error
        return None


def find_first_extent(archive: Archive, check: Callable[[], None]) -> bool:
    """Go to the first extent and give the archive's header its place and uuid; False: there is none."""
    cursor = _Cursor(archive, 0, b"")
    while True:
        check()
        try:
            window = cursor.window(_SEARCH_BYTES)
        except CompressionError as error:
            cursor.break_off(error)
            if not error.resumes:
                return False
            continue
        if not window:
            return False
        at = find_extent_header(window, None)
        if at >= 0:
            cursor.pass_over(at)
            archive.header = archive.header._replace(
                uuid=extent_uuid(window[at:]), header_bytes=cursor.at
            )
            archive.held = cursor.held
            return True
        whole = len(window) < _SEARCH_BYTES
        cursor.pass_over(len(window) if whole else len(window) - EXTENT_HEADER_BYTES + 1)


def cut_off(extent: Extent, got: int) -> ExtentError:
    """The archive ends `got` bytes into this extent's data."""
    return ExtentError(
        f"the archive ends inside an extent's data ({got} of {extent.data_bytes} bytes)",
        offset=extent.offset,
        reference_text=(f"short vma extent ({EXTENT_HEADER_BYTES + got} < {extent.total_bytes})"),
    )


def open_damaged(
    name: str, cancel: Cancel, options: ReadOptions, manifest: str | None = None
) -> Archive:
    """Like `open_archive`; where the header is damaged, devices and sizes come from the extents.

    `manifest`: where it is not beside the archive; it knows the sizes exactly. The archive's
    `notes` tell what is lost or guessed. Raises as `open_archive`, where there is not one extent.
    """
    options = options._replace(salvage=True, past_errors=True)
    try:
        return open_archive(name, cancel, options)
    except ArchiveError as error:
        return _open_without_header(name, cancel, options, manifest, error)


def _open_without_header(
    name: str, cancel: Cancel, options: ReadOptions, manifest: str | None, error: ArchiveError
) -> Archive:
    with _at_first_extent(name, cancel, options, error) as archive:
        if archive.source.place is None:
            raise InputError(
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
    path = path or manifest_beside(archive.source.place, cancel)
    if path is None:
        return None
    try:
        with Manifest(path, cancel, archive.source.identities) as manifest:
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
