# SPDX-License-Identifier: Apache-2.0
"""The process that parses the file systems of an archive's disks. It has one socket, and no rights.

python -m vmapipe.access.files.child FD SIZE…
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from bisect import bisect_right
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

from vmapipe.access.files import parser
from vmapipe.access.files.messages import (
    FILE,
    FOLDER,
    MAX_MESSAGE_BYTES,
    MAX_READ_BYTES,
    AnswerEnd,
    Ask,
    Bytes,
    DiskUnreadable,
    EntryFailed,
    FromParser,
    Key,
    ParserNotice,
    ParserReady,
    Read,
    Volume,
    decode_for_parser,
    encode,
)
from vmapipe.access.files.sources import ByteSource
from vmapipe.access.files.volumes import Node, scan
from vmapipe.protocol.errors import ProtocolError
from vmapipe.runtime.sandbox import end_with_parent, give_up_rights

# Python, msgpack and the parser take some 200 MiB of address space; what the largest
# folders of real file systems need comes to some tens of MiB more.
_MEMORY_BYTES = 1 << 30
# An hour of work; a parser that a made-up file system has sent round in a circle ends there.
_CPU_S = 3600
# As many as programs read side by side through a mount.
_LATELY = 16


class _Worker:
    """Answers commands, one after the other, and asks for what it needs of the disks."""

    def __init__(self, sock: socket.socket, sizes_bytes: list[int]) -> None:
        self._sock = sock
        self._sizes_bytes = sizes_bytes
        self._nodes: list[Node] | None = None
        self._keys: list[Key] = []
        self._opened: dict[tuple[int, str], tuple[Volume, parser.FileSystem | None]] = {}
        # Files that "range" was asked of, and where their data is; the last one is the latest.
        self._lately: dict[tuple[int, str, bytes], tuple[Any, list[tuple[int, int]]]] = {}

    def tell(self, message: FromParser) -> None:
        self._sock.sendall(encode(message))

    def hear(self) -> Key | Ask | Bytes | DiskUnreadable | None:
        """None: the other side has ended."""
        raw = self._sock.recv(MAX_MESSAGE_BYTES)
        return decode_for_parser([raw]) if raw else None

    def take_key(self, key: Key) -> None:
        self._keys.append(key)

    def _disk(self, index: int) -> ByteSource:
        size_bytes = self._sizes_bytes[index]

        def read(offset: int, length: int) -> bytes:
            end = min(offset + length, size_bytes)
            return b"".join(
                self._read(index, at, min(MAX_READ_BYTES, end - at))
                for at in range(offset, end, MAX_READ_BYTES)
            )

        return ByteSource(read, size_bytes)

    def _read(self, disk: int, offset: int, length: int) -> bytes:
        """Bytes of a disk. Raises OSError where the archive is damaged."""
        self.tell(Read(disk, offset, length))
        match self.hear():
            case Bytes(data):
                return data
            case DiskUnreadable(reason):
                raise OSError(reason.decode(errors="replace"))
        raise EOFError

    def answer(self, ask: Ask) -> None:
        try:
            for message in self._answers(ask):
                self.tell(message)
        except parser.PARSER_ERRORS as error:
            self.tell(EntryFailed(b"", parser.reason_of(error)))
        self.tell(AnswerEnd())

    def _answers(self, ask: Ask) -> Iterator[FromParser]:
        if self._nodes is None:
            disks = [self._disk(index) for index in range(len(self._sizes_bytes))]
            self._nodes = scan(disks, self._keys, parser.other_tables)
        for node in self._nodes:
            if (ask.disk >= 0 and ask.disk not in node.disks) or (
                ask.where and node.name.encode() != ask.where
            ):
                continue
            volume, file_system = self._open(node)
            if ask.action == "volumes":
                yield volume
            elif file_system is None:
                if ask.action == "find":
                    yield volume
            elif ask.action == "range":
                yield from self._range(node, file_system, ask)
                return
            else:
                place = file_system.find(ask.path)
                if ask.action == "find" and place is not None:
                    yield volume
                elif place is not None:
                    yield from self._tree(ask.action, file_system, *place)
                    return

    def _open(self, node: Node) -> tuple[Volume, parser.FileSystem | None]:
        """Once: its whole journal is looked through, and the next command asks for it again."""
        key = (node.disk, node.name)
        if key not in self._opened:
            self._opened[key] = parser.open_node(node)
        return self._opened[key]

    def _range(self, node: Node, file_system: parser.FileSystem, ask: Ask) -> Iterator[FromParser]:
        """What lies in a range of a file. Files that were read lately are not looked for again."""
        key = (node.disk, node.name, ask.path)
        known = self._lately.pop(key, None)
        if known is None:
            place = file_system.find(ask.path)
            if place is None:
                return
            known = place[1], file_system.stretches(place[1])
        self._lately[key] = known
        if len(self._lately) > _LATELY:
            del self._lately[next(iter(self._lately))]
        file, stretches = known
        end = ask.offset + ask.length
        at = bisect_right(stretches, ask.offset, key=itemgetter(1))
        while at < len(stretches) and stretches[at][0] < end:
            start, stop = stretches[at]
            yield from file_system.data(file, max(start, ask.offset), min(stop, end))
            at += 1

    def _tree(
        self, action: str, file_system: parser.FileSystem, path: bytes, file: Any
    ) -> Iterator[FromParser]:
        for text in file_system.notices:
            yield ParserNotice(text.encode())
        told = len(file_system.notices)
        top = file_system.entry(path, file)
        if action == "entry":
            yield top
            return
        if action == "list" and top.kind == FOLDER:
            items: Iterator[tuple[bytes, Any] | EntryFailed] = file_system.children(path, file)
        elif action == "list":
            items = iter([(path, file)])
        else:
            items = file_system.walk(path, file)
        for item in items:
            if isinstance(item, EntryFailed):
                yield item
                continue
            name, file = item
            try:
                entry = file_system.entry(name, file)
                yield entry
                if action == "read" and entry.kind == FILE:
                    yield from file_system.content(file)
            except parser.PARSER_ERRORS as error:
                yield EntryFailed(name, parser.reason_of(error))
            for text in file_system.notices[told:]:
                yield ParserNotice(text.encode())
            told = len(file_system.notices)


def main(argv: list[str]) -> int:
    end_with_parent()
    sock = socket.socket(fileno=int(argv[0]))
    worker = _Worker(sock, [int(word) for word in argv[1:]])
    is_confined = give_up_rights(_MEMORY_BYTES, _CPU_S)
    try:
        worker.tell(ParserReady(is_confined))
        while (message := worker.hear()) is not None:
            if isinstance(message, Key):
                worker.take_key(message)
            elif isinstance(message, Ask):
                worker.answer(message)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0  # the asker has ended
    except (ProtocolError, MemoryError, RecursionError, ValueError) as error:
        traceback.print_exception(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))
