# SPDX-License-Identifier: Apache-2.0
"""The disks of a tested machine: the archive's, with nameless files above them for what it writes."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence

from vmapipe.access.archive import OpenArchive
from vmapipe.access.disk import ArchiveDisk
from vmapipe.access.machine.argv import DISK_NODE
from vmapipe.access.overlay import OverlayDisk, archive_id
from vmapipe.access.serve import writable_offer
from vmapipe.producer.nbd.server import DRAIN_S, Server, answer_promptly
from vmapipe.runtime.errors import Failure
from vmapipe.vma.header import Device

_READ_BYTES = 1 << 20


class DrillDisks:
    """An NBD server in this process. It ends with `close`; what was written is gone then."""

    def __init__(
        self, archive: OpenArchive, sources: Sequence[str], listener: socket.socket, folder: str
    ) -> None:
        """`sources`: the archive's devices, in the order of the exports. Raises Failure."""
        answer_promptly()
        self._overlays: list[OverlayDisk] = []
        try:
            offers = []
            for index, name in enumerate(sources):
                device = device_named(archive, name)
                path, disk = os.path.join(folder, f"writes{index}"), ArchiveDisk(archive, device)
                overlay = OverlayDisk(
                    disk, path, archive_id(archive.header), device.dev_id, is_kept=False
                )
                self._overlays.append(overlay)
                offers.append(writable_offer(DISK_NODE.format(index), overlay, name))
            self._server = Server([listener], offers)
            self._server.start()
        except BaseException:
            for overlay in self._overlays:
                overlay.close()
            raise

    @property
    def written_bytes(self) -> int:
        return sum(overlay.stored_bytes for overlay in self._overlays)

    def close(self) -> None:
        self._server.close_intake()
        self._server.finish(time.monotonic() + DRAIN_S)
        for overlay in self._overlays:
            overlay.close()


def device_named(archive: OpenArchive, name: str) -> Device:
    """Raises Failure."""
    for device in archive.header.devices:
        if device.name == name:
            return device
    raise Failure(f"there is no device {name!r} in the archive")


def copy_start(archive: OpenArchive, name: str, length: int, path: str) -> bool:
    """Write the first `length` bytes of a device to a new file; False: it has fewer. Raises Failure."""
    device = device_named(archive, name)
    if device.size_bytes < length:
        return False
    disk = ArchiveDisk(archive, device)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        for at in range(0, length, _READ_BYTES):
            piece = memoryview(bytearray(min(_READ_BYTES, length - at)))
            disk.read(piece, at)
            file.write(piece)
    return True
