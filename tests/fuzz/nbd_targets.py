# SPDX-License-Identifier: Apache-2.0
"""What a fuzzer feeds with bytes on both sides of NBD: hostile clients of our server and of a sink,
and a hostile server of our client.

Each target takes any bytes and returns, or raises what is a defect of ours. No socket and no
thread: a connection's work is done where it is asked for.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from tests.fuzz.choices import Bytes
from vmapipe.producer.chunks import ZEROES
from vmapipe.producer.nbd.backend import Backend, Write, one_by_one, sink_export
from vmapipe.producer.nbd.connection import Connection
from vmapipe.producer.nbd.workers import Pool, Workers
from vmapipe.producer.qemu_sink import QemuSink
from vmapipe.protocol.nbd import constants as c
from vmapipe.protocol.nbd.client_handshake import Goal, NbdClientHandshake
from vmapipe.protocol.nbd.client_transfer import NbdClientTransmission
from vmapipe.protocol.nbd.errors import NbdProtocolError, NbdRefusedError
from vmapipe.protocol.nbd.handshake import EXPORT_NAME_REPLY, GREETING, OPTION, OPTION_REPLY
from vmapipe.protocol.nbd.reply import (
    SIMPLE_REPLY,
    STRUCTURED_REPLY,
    Data,
    Hole,
    RequestDone,
    Status,
)
from vmapipe.protocol.nbd.server_handshake import NbdServerHandshake
from vmapipe.protocol.nbd.session import REQUEST, Export, MetaContext, NbdSession

CLUSTER = 65536
SIZE = 5 * CLUSTER + 1536
_FLAGS = (
    c.NBD_FLAG_SEND_FLUSH
    | c.NBD_FLAG_SEND_FUA
    | c.NBD_FLAG_SEND_TRIM
    | c.NBD_FLAG_SEND_WRITE_ZEROES
    | c.NBD_FLAG_SEND_FAST_ZERO
    | c.NBD_FLAG_SEND_CACHE
    | c.NBD_FLAG_SEND_DF
)
EXPORT = Export("d", SIZE, _FLAGS, "a disk", allocation=True)
# Of a client or server: more makes a run slow and finds nothing new.
_MAX_STEPS = 40
# Around what a disk of SIZE has of edges.
_OFFSETS = (
    0,
    1,
    512,
    CLUSTER - 512,
    CLUSTER,
    4 * CLUSTER,
    SIZE - 512,
    SIZE,
    1 << 40,
    (1 << 64) - 1,
)
_LENGTHS = (0, 1, 512, CLUSTER, CLUSTER + 512, 3 * CLUSTER, SIZE, (1 << 25) + 1, (1 << 32) - 1)


class _Wire:
    """A socket that gives what is there, in pieces, and keeps what is sent."""

    def __init__(self, incoming: bytes, source: Bytes) -> None:
        self.sent = bytearray()
        self._incoming = memoryview(incoming)
        self._source = source
        self._fd = open("/dev/null", "rb")  # can always be read  # noqa: SIM115

    def recv_into(self, target: memoryview, count: int = 0, flags: int = 0) -> int:
        most = 1 + self._source.number(2) if self._source.more else len(self._incoming)
        piece = self._incoming[: min(len(target), most)]
        target[: len(piece)] = piece
        self._incoming = self._incoming[len(piece) :]
        return len(piece)

    def sendmsg(self, pieces: Sequence[bytes]) -> int:
        data = b"".join(pieces)
        most = len(data)
        if self._source.more and self._source.number() % 4 == 0:
            most = max(1, most // 3)
        self.sent += data[:most]
        return min(most, len(data))

    def fileno(self) -> int:
        return self._fd.fileno()

    def setsockopt(self, *_: object) -> None: ...

    def shutdown(self, _: int) -> None:
        self._incoming = self._incoming[:0]

    def close(self) -> None:
        self._fd.close()


class _AtOnce(Workers):
    def submit(self, work: Callable[[], None]) -> None:
        work()


class _Memory:
    """A `Backend` over a disk in memory, which now and then has no time at once."""

    def __init__(self, source: Bytes) -> None:
        self.data = bytearray(SIZE)
        self._source = source

    def _busy(self) -> bool:
        return self._source.more and self._source.number() % 3 == 0

    def try_read(self, target: memoryview, offset: int) -> bool:
        if self._busy():
            return False
        self.read(target, offset)
        return True

    def try_writes(self, writes: Sequence[Write]) -> list[OSError | None]:
        return one_by_one(self._try_write, writes)

    def _try_write(self, data: memoryview, offset: int) -> bool:
        if self._busy():
            return False
        self.write(data, offset)
        return True

    def try_zeroes(self, offset: int, length: int) -> bool:
        return False

    def settle(self, *, idle: bool) -> None: ...

    def read(self, target: memoryview, offset: int) -> None:
        if self._busy():
            raise OSError(5, "Input/output error")
        target[:] = self.data[offset : offset + len(target)]

    def write(self, data: memoryview, offset: int) -> None:
        self.data[offset : offset + len(data)] = data

    def write_zeroes(self, offset: int, length: int, *, may_hole: bool, fast_only: bool) -> None:
        self.write(memoryview(bytes(length)), offset)

    def trim(self, offset: int, length: int) -> None: ...

    def flush(self) -> None: ...

    def cache(self, offset: int, length: int) -> None: ...

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        yield length, 0


# --- hostile clients ---


def _options(source: Bytes) -> bytes:
    """What a client says in its handshake: sensible, mostly."""
    said = struct.pack(">I", (3, 1, 0, 2, 7)[source.number() % 5])
    for _ in range(source.number() % 6):
        kind = source.number()
        match kind % 8:
            case 0 | 1:
                option, data = c.NBD_OPT_GO, struct.pack(">I", 1) + b"d" + struct.pack(">H", 0)
            case 2:
                option, data = c.NBD_OPT_STRUCTURED_REPLY, b""
            case 3:
                name = b"base:allocation"
                data = struct.pack(">I", 1) + b"d" + struct.pack(">II", 1, len(name)) + name
                option = c.NBD_OPT_SET_META_CONTEXT
            case 4:
                option, data = c.NBD_OPT_EXPORT_NAME, b"d"
            case _:
                option, data = source.number() % 12, source.take(source.number() % 40)
        length = len(data) if kind < 240 else source.number(4)
        said += OPTION.pack(c.IHAVEOPT if kind != 255 else 1, option, length) + data
    return said + source.take(source.number() % 32)


def server_handshake(data: bytes) -> None:
    """Whatever a client says: answers within bounds, or the end of the connection."""
    source = Bytes(data)
    said = _options(source)
    handshake, answers, at = NbdServerHandshake([EXPORT]), len(NbdServerHandshake([]).greeting()), 0
    try:
        while handshake.wanted_bytes and at < len(said):
            count = 1 + source.number() if source.more else len(said)
            answers += len(handshake.feed(said[at : at + count]))
            at += count
    except NbdProtocolError:
        return
    if answers > 8 << 20:
        raise AssertionError(f"{answers} bytes of answers to {len(said)}")


def _requests(source: Bytes) -> bytes:
    said = b""
    for cookie in range(_MAX_STEPS):
        if not source.more or len(said) > 4 << 20:
            break
        choice = source.number()
        kind = choice % 9
        offset, length = _place(source)
        flags = (0, 0, 0, 1, 2, 4, 8, 16, 0xFFFF)[source.number() % 9]
        payload = b""
        if kind == c.NBD_CMD_WRITE and length <= SIZE:
            payload = bytes([choice | 1]) * length
        magic = c.NBD_REQUEST_MAGIC if choice != 255 else 7
        said += REQUEST.pack(magic, flags, kind, cookie, offset, length) + payload
    return said


def _place(source: Bytes) -> tuple[int, int]:
    choice = source.number()
    offset = _OFFSETS[choice % len(_OFFSETS)] if choice < 200 else source.number(3)
    choice = source.number()
    length = _LENGTHS[choice % len(_LENGTHS)] if choice < 200 else source.number(3)
    return offset, length


def _session(source: Bytes, export: Export) -> NbdSession:
    structured = bool(source.number() & 1)
    contexts = (MetaContext(1, c.BASE_ALLOCATION),) if structured and export.allocation else ()
    flags = export.flags if structured else export.flags & ~c.NBD_FLAG_SEND_DF
    return NbdSession(export, flags, structured, no_zeroes=True, meta_contexts=contexts)


def _serve(source: Bytes, session: NbdSession, backend: Backend) -> bytes:
    """All that is answered. What ends the connection is the client's fault, or none."""
    wire, pool = _Wire(_requests(source), source), Pool()
    connection = Connection(
        cast(socket.socket, wire), session, backend, _AtOnce("fuzz"), pool, request_limit_s=1.0
    )
    try:
        connection.serve()
    except NbdProtocolError:
        pass
    finally:
        wire.close()
    left = Pool()
    if (pool._requests, pool._bytes) != (left._requests, left._bytes) or pool.is_wanted():
        raise AssertionError("a share of the pool was not given back")
    return bytes(wire.sent)


