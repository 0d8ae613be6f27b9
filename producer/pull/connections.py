# SPDX-License-Identifier: Apache-2.0
"""The connections to one export: what is to be asked goes to whichever is free, and a lost one is replaced."""

from __future__ import annotations

import os
import select
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from vmapipe.producer.pull.arguments import ANSWER_S
from vmapipe.producer.pull.connection import Answer, ConnectionLost, ExportConnection, Task
from vmapipe.producer.pull.export import OPEN_S, CannotOpen, ExportError, OpenExport
from vmapipe.producer.pull.shared_queue import SharedQueue
from vmapipe.protocol.errors import ProtocolError
from vmapipe.protocol.nbd.constants import (
    BASE_ALLOCATION,
    DIRTY_BITMAP,
    NBD_CMD_READ,
    NBD_EOVERFLOW,
    NBD_FLAG_CAN_MULTI_CONN,
)
from vmapipe.protocol.nbd.session import Export, NbdSession
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.threads import DaemonPool

# QEMU's server works on 16 requests of a connection at once, nbdkit's has 16 threads.
_IN_FLIGHT = 16
# Four, as nbdcopy has, took longer than two in the few runs that compared them, on a busy machine;
# why was not looked into. Where a server is one thread, more change nothing.
_CONNECTIONS = 2
# Below it a second one costs more than it saves.
_WORTH_BYTES = 64 << 20
# A server that is being started again is back within it.
RECONNECT_S = 30.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
# What connection after connection is lost over is what the server dies of.
_MOST_TRIES = 3
# Whether answers come in time is looked at so often: a fraction of the shortest limit.
_CHECK_S = 0.1
# Beyond what a loaded machine may oversleep: then we were stopped (Ctrl-Z).
_STOPPED_S = 5.0


@dataclass(frozen=True)
class Endpoint:
    """An export and how to reach it. `shown`: for messages.

    `open_` waits until a deadline, and asks for metadata contexts: base:allocation, and that of `bitmap`,
    the dirty bitmap that tells what has to be read; empty: all has.

    `is_ours`: the server is a child of ours, which is not tried again when it has hung up; `reason`
    tells what is known of that.
    """

    name: str
    shown: str
    open_: Callable[[float, Sequence[str]], OpenExport]
    bitmap: str = ""
    is_ours: bool = False
    reason: Callable[[], str] = str
    answer_s: float = ANSWER_S

    @property
    def bitmap_context(self) -> str:
        return DIRTY_BITMAP + self.bitmap if self.bitmap else ""


