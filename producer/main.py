# SPDX-License-Identifier: Apache-2.0
"""`vmapipe producer`: one process, one disk."""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

from vmapipe.clusters.sizes import CLUSTER_BYTES, VMSTATE_NAME
from vmapipe.producer.connection import ArchiverConnection
from vmapipe.producer.disk_feed import DiskFeed
from vmapipe.producer.pull.arguments import add_nbd_options, parse_nbd_disk, parse_uri
from vmapipe.producer.pull.uri import is_nbd_uri
from vmapipe.producer.session import Session
from vmapipe.producer.shared_memory import Ring
from vmapipe.producer.source import RawSource, Sharing
from vmapipe.producer.transmit import transmit
from vmapipe.runtime.arguments import (
    add_buffer_options,
    add_child_options,
    add_connect_option,
    add_tcp_options,
    check_endpoint,
    job_id,
    latency,
    make_parser,
    size,
    split_named,
)
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import UsageError
from vmapipe.runtime.events import ChildCommands, Command, Emit, Event, speed_in
from vmapipe.runtime.process import lower_priority, run_child
from vmapipe.runtime.rate_limit import RateLimiter
from vmapipe.runtime.text import one_line

if TYPE_CHECKING:
    from vmapipe.producer.pull_reader import PullReader

DESCRIPTION = """\
Send the clusters of one disk to an archiver: of a disk at rest (a raw image file or a
block device), of one that an NBD server exports, of one that a monitor serves to a
guest, or of one that QEMU's backup job writes to a socket of ours; or a machine's
memory. Ends with exit code 0 when the archiver has stored the whole archive, and with 1
when this device or the job failed.
"""

EPILOG = """\
example, by hand, in two terminals:
  vmapipe archiver --listen ipc:///run/backup.sock --expect 1 --output vm.vma
  vmapipe producer --archiver ipc:///run/backup.sock --disk drive-scsi0=/srv/vm.raw
or, for an NBD export:
  vmapipe producer --archiver ipc:///run/backup.sock --nbd 'vda=nbd+unix:///vda?socket=/run/q.sock'
"""


_PROG = "vmapipe producer"


def add_options(parser: argparse.ArgumentParser) -> None:
    _add_job_options(parser)
    _add_disk_options(parser)
    add_nbd_options(parser.add_argument_group("an NBD export"), several=False)
    _add_live_options(parser)
    add_buffer_options(parser)
    tcp = parser.add_argument_group("over tcp://")
    add_tcp_options(tcp, "its key pair, and the archiver's server.pub")
    add_connect_option(tcp)
    add_child_options(parser)


def _add_job_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--archiver",
        required=True,
        metavar="ENDPOINT",
        help="where the archiver listens: ipc://PATH, or tcp://HOST:PORT",
    )
    parser.add_argument(
        "--job",
        type=job_id,
        default=bytes(16),
        metavar="HEX",
        help="the job's id, 32 hex digits (default: zeroes)",
    )
    parser.add_argument(
        "--speed",
        type=size,
        default=0,
        metavar="BYTES/S",
        help="read at most this much a second; K, M, G, T are 1024 (default: no limit)",
    )


def _add_disk_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--disk",
        metavar="[NAME=]PATH",
        help="the disk, and its name in the archive (default: the file's name)",
    )
    parser.add_argument(
        "--format",
        default="raw",
        metavar="FORMAT",
        help="the image's format as QEMU calls it; all but raw files are read through QEMU's programs",
    )
    parser.add_argument(
        "--snapshot", default="", metavar="NAME", help="read this internal snapshot of the image"
    )
    parser.add_argument(
        "--bitmap",
        default="",
        metavar="NAME",
        help="of an NBD export: read only what this dirty bitmap of it says, if the archiver has a base",
    )
    parser.add_argument(
        "--offset", type=size, default=0, metavar="BYTES", help="where the disk begins in the file"
    )
    parser.add_argument(
        "--others",
        action="store_true",
        help="read other files, too, that the image refers to (backing files, data files, extents): "
        "the image's author chose them",
    )
    parser.add_argument(
        "--force-share",
        action="store_true",
        help="read the disk although another program may write to it",
    )
    parser.add_argument(
        "--name",
        metavar="NAME",
        help="the disk's name in the archive; --disk is then a path and nothing else",
    )


def _add_live_options(parser: argparse.ArgumentParser) -> None:
    """Add what a coordinator hands to a producer of a disk, or a machine, in use."""
    parser.add_argument(
        "--guard",
        metavar="SOCKET",
        help="the disk is served by a monitor, whose control socket this is; --disk is its name",
    )
    parser.add_argument(
        "--guest-latency",
        type=latency,
        default=0.0,
        metavar="TIME",
        help="with --guard: tell four times a second what the guest feels, and how often more than this",
    )
    parser.add_argument(
        "--sink-fd",
        type=int,
        metavar="N",
        help="the disk comes over NBD, to the listening socket with this descriptor; --disk is "
        "its name, --size its size",
    )
    parser.add_argument(
        "--await-job",
        action="store_true",
        help="what --sink-fd takes is complete only when the parent says that QEMU's job has "
        "ended well",
    )
    parser.add_argument("--await-sample", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--stream-fd",
        type=int,
        metavar="N",
        help="send a machine's memory: QEMU's migration stream, from the pipe with this "
        "descriptor, as the device `vmstate`; --size is an estimate",
    )
    parser.add_argument(
        "--verdict-fd",
        type=int,
        default=-1,
        metavar="N",
        help="the stream is complete only when a byte comes from this pipe after its end",
    )
    parser.add_argument(
        "--size",
        type=size,
        default=0,
        metavar="BYTES",
        help="see --sink-fd and --stream-fd",
    )


