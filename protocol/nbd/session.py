# SPDX-License-Identifier: Apache-2.0
"""What a handshake has settled, and which requests are valid under it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from vmapipe.protocol.nbd.constants import (
    BASE_ALLOCATION,
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_CACHE,
    NBD_CMD_DISC,
    NBD_CMD_FLAG_DF,
    NBD_CMD_FLAG_FAST_ZERO,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLAG_NO_HOLE,
    NBD_CMD_FLAG_REQ_ONE,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
    NBD_EINVAL,
    NBD_ENOSPC,
    NBD_EPERM,
    NBD_FLAG_READ_ONLY,
    NBD_FLAG_SEND_CACHE,
    NBD_FLAG_SEND_DF,
    NBD_FLAG_SEND_FAST_ZERO,
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_FUA,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
    NBD_SUCCESS,
)
from vmapipe.protocol.nbd.export import Export
from vmapipe.protocol.nbd.limits import MAX_PAYLOAD_BYTES
from vmapipe.protocol.nbd.request import Request

_CHANGING = frozenset({NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES})
_FILLING = frozenset({NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES})
_WITH_DATA = frozenset({NBD_CMD_READ, NBD_CMD_WRITE})
_WITHOUT_RANGE = frozenset({NBD_CMD_FLUSH, NBD_CMD_DISC})


class MetaContext(NamedTuple):
    """A selected metadata context. `id` holds for this connection only."""

    id: int
    name: str


@dataclass(frozen=True, slots=True)
class Session:
    """The transmission phase of one connection, seen from either end.

    `flags`: the transmission flags that the server announced. `structured`:
    reads are answered in chunks. `no_zeroes`: NBD_FLAG_C_NO_ZEROES was agreed on.
    """

    export: Export
    flags: int
    structured: bool = False
    no_zeroes: bool = False
    meta_contexts: tuple[MetaContext, ...] = ()
    #: The longest NBD_CMD_READ and NBD_CMD_WRITE, in bytes.
    max_data_bytes: int = field(init=False, repr=False, compare=False)
    _valid_flags: dict[int, int] = field(init=False, repr=False, compare=False)
    _denied: frozenset[int] = field(init=False, repr=False, compare=False)
    _unaligned_bits: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        sizes = self.export.block_sizes
        derived = {
            "max_data_bytes": min(sizes.maximum, MAX_PAYLOAD_BYTES),
            "_valid_flags": self._find_valid_flags(),
            "_denied": _CHANGING if self.flags & NBD_FLAG_READ_ONLY else frozenset(),
            "_unaligned_bits": sizes.minimum - 1,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @property
    def allocation_id(self) -> int | None:
        """The id of base:allocation in block status chunks, if it was selected."""
        return next((ctx.id for ctx in self.meta_contexts if ctx.name == BASE_ALLOCATION), None)

    def fault_of(self, request: Request) -> int:
        """NBD_SUCCESS for a request that may be carried out, else the error to answer.

        proto.md, Error values, Command flags and Request types. What it rules:
        command, flags, range, alignment, write protection; for NBD_CMD_READ
        and NBD_CMD_WRITE the length. The data of a refused NBD_CMD_WRITE still
        follows on the wire. NBD_CMD_DISC has no answer: look for it first.
        """
        flags, kind, _, offset, length = request
        if kind in self._denied:
            return NBD_EPERM
        valid = self._valid_flags.get(kind)
        if valid is None or flags & ~valid or (offset | length) & self._unaligned_bits:
            return NBD_EINVAL
        if kind in _WITHOUT_RANGE:
            return NBD_EINVAL if offset | length else NBD_SUCCESS
        if not length or (length > self.max_data_bytes and kind in _WITH_DATA):
            return NBD_EINVAL
        if offset + length > self.export.size_bytes:
            return NBD_ENOSPC if kind in _FILLING else NBD_EINVAL
        return NBD_SUCCESS

    def _find_valid_flags(self) -> dict[int, int]:
        """For every command that may be sent, the command flags that it may have."""

        def where(flag: int, value: int) -> int:
            return value if self.flags & flag else 0

        # proto.md, Command flags: FUA "is valid for all commands" once it is announced.
        fua = where(NBD_FLAG_SEND_FUA, NBD_CMD_FLAG_FUA)
        fast_zero = where(NBD_FLAG_SEND_FAST_ZERO, NBD_CMD_FLAG_FAST_ZERO)
        valid = {
            NBD_CMD_READ: fua | where(NBD_FLAG_SEND_DF, NBD_CMD_FLAG_DF),
            NBD_CMD_WRITE: fua,
            NBD_CMD_DISC: fua,
        }
        if self.flags & NBD_FLAG_SEND_FLUSH:
            valid[NBD_CMD_FLUSH] = fua
        if self.flags & NBD_FLAG_SEND_TRIM:
            valid[NBD_CMD_TRIM] = fua
        if self.flags & NBD_FLAG_SEND_CACHE:
            valid[NBD_CMD_CACHE] = fua
        if self.flags & NBD_FLAG_SEND_WRITE_ZEROES:
            valid[NBD_CMD_WRITE_ZEROES] = fua | NBD_CMD_FLAG_NO_HOLE | fast_zero
        if self.meta_contexts:
            valid[NBD_CMD_BLOCK_STATUS] = fua | NBD_CMD_FLAG_REQ_ONE
        return valid
