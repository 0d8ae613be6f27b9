# SPDX-License-Identifier: Apache-2.0
"""One connection to an NBD export: address, TLS, handshake. Waits, and so has a thread of its own."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from vmapipe.producer.pull.uri import NbdUri
from vmapipe.protocol.errors import ProtocolError
from vmapipe.protocol.nbd.client_handshake import NbdClientHandshake
from vmapipe.protocol.nbd.constants import (
    NBD_OPT_STARTTLS,
    NBD_REP_ERR_POLICY,
    NBD_REP_ERR_TLS_REQD,
    NBD_REP_ERR_UNSUP,
)
from vmapipe.protocol.nbd.errors import NbdRefusedError
from vmapipe.protocol.nbd.session import NbdSession
from vmapipe.runtime.errors import Failure, os_error_text

if TYPE_CHECKING:
    from vmapipe.producer.pull.tls import TlsSocket

# A server on another continent answers a handshake's handful of questions in two seconds.
OPEN_S = 20.0
# A dead host is noticed after so long, also while it owes us an answer.
_DEAD_HOST_S = 30
_KEEPALIVE = (
    (socket.TCP_KEEPIDLE, 10),
    (socket.TCP_KEEPINTVL, 5),
    (socket.TCP_KEEPCNT, 4),
    (socket.TCP_USER_TIMEOUT, 1000 * _DEAD_HOST_S),
)


class ExportError(Failure):
    """An export cannot be read; the text names the device, and the offset where there is one."""


class CannotOpen(Failure):
    """The export cannot be opened; the text says where it is and why, without the user's name."""


class WantsToSend(Exception):
    """TLS has to send something before it can go on, and cannot now."""


class OpenExport(NamedTuple):
    """A connection whose transmission phase has begun."""

    socket: socket.socket | TlsSocket
    session: NbdSession


def open_export(uri: NbdUri, deadline: float, contexts: Sequence[str]) -> OpenExport:
    """Connect and shake hands, until `deadline` (monotonic) at the latest. Raises CannotOpen.

    `contexts`: the metadata contexts to ask for; the session says which the server has.
    """
    try:
        return _shake_hands(uri, contexts, _connect(uri, deadline), deadline)
    except NbdRefusedError as error:
        raise CannotOpen(f"{uri.shown}: {error}{_way_out(uri, error)}") from error
    except ProtocolError as error:
        raise CannotOpen(f"{uri.shown}: {error}") from error
    except TimeoutError:
        raise CannotOpen(f"{uri.shown}: no answer within {OPEN_S:.0f} s") from None
    except OSError as error:
        raise CannotOpen(f"{uri.shown}: {os_error_text(error)}") from error


def _connect(uri: NbdUri, deadline: float) -> socket.socket:
    if uri.socket:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(_left(deadline))
            connection.connect(uri.socket)
        except BaseException:
            connection.close()
            raise
        return connection
    connection = socket.create_connection((uri.host, uri.port), _left(deadline))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    return connection


def _shake_hands(
    uri: NbdUri, contexts: Sequence[str], connection: socket.socket | TlsSocket, deadline: float
) -> OpenExport:
    """Return the connection as it is afterwards, with TLS another object; or close it.

    Raises OSError, ProtocolError, CannotOpen.
    """
    handshake = NbdClientHandshake(uri.export, contexts=contexts, tls=uri.tls)
    try:
        while handshake.wanted_bytes:
            connection.settimeout(_left(deadline))
            if handshake.wants_tls and isinstance(connection, socket.socket):
                # Here, because OpenSSL takes 15 ms of a start.
                from vmapipe.producer.pull.tls import secure

                # It owns the descriptor from here on.
                connection = secure(connection, uri)
                answer = handshake.secured()
            else:
                answer = _answer(handshake, connection)
            connection.sendall(answer)
        if handshake.session is None:
            raise RuntimeError("a handshake that ended without a session")
    except BaseException:
        connection.close()
        raise
    return OpenExport(connection, handshake.session)


def _answer(handshake: NbdClientHandshake, connection: socket.socket | TlsSocket) -> bytes:
    """Return what is to be sent after the server's next words."""
    data = connection.recv(handshake.wanted_bytes)
    if not data:
        handshake.eof()
    try:
        return handshake.feed(data)
    except NbdRefusedError as refused:
        connection.sendall(refused.unsent)
        raise


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _way_out(uri: NbdUri, error: NbdRefusedError) -> str:
    match error.reply_type:
        case kind if kind == NBD_REP_ERR_TLS_REQD and not uri.tls:
            return "; the server wants TLS: use nbds://, or nbds+unix://"
        case kind if kind in (NBD_REP_ERR_UNSUP, NBD_REP_ERR_POLICY) and (
            error.option == NBD_OPT_STARTTLS
        ):
            return "; the server has no TLS: use nbd://, or nbd+unix://, if the network is trusted"
    return ""
