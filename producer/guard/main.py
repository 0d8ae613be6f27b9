# SPDX-License-Identifier: Apache-2.0
"""The process that serves disks to guests. `vmapipe monitor` starts one for each disk."""

from __future__ import annotations

import argparse
import socket
import sys
import time
from collections.abc import Callable, Sequence

from vmapipe.producer.guard.control_socket import Conversations
from vmapipe.producer.guard.disk import ServedDisk
from vmapipe.producer.guard.image import Image
from vmapipe.producer.nbd.server import DRAIN_S, Offer, Server, answer_promptly
from vmapipe.producer.nbd.workers import Pool
from vmapipe.protocol.nbd.constants import (
    NBD_FLAG_CAN_MULTI_CONN,
    NBD_FLAG_SEND_CACHE,
    NBD_FLAG_SEND_DF,
    NBD_FLAG_SEND_FAST_ZERO,
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_FUA,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
)
from vmapipe.protocol.nbd.session import Export
from vmapipe.runtime.arguments import add_child_options, make_parser
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.events import Emit, Event
from vmapipe.runtime.process import run_child
from vmapipe.runtime.syscalls import readable
from vmapipe.runtime.text import one_line

DESCRIPTION = """\
Serve raw images or block devices over NBD on sockets that were opened by
whoever starts this (see `vmapipe monitor`), and let backups attach to them.
"""

# All connections to a disk write to the same file, so that one's flush is all's.
_FLAGS = (
    NBD_FLAG_SEND_FLUSH
    | NBD_FLAG_SEND_FUA
    | NBD_FLAG_SEND_TRIM
    | NBD_FLAG_SEND_WRITE_ZEROES
    | NBD_FLAG_SEND_FAST_ZERO
    | NBD_FLAG_SEND_CACHE
    | NBD_FLAG_SEND_DF
    | NBD_FLAG_CAN_MULTI_CONN
)


def main(argv: Sequence[str] | None = None, prog: str = "vmapipe guard") -> int:
    parser = make_parser(prog, DESCRIPTION, "")
    parser.add_argument(
        "--disk", action="append", required=True, metavar="NAME", help="the name of a disk to own"
    )
    parser.add_argument(
        "--path", action="append", required=True, metavar="PATH", help="where it is, one a --disk"
    )
    parser.add_argument(
        "--serve",
        action="append",
        default=[],
        metavar="FD=NAME",
        help="offer a disk on a listening socket; several on one when FD comes again",
    )
    parser.add_argument(
        "--control", type=int, required=True, metavar="FD", help="where backups connect to"
    )
    add_child_options(parser)
    options = parser.parse_args(argv)
    return run_child(
        prog, options.parent_fd, lambda cancel, emit: _guard(options, cancel, emit), _print
    )


def _guard(options: argparse.Namespace, cancel: Cancel, emit: Emit) -> None:
    answer_promptly()

    def report(text: str) -> None:
        emit({"event": "notice", "text": text})

    disks: dict[str, ServedDisk] = {}
    servers: list[Server] = []
    try:
        for name, path in zip(options.disk, options.path, strict=True):
            disks[name] = ServedDisk(Image(name, path))
            size = disks[name].image.size_bytes
            emit({"event": "serving", "disk": name, "path": path, "bytes": size})
        servers = _servers(options.serve, disks, report)
        conversations = Conversations(socket.socket(fileno=options.control), disks, report)
        for server in servers:
            server.start()
        emit({"event": "all-served"})
        readable([cancel.fd])
        conversations.close()
        for server in servers:
            server.close_intake()
        deadline = time.monotonic() + DRAIN_S
        for server in servers:
            server.finish(deadline)
    finally:
        for disk in disks.values():
            disk.image.close()


def _servers(
    words: Sequence[str], disks: dict[str, ServedDisk], report: Callable[[str], None]
) -> list[Server]:
    names_by_fd: dict[int, list[str]] = {}
    for word in words:
        fd, _, name = word.partition("=")
        names_by_fd.setdefault(int(fd), []).append(name)
    pool = Pool()
    return [
        Server(
            [socket.socket(fileno=fd)], [offer(name, disks[name]) for name in names], report, pool
        )
        for fd, names in names_by_fd.items()
    ]


def offer(name: str, disk: ServedDisk) -> Offer:
    """The export of a disk, under its name."""
    size = disk.image.size_bytes
    return Offer(Export(name, size, _FLAGS, f"vmapipe: {name}", allocation=True), disk)


def _print(event: Event) -> None:
    text = str(event.get("text") or f"{event['event']} {event.get('disk', '')}")
    print(one_line(text), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
