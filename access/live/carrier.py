# SPDX-License-Identifier: Apache-2.0
"""What a live restore moves disks by: QEMU's own monitor, or whoever has it (libvirt).

A carrier says what QEMU has now in the words of moves.py, and carries its commands out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from vmapipe.access.live.moves import MirrorState, Move
from vmapipe.access.live.nodes import LiveDisk
from vmapipe.access.live.qemu import check_policies
from vmapipe.control.qemu.graph import Graph
from vmapipe.control.qmp.connection import Answer, Command, Qmp, QmpLink, QmpRefused


class Sight(NamedTuple):
    """What is there now; each as of `MachineView`."""

    run_state: str
    jobs: dict[str, MirrorState]
    nodes: frozenset[str]
    used: frozenset[str]
    broken: frozenset[str]


class MoveCarrier(Qmp, Protocol):
    """The way to a machine. `execute` takes the commands of moves.py. Raises QmpRefused, QmpGone."""

    @property
    def fd(self) -> int:
        """Readable when it is worth looking."""

    def moves(self, disks: Sequence[LiveDisk]) -> list[Move]:
        """Return the ways of the disks, in the names that it has for them."""

    def check_policies(self, nodes: Sequence[str]) -> None:
        """Refuse a machine whose guest would see an I/O error. Raises UsageError, QmpGone."""

    def look(self) -> Sight:
        """Ask for all that matters. Raises QmpGone."""

    def drop_events(self) -> None:
        """Forget what has made `fd` readable."""


class MonitorCarrier:
    """A machine by a monitor that is ours."""

    def __init__(self, qmp: QmpLink) -> None:
        self._qmp = qmp

    @property
    def fd(self) -> int:
        return self._qmp.fd

    def moves(self, disks: Sequence[LiveDisk]) -> list[Move]:
        return [disk.move for disk in disks]

    def check_policies(self, nodes: Sequence[str]) -> None:
        check_policies(self._qmp, nodes)

    def execute(self, command: Command) -> Any:
        return self._qmp.execute(command)

    def drop_events(self) -> None:
        self._qmp.events()

    def look(self) -> Sight:
        status = self._ask("query-status") or {}
        block_jobs = {job["device"]: job for job in self._ask("query-block-jobs")}
        jobs = {
            job["id"]: _job(job, block_jobs.get(job["id"], {})) for job in self._ask("query-jobs")
        }
        nodes = self._qmp.execute(Command("query-named-block-nodes", {"flat": True}))
        blocks = self._ask("query-block") or []
        graph = Graph(nodes, self._ask("x-debug-query-block-graph"))
        return Sight(
            "running" if status.get("running") else str(status.get("status", "")),
            jobs,
            frozenset(str(node.get("node-name", "")) for node in nodes),
            graph.in_use() | _inserted(blocks),
            _broken(blocks, graph),
        )

    def _ask(self, name: str) -> Any:
        """None where this QEMU does not know the command, or does not give the answer."""
        with contextlib.suppress(QmpRefused):
            return self._qmp.execute(Command(name, {}))
        return None


def _job(job: Answer, block_job: Answer) -> MirrorState:
    return MirrorState(
        str(job["status"]),
        str(job.get("error", "")),
        str(block_job.get("io-status", "ok")),
        int(block_job.get("speed", 0)),
        int(block_job.get("offset", 0)),
        int(block_job.get("len", 0)),
    )


def _inserted(blocks: Sequence[Answer]) -> frozenset[str]:
    return frozenset(str((block.get("inserted") or {}).get("node-name", "")) for block in blocks)


def _broken(blocks: Sequence[Answer], graph: Graph) -> frozenset[str]:
    """Return the nodes of devices whose last request failed, and all below."""
    failed = [block for block in blocks if block.get("io-status", "ok") != "ok"]
    return frozenset(node for top in _inserted(failed) for node in graph.tree(top))
