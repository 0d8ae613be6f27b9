# SPDX-License-Identifier: Apache-2.0
"""`vmapipe repack` and `vmapipe manifest`: an archive made anew in order, and the digests of one that has none."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence

from vmapipe.archiver.arguments import add_output_options, read_configs
from vmapipe.archiver.job.writer import ArchiveWriter
from vmapipe.archiver.main import archive_time, store_for
from vmapipe.archiver.outputs.base import Output
from vmapipe.archiver.outputs.manifests import (
    ManifestFile,
    ManifestObject,
    ManifestOutput,
    ManifestSink,
    beside,
)
from vmapipe.archiver.outputs.object import ObjectOutput
from vmapipe.archiver.outputs.open import is_stream, open_output
from vmapipe.control.cli.copy import paced
from vmapipe.control.cli.errors import named, source_name
from vmapipe.control.cli.identity import (
    add_decrypt_option,
    check_decrypt_option,
    check_stays_encrypted,
)
from vmapipe.control.cli.inspect import ARCHIVE_HELP, add_read_options, read_options
from vmapipe.control.coordinator.output_spec import goes_to_stdout, inherited_fds
from vmapipe.control.coordinator.render import add_report_options, read_progress, renderer
from vmapipe.places.manifest import make_manifest
from vmapipe.places.reading import SoundArchive
from vmapipe.places.repack import Changes, Destination, parse_renames, repack
from vmapipe.places.spool import SPOOL_BYTES
from vmapipe.runtime.arguments import (
    add_service_link_options,
    check_no_service_options,
    is_service,
    make_parser,
    spool_size,
)
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Damaged, UsageError
from vmapipe.runtime.events import Emit
from vmapipe.runtime.object_names import is_object
from vmapipe.runtime.process import run
from vmapipe.runtime.text import human_bytes
from vmapipe.vma.errors import ArchiveError

DESCRIPTION = """\
Make an archive anew: one disk after the other, each in its order, in extents that do not depend on
how the old archive came about, without blocks that hold only zeroes, and with a manifest. Takes any VMA
archive: of Proxmox VE, compressed in one piece, out of order, from a pipe. Its data is checked on
the way; a damaged archive is refused, and nothing appears under the new name then.
"""

EPILOG = """\
Time and uuid stay as they are; --reproducible makes the uuid from the contents and takes the time from
SOURCE_DATE_EPOCH: the same contents give the same bytes. A file, and an archive that vmapipe compressed, is
read where its data is wanted; from anything else what comes out of order waits in a file without a name.

examples:
  vmapipe repack vzdump-qemu-100-2026_01_31-02_00_00.vma.gz vm-2026-01-31.vma.zst --compress zstd
  ssh pve zstdcat /dump/vm.vma.zst | vmapipe repack --stable - "exec:restic -q backup --stdin"
  vmapipe repack vm.vma small.vma --drop drive-scsi1 --rename drive-scsi0=drive-virtio0
  vmapipe repack vm.vma new.vma --config qemu-server.conf=changed.conf
  vmapipe repack vm.vma.gz tcp://backup:7777/vm-2026-01-31.vma --keys /etc/vmapipe/keys

exit codes: 0 stored, 1 failed, 2 wrong use, 4 the archive is damaged
"""

MANIFEST_DESCRIPTION = """\
Make the manifest of an archive that has none, as of Proxmox VE: a digest of each extent, so that
`vmapipe verify`, restore, serve and list notice from now on what has changed in it. The archive is read,
and what its format can tell is checked before: its checksums, and that each cluster is there once.
What was wrong with its data before cannot be told any more.
"""

MANIFEST_EPILOG = """\
examples:
  vmapipe manifest vzdump-qemu-100-2026_01_31-02_00_00.vma.zst
  vmapipe manifest s3://backups/vm.vma --manifest vm.vma.manifest.json

