# SPDX-License-Identifier: Apache-2.0
"""The QMP client: connections to QEMU, to our monitor and to our running backups.

It blocks, and every wait has an end on the monotonic clock. Received objects are bounded in length,
depth and number, and checked before any other code reads them.

`QmpClient` stays connected; `SharedQmp` connects for each command, for a QEMU whose only monitor has
other users that connect for a moment, too (Proxmox VE's services, panels). QEMU serves the next
client in its queue as soon as one has left; events that come between two commands are lost.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import random
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from vmapipe.control.qmp.addresses import Address, connect, parse_address
from vmapipe.control.qmp.answers import answer_fault, event_fault
from vmapipe.control.qmp.connection import Command, QmpGone, QmpLink, QmpPeer
from vmapipe.control.qmp.reader import JsonReader, Unreadable, decode
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import os_error_text
from vmapipe.runtime.logs import DEBUG, Trace, shown
from vmapipe.runtime.syscalls import readable, writable

_log = Trace(__name__)

_READ_BYTES = 1 << 16
# One look at the events reads no more than this, so that the caller gets to other work, too.
_LOOK_BYTES = 1 << 20
# Of events of one name, so many wait: one for each of the 254 disks of a machine, four times. A
# reader of a thousand asks for the state anyway.
_EVENTS_OF_A_NAME = 1024
_BYTES_OF_A_NAME = 256 << 10
# QEMU has some 60 kinds of events.
_MOST_NAMES = 200
# The longest of QEMU's events tells of some hundred bytes.
_EVENT_BYTES = 64 << 10
# QEMU takes no other command before it.
_NEGOTIATION = Command("qmp_capabilities", {})


class Wire:
    """Objects both ways over a socket. Every method raises OSError, Unreadable, Cancelled."""

    def __init__(self, sock: socket.socket, reader: JsonReader, cancel: Cancel | None) -> None:
        """Wrap a non-blocking `sock`. A stop that `cancel` asks for ends every wait."""
        self.socket = sock
        self.reader = reader
        self._cancel = cancel

    def send(self, message: Mapping[str, Any], deadline: float, fds: Sequence[int] = ()) -> None:
        self.send_bytes(json.dumps(message).encode() + b"\n", deadline, fds)

    def send_bytes(self, data: bytes, deadline: float, fds: Sequence[int] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        left = memoryview(data)
        while left:
            if not writable(self.socket.fileno(), deadline - time.monotonic()):
                raise TimeoutError("it takes nothing")
            with contextlib.suppress(BlockingIOError):
                left = left[self.socket.sendmsg([left], rights) :]
                rights = []

    def receive(self, deadline: float) -> dict[str, Any]:
        """Return the next object.

        TimeoutError: it is not there by then, however much else has come.
        """
        return decode(self.receive_bytes(deadline))

    def receive_bytes(self, deadline: float) -> bytes:
        """Return the next object undecoded, for `decode`."""
        while True:
            if time.monotonic() >= deadline:
                raise TimeoutError("it does not answer")
            message = self.reader.next_bytes()
            if message is not None:
                return message
            self.wait(deadline)
            self.take()

    def take(self) -> int:
        """How many bytes were there; 0: none is. ConnectionError: the other end has closed."""
        try:
            data = self.socket.recv(_READ_BYTES)
        except BlockingIOError:
            return 0
        if not data:
            raise ConnectionResetError("it has closed the connection")
        self.reader.feed(data)
        return len(data)

    def wait(self, deadline: float) -> None:
        """Wait until something has come."""
        fds = [self.socket.fileno()] + ([self._cancel.fd] if self._cancel else [])
        is_ready = readable(fds, deadline - time.monotonic())
        if self._cancel is not None:
            self._cancel.check()
        if not is_ready:
            raise TimeoutError("it does not answer")

    def close(self) -> None:
        self.socket.close()


class EventQueue:
    """Events that wait, in order; of one name no more than a bound, the oldest. Pure."""

    def __init__(self) -> None:
        self._events: deque[dict[str, Any]] = deque()
        #: By name: how many wait, and how many bytes they had.
        self._counts: dict[str, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._events)

    def put(self, event: dict[str, Any], size_bytes: int) -> bool:
        """Keep an event. False: too many kinds of events."""
        name = event["event"]
        count, held_bytes = self._counts.get(name, (0, 0))
        if not count and len(self._counts) >= _MOST_NAMES:
            return False
        if not count or (count < _EVENTS_OF_A_NAME and held_bytes < _BYTES_OF_A_NAME):
            self._counts[name] = (count + 1, held_bytes + size_bytes)
            self._events.append(event)
        return True

    def take(self) -> list[dict[str, Any]]:
        found = list(self._events)
        self._events.clear()
        self._counts.clear()
        return found


class QmpClient:
    """Connected from the start until `close`. Raises QmpGone, and once it has, always.

    `fd` becomes readable when there are events, or the other end is gone.
    """

    is_shared = False

    def __init__(
        self, address: Address | str, peer: QmpPeer | None = None, *, is_brief: bool = False
    ) -> None:
        """`address`: a path, or what parse_address returns; `peer`: QEMU.

        `is_brief`: one command only, in one step with what opens the connection for it; a long
        answer is looked at when the other end is free again.
        """
        self._address = address if isinstance(address, Address) else Address(address)
        self._peer = peer or QmpPeer()
        self.path = str(self._address)
        self._lost: QmpGone | None = None
        self._is_brief = is_brief
        # Of each connection another: an answer to the last user of the monitor is not taken for ours.
        self._number = random.getrandbits(48)
        self._is_answered = False
        self._events = EventQueue()
        deadline = time.monotonic() + self._peer.greeting_s
        try:
            sock = connect(self._address, deadline)
        except TimeoutError as error:
            raise self._peer.no_greeting(self.path) from error
        except OSError as error:
            raise self._peer.not_reached(self.path, os_error_text(error)) from error
        self._wire = Wire(sock, JsonReader(self._peer.limits), None)
        # Readable with the socket, and as long as events wait that came with an answer.
        self._waiting = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._is_closed = False
        for fd in (sock.fileno(), self._waiting):
            self._epoll.register(fd, select.EPOLLIN)
        try:
            self._greet(deadline)
            if not is_brief:
                self.execute(_NEGOTIATION)
        except BaseException:
            self.close()
            raise

    @property
    def fd(self) -> int:
        return self._epoll.fileno()

    @property
    def peer_pid(self) -> int | None:
        """The process at the other end, or the one that made its socket; None: not known."""
        if not self._address.path:
            return _listening_at(self._wire.socket.getpeername()[:2])
        size = struct.calcsize("3i")
        found = self._wire.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        return int(struct.unpack("3i", found)[0])

    def execute(self, command: Command) -> Any:
        """The answer, of the shape that is known of it. Raises QmpRefused, QmpGone."""
        return self._execute(command, ())

    def give_fd(self, fd: int, name: str) -> None:
        """QEMU gets a copy of a descriptor, under this name. Raises QmpRefused, QmpGone."""
        if not self._address.path:
            raise self._peer.refused(
                "getfd", f"{self.path}: a descriptor cannot be given over TCP: name a Unix socket"
            )
        self._execute(Command("getfd", {"fdname": name}), (fd,))

    def add_fd(self, fd: int) -> int:
        """QEMU gets a copy of a descriptor: N, which it opens as /dev/fdset/N. Raises as `execute`."""
        if not self._address.path:
            raise self._peer.refused("add-fd", f"{self.path}: descriptors are for Unix sockets")
        return int(self._execute(Command("add-fd", {}), (fd,))["fdset-id"])

    def events(self) -> list[dict[str, Any]]:
        """Return the events since the last call, in order. Raises QmpGone, after the last."""
        if self._lost is None:
            with contextlib.suppress(QmpGone):  # told when all events are
                self._take_what_is_there()
        found = self._events.take()
        if self._lost is None:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._waiting)
        elif not found:
            raise self._lost
        return found

    def wait_for_end(self, timeout_s: float) -> bool:
        """Wait until the other end closes, ignoring what it sends; False: it has not by then."""
        deadline = time.monotonic() + timeout_s
        try:
            while time.monotonic() < deadline:
                self._wire.wait(deadline)
                if self._wire.take():
                    self._wire.reader.drop()
        except TimeoutError:
            return False
        except OSError:
            return True  # it has closed, or was killed
        return False

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._wire.close()
            self._epoll.close()
            os.close(self._waiting)
            self._waiting = -1
            self._lost = self._lost or self._peer.hung_up(self.path)

    def _greet(self, deadline: float) -> None:
        """Read the greeting. Raises QmpGone.

        A monitor that several use by turns may first send what its last user has not waited for.
        """
        try:
            greeting = self._wire.receive(deadline)
            while "event" in greeting or "return" in greeting or {"error", "id"} <= greeting.keys():
                greeting = self._wire.receive(deadline)
        except Unreadable as error:
            raise self._peer.no_qmp(self.path, error.said) from error
        except TimeoutError as error:
            raise self._peer.no_greeting(self.path) from error
        except OSError as error:
            raise self._peer.hung_up(self.path) from error
        if not isinstance(greeting.get("QMP"), dict):
            raise self._peer.not_valid(self.path, "greeting", "it has no member 'QMP'")

    def _execute(self, command: Command, fds: Sequence[int]) -> Any:
        if self._lost is not None:
            raise self._lost
        deadline = time.monotonic() + self._peer.answer_s
        asked = [_NEGOTIATION, command] if self._is_brief else [command]
        first = self._number + 1
        requests = [
            {"execute": each.name, "arguments": dict(each.arguments), "id": number}
            for number, each in enumerate(asked, first)
        ]
        if _log.has(DEBUG):
            _log.debug("%s command %s %s", self.path, command.name, shown(dict(command.arguments)))
        try:
            data = b"".join(json.dumps(request).encode() + b"\n" for request in requests)
            self._wire.send_bytes(data, deadline, fds)
        except TimeoutError as error:
            raise self._lose(self._peer.no_answer(self.path, command.name)) from error
        except OSError as error:
            raise self._lose(self._peer.hung_up(self.path)) from error
        answer = None
        for self._number, each in enumerate(asked, first):
            answer = self._receive_answer(each, deadline)
        return answer

    def _receive_answer(self, command: Command, deadline: float) -> Any:
        try:
            while True:
                found = self._wire.receive_bytes(deadline)
                if self._is_brief and len(found) > _EVENT_BYTES:
                    self.close()  # it is no event
                message = decode(found)
                if "event" in message:
                    self._keep(message)
                elif not self._is_late(message):
                    self._is_answered = True
                    return self._answer(command.name, message)
        except Unreadable as error:
            raise self._lose_invalid(f"answer to {command.name}", str(error)) from error
        except TimeoutError as error:
            raise self._lose(self._peer.no_answer(self.path, command.name)) from error
        except OSError as error:
            raise self._lose(self._peer.hung_up(self.path)) from error

    def _is_late(self, message: Mapping[str, Any]) -> bool:
        """An answer to the monitor's last user? They come before the first of ours."""
        return not self._is_answered and message.get("id", self._number) != self._number

    def _answer(self, name: str, message: Mapping[str, Any]) -> Any:
        """Raises QmpRefused, QmpGone."""
        what = f"answer to {name}"
        if message.get("id", self._number) != self._number:
            raise self._lose_invalid(what, "it belongs to another question")
        if _log.has(DEBUG):
            _log.debug("%s answer to %s %s", self.path, name, shown(dict(message)))
        if "return" in message:
            if fault := answer_fault(name, message["return"]):
                raise self._lose_invalid(what, fault)
            return message["return"]
        refusal = message.get("error")
        text = refusal.get("desc") if isinstance(refusal, dict) else None
        if not isinstance(text, str):
            raise self._lose_invalid(what, "it has neither a member 'return' nor an 'error'")
        raise self._peer.refused(name, text)

    def _keep(self, event: dict[str, Any]) -> None:
        """Raises QmpGone."""
        if _log.has(DEBUG):
            _log.debug("%s event %s", self.path, shown(event))
        fault = event_fault(event)
        size_bytes = 0 if fault else len(json.dumps(event))
        if size_bytes > _EVENT_BYTES:
            fault = f"it has more than {_EVENT_BYTES} bytes"
        if not fault and not self._events.put(event, size_bytes):
            fault = f"there are events of more than {_MOST_NAMES} names"
        if fault:
            raise self._lose_invalid("event", fault)
        os.eventfd_write(self._waiting, 1)

    def _take_what_is_there(self) -> None:
        """Raises QmpGone."""
        left = _LOOK_BYTES
        try:
            while True:
                while (message := self._wire.reader.next()) is not None:
                    if "event" not in message:
                        raise self._lose_invalid("answer", "nothing was asked")
                    self._keep(message)
                count = self._wire.take() if left > 0 else 0
                if not count:
                    return
                left -= count
        except Unreadable as error:
            raise self._lose_invalid("event", str(error)) from error
        except OSError as error:
            raise self._lose(self._peer.hung_up(self.path)) from error

    def _lose_invalid(self, what: str, why: str) -> QmpGone:
        return self._lose(self._peer.not_valid(self.path, what, why))

    def _lose(self, error: QmpGone) -> QmpGone:
        """Mark the connection as lost: this error is raised from now on."""
        self._lost = error
        with contextlib.suppress(OSError):
            os.eventfd_write(self._waiting, 1)
        return error


