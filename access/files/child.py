# SPDX-License-Identifier: Apache-2.0
"""The process that parses a disk's file systems. It has one socket, and no rights.

python -m vmapipe.access.files.child FD SIZE
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
    AnswerEnd,
    Ask,
    Bytes,
    DiskUnreadable,
    EntryFailed,
    FromParser,
    ParserNotice,
    ParserReady,
    Read,
    Volume,
    decode_for_parser,
    encode,
)
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
    """Answers commands, one after the other, and asks for what it needs of the disk."""

    def __init__(self, sock: socket.socket, size_bytes: int) -> None:
        self._sock = sock
        self._size_bytes = size_bytes
        self._parts: list[parser.Partition] | None = None
        self._opened: dict[parser.Partition, tuple[Volume, parser.FileSystem | None]] = {}
        # Files that "range" was asked of, and where their data is; the last one is the latest.
        self._lately: dict[tuple[parser.Partition, bytes], tuple[Any, list[tuple[int, int]]]] = {}

    def tell(self, message: FromParser) -> None:
        self._sock.sendall(encode(message))

    def hear(self) -> Ask | Bytes | DiskUnreadable | None:
        """None: the other side has ended."""
        raw = self._sock.recv(MAX_MESSAGE_BYTES)
        return decode_for_parser([raw]) if raw else None

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the disk. Raises OSError where the archive is damaged."""
        length = min(length, self._size_bytes - offset)
        if length <= 0:
            return b""
        self.tell(Read(offset, length))
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
            self.tell(EntryFailed(b"", str(error).encode()[:400]))
        self.tell(AnswerEnd())

    def _answers(self, ask: Ask) -> Iterator[FromParser]:
        if self._parts is None:
            self._parts = parser.parts(self.read, self._size_bytes)
        for part in self._parts:
            if ask.where and part.name.encode() != ask.where:
                continue
            if part not in self._opened:
                # Once: its whole journal is looked through, and the next command asks for it again.
                self._opened[part] = parser.open_part(self.read, part)
            volume, file_system = self._opened[part]
            if ask.action == "volumes":
                yield volume
            elif file_system is None:
                if ask.action == "find":
                    yield volume
            elif ask.action == "range":
                yield from self._range(file_system, ask)
                return
            else:
                place = file_system.find(ask.path)
                if ask.action == "find" and place is not None:
                    yield volume
                elif place is not None:
                    yield from self._tree(ask.action, file_system, *place)
                    return

    def _range(self, file_system: parser.FileSystem, ask: Ask) -> Iterator[FromParser]:
        """What lies in a range of a file. Files that were read lately are not looked for again."""
        key = (file_system.part, ask.path)
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
                yield EntryFailed(name, str(error).encode()[:400])
            for text in file_system.notices[told:]:
                yield ParserNotice(text.encode())
            told = len(file_system.notices)


def main(argv: list[str]) -> int:
    end_with_parent()
    sock = socket.socket(fileno=int(argv[0]))
    worker = _Worker(sock, int(argv[1]))
    is_confined = give_up_rights(_MEMORY_BYTES, _CPU_S)
    try:
        worker.tell(ParserReady(is_confined))
        while (message := worker.hear()) is not None:
            if isinstance(message, Ask):
                worker.answer(message)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0  # the asker has ended
    except (ProtocolError, MemoryError, RecursionError, ValueError) as error:
        traceback.print_exception(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))
