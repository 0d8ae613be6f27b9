# SPDX-License-Identifier: Apache-2.0
"""A disk that an NBD server holds: images of every format, by way of qemu-nbd."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.producer.source import UNSHARED, DiskSourceError, Segment, Sharing, open_at_rest
from vmapipe.protocol.errors import ProtocolError
from vmapipe.protocol.nbd.client_handshake import NbdClientHandshake
from vmapipe.protocol.nbd.client_transfer import NbdClientTransmission
from vmapipe.protocol.nbd.constants import (
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_FLAG_DF,
    NBD_CMD_READ,
    NBD_FLAG_SEND_DF,
    NBD_STATE_ZERO,
)
from vmapipe.protocol.nbd.reply import Hole, ReplyEvent, RequestDone, RequestFailed, Status
from vmapipe.protocol.nbd.session import NbdSession, encode_request
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import os_error_text
from vmapipe.runtime.image_format import references
from vmapipe.runtime.storage_daemon import StorageDaemon
from vmapipe.runtime.text import name_text

EXPORT = "disk"
# QEMU's server works on 16 requests of a connection at once; 256 KiB each were
# the quickest of 64 KiB to 1 MiB.
_IN_FLIGHT = 16
_READ_BYTES = 256 * 1024
# Whether there is data in so much is asked at once.
_STATUS_BYTES = 1 << 30
# A server that says nothing for so long hangs with its disk.
_TIMEOUT_S = 120.0


class NbdSource:
    """A `Source`: the disk of one export, which does not change while it is read."""

    def __init__(self, name: str, path: str) -> None:
        """`path`: the server's Unix socket. Raises SourceError."""
        self.name = name
        # Of each request, by its cookie: where it begins.
        self._offsets: dict[int, int] = {}
        self._offset = 0
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._session = self._connect(path)
        except (OSError, ProtocolError) as error:
            self._socket.close()
            raise self._error(error) from error
        self.size_bytes = self._session.export.size_bytes
        self._codec = NbdClientTransmission(self._session)
        if not self.size_bytes:
            self._socket.close()
            raise DiskSourceError(f"disk {name!r}: it is empty: nothing to back up")

    def _connect(self, path: str) -> NbdSession:
        self._socket.settimeout(_TIMEOUT_S)
        self._socket.connect(path)
        handshake = NbdClientHandshake(EXPORT)
        while handshake.wanted_bytes:
            data = self._socket.recv(handshake.wanted_bytes)
            if not data:
                handshake.eof()
            self._socket.sendall(handshake.feed(data))
        if handshake.session is None:
            raise RuntimeError("a handshake that ended without a session")
        return handshake.session

    def segments(self) -> Iterator[Segment]:
        """Yield segments by what the server says of zeroes; a partly filled cluster is read as a whole."""
        at = 0  # all before it was told
        for first, last in self._data_extents():
            start = max(at, first - first % CLUSTER_BYTES)
            end = min(self.size_bytes, -(-last // CLUSTER_BYTES) * CLUSTER_BYTES)
            if end <= at:
                continue
            if start > at:
                yield Segment(at, start, is_data=False)
            yield Segment(start, end, is_data=True)
            at = end
        if at < self.size_bytes:
            yield Segment(at, self.size_bytes, is_data=False)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Several requests are under way at once; data goes from the socket into place."""
        self._offset = ahead = offset
        end = offset + len(buffer)
        while ahead < end or self._codec.in_flight:
            while ahead < end and self._codec.in_flight < _IN_FLIGHT:
                length = min(_READ_BYTES, end - ahead)
                self._request(NBD_CMD_READ, ahead, length)
                ahead += length
            self._check(self._receive(buffer, offset))

    def check_unchanged(self) -> None:
        """An export's size cannot change."""

    def close(self) -> None:
        self._socket.close()

    def _data_extents(self) -> Iterator[tuple[int, int]]:
        """Bytes [start, end) that may not be zero, in order."""
        if self._session.allocation_id is None:
            yield 0, self.size_bytes
            return
        at = 0
        while at < self.size_bytes:
            length = min(_STATUS_BYTES, self.size_bytes - at)
            self._offset = at
            self._request(NBD_CMD_BLOCK_STATUS, at, length)
            extents: list[tuple[int, int]] = []
            while self._codec.in_flight:
                events = self._receive(memoryview(b""), 0)
                self._check(events)
                extents += [
                    extent
                    for event in events
                    if isinstance(event, Status)
                    for extent in event.extents()
                ]
            if not extents:
                raise DiskSourceError(
                    f"disk {self.name!r}: the server tells nothing of offset {at}"
                )
            for extent_bytes, flags in extents:
                end = min(self.size_bytes, at + extent_bytes)
                if not flags & NBD_STATE_ZERO:
                    yield at, end
                at = end

    def _request(self, kind: int, offset: int, length: int) -> None:
        # A read in one piece: QEMU's server looks for holes in it else, and hangs up, with a
        # word to its stderr only, where the image cannot be read.
        in_one_piece = self._session.structured and self._session.flags & NBD_FLAG_SEND_DF
        flags = NBD_CMD_FLAG_DF if kind == NBD_CMD_READ and in_one_piece else 0
        try:
            request = self._codec.request(kind, offset, length, flags)
            self._offsets[request.cookie] = offset
            self._socket.sendall(encode_request(request))
        except (OSError, ProtocolError) as error:
            raise self._error(error) from error

    def _receive(self, buffer: memoryview, base: int) -> list[ReplyEvent]:
        """One message, or a piece of one. `buffer` takes the export's bytes from `base` on."""
        try:
            payload = self._codec.payload
            if payload is not None:
                start = payload.offset - base
                got = self._socket.recv_into(buffer[start : start + payload.length])
                events = self._codec.took(got)
            else:
                head = self._socket.recv(self._codec.wanted_bytes)
                got = len(head)
                events = list(self._codec.feed(head))
        except (OSError, ProtocolError) as error:
            raise self._error(error) from error
        if not got:
            raise self._error(None)
        for event in events:
            if isinstance(event, Hole):
                start = event.offset - base
                buffer[start : start + event.length] = bytes(event.length)
        return events

    def _check(self, events: Sequence[ReplyEvent]) -> None:
        """Raises SourceError for a request that has failed, with its offset and the reason."""
        for event in events:
            if not isinstance(event, RequestDone):
                continue
            offset = self._offsets.pop(event.cookie, self._offset)
            if event.error:
                said = [
                    e for e in events if isinstance(e, RequestFailed) and e.cookie == event.cookie
                ]
                places = [e.offset for e in said if e.offset is not None]
                reasons = [os.strerror(event.error), *(e.message for e in said)]
                raise DiskSourceError(
                    f"disk {self.name!r}: cannot read near offset {[*places, offset][0]}: "
                    + "; ".join(dict.fromkeys(filter(None, reasons)))
                )

    def _error(self, error: Exception | None) -> DiskSourceError:
        """Return the error of a failed connection; None: the server has closed it."""
        near = min(self._offsets.values(), default=self._offset)
        text = "its server has hung up"
        if error is not None:
            text = os_error_text(error) if isinstance(error, OSError) else str(error)
        if reason := self._reason():
            text += f"; {reason}"
        return DiskSourceError(f"disk {self.name!r}: cannot read near offset {near}: {text}")

    def _reason(self) -> str:
        """Return what is known of a server that has closed the connection."""
        return ""


class HowToRead(NamedTuple):
    """`snapshot`: an internal one, by name; empty: none. `offset`: of the disk, in bytes.

    `others`: the image may refer to other files, such as a backing file.
    """

    image_format: str
    snapshot: str = ""
    offset: int = 0
    others: bool = False


class ImageSource(NbdSource):
    """An image of any format that qemu-nbd opens, read only. `path`: a file, or a URI of QEMU's."""

    def __init__(
        self,
        name: str,
        path: str,
        how: HowToRead,
        cancel: Cancel,
        sharing: Sharing = UNSHARED,
    ) -> None:
        """Raises SourceError, Failure, Cancelled."""
        self._image_fd = open_at_rest(name, path, sharing) if os.path.exists(path) else -1
        try:
            self._open(name, _checked(name, path, how), how, cancel, sharing)
        except BaseException:
            self._close_image()
            raise

    def _open(self, name: str, path: str, how: HowToRead, cancel: Cancel, sharing: Sharing) -> None:
        argv = ["qemu-nbd", "--read-only", "--persistent", "--socket=SOCKET"]
        # Ours, and the one that looked whether it listens.
        argv += [f"--export-name={EXPORT}", "--shared=2"]
        if how.snapshot:
            argv.append(f"--load-snapshot=snapshot.name={how.snapshot}")
        if how.offset:
            argv.append(f"--offset={how.offset}")
        if sharing.force and self._image_fd >= 0:
            argv += ["--image-opts", "--", _shared_image(path, self._image_fd, how.image_format)]
        else:
            argv += [f"--format={how.image_format}", "--", path]
        self._daemon = StorageDaemon(f"disk {name!r}", argv, cancel)
        try:
            super().__init__(name, self._daemon.socket)
            if not how.others and how.image_format != "raw":
                self._refuse_other_files(path)
        except _OtherFileError:
            self._socket.close()
            self._daemon.close()
            raise
        except DiskSourceError as error:
            # It listens before it looks at the image, and then ends.
            said = self._daemon.last_words()
            raise DiskSourceError(f"disk {name!r}: {said}" if said else str(error)) from error
        except BaseException:
            self._daemon.close()
            raise

    def close(self) -> None:
        super().close()
        self._daemon.close()
        self._close_image()

    def _close_image(self) -> None:
        if self._image_fd >= 0:
            os.close(self._image_fd)
            self._image_fd = -1

    def _reason(self) -> str:
        return self._daemon.reason()

    def _refuse_other_files(self, path: str) -> None:
        """The image may have been written to since it was looked at, or QEMU know more than we do.

        Raises SourceError.
        """
        image = os.stat(path)
        for opened in self._daemon.opened_files():
            status = os.stat(opened)
            same_device = stat.S_ISBLK(status.st_mode) and status.st_rdev == image.st_rdev
            if not (same_device or os.path.samestat(status, image)):
                raise _OtherFileError(_refusal(self.name, name_text(os.readlink(opened))))


def _shared_image(path: str, fd: int, image_format: str) -> str:
    """Return the image as qemu-nbd's option, so that it is read although others have it open."""
    driver = "host_device" if stat.S_ISBLK(os.fstat(fd).st_mode) else "file"
    file_name = path.replace(",", ",,")
    return (
        f"driver={image_format},force-share=on,file.driver={driver},"
        f"file.filename={file_name},file.force-share=on"
    )


class _OtherFileError(DiskSourceError):
    """An image is not all that QEMU would read."""


def _checked(name: str, path: str, how: HowToRead) -> str:
    """The path as QEMU takes it for one. Raises SourceError where the image refers to another file."""
    if os.path.exists(path):
        # Else `a:b.qcow2` would be a protocol to it.
        path = os.path.abspath(path)
    elif ":" in path.partition("/")[0] and how.image_format != "raw" and not how.others:
        raise DiskSourceError(
            f"disk {name!r}: {path} is not a file, so it cannot be seen which other files or "
            f"addresses the {how.image_format} image there refers to; add ,others=yes if you trust "
            "whoever wrote it"
        )
    if how.others or how.image_format == "raw":
        return path
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise DiskSourceError(
            f"disk {name!r}: cannot open {path}: {os_error_text(error)}"
        ) from error
    try:
        found = references(how.image_format, lambda offset, length: _read_at(fd, offset, length))
    except OSError as error:
        raise DiskSourceError(
            f"disk {name!r}: cannot read {path}: {os_error_text(error)}"
        ) from error
    finally:
        os.close(fd)
    if found:
        raise DiskSourceError(_refusal(name, str(found[0])))
    return path


def _read_at(fd: int, offset: int, length: int) -> bytes:
    """Read at an offset that the image names, which may be any number."""
    return os.pread(fd, length, offset) if offset < 1 << 63 else b""


def _refusal(name: str, what: str) -> str:
    return (
        f"disk {name!r}: the image refers to another file, {what}, whose contents would go into "
        "the archive; say ,format=raw if a guest may have written the image's header into its own "
        "disk, or add ,others=yes if you trust whoever made the image"
    )
