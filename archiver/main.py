# SPDX-License-Identifier: Apache-2.0
"""`vmapipe archiver`: one process, one archive; or a service that starts such processes."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vmapipe.archiver.arguments import (
    add_output_options,
    add_service_options,
    lock_arguments,
    read_configs,
    recipients_of,
    signing_key_of,
)
from vmapipe.archiver.job.device import FrameMark
from vmapipe.archiver.job.server import Listen, serve
from vmapipe.archiver.job.spec import RECONNECT_S, JobSpec
from vmapipe.archiver.job.writer import ArchiveWriter
from vmapipe.archiver.outputs.base import Output
from vmapipe.archiver.outputs.cluster_digests import SUFFIX as DIGESTS_SUFFIX
from vmapipe.archiver.outputs.cluster_digests import (
    DigestFile,
    DigestObject,
    DigestPlace,
)
from vmapipe.archiver.outputs.file import FileOutput
from vmapipe.archiver.outputs.manifests import (
    SIGNATURE_SUFFIX,
    Digests,
    ManifestFile,
    ManifestLines,
    ManifestObject,
    ManifestOutput,
    ManifestSink,
    beside,
    files_of,
)
from vmapipe.archiver.outputs.open import (
    check_lockable,
    is_stream,
    object_lock,
    open_output,
)
from vmapipe.protocol.limits import MAX_RECONNECT_S
from vmapipe.runtime.arguments import (
    add_child_options,
    add_tcp_options,
    check_endpoint,
    job_id,
    make_parser,
    size,
)
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import UsageError
from vmapipe.runtime.events import Emit, Event
from vmapipe.runtime.object_names import is_object
from vmapipe.runtime.process import lower_priority, run, run_child
from vmapipe.runtime.text import one_line
from vmapipe.runtime.uuids import random_uuid
from vmapipe.vma.header import MAX_DEVICES
from vmapipe.vma.packer import HOLD_BYTES

if TYPE_CHECKING:
    from vmapipe.archiver.base.check import Base
    from vmapipe.archiver.outputs.cluster_digests import BaseDigests
    from vmapipe.runtime.keys import ServerKeys
    from vmapipe.runtime.objectlock import ObjectLock

DESCRIPTION = """\
Receive the disks of one backup from their producers and store them as one VMA
archive; or, with --directory, be a service that does so for any number of
backups of other hosts, in a folder or in an object store. An archive appears
under its name when it is complete and on disk; a job that fails leaves nothing
behind.
"""

EPILOG = """\
example, by hand, in two terminals:
  vmapipe archiver --listen ipc:///run/backup.sock --expect 1 --output vm.vma
  vmapipe producer --archiver ipc:///run/backup.sock --disk drive-scsi0=/srv/vm.raw