def prepare(argv: Sequence[str]) -> None:
    """Make what a producer with these arguments needs beside this file, before it is forked.

    Raw disks at rest need none of the feeds, and start sooner without.
    """
    _parser(_PROG)
    for option, feed in _FEEDS.items():
        if any(word.startswith(option) and word != "--format=raw" for word in argv):
            importlib.import_module(feed)


_FEEDS = {
    "--guard": "vmapipe.producer.guard_feed",
    "--sink-fd": "vmapipe.producer.qemu_feed",
    "--stream-fd": "vmapipe.producer.vmstate_feed",
    "--nbd": "vmapipe.producer.pull_feed",
    "--format": "vmapipe.producer.image_source",
}


@functools.cache
def _parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser; copies of this process have it, too: making one takes a sixth of a small disk's time."""
    parser = make_parser(prog, DESCRIPTION, EPILOG)
    add_options(parser)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = _PROG) -> int:
    options = _parser(prog).parse_args(argv)
    limiter = RateLimiter(options.speed, time.monotonic())
    commands = ChildCommands()

    def follow(command: Command) -> None:
        speed = speed_in(command)
        if speed is not None:
            limiter.change(speed)

    return run_child(
        prog,
        options.parent_fd,
        lambda cancel, emit: _Producer(options, limiter, commands, cancel, emit).run(),
        _print,
        follow if options.sink_fd is None else commands.put,
    )


