# SPDX-License-Identifier: Apache-2.0
"""`vmapipe restore --live`: the options of a machine that runs while its disks are restored."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from vmapipe.control.cli.caches import add_cache_options, cache_words
from vmapipe.control.cli.errors import naming
from vmapipe.control.cli.inspect import open_signed
from vmapipe.control.coordinator.render import renderer
from vmapipe.control.qmp.addresses import add_monitor_options
from vmapipe.restore.targets.files import Folders
from vmapipe.restore.targets.plan import Larger, TargetDefaults
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import UsageError
from vmapipe.runtime.folders import HeldFolder

# Of a restore's options those that a live one has no use for.
_NOT_LIVE = ("map", "salvage", "resume", "workers", "manifest", "no_manifest", "ionice")


def split_machine(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return our own words, and the machine's command behind `--` where --live asks for one."""
    words = list(argv)
    if "--" not in words or "--live" not in words[: words.index("--")]:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def add_live_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a machine that runs meanwhile")
    group.add_argument(
        "--live",
        action="store_true",
        help="start the machine at once, from the archive, and bring its disks to DIR behind it: "
        "the command of QEMU follows --; its -device options name the archive's devices "
        "(drive=drive-scsi0). With --libvirt it is the domain that starts. Said again, it goes on "
        "where it was",
    )
    add_monitor_options(
        group,
        help="with --live: the machine is one that runs already, on overlays above vmapipe serve",
    )
    add_cache_options(parser)


def check_live(options: argparse.Namespace, machine: Sequence[str]) -> None:
    """Refuse, before anything is made, what does not belong together. Raises UsageError."""
    if not options.live:
        if options.qmp or options.qmp_share:
            raise UsageError("--qmp is for --live")
        return
    for name in _NOT_LIVE:
        if getattr(options, name):
            raise UsageError(f"--{name.replace('_', '-')} is not for --live")
    if options.libvirt and machine:
        raise UsageError("libvirt starts the domain: leave out what is behind --")
    # Late, here and below: most restores are not live, and that is a third of the modules.
    from vmapipe.access.open_storage import refuse_streams

    refuse_streams(options.archive)


def restore_live(
    options: argparse.Namespace,
    words: Sequence[str],
    machine: Sequence[str],
    chosen: Sequence[tuple[str, str | None]],
    folder: HeldFolder,
) -> None:
    """Run `vmapipe restore --live`; `words`: our own part of the command line. Raises Failure."""
    from vmapipe.access.live.session import LiveRequest, LiveSession

    command = shlex.join(["vmapipe", "restore", *words])
    larger = Larger.ALWAYS if options.allow_larger else Larger.DEVICES
    request = LiveRequest(
        options.archive,
        options.folder,
        chosen,
        TargetDefaults(options.format, options.overwrite, larger),
        not options.no_configs,
        machine,
        options.qmp or "",
        options.qmp_share,
        options.speed,
        cache_words(options),
        command,
        f"{command} -- {shlex.join(machine)}" if machine else command,
    )
    cancel = Cancel()
    cancel.on_signals()
    with (
        renderer("restore", options, sys.stdout) as emit,
        naming(options.archive),
        open_signed(options, cancel, emit) as archive,
        Folders(folder) as folders,
        LiveSession(request, archive, folder, folders, emit, cancel) as session,
    ):
        session.run()
