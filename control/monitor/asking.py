# SPDX-License-Identifier: Apache-2.0
"""Asks a running QEMU, in a thread, because it may be slow to answer or somebody else's.

Its monitor serves one client at a time: it is held for the moment of a question.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from vmapipe.control.qmp.addresses import parse_address
from vmapipe.control.qmp.client import open_link
from vmapipe.control.qmp.connection import Command
from vmapipe.control.qmp.server import QmpError
from vmapipe.runtime.errors import Failure

# Each may take some seconds where QEMU does not answer: more is no use.
_MAX_QUESTIONS = 16

Then = Callable[[list[Any] | QmpError], None]


class Asking:
    """One question after the other. `fd` is readable when `look` has answers to give."""

    def __init__(self, address: str, *, share: bool) -> None:
        """Raises UsageError for what is not an address."""
        self._address = address
        self._share = share
        parse_address(address)
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._questions: queue.SimpleQueue[tuple[Sequence[str], Then]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Then, list[Any] | QmpError]] = queue.SimpleQueue()
        self._pending = 0
        # A daemon: at the end nobody waits for a QEMU that does not answer.
        threading.Thread(target=self._work, name="asking", daemon=True).start()

    def ask(self, commands: Sequence[str], then: Then) -> None:
        """`then` gets an answer for each, or what went wrong, from within `look`. Raises QmpError."""
        if self._pending >= _MAX_QUESTIONS:
            raise QmpError(f"{self._address}: QEMU does not answer, and others wait for it already")
        self._pending += 1
        self._questions.put((commands, then))

    def look(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        while True:
            try:
                then, answers = self._answers.get_nowait()
            except queue.Empty:
                return
            self._pending -= 1
            then(answers)

    def _work(self) -> None:
        while True:
            commands, then = self._questions.get()
            self._answers.put((then, self._answer(commands)))
            os.eventfd_write(self.fd, 1)

    def _answer(self, commands: Sequence[str]) -> list[Any] | QmpError:
        try:
            qmp = open_link(self._address, share=self._share)
            try:
                return [qmp.execute(Command(name, {})) for name in commands]
            finally:
                qmp.close()
        except Failure as error:
            return QmpError(str(error))
