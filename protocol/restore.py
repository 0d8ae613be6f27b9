# SPDX-License-Identifier: Apache-2.0
"""The messages between the reader of a restore and its workers.

A message is one part, a msgpack array [name, field, ...], the fields in the
order of the class below. The data itself lies in the archive's file, or in
memory that reader and workers share. Both ends are processes of one job on one
host; what comes is checked all the same, before it is believed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

from vmapipe.clusters.sizes import EXTENT_HEADER_BYTES, MAX_EXTENT_BYTES
from vmapipe.protocol import limits
from vmapipe.protocol.schema import (
    DevId,
    Dialogue,
    Joined,
    Packed,
    Part,
    Uint,
    Uuid,
    between,
    length_of,
    lengths,
)

DIGEST_BYTES = 16
# Extents in one piece of work: 512 of zeroes only are 1.8 GiB of disk, enough
# to be zeroed in few system calls, and 14 KiB of message.
MAX_RANGE_EXTENTS = 512
# Names come from the archive, paths from the file system: at most this each.
_MAX_NAME_BYTES = 65535
# 254 targets with names and paths of the usual length stay far below it.
MAX_SETUP_BYTES = 1 << 20
# More than the targets of 254 devices.
_MAX_ITEMS = 512
_MAX_FD = 1 << 20

_Fd = Annotated[int, between(0, _MAX_FD - 1)]
_FdOrNone = Annotated[int, between(-1, _MAX_FD - 1)]
_Word = Annotated[bytes, lengths(0, _MAX_NAME_BYTES)]


class Ready(NamedTuple):
    """Worker: I am here."""

    version: int


class TargetSetup(NamedTuple):
    """One device that is restored. `fd`: inherited from the reader; `size_bytes`: where to stop.

    `write_zeroes`: the target may hold old data, so zeroes have to be written.
    `name` and `path` are for messages, as the file system's bytes. `nbd`: the socket
    of a server to write to, in place of `fd` (empty: none).
    """

    dev_id: DevId
    fd: _Fd
    size_bytes: Uint
    write_zeroes: bool
    name: _Word
    path: _Word
    nbd: _Word = b""


class Setup(NamedTuple):
    """Reader: your archive's uuid, and your targets; you have inherited the descriptors.

    The data is either in `archive_fd`, the archive's file, or comes through
    `memory_fd`, shared memory. The other one is -1.
    """

    uuid: Uuid
    archive_fd: _FdOrNone
    memory_fd: _FdOrNone
    targets: tuple[TargetSetup, ...]
    #: True: ranges that the archive's disk cannot read are written as zeroes and reported as damaged.
    past_errors: bool = False


class RangeWork(NamedTuple):
    """Reader: take these extents out of the archive yourself.

    `offsets`, `sizes`: in bytes, one each an extent. `digests`: as many, or
    none where none are known. `written`: they may be on the targets already: what is, is
    not written again. `left_out`: clusters of the extent, then the only one, that are
    not to be written, counted from 0.
    """

    seq: Uint
    offsets: Annotated[tuple[int, ...], Packed("Q")]
    sizes: Annotated[tuple[int, ...], Packed("I")]
    digests: Annotated[tuple[bytes, ...], Joined(DIGEST_BYTES)]
    written: bool = False
    left_out: Annotated[tuple[int, ...], Packed("H")] = ()

    def fault(self) -> str | None:
        count = len(self.offsets)
        if not 1 <= count <= MAX_RANGE_EXTENTS or len(self.sizes) != count:
            return "extents and sizes that do not match"
        if len(self.digests) not in (0, count):
            return "extents and digests that do not match"
        if min(self.sizes) < EXTENT_HEADER_BYTES or max(self.sizes) > MAX_EXTENT_BYTES:
            return "an extent of an impossible size"
        if self.left_out and count != 1:
            return "clusters to leave out, and nobody knows of which extent"
        return None


class ExtentWork(NamedTuple):
    """Reader: this extent, which stood at `offset`. Its data is in the shared memory.

    `digest` is empty where none is known. `position`: of the data, in bytes;
    whose it is says the header. The memory is the worker's until it is done. `written` and
    `left_out` as in RangeWork.
    """

    seq: Uint
    offset: Uint
    digest: Annotated[bytes, length_of(0, DIGEST_BYTES)]
    raw_header: Annotated[bytes, length_of(EXTENT_HEADER_BYTES)]
    position: Uint
    written: bool = False
    left_out: Annotated[tuple[int, ...], Packed("H")] = ()


class SyncWork(NamedTuple):
    """Reader: bring this target to the disk."""

    seq: Uint
    dev_id: DevId


class FinishWork(NamedTuple):
    """Reader: that was all."""


class WorkDone(NamedTuple):
    """Worker: this piece of work is done; so many bytes of data were there already.

    `damaged`: those of its extents, counted from 0, whose digest is not the one that was given.
    What they hold is written all the same: the reader knows what becomes of the target.
    """

    seq: Uint
    kept_bytes: Uint = 0
    damaged: Annotated[tuple[int, ...], Packed("H")] = ()


FromReader = Setup | RangeWork | ExtentWork | SyncWork | FinishWork
FromWorker = Ready | WorkDone


_FROM_READER = Dialogue(
    *(Setup, RangeWork, ExtentWork, SyncWork, FinishWork),
    keyed=False,
    max_bytes=MAX_SETUP_BYTES,
    max_items=_MAX_ITEMS,
    names={RangeWork: "RANGE", ExtentWork: "EXTENT", SyncWork: "SYNC", FinishWork: "FINISH"},
)
_FROM_WORKER = Dialogue(
    *(Ready, WorkDone),
    keyed=False,
    max_bytes=limits.MAX_CONTROL_BYTES,
    max_items=_MAX_ITEMS,
    names={WorkDone: "DONE"},
)


def encode(message: FromReader | FromWorker) -> list[Part]:
    dialogue = _FROM_READER if isinstance(message, FromReader) else _FROM_WORKER
    return dialogue.encode(message, checked=False)


def decode_for_worker(parts: Sequence[Part]) -> FromReader:
    """Read a message of the reader. Raises RemoteProtocolError for anything else."""
    message: FromReader = _FROM_READER.decode(parts)
    return message


def decode_for_reader(parts: Sequence[Part]) -> FromWorker:
    """Read a message of a worker. Raises RemoteProtocolError for anything else."""
    message: FromWorker = _FROM_WORKER.decode(parts)
    return message
