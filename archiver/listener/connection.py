# SPDX-License-Identifier: Apache-2.0
"""A TCP connection and its other half, to the ZeroMQ socket; and which one makes room for a new one."""

from __future__ import annotations

import contextlib
import ipaddress
import socket

from vmapipe.archiver.listener.relay import Relay
from vmapipe.protocol.unfinished import AllUnfinished, Unfinished
from vmapipe.protocol.zmtp import ConnectionOpening


class RelayedConnection:
    """One TCP connection. `service`: its socket to ZeroMQ, once its first command has come."""

    def __init__(
        self,
        client: socket.socket,
        address: str,
        now: float,
        together: AllUnfinished,
        *,
        curve: bool,
    ) -> None:
        self.client = client
        self.unfinished = Unfinished(together)
        self.address = address
        self.host = host_of(address)
        self.since = now
        self.opening = ConnectionOpening(curve=curve)
        self.service: socket.socket | None = None
        self.up: Relay | None = None
        self.down: Relay | None = None
        #: When to close it, after its service has closed; it may read the rest until then.
        self.closes_at = float("inf")
        #: The name of its other half, by which the socket behind us knows it.
        self.name = ""

    @property
    def is_closed_by_service(self) -> bool:
        has_ended = self.down is not None and self.down.ended
        return has_ended or (self.up is not None and self.up.lost)


def first_to_close(
    connections: dict[RelayedConnection, None], host: str
) -> RelayedConnection | None:
    """The oldest connection; that of `host` where it has half of them."""
    own = [connection for connection in connections if connection.host == host] if host else []
    return next(iter(own if 2 * len(own) >= len(connections) else connections), None)


def taken(opening: ConnectionOpening) -> bytes:
    """Take what is to be passed on to the socket."""
    data, opening.pending = opening.pending, b""
    return data


def host_of(address: str) -> str:
    """Return what counts as one host: an IPv4 address, or the IPv6 network of a site."""
    text = address.partition("%")[0]
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(text).version == 6:
            mapped = ipaddress.IPv6Address(text).ipv4_mapped
            return str(mapped or ipaddress.ip_network((text, 64), strict=False))
    return text
