# SPDX-License-Identifier: Apache-2.0
"""The numbers of the NBD protocol under the names that its document gives them, and what its strings may be.

Source of everything in this package: the NBD protocol document, proto.md. All
numbers travel in network byte order.
"""

from __future__ import annotations

from typing import Final

Bytes = bytes | bytearray | memoryview

# --- Newstyle negotiation, Fixed newstyle negotiation ---

INIT_PASSWD: Final = 0x4E42444D41474943  # "NBDMAGIC"
IHAVEOPT: Final = 0x49484156454F5054  # "IHAVEOPT"
CLISERV_MAGIC: Final = 0x00420281861253  # the oldstyle negotiation's second magic
REP_MAGIC: Final = 0x3E889045565A9
# What follows the transmission flags after NBD_OPT_EXPORT_NAME without NBD_FLAG_C_NO_ZEROES.
ZEROES_BYTES: Final = 124

# --- Handshake flags, Client flags ---

NBD_FLAG_FIXED_NEWSTYLE: Final = 1 << 0
NBD_FLAG_NO_ZEROES: Final = 1 << 1
NBD_FLAG_C_FIXED_NEWSTYLE: Final = 1 << 0
NBD_FLAG_C_NO_ZEROES: Final = 1 << 1

# --- Transmission flags ---

NBD_FLAG_HAS_FLAGS: Final = 1 << 0
NBD_FLAG_READ_ONLY: Final = 1 << 1
NBD_FLAG_SEND_FLUSH: Final = 1 << 2
NBD_FLAG_SEND_FUA: Final = 1 << 3
NBD_FLAG_ROTATIONAL: Final = 1 << 4
NBD_FLAG_SEND_TRIM: Final = 1 << 5
NBD_FLAG_SEND_WRITE_ZEROES: Final = 1 << 6
NBD_FLAG_SEND_DF: Final = 1 << 7
NBD_FLAG_CAN_MULTI_CONN: Final = 1 << 8
NBD_FLAG_SEND_CACHE: Final = 1 << 10
NBD_FLAG_SEND_FAST_ZERO: Final = 1 << 11
# Bit 9, NBD_FLAG_SEND_RESIZE, belongs to an experimental extension that is not spoken here.
KNOWN_TRANSMISSION_FLAGS: Final = 0x0DFF

# --- Option types ---

NBD_OPT_EXPORT_NAME: Final = 1
NBD_OPT_ABORT: Final = 2
NBD_OPT_LIST: Final = 3
NBD_OPT_PEEK_EXPORT: Final = 4  # withdrawn
NBD_OPT_STARTTLS: Final = 5
NBD_OPT_INFO: Final = 6
NBD_OPT_GO: Final = 7
NBD_OPT_STRUCTURED_REPLY: Final = 8
NBD_OPT_LIST_META_CONTEXT: Final = 9
NBD_OPT_SET_META_CONTEXT: Final = 10
NBD_OPT_EXTENDED_HEADERS: Final = 11  # not spoken here

# --- Option reply types ---

NBD_REP_ACK: Final = 1
NBD_REP_SERVER: Final = 2
NBD_REP_INFO: Final = 3
NBD_REP_META_CONTEXT: Final = 4
NBD_REP_FLAG_ERROR: Final = 1 << 31
NBD_REP_ERR_UNSUP: Final = NBD_REP_FLAG_ERROR + 1
NBD_REP_ERR_POLICY: Final = NBD_REP_FLAG_ERROR + 2
NBD_REP_ERR_INVALID: Final = NBD_REP_FLAG_ERROR + 3
NBD_REP_ERR_PLATFORM: Final = NBD_REP_FLAG_ERROR + 4
NBD_REP_ERR_TLS_REQD: Final = NBD_REP_FLAG_ERROR + 5
NBD_REP_ERR_UNKNOWN: Final = NBD_REP_FLAG_ERROR + 6
NBD_REP_ERR_SHUTDOWN: Final = NBD_REP_FLAG_ERROR + 7
NBD_REP_ERR_BLOCK_SIZE_REQD: Final = NBD_REP_FLAG_ERROR + 8
NBD_REP_ERR_TOO_BIG: Final = NBD_REP_FLAG_ERROR + 9

# The information types of NBD_REP_INFO.
NBD_INFO_EXPORT: Final = 0
NBD_INFO_NAME: Final = 1
NBD_INFO_DESCRIPTION: Final = 2
NBD_INFO_BLOCK_SIZE: Final = 3

# --- Metadata querying ---

BASE_ALLOCATION: Final = "base:allocation"
NBD_STATE_HOLE: Final = 1 << 0
NBD_STATE_ZERO: Final = 1 << 1
# QEMU's own namespace (its docs/interop/nbd.rst): what was written to since a bitmap began.
DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"
STATE_DIRTY: Final = 1 << 0

# --- Request types, Command flags ---

NBD_REQUEST_MAGIC: Final = 0x25609513
NBD_CMD_READ: Final = 0
NBD_CMD_WRITE: Final = 1
NBD_CMD_DISC: Final = 2
NBD_CMD_FLUSH: Final = 3
NBD_CMD_TRIM: Final = 4
NBD_CMD_CACHE: Final = 5
NBD_CMD_WRITE_ZEROES: Final = 6
NBD_CMD_BLOCK_STATUS: Final = 7