def server(data: bytes) -> None:
    """Each answer is one that a client of ours understands; the disk keeps its size."""
    source = Bytes(data)
    session, disk = _session(source, EXPORT), _Memory(source)
    answers = _serve(source, session, cast(Backend, disk))
    if len(disk.data) != SIZE:
        raise AssertionError(f"the disk has {len(disk.data)} bytes")
    at = 0
    while at < len(answers):
        (magic,) = struct.unpack_from(">I", answers, at)
        if magic == c.NBD_STRUCTURED_REPLY_MAGIC and session.structured:
            *_, length = STRUCTURED_REPLY.unpack_from(answers, at)
            at += STRUCTURED_REPLY.size + length
        elif magic == c.NBD_SIMPLE_REPLY_MAGIC:
            if not session.structured:
                return  # how much data follows, only the request tells
            at += SIMPLE_REPLY.size
        else:
            raise AssertionError(f"an answer begins with {magic:#x}")


def sink(data: bytes) -> None:
    """Whatever comes: acknowledged, each cluster once, and no more memory than there is."""
    source = Bytes(data)
    room = (1 + source.number() % 8) * CLUSTER
    memory = memoryview(bytearray(4096 + room))
    target = QemuSink("d", SIZE, memory, range(4096, 4096 + room), guest_wait_s=0.0)
    target.piece_clusters = 4
    try:
        _serve(source, _session(source, sink_export(SIZE)), cast(Backend, target))
        seen: list[int] = []
        if source.number() & 1 and not target.failure:
            target.rest_is(ZEROES)
        while (arrived := target.next()) is not None:
            seen += range(arrived.first, arrived.first + arrived.clusters)
            target.sent(arrived.clusters)
            if arrived.position >= 0:
                target.give_back([arrived.position])
        if len(set(seen)) != len(seen) or not set(seen) <= set(range(6)):
            raise AssertionError(f"clusters came as {seen}")
        if not target.failure and len(seen) != target.arrived:
            raise AssertionError(f"{target.arrived} arrived, {len(seen)} were handed on")
        if not target.failure and target.used_bytes:
            raise AssertionError(f"{target.used_bytes} bytes are never given back")
    finally:
        target.close()


