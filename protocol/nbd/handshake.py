# SPDX-License-Identifier: Apache-2.0
"""Parts shared by both handshakes: greeting, options and their replies as bytes (proto.md, Option types)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from vmapipe.protocol.errors import LocalProtocolError, ProtocolError
from vmapipe.protocol.nbd.constants import (
    IHAVEOPT,
    MAX_QUERIES,
    MAX_STRING_BYTES,
    NBD_INFO_BLOCK_SIZE,
    NBD_INFO_EXPORT,
    NBD_REP_ERR_INVALID,
    NBD_REP_ERR_TOO_BIG,
    REP_MAGIC,
    Bytes,
)
from vmapipe.protocol.nbd.errors import NbdProtocolError, NbdRefusedError
from vmapipe.protocol.nbd.session import BlockSizes, NbdSession, ReceiveBuffer

# NBDMAGIC, IHAVEOPT, handshake flags
GREETING = struct.Struct(">QQH")
CLIENT_FLAGS = struct.Struct(">I")
# IHAVEOPT, option, length of its data
OPTION = struct.Struct(">QII")
# magic, option, reply type, length of its data
OPTION_REPLY = struct.Struct(">QIII")
# size of the export, transmission flags: the answer to NBD_OPT_EXPORT_NAME
EXPORT_NAME_REPLY = struct.Struct(">QH")

INFO_EXPORT = struct.Struct(">HQH")  # information type, size, transmission flags
INFO_BLOCK_SIZE = struct.Struct(">HIII")  # information type, minimum, preferred, maximum
U16 = struct.Struct(">H")
U32 = struct.Struct(">I")


class OptionFault(ProtocolError):
    """An option that a server answers with the error `reply_type`; it never leaves the server."""

    def __init__(self, reply_type: int, message: str) -> None:
        self.reply_type = reply_type
        self.message = message
        super().__init__(message)


class InfoQuery(NamedTuple):
    """The data of NBD_OPT_INFO and NBD_OPT_GO: what is wanted, as NBD_INFO_ numbers."""

    name: str
    wanted: Collection[int]


class MetaQuery(NamedTuple):
    """The data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT."""

    name: str
    queries: Collection[str]


def encode_option(option: int, data: bytes = b"") -> bytes:
    return OPTION.pack(IHAVEOPT, option, len(data)) + data


def encode_option_reply(option: int, reply_type: int, data: bytes = b"") -> bytes:
    return OPTION_REPLY.pack(REP_MAGIC, option, reply_type, len(data)) + data


def encode_info_query(query: InfoQuery) -> bytes:
    numbers = b"".join(map(U16.pack, query.wanted))
    return _counted(query.name) + U16.pack(len(query.wanted)) + numbers


def encode_meta_query(query: MetaQuery) -> bytes:
    return (
        _counted(query.name)
        + U32.pack(len(query.queries))
        + b"".join(_counted(text) for text in query.queries)
    )


def encode_server_entry(name: str, description: str) -> bytes:
    """The data of NBD_REP_SERVER."""
    return _counted(name) + description.encode()


def encode_infos(
    size_bytes: int, flags: int, texts: Mapping[int, str], sizes: BlockSizes | None
) -> list[bytes]:
    """The data of one NBD_REP_INFO each; `texts`: strings by their NBD_INFO_ number."""
    infos = [INFO_EXPORT.pack(NBD_INFO_EXPORT, size_bytes, flags)]
    infos += [U16.pack(kind) + text.encode() for kind, text in texts.items()]
    if sizes is not None:
        infos.append(INFO_BLOCK_SIZE.pack(NBD_INFO_BLOCK_SIZE, *sizes))
    return infos


def parse_string(raw: bytes) -> str:
    """Raise OptionFault for bytes that are not a valid string (proto.md, Conventions)."""
    if len(raw) > MAX_STRING_BYTES:
        raise OptionFault(NBD_REP_ERR_TOO_BIG, f"a string of more than {MAX_STRING_BYTES} bytes")
    if b"\0" in raw:
        raise OptionFault(NBD_REP_ERR_INVALID, "a string with a NUL in it")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise OptionFault(NBD_REP_ERR_INVALID, "a string that is not UTF-8") from None


def parse_info_query(data: bytes) -> InfoQuery:
    """Raises OptionFault. Numbers that are unknown, or there twice, do no harm."""
    name, rest = _take_counted(data)
    if len(rest) < U16.size:
        raise _cut_short()
    (count,) = U16.unpack_from(rest)
    if len(rest) != U16.size * (1 + count):
        raise OptionFault(NBD_REP_ERR_INVALID, "the number of information requests is wrong")
    return InfoQuery(name, {number for (number,) in U16.iter_unpack(rest[U16.size :])})


def parse_meta_query(data: bytes) -> MetaQuery:
    """Raises OptionFault; a query without a namespace is invalid, an unknown one is not."""
    name, rest = _take_counted(data)
    if len(rest) < U32.size:
        raise _cut_short()
    (count,) = U32.unpack_from(rest)
    rest = rest[U32.size :]
    if count > len(rest) // U32.size:
        raise _cut_short()
    if count > MAX_QUERIES:
        raise OptionFault(NBD_REP_ERR_TOO_BIG, f"more than {MAX_QUERIES} queries")
    queries = []
    for _ in range(count):
        query, rest = _take_counted(rest)
        if not query.partition(":")[1]:
            raise OptionFault(NBD_REP_ERR_INVALID, "a query without a namespace and a colon")
        queries.append(query)
    if rest:
        raise OptionFault(NBD_REP_ERR_INVALID, "more data than queries")
    return MetaQuery(name, queries)


def _counted(text: str) -> bytes:
    raw = text.encode()
    return U32.pack(len(raw)) + raw


def _take_counted(data: bytes) -> tuple[str, bytes]:
    """A 32-bit length, a string of that length, and the rest."""
    if len(data) < U32.size:
        raise _cut_short()
    (length,) = U32.unpack_from(data)
    if length > len(data) - U32.size:
        raise _cut_short()
    end = U32.size + length
    return parse_string(data[U32.size : end]), data[end:]


def _cut_short() -> OptionFault:
    return OptionFault(NBD_REP_ERR_INVALID, "the option's data ends too early")


class Handshake:
    """The first structure has `first_bytes`, and `take` takes it."""

    def __init__(self, first_bytes: int, take: Callable[[bytes], bytes]) -> None:
        self.session: NbdSession | None = None
        #: Bytes that were fed beyond the handshake's end: the beginning of the transmission phase.
        self.unread = b""
        self._intake = ReceiveBuffer(first_bytes)
        # Takes the structure that is complete and returns what to send; None: the end.
        self._next: Callable[[bytes], bytes] | None = take

    @property
    def wanted_bytes(self) -> int:
        """So many bytes at least are still the handshake's; 0: it is over."""
        return self._intake.missing_bytes if self._next is not None else 0

    def feed(self, data: Bytes) -> bytes:
        """Take bytes as they come, cut anywhere; returns what is to be sent.

        More than `wanted_bytes` is no loss: see `unread`. Raises NbdProtocolError, and at
        the client NbdRefusedError.
        """
        if self._next is None:
            raise LocalProtocolError("the handshake is over")
        rest = memoryview(data)
        out = []
        try:
            while self._next is not None:
                rest = self._intake.add(rest)
                if self._intake.missing_bytes:
                    break
                out.append(self._next(self._intake.take()))
        except (NbdProtocolError, NbdRefusedError) as error:
            self._next = None
            error.unsent = b"".join(out) + error.unsent
            raise
        if self.session:
            self.unread = bytes(rest)
        return b"".join(out)
