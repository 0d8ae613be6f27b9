# SPDX-License-Identifier: Apache-2.0
"""The file ARCHIVE.digests: a digest for each cluster, by which a later backup finds what has changed.

Its form: docs/vma-format.md. A digest that damage made means that a cluster is sent although it has not
changed, and no more. One of data that the archive does not hold there must never come to be: whoever writes
that data later would be told that nothing has changed.
"""

from __future__ import annotations

import itertools
import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, BinaryIO, Protocol

from vmapipe.archiver.outputs.base import write_failure
from vmapipe.clusters.digests import DIGEST_BYTES, UNKNOWN, cluster_digester, cluster_digests
from vmapipe.runtime.syscalls import read_at, write_at
from vmapipe.vma.header import Device
from vmapipe.vma.packer import PackedRun

if TYPE_CHECKING:
    from vmapipe.archiver.outputs.object import ObjectOutput

SUFFIX = ".digests"
KEY_BYTES = 32
_MAGIC = b"VMAPIPE-DIGESTS\0"
# Magic, version, the archive's uuid, the key.
_HEAD = struct.Struct(">16sI16s32s")
_VERSION = 1
#: Where the digests begin: what a file system shares is whole blocks.
HEAD_BYTES = 4096
# Zero clusters of one run are written in pieces of this.
_ZERO_PIECE = UNKNOWN * 4096


def places(devices: Iterable[Device]) -> Mapping[int, int]:
    """Where the digests of each device begin in the file: one device behind the other."""
    disks = sorted(device for device in devices if not device.is_vmstate)
    ends = itertools.accumulate((d.clusters * DIGEST_BYTES for d in disks), initial=HEAD_BYTES)
    return {device.dev_id: at for device, at in zip(disks, ends, strict=False)}


def file_bytes(devices: Iterable[Device]) -> int:
    """How long the file is."""
    return HEAD_BYTES + DIGEST_BYTES * sum(d.clusters for d in devices if not d.is_vmstate)


class BaseDigests:
    """The open digests of a base."""

    def __init__(self, file: BinaryIO, path: str, uuid: bytes, devices: tuple[Device, ...]) -> None:
        """Raises OSError; ValueError, in words, where it is not the file of this archive."""
        self._opened = file
        self.fd = file.fileno()
        try:
            raw = os.pread(self.fd, _HEAD.size, 0)
            if len(raw) < _HEAD.size:
                raise ValueError(f"{path} is cut off")
            magic, version, owner, self.key = _HEAD.unpack(raw)
            if (magic, version) != (_MAGIC, _VERSION):
                raise ValueError(f"{path} is not a file of digests")
            if owner != uuid:
                raise ValueError(f"{path} belongs to another archive")
            if os.fstat(self.fd).st_size != file_bytes(devices):
                raise ValueError(f"{path} has a wrong length")
        except BaseException:
            file.close()
            raise
        self.devices = devices
        self._places = places(devices)

    def read(self, dev_id: int, first: int, clusters: int) -> bytes:
        """The digests of clusters of the device; UNKNOWN for those that cannot be read."""
        device = next((device for device in self.devices if device.dev_id == dev_id), None)
        if device is None or first >= device.clusters:
            return b""
        view = memoryview(bytearray(min(clusters, device.clusters - first) * DIGEST_BYTES))
        try:
            read_at(self.fd, view, self._places[dev_id] + first * DIGEST_BYTES)
        except OSError:
            return bytes(len(view))
        return bytes(view)

    def close(self) -> None:
        self._opened.close()


class DigestPlace(Protocol):
    """Where new digests are written, at any place, and committed: a file, or an object of a store."""

    def copy_from(self, fd: int, length: int) -> bool:
        """See FileOutput."""

    def write_at(self, data: bytes | memoryview, offset: int) -> None:
        """See FileOutput."""

    def extend(self, length: int) -> None:
        """See FileOutput."""

    def commit(self) -> None:
        """Bring it to its place."""

    def abandon(self) -> None:
        """Leave nothing behind. Never raises."""

    def withdraw(self) -> None:
        """Take it back after its commit. Never raises."""


