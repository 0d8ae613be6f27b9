# SPDX-License-Identifier: Apache-2.0
"""A QEMU that the test plays: it answers what it is told to, and floods, hangs up or lies."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

GREETING = {
    "QMP": {
        "version": {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": "played"},
        "capabilities": ["oob"],
    }
}
MIB = 1 << 20
#: Of one disk, as QEMU 7.2 tells it.
DISK: dict[str, Any] = {
    "device": "drive0",
    "qdev": "/machine/peripheral/scsi0/virtio-backend",
    "type": "unknown",
    "locked": False,
    "removable": False,
    "inserted": {
        "node-name": "n0",
        "ro": False,
        "drv": "raw",
        "file": "/srv/vm.raw",
        "image": {"virtual-size": MIB, "filename": "/srv/vm.raw", "format": "raw"},
    },
}
ANSWERS: dict[str, Any] = {
    **{name: {} for name in ("qmp_capabilities", "blockdev-add", "blockdev-del", "transaction")},
    **{name: {} for name in ("job-cancel", "job-dismiss", "block-job-set-speed", "query-migrate")},
    **{name: [] for name in ("query-jobs", "query-block-jobs", "qom-list")},
    **{name: [] for name in ("query-named-block-nodes", "query-migrate-capabilities")},
    "query-status": {"status": "running", "running": True, "singlestep": False},
    "query-migrate-parameters": {"max-bandwidth": 1},
    "query-memory-size-summary": {"base-memory": MIB},
    "query-block": [DISK],
}


class Refusal(NamedTuple):
    """An error in place of an answer."""

    words: Any


class Raw(NamedTuple):
    """Bytes in place of a message."""

    data: bytes


class Silence(NamedTuple):
    """Nothing, for ever."""


class Flood(NamedTuple):
    """These bytes, again and again, until the client hangs up."""

    data: bytes


class HostileQemu:
    """Serves any number of clients at `path`. `odd`: by command, what it answers instead.

    A function in `odd` is called with the client's socket and the request, and returns what is
    answered.
    """

    def __init__(self, path: Path, odd: Mapping[str, Any] = {}, greeting: Any = GREETING) -> None:
        self.path = path
        self.odd = dict(odd)
        self.greeting = greeting
        #: All that was asked, in order.
        self.asked: list[str] = []
        self.clients: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._is_over = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._start(self._accept)

    def close(self) -> None:
        self._is_over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        for client in list(self.clients):
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _start(self, work: Callable[..., None], *words: Any) -> None:
        thread = threading.Thread(target=work, args=words, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.clients.add(client)
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError, ValueError):
            self._say(client, self.greeting, None)
            text = ""
            while data := client.recv(65536):
                # Some clients end their lines, and some do not.
                text += data.replace(b"\xff", b"").decode()
                with contextlib.suppress(json.JSONDecodeError):
                    while text := text.lstrip():
                        request, end = json.JSONDecoder().raw_decode(text)
                        text = text[end:]
                        self.asked.append(request["execute"])
                        self._answer(client, request)
        self.clients.discard(client)

    def _answer(self, client: socket.socket, request: dict[str, Any]) -> None:
        name = request["execute"]
        found = self.odd.get(name, ANSWERS.get(name, Refusal(f"{name} has not been found")))
        if callable(found) and not isinstance(found, type):
            found = found(client, request)
        if isinstance(found, Refusal):
            found = {"error": {"class": "GenericError", "desc": found.words}}
        elif not isinstance(found, Raw | Silence | Flood):
            found = {"return": found}
        self._say(client, found, request.get("id"))

    def _say(self, client: socket.socket, message: Any, identity: Any) -> None:
        if isinstance(message, Silence):
            self._is_over.wait()
        elif isinstance(message, Flood):
            while not self._is_over.is_set():
                client.sendall(message.data)
        elif isinstance(message, Raw):
            client.sendall(message.data)
        else:
            named = message if identity is None else {**message, "id": identity}
            client.sendall(line_of(named))


def line_of(message: Any) -> bytes:
    return json.dumps(message).encode() + b"\r\n"


def event(name: str, **data: Any) -> dict[str, Any]:
    stamp = {"seconds": int(time.time()), "microseconds": 1}
    return {"event": name, "data": data, "timestamp": stamp}


@contextlib.contextmanager
def hostile_qemu(
    path: Path, odd: Mapping[str, Any] = {}, greeting: Any = GREETING
) -> Iterator[HostileQemu]:
    qemu = HostileQemu(path, odd, greeting)
    try:
        yield qemu
    finally:
        qemu.close()
