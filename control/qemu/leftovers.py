# SPDX-License-Identifier: Apache-2.0
"""What runs that crashed as a whole, guardian and all, have left in a QEMU."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

from vmapipe.control.qemu.cleaning import clean, look
from vmapipe.control.qemu.dropping import Dropping
from vmapipe.control.qemu.guardian import listens
from vmapipe.control.qemu.plan import PREFIX, LeftTarget, left_targets
from vmapipe.control.qemu.qmp import Command, Qmp
from vmapipe.runtime.errors import Failure, os_error_text


def remove_leftovers(qmp: Qmp) -> tuple[str, ...]:
    """The names of jobs and nodes that are gone now.

    Raises Failure when they are no left-overs: their backup, or its guardian, lives.
    """
    left = look(qmp, PREFIX)
    if left.nothing:
        return ()
    targets = left_targets(qmp.execute(Command("query-named-block-nodes", {"flat": True})))
    for target in targets:
        if listens(target.socket):
            raise Failure(
                f"another backup of this machine is running, or being ended ({target.node}); "
                "wait for its end"
            )
    with contextlib.ExitStack() as stack:
        # A job has the name of its target.
        stand_ins = {t.node: stack.enter_context(_standing_in(t)) for t in targets}
        clean(qmp, PREFIX, lambda job: job not in stand_ins or stand_ins[job].served)
    return tuple(dict.fromkeys(name for kind in left for name in kind))


@contextlib.contextmanager
def _standing_in(target: LeftTarget) -> Iterator[Dropping]:
    """Serve where QEMU still looks for its sink: a guest's write may be waiting for it."""
    folder = os.path.dirname(target.socket)
    made = not os.path.isdir(folder)
    listener = socket.socket(socket.AF_UNIX)
    try:
        if made:
            os.mkdir(folder, 0o700)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(target.socket)
        listener.bind(target.socket)
        listener.listen()
    except OSError as error:
        listener.close()
        raise Failure(f"cannot listen on {target.socket}: {os_error_text(error)}") from error
    dropping = Dropping(listener, target.size_bytes)
    dropping.start()
    try:
        yield dropping
    finally:
        dropping.stop()
        with contextlib.suppress(OSError):
            os.unlink(target.socket)
            os.rmdir(folder)
