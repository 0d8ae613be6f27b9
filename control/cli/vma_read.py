# SPDX-License-Identifier: Apache-2.0
"""`vma list`, `config`, `extract` and `verify`: the reference tool's grammar and output."""

from __future__ import annotations

import contextlib
import getopt
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from vmapipe.control.cli.errors import reference_words
from vmapipe.control.cli.identity import identities_in
from vmapipe.control.cli.inspect import find_config
from vmapipe.control.coordinator.output_spec import inherited_fds
from vmapipe.restore.archive.compressed import ReadOptions
from vmapipe.restore.archive.errors import RestoreError
from vmapipe.restore.archive.reader import ArchiveTotals, open_archive
from vmapipe.restore.job import restore
from vmapipe.restore.targets.files import Folders, NewFile, write_configs
from vmapipe.restore.targets.map_file import MapEntry, parse_map
from vmapipe.restore.targets.plan import Plan, device_named, plan_folder, plan_map
from vmapipe.restore.verify.verify import VerifyOptions
from vmapipe.restore.verify.verify import verify as check
from vmapipe.runtime.cancel import Cancel, awaited_lines
from vmapipe.runtime.errors import Damaged, Failure, UsageError, os_error_text
from vmapipe.runtime.events import Event
from vmapipe.runtime.folders import HeldFolder, MadeFolder
from vmapipe.runtime.text import MAX_NAME_CHARS, one_line
from vmapipe.vma.errors import ArchiveError
from vmapipe.vma.header import Header


def show_list(argv: Sequence[str]) -> None:
    """`vma list FILE`"""
    options, (file,) = _parse(argv, "h", 1, "list")
    with open_archive(file, _stoppable(file), _reading(options)) as archive:
        print_content(archive.header)


def show_config(argv: Sequence[str]) -> None:
    """`vma config FILE [-c NAME]`"""
    options, (file,) = _parse(argv, "hc:", 1, "config")
    with open_archive(file, _stoppable(file), _reading(options)) as archive:
        name = dict(options).get("-c", "qemu-server.conf")
        data = find_config(archive.header.configs, name).data
    sys.stdout.buffer.write(data)


def extract(argv: Sequence[str]) -> None:
    """`vma extract FILE [-v] [-d DRIVE,...] [-r MAPFIFO] DIR`"""
    options, (file, folder) = _parse(argv, "hvd:r:", 2, "extract")
    wanted = [name for o, value in options if o == "-d" for name in value.split(",")]
    map_file = dict(options).get("-r")
    cancel = _stoppable(file)
    with open_archive(file, cancel, _reading(options)) as archive:
        with ExitStack() as stack:
            held = stack.enter_context(_new_folder(folder))
            folders = stack.enter_context(Folders(held))
            report = _ReadReport(verbose=("-v", "") in options)
            for name in wanted:
                device_named(archive.header, name)
            try:
                # Before the map is asked for: its writer reads the configs first.
                for config in write_configs(archive.header, folder, folders):
                    stack.push(_taking_back(config))
                plan = _plan(archive.header, folder, wanted, map_file, cancel)
                result = restore(archive, plan, report, cancel, folders=folders)
            except (ArchiveError, RestoreError) as error:
                raise _worded("restore failed", error) from error
        report.end(result.totals)


@contextlib.contextmanager
def _new_folder(path: str) -> Iterator[HeldFolder]:
    """A folder that was not there; removed again where the restore fails, which leaves nothing."""
    try:
        made = MadeFolder(path)
    except OSError as error:
        raise Failure(
            f"unable to create target directory {path} - {os_error_text(error)}"
        ) from error
    with made as folder:
        yield folder


