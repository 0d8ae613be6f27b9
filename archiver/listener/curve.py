# SPDX-License-Identifier: Apache-2.0
"""CURVE authentication over TCP, with a list of client keys that is read anew for each client.

It answers ZAP (ZeroMQ's RFC 27): libzmq asks, for each new connection, whether
the key that the peer has proved to own is welcome. pyzmq has such a thing too,
but on asyncio and a thread; this one is polled with the sockets that it guards.
"""

from __future__ import annotations

from collections.abc import Sequence

import zmq
from zmq.utils import z85

from vmapipe.runtime.keys import ClientList, ServerKeys

_ZAP = "inproc://zeromq.zap.01"
_DOMAIN = b"vmapipe"
# The property of each message of an accepted peer, beside its name (User-Id).
_KEY_PROPERTY = "X-Key"
# Without it libzmq would accept every peer if the ZAP socket were missing.
_ZAP_ENFORCE_DOMAIN = 93
# How soon a revoked key is noticed: a folder is quickly read.
_POLL_S = 1.0
# Unknown keys that are remembered, so that each is reported once.
_MAX_UNKNOWN_KEYS = 256
# Addresses named in one line of the log; usually one is authenticated at a time.
_MAX_ADDRESSES = 4
# Requests answered in one turn, so that data gets its.
_TURN = 64


class CurveAuthenticator:
    """Authenticates one context's peers: poll `socket`, and call `answer` when it is readable."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: ServerKeys) -> None:
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(_ZAP)
        self.refused = 0
        self._keys = keys
        self._clients = ClientList(keys.clients)
        self._allowed = self._clients.read()
        #: Accepted clients: key, and the name at that time.
        self._admitted: dict[str, str] = {}
        self._unknown_keys: set[str] = set()
        self._notices: list[str] = []
        self._poll_at = 0.0

    def secure(self, socket: zmq.Socket[bytes]) -> None:
        """Ask for CURVE on `socket`, before it is bound."""
        socket.curve_server = True
        socket.curve_publickey = self._keys.pair.public.encode()
        socket.curve_secretkey = self._keys.pair.secret.encode()
        socket.zap_domain = _DOMAIN
        socket.setsockopt(_ZAP_ENFORCE_DOMAIN, 1)

    def answer(self, addresses: Sequence[str] = ()) -> None:
        """Accept or refuse each waiting peer. `addresses`: of the peers being authenticated."""
        for _ in range(_TURN):
            if not self.socket.poll(0):
                return
            _, request, _, _, _, mechanism, *credentials = self.socket.recv_multipart()
            if mechanism != b"CURVE" or len(credentials) != 1 or len(credentials[0]) != 32:
                self._reply(request, b"400", b"CURVE is spoken here", b"", b"")
                continue
            key = z85.encode(credentials[0]).decode()
            self._allowed = self._clients.read()
            name = self._allowed.get(key)
            if name is None:
                self._reject(key, addresses)
                self._reply(request, b"400", b"unknown key", b"", b"")
            else:
                self._admitted[key] = name
                value = key.encode()
                metadata = _property(_KEY_PROPERTY.encode(), value)
                self._reply(request, b"200", b"OK", name.encode(), metadata)

    def name_of(self, frame: zmq.Frame) -> str | None:
        """The name of the client that sent `frame`; None when its key was revoked since."""
        name = str(frame.get("User-Id"))
        return name if self._allowed.get(str(frame.get(_KEY_PROPERTY))) == name else None

    def revoked(self, now: float) -> list[str]:
        """Names of accepted clients that are no longer on the list. Each is returned once."""
        if now < self._poll_at:
            return []
        self._poll_at = now + _POLL_S
        self._allowed = self._clients.read()
        gone = [key for key, name in self._admitted.items() if self._allowed.get(key) != name]
        return [self._admitted.pop(key) for key in gone]

    def take_notices(self) -> list[str]:
        """Return new lines for the log, each once."""
        notices, self._notices = self._notices, []
        return [*self._clients.take_notices(), *notices]

    def _reject(self, key: str, addresses: Sequence[str]) -> None:
        self.refused += 1
        if key not in self._unknown_keys and len(self._unknown_keys) < _MAX_UNKNOWN_KEYS:
            self._unknown_keys.add(key)
            where = " or ".join(sorted(set(addresses))[:_MAX_ADDRESSES]) or "an unknown address"
            self._notices.append(f"refused a connection from {where}: unknown key {key}")

    def _reply(self, request: bytes, code: bytes, text: bytes, user: bytes, data: bytes) -> None:
        self.socket.send_multipart([b"1.0", request, code, text, user, data])


def _property(name: bytes, value: bytes) -> bytes:
    """Encode one property as ZMTP's metadata has it."""
    return bytes([len(name)]) + name + len(value).to_bytes(4, "big") + value
