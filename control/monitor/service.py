# SPDX-License-Identifier: Apache-2.0
"""A monitor at its socket, until it is told to stop: clients, backups, and guards or a QEMU."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from vmapipe.control.monitor.backup_runner import BackupRunner
from vmapipe.control.monitor.commands import Commands, Disks
from vmapipe.control.monitor.disks import MachineDisks, QemuQueries, ServedDisks
from vmapipe.control.monitor.guards import Guards, MonitorDisk
from vmapipe.control.qmp.clients import Clients
from vmapipe.control.qmp.sockets import Listener
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.events import Emit

# What happens wakes it; this is for what only time brings (a guard's next start).
_POLL_S = 1.0


def serve_disks(
    disks: list[MonitorDisk],
    options: argparse.Namespace,
    listener: Listener,
    cancel: Cancel,
    emit: Emit,
) -> None:
    """Serve these disks to guests, and back them up when a client asks. Raises Failure."""
    with Guards(
        disks,
        options.socket_mode,
        emit,
        folder=f"{options.listen}.guards",
        insecure_tcp=options.insecure_plain_tcp,
    ) as guards:
        guards.start(cancel)
        jobs = BackupRunner()
        commands = _commands(ServedDisks(guards, options.listen), jobs, options, cancel)
        emit({"event": "ready", "listen": options.listen, "disks": guards.describe()})
        _serve(listener, jobs, commands, cancel, {guards.fd: lambda: guards.watch(0)}, emit)


def serve_machine(
    options: argparse.Namespace, listener: Listener, cancel: Cancel, emit: Emit
) -> None:
    """Back up the disks of the QEMU at `options.qmp` when a client asks."""
    queries = QemuQueries(options.qmp, share=options.qmp_share)
    jobs = BackupRunner()
    disks = MachineDisks(options.qmp, queries, jobs, share=options.qmp_share)
    commands = _commands(disks, jobs, options, cancel)
    emit({"event": "ready", "listen": options.listen, "disks": []})
    _serve(listener, jobs, commands, cancel, {queries.fd: queries.poll}, emit)


def _commands(
    disks: Disks, jobs: BackupRunner, options: argparse.Namespace, cancel: Cancel
) -> Commands:
    words = [
        f"--buffer={options.buffer}",
        f"--spool={options.spool}",
        f"--spool-size={options.spool_size}",
        f"--guest-wait={options.guest_wait}",
    ]
    agent = options.agent or ""
    return Commands(disks, jobs, words, agent, lambda: cancel.ask("ended by a client's quit"))


def _serve(
    listener: Listener,
    jobs: BackupRunner,
    commands: Commands,
    cancel: Cancel,
    beside: Mapping[int, Callable[[], None]],
    emit: Emit,
) -> None:
    """Serve clients until a stop is asked for; a running backup is ended then, in order.

    `beside`: functions to call in each round, by the descriptor that wakes the loop for them.
    """

    def notice(text: str) -> None:
        emit({"event": "notice", "text": text})

    with Clients(listener, commands.table, commands.fdsets.left, notice) as clients:
        jobs.send_event = clients.send_event
        for fd in (cancel.fd, jobs.fd, *beside):
            clients.watch(fd)
        while not cancel.asked:
            clients.serve(_POLL_S)
            for poll in beside.values():
                poll()
            jobs.poll()
            clients.go_on()
        jobs.close()
        clients.go_on()
