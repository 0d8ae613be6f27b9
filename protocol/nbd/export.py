# SPDX-License-Identifier: Apache-2.0
"""What a server offers, and its limits (proto.md, Transmission flags and Block size constraints)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from vmapipe.protocol.errors import LocalProtocolError
from vmapipe.protocol.nbd.constants import (
    KNOWN_TRANSMISSION_FLAGS,
    NBD_FLAG_HAS_FLAGS,
    NBD_FLAG_SEND_FAST_ZERO,
    NBD_FLAG_SEND_WRITE_ZEROES,
)
from vmapipe.protocol.nbd.limits import (
    MAX_EXPORT_BYTES,
    MAX_MINIMUM_BLOCK_BYTES,
    MAX_PAYLOAD_BYTES,
    MAX_STRING_BYTES,
    MIN_PREFERRED_BLOCK_BYTES,
)

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


def string_fault(text: str) -> str | None:
    """Why this is no string of the protocol (proto.md, Conventions); None: it is one."""
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        return "a string that is not Unicode"
    if len(raw) > MAX_STRING_BYTES:
        return f"a string of {len(raw)} bytes; the limit is {MAX_STRING_BYTES}"
    return "a string with a NUL in it" if b"\0" in raw else None


def size_fault(size_bytes: int) -> str | None:
    if 0 <= size_bytes <= MAX_EXPORT_BYTES:
        return None
    return f"an export of {size_bytes} bytes; the limit is {MAX_EXPORT_BYTES}"


def block_sizes_fault(sizes: BlockSizes) -> str | None:
    """Why these are no block sizes of the protocol; None: they are."""
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