def _taking_back(config: NewFile) -> Callable[[type[BaseException] | None, object, object], None]:
    """For the end: a restore that failed leaves no config either."""

    def end(kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is not None:
            config.withdraw()
        config.close()

    return end


def verify(argv: Sequence[str]) -> None:
    """`vma verify FILE [-v]`: all that can be checked, the data too where there is a manifest."""
    options, (file,) = _parse(argv, "hv", 1, "verify")
    progress = _ReadReport(verbose=("-v", "") in options)
    cancel = Cancel()
    cancel.on_signals()
    try:
        report = check(file, progress, cancel, VerifyOptions(read=_reading(options)))
    except ArchiveError as error:
        raise Damaged(reference_words(error)) from error
    if not report.ok:
        first = report.damage[0]
        text = first.reference_text or first.text
        detail = str(first).removeprefix(text).strip()
        raise Damaged(f"verify failed - {text}" + (f" ({detail})" if detail else ""))
    if report.stored_bytes:
        print(
            "vma: encrypted: only the stored file was compared with its manifest", file=sys.stderr
        )
    progress.end(report.totals)


def print_content(header: Header) -> None:
    """The list. CTIME comes last and is flushed: qmrestore begins when it sees it."""
    for config in header.configs:
        print(f"CFG: size: {len(config.data)} name: {one_line(config.name, MAX_NAME_CHARS)}")
    for device in header.devices:
        if device.is_vmstate:
            print(f"VMSTATE: dev_id={device.dev_id} memory: {device.size_bytes}")
        else:
            name = one_line(device.name, MAX_NAME_CHARS)
            print(f"DEV: dev_id={device.dev_id} size: {device.size_bytes} devname: {name}")
    print(f"CTIME: {time.ctime(header.ctime_s)}", flush=True)


def _parse(
    argv: Sequence[str], letters: str, count: int, command: str
) -> tuple[list[tuple[str, str]], list[str]]:
    options, arguments = getopt.gnu_getopt(list(argv), letters, ["identity="])
    if len(arguments) != count:
        raise UsageError(f"{command} takes {count} argument(s), not {len(arguments)}")
    return options, arguments


def _reading(options: Sequence[tuple[str, str]]) -> ReadOptions:
    paths = [value for option, value in options if option == "--identity"]
    return ReadOptions(identities=identities_in(paths))


def _stoppable(file: str) -> Cancel:
    """Signals stop us from here on; `file` is looked at before we open anything ourselves."""
    inherited_fds(file)
    cancel = Cancel()
    cancel.on_signals()
    return cancel


def _plan(
    header: Header, folder: str, wanted: Sequence[str], map_file: str | None, cancel: Cancel
) -> Plan:
    if map_file is None:
        chosen: list[tuple[str, str | None]] = [(name, None) for name in wanted]
        plan = plan_folder(header, folder, chosen, configs=False)
        for device in header.devices:
            if device.dev_id in plan.targets and not device.is_vmstate:
                path = one_line(f"{folder}/tmp-disk-{device.name}.raw")
                print(f"DEVINFO {path} {device.size_bytes}")
        sys.stdout.flush()
        return plan
    print_content(header)
    try:
        entries = parse_map(awaited_lines(map_file, cancel))
    except OSError as error:
        raise Failure(f"unable to open {map_file} - {os_error_text(error)}") from error
    for device in header.devices:
        if wanted and device.name not in wanted:
            entries[device.name] = MapEntry(skip=True)
    return plan_map(header, entries, folder)


def _worded(prefix: str, error: ArchiveError | RestoreError) -> Failure:
    failure = Failure(f"{prefix} - {reference_words(error)}")
    failure.exit_code = error.exit_code
    return failure


class _ReadReport:
    """Prints what the reference prints with `-v`."""

    def __init__(self, *, verbose: bool) -> None:
        self._verbose = verbose
        self._percent = -1
        self._started = time.monotonic()

    def __call__(self, event: Event) -> None:
        if event["event"] == "notice":
            print(f"vma: {one_line(event['text'])}", file=sys.stderr, flush=True)
        if event["event"] != "progress" or "total_bytes" not in event:
            return
        if not self._verbose or not event["total_bytes"]:
            return
        percent = 100 * event["done_bytes"] // event["total_bytes"]
        if percent != self._percent:
            self._percent = percent
            seconds = int(time.monotonic() - self._started)
            print(
                f"progress {percent}% (read {event['done_bytes']} bytes, duration {seconds} sec)",
                flush=True,
            )

    def end(self, totals: ArchiveTotals) -> None:
        if not self._verbose:
            return
        read_bytes, sparse_bytes = totals.cluster_bytes, totals.zero_cluster_bytes
        if not read_bytes:
            print("vma archive does not contain any data")
            return
        print(
            f"total bytes read {read_bytes}, sparse bytes {sparse_bytes} "
            f"({100 * sparse_bytes / read_bytes:.3g}%)"
        )
        if read_bytes > sparse_bytes:
            saved = 100 * totals.zero_block_bytes / (read_bytes - sparse_bytes)
            print(f"space reduction due to 4K zero blocks {saved:.3g}%")
