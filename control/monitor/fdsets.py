# SPDX-License-Identifier: Apache-2.0
"""Descriptors that clients have handed in: `/dev/fdset/N` and `/dev/fdname/NAME`.

As QEMU's add-fd and getfd. They belong to the client that brought them, and are
closed when it leaves, so that the reader of a pipe's other end sees its end.
"""

from __future__ import annotations

import fcntl
import os
import re
from dataclasses import dataclass
from typing import Any

from vmapipe.control.qmp.clients import Client
from vmapipe.control.qmp.server import Arguments, CommandHandler, QmpError

# One for each backup that a client could possibly wait for.
MAX_FDS = 64
_PATH = re.compile(r"/dev/(?:fdset/([0-9]{1,9})|fdname/(.+))")


@dataclass
class _Fd:
    fd: int
    owner: Client
    #: The set's number, or the name that getfd gave.
    key: int | str
    opaque: str | None = None


class FdSets:
    """The descriptors of all clients; they share the numbers, as they do in QEMU."""

    def __init__(self) -> None:
        self._fds: list[_Fd] = []

    def commands(self, client: Client) -> dict[str, CommandHandler]:
        """Return the commands whose descriptors come with the message."""
        return {
            "add-fd": lambda arguments: self._add(client, Arguments(arguments)),
            "remove-fd": lambda arguments: self._remove(Arguments(arguments)),
            "query-fdsets": lambda arguments: self._query(Arguments(arguments)),
            "getfd": lambda arguments: self._get(client, Arguments(arguments)),
            "closefd": lambda arguments: self._close(Arguments(arguments)),
        }

    def open(self, path: str) -> int | None:
        """Duplicate the descriptor that `path` names, to be written to; None: it names none.

        Raises QmpError when there is no such descriptor.
        """
        match = _PATH.fullmatch(path)
        if match is None:
            return None
        key = match[2] or int(match[1])
        found = [held.fd for held in self._fds if held.key == key]
        for fd in found:
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
                return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
        if found:
            raise QmpError(f"{path}: none of its file descriptors can be written to")
        raise _not_found(path.removeprefix("/dev/fdname/"))

    def left(self, client: Client) -> None:
        """Close what the client has handed in."""
        self._drop([held for held in self._fds if held.owner is client])

    def close(self) -> None:
        self._drop(list(self._fds))

    def _add(self, client: Client, arguments: Arguments) -> Any:
        number, opaque = arguments.number("fdset-id"), arguments.text("opaque")
        arguments.end()
        if number is None:
            used = {held.key for held in self._fds}
            number = next(n for n in range(len(used) + 1) if n not in used)
        fd = self._keep(client, number, opaque)
        return {"fdset-id": number, "fd": fd}

    def _get(self, client: Client, arguments: Arguments) -> Any:
        name = arguments.need_text("fdname")
        arguments.end()
        if not name or name[0].isdecimal():
            raise QmpError("Parameter 'fdname' expects a name not starting with a digit")
        before = [held for held in self._fds if held.key == name]
        self._keep(client, name, None)
        self._drop(before)
        return {}

    def _keep(self, client: Client, key: int | str, opaque: str | None) -> int:
        fd = client.take_fd()
        if len(self._fds) >= MAX_FDS:
            os.close(fd)
            raise QmpError(f"there are {MAX_FDS} file descriptors already: remove some")
        self._fds.append(_Fd(fd, client, key, opaque))
        return fd

    def _remove(self, arguments: Arguments) -> Any:
        number, fd = arguments.number("fdset-id"), arguments.number("fd")
        arguments.end()
        if number is None:
            raise QmpError("Parameter 'fdset-id' is missing")
        found = [held for held in self._fds if held.key == number and fd in (None, held.fd)]
        if not found:
            raise _not_found(f"fdset-id:{number}" + ("" if fd is None else f", fd:{fd}"))
        self._drop(found)
        return {}

    def _close(self, arguments: Arguments) -> Any:
        name = arguments.need_text("fdname")
        arguments.end()
        found = [held for held in self._fds if held.key == name]
        if not found:
            raise _not_found(name)
        self._drop(found)
        return {}

    def _query(self, arguments: Arguments) -> Any:
        arguments.end()
        sets: dict[int, list[dict[str, Any]]] = {}
        for held in self._fds:
            if isinstance(held.key, int):
                opaque = {} if held.opaque is None else {"opaque": held.opaque}
                sets.setdefault(held.key, []).append({"fd": held.fd, **opaque})
        return [{"fdset-id": number, "fds": fds} for number, fds in sorted(sets.items())]

    def _drop(self, held: list[_Fd]) -> None:
        for one in held:
            self._fds.remove(one)
            os.close(one.fd)


def _not_found(name: str) -> QmpError:
    return QmpError(f"File descriptor named '{name}' not found")
