# SPDX-License-Identifier: Apache-2.0
"""Reads what a server answers to options (proto.md, Option reply types)."""

from __future__ import annotations

import struct

from vmapipe.protocol.nbd.constants import (
    NBD_FLAG_HAS_FLAGS,
    NBD_FLAG_SEND_DF,
    NBD_INFO_BLOCK_SIZE,
    NBD_INFO_DESCRIPTION,
    NBD_INFO_EXPORT,
    NBD_INFO_NAME,
)
from vmapipe.protocol.nbd.errors import NbdProtocolError
from vmapipe.protocol.nbd.export import (
    DEFAULT_BLOCK_SIZES,
    BlockSizes,
    Export,
    ListedExport,
    block_sizes_fault,
    known_flags,
    size_fault,
)
from vmapipe.protocol.nbd.option import (
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    U16,
    U32,
    OptionFault,
    parse_string,
)
from vmapipe.protocol.nbd.session import MetaContext


class ExportInfo:
    """Gathers what NBD_REP_INFO replies, or the answer to NBD_OPT_EXPORT_NAME, say of one export."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._description = ""
        self._block_sizes = DEFAULT_BLOCK_SIZES
        self._export: tuple[int, int] | None = None

    def set_export(self, size_bytes: int, flags: int) -> None:
        """Raises NbdProtocolError."""
        fault = size_fault(size_bytes)
        if fault:
            raise NbdProtocolError(fault)
        if not flags & NBD_FLAG_HAS_FLAGS:
            raise NbdProtocolError("transmission flags without NBD_FLAG_HAS_FLAGS")
        self._export = size_bytes, flags

    def take(self, data: bytes) -> None:
        """The data of one NBD_REP_INFO; unknown kinds are ignored. Raises NbdProtocolError."""
        (kind,) = _unpack(U16, data[: U16.size])
        if kind == NBD_INFO_EXPORT:
            _, size_bytes, flags = _unpack(INFO_EXPORT, data)
            self.set_export(size_bytes, flags)
        elif kind == NBD_INFO_NAME:
            self._name = _string(data[U16.size :])
        elif kind == NBD_INFO_DESCRIPTION:
            self._description = _string(data[U16.size :])
        elif kind == NBD_INFO_BLOCK_SIZE:
            _, minimum, preferred, maximum = _unpack(INFO_BLOCK_SIZE, data)
            self._block_sizes = BlockSizes(minimum, preferred, maximum)
            fault = block_sizes_fault(self._block_sizes)
            if fault:
                raise NbdProtocolError(fault)

    def build(self, *, structured: bool) -> Export:
        """Raises NbdProtocolError when the server has not said the export's size."""
        if self._export is None:
            raise NbdProtocolError("an acknowledgement without NBD_INFO_EXPORT")
        size_bytes, flags = self._export
        if not structured:
            flags &= ~NBD_FLAG_SEND_DF
        return Export(
            self._name, size_bytes, known_flags(flags), self._description, self._block_sizes
        )


def parse_listed(data: bytes) -> ListedExport:
    """The data of NBD_REP_SERVER. Raises NbdProtocolError."""
    (length,) = _unpack(U32, data[: U32.size])
    end = U32.size + length
    if end > len(data):
        raise NbdProtocolError("an export's name is longer than the reply")
    return ListedExport(_string(data[U32.size : end]), _string(data[end:]))


def parse_context(data: bytes) -> MetaContext:
    """The data of NBD_REP_META_CONTEXT. Raises NbdProtocolError."""
    (number,) = _unpack(U32, data[: U32.size])
    return MetaContext(number, _string(data[U32.size :]))


def _unpack(layout: struct.Struct, data: bytes) -> tuple[int, ...]:
    if len(data) != layout.size:
        raise NbdProtocolError(f"{len(data)} bytes in an option reply, where {layout.size} belong")
    return layout.unpack(data)


def _string(raw: bytes) -> str:
    try:
        return parse_string(raw)
    except OptionFault as fault:
        raise NbdProtocolError(fault.message) from None
