# SPDX-License-Identifier: Apache-2.0
"""Pictures of a machine's screen, and the text on it where it is in text mode. Pure.

A picture comes as QEMU dumps it (PPM), is kept as PNG, and two of them are compared tile by tile: a
blinking cursor and a clock are no change.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections import Counter
from typing import NamedTuple

#: The memory of a VGA card's text, all of it: a console scrolls by moving its start.
TEXT_ADDRESS, TEXT_BYTES = 0xB8000, 0x8000
# The largest that QEMU's standard card can be told to show.
_MAX_SIDE = 8192
_MAX_PIXELS = 1 << 25
_PNG = b"\x89PNG\r\n\x1a\n"
#: A screen of 1280 x 800 in text mode has some 10 KiB, a desktop 300: larger ones are kept, but not shown in reports.
MAX_PNG_BYTES = 1 << 20
_HEAD = re.compile(rb"P6\s+(\d{1,5})\s+(\d{1,5})\s+255\s")
_ROW_CHARS, _ROW_LINES = 80, 16
_BLANKS = frozenset("\0 \xa0")
# A cursor, and letters that full blocks are; while a guest writes, memory and picture differ by more.
_MOST_DIFFERENT = 12
# A tile has the size of two letters; of a picture that is still the same, so many may differ: a
# cursor, and a clock of some digits.
_TILE_BYTES, _TILE_ROWS = 16 * 3, 16
_STILL = 0.01
# Of a desktop or a login picture rather than white letters on black: so many colours among some
# thousand pixels, and no more black than half.
_SAMPLES = 4000
_LEAST_COLOURS = 64
# VGA's text: 25 rows of 16 lines, of 80 letters that are 9 or 8 wide.
_TEXT_SIZES = ((720, 400), (640, 400))


class Picture(NamedTuple):
    """Three bytes a pixel, row by row."""

    width: int
    height: int
    pixels: bytes

    @property
    def is_text_mode(self) -> bool:
        return (self.width, self.height) in _TEXT_SIZES

    @property
    def is_blank(self) -> bool:
        return self.pixels.count(self.pixels[:1]) == len(self.pixels)


def parse_ppm(raw: bytes) -> Picture:
    """Raises ValueError for anything but one whole picture."""
    head = _HEAD.match(raw)
    if head is None:
        raise ValueError("not a PPM picture")
    width, height = int(head[1]), int(head[2])
    is_size = 0 < width <= _MAX_SIDE and 0 < height <= _MAX_SIDE and width * height <= _MAX_PIXELS
    if not is_size or len(raw) - head.end() != 3 * width * height:
        raise ValueError("a PPM picture of another size than it says")
    return Picture(width, height, raw[head.end() :])


def encode_png(picture: Picture) -> bytes:
    row = 3 * picture.width
    lines = (picture.pixels[at : at + row] for at in range(0, len(picture.pixels), row))
    data = zlib.compress(b"".join(b"\0" + line for line in lines), 6)
    header = struct.pack(">IIBBBBB", picture.width, picture.height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return _PNG + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def is_png(raw: bytes) -> bool:
    """Tell whether this is a whole picture as `encode_png` makes them, and nothing else.

    It may come from another host, and goes to a browser: no other chunks, no endless size, no word too many.
    """
    if len(raw) > MAX_PNG_BYTES or not raw.startswith(_PNG):
        return False
    at, kinds = len(_PNG), list[bytes]()
    while at + 12 <= len(raw):
        (count,), kind = struct.unpack_from(">I", raw, at), raw[at + 4 : at + 8]
        body, end = raw[at + 8 : at + 8 + count], at + 12 + count
        if end > len(raw) or raw[end - 4 : end] != struct.pack(">I", zlib.crc32(kind + body)):
            return False
        kinds.append(kind)
        if len(kinds) == 1:
            if (kind, count) != (b"IHDR", 13):
                return False
            width, height, *how = struct.unpack(">IIBBBBB", body)
            is_size = 0 < width <= _MAX_SIDE and 0 < height <= _MAX_SIDE
            if not is_size or width * height > _MAX_PIXELS or how != [8, 2, 0, 0, 0]:
                return False
        at = end
    return at == len(raw) and kinds == [b"IHDR", b"IDAT", b"IEND"]


def is_still(before: Picture, after: Picture) -> bool:
    """Tell whether two pictures show the same, but for a cursor or a clock."""
    if before[:2] != after[:2]:
        return False
    if before.pixels == after.pixels:
        return True
    row, changed, tiles = 3 * after.width, set[tuple[int, int]](), 0
    for line in range(after.height):
        start = line * row
        if before.pixels[start : start + row] == after.pixels[start : start + row]:
            continue
        for at in range(start, start + row, _TILE_BYTES):
            end = min(at + _TILE_BYTES, start + row)
            if before.pixels[at:end] != after.pixels[at:end]:
                changed.add((line // _TILE_ROWS, (at - start) // _TILE_BYTES))
    tiles = -(-row // _TILE_BYTES) * -(-after.height // _TILE_ROWS)
    return len(changed) <= max(2, tiles * _STILL)


def looks_graphical(picture: Picture) -> bool:
    """Tell a desktop or a picture from a console's letters, and from a logo on black."""
    count = picture.width * picture.height
    step = max(1, count // _SAMPLES) | 1  # odd: or all samples may lie in some columns
    seen = Counter(picture.pixels[3 * at : 3 * at + 3] for at in range(0, count, step))
    return len(seen) >= _LEAST_COLOURS and seen[b"\0\0\0"] * 2 < seen.total()


def text_lines(picture: Picture, raw: bytes) -> list[str]:
    """Return the rows that a picture in text mode shows, out of the card's text memory.

    The memory also holds rows that were on the screen before, and may say that what has gone well since
    has failed. Which ones are shown only the picture tells: by where it has letters.
    """
    letters = raw[: len(raw) // 2 * 2 : 2].decode("cp437")
    rows = [letters[at : at + _ROW_CHARS] for at in range(0, len(letters), _ROW_CHARS)]
    marks = [sum((char not in _BLANKS) << at for at, char in enumerate(row)) for row in rows]
    shown = _letter_places(picture)
    best, least = 0, _MOST_DIFFERENT + 1
    for start in range(len(rows) - len(shown) + 1):
        pairs = zip(shown, marks[start : start + len(shown)], strict=True)
        different = sum((a ^ b).bit_count() for a, b in pairs)
        if different < least:
            best, least = start, different
    if least > _MOST_DIFFERENT:
        return []
    found = rows[best : best + len(shown)]
    return ["".join(c if c.isprintable() else " " for c in row).rstrip() for row in found]


def _letter_places(picture: Picture) -> list[int]:
    """Return for each row of a picture in text mode the places that are not of one colour, as bits."""
    cell, row_bytes = 3 * picture.width // _ROW_CHARS, 3 * picture.width
    found = []
    for top in range(0, picture.height, _ROW_LINES):
        marks = 0
        for line in range(top, min(top + _ROW_LINES, picture.height)):
            start = line * row_bytes
            if picture.pixels.count(picture.pixels[start], start, start + row_bytes) == row_bytes:
                continue
            for place in range(_ROW_CHARS):
                at = start + place * cell
                colour = picture.pixels[at : at + 3]
                if picture.pixels[at : at + cell] != colour * (cell // 3):
                    marks |= 1 << place
        found.append(marks)
    return found
