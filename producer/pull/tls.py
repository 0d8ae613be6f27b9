# SPDX-License-Identifier: Apache-2.0
"""TLS to an NBD server: certificates, keys, and a socket that tells what OpenSSL says as other sockets do."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import stat
import sys
from collections.abc import Iterator

from vmapipe.producer.pull.export import CannotOpen, WantsToSend
from vmapipe.producer.pull.uri import NbdUri
from vmapipe.runtime.errors import os_error_text

# Lines USER:HEXKEY; a file of keys for thousands of machines is no larger.
_MAX_PSK_BYTES = 1 << 20


class TlsSocket:
    """A socket's methods, as far as they are needed. Raises OSError, BlockingIOError, WantsToSend."""

    def __init__(self, secured: ssl.SSLSocket) -> None:
        self._socket = secured
        self.family = secured.family

    def recv(self, length: int, flags: int = 0) -> bytes:
        with _as_others():
            return self._socket.recv(length, flags)

    def recv_into(self, target: memoryview, length: int = 0, flags: int = 0) -> int:
        with _as_others():
            return self._socket.recv_into(target, length, flags)

    def send(self, data: bytes | bytearray, flags: int = 0) -> int:
        with _as_others():
            return self._socket.send(data, flags)

    def sendall(self, data: bytes) -> None:
        with _as_others():
            self._socket.sendall(data)

    def settimeout(self, limit_s: float | None) -> None:
        self._socket.settimeout(limit_s)

    def setblocking(self, blocks: bool) -> None:
        self._socket.setblocking(blocks)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()


@contextlib.contextmanager
def _as_others() -> Iterator[None]:
    try:
        yield
    except ssl.SSLWantReadError:
        raise BlockingIOError from None
    except ssl.SSLWantWriteError:
        raise WantsToSend from None
    except ssl.SSLError as error:
        raise OSError(f"TLS failed: {_ssl_text(error)}") from error


def secure(connection: socket.socket, uri: NbdUri) -> TlsSocket:
    """Return the connection with TLS. Raises CannotOpen, OSError."""
    name = uri.hostname or uri.host or None
    try:
        return TlsSocket(_context(uri).wrap_socket(connection, server_hostname=name))
    except ssl.SSLCertVerificationError as error:
        raise CannotOpen(
            f"{uri.shown}: the server's certificate is not accepted: {error.verify_message}"
        ) from error
    except ssl.SSLError as error:
        raise CannotOpen(f"{uri.shown}: TLS failed: {_ssl_text(error)}") from error


def _context(uri: NbdUri) -> ssl.SSLContext:
    """Raises CannotOpen, OSError (of which SSLError is one)."""
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
