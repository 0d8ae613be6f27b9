# SPDX-License-Identifier: Apache-2.0
"""Images of a running QEMU whose files end before their data does: what lies behind the end reads as zeroes.

QEMU says nothing of it, neither to its guest nor to a backup, whose archive is as the guest's disk is. So it is told.
It is not refused: the guest lives with it, and the other disks are worth a backup.

A machine that is well is never called damaged. QEMU writes a block before it enters it in the image's
tables (qcow2_alloc_cluster_link_l2 in its block/qcow2-cluster.c), so a table that was read from the file speaks of
what the file has by then. What is read while QEMU moves a table may be anything: several looks have to agree.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from vmapipe.control.qemu.bitmaps import node_of
from vmapipe.control.qemu.disks import MachineDisk
from vmapipe.control.qemu.graph import Graph
from vmapipe.control.qemu.qemu_process import OpenFiles
from vmapipe.control.qmp.connection import Answer
from vmapipe.runtime.image_bounds import WITH_TABLES, Truncated, lost
from vmapipe.runtime.logs import Trace, debug
from vmapipe.runtime.text import name_text
from vmapipe.runtime.threads import DaemonPool

_log = Trace(__name__)

# QEMU moves a table within milliseconds: three looks at it while it moves are not by chance.
_LOOKS = 3
_BETWEEN_LOOKS_S = 0.1
# The tables of a TiB are 128 MiB, and most of a backup's time is left for them.
_AT_END_S = 10.0


class UsedImage(NamedTuple):
    """An image that a disk is made of: the disk's own, or one below it. `path`: as QEMU names it."""

    disk: str
    image_format: str
    path: str


class GivenUpError(Exception):
    """There is no time for more looks."""


def used_images(
    disks: Iterable[MachineDisk],
    blocks: Sequence[Answer],
    nodes: Sequence[Answer],
    graph: Graph,
) -> Iterator[UsedImage]:
    """Yield the images of the disks that have tables and lie in a file or a block device of this host."""
    for disk in disks:
        top = node_of(disk.device, blocks, nodes)
        for name in graph.tree(str(top.get("node-name", ""))) if top else ():
            below = graph.node(graph.below(name)) or {}
            image_format, path = graph.driver(name), str(below.get("file") or "")
            if image_format in WITH_TABLES and below.get("drv") in ("file", "host_device") and path:
                yield UsedImage(disk.name, image_format, path)


def find_truncated(
    images: Iterable[UsedImage], pid: int | None, check: Callable[[], None]
) -> Iterator[str]:
    """Yield a sentence for each image that is truncated; what cannot be read from here is passed over.

    `pid`: QEMU's process on this host, None: not known. `check` may raise to give up.
    """
    if not pid:
        return
    files = OpenFiles(pid)
    for image in dict.fromkeys(images):
        try:
            fd = files.open_at(image.path)
        except OSError as error:
            debug(_log, f"disk {image.disk!r}: an image is not looked at:", str(error))
            continue
        try:
            found = _lost_in_use(fd, image.image_format, check)
        except OSError as error:
            debug(_log, f"disk {image.disk!r}: an image's tables cannot be read:", str(error))
            continue
        finally:
            os.close(fd)
        if found is not None:
            yield _words(image, *found)


def _lost_in_use(
    fd: int, image_format: str, check: Callable[[], None]
) -> tuple[int, Truncated] | None:
    """Return the size of an image's file and what is missing in it, if all looks find that. Raises OSError."""
    size_now = functools.partial(os.lseek, fd, 0, os.SEEK_END)
    missing = None
    for look in range(_LOOKS):
        if look:
            time.sleep(_BETWEEN_LOOKS_S)
        check()
        missing = lost(image_format, functools.partial(_read_at, fd), size_now, check=check)
        if missing is None or missing.is_cut:
            # Zeroes at the end of the last block are left out by some programs.
            return None
    return (size_now(), missing) if missing is not None else None


def _read_at(fd: int, offset: int, length: int) -> bytes:
    """Read at an offset that the image names, which may be any number."""
    return os.pread(fd, length, offset) if offset < 1 << 63 else b""


def _words(image: UsedImage, size_bytes: int, missing: Truncated) -> str:
    return (
        f"disk {image.disk!r}: the image {name_text(image.path)}, which QEMU has open, is truncated: its file has "
        f"{size_bytes} bytes, and its tables name data behind that; up to {missing.length} bytes, the first of "
        f"them at offset {missing.offset} of the image, are lost: the guest reads zeroes there, and a backup stores "
        "these; keep an older archive, and look at what the guest has there"
    )


class TruncatedLook:
    """A look at a machine's images in a thread of its own, beside its backup, which does not wait for it."""

    def __init__(self) -> None:
        self._images: list[UsedImage] = []
        self._pool: DaemonPool | None = None
        self._found: list[str] = []
        self._is_over = False

    def expect(self, images: Iterable[UsedImage]) -> None:
        """Note what is to be looked at."""
        self._images = list(images)

    def poll(self, pid: int | None, notices: list[str]) -> None:
        """Begin, if that was not done, and move what was found to `notices`.

        Call it when no more processes are forked: a thread's locks would be copied.
        """
        if self._images and pid and self._pool is None and not self._is_over:
            self._pool = DaemonPool(1, "images")
            self._pool.submit(functools.partial(self._look, pid))
        while self._found:
            notices.append(self._found.pop(0))

    def end(self, notices: list[str], *, stored: bool) -> None:
        """Give up, of a backup that is stored only after some seconds more. Raises nothing."""
        pool, self._pool = self._pool, None
        if pool is not None and stored and not pool.close(_AT_END_S):
            debug(_log, "images:", "not all of their tables were looked at")
        self._is_over = True
        self.poll(None, notices)

    def _look(self, pid: int) -> None:
        try:
            for text in find_truncated(self._images, pid, self._check):
                self._found.append(text)
        except GivenUpError:
            pass

    def _check(self) -> None:
        if self._is_over:
            raise GivenUpError


class Deadline:
    """A `check` for `find_truncated` that gives up after some time."""

    def __init__(self, limit_s: float) -> None:
        self._until = time.monotonic() + limit_s

    def check(self) -> None:
        """Raises GivenUpError."""
        if time.monotonic() > self._until:
            raise GivenUpError
