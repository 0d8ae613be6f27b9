# SPDX-License-Identifier: Apache-2.0
"""Takes a backup's jobs and nodes out of QEMU, in the order that costs a guest nothing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from vmapipe.control.qemu.graph import Graph
from vmapipe.control.qemu.plan import Left, left_of, writers_of
from vmapipe.control.qemu.poweroff import let_go
from vmapipe.control.qemu.settling import settle
from vmapipe.control.qmp.connection import Command, Qmp, QmpRefused
from vmapipe.runtime.errors import Failure

# A job ends when its requests have: milliseconds with a sink that answers at
# once; a slow disk may have to be read first.
CLEAN_S = 30.0
# A target that QEMU has to connect to again is served within milliseconds of its
# next request. Where nobody listened for long, QEMU tries again every 16 s.
_SERVED_S = 20.0
_LOOK_S = 0.02


def look(qmp: Qmp, prefix: str) -> Left:
    """Raises QmpGone."""
    jobs = qmp.execute(Command("query-jobs", {}))
    nodes = qmp.execute(Command("query-named-block-nodes", {"flat": True}))
    if not any(str(node.get("node-name", "")).startswith(prefix) for node in nodes):
        return left_of(jobs, nodes, prefix)
    blocks = _may_ask(qmp, "query-block") or ()
    graph = Graph(nodes, _may_ask(qmp, "x-debug-query-block-graph"))
    return left_of(jobs, nodes, prefix, writers_of(blocks, graph.below, prefix))


def _may_ask(qmp: Qmp, name: str) -> Any:
    """None where this QEMU does not answer such a question."""
    with contextlib.suppress(QmpRefused):
        return qmp.execute(Command(name, {}))
    return None


def clean(qmp: Qmp, prefix: str, served: Callable[[str], bool], limit_s: float = CLEAN_S) -> None:
    """Take all that is named `prefix` out, and let QEMU end if its guest has powered off meanwhile.

    As `take_out`.
    """
    take_out(qmp, prefix, served, limit_s)
    let_go(qmp, prefix)


def take_out(qmp: Qmp, prefix: str, served: Callable[[str], bool], limit_s: float) -> None:
    """Until nothing named `prefix` is left. Raises QmpGone, and Failure when it takes too long.

    `served`: whether a job's target is connected. A job must not be cancelled
    while its target is not: the guest's write that waits for it would fail. The
    memory's stream, if there is one, has to be read meanwhile.
    """
    settle(qmp, prefix, limit_s)
    left = _connect_again(qmp, prefix, served)
    deadline = time.monotonic() + limit_s
    refused = ""
    while not left.nothing:
        for command in left.undo():
            try:
                qmp.execute(command)
            except QmpRefused as error:
                refused = f": {error}"  # it ended meanwhile, or is in use for a moment: look again
        left = look(qmp, prefix)
        if left.nothing:
            return
        if time.monotonic() > deadline:
            names = ", ".join(left.names)
            raise Failure(f"QEMU still has {names} after {limit_s:.0f} s{refused}")
        time.sleep(_LOOK_S)


def _connect_again(qmp: Qmp, prefix: str, served: Callable[[str], bool]) -> Left:
    """Returns what is left then. A job that has come to its end meanwhile needs no target."""
    left = look(qmp, prefix)
    if all(served(job) for job in left.active):
        return left
    for command in left.unthrottle():
        with contextlib.suppress(QmpRefused):
            qmp.execute(command)
    until = time.monotonic() + _SERVED_S
    while not all(served(job) for job in left.active) and time.monotonic() < until:
        time.sleep(_LOOK_S)
        left = look(qmp, prefix)
    return left
