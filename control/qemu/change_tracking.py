# SPDX-License-Identifier: Apache-2.0
"""The records of changes that one backup uses and leaves behind: QEMU's dirty bitmaps, carried out.

See bitmaps.py for what is what.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from vmapipe.clusters.sizes import cluster_count
from vmapipe.control.qemu.bitmap_image import BITMAP, InvalidImage, bits_of, is_set, read_bits
from vmapipe.control.qemu.bitmap_node import ImageNode
from vmapipe.control.qemu.bitmaps import (
    BaseArchive,
    DiskMethod,
    add_bitmap,
    add_job_bitmap,
    all_but,
    bitmap_name,
    choose_method,
    image_name,
    job_bitmap,
    merge_bitmap,
    node_of,
    remove_bitmap,
    since,
    worthless,
)
from vmapipe.control.qemu.disks import MachineDisk
from vmapipe.control.qemu.jobs import NodeBitmap
from vmapipe.control.qemu.sink_folder import SinkFolder
from vmapipe.control.qmp.connection import Answer, Command, Qmp, QmpRefused, ask_if_known
from vmapipe.runtime.children import Child
from vmapipe.runtime.errors import DoubtfulBase, os_error_text
from vmapipe.runtime.events import sampled_commands


class TrackingOptions(NamedTuple):
    """The records that a backup wants.

    `archive`: its own uuid; `base`: what it builds on, None: nothing, for the reason `why_full`;
    `sample_percent`: so much of what has not changed is read all the same.
    """

    archive: bytes
    base: BaseArchive | None
    why_full: str
    sample_percent: float = 0


# A record that is wrong (a disk that was shrunk and grown again, an image put in another's place) is
# wrong at many places: with 64 of them one cluster in 20 is found at 96 %.
LEAST_SAMPLES = 64


def choose_sample(size_bytes: int, dirty_bytes: int, percent: float) -> list[int]:
    """Choose clusters of a disk by chance, so many that at least LEAST_SAMPLES will not have changed.

    None for 0 percent.
    """
    clusters = cluster_count(size_bytes)
    wanted = max(LEAST_SAMPLES, round(clusters * percent / 100)) if percent else 0
    # Which ones have changed is not known yet; at most half of them (see bitmaps.py).
    wanted = round(wanted / max(0.5, 1 - dirty_bytes / size_bytes))
    # Nobody in the guest may know which they will be.
    return sorted(random.SystemRandom().sample(range(clusters), min(wanted, clusters)))


class ChangeTracking:
    """The records of one backup. Call `prepare` before the instant, and `settle` at the end."""

    def __init__(self, qmp: Qmp, run: str, options: TrackingOptions) -> None:
        self._qmp = qmp
        self._run = run
        self._options = options
        #: Texts for the user; the caller takes them.
        self.notices: list[str] = []
        # By disk: the node that its jobs' records are on.
        self._nodes: dict[str, str] = {}
        self._methods: dict[str, DiskMethod] = {}
        self._samples: dict[str, Sequence[int]] = {}

    def prepare(
        self, disks: Sequence[MachineDisk], untracked: Sequence[str], folder: SinkFolder
    ) -> dict[str, NodeBitmap]:
        """Begin the new records, and return what a disk's job is to copy, by name; others: all of it.

        `untracked`: disks of our own making. Raises QmpGone.
        """
        blocks = ask_if_known(self._qmp, "query-block") or ()
        nodes = self._all_nodes()
        for command in worthless(nodes):
            self._do(command)
        for disk in disks:
            if disk.name in untracked:
                self._methods[disk.name] = DiskMethod("", "its state is always sent whole")
                continue
            node = node_of(disk.device, blocks, nodes)
            method = self._choose(disk, node)
            if node is not None:
                name = self._nodes[disk.name] = str(node["node-name"])
                if method.is_incremental and (why := self._why_not(disk, name, method, folder)):
                    method = DiskMethod("", why)
                self._begin_record(disk, node)
            self._methods[disk.name] = method
        return {
            name: NodeBitmap(self._nodes[name], job_bitmap(self._run))
            for name, method in self._methods.items()
            if method.is_incremental
        }

    @property
    def takes_samples(self) -> bool:
        return self._options.base is not None and self._options.sample_percent > 0

    def copies_all(self, disk: MachineDisk) -> None:
        """Note that a disk's job copies all of it after all: our filter did not take its place."""
        if self._methods[disk.name].is_incremental:
            self._methods[disk.name] = DiskMethod("", "QEMU does not let us read it as a snapshot")

    @property
    def methods(self) -> Mapping[str, DiskMethod]:
        """How each disk is backed up, by name; empty before `prepare`."""
        return self._methods

    def _choose(self, disk: MachineDisk, node: Answer | None) -> DiskMethod:
        if self._options.base is None:
            return DiskMethod("", self._options.why_full)
        return choose_method(disk, node, self._options.base)

    def _begin_record(self, disk: MachineDisk, node: Answer) -> None:
        refused = ""
        name = bitmap_name(self._options.archive, disk.name)
        for command in add_bitmap(str(node["node-name"]), name, node):
            refused = self._do(command)
            if not refused:
                return
        self.notices.append(
            f"disk {disk.name!r}: QEMU does not record what changes from now on ({refused}): its "
            "next backup will be a full one"
        )

    def _why_not(self, disk: MachineDisk, node: str, method: DiskMethod, folder: SinkFolder) -> str:
        """Make what the disk's job reads; return why that failed, empty: it did not."""
        try:
            return self._fill(disk, node, method, folder)
        except DoubtfulBase as failure:
            self._do(remove_bitmap(node, job_bitmap(self._run)))
            return str(failure)

    def _fill(self, disk: MachineDisk, node: str, method: DiskMethod, folder: SinkFolder) -> str:
        """Make what the disk's job reads; return why that failed, empty: it did not."""
        name = job_bitmap(self._run)
        refused = self._do(add_job_bitmap(node, name))
        refused = refused or self._do(merge_bitmap(node, name, method.since))
        sample = choose_sample(disk.size_bytes, method.dirty_bytes, self._options.sample_percent)
        if sample and not refused:
            source = image_name(self._run)
            with self._image(disk, sample, folder, read_only=True):
                refused = self._do(merge_bitmap(node, name, {"node": source, "name": BITMAP}))
        self._samples[disk.name] = sample
        if refused:
            self._do(remove_bitmap(node, name))
            return f"QEMU does not prepare an incremental backup of it: {refused}"
        return ""

    def tell_samples(
        self, disks: Sequence[MachineDisk], producers: Sequence[Child], folder: SinkFolder
    ) -> None:
        """Let the producers compare what has not changed with the base. Raises Failure."""
        for disk, producer in zip(disks, producers, strict=False):
            for command in sampled_commands(self._certain_sample(disk, folder)):
                producer.tell(command)

    def _certain_sample(self, disk: MachineDisk, folder: SinkFolder) -> list[int]:
        """Return the sampled clusters that are as in the base, if QEMU's old record is right.

        What the guest has written since the instant is in that record, too, and is not looked at.
        Raises Failure.
        """
        sample = self._samples.get(disk.name, ())
        if not sample or not self._methods[disk.name].is_incremental:
            return []
        target = image_name(self._run)
        source = {"node": self._nodes[disk.name], "name": self._methods[disk.name].since}
        refused, bits = "", b""
        with self._image(disk, (), folder, read_only=False) as fd:
            refused = self._do(merge_bitmap(target, BITMAP, source))
            # QEMU keeps the bitmap in the image when it closes it.
            refused = refused or self._do(Command("blockdev-del", {"node-name": target}))
            try:
                bits = read_bits(lambda at, length: os.pread(fd, length, at), disk.size_bytes)
            except (InvalidImage, OSError) as error:
                refused = refused or str(error)
        found = [] if refused else [n for n in sample if not is_set(bits, n)]
        if not found:
            why = refused or "all of it has changed"
            raise DoubtfulBase(f"disk {disk.name!r}: no sample of it can be compared: {why}")
        return found

    @contextlib.contextmanager
    def _image(
        self, disk: MachineDisk, clusters: Sequence[int], folder: SinkFolder, *, read_only: bool
    ) -> Iterator[int]:
        """An image with a bitmap of these clusters, opened by QEMU meanwhile: its descriptor.

        Raises DoubtfulBase.
        """
        size_bytes = disk.size_bytes
        bits = bits_of(size_bytes, ((cluster, 1) for cluster in clusters))
        image = ImageNode(self._qmp, self._run, folder)
        try:
            with image.open(size_bytes, bits, read_only=read_only) as fd:
                yield fd
        except QmpRefused as refused:
            raise DoubtfulBase(f"disk {disk.name!r}: QEMU opens no sample: {refused}") from refused
        except OSError as error:
            text = f"disk {disk.name!r}: no sample of it can be made: {os_error_text(error)}"
            raise DoubtfulBase(text) from error

    def settle(self, qmp: Qmp, *, stored: bool) -> None:
        """Remove the old records when the archive is on disk, else the new ones. Raises QmpGone.

        `qmp`: a connection that is open. After a crash both stay: each is worth what its name says.
        """
        self._qmp = qmp
        nodes = self._all_nodes()
        commands = since(nodes, self._options.archive)
        if stored:
            tracked = {str(command.arguments["node"]) for command in commands}
            ours = [node for node in nodes if node.get("node-name") in tracked]
            commands = all_but(ours, self._options.archive)
        for command in commands:
            self._do(command)

    def _do(self, command: Command) -> str:
        """Execute a command; return why QEMU refuses it, empty: it does not. Raises QmpGone."""
        try:
            self._qmp.execute(command)
        except QmpRefused as refused:
            return str(refused)
        return ""

    def _all_nodes(self) -> Sequence[Answer]:
        nodes: Sequence[Answer] = self._qmp.execute(
            Command("query-named-block-nodes", {"flat": True})
        )
        return nodes
