# SPDX-License-Identifier: Apache-2.0
"""State that client and server share after the handshake: the export, requests, and agreed options.

See proto.md: Transmission flags, Block size constraints, Request message.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import NamedTuple

from vmapipe.protocol.errors import LocalProtocolError
from vmapipe.protocol.nbd.constants import (
    BASE_ALLOCATION,
    COMMAND_NAMES,
    KNOWN_TRANSMISSION_FLAGS,
    MAX_EXPORT_BYTES,
    MAX_MINIMUM_BLOCK_BYTES,
    MAX_PAYLOAD_BYTES,
    MIN_PREFERRED_BLOCK_BYTES,
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
    NBD_FLAG_HAS_FLAGS,
    NBD_FLAG_READ_ONLY,
    NBD_FLAG_SEND_CACHE,
    NBD_FLAG_SEND_DF,
    NBD_FLAG_SEND_FAST_ZERO,
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_FUA,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
    NBD_REQUEST_MAGIC,
    NBD_SUCCESS,
    Bytes,
    string_fault,
)
from vmapipe.protocol.nbd.errors import NbdProtocolError

# "No inherent limit" as a maximum block size.
UNLIMITED = 0xFFFFFFFF


class BlockSizes(NamedTuple):
    """All in bytes. Requests are multiples of `minimum`, and at most `maximum` long."""

    minimum: int = 1
    preferred: int = 4096
    maximum: int = MAX_PAYLOAD_BYTES


# What holds where a server says nothing. Its maximum is what a client may
# expect of any server; the minimum of 1 lets it reach the last bytes.
DEFAULT_BLOCK_SIZES = BlockSizes()


@dataclass(frozen=True, slots=True)
class Export:
    """One export. `flags` are transmission flags; HAS_FLAGS is always among them.

    `allocation`: it answers NBD_CMD_BLOCK_STATUS for base:allocation.
    Raises LocalProtocolError for what the protocol cannot express.
    """

    name: str
    size_bytes: int
    flags: int = NBD_FLAG_HAS_FLAGS
    description: str = ""
    block_sizes: BlockSizes = DEFAULT_BLOCK_SIZES
    allocation: bool = False

    def __post_init__(self) -> None:
        fault = (
            string_fault(self.name)
            or string_fault(self.description)
            or size_fault(self.size_bytes)
            or block_sizes_fault(self.block_sizes)
        )
        if self.flags != known_flags(self.flags):
            fault = f"transmission flags {self.flags:#x} are not possible"
        if fault:
            raise LocalProtocolError(fault)
        object.__setattr__(self, "flags", self.flags | NBD_FLAG_HAS_FLAGS)


class ListedExport(NamedTuple):
    """An answer to NBD_OPT_LIST."""

    name: str
    description: str = ""


def known_flags(flags: int) -> int:
    """Transmission flags without those that are unknown or contradict the others."""
    if not flags & NBD_FLAG_SEND_WRITE_ZEROES:
        flags &= ~NBD_FLAG_SEND_FAST_ZERO
    return flags & KNOWN_TRANSMISSION_FLAGS


def size_fault(size_bytes: int) -> str | None:
    if 0 <= size_bytes <= MAX_EXPORT_BYTES:
        return None
    return f"an export of {size_bytes} bytes; the limit is {MAX_EXPORT_BYTES}"


def block_sizes_fault(sizes: BlockSizes) -> str | None:
    """Return why these are not valid block sizes of the protocol; None: they are."""
    minimum, preferred, maximum = sizes
    if not _is_power_of_2(minimum) or minimum > MAX_MINIMUM_BLOCK_BYTES:
        return f"a minimum block size of {minimum} bytes"
    if not _is_power_of_2(preferred) or preferred < max(minimum, MIN_PREFERRED_BLOCK_BYTES):
        return f"a preferred block size of {preferred} bytes"
    if maximum != UNLIMITED and not (minimum <= maximum < UNLIMITED and maximum % minimum == 0):
        return f"a maximum block size of {maximum} bytes"
    return None


def _is_power_of_2(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


# magic, command flags, type, cookie, offset, length
REQUEST = struct.Struct(">IHHQQI")
REQUEST_BYTES = REQUEST.size


class NbdRequest(NamedTuple):
    """`offset` and `length` in bytes; `type` is an NBD_CMD_ number, known or not.

    `cookie` (proto.md also: handle) is the client's; the reply carries it back.
    """

    flags: int
    type: int
    cookie: int
    offset: int
    length: int

    def describe(self) -> str:
        """Return the request in words, for a line that says what became of it."""
        name = COMMAND_NAMES.get(self.type, f"command {self.type}")
        name = name.removeprefix("NBD_CMD_").lower().replace("_", " ")
        if self.type == NBD_CMD_FLUSH:
            return name
        return f"byte {self.offset}: {name} of {self.length} bytes"

    @property
    def payload_bytes(self) -> int:
        """How many bytes of data follow the request."""
        return self.length if self.type == NBD_CMD_WRITE else 0

    def __str__(self) -> str:
        name = COMMAND_NAMES.get(self.type, f"command {self.type}")
        return f"{name} of {self.length} bytes at {self.offset} (flags {self.flags:#x})"


def parse_request(header: Bytes) -> NbdRequest:
    """Read a request's REQUEST_BYTES bytes; its payload, if any, follows them on the wire.

    A request that only asks for something wrong comes back like any other: see
    `Session.fault_of`. Raises NbdProtocolError when the connection has to be
    closed: the bytes are no request, or announce more data than anyone may send.
    """
    try:
        magic, flags, kind, cookie, offset, length = REQUEST.unpack(header)
    except struct.error:
        raise LocalProtocolError(f"{len(header)} bytes are not a request header") from None
    if magic != NBD_REQUEST_MAGIC:
        raise NbdProtocolError(f"no request where one must be (magic {magic:#x})")
    if kind == NBD_CMD_WRITE and length > MAX_PAYLOAD_BYTES:
        raise NbdProtocolError(f"a write of {length} bytes; the limit is {MAX_PAYLOAD_BYTES}")
    return NbdRequest(flags, kind, cookie, offset, length)


def encode_request(request: NbdRequest) -> bytes:
    """REQUEST_BYTES bytes, to be followed by the data of NBD_CMD_WRITE."""
    return REQUEST.pack(NBD_REQUEST_MAGIC, *request)


_CHANGING = frozenset({NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES})
_FILLING = frozenset({NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES})
_WITH_DATA = frozenset({NBD_CMD_READ, NBD_CMD_WRITE})
_WITHOUT_RANGE = frozenset({NBD_CMD_FLUSH, NBD_CMD_DISC})


class MetaContext(NamedTuple):
    """A selected metadata context. `id` holds for this connection only."""

    id: int
    name: str


@dataclass(frozen=True, slots=True)
class NbdSession:
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
        return self.context_id(BASE_ALLOCATION)

    def context_id(self, name: str) -> int | None:
        """The id of a metadata context in block status chunks, if it was selected."""
        return next((context.id for context in self.meta_contexts if context.name == name), None)

    def valid_read(self, raw: Bytes, at: int) -> tuple[int, int, int] | None:
        """Return cookie, offset and length of the NBD_CMD_READ at `at` if it may be carried out.

        None: it is another request, or a wrong one; `parse_request` and `fault_of` tell which. Most
        requests are reads, and this asks all that they ask, in a third of the time.
        """
        magic, flags, kind, cookie, offset, length = REQUEST.unpack_from(raw, at)
        if (
            kind != NBD_CMD_READ
            or magic != NBD_REQUEST_MAGIC
            or not 0 < length <= self.max_data_bytes
            or offset + length > self.export.size_bytes
            or (offset | length) & self._unaligned_bits
            or flags & ~self._valid_flags[NBD_CMD_READ]
        ):
            return None
        return cookie, offset, length

    def fault_of(self, request: NbdRequest) -> int:
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


class ReceiveBuffer:
    """Its memory grows with what has come, not with what was announced."""

    def __init__(self, count: int) -> None:
        #: Bytes that the structure still lacks.
        self.missing_bytes = count
        self._keep = True
        self._held = bytearray()

    def expect(self, count: int, *, keep: bool = True) -> None:
        """The next structure has `count` bytes; without `keep` they are dropped as they come."""
        self.missing_bytes = count
        self._keep = keep

    def add(self, piece: memoryview) -> memoryview:
        """Take what belongs to the structure; returns what is left of the piece."""
        taken = min(self.missing_bytes, len(piece))
        if self._keep:
            self._held += piece[:taken]
        self.missing_bytes -= taken
        return piece[taken:]

    def take(self) -> bytes:
        """The structure, when nothing is missing any more; empty if it was not kept."""
        whole = bytes(self._held)
        self._held.clear()
        return whole
