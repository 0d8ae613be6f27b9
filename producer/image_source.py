# SPDX-License-Identifier: Apache-2.0
"""Images of every format that QEMU knows: pulled from a server of QEMU's that we start."""

from __future__ import annotations

import contextlib
import functools
import os
import stat
from typing import NamedTuple

from vmapipe.producer.pull.arguments import parse_uri
from vmapipe.producer.pull.connections import Endpoint
from vmapipe.producer.pull.export import ExportError, open_export
from vmapipe.producer.pull.shared_queue import (
    QUEUE_BYTES,
    Memory,
    NoSharedQueue,
    SharedQueue,
    can_share,
)
from vmapipe.producer.pull.uri import NbdUri, is_nbd_uri
from vmapipe.producer.pull_reader import PullReader
from vmapipe.producer.shared_memory import RING_BYTES, Ring
from vmapipe.producer.source import UNSHARED, DiskSourceError, Sharing, open_at_rest
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled, Failure, os_error_text
from vmapipe.runtime.image_bounds import WITH_TABLES, lost
from vmapipe.runtime.image_format import is_encrypted, references
from vmapipe.runtime.storage_daemon import DaemonTooSlow, StorageDaemon, option_text
from vmapipe.runtime.text import name_text

EXPORT = "disk"
_NODE = "image"
# Of the daemon's second socket, behind the path of its first one.
_SHARED = ".shared"


class HowToRead(NamedTuple):
    """`snapshot`: an internal one, by name; empty: none. `offset`: of the disk, in bytes.

    `others`: the image may refer to other files, such as a backing file.
    """

    image_format: str
    snapshot: str = ""
    offset: int = 0
    others: bool = False


class ImageReader(PullReader):
    """An image of any format that QEMU opens, read only. `path`: a file, or a URI of QEMU's."""

    def __init__(
        self,
        name: str,
        path: str,
        how: HowToRead,
        cancel: Cancel,
        sharing: Sharing = UNSHARED,
    ) -> None:
        """Raises DiskSourceError, ExportError, Failure, Cancelled."""
        if is_nbd_uri(path):
            path = _uri_for_qemu(name, path)
        self._image_fd = open_at_rest(name, path, sharing) if os.path.exists(path) else -1
        try:
            if self._image_fd >= 0:
                _refuse_encrypted(name, self._image_fd, how.image_format)
                _refuse_truncated(name, self._image_fd, how, cancel, sharing)
            self._open(name, _checked(name, path, how), how, cancel, sharing)
        except BaseException:
            self._close_image()
            raise

    def _open(self, name: str, path: str, how: HowToRead, cancel: Cancel, sharing: Sharing) -> None:
        self._daemon, self._shares = self._start(name, path, how, cancel, sharing)
        try:
            endpoint = Endpoint(
                *(
                    name,
                    path,
                    functools.partial(open_export, NbdUri(EXPORT, socket=self._daemon.socket)),
                ),
                is_ours=True,
                reason=self._daemon.reason,
            )
            super().__init__(endpoint, cancel, compares=not sharing.force)
            self.beside_bytes = QUEUE_BYTES if self._shares else 0
            if not how.others and how.image_format != "raw":
                self._refuse_other_files(path)
            elif how.others:
                self._tell_truncated(path, cancel, sharing)
        except _OtherFileError:
            super().close()
            self._daemon.close()
            raise
        except ExportError as error:
            # It listens before it looks at the image, and then ends.
            said = self._daemon.last_words()
            raise DiskSourceError(f"disk {name!r}: {said}" if said else str(error)) from error
        except BaseException:
            self._daemon.close()
            raise

    def _start(
        self, name: str, path: str, how: HowToRead, cancel: Cancel, sharing: Sharing
    ) -> tuple[StorageDaemon, bool]:
        """Return what serves the image, and whether data can come through memory that it shares with us.

        qemu-storage-daemon can, for what it opens; errors are told in qemu-nbd's words.
        """
        what = f"disk {name!r}"
        image = ""
        if self._image_fd >= 0:
            image = _image_options(path, self._image_fd, how.image_format, shared=sharing.force)
        if image and not how.snapshot and not how.offset and can_share():
            node = f"{image},node-name={_NODE},read-only=on"
            try:
                daemon = StorageDaemon(
                    what, "qemu-storage-daemon", functools.partial(_exported, node), cancel
                )
            except (DaemonTooSlow, Cancelled):
                raise  # what opens forever, such as a chain that is a circle, does so for qemu-nbd, too
            except Failure:
                pass
            else:
                return daemon, True
        # Two clients: ours, and the one that looked whether it listens.
        options = ["--read-only", "--persistent", f"--export-name={EXPORT}", "--shared=2"]
        if how.snapshot:
            options.append(f"--load-snapshot=snapshot.name={how.snapshot}")
        if how.offset:
            options.append(f"--offset={how.offset}")
        if sharing.force and image:
            options += ["--image-opts", "--", image]
        else:
            options += [f"--format={how.image_format}", "--", path]
        daemon = StorageDaemon(
            what, "qemu-nbd", lambda socket: [f"--socket={socket}", *options], cancel
        )
        return daemon, False

    def begin(self, ring: Ring, frame_bytes: int, *, is_incremental: bool = False) -> None:
        super().begin(ring, frame_bytes, is_incremental=is_incremental)
        if self._shares and ring.fd is not None:
            memory = Memory(ring.fd, ring.view, RING_BYTES)
            with contextlib.suppress(NoSharedQueue):
                self._connections.share(SharedQueue(self._daemon.socket + _SHARED, memory))

    def close(self) -> None:
        super().close()
        self._daemon.close()
        self._close_image()

    def _close_image(self) -> None:
        if self._image_fd >= 0:
            os.close(self._image_fd)
            self._image_fd = -1

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

    def _tell_truncated(self, path: str, cancel: Cancel, sharing: Sharing) -> None:
        """Tell of files that the image refers to and that end before their data does. Raises Cancelled.

        Which of them are images only QEMU knows: what looks like one may be a raw disk, so none is refused.
        """
        for opened in self._daemon.opened_files():
            with contextlib.suppress(OSError), open(opened, "rb") as file:
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    continue
                size_bytes = file.seek(0, os.SEEK_END)
                read = functools.partial(_read_at, file.fileno())
                found = (lost(kind, read, size_bytes, check=cancel.check) for kind in WITH_TABLES)
                if missing := next(filter(None, found), None):
                    sharing.tell(
                        f"disk {self.name!r}: {name_text(os.readlink(opened))}, to which the image refers, is "
                        f"truncated: it has {size_bytes} bytes, and its tables name data behind that; up to "
                        f"{missing.length} bytes, the first of them at offset {missing.offset}, read as zeroes"
                    )


