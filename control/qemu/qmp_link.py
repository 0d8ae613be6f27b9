# SPDX-License-Identifier: Apache-2.0
"""A QMP connection for the coordinator. The only file that knows qemu.qmp and asyncio."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import socket
import struct
import threading
from collections import deque
from collections.abc import Coroutine
from typing import Any, TypeVar

from vmapipe.control.qemu.qmp import (
    ANSWER_S,
    GREETING_S,
    Command,
    QmpGone,
    QmpRefused,
    hung_up,
    no_greeting,
    not_reached,
)
from vmapipe.runtime.errors import Failure, os_error_text

try:
    from qemu.qmp import ConnectError, ExecuteError, QMPClient, QMPError, Runstate
except ImportError as error:
    raise Failure("running QEMUs need the package qemu.qmp: pip install 'vmapipe[qemu]'") from error

Result = TypeVar("Result")


class QmpLink:
    """Connected from the start until `close`. Raises QmpGone.

    asyncio runs in a thread of its own; nobody outside sees it.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        #: Becomes readable when there are events, or QEMU is gone; `events` clears it.
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._events: deque[dict[str, Any]] = deque()
        self._gone = False
        self._client = QMPClient("vmapipe")
        # Its words would stand between ours; what matters is raised.
        self._client.logger.disabled = True
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="qmp", daemon=True)
        self._thread.start()
        try:
            self._run(self._connect(), GREETING_S + ANSWER_S, no_greeting(path))
        except BaseException:
            self.close()
            raise
        self._tasks = [
            asyncio.run_coroutine_threadsafe(watch(), self._loop)
            for watch in (self._take_events, self._watch_state)
        ]

    @property
    def peer_pid(self) -> int | None:
        """The process at the other end, or who made its socket; None: it is not known."""
        writer = self._client._writer
        sock = writer.get_extra_info("socket") if writer else None
        if sock is None:
            return None
        size = struct.calcsize("3i")
        found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        return int(struct.unpack("3i", found)[0])

    def execute(self, command: Command) -> Any:
        """Raises QmpRefused, QmpGone."""
        late = QmpGone(f"{self.path}: QEMU has not answered {command.name} for {ANSWER_S:.0f} s")
        return self._run(self._execute(command), ANSWER_S, late)

    def give_fd(self, fd: int, name: str) -> None:
        """QEMU gets a copy of a descriptor, under this name. Raises QmpRefused, QmpGone."""
        late = QmpGone(f"{self.path}: QEMU has not answered getfd for {ANSWER_S:.0f} s")
        self._run(self._give_fd(fd, name), ANSWER_S, late)

    def events(self) -> list[dict[str, Any]]:
        """What has come since, in order. Raises QmpGone, after the last."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        found = [self._events.popleft() for _ in range(len(self._events))]
        if not found and self._gone:
            raise hung_up(self.path)
        return found

    def close(self) -> None:
        """Within a bound, whatever state QEMU is in."""
        with contextlib.suppress(QmpGone):
            self._run(self._disconnect(), GREETING_S, hung_up(self.path))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(GREETING_S)
        self._loop.close()
        os.close(self.fd)

    def _run(self, work: Coroutine[Any, Any, Result], limit_s: float, late: QmpGone) -> Result:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(limit_s)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise late from None

    async def _connect(self) -> None:
        try:
            # The library is in order again when this has timed out; cancelled from
            # outside it is not.
            await asyncio.wait_for(self._client.connect(self.path), GREETING_S)
        except TimeoutError as error:
            raise no_greeting(self.path) from error
        except ConnectError as error:
            cause = error.exc
            why = os_error_text(cause) if isinstance(cause, OSError) else str(error)
            raise not_reached(self.path, why) from error
        except (OSError, EOFError, QMPError) as error:
            raise not_reached(self.path, str(error)) from error

    async def _execute(self, command: Command) -> Any:
        try:
            return await self._client.execute(command.name, dict(command.arguments))
        except ExecuteError as error:
            raise QmpRefused(str(error)) from error
        except (OSError, EOFError, QMPError) as error:
            raise hung_up(self.path) from error

    async def _give_fd(self, fd: int, name: str) -> None:
        try:
            self._client.send_fd_scm(fd)
        except (OSError, EOFError, QMPError) as error:
            raise hung_up(self.path) from error
        await self._execute(Command("getfd", {"fdname": name}))

    async def _disconnect(self) -> None:
        # What it raises is why the connection ended before; nobody waits for that.
        with contextlib.suppress(OSError, EOFError, QMPError):
            if self._client.runstate is not Runstate.IDLE:
                await self._client.disconnect()
        mine = asyncio.current_task()
        for task in asyncio.all_tasks():
            if task is not mine:
                task.cancel()
        await asyncio.sleep(0)  # so that they end before the loop does

    async def _take_events(self) -> None:
        while True:
            event = await self._client.events.get()
            self._events.append(dict(event))
            os.eventfd_write(self.fd, 1)

    async def _watch_state(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        self._gone = True
        os.eventfd_write(self.fd, 1)