class DigestObject:
    """Digests that become an object, from a nameless file: they are not written in order."""

    def __init__(self, output: ObjectOutput) -> None:
        self._output = output
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  closed by commit and abandon

    def copy_from(self, fd: int, length: int) -> bool:
        return False

    def write_at(self, data: bytes | memoryview, offset: int) -> None:
        self._on_disk(lambda: write_at(self._file.fileno(), memoryview(data), offset))

    def extend(self, length: int) -> None:
        self._on_disk(lambda: os.ftruncate(self._file.fileno(), length))

    def _on_disk(self, work: Callable[[], object]) -> None:
        try:
            work()
        except OSError as error:
            where = f"the digests of clusters in {tempfile.gettempdir()}"
            raise write_failure(where, 0, error) from error

    def commit(self) -> None:
        self._file.seek(0)
        while piece := self._file.read(1 << 20):
            self._output.write([piece])
        self._output.commit()
        self._file.close()

    def abandon(self) -> None:
        self._output.abandon()
        self._file.close()

    def withdraw(self) -> None:
        self._output.remove()


class DigestFile:
    """The digests of a new archive, in the making; committed and abandoned with its manifest.

    What is taken from a base has the digests that it had there, where the base has some.
    """

    def __init__(self, place: DigestPlace, base: BaseDigests | None) -> None:
        self._file = place
        self._base = base
        self._digest: Callable[[bytes, memoryview], bytes] | None = None
        self._places: Mapping[int, int] = {}
        self._kept: frozenset[int] = frozenset()
        self._committed = False

    def begin(self, uuid: bytes, devices: tuple[Device, ...], based: Mapping[int, Device]) -> None:
        """`based`: the devices that have a base, by their dev_ids there. Raises OutputFailure."""
        base = self._base
        key = base.key if base is not None else os.urandom(KEY_BYTES)
        self._digest = cluster_digester(key)
        self._places = places(devices)
        if base is not None:
            self._kept = frozenset(device.dev_id for device in based.values())
            same_numbers = all(number == device.dev_id for number, device in based.items())
            same = same_numbers and self._places == places(base.devices)
            # Only where all disks have a base: of the clusters of another one that are zero nothing
            # is written, and what another disk had there would pass for what this archive holds.
            same = same and self._kept == self._places.keys()
            if not (same and self._file.copy_from(base.fd, file_bytes(base.devices))):
                # A part of it may have been copied.
                self._file.extend(0)
                for number, device in based.items():
                    self._copy(base, number, device)
        self._file.write_at(_HEAD.pack(_MAGIC, _VERSION, uuid, key), 0)
        self._file.extend(file_bytes(devices))

    def _copy(self, base: BaseDigests, number: int, device: Device) -> None:
        step = len(_ZERO_PIECE) // DIGEST_BYTES
        for first in range(0, device.clusters, step):
            digests = base.read(number, first, min(step, device.clusters - first))
            if any(digests):
                self._file.write_at(digests, self._places[device.dev_id] + first * DIGEST_BYTES)

    def add(self, clusters: Iterable[PackedRun]) -> None:
        """Take clusters of the archive; passes over devices whose digests are the base's."""
        self._add(clusters, kept=False)

    def add_changed(self, clusters: Iterable[PackedRun]) -> None:
        """Take clusters that are not as in the base, of the devices whose digests are the base's."""
        self._add(clusters, kept=True)

    def _add(self, clusters: Iterable[PackedRun], *, kept: bool) -> None:
        if self._digest is None:
            raise RuntimeError("not begun")
        for dev_id, first, count, masks, data in clusters:
            at = self._places.get(dev_id)
            if at is None or kept != (dev_id in self._kept):
                continue
            at += first * DIGEST_BYTES
            if masks:
                digests = b"".join(cluster_digests(self._digest, masks, data))
                self._file.write_at(digests, at)
            elif kept:
                # What it had before. A new file has zeroes there.
                for done in range(0, count * DIGEST_BYTES, len(_ZERO_PIECE)):
                    self._file.write_at(_ZERO_PIECE[: count * DIGEST_BYTES - done], at + done)

    def commit(self) -> None:
        self._file.commit()
        self._committed = True

    def abandon(self) -> None:
        """Leave nothing behind, after a commit too. Never raises."""
        self._file.abandon()
        if self._committed:
            self._committed = False
            self._file.withdraw()
