# SPDX-License-Identifier: Apache-2.0
"""`vmapipe restore --libvirt`: the options of a restore that ends in a domain of libvirt's."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from vmapipe.control.cli.caches import cache_words
from vmapipe.control.cli.errors import naming
from vmapipe.control.cli.inspect import open_signed
from vmapipe.control.coordinator.priorities import priorities
from vmapipe.control.coordinator.render import renderer
from vmapipe.restore.job import Options
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure, UsageError
from vmapipe.runtime.text import name_text

_FORMATS = ("", "raw", "qcow2")
# Of a restore's options those that belong to files of one's own choice.
_NOT_HERE = ("folder", "device", "map", "salvage", "no_configs", "allow_larger", "qmp", "qmp_share")
_ONLY_HERE = ("connect", "name", "pool", "dir", "network", "config", "same", "start")


def add_libvirt_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a machine of libvirt's")
    group.add_argument(
        "--libvirt",
        action="store_true",
        help="make volumes for the disks, restore into them, and define the machine as a domain: of "
        "libvirt's XML in the archive, or of Proxmox VE's configuration. What is not as it was is "
        "named. Where it fails nothing is left",
    )
    group.add_argument(
        "--connect",
        metavar="URI",
        default="",
        help="which libvirt, as of virsh -c (default: the usual one); it is this host's",
    )
    group.add_argument("--name", metavar="NAME", help="the domain's name (default: as it was)")
    place = group.add_mutually_exclusive_group()
    place.add_argument(
        "--pool",
        metavar="POOL",
        help="the pool that gets a volume a disk, NAME-vda.qcow2 (default: the pool default)",
    )
    place.add_argument(
        "--dir", metavar="FOLDER", help="a folder, which is there, for the disks' files instead"
    )
    group.add_argument(
        "--network",
        metavar="NETWORK",
        help="what its network cards are connected to: a network of libvirt's, bridge:NAME, user "
        "(QEMU's own), or none (default: none, the cards' links are down; with --same the networks "
        "of the same names)",
    )
    group.add_argument(
        "--same",
        action="store_true",
        help="the same machine again: its uuid, its network cards' addresses and its networks "
        "(default: new ones, so that it can run beside the first)",
    )
    group.add_argument(
        "--config",
        metavar="FILE",
        help="the machine's configuration, instead of the archive's: a domain's XML or a "
        "qemu-server.conf",
    )
    group.add_argument(
        "--start",
        action="store_true",
        help="start the domain when it is restored; with --live, which starts it anyway, at once",
    )


def check_libvirt(options: argparse.Namespace) -> None:
    """Refuse, before anything is made, what does not belong together. Raises UsageError."""
    if not options.libvirt:
        for name in _ONLY_HERE:
            if getattr(options, name):
                raise UsageError(f"--{name} is for --libvirt")
        return
    for name in _NOT_HERE:
        if getattr(options, name):
            word = "DIR" if name == "folder" else f"--{name.replace('_', '-')}"
            raise UsageError(f"{word} is not for --libvirt: say --dir or --pool")
    if options.format not in _FORMATS:
        raise UsageError(f"--format {options.format} is not for --libvirt: use raw or qcow2")
    if options.resume and (options.pool or not options.dir or options.format != "raw"):
        raise UsageError("with --libvirt, --resume is for --dir and --format raw")
    for word in ("name", "pool", "dir", "network", "config"):
        if getattr(options, word) == "":
            raise UsageError(f"--{word} is empty")


def restore_domain(
    options: argparse.Namespace, restore_options: Options, words: Sequence[str]
) -> None:
    """Run `vmapipe restore --libvirt`; `words`: the command line. Raises Failure."""
    # Here: a plain restore needs nothing of it.
    from vmapipe.access.machine.domain import (
        NAME_RULE,
        Draft,
        draft_of_libvirt,
        is_domain_name,
        parse_network,
    )
    from vmapipe.access.machine.libvirt import looks_like_libvirt
    from vmapipe.access.machine.proxmox import config_without_one
    from vmapipe.access.machine.proxmox_domain import draft_of_proxmox
    from vmapipe.control.cli.configuration import config_text, configuration_of
    from vmapipe.control.hosts.libvirt.live import LiveWords
    from vmapipe.control.hosts.libvirt.restore import DefineRequest, DomainRestore

    def draft_of(raw: bytes, names: list[str]) -> Draft:
        if looks_like_libvirt(raw):
            return draft_of_libvirt(raw, names)
        if not raw:
            emit(
                {
                    "event": "notice",
                    "text": "the archive has no configuration: the domain is a plain machine with "
                    "its disks; --config FILE says what it was",
                }
            )
        return draft_of_proxmox(config_text(raw) or config_without_one(names), names)

    if options.name is not None and not is_domain_name(options.name):
        raise UsageError(f"--name {name_text(options.name)}: {NAME_RULE}")
    network = None
    if options.network is not None:
        network = parse_network(options.network)
        if network is None:
            raise UsageError(
                f"--network {options.network!r}: say a network of libvirt's, bridge:NAME, user or none"
            )
    priorities(options).apply_to_us()
    cancel = Cancel()
    cancel.on_signals()
    again = shlex.join(["vmapipe", "restore", *words])
    request = DefineRequest(
        options.archive,
        options.connect,
        options.name or "",
        options.pool or "",
        options.dir or "",
        options.format,
        options.same,
        options.overwrite,
        options.start,
        network,
        restore_options,
        LiveWords(options.speed, cache_words(options), again) if options.live else None,
    )
    with (
        renderer("restore", options, sys.stdout) as emit,
        naming(options.archive),
        open_signed(options, cancel, emit) as archive,
    ):
        for text in archive.notes:
            emit({"event": "notice", "text": text})
        names = [device.name for device in archive.header.devices if not device.is_vmstate]
        if not names:
            raise Failure("there is no disk in the archive")
        draft = draft_of(configuration_of(archive.header, options.config, cancel), names)
        with DomainRestore(request, emit, cancel) as job:
            job.run(archive, draft)