def _refuse_encrypted(name: str, fd: int, image_format: str) -> None:
    """Raises DiskSourceError."""
    if is_encrypted(image_format, functools.partial(_read_at, fd)):
        raise DiskSourceError(
            f"disk {name!r}: the {image_format} image is encrypted, and no passphrase is taken here: say "
            ",format=raw to store its file as it is, encrypted, or back up the machine while it runs"
        )


def _refuse_truncated(name: str, fd: int, how: HowToRead, cancel: Cancel, sharing: Sharing) -> None:
    """QEMU reads zeroes where an image's file ends before its data does. Raises DiskSourceError, Cancelled."""
    read, before = functools.partial(_read_at, fd), -1
    while True:
        size_bytes = os.lseek(fd, 0, os.SEEK_END)
        try:
            missing = lost(
                how.image_format, read, size_bytes, snapshot=how.snapshot, check=cancel.check
            )
        except OSError as error:
            raise DiskSourceError(
                f"disk {name!r}: cannot read the image's tables: {os_error_text(error)}"
            ) from error
        if missing is None:
            return
        if size_bytes == before:
            break
        # With --force-share it may have grown while its tables were read.
        before = size_bytes
    if missing.is_cut:
        sharing.tell(
            f"disk {name!r}: the image's file ends within a block of data, at {size_bytes} bytes: the "
            f"{missing.length} bytes that it lacks, at offset {missing.offset} of the disk, read as zeroes"
        )
        return
    raise DiskSourceError(
        f"disk {name!r}: the image's file is truncated: it has {size_bytes} bytes, and its tables name data "
        f"behind that; up to {missing.length} bytes of the disk, the first of them at offset {missing.offset}, are "
        "lost, and QEMU would read zeroes there without a word; fetch a whole copy, or, to keep what is left, "
        "make a new image of it with qemu-img convert and back that up"
    )


def _uri_for_qemu(name: str, text: str) -> str:
    """Return the URI of an export that an image lies in, without a user. Raises UsageError, ExportError."""
    uri = parse_uri(name, text)
    if uri.tls:
        raise ExportError(
            f"disk {name!r}: {uri.shown}: an image that is not raw is read by qemu-nbd, which has no "
            "TLS by a URI; export the disk that is in it"
        )
    return uri.shown


def _exported(node: str, socket: str) -> list[str]:
    """Return qemu-storage-daemon's options for a node and the socket that it is to listen on.

    It answers nobody before all that they say is there; we look for the last of it.
    """
    path = option_text(socket)
    shared = f"addr.type=unix,addr.path={path}{_SHARED}"
    return [
        *("--blockdev", node),
        *("--export", f"vhost-user-blk,id=shared,node-name={_NODE},{shared}"),
        *("--nbd-server", f"addr.type=unix,addr.path={path}"),
        *("--export", f"nbd,id=nbd,node-name={_NODE},name={EXPORT}"),
    ]


def _image_options(path: str, fd: int, image_format: str, *, shared: bool) -> str:
    """Return the image as QEMU's options; `shared`: it is read although others have it open."""
    driver = "host_device" if stat.S_ISBLK(os.fstat(fd).st_mode) else "file"
    share, file_share = (",force-share=on", ",file.force-share=on") if shared else ("", "")
    file = f"file.driver={driver},file.filename={option_text(path)}"
    return f"driver={option_text(image_format)}{share},{file}{file_share}"


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
        found = references(how.image_format, functools.partial(_read_at, fd))
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
