# SPDX-License-Identifier: Apache-2.0
"""A node of QEMU that has a bitmap and nothing else, and is there for a moment: see bitmap_image.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from vmapipe.control.qemu.bitmap_image import bitmap_image
from vmapipe.control.qemu.bitmaps import add_image, image_name
from vmapipe.control.qemu.sink_folder import SinkFolder
from vmapipe.control.qmp.connection import Command, Qmp, QmpRefused


class ImageNode:
    """The node of a run; its image lies in the run's folder."""

    def __init__(self, qmp: Qmp, run: str, folder: SinkFolder) -> None:
        self._qmp = qmp
        self._name = image_name(run)
        self._folder = folder

    @contextlib.contextmanager
    def open(self, size_bytes: int, bits: bytes | bytearray, *, read_only: bool) -> Iterator[int]:
        """An image with a bitmap of `bits`, opened by QEMU meanwhile: its descriptor.

        Raises QmpRefused, QmpGone; OSError: the image cannot be made.
        """
        with self._folder.image(bitmap_image(size_bytes, bits)) as (path, fd):
            self._qmp.execute(add_image(self._name, path, read_only=read_only))
            try:
                yield fd
            finally:
                with contextlib.suppress(QmpRefused):  # it is gone
                    self._qmp.execute(Command("blockdev-del", {"node-name": self._name}))
