# SPDX-License-Identifier: Apache-2.0
"""`vma create`: the reference tool's grammar, our processes."""

from __future__ import annotations

import getopt
import os
import sys
from collections.abc import Callable, Sequence

from vmapipe.control.coordinator.job import BackupJob, Disk, JobPlan
from vmapipe.control.coordinator.output_spec import goes_to_stdout, inherited_fds
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure, UsageError
from vmapipe.runtime.event_types import BackupProgressEvent
from vmapipe.runtime.events import Event
from vmapipe.runtime.text import MAX_NAME_CHARS, one_line
from vmapipe.runtime.uuids import random_uuid
from vmapipe.vma.header import MAX_BLOB_BYTES


def create(argv: Sequence[str]) -> None:
    """`vma create FILE [-v] [-c CONFIG]... [-d format=FMT:DEVNAME=PATH]... [[DEVNAME=]PATH]...`"""
    options, arguments = getopt.gnu_getopt(list(argv), "hvc:d:")
    if not arguments:
        raise UsageError("create: the name of the archive is missing")
    archive, *paths = arguments
    configs = [value for option, value in options if option == "-c"]
    disks = [_device(value) for option, value in options if option == "-d"]
    if disks and paths:
        raise UsageError("Unexpected extra argument - specify all devices via '-d'")
    disks += [_legacy(path, index) for index, path in enumerate(paths)]
    if archive.startswith("/dev/fdname/"):
        raise UsageError(f"{archive}: only QEMU's own monitor knows descriptors by name; use fd:N")
    verbose = ("-v", "") in options
    pass_fds = inherited_fds(archive)
    stream = sys.stderr if goes_to_stdout(archive) else sys.stdout
    cancel = Cancel()
    cancel.on_signals()
    plan = JobPlan(
        job_id=random_uuid(),
        disks=disks,
        archive=archive,
        archiver_options=["--no-manifest", *_config_options(configs)],
        pass_fds=pass_fds,
    )
    report = _CreateReport(print_to=stream.write if verbose else _nowhere)
    BackupJob(plan).run(report, cancel)
    report.images()
    stream.flush()


def _nowhere(text: str) -> int:
    return len(text)


def _device(text: str) -> Disk:
    """The value of `-d`: `format=FMT[,others=yes]:DEVNAME=PATH`; others as for `vmapipe backup`."""
    prefix, colon, rest = text.partition(":")
    if not colon or not prefix.startswith("format="):
        raise UsageError(f"No format specified for device: '{text}'")
    name, equals, path = rest.partition("=")
    if not equals or not name or not path:
        raise UsageError(f"no DEVNAME=PATH in device: '{text}'")
    image_format, comma, more = prefix.removeprefix("format=").partition(",")
    if comma and more != "others=yes":
        raise UsageError(f"only others=yes may follow the format of a device: '{text}'")
    others = ("--others",) if comma else ()
    return Disk(name, path, reading=(f"--format={image_format}", *others))


def _legacy(text: str, index: int) -> Disk:
    """A bare `[DEVNAME=]PATH`; without a name they are disk0, disk1, ..."""
    name, equals, path = text.partition("=")
    return Disk(name, path) if equals else Disk(f"disk{index}", text)


def _config_options(paths: Sequence[str]) -> list[str]:
    argv = []
    for path in paths:
        try:
            too_large = os.stat(path).st_size > MAX_BLOB_BYTES
        except OSError as error:
            raise Failure(f"Unable to read file: {path}: {error.strerror}") from error
        if too_large:
            raise Failure(f"Unable to append config data {path}: more than {MAX_BLOB_BYTES} bytes")
        argv.append(f"--config={os.path.basename(path)}={path}")
    return argv


class _CreateReport:
    """Prints what the reference prints with `-v`."""

    def __init__(self, print_to: Callable[[str], object]) -> None:
        self._print = print_to
        self._percent = -1
        self._last: BackupProgressEvent | None = None

    def __call__(self, event: Event) -> None:
        if event["event"] != "progress" or "devices" not in event:
            return
        self._last = event
        done = sum(d["done_bytes"] for d in event["devices"])
        total = sum(d["bytes"] for d in event["devices"])
        percent = 100 * done // total
        if percent != self._percent:
            self._percent = percent
            zero = sum(d["zero_bytes"] for d in event["devices"])
            self._print(f"progress {percent}% {done}/{total} {zero}\n")

    def images(self) -> None:
        for device in self._last["devices"] if self._last else []:
            size, zero = device["bytes"], device["zero_bytes"]
            self._print(
                f"image {one_line(device['name'], MAX_NAME_CHARS)}: size={size} zeros={zero} saved={size - zero}\n"
            )