class _Producer:
    """One device from its source to the archiver, by what the command line says it is."""

    def __init__(
        self,
        options: argparse.Namespace,
        limiter: RateLimiter,
        commands: ChildCommands,
        cancel: Cancel,
        emit: Emit,
    ) -> None:
        self._options = options
        self._limiter = limiter
        self._commands = commands
        self._cancel = cancel
        self._emit = emit

    def run(self) -> None:
        """Raises Failure."""
        options = self._options
        said = [w for w in (options.disk, options.stream_fd, *options.nbd) if w is not None]
        if len(said) != 1:
            raise UsageError("say what to send: one of --disk, --nbd and --stream-fd")
        check_endpoint(options.archiver, plain_tcp=options.insecure_plain_tcp, keys=options.keys)
        if options.guard:
            lower_priority()  # before ZeroMQ has threads of its own
        keys = None
        if options.keys:
            from vmapipe.runtime.keys import read_client_keys

            keys = read_client_keys(options.keys)
        name = VMSTATE_NAME if options.stream_fd is not None else options.name or options.disk
        with ExitStack() as stack:
            connection = ArchiverConnection(options.archiver, keys, options.connect_timeout)
            stack.callback(connection.close)
            connection.watch(self._cancel.fd)
            if options.stream_fd is not None:
                sent = self._send_vmstate(name, connection)
            elif options.guard:
                sent = self._send_guarded(name, connection)
            elif options.sink_fd is not None:
                sent = self._send_arriving(name, connection)
            else:
                name, path = self._named_source()
                sent = self._send_at_rest(name, path, connection)
            size_bytes, zero_clusters = sent
            self._emit(
                {
                    "event": "sent",
                    "device": name,
                    "bytes": size_bytes,
                    "zero_bytes": min(zero_clusters * CLUSTER_BYTES, size_bytes),
                }
            )

    def _session(
        self, name: str, size_bytes: int, path: str, connection: ArchiverConnection, ring: Ring
    ) -> Session:
        self._emit({"event": "reading", "device": name, "path": path, "bytes": size_bytes})
        return Session(name, size_bytes, connection, self._options.job, ring, self._cancel)

    def _named_source(self) -> tuple[str, str]:
        """Return the name and the path, or URI, of a disk at rest. Raises UsageError."""
        options = self._options
        if options.nbd:
            name, uri, bitmap = parse_nbd_disk(options.nbd[0])
            options.bitmap = bitmap
            return name, uri
        return (options.name, options.disk) if options.name else split_named(options.disk)

    def _send_at_rest(
        self, name: str, path: str, connection: ArchiverConnection
    ) -> tuple[int, int]:
        options = self._options
        sharing = Sharing(
            options.force_share, lambda text: self._emit({"event": "notice", "text": text})
        )
        is_raw = options.format == "raw" and not (options.snapshot or options.offset)
        if is_raw and "://" not in path:
            return self._send_raw(RawSource(name, path, sharing), connection)
        if is_raw and is_nbd_uri(path):
            return self._send_pulled(self._open_export(name, path), connection)
        from vmapipe.producer.image_source import HowToRead, ImageReader

        how = HowToRead(options.format, options.snapshot, options.offset, options.others)
        image = ImageReader(name, path, how, self._cancel, sharing)
        return self._send_pulled(image, connection)

    def _open_export(self, name: str, text: str) -> PullReader:
        """Raises ExportError, UsageError, Cancelled."""
        # Raw images and disks in use do without.
        from vmapipe.producer.pull.connections import Endpoint
        from vmapipe.producer.pull.export import open_export
        from vmapipe.producer.pull_reader import PullReader

        options = self._options
        uri = parse_uri(name, text)
        endpoint = Endpoint(
            *(name, uri.shown, functools.partial(open_export, uri)),
            bitmap=options.bitmap,
            answer_s=options.nbd_timeout,
        )
        return PullReader(
            endpoint, self._cancel, trims=options.trim, compares=not options.force_share
        )

    def _send_raw(self, source: RawSource, connection: ArchiverConnection) -> tuple[int, int]:
        with closing(source), closing(Ring()) as ring:
            session = self._session(source.name, source.size_bytes, source.path, connection, ring)
            feed = DiskFeed(source, ring, session, self._limiter)
            transmit(feed, session, self._emit)
            return source.size_bytes, session.zero_clusters

    def _send_pulled(self, reader: PullReader, connection: ArchiverConnection) -> tuple[int, int]:
        from vmapipe.producer.pull_feed import PullFeed

        with closing(reader), closing(Ring(reader.beside_bytes)) as ring:
            session = self._session(reader.name, reader.size_bytes, reader.shown, connection, ring)
            feed = PullFeed(reader, ring, session, self._limiter)
            transmit(feed, session, self._emit)
            return reader.size_bytes, session.zero_clusters

    def _send_guarded(self, name: str, connection: ArchiverConnection) -> tuple[int, int]:
        from vmapipe.producer.guard_feed import (
            BackgroundReader,
            Buffering,
            GuardFeed,
            SavedClusters,
            attach,
            open_spool,
        )

        options = self._options
        buffering = Buffering(options.buffer, options.spool, options.spool_size, options.guest_wait)
        memory_slots = buffering.memory_slots
        with ExitStack() as stack:
            ring = stack.enter_context(closing(Ring(memory_slots * CLUSTER_BYTES)))
            spool_fd = -1
            if buffering.spool_slots:
                spool_fd = open_spool(buffering.spool_folder)
                stack.callback(os.close, spool_fd)
            guard = attach(name, options.guard, options.job, buffering, ring, spool_fd)
            stack.callback(guard.close)
            session = self._session(name, guard.size_bytes, options.guard, connection, ring)
            saved = SavedClusters(guard.size_bytes, memory_slots, spool_fd, ring, guard)
            background = BackgroundReader(name, ring, guard, self._limiter, session)
            feed = GuardFeed(name, guard, session, saved, background, options.guest_latency)
            transmit(feed, session, self._emit)
            return guard.size_bytes, session.zero_clusters

    def _send_arriving(self, name: str, connection: ArchiverConnection) -> tuple[int, int]:
        from vmapipe.producer.qemu_feed import QemuFeed, SinkOptions

        options = self._options
        if not options.size:
            raise UsageError("--sink-fd needs --size")
        settings = SinkOptions(
            *(options.sink_fd, options.size, options.buffer, options.guest_wait),
            *(options.speed, options.await_job, options.await_sample),
        )
        with closing(Ring(options.buffer)) as ring:
            session = self._session(name, options.size, "QEMU", connection, ring)
            feed = QemuFeed(name, settings, ring, session, self._cancel, self._commands)
            transmit(feed, session, self._emit)
            return options.size, session.zero_clusters

    def _send_vmstate(self, name: str, connection: ArchiverConnection) -> tuple[int, int]:
        from vmapipe.producer.vmstate_feed import StreamOptions, VmstateFeed

        options = self._options
        if not options.size:
            raise UsageError("--stream-fd needs --size: an estimate, such as the machine's memory")
        settings = StreamOptions(
            options.stream_fd, options.verdict_fd, options.buffer, options.guest_wait
        )
        with closing(Ring(options.buffer)) as ring:
            session = self._session(name, options.size, "QEMU", connection, ring)
            feed = VmstateFeed(name, settings, ring, session)
            transmit(feed, session, self._emit)
            return feed.size_bytes, session.zero_clusters


def _print(event: Event) -> None:
    match event["event"]:
        case "reading":
            text = f"{event['device']}: reading {event['path']}, {event['bytes']} bytes"
        case "attached":
            text = f"{event['device']}: attached; waiting for the instant"
        case "draining":
            text = f"{event['text']}; what still comes is acknowledged and dropped"
        case "notice":
            text = event["text"]
        case "buffer":
            text = (
                f"{event['device']}: old data waits: {event['memory_bytes']} bytes in memory, "
                f"{event['spool_bytes']} in the spool file; {event['waiting_writes']} writes wait"
            )
        case "sent":
            text = f"{event['device']}: done; the archive is stored"
        case _:
            return
    print(one_line(text), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
