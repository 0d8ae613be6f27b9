# SPDX-License-Identifier: Apache-2.0
"""What a client hears of its requests in the transmission phase. All begin with the cookie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from vmapipe.protocol.nbd.reply import DESCRIPTOR


class Data(NamedTuple):
    """Bytes of the export at `offset`, as far as they were fed: one chunk may come as several."""

    cookie: int
    offset: int
    data: memoryview


class Hole(NamedTuple):
    """`length` bytes at `offset` are zeroes."""

    cookie: int
    offset: int
    length: int


class Status(NamedTuple):
    """Consecutive extents from `offset` on, of one metadata context."""

    cookie: int
    context_id: int
    offset: int
    descriptors: bytes

    def extents(self) -> Iterator[tuple[int, int]]:
        """Length in bytes and flags (NBD_STATE_ for base:allocation) of each.

        They may end before the request does, and the last one after it.
        """
        return DESCRIPTOR.iter_unpack(self.descriptors)


class Failure(NamedTuple):
    """The request fails, with an NBD_E number; at `offset`, if the server says where.

    The request still ends with `Done`.
    """

    cookie: int
    error: int
    message: str = ""
    offset: int | None = None


class Done(NamedTuple):
    """The request is answered: NBD_SUCCESS, or the first error."""

    cookie: int
    error: int


Event = Data | Hole | Status | Failure | Done


class Payload(NamedTuple):
    """The next `length` bytes on the wire are the export's at `offset`."""

    cookie: int
    offset: int
    length: int
