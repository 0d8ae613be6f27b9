# SPDX-License-Identifier: Apache-2.0
"""How encrypted files begin. Apart from the rest, which loads a compiled library of 30 ms."""

from __future__ import annotations

MAGIC = b"age-encryption.org/v1\n"
#: How a file in letters begins (`age -a`), which cannot be read at any place.
ARMOR = b"-----BEGIN AGE ENCRYPTED FILE-----"


def is_encrypted(start: bytes) -> bool:
    """Return whether a file that begins so is an age file. `start`: 22 bytes or more."""
    return start.startswith(MAGIC)
