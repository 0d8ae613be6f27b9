# SPDX-License-Identifier: Apache-2.0
"""What a sink offers to QEMU, and a guardian in its place."""

from __future__ import annotations

from collections.abc import Iterator

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


class TakesOnly:
    """The part of a `Backend` that is the same for all targets of a backup: nobody reads there."""

    def try_read(self, target: memoryview, offset: int) -> bool:
        self.read(target, offset)
        return True

    def settle(self, *, idle: bool) -> None: ...

    def read(self, target: memoryview, offset: int) -> None:
        target[:] = bytes(len(target))

    def trim(self, offset: int, length: int) -> None:
        """Says nothing about content."""

    def cache(self, offset: int, length: int) -> None: ...

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        yield length, 0
