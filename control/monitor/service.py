# SPDX-License-Identifier: Apache-2.0
"""The monitor's loop: clients, backups, and what is beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vmapipe.control.monitor.commands import Commands
from vmapipe.control.monitor.jobs import Jobs
from vmapipe.control.qmp.clients import Clients
from vmapipe.control.qmp.sockets import Listener
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.events import Emit

# What happens wakes it; this is for what only time brings (a guard's next start).
_POLL_S = 1.0


def serve(
    listener: Listener,
    jobs: Jobs,
    commands: Commands,
    cancel: Cancel,
    beside: Mapping[int, Callable[[], None]],
    emit: Emit,
) -> None:
    """Until a stop is asked for; a backup that runs is ended then, in order.

    `beside`: by a descriptor that wakes us, what has to be looked at.
    """

    def notice(text: str) -> None:
        emit({"event": "notice", "text": text})

    with Clients(listener, commands.table, commands.fdsets.left, notice) as clients:
        jobs.tell = clients.tell
        for fd in (cancel.fd, jobs.fd, *beside):
            clients.watch(fd)
        while not cancel.asked:
            clients.serve(_POLL_S)
            for look in beside.values():
                look()
            jobs.look()
            clients.go_on()
        jobs.close()
        clients.go_on()
