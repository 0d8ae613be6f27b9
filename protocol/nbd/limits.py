# SPDX-License-Identifier: Apache-2.0
"""Every limit of the NBD codec. Each is checked before memory is taken (docs/nbd.md)."""

from __future__ import annotations

from typing import Final

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
