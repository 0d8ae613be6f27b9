# SPDX-License-Identifier: Apache-2.0
"""The request message of the transmission phase (proto.md, Request message)."""

from __future__ import annotations

import struct
from typing import NamedTuple

from vmapipe.protocol.errors import LocalProtocolError
from vmapipe.protocol.nbd.constants import (
    COMMAND_NAMES,
    NBD_CMD_WRITE,
    NBD_REQUEST_MAGIC,
    Bytes,
)
from vmapipe.protocol.nbd.errors import NbdProtocolError
from vmapipe.protocol.nbd.limits import MAX_PAYLOAD_BYTES

# magic, command flags, type, cookie, offset, length
REQUEST = struct.Struct(">IHHQQI")
REQUEST_BYTES = REQUEST.size


class Request(NamedTuple):
    """`offset` and `length` in bytes; `type` is an NBD_CMD_ number, known or not.

    `cookie` (proto.md also: handle) is the client's; the reply carries it back.
    """

    flags: int
    type: int
    cookie: int
    offset: int
    length: int

    @property
    def payload_bytes(self) -> int:
        """How many bytes of data follow the request."""
        return self.length if self.type == NBD_CMD_WRITE else 0

    def __str__(self) -> str:
        name = COMMAND_NAMES.get(self.type, f"command {self.type}")
        return f"{name} of {self.length} bytes at {self.offset} (flags {self.flags:#x})"


def parse_request(header: Bytes) -> Request:
    """Read a request's REQUEST_BYTES bytes; its payload, if any, follows them on the wire.

    A request that only asks for something wrong comes back like any other: see
    `Session.fault_of`. Raises NbdProtocolError when the connection has to be
    closed: the bytes are no request, or announce more data than anyone may send.
    """
    try:
        magic, flags, kind, cookie, offset, length = REQUEST.unpack(header)
    except struct.error:
        raise LocalProtocolError(f"{len(header)} bytes are no request header") from None
    if magic != NBD_REQUEST_MAGIC:
        raise NbdProtocolError(f"no request where one must be (magic {magic:#x})")
    if kind == NBD_CMD_WRITE and length > MAX_PAYLOAD_BYTES:
        raise NbdProtocolError(f"a write of {length} bytes; the limit is {MAX_PAYLOAD_BYTES}")
    return Request(flags, kind, cookie, offset, length)


def encode_request(request: Request) -> bytes:
    """REQUEST_BYTES bytes, to be followed by the data of NBD_CMD_WRITE."""
    return REQUEST.pack(NBD_REQUEST_MAGIC, *request)
