# SPDX-License-Identifier: Apache-2.0
"""NBD URIs (the protocol's uri.md, and libnbd's parameters for TLS): what they say, and what may be shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vmapipe.protocol.nbd.constants import string_fault

if TYPE_CHECKING:
    from urllib.parse import SplitResult

DEFAULT_PORT = 10809
# A Unix socket's path has 108 bytes in the kernel, with its NUL.
_MAX_SOCKET_BYTES = 107
# Paths are bytes, and Python's way to have them in a text.
_NOT_UTF8 = "surrogateescape"
_SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix")
_TLS_PARAMETERS = ("tls-certificates", "tls-psk-file", "tls-hostname")


class NbdUriError(ValueError):
    """Not a usable NBD URI; the text does not quote it, because it may hold a password."""


class NbdUri(NamedTuple):
    """One export: at `host` and `port`, or behind the Unix socket `socket`; empty: not given.

    With `tls`: `certificates` is a folder (ca-cert.pem, and client-cert.pem and client-key.pem for a
    server that asks for them), `psk_file` has lines USER:HEXKEY, and `hostname` is the name that the
    server's certificate must have.
    """

    export: str
    host: str = ""
    port: int = DEFAULT_PORT
    socket: str = ""
    tls: bool = False
    user: str = ""
    certificates: str = ""
    psk_file: str = ""
    hostname: str = ""

    @property
    def shown(self) -> str:
        """The URI for people, logs and events: no user, no parameters but the socket."""
        from urllib.parse import quote

        scheme = "nbds" if self.tls else "nbd"
        export = quote(self.export, safe="/:@!$&'()*+,;=", errors=_NOT_UTF8)
        if self.socket:
            socket = quote(self.socket, safe="/:@+,", errors=_NOT_UTF8)
            return f"{scheme}+unix:///{export}?socket={socket}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == DEFAULT_PORT else f":{self.port}"
        return f"{scheme}://{host}{port}/{export}"


def is_nbd_uri(text: str) -> bool:
    """Whether this is meant to be an NBD URI, well-formed or not."""
    return text.partition("://")[0].lower() in _SCHEMES and "://" in text


def parse_nbd_uri(text: str) -> NbdUri:
    """Raises NbdUriError, whose text never holds a user, a password or a key."""
    if not is_nbd_uri(text):
        raise NbdUriError(f"an NBD URI begins with one of {', '.join(f'{s}://' for s in _SCHEMES)}")
    # Late: every backup asks whether a word is such a URI, and few are.
    from urllib.parse import unquote, urlsplit

    try:
        parts = urlsplit(text)
        port = parts.port
        host = unquote(parts.hostname or "")
    except ValueError:
        raise NbdUriError("its host or port is not valid") from None
    scheme, _, transport = parts.scheme.partition("+")
    if parts.password is not None:
        raise NbdUriError(
            "NBD has no passwords: leave it out; with TLS, tls-psk-file=FILE names the file that "
            "has the user's key"
        )
    if parts.fragment:
        raise NbdUriError("# begins no part of an NBD URI; in a name it is %23")
    found = _parameters(parts, tls=scheme == "nbds")
    socket = found.pop("socket", "")
    export = unquote(parts.path.removeprefix("/"), errors=_NOT_UTF8)
    if string_fault(export):
        raise NbdUriError(
            "the export's name is longer than 4096 bytes, has a NUL in it, or is not UTF-8"
        )
    if transport:
        _check_socket(socket, host)
    elif socket:
        raise NbdUriError(f"socket= belongs to {scheme}+unix://")
    elif not host:
        raise NbdUriError("no host; a Unix socket is nbd+unix:///EXPORT?socket=PATH")
    return NbdUri(
        export,
        host,
        port or DEFAULT_PORT,
        socket,
        scheme == "nbds",
        unquote(parts.username or ""),
        found.get("tls-certificates", ""),
        found.get("tls-psk-file", ""),
        found.get("tls-hostname", ""),
    )


def _parameters(parts: SplitResult, *, tls: bool) -> dict[str, str]:
    """Raises NbdUriError: a parameter that is not known may be a misspelt one about security."""
    from urllib.parse import parse_qsl

    found: dict[str, str] = {}
    # A "+" is no space here: it is common in paths.
    query = parts.query.replace("+", "%2B")
    for key, value in parse_qsl(query, keep_blank_values=True, errors=_NOT_UTF8):
        if key not in ("socket", *_TLS_PARAMETERS):
            raise NbdUriError(
                f"a parameter is not known: use {', '.join(('socket', *_TLS_PARAMETERS))}"
            )
        if key in found or not value or "\0" in value:
            raise NbdUriError(f"{key} is empty, comes twice, or has a NUL in it")
        if key in _TLS_PARAMETERS and not tls:
            raise NbdUriError(f"{key} belongs to nbds:// and nbds+unix://, which use TLS")
        found[key] = value
    if "tls-certificates" in found and "tls-psk-file" in found:
        raise NbdUriError("tls-certificates and tls-psk-file are two ways: choose one")
    return found


def _check_socket(socket: str, host: str) -> None:
    if host:
        raise NbdUriError("with +unix no host is named: three slashes, and ?socket=PATH")
    if not socket:
        raise NbdUriError("the socket is missing: nbd+unix:///EXPORT?socket=PATH")
    if len(socket.encode(errors="surrogateescape")) > _MAX_SOCKET_BYTES:
        raise NbdUriError(f"a socket's path has 1..{_MAX_SOCKET_BYTES} bytes")
