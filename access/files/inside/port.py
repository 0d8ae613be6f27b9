# SPDX-License-Identifier: Apache-2.0
"""The appliance's words with its host: messages in msgpack, each behind its length."""

from __future__ import annotations

import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    # These take as long to load as all others together.
    from typing import Any

# The port takes 32 KiB at once.
_PORT_BYTES = 32 << 10


class Refused(Exception):
    """What was asked for cannot be done, and why."""


def pack(value: Any) -> bytes:
    """Return a value in msgpack, in forms that need no choice."""
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        if 0 <= value < 128:
            return bytes((value,))
        return struct.pack(">BQ", 0xCF, value) if value > 0 else struct.pack(">Bq", 0xD3, value)
    if isinstance(value, str):
        raw = value.encode()
        return struct.pack(">BB", 0xD9, len(raw)) + raw
    if isinstance(value, bytes):
        return struct.pack(">BI", 0xC6, len(value)) + value
    return struct.pack(">BH", 0xDC, len(value)) + b"".join(map(pack, value))


def unpack(raw: bytes) -> Any:
    """Return the value of a command, which is what msgpack makes of our own messages."""
    value, rest = _unpack(raw, 0)
    if rest != len(raw):
        raise Refused("a command that is not valid")
    return value


def _unpack(raw: bytes, at: int) -> tuple[Any, int]:
    code = raw[at]
    at += 1
    if code < 0x80:
        return code, at
    if code >= 0xE0:
        return code - 256, at
    if 0x90 <= code < 0xA0:
        return _unpack_items(raw, at, code & 15)
    if 0xA0 <= code < 0xC0:
        length = code & 31
        return raw[at : at + length].decode(), at + length
    if code in (0xC4, 0xC5, 0xC6, 0xD9):
        form = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I", 0xD9: ">B"}[code]
        (length,) = struct.unpack_from(form, raw, at)
        at += struct.calcsize(form)
        data = raw[at : at + length]
        return data.decode() if code == 0xD9 else data, at + length
    if code in (0xCC, 0xCD, 0xCE, 0xCF):
        form = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"}[code]
        return struct.unpack_from(form, raw, at)[0], at + struct.calcsize(form)
    raise Refused("a command that is not valid")


def _unpack_items(raw: bytes, at: int, count: int) -> tuple[list[Any], int]:
    items = []
    for _ in range(count):
        item, at = _unpack(raw, at)
        items.append(item)
    return items, at


class Port:
    """Messages both ways, each behind its length. Small ones are collected."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._out = bytearray()

    def tell(self, name: str, *fields: Any) -> None:
        raw = pack((name, *fields))
        self._out += struct.pack(">I", len(raw)) + raw
        if len(self._out) >= _PORT_BYTES:
            self.flush()

    def flush(self) -> None:
        left = memoryview(bytes(self._out))
        self._out.clear()
        while left:
            left = left[os.write(self._fd, left[:_PORT_BYTES]) :]

    def hear(self) -> Any:
        self.flush()
        (length,) = struct.unpack(">I", self._read(4))
        return unpack(self._read(length))

    def _read(self, length: int) -> bytes:
        parts = []
        while length:
            part = os.read(self._fd, length)
            if not part:
                raise EOFError
            parts.append(part)
            length -= len(part)
        return b"".join(parts)
