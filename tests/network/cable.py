# SPDX-License-Identifier: Apache-2.0
"""A cable between a producer and an archiver, in the test's hands: cut, slow, late, noisy.

TCP is passed on byte for byte. `tc netem` would do this in the kernel, but few
machines of continuous integration have it.
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator

_PIECE_BYTES = 1 << 16
# A direction holds so much at most, as a network would.
_HELD_BYTES = 1 << 20


class _Pipe:
    """One direction of one connection."""

    def __init__(self, source: socket.socket, target: socket.socket, *, is_back: bool) -> None:
        self.is_back = is_back
        self.source, self.target = self.ends = source, target
        # (when it may arrive, what)
        self.held: deque[tuple[float, bytes]] = deque()
        self.held_bytes = 0
        #: The source has said its last; the target has heard so, behind all that came before.
        self.is_at_end = self.is_over = False


class Cable:
    """Listens at `endpoint` and leads to `target`, until closed. All attributes may be changed."""

    def __init__(self, target: str, seed: int = 1) -> None:
        host, port = target.removeprefix("tcp://").split(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.delay_s = 0.0
        self.bytes_s = 0.0
        #: The share of pieces in which one bit is turned round.
        self.noise = 0.0
        #: Nothing passes, and nobody is told.
        self.cut = False
        #: What the archiver answers passes, too.
        self.backwards = True
        #: Connections are ended, and new ones as soon as they are made.
        self.refusing = False
        self.carried_bytes = 0
        #: Of these, what the archiver answered.
        self.answered_bytes = 0
        self.connections = 0
        self._chance = random.Random(seed)
        self._pipes: list[_Pipe] = []
        self._stop = threading.Event()
        self._budget = 0.0
        self._thread = threading.Thread(target=self._run, name="cable")
        self._thread.start()

    def drop(self) -> None:
        """End all connections, as a router that is started again does."""
        self.refusing = True
        while self._pipes:
            time.sleep(0.001)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(0.001):
            now = time.monotonic()
            self._budget = min(self.bytes_s / 10, self._budget + (now - before) * self.bytes_s)
            before = now
            if self.cut:
                continue
            self._accept()
            for pipe in list(self._pipes):
                if self.refusing or not self._carry(pipe, now):
                    self._end(pipe)
        for pipe in list(self._pipes):
            self._end(pipe)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            near, _ = self._listener.accept()
            self.connections += 1
            far = None
            if not self.refusing:
                with contextlib.suppress(OSError):
                    far = socket.create_connection(self._target, timeout=5)
            if far is None:
                _reset(near)
                return
            for each in (near, far):
                each.setblocking(False)
                # A cable does not keep a small piece until an earlier one is acknowledged.
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._pipes += [_Pipe(near, far, is_back=False), _Pipe(far, near, is_back=True)]

    def _carry(self, pipe: _Pipe, now: float) -> bool:
        """Whether the connection still is one."""
        if pipe.is_back and not self.backwards:
            return True
        try:
            for _ in range(64):
                if pipe.held_bytes >= _HELD_BYTES or not self._read(pipe, now):
                    break
            while pipe.held and pipe.held[0][0] <= now:
                if not self._write(pipe):
                    break
        except OSError:
            return False
        return not all(each.is_over for each in self._pipes if each.source in pipe.ends)

    def _read(self, pipe: _Pipe, now: float) -> bool:
        if pipe.is_at_end:
            return False
        try:
            data = pipe.source.recv(_PIECE_BYTES)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            # It was closed, perhaps unread: what it said before is under way and arrives.
            data = b""
        pipe.is_at_end = not data
        if data and self._chance.random() < self.noise:
            at = self._chance.randrange(len(data))
            data = data[:at] + bytes([data[at] ^ 1 << self._chance.randrange(8)]) + data[at + 1 :]
        pipe.held.append((now + self.delay_s, data))
        pipe.held_bytes += len(data)
        return bool(data)

    def _write(self, pipe: _Pipe) -> bool:
        when, data = pipe.held[0]
        if not data:
            pipe.held.popleft()
            pipe.is_over = True
            pipe.target.shutdown(socket.SHUT_WR)
            return False
        allowed = len(data) if not self.bytes_s else int(min(len(data), self._budget))
        if not allowed:
            return False
        try:
            sent = pipe.target.send(data[:allowed])
        except BlockingIOError:
            return False
        self._budget -= sent
        self.carried_bytes += sent
        self.answered_bytes += sent if pipe.is_back else 0
        pipe.held_bytes -= sent
        if sent == len(data):
            pipe.held.popleft()
        else:
            pipe.held[0] = (when, data[sent:])
        return True

    def _end(self, pipe: _Pipe) -> None:
        both = [each for each in self._pipes if each.source in pipe.ends]
        self._pipes = [each for each in self._pipes if each not in both]
        for each in both:
            _reset(each.source)


def _reset(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


@contextlib.contextmanager
def cable_to(target: str, seed: int = 1) -> Iterator[Cable]:
    cable = Cable(target, seed)
    try:
        yield cable
    finally:
        cable.close()