a service, and a backup from another host (docs/operations/hosts.md):
  vmapipe archiver --listen tcp://0.0.0.0:7777 --directory /srv/backup --keys /etc/vmapipe/keys
  vmapipe backup --archiver tcp://backup:7777 --keys /etc/vmapipe/keys --disk /srv/vm.raw vm.vma
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--listen",
        required=True,
        metavar="ENDPOINT",
        help="where producers connect: ipc://PATH, or tcp://ADDRESS:PORT",
    )
    _add_archive_options(parser)
    parser.add_argument(
        "--heartbeat",
        type=int,
        default=30,
        metavar="SECONDS",
        help="a producer that is silent for so long is dead (default: 30)",
    )
    parser.add_argument(
        "--reconnect-limit",
        type=int,
        metavar="SECONDS",
        help="a producer whose connection is lost may come back within this time and go on "
        "(default: 60, and for a service at most two thirds of --client-timeout)",
    )
    parser.add_argument(
        "--start-timeout",
        type=int,
        default=60,
        metavar="SECONDS",
        help="all devices must have come by then (default: 60)",
    )
    parser.add_argument(
        "--stand-back",
        action="store_true",
        help="let everything else on this host have the processors first (guests, for instance)",
    )
    add_output_options(parser)
    parser.add_argument(
        "--hold",
        type=size,
        default=HOLD_BYTES,
        metavar="SIZE",
        help="memory for what --stable holds until its extent is complete (default: 64M)",
    )
    # Of a stable archive of disks at rest: one after the other, as --reproducible has it.
    parser.add_argument("--in-turn", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--manifest-events", action="store_true", help=argparse.SUPPRESS)
    # For the archivers of a service, whose producers only seem to be on this host.
    parser.add_argument("--from-afar", action="store_true", help=argparse.SUPPRESS)
    add_service_options(parser)
    tcp = parser.add_argument_group("over tcp://")
    add_tcp_options(tcp, "its key pair, and clients/NAME.pub for each client that may come")
    add_child_options(parser)


def _add_archive_options(parser: argparse.ArgumentParser) -> None:
    one = parser.add_argument_group("for one archive")
    one.add_argument(
        "--output",
        metavar="ARCHIVE",
        help="a new file, - (stdout), a FIFO or device, exec:CMD, fd:N, /dev/fdset/N "
        "or s3://BUCKET/KEY; without --device, --expect and --config s3://BUCKET/PREFIX is as "
        "--directory",
    )
    one.add_argument(
        "--device",
        action="append",
        default=[],
        metavar="NAME",
        help="a device that must come; repeated: all of them, in the archive's order",
    )
    one.add_argument(
        "--expect",
        type=int,
        default=0,
        metavar="N",
        help="take the first N devices that come, whatever their names",
    )
    one.add_argument(
        "--job",
        type=job_id,
        metavar="HEX",
        help="the job's id, 32 hex digits (default: the first producer's)",
    )
    one.add_argument(
        "--base",
        metavar="auto|ARCHIVE",
        help="an earlier archive of these devices, with its manifest: producers need not send what is "
        "unchanged since then, and it is taken from there (docs/operations/incremental.md); auto: the "
        "newest of the same machine beside the output",
    )
    # For a service: what its client asks for.
    one.add_argument("--time", type=int, default=0, help=argparse.SUPPRESS)
    one.add_argument("--full-every", type=int, default=0, help=argparse.SUPPRESS)
    one.add_argument("--recorded", type=job_id, action="append", default=[], help=argparse.SUPPRESS)
    one.add_argument(
        "--digests",
        action="store_true",
        help="make a digest of each cluster, too, in ARCHIVE.digests beside a file: with them a later "
        "backup with this one as its base need not send what it reads unchanged",
    )


def main(argv: Sequence[str] | None = None, prog: str = "vmapipe archiver") -> int:
    parser = make_parser(prog, DESCRIPTION, EPILOG)
    add_options(parser)
    options = parser.parse_args(argv)
    if _names_a_prefix(options):
        options.directory, options.output = options.output, None
    if options.directory is not None:
        return run(prog, lambda: _serve_jobs(options))
    return run_child(
        prog, options.parent_fd, lambda cancel, emit: _archive(options, cancel, emit), _print
    )


def _names_a_prefix(options: argparse.Namespace) -> bool:
    """`--output s3://BUCKET/PREFIX` and nothing of what goes into one archive: a service's place."""
    of_one_archive = options.device or options.expect or options.config
    return options.directory is None and is_object(options.output or "") and not of_one_archive


def _serve_jobs(options: argparse.Namespace) -> None:
    check_endpoint(options.listen, plain_tcp=options.insecure_plain_tcp, keys=options.keys)
    # A program of its own, which the archiver of one job does not load.
    from vmapipe.archiver.service.main import serve_jobs

    cancel = Cancel()
    cancel.on_signals()
    signing_key_of(options.sign)  # a wrong one is told before anybody comes
    if options.sign:
        options.sign = os.path.abspath(options.sign)
    options.encrypt_to = [one.text for one in recipients_of(options.encrypt_to, cancel)]
    options.lock_words = lock_arguments(options)
    if options.lock_words:
        check_lockable(options.directory, options.lock_mode)
    serve_jobs(options, cancel)


def _archive(options: argparse.Namespace, cancel: Cancel, emit: Emit) -> None:
    if options.output is None:
        raise UsageError("say where the archive goes: --output; or be a service: --directory")
    check_endpoint(options.listen, plain_tcp=options.insecure_plain_tcp, keys=options.keys)
    if options.device and options.expect:
        raise UsageError("--device and --expect exclude each other")
    if not options.device and not options.expect and not options.config:
        raise UsageError("say which devices come: --device NAME (repeated) or --expect N")
    if not 0 <= options.expect <= MAX_DEVICES:
        raise UsageError(f"--expect {options.expect}: an archive holds 1..{MAX_DEVICES} devices")
    if options.heartbeat < 1 or options.start_timeout < 1:
        raise UsageError("times are at least 1 second")
    reconnect_s = RECONNECT_S if options.reconnect_limit is None else options.reconnect_limit
    if not 0 <= reconnect_s <= MAX_RECONNECT_S:
        raise UsageError(f"--reconnect-limit is from 0 to {MAX_RECONNECT_S} seconds")
    if options.stand_back:
        lower_priority()
    spec = JobSpec(
        uuid=options.uuid or (b"" if options.reproducible or options.stable else random_uuid()),
        ctime_s=options.time or archive_time(reproducible=options.reproducible),
        configs=read_configs(options.config, cancel),
        devices=tuple(options.device),
        expect=options.expect,
        job=options.job,
        in_order=options.reproducible or options.in_turn,
        stable=options.stable,
        hold_bytes=options.hold,
        heartbeat_s=options.heartbeat,
        reconnect_s=reconnect_s,
        start_timeout_s=options.start_timeout,
        base=_base_of(options, emit),
    )
    keys = _server_keys(options.keys) if options.keys else None
    at = Listen(options.listen, keys, from_afar=options.from_afar)
    digests = _digests_of(spec.base)
    try:
        serve(
            spec,
            at,
            lambda wake: store_for(options, spec.base, digests, wake, cancel, emit),
            cancel,
            emit,
            digests,
        )
    finally:
        if digests is not None:
            digests.close()


def _server_keys(folder: str) -> ServerKeys:
    """Raises Failure, UsageError."""
    from vmapipe.runtime.keys import read_server_keys

    return read_server_keys(folder)


def _base_of(options: argparse.Namespace, emit: Emit) -> Base | str | None:
    """Return the base, or why there is none; None: none was asked for. Tells of one that was chosen here."""
    if not options.base:
        return None
    # Imported here, as all that only bases need: a backup starts sooner without.
    from vmapipe.archiver.base.check import Base, check_base

    if options.base != "auto":
        return check_base(options.base)
    from vmapipe.archiver.base.choice import choose_base, usable_base

    found = choose_base(options.output, options.device, options.recorded)
    found = usable_base(found, options.full_every)
    emit(
        {
            "event": "base-chosen",
            "archive": found.archive if isinstance(found, Base) else "",
            "uuid": found.uuid.hex() if isinstance(found, Base) else "",
            "devices": [
                {"name": device.name, "bytes": device.size_bytes}
                for device in (found.devices if isinstance(found, Base) else ())
            ],
            "compares": isinstance(found, Base) and bool(found.totals.cluster_digests_bytes),
            "reason": found if isinstance(found, str) else "",
        }
    )
    return found


def _digests_of(base: Base | str | None) -> BaseDigests | None:
    """Return the open digests of the base, if there is one and it has some."""
    if base is None or isinstance(base, str):
        return None
    from vmapipe.archiver.base.check import open_digests

    return open_digests(base)


def archive_time(*, reproducible: bool) -> int:
    """Seconds since 1970: now, or SOURCE_DATE_EPOCH (0 without it) for reproducible archives."""
    if not reproducible:
        return int(time.time())
    text = os.environ.get("SOURCE_DATE_EPOCH", "0")
    if not (text.isascii() and text.isdigit()) or int(text) >= 1 << 63:
        raise UsageError(f"SOURCE_DATE_EPOCH={text!r} is not a number of seconds")
    return int(text)


def _print(event: Event) -> None:
    match event["event"]:
        case "listening":
            text = f"listening on {event['endpoint']}"
        case "notice":
            text = event["text"]
        case "stored":
            text = f"stored {event['archive']}: {event['stored_bytes']} bytes"
        case _:
            return
    print(one_line(text), file=sys.stderr, flush=True)


def store_for(
    options: argparse.Namespace,
    base: Base | str | None,
    base_digests: BaseDigests | None,
    wake: Callable[[], None],
    cancel: Cancel,
    emit: Emit,
) -> ArchiveWriter[FrameMark]:
    """Open the output and what goes beside it. Raises Failure; nothing is then left."""
    compression = None
    if options.compress:
        from vmapipe.archiver.outputs.compress import parse_compression

        compression = parse_compression(options.compress, options.threads)
    if options.manifest and options.no_manifest:
        raise UsageError("--manifest and --no-manifest exclude each other")
    recipients = recipients_of(options.encrypt_to, cancel)
    seed = signing_key_of(options.sign)
    lock_arguments(options)
    lock = object_lock(options.lock, options.lock_mode)
    if lock is not None:
        check_lockable(options.output, options.lock_mode)
    output = open_output(options.output, cancel=cancel, emit=emit, lock=lock)
    try:
        sink = _manifest_sink(options, output, cancel, emit, lock)
        if seed:
            sink = _signed(sink, seed, options, output, cancel, emit, lock)
    except BaseException:
        output.abandon()
        raise
    clusters = None
    try:
        # Digests of clusters would tell whoever reads them what an encrypted archive holds.
        wanted = (options.digests or base_digests) and not recipients
        if sink and wanted:
            place = _place_of_digests(options.output + DIGESTS_SUFFIX, output, cancel, emit, lock)
            clusters = DigestFile(place, base_digests) if place else None
    except BaseException:
        if sink:
            sink.abandon()
        output.abandon()
        raise
    digests = Digests(sink, clusters, recipients, to_be_signed=bool(seed)) if sink else None
    found = None if isinstance(base, str) else base
    writer: ArchiveWriter[FrameMark] = ArchiveWriter(
        output, digests, wake, compression, found, recipients
    )
    if lock is not None and isinstance(output, FileOutput):
        from vmapipe.runtime.immutable import lock_files

        files, until_s = files_of(options.output), lock.until_s
        writer.after_commit = lambda: lock_files(files[0], files[1:], until_s)
    return writer


def _place_of_digests(
    name: str, output: Output, cancel: Cancel, emit: Emit, lock: ObjectLock | None
) -> DigestPlace | None:
    if is_object(name):
        from vmapipe.archiver.outputs.object import ObjectOutput

        return DigestObject(ObjectOutput(name, cancel=cancel, emit=emit, replace=True, lock=lock))
    return FileOutput(name, replace=True) if isinstance(output, FileOutput) else None


def _manifest_sink(
    options: argparse.Namespace,
    output: Output,
    cancel: Cancel,
    emit: Emit,
    lock: ObjectLock | None,
) -> ManifestSink | None:
    if options.no_manifest:
        return None
    if options.manifest or not output.is_stream:
        name = options.manifest or beside(options.output)
        if is_object(name):
            return _manifest_object(name, not options.manifest, output, cancel, emit, lock)
        if options.manifest and is_stream(name):
            return ManifestOutput(open_output(name, cancel=cancel))
        return ManifestFile(name, replace=not options.manifest)
    if options.manifest_events:
        return ManifestLines(lambda text: emit({"event": "manifest", "text": text}))
    return None


def _signed(
    sink: ManifestSink | None,
    seed: bytes,
    options: argparse.Namespace,
    output: Output,
    cancel: Cancel,
    emit: Emit,
    lock: ObjectLock | None,
) -> ManifestSink:
    """The sink, with a signature beside it. Raises Failure; nothing is then left of both."""
    from vmapipe.archiver.outputs.sign import SignedManifest

    if not isinstance(sink, ManifestFile | ManifestObject):
        if sink is not None:
            sink.abandon()
        raise UsageError(
            "--sign: what is signed is the manifest, and it has to be a file or an object: name one, "
            "--manifest FILE"
        )
    name = (options.manifest or beside(options.output)) + SIGNATURE_SUFFIX
    replace = not options.manifest

    def open_beside() -> ManifestSink:
        if is_object(name):
            return _manifest_object(name, replace, output, cancel, emit, lock)
        return ManifestFile(name, replace=replace)

    return SignedManifest(sink, open_beside, seed)


def _manifest_object(
    name: str,
    replace: bool,
    output: Output,
    cancel: Cancel,
    emit: Emit,
    lock: ObjectLock | None,
) -> ManifestSink:
    from vmapipe.archiver.outputs.object import ObjectOutput

    prepare = output.prepare if isinstance(output, ObjectOutput) else lambda: None
    made = ObjectOutput(name, cancel=cancel, emit=emit, replace=replace, lock=lock)
    return ManifestObject(made, prepare)


if __name__ == "__main__":
    sys.exit(main())
