# SPDX-License-Identifier: Apache-2.0
"""What travels between the reader of a restore and its workers, and what it looks like.

A message is one part, a msgpack array [name, field, ...], the fields in the
order of the class below. The data itself lies in the archive's file, or in
memory that reader and workers share. Both ends are processes of one job on one
host; what comes is checked all the same, before it is believed.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from vmapipe.protocol import limits
from vmapipe.protocol.errors import RemoteProtocolError
from vmapipe.protocol.packing import Part, pack, unpack

EXTENT_HEADER_BYTES = 512
MAX_EXTENT_BYTES = EXTENT_HEADER_BYTES + 59 * limits.CLUSTER_BYTES
DIGEST_BYTES = 16
# Extents in one piece of work: 512 of zeroes only are 1.8 GiB of disk, enough
# to be zeroed in few system calls, and 14 KiB of message.
MAX_RANGE_EXTENTS = 512
# Names come from the archive, paths from the file system: at most this each.
_MAX_NAME_BYTES = 65535
# 254 targets with names and paths of the usual length stay far below it.
MAX_SETUP_BYTES = 1 << 20
_MAX_ITEMS = 256
_MAX_FD = 1 << 20

_OFFSETS = ">{}Q"
_SIZES = ">{}I"


class Ready(NamedTuple):
    """Worker: I am here."""

    version: int


class TargetSetup(NamedTuple):
    """One device that is restored. `fd`: inherited from the reader; `size_bytes`: where to stop.

    `write_zeroes`: the target may hold old data, so zeroes have to be written.
    `name` and `path` are for messages, as the file system's bytes. `partial`:
    the temporary file to remove when the reader has died (empty: none). `nbd`:
    the socket of a server to write to, in place of `fd` (empty: none).
    """

    dev_id: int
    fd: int
    size_bytes: int
    write_zeroes: bool
    name: bytes
    path: bytes
    partial: bytes
    nbd: bytes = b""


class Setup(NamedTuple):
    """Reader: your archive's uuid, and your targets; you have inherited the descriptors.

    The data is either in `archive_fd`, the archive's file, or comes through
    `memory_fd`, shared memory. The other one is -1.
    """

    uuid: bytes
    archive_fd: int
    memory_fd: int
    targets: tuple[TargetSetup, ...]


class RangeWork(NamedTuple):
    """Reader: take these extents out of the archive yourself.

    `offsets`, `sizes`: in bytes, one each an extent. `digests`: as many, or
    none where none are known.
    """

    seq: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    digests: tuple[bytes, ...]


class ExtentWork(NamedTuple):
    """Reader: this extent, which stood at `offset`. Its data is in the shared memory.

    `digest` is empty where none is known. `position`: of the data, in bytes;
    whose it is says the header. The memory is the worker's until it is done.
    """

    seq: int
    offset: int
    digest: bytes
    raw_header: bytes
    position: int


class SyncWork(NamedTuple):
    """Reader: bring this target to the disk."""

    seq: int
    dev_id: int


class Finish(NamedTuple):
    """Reader: that was all."""


class Done(NamedTuple):
    """Worker: this piece of work is done."""

    seq: int


FromReader = Setup | RangeWork | ExtentWork | SyncWork | Finish
FromWorker = Ready | Done


def encode(message: FromReader | FromWorker) -> list[Part]:
    match message:
        case Setup(uuid, archive_fd, memory_fd, targets):
            listed = [list(target) for target in targets]
            return [pack(["SETUP", uuid, archive_fd, memory_fd, listed])]
        case RangeWork(seq, offsets, sizes, digests):
            count = len(offsets)
            return [
                pack(
                    [
                        "RANGE",
                        seq,
                        struct.pack(_OFFSETS.format(count), *offsets),
                        struct.pack(_SIZES.format(count), *sizes),
                        b"".join(digests),
                    ]
                )
            ]
        case _:
            return [pack([type(message).__name__.removesuffix("Work").upper(), *message])]


def decode_for_worker(parts: Sequence[Part]) -> FromReader:
    """What the reader sent. Raises RemoteProtocolError for anything else."""
    name, fields = _head(parts, MAX_SETUP_BYTES)
    match name, fields:
        case "SETUP", [bytes() as uuid, int() as fd, int() as memory_fd, list() as targets] if (
            len(uuid) == limits.UUID_BYTES
        ):
            return Setup(uuid, fd, memory_fd, tuple(_target(item) for item in targets))
        case "RANGE", [int() as seq, bytes() as offsets, bytes() as sizes, bytes() as digests]:
            return _range(seq, offsets, sizes, digests)
        case "EXTENT", [
            int() as seq,
            int() as offset,
            bytes() as digest,
            bytes() as raw_header,
            int() as position,
        ] if (
            len(raw_header) == EXTENT_HEADER_BYTES
            and len(digest) in (0, DIGEST_BYTES)
            and offset >= 0
            and position >= 0
        ):
            return ExtentWork(seq, offset, digest, raw_header, position)
        case "SYNC", [int() as seq, int() as dev_id]:
            return SyncWork(seq, dev_id)
        case "FINISH", []:
            return Finish()
    raise RemoteProtocolError("malformed", f"no work for a worker: {name!r:.40}")


def decode_for_reader(parts: Sequence[Part]) -> FromWorker:
    """What a worker sent. Raises RemoteProtocolError for anything else."""
    name, fields = _head(parts, limits.MAX_CONTROL_BYTES)
    match name, fields:
        case "READY", [int() as version]:
            if version != limits.VERSION:
                raise RemoteProtocolError("version", f"a worker of version {version}")
            return Ready(version)
        case "DONE", [int() as seq]:
            return Done(seq)
    raise RemoteProtocolError("malformed", f"no answer of a worker: {name!r:.40}")


def _head(parts: Sequence[Part], max_bytes: int) -> tuple[str, list[Any]]:
    value = unpack(parts[0], max_bytes, _MAX_ITEMS) if len(parts) == 1 else None
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise RemoteProtocolError("malformed", "a message that is no [name, ...]")
    return value[0], value[1:]


def _target(item: object) -> TargetSetup:
    match item:
        case [int() as dev_id, int() as fd, int() as size, bool() as zeroes, *words] if (
            1 <= dev_id <= limits.MAX_DEV_ID and 0 <= fd < _MAX_FD and size >= 0
        ):
            match words:
                case [bytes() as name, bytes() as path, bytes() as partial, bytes() as nbd] if (
                    max(len(name), len(path), len(partial), len(nbd)) <= _MAX_NAME_BYTES
                ):
                    return TargetSetup(dev_id, fd, size, zeroes, name, path, partial, nbd)
    raise RemoteProtocolError("malformed", "a target that makes no sense")


def _range(seq: int, offsets: bytes, sizes: bytes, digests: bytes) -> RangeWork:
    count = len(offsets) // 8
    if (
        not 1 <= count <= MAX_RANGE_EXTENTS
        or (len(offsets), len(sizes)) != (8 * count, 4 * count)
        or len(digests) not in (0, DIGEST_BYTES * count)
    ):
        raise RemoteProtocolError("malformed", "extents, sizes and digests that do not match")
    all_sizes = struct.unpack(_SIZES.format(count), sizes)
    if min(all_sizes) < EXTENT_HEADER_BYTES or max(all_sizes) > MAX_EXTENT_BYTES:
        raise RemoteProtocolError("malformed", "an extent of an impossible size")
    return RangeWork(
        seq,
        struct.unpack(_OFFSETS.format(count), offsets),
        all_sizes,
        tuple(digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES)),
    )
