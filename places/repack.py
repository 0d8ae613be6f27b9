# SPDX-License-Identifier: Apache-2.0
"""An archive made anew out of another one: in order, with a manifest; with what it holds changed if asked for."""

from __future__ import annotations

import re
import struct
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from vmapipe.archiver.job.spec import JobSpec, uuid_of
from vmapipe.archiver.job.writer import ArchiveWriter, WriterState
from vmapipe.clusters.sizes import MAX_DEVICE_BYTES, VMSTATE_NAME
from vmapipe.places.ordering import DiskRun, Ordering, normal, pieces, without, zeroes_together
from vmapipe.places.reading import SoundArchive
from vmapipe.places.spool import Spool
from vmapipe.restore.archive.reader import FoundExtent
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import UsageError
from vmapipe.runtime.text import name_text
from vmapipe.vma.extent import Extent
from vmapipe.vma.groups import GroupPacker
from vmapipe.vma.header import Config, Device, Header, encode_header
from vmapipe.vma.packer import PackedExtent, PackedRun

# Extents that wait for the output: enough that reader and writer both work.
_AHEAD_BYTES = 32 << 20
# Looked so often whether the work is to stop while the output is waited for.
_LOOK_S = 0.25
_NOTHING = memoryview(b"")
Tell = Callable[[int], None]


class Changes(NamedTuple):
    """What becomes of an archive's contents.

    `stable`: nearly full clusters are stored whole, and the uuid is the machine's, as of `vmapipe
    backup --stable`. `ctime_s`: of a reproducible archive, whose uuid is made from its contents;
    None: time and uuid stay. `uuid`: the one to have, or empty.
    """

    drop: Collection[str] = ()
    rename: Mapping[str, str] = {}
    configs: Sequence[Config] = ()
    stable: bool = False
    ctime_s: int | None = None
    uuid: bytes = b""


def parse_renames(texts: Sequence[str]) -> dict[str, str]:
    """`OLD=NEW` each. Raises UsageError."""
    renames: dict[str, str] = {}
    for text in texts:
        old, equals, new = text.partition("=")
        if not equals or not old or not new:
            raise UsageError(f"--rename {text}: use OLD=NEW")
        if old in renames:
            raise UsageError(f"--rename {old}: it was named twice")
        renames[old] = new
    return renames


# Proxmox's own line in a machine's configuration: which disk, which device of the archive.
_MAP_LINE = re.compile(rb"^(#qmdump#map:[^:\n]*:)([^:\n]+)(:.*\n?)", re.MULTILINE)


def changed_header(header: Header, changes: Changes) -> Header:
    """The header of the new archive. Raises UsageError for devices that are not there, LimitError."""
    names = {device.name for device in header.devices}
    for name in [*changes.drop, *changes.rename]:
        if name not in names:
            there = ", ".join(name_text(each) for each in sorted(names)) or "none at all"
            raise UsageError(f"the archive has no device {name_text(name)}; it has {there}")
    for old, new in changes.rename.items():
        if VMSTATE_NAME in (old, new):
            raise UsageError(
                f"--rename {old}={new}: {VMSTATE_NAME} is the machine's memory, and no disk's name"
            )
        if old in changes.drop:
            raise UsageError(f"{name_text(old)} is to be dropped, and to be renamed")
    devices = tuple(
        device._replace(name=changes.rename.get(device.name, device.name))
        for device in without(header.devices, changes.drop)
    )
    replaced = {config.name: config for config in changes.configs}
    configs = [
        replaced.pop(config.name) if config.name in replaced else _with_drives(config, changes)
        for config in header.configs
    ]
    configs += replaced.values()
    ctime_s = header.ctime_s if changes.ctime_s is None else changes.ctime_s
    uuid = changes.uuid or header.uuid
    if not changes.uuid and (changes.stable or changes.ctime_s is not None):
        spec = JobSpec(b"", ctime_s, tuple(configs), stable=changes.stable)
        uuid = uuid_of(spec, devices)
    return Header(uuid, ctime_s, devices, tuple(configs))


def _with_drives(config: Config, changes: Changes) -> Config:
    """The configuration with the lines `#qmdump#map:scsi0:drive-scsi0:…` as the devices are called now.

    Proxmox's restore fails where they name a device that is not in the archive.
    """
    if not changes.drop and not changes.rename:
        return config

    def line(found: re.Match[bytes]) -> bytes:
        name = found[2].decode("utf-8", "surrogateescape")
        if name in changes.drop:
            return b""
        new = changes.rename.get(name, name).encode("utf-8", "surrogateescape")
        return found[1] + new + found[3]

    return config._replace(data=_MAP_LINE.sub(line, config.data))


class Repacked(NamedTuple):
    """What was done, in bytes; `kept_bytes` waited in the spool file for its turn."""

    header: Header
    plain_bytes: int
    stored_bytes: int
    kept_bytes: int
    incrementals: int


class Destination(NamedTuple):
    """Opens the new archive when the old one's header was read and is fit for it."""

    store: Callable[[Callable[[], None]], ArchiveWriter[None]]
    spool_folder: str
    spool_bytes: int


