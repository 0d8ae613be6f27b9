# SPDX-License-Identifier: Apache-2.0
"""Reads that qemu-storage-daemon answers in memory that it shares with us: vhost-user-blk, its other end.

Over NBD the daemon copies data into a socket, and we copy it out of there, which takes several
times as long as reading it. Here it reads straight to where the archiver takes it from. The messages are
those of QEMU's docs/interop/vhost-user.rst, the queue is a split virtqueue (virtio 1.1, 2.6).
"""

from __future__ import annotations

import array
import contextlib
import os
import platform
import socket
import struct
import time
from collections import deque
from typing import NamedTuple

from vmapipe.producer.pull.connection import Task
from vmapipe.protocol.nbd.constants import NBD_CMD_READ

# Enough that a disk and two processors have something to do.
_SLOTS = 16
# A request is three descriptors: what is asked, the data, the status. A power of two.
_DESCRIPTORS = 64
_SECTOR_BYTES = 512

_OPEN_S = 5.0
_HEADER = struct.Struct("<III")
_MAX_REPLY_BYTES = 4096
_VERSION, _IS_REPLY = 0x1, 0x4
_GET_FEATURES, _SET_FEATURES, _SET_OWNER = 1, 2, 3
_SET_MEM_TABLE = 5
_SET_VRING_NUM, _SET_VRING_ADDR, _SET_VRING_BASE = 8, 9, 10
_SET_VRING_KICK, _SET_VRING_CALL, _SET_VRING_ENABLE = 12, 13, 18
_F_PROTOCOL_FEATURES, _F_VERSION_1 = 1 << 30, 1 << 32

_DESCRIPTOR = struct.Struct("<QIHH")
_HAS_NEXT, _FOR_DEVICE_TO_WRITE = 1, 2
_READ_HEADER = struct.Struct("<IIQ")
_VIRTIO_BLK_T_IN = 0
_VIRTIO_BLK_S_OK = 0
_NOT_ANSWERED = 0xFF
_INDEX = struct.Struct("<H")
_USED = struct.Struct("<II")

# Where the parts of the queue lie.
_AVAILABLE = _DESCRIPTORS * _DESCRIPTOR.size
_USED_RING = _AVAILABLE + 6 + 2 * _DESCRIPTORS + 2
_HEADERS = _USED_RING + 6 + 8 * _DESCRIPTORS + 2
_STATUSES = _HEADERS + _SLOTS * _READ_HEADER.size
# Where the memory begins, as the daemon is told. Any address will do but 0.
_BASE = 1 << 32

#: Bytes of the queue.
QUEUE_BYTES = 4096


class NoSharedQueue(Exception):
    """The daemon, or this machine, has none: data comes over NBD as from everybody else."""


class Memory(NamedTuple):
    """A memory file, all of it mapped; tasks' positions are offsets of it, and QUEUE_BYTES from `queue_at` on are the queue's."""

    fd: int
    view: memoryview
    queue_at: int


class Answered(NamedTuple):
    """A read that is done; `is_ok` False: it failed, and the daemon has not said why."""

    task: Task
    is_ok: bool


def can_share() -> bool:
    """Return whether what Python writes is seen in order by another process: x86 promises that."""
    return platform.machine() in {"x86_64", "AMD64", "i686"}


