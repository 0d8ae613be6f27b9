# SPDX-License-Identifier: Apache-2.0
"""One connection in its transmission phase: tasks under way, sent and answered without waiting."""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Mapping
from typing import NamedTuple

from vmapipe.producer.pull.export import OpenExport, WantsToSend
from vmapipe.protocol.errors import ProtocolError
from vmapipe.protocol.nbd.client_transfer import NbdClientTransmission
from vmapipe.protocol.nbd.constants import (
    NBD_CMD_FLAG_DF,
    NBD_CMD_READ,
    NBD_FLAG_SEND_DF,
)
from vmapipe.protocol.nbd.reply import Data, Hole, ReplyEvent, RequestDone, RequestFailed, Status
from vmapipe.protocol.nbd.session import encode_request
from vmapipe.runtime.errors import os_error_text

# One visit takes no more: others wait, too, and what is read next is to be asked for in time.
_MOST_RECEIVES = 8
# The kernel waits for the rest of an answer's data: a socket holds 200 KB, and Python would be woken for
# each. On a Unix socket that takes 5 % less of the processors, and 6 % more on the clock. Not for longer
# than this: another connection may have something, or the archiver.
_REST_OF_DATA = struct.pack("@ll", 0, 10_000)


class ConnectionLost(Exception):
    """The connection is over: closed, reset, or its data damaged on the way; another one may do."""


class Task:
    """A request, and where its answer goes. It may be sent again on another connection."""

    __slots__ = ("about", "in_chunks", "into", "kind", "length", "offset", "position", "tries")

    def __init__(
        self,
        kind: int,
        offset: int,
        length: int,
        into: memoryview | None = None,
        about: object = None,
        position: int | None = None,
    ) -> None:
        """`kind`: NBD_CMD_READ (with `into`, of `length` bytes), _BLOCK_STATUS or _TRIM.

        `position`: where `into` begins in the ring; None: it lies elsewhere.
        """
        self.kind = kind
        self.offset = offset
        self.length = length
        self.into = into
        #: What it is for, as whoever submits it knows it.
        self.about = about
        self.position = position
        #: How many connections were lost over it.
        self.tries = 0
        #: It cannot be answered in one piece.
        self.in_chunks = False


class Answer(NamedTuple):
    """A task that is done: with NBD_SUCCESS, or `error` and what the server says of it."""

    task: Task
    error: int = 0
    words: str = ""
    #: Where it failed.
    offset: int = 0
    #: Of a block status, by the metadata contexts' names.
    statuses: Mapping[str, Status] = {}


