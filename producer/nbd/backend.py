# SPDX-License-Identifier: Apache-2.0
"""The disk behind an export: what a server asks of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from vmapipe.protocol.nbd.constants import (
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_FUA,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
)
from vmapipe.protocol.nbd.session import Export

#: Data, and the offset where it goes.
Write = tuple[memoryview, int]


def one_by_one(
    try_write: Callable[[memoryview, int], bool], writes: Sequence[Write]
) -> list[OSError | None]:
    """`Backend.try_writes` by a function that does one, or returns False."""
    outcomes: list[OSError | None] = []
    for data, offset in writes:
        try:
            if not try_write(data, offset):
                break
        except OSError as failure:
            outcomes.append(failure)
        else:
            outcomes.append(None)
    return outcomes


class Backend(Protocol):
    """A disk, for any number of connections and threads at once.

    Offsets and lengths are bytes and lie within the disk. Every method raises
    OSError, which the client is told as an error of that one request.

    The `try_` methods are called where other requests wait behind this one:
    they return False, having done nothing, when the work may take long. It is
    then done by the method without `try_`, in another thread.
    """

    def try_read(self, target: memoryview, offset: int) -> bool: ...

    def try_writes(self, writes: Sequence[Write]) -> list[OSError | None]:
        """Carry out the first of them, as many as need not wait; in their order.

        Of each that was carried out: None, or how it failed. The next one has to
        be left to `write`, and those behind it may be tried again.
        """

    def try_zeroes(self, offset: int, length: int) -> bool:
        """`write_zeroes` that may leave a hole, and may take as long as it does elsewhere."""

    def settle(self, *, idle: bool) -> None:
        """Do, now or soon, what the `try_` methods have put off, once for many requests.

        Answers go out next, or `idle`: no request has come for a moment, and all must be done.
        """

    def read(self, target: memoryview, offset: int) -> None: ...

    def write(self, data: memoryview, offset: int) -> None: ...

    def write_zeroes(self, offset: int, length: int, *, may_hole: bool, fast_only: bool) -> None:
        """`fast_only`: raise ENOTSUP rather than write zeroes one by one."""

    def trim(self, offset: int, length: int) -> None: ...

    def flush(self) -> None:
        """Bring everything whose write has returned to stable storage."""

    def cache(self, offset: int, length: int) -> None:
        """Prefetch these bytes."""

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Lengths and NBD_STATE_ flags of consecutive parts, from `offset` on."""


@runtime_checkable
class Mapped(Protocol):
    """A part of a `Backend` whose data lies in mapped files, so that it can be sent without a copy."""

    def views(self, offset: int, length: int) -> Sequence[memoryview] | None:
        """Return the bytes where they lie, if sending them need not wait for a disk; None: read them.

        Nobody may look at them: where the file has become shorter, the kernel ends a process that
        does. It only answers EFAULT where it was to send them.
        """

    def distrust_views(self) -> None:
        """Give no more of them: some could not be sent."""


class IncomingWrite(NamedTuple):
    """Memory for the data of a write that is coming in. `position`: as its owner knows it."""

    position: int
    room: memoryview


@runtime_checkable
class Placing(Protocol):
    """A part of a `Backend` into whose memory large writes are received, so that they are not copied there."""

    def place(self, offset: int, length: int) -> IncomingWrite | None:
        """Return room for a write, to be given to `placed` or `unplaced`; None: leave it to `try_writes`."""

    def placed(self, place: IncomingWrite, offset: int) -> None:
        """Carry out the write: all its data has come."""

    def unplaced(self, place: IncomingWrite) -> None:
        """Forget the write: its data has not come, and will not."""


#: The name that QEMU has to ask for.
EXPORT_NAME = "disk"
_FLAGS = NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES


def sink_export(size_bytes: int) -> Export:
    """A minimum block of 1, Export's default: QEMU refuses larger ones where sizes are odd."""
    return Export(EXPORT_NAME, size_bytes, _FLAGS, "vmapipe backup")


class WriteOnlyBackend:
    """The part of a `Backend` that all targets of a backup share: reads see zeroes."""

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