def _listening_at(place: tuple[str, int]) -> int | None:
    """Return the process of this host that listens at the TCP address."""
    # Imported here: it takes time, and most monitors are Unix sockets.
    import psutil

    try:
        found = psutil.net_connections("tcp")
    except psutil.Error:
        return None
    return next((each.pid for each in found if each.laddr == place and each.pid), None)


def open_qmp(address: str) -> QmpClient:
    """QEMU's monitor at an address as a user writes it. Raises UsageError, QmpGone."""
    return QmpClient(parse_address(address))


# A person's or a program's command takes seconds at the very most; a client that stays longer
# occupies it.
_TURN_S = 30.0


class _SharedPeer(QmpPeer):
    """QEMU, whose other clients are waited for."""

    greeting_s = _TURN_S

    def no_greeting(self, path: str) -> QmpGone:
        return QmpGone(
            f"{path}: the QMP monitor has served another client for {_TURN_S:.0f} s, which does not "
            "share it (--qmp-share): give QEMU a second -qmp for backups"
        )


class SharedQmp:
    """A connection for each command. `execute` raises QmpRefused, QmpGone."""

    is_shared = True

    def __init__(self, address: Address) -> None:
        """Connect once, so that a monitor that does not answer is reported now. Raises QmpGone."""
        self.path = str(address)
        self._address = address
        self._peer = _SharedPeer()
        client = QmpClient(address, self._peer)
        #: The process at the other end; None: it is not known.
        self.peer_pid = client.peer_pid
        client.close()
        # Nothing is ever told by itself.
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._is_closed = False

    def execute(self, command: Command) -> Any:
        client = QmpClient(self._address, self._peer, is_brief=True)
        try:
            return client.execute(command)
        finally:
            client.close()

    def events(self) -> list[dict[str, Any]]:
        return []

    def give_fd(self, fd: int, name: str) -> None:
        raise RuntimeError("a descriptor belongs to a connection that stays")

    def add_fd(self, fd: int) -> int:
        raise RuntimeError("a descriptor belongs to a connection that stays")

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            os.close(self.fd)


def open_link(address: str, *, share: bool) -> QmpLink:
    """QEMU's monitor as a user names it. Raises UsageError, QmpGone."""
    return SharedQmp(parse_address(address)) if share else open_qmp(address)