def repack(
    source: SoundArchive, changes: Changes, destination: Destination, tell: Tell, cancel: Cancel
) -> Repacked:
    """Store `source` in order. `tell` hears how many bytes of the archive were read.

    Raises ArchiveError where it is damaged, Failure, Cancelled; nothing is left of the new one then.
    """
    old = source.archive.header
    header = changed_header(old, changes)
    raw_header = encode_header(header)
    packer: GroupPacker[None] = GroupPacker(header, whole=changes.stable)
    left = {device.dev_id: device for device in header.devices}
    with (
        Spool(source.source, destination.spool_folder, destination.spool_bytes, cancel) as spool,
        Writing(destination.store, cancel) as writing,
    ):
        writing.begin(header, raw_header)
        for run in ordered_runs(source, header, spool, tell):
            cancel.check()
            _pack(packer, left, run, writing)
        for extent in packer.flush():
            writing.put(extent)
        writing.finish()
        return Repacked(
            header,
            writing.plain_bytes,
            writing.stored_bytes,
            spool.kept_bytes,
            source.incrementals,
        )


def ordered_runs(
    source: SoundArchive, header: Header, spool: Spool, tell: Tell
) -> Iterator[DiskRun]:
    """Yield the clusters of the devices in `header`, disk after disk, each in its order.

    Raises ArchiveError, InputError for what is wrong with the source, also if it has changed meanwhile; Failure, Cancelled.
    """
    ordering = Ordering(header.devices, spool.keep, spool.recall)
    wanted = {device.dev_id for device in header.devices}

    def ready() -> Iterator[DiskRun]:
        for found in source.extents():
            for run, at in runs_of(found):
                if run.dev_id in wanted:
                    yield from ordering.add(run, at)
            tell(found.extent.offset + found.extent.total_bytes)
        yield from ordering.finish()
        # What was kept was read again.
        source.check_unchanged()

    return zeroes_together(ready())


def _pack(
    packer: GroupPacker[None], devices: Mapping[int, Device], run: DiskRun, writing: Writing
) -> None:
    device = devices[run.dev_id]
    size_bytes = MAX_DEVICE_BYTES if device.is_vmstate else device.size_bytes
    for piece in pieces(normal(run, size_bytes)):
        for extent in packer.add(*piece, None):
            writing.put(extent)


def runs_of(found: FoundExtent) -> Iterator[tuple[DiskRun, int]]:
    """The runs of an extent with their data, and where in the archive that stands."""
    data = memoryview(found.data or b"")
    start = found.extent.offset + found.extent.total_bytes - found.extent.data_bytes
    for run in found.extent.runs:
        if run.is_zero:
            yield DiskRun(run.dev_id, run.first_cluster, run.count, b"", _NOTHING), start
            continue
        masks = struct.pack(f">{run.count}H", *run.masks)
        piece = data[run.data_at : run.data_at + run.data_bytes]
        yield DiskRun(run.dev_id, run.first_cluster, run.count, masks, piece), start + run.data_at


def as_packed(found: FoundExtent) -> PackedExtent[None]:
    """An extent as it is, for a writer or for digests."""
    extent: Extent = found.extent
    clusters: list[PackedRun] = [
        (run.dev_id, run.first, run.clusters, run.masks, run.data) for run, _ in runs_of(found)
    ]
    buffers: list[bytes | memoryview] = [found.raw_header]
    if found.data:
        buffers.append(found.data)
    dev_ids = {run.dev_id for run in extent.runs}
    return PackedExtent(buffers, extent.total_bytes, clusters, {}, dev_ids)


class Writing:
    """A writer's thread, and a reader that waits for it instead of filling the memory. A context manager.

    Left before `finish`, it takes back all that was written.
    """

    def __init__(
        self, store: Callable[[Callable[[], None]], ArchiveWriter[None]], cancel: Cancel
    ) -> None:
        self._progress = threading.Condition()
        self._cancel = cancel
        self._writer = store(self._wake)
        self._began = False

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._writer.committed:
            self._writer.abandon()

    def _wake(self) -> None:
        with self._progress:
            self._progress.notify_all()

    @property
    def plain_bytes(self) -> int:
        return self._writer.plain_bytes

    @property
    def stored_bytes(self) -> int:
        return self._writer.stored_bytes

    def begin(self, header: Header, raw_header: bytes) -> None:
        self._writer.begin(header, raw_header)

    def put(self, extent: PackedExtent[None]) -> None:
        """Raises Failure when the output has failed, Cancelled."""
        self._wait(lambda: self._writer.backlog_bytes <= _AHEAD_BYTES)
        self._writer.put(extent)
        # The writer remembers what it has written until somebody asks.
        self._writer.take_written()

    def finish(self) -> None:
        """Raises Failure when the archive cannot be stored, Cancelled."""
        self._writer.finish()
        self._wait(lambda: self._writer.state is not WriterState.RUNNING)

    def _wait(self, is_done: Callable[[], bool]) -> None:
        with self._progress:
            while True:
                self._cancel.check()
                if self._writer.error is not None:
                    raise self._writer.error
                if is_done():
                    return
                self._progress.wait(_LOOK_S)
