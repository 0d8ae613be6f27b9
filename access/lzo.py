# SPDX-License-Identifier: Apache-2.0
"""The blocks of a .lzo file (lzop), each of which is decompressed by itself: with lzallright.

Layout: lzop's lzop.c. Every block has its lengths in front, so that all are found by walking from
one to the next; its checksum is compared whenever it is decompressed.
"""

from __future__ import annotations

import importlib.util
import struct
import zlib
from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vmapipe.restore.archive.input import Pread
from vmapipe.runtime.cancel import Cancel

MAGIC = b"\x89LZO\0\r\n\x1a\n"
# The header's fields come after the magic; what a version below this has not is left out.
_NEW_VERSION = 0x0940
_PLAIN_ADLER, _PACKED_ADLER, _PLAIN_CRC, _PACKED_CRC = 0x1, 0x2, 0x100, 0x200
_EXTRA_FIELD, _SEVERAL_PARTS, _FILTER = 0x40, 0x400, 0x800
_MOST_HEADER_BYTES = 9 + 29 + 255 + 4
# lzop makes blocks of 256 KiB. LZO makes 255 bytes of one at the most: of larger blocks somebody
# could make one that fills the memory.
_MAX_BLOCK_BYTES = 1 << 20


class LzoBlocks(NamedTuple):
    """Where each block begins in the file and in the plain bytes, and where the last one ends."""

    file_at: array[int]
    plain_at: array[int]
    flags: int


def can_read_lzo() -> bool:
    """Whether the library is there."""
    try:
        return importlib.util.find_spec("lzallright") is not None
    except ValueError:
        return False  # somebody has put None in its place


def lzo_blocks(pread: Pread, halts: Sequence[Cancel]) -> LzoBlocks | None:
    """None: cut off, or of a kind that lzop rarely makes, which the program itself can read.

    Raises OSError, Cancelled.
    """
    header = _header(pread(_MOST_HEADER_BYTES, 0))
    if header is None:
        return None
    at, flags = header
    plain_width = 4 * bool(flags & _PLAIN_ADLER) + 4 * bool(flags & _PLAIN_CRC)
    packed_width = 4 * bool(flags & _PACKED_ADLER) + 4 * bool(flags & _PACKED_CRC)
    file_at, plain_at = array("Q", [at]), array("Q", [0])
    while True:
        raw = pread(8, at)
        if len(raw) >= 4 and raw[:4] == bytes(4):
            break
        if len(raw) < 8:
            return None
        plain, packed = struct.unpack(">2I", raw)
        if not 0 < packed <= plain <= _MAX_BLOCK_BYTES:
            return None
        at += 8 + plain_width + packed + (packed_width if packed < plain else 0)
        file_at.append(at)
        plain_at.append(plain_at[-1] + plain)
        if not len(file_at) % 1024:
            for halt in halts:
                halt.check()
    # Another file may follow, and lzop makes one of both.
    if len(file_at) == 1 or pread(len(MAGIC), at + 4) == MAGIC:
        return None
    return LzoBlocks(file_at, plain_at, flags)


def _header(raw: bytes) -> tuple[int, int] | None:
    """Where the first block is, and the flags."""
    try:
        version = struct.unpack_from(">H", raw, 9)[0]
        is_new = version >= _NEW_VERSION
        flags = struct.unpack_from(">I", raw, 17 if is_new else 14)[0]
        # Mode and two halves of the time, of which old ones have one.
        at = 17 + 4 + 12 if is_new else 14 + 4 + 8
        at += 1 + raw[at] + 4  # the name, and the header's checksum
    except (struct.error, IndexError):
        return None
    is_rare = flags & (_FILTER | _EXTRA_FIELD | _SEVERAL_PARTS)
    return None if is_rare or not raw.startswith(MAGIC) else (at, flags)


def decompress_block(raw: bytes, flags: int) -> bytes:
    """One block with its lengths in front. Raises ValueError for a damaged one."""
    import lzallright

    plain_bytes, packed_bytes = struct.unpack_from(">2I", raw)
    if not 0 < packed_bytes <= plain_bytes <= _MAX_BLOCK_BYTES or len(raw) < 16:
        raise ValueError("an lzo block has other lengths than before")
    at = 8
    checks: list[tuple[Callable[[bytes], int], int]] = []
    for flag, check in ((_PLAIN_ADLER, zlib.adler32), (_PLAIN_CRC, zlib.crc32)):
        if flags & flag:
            checks.append((check, struct.unpack_from(">I", raw, at)[0]))
            at += 4
    data = raw[len(raw) - packed_bytes :]
    if packed_bytes < plain_bytes:
        try:
            data = lzallright.LZOCompressor.decompress(data, plain_bytes)
        except (lzallright.LZOError, lzallright.InputNotConsumed) as error:
            raise ValueError(f"a damaged lzo block ({error})") from error
    if len(data) != plain_bytes:
        raise ValueError("an lzo block is not as long as it says")
    if any(check(data) != wanted for check, wanted in checks):
        raise ValueError("the checksum of an lzo block differs")
    return bytes(data)