NBD_CMD_FLAG_FUA: Final = 1 << 0
NBD_CMD_FLAG_NO_HOLE: Final = 1 << 1
NBD_CMD_FLAG_DF: Final = 1 << 2
NBD_CMD_FLAG_REQ_ONE: Final = 1 << 3
NBD_CMD_FLAG_FAST_ZERO: Final = 1 << 4

# --- Simple reply message, Structured reply flags, Structured reply types ---

NBD_SIMPLE_REPLY_MAGIC: Final = 0x67446698
NBD_STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
NBD_REPLY_FLAG_DONE: Final = 1 << 0
NBD_REPLY_TYPE_NONE: Final = 0
NBD_REPLY_TYPE_OFFSET_DATA: Final = 1
NBD_REPLY_TYPE_OFFSET_HOLE: Final = 2
NBD_REPLY_TYPE_BLOCK_STATUS: Final = 5
NBD_REPLY_TYPE_FLAG_ERROR: Final = 1 << 15
NBD_REPLY_TYPE_ERROR: Final = NBD_REPLY_TYPE_FLAG_ERROR + 1
NBD_REPLY_TYPE_ERROR_OFFSET: Final = NBD_REPLY_TYPE_FLAG_ERROR + 2

# --- Error values ---

NBD_SUCCESS: Final = 0
NBD_EPERM: Final = 1
NBD_EIO: Final = 5
NBD_ENOMEM: Final = 12
NBD_EINVAL: Final = 22
NBD_ENOSPC: Final = 28
NBD_EOVERFLOW: Final = 75
NBD_ENOTSUP: Final = 95
NBD_ESHUTDOWN: Final = 108


def _names(prefix: str, but: str = "-") -> dict[int, str]:
    return {
        number: name
        for name, number in globals().items()
        if name.startswith(prefix) and but not in name
    }


OPTION_NAMES: Final = _names("NBD_OPT_")
REPLY_ERROR_NAMES: Final = _names("NBD_REP_ERR_")
COMMAND_NAMES: Final = _names("NBD_CMD_", but="_FLAG_")
ERROR_NAMES: Final = _names("NBD_E")


# proto.md, Conventions: a string "MUST be no longer than 4096 bytes".
MAX_STRING_BYTES: Final = 4096
# The data of an option that a server looks at. SET_META_CONTEXT with the
# longest name and a dozen of the longest queries fits; a larger one is read
# past, not kept, and answered NBD_REP_ERR_TOO_BIG.
MAX_OPTION_BYTES: Final = 64 * 1024
# The data of an option that a server reads past. No honest client comes near
# it; a larger one ends the connection.
MAX_SKIPPED_BYTES: Final = 1024 * 1024
# Options of one handshake. A client needs four, one that explores some twenty.
MAX_OPTIONS: Final = 1024
# Queries of one LIST_META_CONTEXT or SET_META_CONTEXT; one is known here.
MAX_QUERIES: Final = 64
# All answers to NBD_OPT_LIST in one handshake: a thousand exports with long
# names, or a hundred with the longest.
MAX_LIST_BYTES: Final = 1024 * 1024

# One answer to an option: NBD_REP_SERVER with the longest name and description
# is half of it; the rest is for what a later protocol may add.
MAX_OPTION_REPLY_BYTES: Final = 16 * 1024
# All answers that a client takes in one handshake. More than MAX_LIST_BYTES,
# so that a client of ours can list any server of ours.
MAX_ANSWERS_BYTES: Final = 2 * 1024 * 1024

# proto.md, Block size constraints: what a client should not exceed, and what a
# server should not take for an attack.
MAX_PAYLOAD_BYTES: Final = 1 << 25
# Chunks of one structured reply: 32 MiB in pieces of 512 bytes, the smallest
# that a server should send.
MAX_CHUNKS: Final = MAX_PAYLOAD_BYTES // 512
# Descriptors of one block status chunk. nbdkit sends up to so many.
MAX_EXTENTS: Final = 1 << 20
# What our own server sends at most: 1 MiB of descriptors. The client asks on.
MAX_EXTENTS_SENT: Final = 1 << 17
# An error chunk: number, length, the longest message, an offset, and room for
# error types that are not known yet.
MAX_ERROR_CHUNK_BYTES: Final = 8 * 1024

# Offsets are signed 64-bit numbers for every operating system.
MAX_EXPORT_BYTES: Final = (1 << 63) - 1
# proto.md, Block size constraints.
MAX_MINIMUM_BLOCK_BYTES: Final = 1 << 16
MIN_PREFERRED_BLOCK_BYTES: Final = 512


def string_fault(text: str) -> str | None:
    """Return why this is not a valid string of the protocol (proto.md, Conventions); None: it is."""
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        return "a string that is not Unicode"
    if len(raw) > MAX_STRING_BYTES:
        return f"a string of {len(raw)} bytes; the limit is {MAX_STRING_BYTES}"
    return "a string with a NUL in it" if b"\0" in raw else None
