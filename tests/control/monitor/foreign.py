# SPDX-License-Identifier: Apache-2.0
"""QEMU's own client library, unmodified, made blocking."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qemu.qmp import EventListener, ExecuteError, QMPClient

from tests.machine import LIMIT_S

Answer = dict[str, Any]


class Refused(Exception):
    """The answer was an error, of a class and with a description."""

    def __init__(self, kind: str, desc: str) -> None:
        self.kind = kind
        self.desc = desc
        super().__init__(f"{kind}: {desc}")


class Foreign:
    """One connection; use it by `connected`."""

    def __init__(self, path: Path) -> None:
        self._runner = asyncio.Runner()
        self.client = QMPClient("test")
        self.client.logger.disabled = True
        # Every event, for the whole life of the connection.
        self._listener = EventListener()
        self.client.register_listener(self._listener)
        try:
            self._run(self.client.connect(str(path)))
        except BaseException:
            self._runner.close()
            raise

    def cmd(self, name: str, arguments: Answer | None = None) -> Any:
        """Raises Refused."""
        try:
            return self._run(self.client.execute(name, arguments or {}))
        except ExecuteError as error:
            raise Refused(error.error_class, str(error)) from error

    def human(self, line: str) -> str:
        return str(self.cmd("human-monitor-command", {"command-line": line}))

    def status(self) -> Answer:
        found: Answer = self.cmd("query-backup")
        return found

    def send_fd(self, fd: int) -> None:
        self.client.send_fd_scm(fd)

    def next_event(self, *names: str) -> Answer:
        """Waits for one of these; others are passed over."""

        async def find() -> Answer:
            while True:
                event = dict(await self._listener.get())
                if event["event"] in names:
                    return event

        found: Answer = self._run(find())
        return found

    def end_of_backup(self) -> Answer:
        """The status at the end, as the event tells it."""
        event = self.next_event("BACKUP_COMPLETED", "BACKUP_FAILED", "BACKUP_CANCELLED")
        assert self.status() == event["data"]
        return event

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._run(self.client.disconnect())
        self._runner.close()

    def _run(self, work: Any) -> Any:
        return self._runner.run(asyncio.wait_for(work, LIMIT_S))


@contextlib.contextmanager
def connected(path: Path) -> Iterator[Foreign]:
    client = Foreign(path)
    try:
        yield client
    finally:
        client.close()
