# SPDX-License-Identifier: Apache-2.0
"""What stands behind an export."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol


class Backend(Protocol):
    """A disk, for any number of connections and threads at once.

    Offsets and lengths are bytes and lie within the disk. Every method raises
    OSError, which the client is told as an error of that one request.

    The `try_` methods are called where other requests wait behind this one:
    they return False, having done nothing, when the work may take long. It is
    then done by the method without `try_`, in another thread.
    """

    def try_read(self, target: memoryview, offset: int) -> bool: ...

    def try_write(self, data: memoryview, offset: int) -> bool: ...

    def settle(self, *, idle: bool) -> None:
        """What these have put off, to do it once for many requests, is done now or soon.

        Answers go out next, or `idle`: no request has come for a moment, and all must be done.
        """

    def read(self, target: memoryview, offset: int) -> None: ...

    def write(self, data: memoryview, offset: int) -> None: ...

    def write_zeroes(self, offset: int, length: int, *, may_hole: bool, fast_only: bool) -> None:
        """`fast_only`: raise ENOTSUP rather than write zeroes one by one."""

    def trim(self, offset: int, length: int) -> None: ...

    def flush(self) -> None:
        """Everything whose write has returned is on stable storage afterwards."""

    def cache(self, offset: int, length: int) -> None:
        """These bytes will be read soon."""

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Lengths and NBD_STATE_ flags of consecutive parts, from `offset` on."""