# --- a hostile server ---


def client_handshake(data: bytes) -> None:
    """Whatever a server says: a session, or an error of the kinds that callers expect."""
    source = Bytes(data)
    goal = (Goal.TRANSMISSION, Goal.INFORMATION, Goal.LIST)[source.number() % 3]
    handshake = NbdClientHandshake("d", goal=goal, structured=bool(source.number() & 1))
    said = GREETING.pack(c.INIT_PASSWD, c.IHAVEOPT, source.number() % 4)
    for _ in range(source.number() % 12):
        said += _option_reply(source)
    if source.number() & 1:
        said += EXPORT_NAME_REPLY.pack(source.number(8), source.number(2)) + bytes(124)
    said += source.take(source.number())
    at = asked = 0
    try:
        while handshake.wanted_bytes and at < len(said):
            count = 1 + source.number() if source.more else len(said)
            asked += len(handshake.feed(said[at : at + count]))
            at += count
        if handshake.wanted_bytes:
            handshake.eof()
    except (NbdProtocolError, NbdRefusedError):
        return
    if asked > 1 << 20:
        raise AssertionError(f"{asked} bytes were asked for")


def _option_reply(source: Bytes) -> bytes:
    option = (c.NBD_OPT_STRUCTURED_REPLY, c.NBD_OPT_SET_META_CONTEXT, c.NBD_OPT_GO, c.NBD_OPT_LIST)
    kinds = (c.NBD_REP_ACK, c.NBD_REP_INFO, c.NBD_REP_META_CONTEXT, c.NBD_REP_SERVER)
    errors = (c.NBD_REP_ERR_UNSUP, c.NBD_REP_ERR_SHUTDOWN, c.NBD_REP_ERR_UNKNOWN)
    choice = source.number()
    kind = (*kinds, *errors)[source.number() % 7]
    match choice % 4:
        case 0:
            payload = b""
        case 1:  # NBD_INFO_EXPORT, or sizes of blocks
            payload = struct.pack(">HQH", 0, SIZE << (choice >> 4), 0xFFF)
            if choice & 64:
                payload = struct.pack(">HIII", 3, 1 << (choice >> 4), 4096, 1 << 25)
        case 2:
            payload = struct.pack(">I", choice) + b"base:allocation"
        case _:
            payload = source.take(source.number() % 64)
    length = len(payload) if choice != 255 else source.number(4)
    return OPTION_REPLY.pack(c.REP_MAGIC, option[source.number() % 4], kind, length) + payload


