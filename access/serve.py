# SPDX-License-Identifier: Apache-2.0
"""Serves the devices of open archives over NBD until it is asked to stop."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import quote

from vmapipe.access.archive import OpenArchive
from vmapipe.access.disk import ArchiveDisk
from vmapipe.access.overlay import OverlayDisk, archive_id
from vmapipe.producer.nbd.server import DRAIN_S, Offer, Server, answer_promptly
from vmapipe.protocol.nbd.constants import (
    NBD_FLAG_CAN_MULTI_CONN,
    NBD_FLAG_READ_ONLY,
    NBD_FLAG_SEND_DF,
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_FUA,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
    string_fault,
)
from vmapipe.protocol.nbd.session import Export
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.events import Emit
from vmapipe.runtime.syscalls import readable

_READ_ONLY = NBD_FLAG_READ_ONLY | NBD_FLAG_CAN_MULTI_CONN | NBD_FLAG_SEND_DF
# All connections write to the same file, so that one's flush is all's.
_WRITABLE = (
    NBD_FLAG_CAN_MULTI_CONN
    | NBD_FLAG_SEND_DF
    | NBD_FLAG_SEND_FLUSH
    | NBD_FLAG_SEND_FUA
    | NBD_FLAG_SEND_TRIM
    | NBD_FLAG_SEND_WRITE_ZEROES
)


class Shown(NamedTuple):
    """A disk and its export's name. `overlay`: the file for its writes; None: read-only."""

    export: str
    archive: OpenArchive
    disk: ArchiveDisk
    overlay: str | None = None


def serve(
    listener: socket.socket, address: str, shown: Sequence[Shown], cancel: Cancel, emit: Emit
) -> None:
    """Until `cancel` is asked. Takes `listener` over. Raises Failure, OSError."""
    answer_promptly()
    overlays: list[OverlayDisk] = []
    try:
        offers = []
        for export, archive, disk, path in shown:
            device = disk.device
            if path is None:
                offers.append(read_only_offer(export, disk, device.name))
            else:
                overlay = OverlayDisk(disk, path, archive_id(archive.header), device.dev_id)
                overlays.append(overlay)
                offers.append(writable_offer(export, overlay, device.name))

        def notice(text: str) -> None:
            emit({"event": "notice", "text": text})

        server = Server([listener], offers, notice, reports_failures=True)
        server.start()
        for item in shown:
            emit(
                {
                    "event": "exported",
                    "archive": item.archive.name,
                    "device": item.disk.device.name,
                    "bytes": item.disk.size_bytes,
                    "writable": item.overlay is not None,
                    "uri": f"nbd+unix:///{quote(item.export)}?socket={quote(address)}",
                }
            )
        readable([cancel.fd])
        server.close_intake()
        server.finish(time.monotonic() + DRAIN_S)
    finally:
        listener.close()
        for overlay in overlays:
            overlay.close()


def read_only_offer(export: str, disk: ArchiveDisk, device_name: str) -> Offer:
    """Return what a server of ours needs to serve this disk."""
    return _offer(export, disk, _READ_ONLY, device_name)


def writable_offer(export: str, overlay: OverlayDisk, device_name: str) -> Offer:
    """Return the same for a disk whose writes are kept in its overlay."""
    return _offer(export, overlay, _WRITABLE, device_name)


def _offer(export: str, disk: ArchiveDisk | OverlayDisk, flags: int, device_name: str) -> Offer:
    text = f"vmapipe: {device_name}"
    if string_fault(text) is not None:
        text = "vmapipe"
    return Offer(Export(export, disk.size_bytes, flags, text, allocation=True), disk)
