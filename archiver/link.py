# SPDX-License-Identifier: Apache-2.0
"""The archiver's socket to its producers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vmapipe.archiver.listening import ListeningSocket
from vmapipe.protocol.packing import Part

if TYPE_CHECKING:
    from vmapipe.runtime.keys import ServerKeys

# Some frames of each producer, so that none of them waits for us between two turns.
_RECEIVE_MARK = 32


class Link(ListeningSocket):
    """Large parts are views of what ZeroMQ received."""

    def __init__(self, endpoint: str, keys: ServerKeys | None = None) -> None:
        """Raises Failure."""
        super().__init__(endpoint, keys, receive_mark=_RECEIVE_MARK)

    def receive(self) -> Iterator[tuple[bytes, str, list[Part]]]:
        """What has come: (peer, client, parts); `client` is empty where nobody has to prove it."""
        for peer, client, frames in self._messages():
            yield peer, client, [frame.buffer for frame in frames]
