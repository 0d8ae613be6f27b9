# SPDX-License-Identifier: Apache-2.0
"""What a sink offers to QEMU, and a guardian in its place."""

from __future__ import annotations

from vmapipe.protocol.nbd.constants import (
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_FUA,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
)
from vmapipe.protocol.nbd.export import Export

#: What QEMU has to ask for.
EXPORT_NAME = "disk"
_FLAGS = NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES


def sink_export(size_bytes: int) -> Export:
    """A minimum block of 1, Export's default: QEMU refuses larger ones where sizes are odd."""
    return Export(EXPORT_NAME, size_bytes, _FLAGS, "vmapipe backup")