class ExportConnections:
    """Raises ExportError, with device and offset, for all that cannot be mended.

    `fd` becomes readable when there is something to do.
    """

    def __init__(self, endpoint: Endpoint, cancel: Cancel) -> None:
        """Return when the first connection is there. Raises ExportError, Cancelled."""
        self._endpoint = endpoint
        #: The metadata contexts that are asked for.
        self.contexts = tuple(filter(None, (BASE_ALLOCATION, endpoint.bitmap_context)))
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._pool = DaemonPool(1, "nbd-open")
        self._opening: Future[ExportConnection] | None = None
        self._is_closed = False
        self._queue: deque[Task] = deque()
        self._shared: SharedQueue | None = None
        self._by_fd: dict[int, ExportConnection] = {}
        self._masks: dict[int, int] = {}
        self._wanted = 1
        # Of a lost export: since when, when to try again, and the pauses between.
        self._lost_at = self._retry_at = self._pumped_at = self._checked_at = 0.0
        self._pause_s = _FIRST_PAUSE_S
        self._last_words = ""
        #: Bytes of the disk, and their offset: whoever has others there is another disk.
        self.fingerprint: tuple[int, bytes] | None = None
        # What every later connection is compared with.
        self._first: NbdSession | None = None
        try:
            self._first = self.session = self._open_first(cancel)
        except BaseException:
            self.close()
            raise
        export = self.export
        if export.flags & NBD_FLAG_CAN_MULTI_CONN and export.size_bytes >= _WORTH_BYTES:
            self._wanted = 1 if endpoint.is_ours else _CONNECTIONS

    @property
    def fd(self) -> int:
        return self._epoll.fileno()

    @property
    def export(self) -> Export:
        return self.session.export

    @property
    def count(self) -> int:
        return len(self._by_fd)

    @property
    def outstanding(self) -> int:
        """How many tasks are not answered."""
        shared = self._shared.in_flight if self._shared else 0
        return len(self._queue) + shared + sum(c.in_flight for c in self._by_fd.values())

    @property
    def has_room(self) -> bool:
        """Whether more tasks would be sent at once, or soon."""
        return len(self._queue) < _IN_FLIGHT * max(1, self._wanted)

    def submit(self, task: Task) -> None:
        if self._shared is not None and self._shared.takes(task):
            self._shared.start(task)
        else:
            self._queue.append(task)

    def longest_read(self, wanted_bytes: int) -> int:
        """Return how much to read by one request; over NBD no more than `wanted_bytes`."""
        most_bytes = self.session.max_data_bytes
        # What nobody copies costs less, the fewer the requests are.
        return most_bytes if self._shared is not None else min(wanted_bytes, most_bytes)

    def share(self, queue: SharedQueue) -> None:
        """Have what it takes read that way; it is closed with these connections."""
        self._shared = queue
        self._epoll.register(queue.fd, select.EPOLLIN)
        # Readable: the daemon has closed it, for it says nothing unasked.
        self._epoll.register(queue.hang_up_fd, select.EPOLLIN)

    def ask_bitmap_alone(self) -> None:
        """Go on with connections on which a block status tells of the dirty bitmap and nothing else."""
        self.contexts = (self._endpoint.bitmap_context,)
        self._lost_at = time.monotonic()
        for connection in [*self._by_fd.values()]:
            self._queue.extendleft(reversed(self._drop(connection)))

    def _tells_too_much(self, connection: ExportConnection) -> bool:
        return any(
            context.name not in self.contexts for context in connection.session.meta_contexts
        )

    def pump(self, wait_s: float) -> list[Answer] | None:
        """Send what can be sent, wait for at most `wait_s`, and return what was answered.

        None: nothing at all has come.
        """
        now = time.monotonic()
        if now - self._pumped_at > _STOPPED_S:
            # This process itself was stopped, or had no time: a server's silence does not count.
            for way in self._ways():
                way.progress_at = now
        self._keep_connected(now)
        # It is asked several thousand times a second, and mostly has nothing to send.
        if self._queue or any(c.wants_out for c in self._by_fd.values()):
            self._dispatch()
        if self._shared is not None:
            self._shared.flush()
        more = [c for c in self._by_fd.values() if c.has_more]
        events = self._epoll.poll(0 if more else wait_s)
        ready = dict.fromkeys(more)
        answers: list[Answer] = []
        has_come = False
        for fd, _ in events:
            if fd == self._wake:
                self._take_opened()
            elif self._shared is not None and fd == self._shared.fd:
                has_come = True
                answers += self._take_shared(self._shared)
            elif self._shared is not None and fd == self._shared.hang_up_fd:
                raise self._hung_up("the daemon has closed the queue that its reads come by")
            elif fd in self._by_fd:
                ready[self._by_fd[fd]] = None
        for connection in ready:
            answers += self._visit(connection)
        self._pumped_at = now = time.monotonic()
        if now - self._checked_at >= _CHECK_S:
            self._checked_at = now
            self._check_progress(now)
        if not ready and not has_come:
            return None
        return [answer for answer in answers if not self._is_asked_again(answer)]

    def close(self) -> None:
        """Again: nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        for connection in self._by_fd.values():
            connection.close(politely=not connection.in_flight)
        self._by_fd.clear()
        if self._shared is not None:
            self._shared.close()
        self._epoll.close()
        self._pool.close()
        if self._opening is None:
            os.close(self._wake)
        else:
            self._opening.add_done_callback(self._close_late)

    # --- connections that come ---

    def _open_first(self, cancel: Cancel) -> NbdSession:
        future = self._open()
        self._epoll.register(cancel.fd, select.EPOLLIN)
        # Names are looked up without a limit that we could set.
        deadline = time.monotonic() + OPEN_S
        try:
            while not future.done():
                cancel.check()
                self._epoll.poll(max(0.0, deadline - time.monotonic()))
                if time.monotonic() >= deadline and not future.done():
                    raise self._failure(f"{self._endpoint.shown}: no answer within {OPEN_S:.0f} s")
        finally:
            self._epoll.unregister(cancel.fd)
        self._take_wake()
        self._opening = None
        try:
            connection = future.result()
        except CannotOpen as error:
            raise self._failure(str(error)) from error
        if not connection.session.export.size_bytes:
            connection.close()
            raise self._failure("it is empty: nothing to back up")
        self._add(connection)
        return connection.session

    def _open(self) -> Future[ExportConnection]:
        """Begin to open one more connection; `_wake` tells when that is done."""
        future = self._pool.submit(self._opened)
        self._opening = future
        future.add_done_callback(self._tell_done)
        return future

    def _tell_done(self, future: Future[ExportConnection]) -> None:
        if not self._is_closed:
            os.eventfd_write(self._wake, 1)

    def _close_late(self, future: Future[ExportConnection]) -> None:
        """It was still being opened when all was closed."""
        os.close(self._wake)
        if not future.cancelled() and future.exception() is None:
            future.result().close()

    def _opened(self) -> ExportConnection:
        """In a thread. Raises CannotOpen, _AnotherDisk."""
        deadline = time.monotonic() + OPEN_S
        connection = ExportConnection(self._endpoint.open_(deadline, self.contexts))
        try:
            self._check_identity(connection, deadline)
        except BaseException:
            connection.close()
            raise
        return connection

    def _check_identity(self, connection: ExportConnection, deadline: float) -> None:
        if self._first is None:
            return
        ours, theirs = self._first.export, connection.session.export
        for what, one, other in (
            ("size in bytes", ours.size_bytes, theirs.size_bytes),
            ("name", ours.name, theirs.name),
            ("transmission flags", f"{ours.flags:#x}", f"{theirs.flags:#x}"),
            ("block sizes", ours.block_sizes, theirs.block_sizes),
            ("dirty bitmap", self._bitmap_of(self._first), self._bitmap_of(connection.session)),
        ):
            if one != other:
                raise _AnotherDisk(f"its {what} was {one} and is {other}")
        if self.fingerprint is None:
            return
        offset, wanted = self.fingerprint
        found = bytearray(len(wanted))
        task = Task(NBD_CMD_READ, offset, len(wanted), memoryview(found))
        try:
            answer = connection.ask(task, deadline)
        except (ConnectionLost, ProtocolError) as error:
            raise CannotOpen(f"{self._endpoint.shown}: {error}") from error
        except TimeoutError:
            raise CannotOpen(f"{self._endpoint.shown}: no answer within {OPEN_S:.0f} s") from None
        if answer.error:
            raise CannotOpen(f"{self._endpoint.shown}: {answer.words}")
        if found != wanted:
            raise _AnotherDisk(f"other bytes are at offset {offset}")

    def _bitmap_of(self, session: NbdSession) -> str:
        is_there = session.context_id(self._endpoint.bitmap_context) is not None
        return self._endpoint.bitmap if is_there else "not there"

    def _take_wake(self) -> None:
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            pass  # told before

    def _take_opened(self) -> None:
        self._take_wake()
        future, self._opening = self._opening, None
        if future is None or not future.done():
            self._opening = future
            return
        try:
            connection = future.result()
            if self._tells_too_much(connection):
                connection.close(politely=True)  # it was on its way before
            else:
                self._add(connection)
        except _AnotherDisk as error:
            raise self._failure(
                f"{self._endpoint.shown} is another disk than before: {error}"
            ) from error
        except CannotOpen as error:
            self._last_words = str(error)
            # Fewer will do; without any it is tried again.
            self._wanted = max(1, len(self._by_fd))
            self._retry_at = time.monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def _add(self, connection: ExportConnection) -> None:
        fd = connection.fileno()
        self._by_fd[fd] = connection
        self._masks[fd] = select.EPOLLIN
        self._epoll.register(fd, select.EPOLLIN)
        self._lost_at, self._pause_s = 0.0, _FIRST_PAUSE_S

    def _keep_connected(self, now: float) -> None:
        if self._opening is None and len(self._by_fd) < self._wanted and now >= self._retry_at:
            self._open()
        if not self._by_fd and now - self._lost_at > RECONNECT_S:
            raise self._at_oldest(
                f"the connection is lost, and not back within {RECONNECT_S:.0f} s: "
                f"{self._last_words}"
            )

    # --- connections that are there ---

    def _dispatch(self) -> None:
        """Spread what waits; those with the least under way first."""
        for connection in sorted(self._by_fd.values(), key=lambda c: c.in_flight):
            try:
                while self._queue and connection.in_flight < _IN_FLIGHT:
                    connection.start(self._queue[0])
                    self._queue.popleft()
                connection.flush()
            except (ConnectionLost, ProtocolError) as error:
                self._lose(connection, error)
            else:
                self._watch(connection)

    def _take_shared(self, queue: SharedQueue) -> list[Answer]:
        """What could not be read is asked for once more over NBD, where the answer says why."""
        try:
            done = queue.answers()
        except ValueError as error:
            raise self._at_oldest(str(error)) from error
        self._queue.extend(task for task, is_ok in done if not is_ok)
        return [Answer(task) for task, is_ok in done if is_ok]

    def _visit(self, connection: ExportConnection) -> list[Answer]:
        try:
            answers = connection.receive()
        except (ConnectionLost, ProtocolError) as error:
            self._lose(connection, error)
            return []
        self._watch(connection)
        return answers

    def _watch(self, connection: ExportConnection) -> None:
        fd = connection.fileno()
        mask = select.EPOLLIN | (select.EPOLLOUT * connection.wants_out)
        if self._masks[fd] != mask:
            self._masks[fd] = mask
            self._epoll.modify(fd, mask)

    def _lose(self, connection: ExportConnection, error: Exception) -> None:
        """Raises ExportError when no other connection would help."""
        tasks = self._drop(connection)
        self._queue.extendleft(reversed(tasks))
        if isinstance(error, ProtocolError):
            raise self._at_oldest(str(error)) from error
        if self._endpoint.is_ours:
            raise self._hung_up(str(error)) from error
        for task in tasks[:1]:
            # Answers come in any order, but what it died of is most likely the oldest.
            task.tries += 1
            if task.tries >= _MOST_TRIES:
                raise self._at_oldest(f"{error}, {task.tries} times") from error
        if not self._by_fd:
            self._lost_at = time.monotonic()
            self._last_words = str(error)

    def _hung_up(self, text: str) -> ExportError:
        """What is known of a server of ours that does not answer any more."""
        reason = self._endpoint.reason()
        return self._at_oldest(f"{text}; {reason}" if reason else text)

    def _drop(self, connection: ExportConnection) -> list[Task]:
        """Close it, and return what was under way on it."""
        fd = connection.fileno()
        self._epoll.unregister(fd)
        del self._by_fd[fd], self._masks[fd]
        tasks = connection.unanswered()
        connection.close()
        return tasks

    def _check_progress(self, now: float) -> None:
        limit_s = self._endpoint.answer_s
        for way in self._ways():
            if way.in_flight and now - way.progress_at > limit_s:
                oldest = way.oldest
                raise self._failure_at(
                    oldest.offset if oldest else 0,
                    f"no answer for {limit_s:.0f} s (--nbd-timeout)",
                )

    def _ways(self) -> Iterator[ExportConnection | SharedQueue]:
        """Yield all that may owe an answer."""
        yield from self._by_fd.values()
        if self._shared is not None:
            yield self._shared

    def _is_asked_again(self, answer: Answer) -> bool:
        """An answer in one piece was asked for, and is too large for the server: take several."""
        if answer.error != NBD_EOVERFLOW or answer.task.in_chunks:
            return False
        answer.task.in_chunks = True
        self._queue.appendleft(answer.task)
        return True

    def _at_oldest(self, text: str) -> ExportError:
        oldest = self._queue[0] if self._queue else None
        if oldest is None and self._shared is not None:
            oldest = self._shared.oldest
        return self._failure_at(oldest.offset if oldest else 0, text)

    def _failure_at(self, offset: int, text: str) -> ExportError:
        return self._failure(f"cannot read near offset {offset}: {text}")

    def _failure(self, text: str) -> ExportError:
        return ExportError(f"disk {self._endpoint.name!r}: {text}")


class _AnotherDisk(Exception):
    """The export is not the one that was read before."""