class SharedQueue:
    """Give it reads with `start`, send them with `flush`; `fd` is readable when `answers` has some."""

    def __init__(self, path: str, memory: Memory) -> None:
        """`path`: the daemon's socket. Raises NoSharedQueue."""
        if not can_share():
            raise NoSharedQueue
        self._at = memory.queue_at
        self._view = memory.view[self._at : self._at + QUEUE_BYTES]
        self._view[:] = bytes(QUEUE_BYTES)
        # What has no slot yet.
        self._waiting: deque[Task] = deque()
        self._free = deque(range(_SLOTS))
        self._tasks: dict[int, Task] = {}
        self._made = self._told = self._seen = 0
        #: Since when nothing has been answered.
        self.progress_at = 0.0
        self._kick = self.fd = -1
        try:
            self._socket = socket.socket(socket.AF_UNIX)
        except OSError as error:
            raise NoSharedQueue from error
        try:
            self._kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            #: Readable when there is an answer.
            self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._socket.settimeout(_OPEN_S)
            self._socket.connect(path)
            self._agree(memory.fd, len(memory.view))
        except (OSError, struct.error) as error:
            self.close()
            raise NoSharedQueue from error

    @property
    def hang_up_fd(self) -> int:
        """Readable when the daemon has closed the connection: nothing is answered any more."""
        return self._socket.fileno()

    def _agree(self, memory_fd: int, memory_bytes: int) -> None:
        """Raises OSError, struct.error."""
        (offered,) = struct.unpack("<Q", self._ask(_GET_FEATURES))
        if not offered & _F_VERSION_1:
            raise OSError("a device of before virtio 1.0")
        self._tell(_SET_OWNER)
        features = _F_VERSION_1 | offered & _F_PROTOCOL_FEATURES
        self._tell(_SET_FEATURES, struct.pack("<Q", features))
        region = struct.pack("<IIQQQQ", 1, 0, 0, memory_bytes, _BASE, 0)
        self._tell(_SET_MEM_TABLE, region, memory_fd)
        queue = _BASE + self._at
        addresses = (queue, queue + _USED_RING, queue + _AVAILABLE, 0)
        self._tell(_SET_VRING_NUM, struct.pack("<II", 0, _DESCRIPTORS))
        self._tell(_SET_VRING_BASE, struct.pack("<II", 0, 0))
        self._tell(_SET_VRING_ADDR, struct.pack("<IIQQQQ", 0, 0, *addresses))
        self._tell(_SET_VRING_CALL, struct.pack("<Q", 0), self.fd)
        self._tell(_SET_VRING_KICK, struct.pack("<Q", 0), self._kick)
        if offered & _F_PROTOCOL_FEATURES:
            self._tell(_SET_VRING_ENABLE, struct.pack("<II", 0, 1))
        # An answer to this tells that all before was understood.
        self._ask(_GET_FEATURES)

    def _tell(self, request: int, payload: bytes = b"", fd: int = -1) -> None:
        data = _HEADER.pack(request, _VERSION, len(payload)) + payload
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))
        self._socket.sendmsg([data], [rights] if fd >= 0 else [])

    def _ask(self, request: int) -> bytes:
        self._tell(request)
        _, flags, length = _HEADER.unpack(self._received(_HEADER.size))
        if not flags & _IS_REPLY or length > _MAX_REPLY_BYTES:
            raise OSError("not a reply")
        return self._received(length)

    def _received(self, length: int) -> bytes:
        data = self._socket.recv(length, socket.MSG_WAITALL)
        if len(data) < length:
            raise OSError("it has hung up")
        return data

    @property
    def in_flight(self) -> int:
        return len(self._tasks) + len(self._waiting)

    @property
    def oldest(self) -> Task | None:
        return next(iter(self._tasks.values()), None)

    @staticmethod
    def takes(task: Task) -> bool:
        """Whether `start` may be called: a read of whole sectors into the memory."""
        is_read = task.kind == NBD_CMD_READ and task.position is not None
        return is_read and not (task.offset | task.length) % _SECTOR_BYTES

    def start(self, task: Task) -> None:
        """Have it sent with the next `flush`, or when there is room for it."""
        if not self.in_flight:
            self.progress_at = time.monotonic()
        self._waiting.append(task)

    def _put(self, task: Task) -> None:
        if task.position is None:
            raise RuntimeError("a read that has no place in the memory")
        slot = self._free.popleft()
        self._tasks[slot] = task
        first, view = 3 * slot, self._view
        header, status = _HEADERS + slot * _READ_HEADER.size, _STATUSES + slot
        _READ_HEADER.pack_into(view, header, _VIRTIO_BLK_T_IN, 0, task.offset // _SECTOR_BYTES)
        view[status] = _NOT_ANSWERED
        for number, (at, length, flags) in enumerate(
            (
                (self._at + header, _READ_HEADER.size, _HAS_NEXT),
                (task.position, task.length, _HAS_NEXT | _FOR_DEVICE_TO_WRITE),
                (self._at + status, 1, _FOR_DEVICE_TO_WRITE),
            ),
            first,
        ):
            _DESCRIPTOR.pack_into(view, number * _DESCRIPTOR.size, at, length, flags, number + 1)
        _INDEX.pack_into(view, _AVAILABLE + 4 + 2 * (self._made % _DESCRIPTORS), first)
        self._made += 1

    def flush(self) -> None:
        """Hand over what was started, as far as there is room."""
        while self._waiting and self._free:
            self._put(self._waiting.popleft())
        if self._made != self._told:
            self._told = self._made
            _INDEX.pack_into(self._view, _AVAILABLE + 2, self._made & 0xFFFF)
            os.eventfd_write(self._kick, 1)

    def answers(self) -> list[Answered]:
        """Return what is done. Raises ValueError: the daemon says what it cannot mean."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        (index,) = _INDEX.unpack_from(self._view, _USED_RING + 2)
        done: list[Answered] = []
        while self._seen & 0xFFFF != index:
            at = _USED_RING + 4 + 8 * (self._seen % _DESCRIPTORS)
            slot, odd = divmod(_USED.unpack_from(self._view, at)[0], 3)
            if odd or slot not in self._tasks:
                raise ValueError("an answer to nothing that was asked")
            self._seen += 1
            is_ok = self._view[_STATUSES + slot] == _VIRTIO_BLK_S_OK
            done.append(Answered(self._tasks.pop(slot), is_ok))
            self._free.append(slot)
        if done:
            self.progress_at = time.monotonic()
        return done

    def close(self) -> None:
        self._socket.close()
        for fd in (self._kick, self.fd):
            if fd >= 0:
                os.close(fd)
