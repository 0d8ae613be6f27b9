# SPDX-License-Identifier: Apache-2.0
"""Asks a monitor which disks it serves."""

from __future__ import annotations

import socket
from typing import NamedTuple

from vmapipe.control.qemu.plain import PlainQmp
from vmapipe.control.qemu.qmp import Command, QmpGone, QmpRefused
from vmapipe.runtime.errors import Failure, os_error_text

_GREETING_S = 10.0
# How an NBD server begins.
_NBD_GREETING = b"NBDMAGIC"


class GuardedDisk(NamedTuple):
    """A disk that a monitor serves; `guard` is the control socket of its guard."""

    name: str
    size_bytes: int
    guard: str


def guarded_disks(monitor: str) -> list[GuardedDisk]:
    """Raises Failure."""
    _check_greeting(monitor)
    try:
        qmp = PlainQmp(monitor)
        try:
            answer = qmp.execute(Command("query-disks", {}))
        finally:
            qmp.close()
        return [
            GuardedDisk(str(disk["name"]), int(disk["size"]), str(disk["guard"])) for disk in answer
        ]
    except QmpRefused as error:
        raise Failure(f"{monitor}: {error}; is it a vmapipe monitor that serves disks?") from error
    except QmpGone as error:
        raise Failure(f"{monitor}: no monitor answers there, or it has too many clients") from error
    except (LookupError, TypeError, ValueError) as error:
        raise Failure(f"{monitor}: its answer makes no sense") from error


def _check_greeting(monitor: str) -> None:
    """That somebody greets us there, and is no NBD server. Raises Failure."""
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(_GREETING_S)
            sock.connect(monitor)
            if sock.recv(len(_NBD_GREETING)) == _NBD_GREETING:
                raise Failure(
                    f"{monitor} is an export's socket; --monitor wants the monitor's own (--listen)"
                )
    except TimeoutError as error:
        raise Failure(
            f"{monitor}: nobody greets us within {_GREETING_S:.0f} s; is this a monitor's socket?"
        ) from error
    except OSError as error:
        raise Failure(
            f"cannot ask the monitor at {monitor}: {os_error_text(error)}; is it running?"
        ) from error