exit codes: 0 made, 1 failed, 2 wrong use, 4 the archive is damaged
"""


def main(argv: Sequence[str], prog: str) -> int:
    parser = make_parser(prog, DESCRIPTION, EPILOG)
    group = parser.add_argument_group("what changes")
    group.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="DEVICE",
        help="leave this device out; may be repeated",
    )
    group.add_argument(
        "--rename",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="give a device another name; may be repeated",
    )
    add_decrypt_option(group)
    add_output_options(parser)
    group = parser.add_argument_group("of an archive that can be read only once, from its start")
    group.add_argument(
        "--spool",
        default=tempfile.gettempdir(),
        metavar="DIR",
        help="where what comes out of order waits for its turn, in a file without a name (default: "
        "the system's folder for temporary files)",
    )
    group.add_argument(
        "--spool-size",
        type=spool_size,
        default=SPOOL_BYTES,
        metavar="SIZE",
        help="the most that may wait there (at most 64G; default: 16G)",
    )
    add_service_link_options(parser)
    add_read_options(parser)
    add_report_options(parser)
    parser.add_argument("archive", metavar="SRC", help=ARCHIVE_HELP)
    parser.add_argument(
        "output",
        metavar="DST",
        help="a new file, - (stdout), a FIFO or device, exec:COMMAND, fd:N, s3://BUCKET/KEY, or an archive of a "
        "service: tcp://HOST:PORT/NAME",
    )
    options = parser.parse_args(argv)
    return run(prog, lambda: _repack(options))


def main_manifest(argv: Sequence[str], prog: str) -> int:
    parser = make_parser(prog, MANIFEST_DESCRIPTION, MANIFEST_EPILOG)
    parser.add_argument(
        "--manifest",
        metavar="FILE",
        help="where it goes, a file or any other place (default: ARCHIVE.manifest.json)",
    )
    add_read_options(parser)
    add_report_options(parser)
    parser.add_argument("archive", metavar="ARCHIVE", help=ARCHIVE_HELP)
    options = parser.parse_args(argv)
    return run(prog, lambda: _manifest(options))


def _repack(options: argparse.Namespace) -> None:
    check_decrypt_option(options)
    inherited_fds(options.archive)
    cancel = Cancel()
    cancel.on_signals()
    changes = Changes(
        drop=frozenset(options.drop),
        rename=parse_renames(options.rename),
        configs=read_configs(options.config, cancel),
        stable=options.stable,
        ctime_s=archive_time(reproducible=True) if options.reproducible else None,
        uuid=options.uuid or b"",
    )
    options.digests, options.manifest_events = False, False
    if is_service(options.output):
        # Late: it loads what sends.
        from vmapipe.control.cli.copy_service import repack_into_service

        with renderer("repack", options, sys.stdout) as emit:
            repack_into_service(options, changes, emit, cancel)
        return
    check_no_service_options(options)
    stream = sys.stderr if goes_to_stdout(options.output) else sys.stdout
    with renderer("repack", options, stream) as emit:

        def store(wake: Callable[[], None]) -> ArchiveWriter[None]:
            writer: ArchiveWriter[None] = store_for(options, None, None, wake, cancel, emit)  # type: ignore[assignment]
            return writer

        destination = Destination(store, options.spool, options.spool_size)
        try:
            with SoundArchive(options.archive, cancel, read_options(options)) as source:
                check_stays_encrypted(source_name(options.archive), source.source, options)
                tell = paced(_progress(emit, source), options.speed, cancel)
                done = repack(source, changes, destination, tell, cancel)
        except ArchiveError as error:
            raise Damaged(named(options.archive, error)) from error
        waited = (
            f", {human_bytes(done.kept_bytes)} waited for their turn" if done.kept_bytes else ""
        )
        emit(
            {
                "event": "notice",
                "text": f"repacked {source_name(options.archive)}: {len(done.header.devices)} devices, "
                f"{human_bytes(done.plain_bytes)} in {human_bytes(done.stored_bytes)}{waited}",
            }
        )


def _progress(emit: Emit, source: SoundArchive) -> Callable[[int], None]:
    """How far the archive is read; its end is not known where it is compressed."""
    return read_progress(emit, getattr(source.source, "size_bytes", 0))


def _manifest(options: argparse.Namespace) -> None:
    cancel = Cancel()
    cancel.on_signals()
    name = options.archive
    if is_stream(name) and not options.manifest:
        raise UsageError(f"{name} can be read only once: store it first, then make its manifest")
    with renderer("manifest", options, sys.stdout) as emit:
        try:
            with SoundArchive(name, cancel, read_options(options)) as source:
                if source.source.is_encrypted:
                    raise UsageError(
                        f"{source_name(name)} is encrypted, and a manifest made now would tell what it hides: "
                        "`vmapipe repack --encrypt-to` makes both anew"
                    )
                if source.manifest is not None and not options.manifest:
                    raise UsageError(
                        f"{source.manifest.path} exists: it is compared by `vmapipe verify`, and never "
                        "replaced; remove it if it is wrong"
                    )
                sink = _sink(options.manifest or beside(name), cancel, emit)
                count = make_manifest(source, sink, _progress(emit, source), cancel)
        except ArchiveError as error:
            raise Damaged(named(name, error)) from error
        emit({"event": "notice", "text": f"made the manifest of {count} extents"})


def _sink(path: str, cancel: Cancel, emit: Emit) -> ManifestSink:
    """Where a manifest goes; nothing there is replaced."""
    output: Output
    if is_object(path):
        output = ObjectOutput(path, cancel=cancel, emit=emit)
        return ManifestObject(output, output.prepare)
    if is_stream(path):
        return ManifestOutput(open_output(path, cancel=cancel))
    return ManifestFile(path, replace=False)
