# SPDX-License-Identifier: Apache-2.0
"""One connection to an NBD export: address, TLS, handshake. Waits, and so has a thread of its own."""

from __future__ import annotations

import os
import socket
import ssl
import stat
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

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
# Lines USER:HEXKEY; a file of keys for thousands of machines is no larger.
_MAX_PSK_BYTES = 1 << 20


class ExportError(Failure):
    """An export cannot be read; the text names the device, and the offset where there is one."""


class CannotOpen(Failure):
    """The export cannot be opened; the text says where it is and why, without the user's name."""


class OpenExport(NamedTuple):
    """A connection whose transmission phase has begun."""

    socket: socket.socket
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
    except ssl.SSLCertVerificationError as error:
        raise CannotOpen(
            f"{uri.shown}: the server's certificate is not accepted: {error.verify_message}"
        ) from error
    except ssl.SSLError as error:
        raise CannotOpen(f"{uri.shown}: TLS failed: {_ssl_text(error)}") from error
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
    uri: NbdUri, contexts: Sequence[str], connection: socket.socket, deadline: float
) -> OpenExport:
    """Return the connection as it is afterwards, with TLS another object; or close it.

    Raises OSError, ProtocolError, CannotOpen.
    """
    handshake = NbdClientHandshake(uri.export, contexts=contexts, tls=uri.tls)
    try:
        while handshake.wanted_bytes:
            connection.settimeout(_left(deadline))
            if handshake.wants_tls:
                # It owns the descriptor from here on.
                connection = _context(uri).wrap_socket(
                    connection, server_hostname=uri.hostname or uri.host or None
                )
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


def _answer(handshake: NbdClientHandshake, connection: socket.socket) -> bytes:
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


def _context(uri: NbdUri) -> ssl.SSLContext:
    """Raises OSError (of which SSLError is one), CannotOpen."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if uri.psk_file:
        _use_psk(context, uri)
        return context
    # A Unix socket has no name that a certificate could have, unless one is said.
    context.check_hostname = bool(uri.hostname or uri.host)
    if not uri.certificates:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        return context
    paths = [os.path.join(uri.certificates, f"{n}.pem") for n in ("client-cert", "client-key")]
    try:
        context.load_verify_locations(os.path.join(uri.certificates, "ca-cert.pem"))
        if os.path.exists(paths[0]):
            context.load_cert_chain(paths[0], paths[1], password=_no_password)
    except (OSError, ValueError) as error:
        text = _ssl_text(error) if isinstance(error, ssl.SSLError) else str(error)
        if isinstance(error, OSError) and not isinstance(error, ssl.SSLError):
            text = os_error_text(error)
        raise CannotOpen(
            f"{uri.shown}: cannot use the certificates in {uri.certificates} (ca-cert.pem, "
            f"client-cert.pem, client-key.pem): {text}"
        ) from error
    return context


def _no_password() -> str:
    raise ValueError("client-key.pem has a password, which nobody is there to type")


def _use_psk(context: ssl.SSLContext, uri: NbdUri) -> None:
    """Raises CannotOpen."""
    user, key = read_psk(uri)
    if sys.version_info >= (3, 13):
        # The key proves who the server is: there is no certificate.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        # With 1.3 a server may choose a certificate all the same, which nobody would look at.
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("kECDHEPSK:kDHEPSK:!eNULL")
        context.set_psk_client_callback(lambda hint: (user, key))
    else:
        raise CannotOpen(
            f"{uri.shown}: a key that both sides share (tls-psk-file) needs Python 3.13, and this is "
            f"{sys.version_info[0]}.{sys.version_info[1]}: use certificates (tls-certificates=DIR)"
        )


def read_psk(uri: NbdUri) -> tuple[str, bytes]:
    """Return the user and the key of `uri.psk_file`. Raises CannotOpen, which shows neither."""
    where = f"{uri.shown}: cannot use the keys in {uri.psk_file}"
    try:
        fd = os.open(uri.psk_file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise CannotOpen(f"{where}: not a file")
            lines = file.read(_MAX_PSK_BYTES).decode().splitlines()
    except OSError as error:
        raise CannotOpen(f"{where}: {os_error_text(error)}") from error
    except UnicodeDecodeError:
        raise CannotOpen(f"{where}: it is not text with lines USER:HEXKEY") from None
    for line in lines:
        user, colon, key = line.strip().partition(":")
        if colon and user and (not uri.user or user == uri.user):
            try:
                return user, bytes.fromhex(key)
            except ValueError:
                raise CannotOpen(f"{where}: the key is not hexadecimal") from None
    raise CannotOpen(f"{where}: it has no line for the user of the URI")


def _ssl_text(error: ssl.SSLError) -> str:
    """OpenSSL's reason without its file and line."""
    return (error.reason or os_error_text(error)).replace("_", " ").lower()


def _way_out(uri: NbdUri, error: NbdRefusedError) -> str:
    match error.reply_type:
        case kind if kind == NBD_REP_ERR_TLS_REQD and not uri.tls:
            return "; the server wants TLS: use nbds://, or nbds+unix://"
        case kind if kind in (NBD_REP_ERR_UNSUP, NBD_REP_ERR_POLICY) and (
            error.option == NBD_OPT_STARTTLS
        ):
            return "; the server has no TLS: use nbd://, or nbd+unix://, if the network is trusted"
    return ""
