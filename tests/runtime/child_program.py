# SPDX-License-Identifier: Apache-2.0
"""A process that a test starts: `python -m tests.runtime.child_program WHAT --parent-fd N`."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.events import ChildCommands, speed_in
from vmapipe.runtime.process import run_child
from vmapipe.runtime.syscalls import readable


def work(what: str, cancel: Cancel, emit: Callable[[Any], None], orders: ChildCommands) -> None:
    emit({"event": "started", "what": what})
    match what:
        case "ends":
            return
        case "fails":
            raise Failure("the disk is on fire")
        case "os-error":
            os.stat("/nonexistent/file")
        case "waits":
            readable([cancel.fd])
            cancel.check()
        case "obeys":
            speed = None
            while speed != 0:
                readable([orders.fd])
                for order in orders.take():
                    speed = speed_in(order)
                    emit({"event": "obeyed", "speed": speed})
        case "is-stuck":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            emit({"event": "stuck"})
            threading.Event().wait()


def main(argv: Sequence[str]) -> int:
    what, _, parent_fd = argv
    orders = ChildCommands()
    return run_child(
        "child", int(parent_fd), lambda c, e: work(what, c, e, orders), print, orders.put
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