class ExportConnection:
    """`fileno` becomes readable when answers come, and `wants_out` tells when writable matters."""

    def __init__(self, opened: OpenExport) -> None:
        self.session = opened.session
        self._socket = opened.socket
        self._socket.setblocking(False)
        self._at_once = self._whole = 0
        # What TLS holds the kernel cannot wait for.
        if isinstance(opened.socket, socket.socket):
            opened.socket.setblocking(True)
            opened.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _REST_OF_DATA)
            self._at_once, self._whole = socket.MSG_DONTWAIT, socket.MSG_WAITALL
        self._codec = NbdClientTransmission(opened.session)
        self._tasks: dict[int, Task] = {}
        # Of the task whose answer is being read.
        self._failed: dict[int, RequestFailed] = {}
        self._statuses: dict[int, dict[str, Status]] = {}
        self._contexts = {context.id: context.name for context in opened.session.meta_contexts}
        self._out = bytearray()
        self._is_blocked = False
        # The rest of an answer's data takes longer.
        self._is_stalled = False
        # What the next visit has to tell.
        self._fault: Exception | None = None
        #: The last visit ended before all was read.
        self.has_more = False
        #: Since when nothing has been answered.
        self.progress_at = 0.0
        can_df = opened.session.structured and opened.session.flags & NBD_FLAG_SEND_DF
        # A read in one piece: QEMU's server looks for holes in it else, and hangs up, with a
        # word to its stderr only, where the image cannot be read.
        self._read_flags = NBD_CMD_FLAG_DF if can_df else 0

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def in_flight(self) -> int:
        return len(self._tasks)

    @property
    def wants_out(self) -> bool:
        return bool(self._out) or self._is_blocked

    @property
    def oldest(self) -> Task | None:
        return next(iter(self._tasks.values()), None)

    def start(self, task: Task) -> None:
        """Raises ConnectionLost, ProtocolError."""
        if not self._tasks:
            self.progress_at = time.monotonic()
        whole = task.kind == NBD_CMD_READ and not task.in_chunks
        flags = self._read_flags if whole else 0
        request = self._codec.request(task.kind, task.offset, task.length, flags)
        self._tasks[request.cookie] = task
        self._out += encode_request(request)

    def flush(self) -> None:
        """Send what can be sent now. Raises ConnectionLost."""
        try:
            while self._out:
                del self._out[: self._socket.send(self._out, self._at_once)]
        except (BlockingIOError, WantsToSend):
            return
        except OSError as error:
            raise ConnectionLost(os_error_text(error)) from error

    def receive(self) -> list[Answer]:
        """Take in what has come. Raises ConnectionLost, ProtocolError; what was answered before counts."""
        answers: list[Answer] = []
        self._is_blocked = self._is_stalled = self.has_more = False
        if self._fault is not None:
            raise self._fault
        try:
            for _ in range(_MOST_RECEIVES):
                for event in self._take():
                    self._note(event, answers)
                if self._is_stalled:
                    break
            else:
                self.has_more = True
        except BlockingIOError:
            pass
        except WantsToSend:
            self._is_blocked = True
        except (ConnectionLost, ProtocolError) as fault:
            if not answers:
                raise
            self._fault, self.has_more = fault, True
        if answers:
            self.progress_at = time.monotonic()
        return answers

    def _take(self) -> list[ReplyEvent]:
        """One message, or a piece of one; data goes from the socket into place."""
        payload = self._codec.payload
        try:
            if payload is not None:
                task = self._tasks[payload.cookie]
                start = payload.offset - task.offset
                target = _target(task)[start : start + payload.length]
                count = self._socket.recv_into(target, 0, self._whole)
                self._is_stalled = count < payload.length
                events = self._codec.took(count)
            else:
                head = self._socket.recv(self._codec.wanted_bytes, self._at_once)
                count = len(head)
                events = list(self._codec.feed(head))
        except (BlockingIOError, WantsToSend):
            raise
        except OSError as error:
            raise ConnectionLost(os_error_text(error)) from error
        if not count:
            raise ConnectionLost("its server has hung up")
        return events

    def _note(self, event: ReplyEvent, answers: list[Answer]) -> None:
        task = self._tasks[event.cookie]
        match event:
            case Hole(_, offset, length):
                start = offset - task.offset
                _target(task)[start : start + length] = bytes(length)
            case Status(cookie, context_id):
                name = self._contexts[context_id]
                self._statuses.setdefault(cookie, {})[name] = event
            case RequestFailed():
                self._failed.setdefault(event.cookie, event)
            case RequestDone(cookie, error):
                del self._tasks[cookie]
                failed = self._failed.pop(cookie, None)
                statuses = self._statuses.pop(cookie, {})
                words, offset = "", task.offset
                if error:
                    words = os.strerror(error)
                    if failed is not None and failed.message:
                        words += f"; {failed.message}"
                    if failed is not None and failed.offset is not None:
                        offset = failed.offset
                answers.append(Answer(task, error, words, offset, statuses))
            case Data():
                raise RuntimeError("data that was not received in place")

    def unanswered(self) -> list[Task]:
        """The tasks under way, oldest first; they are no longer this connection's."""
        tasks = [*self._tasks.values()]
        self._tasks.clear()
        return tasks

    def ask(self, task: Task, deadline: float) -> Answer:
        """Send one task alone, and wait for its answer. Raises ConnectionLost, ProtocolError, TimeoutError."""
        self.start(task)
        poll = select.poll()
        while True:
            self.flush()
            if answers := self.receive():
                return answers[0]
            poll.register(self._socket, select.POLLIN | (select.POLLOUT * self.wants_out))
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(1000 * left + 1):
                raise TimeoutError

    def close(self, *, politely: bool = False) -> None:
        """`politely`: say so to the server, if nothing hinders."""
        if politely and not self._out:
            try:
                self._socket.send(self._codec.disconnect(), self._at_once)
            except (OSError, WantsToSend):
                pass  # it is closed anyway
        self._socket.close()


def _target(task: Task) -> memoryview:
    if task.into is None:
        raise RuntimeError("data for a request that has no place for it")
    return task.into
