# SPDX-License-Identifier: Apache-2.0
"""UUIDs as 16 bytes: new ones, and how they are written.

Python's `uuid` looks the platform over when it is imported, with nine regular expressions: 3 ms of
each start.
"""

from __future__ import annotations

import os


def random_uuid() -> bytes:
    """Return a new one, of random bits (RFC 9562, version 4)."""
    raw = bytearray(os.urandom(16))
    raw[6] = raw[6] & 0x0F | 0x40  # the version
    raw[8] = raw[8] & 0x3F | 0x80  # the variant
    return bytes(raw)


def uuid_text(raw: bytes) -> str:
    """Return the usual form: `f81d4fae-7dec-11d0-a765-00a0c91e6bf6`."""
    digits = raw.hex()
    return "-".join(
        digits[start:end] for start, end in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32))
    )