def client(data: bytes) -> None:
    """Whatever a server answers: events for what was asked, each request done once, or an error."""
    source = Bytes(data)
    session = _session(source, EXPORT)
    codec, ranges, done = NbdClientTransmission(session), {}, set[int]()
    kinds = [c.NBD_CMD_READ, c.NBD_CMD_FLUSH, c.NBD_CMD_TRIM]
    kinds += [c.NBD_CMD_BLOCK_STATUS] * session.structured
    for number in range(1 + source.number() % 6):
        kind = kinds[source.number() % len(kinds)]
        request = codec.request(kind, *((0, 0) if kind == c.NBD_CMD_FLUSH else (number << 9, 2048)))
        ranges[request.cookie] = range(request.offset, request.offset + request.length)
    for _ in range(_MAX_STEPS):
        if not source.more:
            break
        try:
            for event in codec.feed(_reply(source, session.structured)):
                _check(event, ranges, done)
        except NbdProtocolError:
            return


def _reply(source: Bytes, structured: bool) -> bytes:
    choice, cookie = source.number(), 1 + source.number() % 6
    if not structured or choice % 8 == 0:
        error = (0, 0, 5, 22, 999)[choice % 5]
        return SIMPLE_REPLY.pack(c.NBD_SIMPLE_REPLY_MAGIC, error, cookie) + source.take(
            2048 if choice & 8 else choice
        )
    offset = (source.number() % 12) << 8
    kinds: list[tuple[int, bytes]] = [
        (c.NBD_REPLY_TYPE_NONE, b""),
        (c.NBD_REPLY_TYPE_OFFSET_DATA, struct.pack(">Q", offset) + bytes(source.number() << 4)),
        (c.NBD_REPLY_TYPE_OFFSET_HOLE, struct.pack(">QI", offset, source.number() << 4)),
        (c.NBD_REPLY_TYPE_BLOCK_STATUS, struct.pack(">I", 1) + source.take(8 * (choice % 5))),
        (c.NBD_REPLY_TYPE_ERROR, struct.pack(">IH", 5, 3) + b"bad"),
        (c.NBD_REPLY_TYPE_ERROR_OFFSET, struct.pack(">IH", 5, 0) + struct.pack(">Q", offset)),
        (source.number(2), source.take(source.number() % 32)),
    ]
    kind, payload = kinds[choice % 7]
    length = len(payload) if choice < 250 else source.number(4)
    flags = choice >> 3 & 1
    head = STRUCTURED_REPLY.pack(c.NBD_STRUCTURED_REPLY_MAGIC, flags, kind, cookie, length)
    return head + payload


def _check(event: Any, ranges: dict[int, range], done: set[int]) -> None:
    asked = ranges.get(event.cookie)
    if asked is None or event.cookie in done:
        raise AssertionError(f"{event!r:.200} belongs to no request under way")
    match event:
        case Data(_, offset, piece):
            if piece and not (offset in asked and offset + len(piece) - 1 in asked):
                raise AssertionError(f"data at {offset} was not asked for")
        case Hole(_, offset, length):
            if not (offset in asked and offset + length - 1 in asked):
                raise AssertionError(f"a hole at {offset} was not asked for")
        case Status():
            if not any(length for length, _ in event.extents()):
                raise AssertionError("a status without a length: whoever asks on never ends")
        case RequestDone(cookie, _):
            done.add(cookie)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "nbd-server-handshake": server_handshake,
    "nbd-server": server,
    "nbd-sink": sink,
    "nbd-client-handshake": client_handshake,
    "nbd-client": client,
}
LONGEST_BYTES = dict.fromkeys(TARGETS, 600)
