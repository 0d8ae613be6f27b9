# SPDX-License-Identifier: Apache-2.0
"""The two kinds of disks that a monitor backs up: those it serves itself, and a QEMU's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vmapipe.control.monitor.arguments import Arguments
from vmapipe.control.monitor.asking import Asking
from vmapipe.control.monitor.devices import Device, machine_devices, served_blocks
from vmapipe.control.monitor.guards import Guards
from vmapipe.control.monitor.jobs import Jobs
from vmapipe.control.qmp.server import Command, Later, QmpError

Then = Callable[[list[Device] | QmpError], None]


class ServedDisks:
    """A backup asks this monitor itself, at its socket, where their guards are."""

    takes_state = False

    def __init__(self, guards: Guards, listen: str) -> None:
        self.words: Sequence[str] = (f"--monitor={listen}",)
        self._guards = guards

    def look_up(self, then: Then) -> None:
        then([Device(frozenset({disk.name})) for disk in self._guards.disks])

    def commands(self) -> Mapping[str, Command]:
        return {
            "query-disks": self._describe,
            "query-block": lambda arguments: served_blocks(self._describe(arguments)),
        }

    def _describe(self, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        Arguments(arguments).end()
        return self._guards.describe()


class MachineDisks:
    """QEMU's monitor belongs to the backup while one runs: what it said before is told then.

    Unless they share it: then each asks for a moment.
    """

    def __init__(self, address: str, asking: Asking, jobs: Jobs, *, share: bool) -> None:
        self.words: Sequence[str] = (f"--qmp={address}", *(["--qmp-share"] if share else []))
        self.takes_state = not share
        self._share = share
        self._asking = asking
        self._jobs = jobs
        self._blocks: list[Any] | None = None

    def look_up(self, then: Then) -> None:
        def take(answers: list[Any] | QmpError) -> None:
            if isinstance(answers, QmpError):
                then(answers)
                return
            self._blocks, nodes = answers
            then(machine_devices(self._blocks or (), nodes))

        self._asking.ask(("query-block", "query-named-block-nodes"), take)

    def commands(self) -> Mapping[str, Command]:
        return {"query-block": self._query_block, "query-status": self._query_status}

    def _query_block(self, arguments: dict[str, Any]) -> Any:
        Arguments(arguments).end()
        if self._jobs.busy and not self._share and self._blocks is not None:
            return self._blocks
        return self._ask("query-block")

    def _query_status(self, arguments: dict[str, Any]) -> Any:
        Arguments(arguments).end()
        return self._ask("query-status")

    def _ask(self, command: str) -> Later:
        """Raises QmpError."""
        if self._jobs.busy and not self._share:
            raise QmpError("QEMU's monitor serves one client at a time, and a backup has it now")
        later = Later()

        def take(answers: list[Any] | QmpError) -> None:
            if isinstance(answers, QmpError):
                later.refuse(answers)
            else:
                later.answer(answers[0])

        self._asking.ask((command,), take)
        return later
