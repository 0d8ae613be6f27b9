# SPDX-License-Identifier: Apache-2.0
"""The two kinds of disks that a monitor backs up: those it serves itself, and a QEMU's."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vmapipe.control.monitor.backup_runner import BackupRunner
from vmapipe.control.monitor.guards import Guards
from vmapipe.control.qemu.disks import disk_names
from vmapipe.control.qmp.addresses import parse_address
from vmapipe.control.qmp.client import open_link
from vmapipe.control.qmp.connection import Answer, Command
from vmapipe.control.qmp.server import Arguments, CommandHandler, DeferredAnswer, QmpError
from vmapipe.runtime.errors import Failure

# Each may take some seconds where QEMU does not answer: more is no use.
_MAX_QUESTIONS = 16

OnAnswers = Callable[[list[Any] | QmpError], None]


class QemuQueries:
    """Queries to QEMU in a thread, because it may be slow or busy; its monitor is held for a moment
    each.

    One at a time. `fd` is readable when `poll` has answers to give."""

    def __init__(self, address: str, *, share: bool) -> None:
        """Start the thread. Raises UsageError for what is not an address."""
        self._address = address
        self._share = share
        parse_address(address)
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._questions: queue.SimpleQueue[tuple[Sequence[str], OnAnswers]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[OnAnswers, list[Any] | QmpError]] = (
            queue.SimpleQueue()
        )
        self._pending = 0
        # A daemon: at the end a QEMU that does not answer is not waited for.
        threading.Thread(target=self._work, name="queries", daemon=True).start()

    def ask(self, commands: Sequence[str], then: OnAnswers) -> None:
        """`then` gets an answer for each, or what went wrong, from within `poll`. Raises QmpError."""
        if self._pending >= _MAX_QUESTIONS:
            raise QmpError(f"{self._address}: QEMU does not answer, and others wait for it already")
        self._pending += 1
        self._questions.put((commands, then))

    def poll(self) -> None:
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


_SEPARATORS = re.compile("[,;:]")


class BackupDevice(NamedTuple):
    """A device that can be backed up.

    `aliases`: its names; `unasked`: it is taken when none is named.
    """

    aliases: frozenset[str]
    has_medium: bool = True
    read_only: bool = False
    unasked: bool = True


def split_devlist(text: str) -> list[str]:
    """The names, separated by `,`, `;` or `:`; each once."""
    return list(dict.fromkeys(word for word in _SEPARATORS.split(text) if word))


def check_devices(devices: Sequence[BackupDevice], devlist: str | None) -> list[str]:
    """The names to back up, none: all that can be. Raises QmpError."""
    if devlist is None:
        if not any(d.unasked and d.has_medium and not d.read_only for d in devices):
            raise QmpError("empty device list")
        return []
    names = split_devlist(devlist)
    if not names:
        raise QmpError("empty device list")
    for name in names:
        found = next((device for device in devices if name in device.aliases), None)
        if found is None:
            raise QmpError(f"Device '{name}' not found", "DeviceNotFound")
        if not found.has_medium:
            raise QmpError(f"Device '{name}' has no medium")
        if found.read_only:
            raise QmpError(f"Device '{name}' is read only")
    return names


def machine_devices(blocks: Sequence[Answer], nodes: Sequence[Answer]) -> list[BackupDevice]:
    """Return the devices in a QEMU's answers to query-block and query-named-block-nodes."""
    devices = []
    for block in blocks:
        inserted = block.get("inserted")
        read_only = bool(inserted and inserted.get("ro"))
        devices.append(BackupDevice(disk_names(block).aliases, bool(inserted), read_only))
    for node in nodes:
        words = frozenset({str(node.get("node-name", ""))} - {""})
        devices.append(BackupDevice(words, read_only=bool(node.get("ro")), unasked=False))
    return devices


def served_blocks(disks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The answer to `query-block`, from the disks that a monitor serves itself."""
    return [
        {
            "device": disk["name"],
            "type": "unknown",
            "locked": False,
            "removable": False,
            "inserted": {
                "file": disk["path"],
                "drv": "raw",
                "ro": False,
                "encrypted": False,
                "image": {
                    "filename": disk["path"],
                    "format": "raw",
                    "virtual-size": disk["size"],
                },
            },
        }
        for disk in disks
    ]


OnDevices = Callable[[list[BackupDevice] | QmpError], None]


class ServedDisks:
    """Disks that the monitor serves; a backup asks the monitor for their guards."""

    takes_state = False

    def __init__(self, guards: Guards, listen: str) -> None:
        self.argv: Sequence[str] = (f"--monitor={listen}",)
        self._guards = guards

    def look_up(self, then: OnDevices) -> None:
        then([BackupDevice(frozenset({disk.name})) for disk in self._guards.disks])

    def commands(self) -> Mapping[str, CommandHandler]:
        return {
            "query-disks": self._describe,
            "query-block": lambda arguments: served_blocks(self._describe(arguments)),
        }

    def _describe(self, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        Arguments(arguments).end()
        return self._guards.describe()


class MachineDisks:
    """The disks of a QEMU.

    While a backup runs QEMU's monitor is its own, and earlier answers are repeated.

    Unless they share it: then each connects for a moment.
    """

    def __init__(
        self, address: str, queries: QemuQueries, jobs: BackupRunner, *, share: bool
    ) -> None:
        self.argv: Sequence[str] = (f"--qmp={address}", *(["--qmp-share"] if share else []))
        self.takes_state = not share
        self._share = share
        self._queries = queries
        self._jobs = jobs
        self._blocks: list[Any] | None = None

    def look_up(self, then: OnDevices) -> None:
        def take(answers: list[Any] | QmpError) -> None:
            if isinstance(answers, QmpError):
                then(answers)
                return
            self._blocks, nodes = answers
            then(machine_devices(self._blocks or (), nodes))

        self._queries.ask(("query-block", "query-named-block-nodes"), take)

    def commands(self) -> Mapping[str, CommandHandler]:
        return {"query-block": self._query_block, "query-status": self._query_status}

    def _query_block(self, arguments: dict[str, Any]) -> Any:
        Arguments(arguments).end()
        if self._jobs.busy and not self._share and self._blocks is not None:
            return self._blocks
        return self._ask("query-block")

    def _query_status(self, arguments: dict[str, Any]) -> Any:
        Arguments(arguments).end()
        return self._ask("query-status")

    def _ask(self, command: str) -> DeferredAnswer:
        """Ask QEMU one command. Raises QmpError."""
        if self._jobs.busy and not self._share:
            raise QmpError("QEMU's monitor serves one client at a time, and a backup has it now")
        later = DeferredAnswer()

        def take(answers: list[Any] | QmpError) -> None:
            if isinstance(answers, QmpError):
                later.refuse(answers)
            else:
                later.answer(answers[0])

        self._queries.ask((command,), take)
        return later
