# SPDX-License-Identifier: Apache-2.0
"""Holes of raw image files, which QEMU's jobs leave out: what lies there is zero at the instant.

QEMU sends a hole of a raw image as requests for zeroes, a megabyte each. So first a bitmap is added
to the disk, which records each write that is completed from then on; then the file system is asked
where the file has data; then that is merged into the bitmap, and the job copies what the bitmap has
at the instant. All else was a hole when it was looked for, and nothing has been written there since.
QEMU marks a write in its bitmaps when it is completed, whether it was begun before they were added
or not (bdrv_co_write_req_finish in its block/io.c).

Any doubt means that all of the disk is copied. See docs/decisions/0037-holes.md.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vmapipe.clusters.sizes import CLUSTER_BYTES, cluster_count
from vmapipe.control.qemu.bitmap_image import BITMAP, bits_of
from vmapipe.control.qemu.bitmap_node import ImageNode
from vmapipe.control.qemu.bitmaps import (
    add_job_bitmap,
    image_name,
    job_bitmap,
    merge_bitmap,
    node_of,
    remove_bitmap,
)
from vmapipe.control.qemu.disks import MachineDisk
from vmapipe.control.qemu.graph import Graph
from vmapipe.control.qemu.jobs import NodeBitmap
from vmapipe.control.qemu.qemu_process import OpenFiles
from vmapipe.control.qemu.sink_folder import SinkFolder
from vmapipe.control.qmp.connection import Answer, Command, Qmp, QmpRefused, ask_if_known
from vmapipe.producer.source import segments_of
from vmapipe.runtime.logs import Trace, debug

_log = Trace(__name__)

# Sending the zeroes of a MiB takes QEMU 0.15 ms; making a bitmap of where the data is takes 10 ms.
_WORTH_BYTES = 64 << 20
# A file in a million pieces takes seconds to look through, all of them before the instant. What has
# not been looked at by then is copied.
_SCAN_S = 0.25
# Of these it is known that they tell what is in the page cache as data. ZFS has told it as holes
# (OpenZFS issue 15526), a FUSE daemon cannot know of it, and NFS has to write it back first.
_FILE_SYSTEMS = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs"})
_SECTOR_BYTES = 512


class _Doubt(Exception):
    """It is not certain which file a disk is, or where its holes are."""


class RawImage(NamedTuple):
    """A disk that is a whole raw file: the node that its job reads, its file's node, and that file's
    name as QEMU says it, from its working folder."""

    node: str
    file_node: str
    path: str


def raw_image(
    disk: MachineDisk, blocks: Sequence[Answer], nodes: Sequence[Answer], graph: Graph
) -> RawImage | None:
    """Find a disk's raw image file; None: it is of another kind, or only a part of a file."""
    node = node_of(disk.device, blocks, nodes)
    if node is None or node.get("drv") not in ("raw", "file"):
        return None
    name = str(node.get("node-name", ""))
    file = node if node.get("drv") == "file" else graph.node(graph.below(name))
    if file is None or file.get("drv") != "file" or not file.get("file"):
        return None
    file_node = str(file["node-name"])
    # Of equal sizes there is no offset in between.
    if not graph.size_bytes(name) == graph.size_bytes(file_node) == disk.size_bytes:
        return None
    return RawImage(name, file_node, str(file["file"]))


class Holes:
    """The holes of one backup's disks. Call `leave_out` before the instant."""

    def __init__(self, qmp: Qmp, run: str) -> None:
        self._qmp = qmp
        self._run = run
        self._left_out: set[str] = set()

    def leave_out(
        self, disks: Sequence[MachineDisk], pid: int | None, folder: SinkFolder
    ) -> dict[str, NodeBitmap]:
        """Return what is to be copied of those disks that have many holes, by name.

        `pid`: QEMU's process on this host; None: not known. Raises QmpGone.
        """
        disks = [disk for disk in disks if disk.size_bytes >= _WORTH_BYTES and not disk.is_thin]
        if not pid or not disks:
            return {}
        # Not the answers that the disks were chosen by: since then the producers were started and the
        # guest's file systems frozen, and with a snapshot taken meanwhile the bitmap would be added to
        # a node below the disk's active one, where the job does not find it: no backup.
        blocks = ask_if_known(self._qmp, "query-block") or ()
        nodes = self._nodes()
        graph = Graph(nodes, ask_if_known(self._qmp, "x-debug-query-block-graph"))
        found = {}
        until = time.monotonic() + _SCAN_S
        for disk in disks:
            image = raw_image(disk, blocks, nodes, graph)
            if image and (bitmap := self._made(disk, image, OpenFiles(pid), folder, until)):
                found[disk.name] = bitmap
        self._left_out = set(found)
        return found

    def are_left_out(self, disk: str) -> bool:
        """True when the rest of this disk, which its job has not sent, is known to be zero."""
        return disk in self._left_out

    def copies_all(self, disk: str) -> None:
        """Note that a disk's job copies all of it after all: our filter did not take its place."""
        self._left_out.discard(disk)

    def _made(
        self,
        disk: MachineDisk,
        image: RawImage,
        files: OpenFiles,
        folder: SinkFolder,
        until: float,
    ) -> NodeBitmap | None:
        """Make the bitmap of what is not a hole; None: it cannot be made, or is not worth it."""
        bitmap = NodeBitmap(image.node, job_bitmap(self._run))
        try:
            # Before the look at the file: it has all that is written from now on.
            self._qmp.execute(add_job_bitmap(*bitmap))
        except QmpRefused as refused:
            debug(_log, f"disk {disk.name!r}: no look for holes:", str(refused))
            return None
        try:
            bits = self._data(disk, image, files, until)
            data_bytes = int.from_bytes(bits, "little").bit_count() * CLUSTER_BYTES
            hole_bytes = disk.size_bytes - data_bytes
            debug(_log, f"disk {disk.name!r}: holes that are not sent, in bytes:", hole_bytes)
            if hole_bytes >= _WORTH_BYTES:
                node = ImageNode(self._qmp, self._run, folder)
                with node.open(disk.size_bytes, bits, read_only=True):
                    source = {"node": image_name(self._run), "name": BITMAP}
                    self._qmp.execute(merge_bitmap(*bitmap, source))
                return bitmap
        except (QmpRefused, OSError, _Doubt) as error:
            debug(_log, f"disk {disk.name!r}: all of it is sent:", str(error))
        with contextlib.suppress(QmpRefused):
            self._qmp.execute(remove_bitmap(*bitmap))
        return None

    def _data(
        self, disk: MachineDisk, image: RawImage, files: OpenFiles, until: float
    ) -> bytearray:
        """Return the clusters that are not holes in any file that may be the disk's.

        Raises OSError, _Doubt.
        """
        with contextlib.ExitStack() as stack:
            fds = _open_candidates(files, disk.size_bytes, stack)
            own = [fd for fd in fds if files.is_at(fd, image.path)]
            if not own:
                raise _Doubt("QEMU does not have the file open that is at its path")
            if len(fds) > 1 and self._fitting(fds, image) == own:
                fds = own
            runs = (run for fd in fds for run in _data_runs(fd, disk.size_bytes, until))
            return bits_of(disk.size_bytes, runs)

    def _fitting(self, fds: Sequence[int], image: RawImage) -> list[int]:
        """Return those files that take as much space as QEMU says that this disk's does.

        Another image of the same size may have been put in its place while QEMU had both open.
        """
        before = [os.fstat(fd).st_blocks for fd in fds]
        # Asked again, in between: what the file takes changes with each write into a hole.
        node = next((n for n in self._nodes() if n.get("node-name") == image.file_node), {})
        used = (node.get("image") or {}).get("actual-size", -1) // _SECTOR_BYTES
        after = [os.fstat(fd).st_blocks for fd in fds]
        return [
            fd
            for fd, *sizes in zip(fds, before, after, strict=True)
            if min(sizes) <= used <= max(sizes)
        ]

    def _nodes(self) -> Sequence[Answer]:
        nodes: Sequence[Answer] = self._qmp.execute(
            Command("query-named-block-nodes", {"flat": True})
        )
        return nodes


def _data_runs(fd: int, size_bytes: int, until: float) -> Iterator[tuple[int, int]]:
    """Yield the runs of a raw file's clusters that have data; after `until` all of the rest."""
    for segment in segments_of(fd, size_bytes):
        first = segment.start // CLUSTER_BYTES
        if time.monotonic() > until:
            yield first, cluster_count(size_bytes) - first
            return
        if segment.is_data:
            yield first, cluster_count(segment.end) - first


def _open_candidates(files: OpenFiles, size_bytes: int, stack: contextlib.ExitStack) -> list[int]:
    """Open all regular files that may be a raw disk of this size, each once.

    Raises OSError; _Doubt for a file system whose answers are not relied on.
    """
    found: dict[tuple[int, int], int] = {}
    for file in files:
        status = file.status
        same = -(-status.st_size // _SECTOR_BYTES) * _SECTOR_BYTES == size_bytes
        if not (same and stat.S_ISREG(status.st_mode)):
            continue
        if (status.st_dev, status.st_ino) in found:
            continue
        kind = files.file_system(file)
        if kind not in _FILE_SYSTEMS:
            raise _Doubt(f"it lies on {kind or 'an unknown file system'}")
        fd = files.open(file)
        stack.callback(os.close, fd)
        found[status.st_dev, status.st_ino] = fd
    return list(found.values())
